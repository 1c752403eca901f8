"""The gradients that a step applies: h, at the perturbed weights `w + e`.

If the ascent needs the gradient of the batch, or of its first rows, a pass computes it
first.
"""

from keras import ops

from keras_slsam import ascents
from keras_slsam import loss_scale
from keras_slsam import perturbation
from keras_slsam.gradients import backend


class UphillGradients:
    """Computes the gradients at the perturbed weights.

    The methods for one and two passes return a tuple:

    - what the `Loss` returned for the metrics and the state,
    - the list of the gradients h,
    - the list of the arms' squared norms from which the sampler learns,
    - a list of scalars that are finite if all gradients are,
    - the list of the gradients from which the ascent learns, empty if there are none.

    Args:
        model: `keras.Model`.
        optimizer: `SharpnessAware`, built.
        arms: `ActiveArms`.
        rho: Scalar tensor, the radius of the perturbation.
        scale: Float scalar by which the loss is multiplied, or `None`.
        measures: bool, whether `gain` is wanted.

    Attributes:
        gain: The loss at w + e minus the loss at w, a float scalar, once a step has
            computed the loss of the whole batch at both. Else `None`.
    """

    def __init__(self, model, optimizer, arms, rho, scale, measures=False):
        self._model, self._optimizer, self._arms = model, optimizer, arms
        self._rho, self._scale = rho, scale
        self._weights = [backend.read(v) for v in model.trainable_variables]  # w
        self._ascent = optimizer.ascent
        self._measures, self.gain = measures, None

    def one_pass(self, loss):
        """One pass, where the ascent does not need the gradient of the batch.

        Args:
            loss: `Loss`.
        """
        passes = self._passes(loss, twice=False)
        outputs, h, squares = self._differentiate(passes, self._perturb())
        return outputs, h, squares, squares, []

    def two_passes_of_part(self, part, loss, ascends):
        """A first pass on part of the batch, and a second on the whole.

        Args:
            part: `Loss` of the first rows.
            loss: `Loss` of the batch.
            ascends: bool or scalar boolean tensor. If false, only the second pass is
                executed, at w.
        """

        def ascend():
            passes = self._passes(part, twice=False)
            _, g, squares = self._differentiate(passes, self._weights)
            # The other branch has tensors.
            known = [v if v is None else backend.dense(v) for v in self._kept(g)]
            return self._perturb(g, squares), sum(squares), known

        def stay():
            zero = ops.zeros((), self._arms.dtype)
            return self._weights, zero, self._kept(self._weights)

        perturbed, first, kept = backend.cond(ascends, ascend, stay)
        passes = self._passes(loss, twice=False)
        outputs, h, squares = self._differentiate(passes, perturbed)
        return outputs, h, squares, [*squares, first], kept

    def two_passes(self, loss, ascends):
        """A first pass, g = grad(w), and a second pass, h = grad(w + e).

        Args:
            loss: `Loss`.
            ascends: bool or scalar boolean tensor. If false, only the first pass is
                executed.
        """
        passes = self._passes(loss, twice=True)
        outputs, g, squares = self._differentiate(passes, self._weights)

        def second():
            (_, uphill), h = passes.second(self._perturb(g, squares))
            h = self._finish(h)
            norms = squares + self._arms.squared_norms(h)
            return h, norms, losses(uphill)

        def losses(outputs):
            return outputs[:1] if self._measures else ()

        h, norms, uphill = backend.cond(
            ascends, second, lambda: (g, squares + squares, losses(outputs))
        )
        if self._measures:
            self.gain = uphill[0] - outputs[0]
        return outputs, h, squares, norms, self._kept(g)

    def learn(self, gradients, condition):
        """Lets the ascent learn from the gradients of a pass of its own.

        Args:
            gradients: The last entry of what the methods above return.
            condition: bool or scalar boolean tensor, whether the step had an ascent and
                is not skipped.
        """
        if gradients:
            self._arms.where(condition).when(
                lambda arm: ascents.learn(
                    self._ascent, gradients, self._arms.members[arm]
                )
            )

    def _kept(self, gradients):
        """Returns the gradients of the first pass if the ascent learns from them."""
        return gradients if ascents.learns(self._ascent) else []

    def _passes(self, loss, twice):
        return backend.Passes(
            loss,
            self._optimizer._selection.arm_of,
            self._arms.active,
            twice,
            self._model.jit_compile,
            self._optimizer.sampler.min_probability,
        )

    def _differentiate(self, passes, weights):
        (_, outputs), gradients = passes.first(weights)
        gradients = self._finish(gradients)
        return outputs, gradients, self._arms.squared_norms(gradients)

    def _finish(self, gradients):
        """Averages gradients over processes or replicas, and unscales them."""
        gradients = backend.average(gradients, self._arms)
        return loss_scale.unscale(gradients, self._arms, self._scale)

    def _perturb(self, gradients=None, squares=None):
        directions = gradients
        if not ascents.follows_batch(self._ascent):
            directions = ascents.Directions(self._ascent, self._weights, gradients)
            squares = None
        return perturbation.perturb(
            self._weights,
            directions,
            squares,
            self._arms,
            self._rho,
            self._optimizer.adaptive,
        )
