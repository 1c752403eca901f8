"""The ascent of a step, and the gradients at the perturbed weights.

The direction of the ascent is known before the first pass, or it is the gradient of the
batch, or of part of it, which takes a pass.
"""

from keras import ops

from keras_slsam import loss_scale
from keras_slsam import perturbation
from keras_slsam.gradients import backend


class Ascent:
    """Finds the gradients that a step applies: h, at the perturbed weights `w + e`.

    Each method returns a tuple of what the `Loss` returned for the metrics and the
    state, the list of the gradients h, the list of the arms' squared norms from which
    the sampler learns, and a list of scalars that are finite if all gradients are.

    Args:
        model: `keras.Model`.
        optimizer: `SharpnessAware`, built.
        arms: `ActiveArms`.
        rho: Scalar tensor, the radius of the perturbation.
        scale: Float scalar by which the loss is multiplied, or `None`.
    """

    def __init__(self, model, optimizer, arms, rho, scale):
        self._model, self._optimizer, self._arms = model, optimizer, arms
        self._rho, self._scale = rho, scale
        self._weights = [backend.read(v) for v in model.trainable_variables]  # w

    def along(self, direction, loss):
        """One pass, at weights that are perturbed along a direction that is known.

        Args:
            direction: Tuple of a list of tensors, one per variable, and a float scalar,
                the squared norm of those of the active arms.
            loss: `Loss`.
        """
        passes = self._passes(loss, twice=False)
        outputs, h, squares = self._differentiate(passes, self._perturb(*direction))
        return outputs, h, squares, squares

    def along_part(self, part, loss, ascends):
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
            return self._perturb(g, sum(squares)), sum(squares)

        zero = ops.zeros((), self._arms.dtype)
        perturbed, first = backend.cond(ascends, ascend, lambda: (self._weights, zero))
        passes = self._passes(loss, twice=False)
        outputs, h, squares = self._differentiate(passes, perturbed)
        return outputs, h, squares, [*squares, first]

    def along_batch(self, loss, ascends):
        """A first pass, g = grad(w), and a second pass, h = grad(w + e).

        Args:
            loss: `Loss`.
            ascends: bool or scalar boolean tensor. If false, only the first pass is
                executed.
        """
        passes = self._passes(loss, twice=True)
        outputs, g, squares = self._differentiate(passes, self._weights)

        def second():
            h = passes.second(self._perturb(g, sum(squares)))
            h = loss_scale.unscale(h, self._arms, self._scale)
            return h, squares + self._arms.squared_norms(h)

        h, norms = backend.cond(ascends, second, lambda: (g, squares + squares))
        return outputs, h, squares, norms

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
        gradients = loss_scale.unscale(gradients, self._arms, self._scale)
        return outputs, gradients, self._arms.squared_norms(gradients)

    def _perturb(self, directions, squared_norm):
        return perturbation.perturb(
            self._weights,
            directions,
            squared_norm,
            self._arms,
            self._rho,
            self._optimizer.adaptive,
        )
