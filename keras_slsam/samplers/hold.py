"""A sampler that holds each mask of another one for several steps."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam import atomic
from keras_slsam.samplers.sampler import Sampler
from keras_slsam.samplers.sampler import draw_mask
from keras_slsam.samplers.sampler import learn


@keras.saving.register_keras_serializable("keras_slsam")
class Hold(Sampler):
    """Holds each mask that another sampler draws for several steps, as LISA does.

    The other sampler learns once per mask, from the norms of the last of these steps.

    Args:
        sampler: `keras_slsam.samplers.Sampler`, which draws the masks. A schedule as
            its `active_fraction` counts masks.
        steps: int >= 1, the number of steps with the same mask, or of windows with
            `gradient_accumulation_steps`. Steps that are skipped count.

    Raises:
        ValueError: if an argument is not valid.

    Example:

    >>> from keras import ops
    >>> from keras_slsam import samplers
    >>> sampler = samplers.Hold(samplers.Uniform(0.5, seed=0), steps=10)
    >>> sampler.build(num_arms=4)
    >>> masks = [ops.convert_to_numpy(sampler.draw()).tolist() for _ in range(10)]
    >>> all(mask == masks[0] for mask in masks)
    True

    Reference:
        Pan et al., arXiv 2403.17919 (LISA).
    """

    def __init__(self, sampler: Sampler, steps: int) -> None:
        if not isinstance(sampler, Sampler) or sampler._in_use:
            raise ValueError(
                "Argument `sampler` of `Hold` must be a `keras_slsam.samplers.Sampler` "
                f"that is not used elsewhere. Received: sampler={sampler!r}"
            )
        self.steps = int(
            arguments.check_number(
                "Hold",
                "steps",
                steps,
                "the number of steps with the same mask",
                lambda number: 1 <= number < 2**31 and number == int(number),
                "an int in [1, 2**31)",
            )
        )
        self.sampler = sampler
        self.min_probability = sampler.min_probability
        sampler._in_use = True

    def build(self, num_arms):
        self.sampler._arms = self.arms
        self.sampler.build(num_arms)
        self.sampler._is_fixed = True
        self._count = keras.Variable(0, dtype="int32", trainable=False, name="count")
        self._mask = keras.Variable(
            ops.zeros((num_arms,), dtype="bool"),
            dtype="bool",
            trainable=False,
            name="mask",
        )

    @property
    def probabilities(self):
        return self.sampler.probabilities

    def draw(self):
        inner, num_arms = self.sampler, self._mask.shape[0]
        atomic.assign_if(
            ops.equal(self._count, 0),
            lambda: self._mask.assign(draw_mask(inner, num_arms)),
        )
        self._count.assign((self._count + 1) % self.steps)
        return ops.copy(self._mask)

    def update(self, active, norms):
        # In the last step with this mask, the count is 0 again.
        atomic.assign_if(
            ops.equal(self._count, 0), lambda: learn(self.sampler, active, norms)
        )

    @property
    def _kind(self):
        return f"Hold({self.sampler._kind})"

    def get_config(self):
        sampler = keras.saving.serialize_keras_object(self.sampler)
        return {"sampler": sampler, "steps": self.steps}

    @classmethod
    def from_config(cls, config):
        sampler = keras.saving.deserialize_keras_object(config["sampler"])
        return cls(**{**config, "sampler": sampler})
