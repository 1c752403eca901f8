"""Measuring on JAX."""

import jax
import jax.numpy as jnp
from jax.extend import core

from benchmarks.work.jax import executed_flops

TRACES = True  # a step is traced and compiled


def device():
    """The kind of the device that computes."""
    return jax.devices()[0].device_kind


class StepFlops:
    """FLOPs of a model's steps; all are of one trace."""

    def __init__(self, model):
        self._model = model
        self._step = jax.jit(model.train_step)

    def __call__(self, x, y):
        """FLOPs of the next step, which is taken."""
        flops = executed_flops(self._step, *_arguments(self._model, x, y))
        self._model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)
        return flops


def conditions(model, x, y):
    """The number of `cond` equations in the traced step."""
    jaxpr = jax.make_jaxpr(model.train_step)(*_arguments(model, x, y)).jaxpr
    return _count_conditions(jaxpr)


def _count_conditions(jaxpr):
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "cond"
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                count += _count_conditions(getattr(inner, "jaxpr", inner))
    return count


def _is_jaxpr(value):
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def planned_memory(model, x, y):
    """What XLA plans for the compiled step, a dict of bytes.

    The step's results take the place of its arguments (`alias`), as `fit` donates
    them; `temporary` is what it needs besides.
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
    """The arguments of a step: the state of a model that was trained, and a batch."""
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    return state, jax.tree.map(jnp.asarray, (x, y))


def live_bytes(variables, steps):
    """Nothing: a compiled step plans its buffers ahead."""
    return None


def runner(function, arguments, wanted=(), cotangent=None, jit_compile=False):
    """A function and some of its gradients, compiled.

    Args:
        function: Pure function of a list of arrays.
        arguments: That list.
        wanted: Indices of the arguments to differentiate by.
        cotangent: Gradient of the function's result.
        jit_compile: Ignored, all is compiled.

    Returns:
        Function without arguments, which computes both and waits for the end.
    """

    @jax.jit
    def run(arguments, cotangent):
        def of_wanted(chosen):
            full = list(arguments)
            for i, value in zip(wanted, chosen):
                full[i] = value
            return function(full)

        result, pullback = jax.vjp(of_wanted, [arguments[i] for i in wanted])
        return result, pullback(cotangent) if wanted else None

    return lambda: jax.block_until_ready(run(arguments, cotangent))


def update_runner(optimizer, variables, gradients, jit_compile=False):
    """An optimizer's update, compiled; each call makes one.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built for `variables`.
        variables: List of `keras.Variable`s; their values are left as they are.
        gradients: List of arrays.
        jit_compile: Ignored, all is compiled.

    Returns:
        Function without arguments.
    """
    step = jax.jit(
        lambda state, gradients: optimizer.stateless_apply(
            state[1], gradients, state[0]
        ),
        donate_argnums=0,
    )
    state = [
        [jnp.array(v.value) for v in vs] for vs in (variables, optimizer.variables)
    ]

    def run():
        state[:] = jax.block_until_ready(step(tuple(state), gradients))

    return run
