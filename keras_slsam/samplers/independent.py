"""The base class of samplers that draw each arm independently."""

import numbers

import keras
from keras import ops

from keras_slsam import threefry
from keras_slsam.samplers.sampler import Sampler


class Independent(Sampler):
    """Draws each arm independently with its own probability, but at least one arm."""

    def __init__(self, active_fraction: float, seed: int | None = None) -> None:
        name = type(self).__name__
        check_number(name, "active_fraction", active_fraction)
        if not 0 < active_fraction <= 1:
            raise ValueError(
                f"Argument `active_fraction` of `{name}` is the expected share of "
                "active arms and must be in (0, 1]. "
                f"Received: active_fraction={active_fraction!r}"
            )
        self.active_fraction = float(active_fraction)
        self._first_seed = threefry.make_seed(seed, name)
        self.seed = None if seed is None else int(seed)

    def build(self, num_arms):
        self._num_arms = num_arms
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        self.probabilities = keras.Variable(
            ops.full((num_arms,), self.active_fraction, dtype=dtype),
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
        return {"active_fraction": self.active_fraction, "seed": self.seed}


def check_number(owner, name, value):
    """Raises a `ValueError` if the argument `name` of `owner` is not a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            f"Argument `{name}` of `{owner}` must be a number. "
            f"Received: {name}={value!r}"
        )
