"""Measurements on JAX."""

import math

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

# Primitives that call one function.
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}
_CALLS |= {"checkpoint", "remat2"}
_PRODUCTS = {"conv_general_dilated", "dot_general"}


def device():
    """Returns the kind of the device that computes."""
    return jax.devices()[0].device_kind


def device_peak():
    """Returns the most bytes that were allocated on a GPU, `None` on a CPU."""
    statistics = jax.devices()[0].memory_stats()
    return statistics and statistics["peak_bytes_in_use"]


def step_flops(model, x, y):
    """Takes steps of the model, all with one trace, and yields the FLOPs of each."""
    step = jax.jit(model.train_step)
    while True:
        yield executed_flops(step, *_arguments(model, x, y))
        model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)


def conditions(model, x, y):
    """Returns the number of `cond` equations in the traced step."""
    jaxpr = jax.make_jaxpr(model.train_step)(*_arguments(model, x, y))
    return count(jaxpr.eqns, {"cond"})


def planned_memory(model, x, y):
    """Returns the memory that XLA plans for the compiled step, as a dict of bytes.

    `alias` counts results that replace arguments, because `fit` donates the arguments.
    `temporary` counts the temporary buffers.
    """
    compiled = jax.jit(model.train_step, donate_argnums=0)
    analysis = compiled.lower(*_arguments(model, x, y)).compile().memory_analysis()
    return {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "alias": analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }


def _arguments(model, x, y):
    """Returns the arguments of a step: the state of a trained model, and a batch."""
    weights = model.trainable_variables, model.non_trainable_variables
    variables = *weights, model.optimizer.variables, model.metrics_variables
    state = tuple([v.value for v in group] for group in variables)
    return state, jax.tree.map(jnp.asarray, (x, y))


def num_tensors():
    """Returns the number of live arrays."""
    return len(jax.live_arrays())


def executed_flops(fn, *args):
    """Returns the FLOPs of the matrix products and convolutions in `fn(*args)`.

    It evaluates the equations that the results depend on, one by one. Of a `cond` it
    evaluates only the branch that is taken.

    Args:
        fn: Function of structures of arrays that `jax.jit` can trace.
        *args: The concrete arguments.

    Returns:
        int, two for each product, as in `torch.utils.flop_counter`.

    Raises:
        NotImplementedError: if a loop has a product.
    """
    return _run(jax.make_jaxpr(fn)(*args), jax.tree.leaves(args))[1]


def count(equations, names):
    """Counts the equations with primitives of these names, also in inner jaxprs."""
    total = 0
    for equation in equations:
        total += equation.primitive.name in names
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
                total += count(value.eqns, names)
    return total


def _run(jaxpr, args):
    """Returns the results and FLOPs of a jaxpr, closed or without constants."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    flops = 0

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    # A compiler drops the equations that no result depends on.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    for equation in jaxpr.eqns:
        results, work = _evaluate(equation, [read(v) for v in equation.invars])
        flops += work
        values.update(zip(equation.outvars, results))
    return [read(v) for v in jaxpr.outvars], flops


def _evaluate(equation, inputs):
    """Returns the results and FLOPs of one equation."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        index, *operands = inputs
        return _run(params["branches"][int(index)], operands)
    if name in _CALLS:
        return _run(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], inputs)
    if name in {"scan", "while"} and count([equation], _PRODUCTS):
        raise NotImplementedError("The FLOPs of a loop are unknown.")
    results = equation.primitive.bind(*inputs, **params)
    results = results if equation.primitive.multiple_results else [results]
    return results, _flops(equation)


def _flops(equation):
    """Counts two for each product of two numbers, without the zeros of a dilation."""
    if equation.primitive.name not in _PRODUCTS:
        return 0
    left, right = (v.aval.shape for v in equation.invars)
    numbers, spread = equation.params["dimension_numbers"], 1
    if equation.primitive.name == "dot_general":
        terms = math.prod(left[i] for i in numbers[0][0])
    else:
        terms = math.prod(right) // right[numbers.rhs_spec[0]]
        spread = math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms // spread
