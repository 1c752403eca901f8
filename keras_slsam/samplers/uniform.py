"""A sampler that gives every arm the same probability."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam.samplers.independent import Independent


@keras.saving.register_keras_serializable("keras_slsam")
class Uniform(Independent):
    """Draws every arm with the same probability in every step.

    Use it as a baseline for samplers that learn.

    Args:
        active_fraction: Float in (0, 1], the probability of each arm, or a
            `LearningRateSchedule` or a function from the number of the draw.
        seed: int, or `None` for a fresh seed.

    Example:

    >>> from keras_slsam import samplers
    >>> sampler = samplers.Uniform(active_fraction=0.5, seed=0)
    >>> sampler.build(num_arms=4)
    >>> sampler.draw().shape[0]
    4
    """

    def __init__(
        self, active_fraction: arguments.Number, seed: int | None = None
    ) -> None:
        super().__init__(active_fraction, seed)
        if not self._is_scheduled:
            self.min_probability = self._first_fraction

    def update(self, active, norms):
        if self._is_scheduled:
            shape, dtype = self.probabilities.shape, self.probabilities.dtype
            self.probabilities.assign(ops.full(shape, self._share(), dtype=dtype))
