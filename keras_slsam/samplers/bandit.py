"""The multi-armed bandit of the SL-SAM paper."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam.samplers import numerics
from keras_slsam.samplers.independent import Independent


@keras.saving.register_keras_serializable("keras_slsam")
class Bandit(Independent):
    """The multi-armed bandit of SL-SAM.

    After a step with active arms A, gradient norms n and probabilities p:

        l_i = max_{j in A} (n_j / p_j)^2 - (n_i / p_i)^2
        p_i <- p_i * exp(-learning_rate * l_i / p_i)            for i in A

    Then p is projected back to `sum(p) = active_fraction * num_arms`, `p <= 1`. At the
    fixed point, p is proportional to n. How fast p gets there depends on the scale of
    the loss. An arm's probability can fall so low that the arm is not drawn again, even
    with an `active_fraction` of 1. `Proportional` has neither property.

    Args:
        active_fraction: Float in (0, 1], the expected share of active arms, or a
            `LearningRateSchedule` or a function from the number of the draw.
        learning_rate: Float > 0, the bandit's own step size (alpha).
        min_probability: Float in [1e-8, active_fraction], the least probability of an
            arm.
        seed: int, or `None` for a fresh seed.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> from keras_slsam import samplers
    >>> sampler = samplers.Bandit(active_fraction=0.2, seed=0)
    >>> sampler.build(num_arms=10)
    >>> round(float(sampler.probabilities[0]), 3)
    0.2

    Reference:
        Cheng et al., arXiv 2602.09395, the layer bandit of SL-SAM.
    """

    def __init__(
        self,
        active_fraction: arguments.Number,
        learning_rate: float = 0.001,
        min_probability: float = 1e-8,
        seed: int | None = None,
    ) -> None:
        super().__init__(active_fraction, seed)
        self.learning_rate = arguments.check_number(
            "Bandit",
            "learning_rate",
            learning_rate,
            "the bandit's own step size",
            lambda number: 0 < number < float("inf"),
            "a finite number > 0",
        )
        self.min_probability = self._check_min_probability(min_probability)

    def update(self, active, norms):
        p = ops.convert_to_tensor(self.probabilities)
        norms, active = numerics.finite(norms, active, p.dtype)
        # Norms relative to the largest, because squares of n / p itself would overflow.
        scale = ops.max(norms)
        ratio = numerics.relative(norms) / p
        best = ops.max(ratio)
        gap = (best - ratio) * (best + ratio) / p
        # The best arm's loss is 0, even if the square of the scale overflows.
        exponent = ops.where(gap > 0, self.learning_rate * gap * scale * scale, 0.0)
        weights = ops.where(active, p * ops.exp(-exponent), p)
        share = self._share()
        p = numerics.project(weights, share * self._num_arms)
        self.probabilities.assign(ops.clip(p, self._least_probability(share), 1.0))

    def get_config(self):
        return {
            **super().get_config(),
            "learning_rate": self.learning_rate,
            "min_probability": self.min_probability,
        }
