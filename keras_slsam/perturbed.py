"""The gradients that a step applies: h, at the perturbed weights `w + e`.

The direction of e is known before the first pass, or it depends on the gradient of the
batch, or of part of it, which takes a pass.
"""

from keras import ops

from keras_slsam import ascents
from keras_slsam import loss_scale
from keras_slsam import perturbation
from keras_slsam.gradients import backend


class Perturbed:
    """Computes gradients at the perturbed weights.

    The methods for one and two passes return a tuple: what the `Loss` returned for the
    metrics and the state, the list of the gradients h, the list of the arms' squared
    norms from which the sampler learns, and a list of scalars that are finite if all
    gradients are.

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
        self._first = []  # g, if the ascent learns from it

    def one_pass(self, loss):
        """One pass, where the ascent does not need the gradient of the batch.

        Args:
            loss: `Loss`.
        """
        passes = self._passes(loss, twice=False)
        outputs, h, squares = self._differentiate(passes, self._perturb())
        return outputs, h, squares, squares

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
            first = [v if v is None else backend.dense(v) for v in g]
            first = self._to_learn_from(first)
            return self._perturb(g, squares), sum(squares), first

        def stay():
            zero = ops.zeros((), self._arms.dtype)
            return self._weights, zero, self._to_learn_from(self._weights)

        perturbed, first, self._first = backend.cond(ascends, ascend, stay)
        passes = self._passes(loss, twice=False)
        outputs, h, squares = self._differentiate(passes, perturbed)
        return outputs, h, squares, [*squares, first]

    def two_passes(self, loss, ascends):
        """A first pass, g = grad(w), and a second pass, h = grad(w + e).

        Args:
            loss: `Loss`.
            ascends: bool or scalar boolean tensor. If false, only the first pass is
                executed.
        """
        passes = self._passes(loss, twice=True)
        outputs, g, squares = self._differentiate(passes, self._weights)
        self._first = self._to_learn_from(g)

        def second():
            h = passes.second(self._perturb(g, squares))
            h = loss_scale.unscale(h, self._arms, self._scale)
            return h, squares + self._arms.squared_norms(h)

        h, norms = backend.cond(ascends, second, lambda: (g, squares + squares))
        return outputs, h, squares, norms

    def learn(self, condition):
        """Lets an ascent that has state learn from the gradients of the first pass.

        Args:
            condition: bool or scalar boolean tensor, whether the step had an ascent and
                is not skipped.
        """
        if self._first:
            self._arms.where(condition).when(
                lambda arm: [
                    self._optimizer.ascent.update(i, backend.dense(self._first[i]))
                    for i in self._arms.members[arm]
                ]
            )

    def _to_learn_from(self, gradients):
        return gradients if ascents.learns(self._optimizer.ascent) else []

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

    def _perturb(self, gradients=None, squares=None):
        ascent = self._optimizer.ascent
        arms = self._arms.all() if ascent.all_arms else self._arms
        directions = gradients
        if type(ascent).direction is not ascents.Ascent.direction:
            directions = ascents.Directions(ascent, self._weights, gradients)
            squares = arms.squared_norms(directions)
        return perturbation.perturb(
            self._weights,
            directions,
            sum(squares),
            arms,
            self._rho,
            self._optimizer.adaptive,
        )
