"""The base class of samplers that draw each arm independently."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam import threefry
from keras_slsam.samplers.sampler import Sampler


class Independent(Sampler):
    """Draws each arm independently with its own probability, but at least one arm."""

    def __init__(
        self, active_fraction: arguments.Number, seed: int | None = None
    ) -> None:
        name = type(self).__name__
        self._first_fraction = arguments.check_number_or_schedule(
            name, "active_fraction", active_fraction, self._check_fraction
        )
        self._is_scheduled = arguments.is_schedule(active_fraction)
        self.active_fraction = (
            active_fraction if self._is_scheduled else self._first_fraction
        )
        self._first_seed = threefry.make_seed(seed, name)
        self.seed = None if seed is None else int(seed)

    def _check_fraction(self, fraction):
        return arguments.check_number(
            type(self).__name__,
            "active_fraction",
            fraction,
            "the expected share of active arms",
            lambda number: 0 < number <= 1,
            "a number in (0, 1]",
        )

    def _check_min_probability(self, probability):
        # All arms together must not exceed the budget.
        name, most = type(self).__name__, self._first_fraction
        return arguments.check_number(
            name,
            "min_probability",
            probability,
            "the least probability of an arm",
            lambda number: 1e-8 <= number <= most,
            f"a number in [1e-8, active_fraction], here at most {most:g}. To "
            f"choose it, pass `samplers.{name}(active_fraction, min_probability=...)`",
        )

    def build(self, num_arms):
        self._num_arms = num_arms
        dtype = arguments.float_dtype()
        self.probabilities = keras.Variable(
            ops.full((num_arms,), self._first_fraction, dtype=dtype),
            dtype=dtype,
            trainable=False,
            name="probabilities",
        )
        self._seed_state = keras.Variable(
            ops.convert_to_tensor([self._first_seed, 0], dtype="int32"),
            dtype="int32",
            trainable=False,
            name="seed_state",
        )

    def _share(self):
        """The expected share of active arms in the next draw.

        At least one arm is active in each step. So a share that is not above that of
        one arm counts as this, and one above 1 counts as 1.

        Returns:
            Float, or a scalar tensor if `active_fraction` is a schedule.
        """
        if not self._is_scheduled:
            return self.active_fraction
        share = self.active_fraction(self._seed_state[1])
        share = ops.cast(share, self.probabilities.dtype)
        least = 1.0 / self._num_arms
        return ops.where(share > least, ops.minimum(share, 1.0), least)

    def _least_probability(self, share):
        """Returns `min_probability`, or `share` if a schedule falls below it."""
        if not self._is_scheduled:
            return self.min_probability
        return ops.minimum(self.min_probability, share)

    def draw(self):
        # Exact, without a loop. Draw the first active arm j, given that there is one,
        # from P(first = j) = p_j * prod_{i<j} (1 - p_i). Arms before j are inactive,
        # arms after j are independent.
        p = ops.convert_to_tensor(self.probabilities)
        unit = ops.cast(threefry.draw(self._seed_state, self._num_arms + 1), p.dtype)
        # P(an arm up to j is active), by logarithms because 1 - 1e-8 is 1 in float32.
        reached = -ops.expm1(ops.cumsum(ops.log1p(-p)))
        first = ops.sum(ops.cast(reached < unit[self._num_arms] * reached[-1], "int32"))
        index = ops.arange(self._num_arms, dtype="int32")
        later = ops.logical_and(index > first, unit[: self._num_arms] < p)
        return ops.logical_or(ops.equal(index, first), later)

    def get_config(self):
        fraction = keras.saving.serialize_keras_object(self.active_fraction)
        return {"active_fraction": fraction, "seed": self.seed}

    @classmethod
    def from_config(cls, config):
        fraction = config.get("active_fraction")
        if isinstance(fraction, dict):
            fraction = keras.saving.deserialize_keras_object(fraction)
            config = {**config, "active_fraction": fraction}
        return cls(**config)
