"""The sampler of dense SAM, which activates all arms."""

import keras
from keras import ops

from keras_slsam.samplers.sampler import Sampler


@keras.saving.register_keras_serializable("keras_slsam")
class All(Sampler):
    """Activates every arm in every step: dense SAM.

    Example:

    >>> from keras import ops
    >>> from keras_slsam import samplers
    >>> sampler = samplers.All()
    >>> sampler.build(num_arms=2)
    >>> ops.convert_to_numpy(sampler.draw()).tolist()
    [True, True]
    """

    def build(self, num_arms):
        self._num_arms = num_arms

    def draw(self):
        return ops.ones((self._num_arms,), dtype="bool")
