"""Sparse gradients on JAX, one compiled step for all masks.

Under `jit` the mask is not known while the step is traced, so the step holds the work
of every gradient; `jax_graph` puts it under conditions. Executed are then the forward
pass, the backward pass down to the lowest active layer, and the weight gradients of the
active layers. Where the mask is known only the wanted gradients are asked for.

The second pass reuses from the first what depends on no weight, like a frozen prefix
and the noise of dropout. Everything else is computed again: a value kept for the second
pass takes memory, also where the model asks for it to be recomputed.
"""

import contextlib

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.extend import core

from keras_slsam.atomic import Staged
from keras_slsam.atomic import assign_if
from keras_slsam.gradients import jax_graph
from keras_slsam.gradients import passes
from keras_slsam.gradients.replay import Replay

no_grad = contextlib.nullcontext  # JAX differentiates only what it is told to
can_compile = True
init_scope = contextlib.nullcontext
Scope = keras.StatelessScope


def concrete(mask):
    """The entries of `mask`: Python bools, or scalar arrays while tracing."""
    if isinstance(mask, jax.core.Tracer):
        return list(jnp.unstack(mask))
    return np.asarray(mask).tolist()


class Passes(passes.Passes):
    """The passes on JAX, traced or with a known mask."""

    def _check_devices(self):
        if jax.process_count() > 1:
            raise ValueError(
                "Sharpness-aware steps in several processes of JAX are not supported "
                f"yet. Received: {jax.process_count()} processes. Train in one process."
            )

    def first(self, weights):
        """Value of the loss and the gradients of the active weights.

        Args:
            weights: List of arrays to differentiate at.

        Returns:
            `((loss, aux), gradients)`; the gradient of an inactive weight is `None` if
            `active` holds bools and zero otherwise, that of an active weight that the
            loss does not reach is zero.
        """
        self._known = all(isinstance(on, bool) for on in self._active)
        if self._known:
            self._replay = replay(self._loss_fn.model)
            return self._of_known(weights)
        self._gradients = jax_graph.Gradients(
            jax.value_and_grad(self._loss_fn, has_aux=True),
            weights,
            self._arms,
            self._active,
            self._twice,
            self._min_probability,
        )
        return self._gradients.first(weights)

    def second(self, weights):
        """The gradients at other values of the active weights.

        Args:
            weights: List of arrays, the inactive ones those of the first pass.

        Returns:
            List like the gradients of `first`.
        """
        if self._known:
            return self._of_known(weights)[1]
        return self._gradients.second(weights)[1]

    def _of_known(self, weights):
        """Differentiates with respect to the active weights only."""
        wanted = [self._active[arm] for arm in self._arms]

        def loss_of(leaves):
            leaves = iter(leaves)
            given = [next(leaves) if on else w for w, on in zip(weights, wanted)]
            return self._loss_fn(given)

        leaves = [w for w, on in zip(weights, wanted) if on]
        with self._replay:
            value, found = jax.value_and_grad(loss_of, has_aux=True)(leaves)
        found = iter(found)
        return value, [next(found) if on else None for on in wanted]


# Keras' generators are variables, so there are no others but Python's and NumPy's.
replay = Replay


def after(*structures):
    """Nothing: what was computed was computed."""
    return contextlib.nullcontext()


def only_builds():
    """Never: Keras makes all variables before the first step."""
    return False


def build_first(model, train_function):
    """The same function."""
    return train_function


def when(active, update):
    """Runs `update()`, which assigns to Keras variables, if `active`.

    Args:
        active: bool or scalar boolean array.
        update: Function without arguments; what it returns is ignored.
    """
    if isinstance(active, bool):
        if active:
            update()
        return
    assigned = []

    def updated():
        with Staged() as staged:
            update()
        assigned.extend(staged.assigned)
        return [staged.get_current_value(v) for v in assigned]

    # Traced before the condition, which must know what is assigned.
    update_fn = core.jaxpr_as_fun(jax.make_jaxpr(updated)())
    values = jax.lax.cond(active, update_fn, lambda: [v.value for v in assigned])
    for variable, value in zip(assigned, values):
        variable.assign(value)


# XLA makes one loop of an update of all weights and of the choice, where a condition
# takes memory for the old weights and the new ones.
select = assign_if


def squared_sum(gradient):
    """Sum of the squares of the entries of `gradient`, at least in float32."""
    dtype = jnp.promote_types(gradient.dtype, jnp.float32)
    return jnp.sum(jnp.square(gradient.astype(dtype)))


def multiply(gradient, factor):
    """`factor * gradient`, for a scalar `factor`."""
    return gradient * factor.astype(gradient.dtype)


def add(weight, gradient, scale):
    """`weight + scale * gradient`, a new tensor.

    Args:
        weight: Tensor.
        gradient: Tensor of the shape of `weight`.
        scale: Scalar tensor, or one of the shape of `weight`.

    Returns:
        Tensor of the shape of `weight`.
    """
    return weight + scale * gradient


def own_parameters(model, variables):
    """Nothing: all layers read their weights as Keras variables."""
    return lambda weights: contextlib.nullcontext(), lambda: None


def apply(optimizer, gradients, variables):
    """The step of a Keras optimizer, as Keras' own train step asks for it.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built for `variables`.
        gradients: List of arrays.
        variables: List of `keras.Variable`s.
    """
    state = optimizer.variables
    values = optimizer.stateless_apply(
        [v.value for v in state], gradients, [v.value for v in variables]
    )
    for group, new in zip((variables, state), values):
        for variable, value in zip(group, new):
            variable.assign(value)


def read(variable):
    """The value of a `keras.Variable` as a tensor."""
    return variable.value
