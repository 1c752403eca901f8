"""Sparse gradients on JAX: one compiled step for all masks.

Under `jit` the mask is not known while the step is traced, so the trace holds the work
of all gradients. `jax_graph` puts it under conditions. A step then executes the forward
pass, the backward pass down to the lowest active layer, and the weight gradients of the
active layers. If the mask is known, only the gradients of the active weights are
computed.

The second pass reuses values of the first that depend on no trainable weight, such as a
frozen prefix and the noise of dropout. It recomputes everything else, because a value
that is kept for the second pass takes memory, even where the model asks for
recomputation.
"""

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.extend import core

from keras_slsam import atomic
from keras_slsam.gradients import jax_graph
from keras_slsam.gradients import jax_processes
from keras_slsam.gradients import passes
from keras_slsam.gradients.interface import Backend
from keras_slsam.gradients.interface import NoSecondDerivative


class Passes(passes.Passes):
    """The passes on JAX, traced or with a known mask."""

    def first(self, weights):
        self._known = all(isinstance(on, bool) for on in self.active)
        if self._known:
            return self._of_known(weights)
        function = jax.value_and_grad(self.loss_fn, has_aux=True)
        self._gradients = jax_graph.Gradients(function, weights, self)
        return self._unflatten(self._gradients.first(weights))

    def second(self, weights):
        if self._known:
            return self._of_known(weights)
        return self._unflatten(self._gradients.second(weights))

    def _unflatten(self, outputs):
        return jax.tree.unflatten(self._gradients.structure, outputs)

    def _of_known(self, weights):
        """Differentiates with respect to the active weights only."""
        wanted = [self.active[arm] for arm in self.arm_of]

        def loss_of(leaves):
            leaves = iter(leaves)
            given = [next(leaves) if on else w for w, on in zip(weights, wanted)]
            return self.loss_fn(given)

        leaves = [w for w, on in zip(weights, wanted) if on]
        value, found = jax.value_and_grad(loss_of, has_aux=True)(leaves)
        found = iter(found)
        return value, [next(found) if on else None for on in wanted]


class JaxBackend(Backend):
    """JAX, traced under `jit` or with a known mask."""

    Passes = Passes
    starts_before_trace = True

    check_devices = staticmethod(jax_processes.check)
    processes = staticmethod(jax.process_count)
    start = staticmethod(jax_processes.start)

    def collect_state(self, model):
        model.jax_state_sync()

    def after_exchanges(self, norms, tensors):
        if not jax_graph.has_exchanges():
            return tensors
        known = jax_graph.is_known(sum(norms))
        return jax.tree.map(lambda t: jnp.where(known, t, jnp.zeros_like(t)), tensors)

    def concrete(self, mask):
        if isinstance(mask, jax.core.Tracer):
            return list(jnp.unstack(mask))
        return np.asarray(mask).tolist()

    def when(self, active, update):
        if isinstance(active, bool):
            super().when(active, update)
            return
        assigned = []

        def updated():
            with atomic.Staged() as staged:
                update()
            assigned.extend(staged.assigned)
            return [staged.get_current_value(v) for v in assigned]

        # Traced before the condition, which must know what is assigned.
        update_fn = core.jaxpr_as_fun(jax.make_jaxpr(updated)())
        values = jax.lax.cond(active, update_fn, lambda: [v.value for v in assigned])
        for variable, value in zip(assigned, values):
            variable.assign(value)

    def select(self, active, update):
        atomic.assign_if(active, update)

    def apply(self, optimizer, gradients, variables):
        state = optimizer.variables
        values = optimizer.stateless_apply(
            [v.value for v in state], gradients, [v.value for v in variables]
        )
        for group, new in zip((variables, state), values):
            for variable, value in zip(group, new):
                variable.assign(value)

    def compile(self, function, model):
        def variables():
            return model.variables + model.metrics_variables

        # The values are arguments. As constants they would be compiled in.
        @jax.jit
        def compiled(values, *args):
            with keras.StatelessScope(list(zip(variables(), values))):
                return function(*args)

        return lambda *args: compiled([v.value for v in variables()], *args)

    def multiply_by_hessian(self, loss, weights, vectors):
        gradient = jax.grad(lambda weights: loss(weights)[0])
        try:
            return jax.jvp(gradient, (weights,), (vectors,))[1]
        except (NotImplementedError, TypeError, ValueError) as error:
            raise NoSecondDerivative(str(error)) from error
