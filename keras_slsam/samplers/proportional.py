"""A sampler with probabilities proportional to the gradient norms."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam.samplers import numerics
from keras_slsam.samplers.independent import Independent


@keras.saving.register_keras_serializable("keras_slsam")
class Proportional(Independent):
    """Probabilities proportional to the arms' mean gradient norms.

    This sampler goes directly to the bandit's fixed point. It does not depend on the
    scale of the loss, and every arm continues to be drawn. Let m_i be the running mean
    of arm i's norms over the steps in which it was active, and q the projection of m
    onto `sum(q) = active_fraction * num_arms`, `q <= 1`:

        p = min_probability + (1 - min_probability / active_fraction) * q

    So p keeps the budget, unless fewer than `active_fraction * num_arms` arms have
    norms that are not negligible. An arm that has not been active yet counts with the
    largest mean, and p stays uniform until half of the arms have been active. This
    sampler is specific to this package. It is not from the SL-SAM paper.

    Args:
        active_fraction: Float in (0, 1], the expected share of active arms, or a
            `LearningRateSchedule` or a function from the number of the draw.
        momentum: Float in [0, 1). In the mean, the newest norm has a weight of at least
            `1 - momentum`, and the first norms of an arm have equal weights.
        min_probability: Float in [1e-8, active_fraction], the least probability of an
            arm.
        seed: int, or `None` for a fresh seed.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> from keras_slsam import samplers
    >>> sampler = samplers.Proportional(active_fraction=0.2, seed=0)
    >>> sampler.build(num_arms=10)
    >>> sampler.draw().shape[0]
    10
    """

    def __init__(
        self,
        active_fraction: arguments.Number,
        momentum: float = 0.9,
        min_probability: float = 0.05,
        seed: int | None = None,
    ) -> None:
        super().__init__(active_fraction, seed)
        self.momentum = arguments.check_number(
            "Proportional",
            "momentum",
            momentum,
            "the weight of earlier norms",
            lambda number: 0 <= number < 1,
            "a number in [0, 1)",
        )
        self.min_probability = self._check_min_probability(min_probability)

    def build(self, num_arms):
        super().build(num_arms)
        dtype = self.probabilities.dtype
        self._means, self._counts = (
            keras.Variable(
                ops.zeros((num_arms,), dtype=dtype),
                dtype=dtype,
                trainable=False,
                name=name,
            )
            for name in ("means", "counts")
        )

    def update(self, active, norms):
        norms, active = numerics.finite(norms, active, self.probabilities.dtype)
        counts = self._counts + ops.cast(active, norms.dtype)
        newest = ops.maximum(1.0 / ops.maximum(counts, 1.0), 1.0 - self.momentum)
        means = ops.convert_to_tensor(self._means)
        means = ops.where(active, means + newest * (norms - means), means)
        self._counts.assign(counts)
        self._means.assign(means)
        seen = counts > 0
        # Relative means, so that the projection never sees a huge or a tiny sum.
        known = ops.logical_and(seen, ops.max(means) > 0)
        relative = ops.where(known, numerics.relative(means), 1.0)
        share = self._share()
        low = self._least_probability(share)
        q = numerics.project(relative, share * self._num_arms)
        enough = 2 * ops.sum(ops.cast(seen, "int32")) >= self._num_arms
        p = ops.where(enough, low + (1 - low / share) * q, share)
        self.probabilities.assign(ops.clip(p, low, 1.0))

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "min_probability": self.min_probability,
        }
