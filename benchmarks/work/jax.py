"""Counts the work that a JAX function executes for given arguments."""

import math

import jax
import jax.numpy as jnp
from jax.extend import core

# Primitives that call one function, and the parameter that holds its jaxpr.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
_EMPTY = jax.make_jaxpr(lambda: ())().jaxpr


def executed_flops(fn, *args):
    """Returns the FLOPs of the matrix products and convolutions in `fn(*args)`.

    It evaluates the equations that the results depend on, one by one: only the branch
    of a `cond` that is taken, and only the iterations of a loop that are executed.

    Args:
        fn: Function of structures of arrays that `jax.jit` can trace.
        *args: The concrete arguments.

    Returns:
        int, two for each product, as in `torch.utils.flop_counter`.
    """
    closed = jax.make_jaxpr(fn)(*args)
    return _run(closed, jax.tree.leaves(args))[1]


def _run(closed, args):
    """Returns the results and FLOPs of a closed jaxpr."""
    jaxpr, flops = closed.jaxpr, 0
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args]))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in _needed(jaxpr):
        inputs = [read(v) for v in equation.invars]
        results, work = _evaluate(equation, inputs)
        flops += work
        values.update(zip(equation.outvars, results))
    return [read(v) for v in jaxpr.outvars], flops


def _needed(jaxpr):
    """Returns the equations that the results depend on. A compiler drops the others."""
    wanted = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or wanted.intersection(equation.outvars):
            wanted |= {v for v in equation.invars if isinstance(v, core.Var)}
            needed.append(equation)
    return needed[::-1]


def _evaluate(equation, inputs):
    """Returns the results and FLOPs of one equation."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        return _run(_closed(params[_CALLS[name]]), inputs)
    if name == "cond":
        index, *operands = inputs
        return _run(params["branches"][int(index)], operands)
    if name == "while":
        return _while(params, inputs)
    if name == "scan":
        return _scan(params, inputs)
    pairs = [(v, x) for v, x in zip(equation.invars, inputs) if isinstance(v, core.Var)]
    alone = _EMPTY.replace(
        invars=[v for v, _ in pairs], outvars=equation.outvars, eqns=[equation]
    )
    results = jax.core.eval_jaxpr(alone, (), *[x for _, x in pairs])
    return results, _flops(equation)


def _closed(jaxpr):
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def _while(params, inputs):
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, second = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body = inputs[:first], inputs[first : first + second]
    carry, total = inputs[first + second :], 0
    while True:
        (go_on,), flops = _run(test, of_test + carry)
        total += flops
        if not go_on:
            return carry, total
        carry, flops = _run(body, of_body + carry)
        total += flops


def _scan(params, inputs):
    if "ft_in" in params:  # jax 0.11
        first, second, _ = map(len, params["ft_in"].unpack())
    else:
        first, second = params["num_consts"], params["num_carry"]
    consts, carry = inputs[:first], inputs[first : first + second]
    steps = range(params["length"])
    rows, total = [None] * len(steps), 0
    for step in reversed(steps) if params["reverse"] else steps:
        slices = [x[step] for x in inputs[first + second :]]
        results, flops = _run(params["jaxpr"], consts + carry + slices)
        carry, rows[step] = results[:second], results[second:]
        total += flops
    return carry + [jnp.stack(column) for column in zip(*rows)], total


def _flops(equation):
    """Counts two for each product of two numbers, without the zeros of a dilation."""
    if equation.primitive.name == "dot_general":
        left, right = (v.aval.shape for v in equation.invars)
        (summed, _), _ = equation.params["dimension_numbers"]
        terms = math.prod(left[i] for i in summed)
        return 2 * math.prod(equation.outvars[0].aval.shape) * terms
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(kernel) // features
        spread = math.prod(equation.params["lhs_dilation"])
        return 2 * math.prod(equation.outvars[0].aval.shape) * terms // spread
    return 0
