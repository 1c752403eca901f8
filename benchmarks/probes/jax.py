"""Measurements on JAX."""

import jax
import jax.numpy as jnp

from benchmarks.work.jax import count
from benchmarks.work.jax import executed_flops


def device():
    """Returns the kind of the device that computes."""
    return jax.devices()[0].device_kind


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
