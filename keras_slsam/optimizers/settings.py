"""Settings that can change between two steps, like the learning rate."""

import numbers
import types
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

# A number, or a function from the number of the step, like a `LearningRateSchedule`.
Number = float | Callable


class Setting:
    """A number that can change between steps.

    Args:
        optimizer: `keras.optimizers.Optimizer`, which holds the variable.
        name: String.
        value: Number, or a function from the number of the step to a scalar tensor,
            like a `keras.optimizers.schedules.LearningRateSchedule`.
        check: Function from a number to a float, which raises a `ValueError` if the
            number is not allowed.

    Attributes:
        variable: Scalar `keras.Variable`, the present value.
        number: Float, the number that was set last, or `None` with a schedule.
        schedule: The function, or `None`.
    """

    def __init__(self, optimizer, name, value, check):
        self._name, self._check = name, check
        self.schedule = None
        if callable(value) and not isinstance(value, keras.Variable):
            self.schedule = value
            number = self._first(type(optimizer).__name__)
        else:
            number = check(value)
        self.number = None if self.schedule else number
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        self.variable = optimizer.add_variable((), dtype=dtype, name=name)
        self.variable.assign(number)

    def _first(self, owner):
        """Returns the schedule's value at step 0, and checks that it can be saved."""
        schedule = self.schedule
        received = f"Received: {self._name}={schedule!r}"
        can_be_saved = isinstance(schedule, types.FunctionType) or (
            hasattr(schedule, "get_config") and not isinstance(schedule, type)
        )
        if not can_be_saved:
            raise ValueError(
                f"Argument `{self._name}` of `{owner}` must be a number, a function or "
                "an object with a `get_config`, like a `LearningRateSchedule`. Others "
                f"cannot be saved. {received}"
            )
        try:
            return self._check(schedule(ops.convert_to_tensor(0)))
        except Exception as error:
            raise ValueError(
                f"Argument `{self._name}` of `{owner}` must be a number, or a function "
                "from the number of the step, an int tensor, to a scalar tensor. "
                f"{received}, which fails at step 0: {error}"
            ) from error

    def read_number(self):
        """Takes over a number that was loaded."""
        if not self.schedule:
            self.number = float(ops.convert_to_numpy(self.variable))

    def set(self, value):
        """Sets the value for the next steps.

        Args:
            value: Number, or a scalar tensor or variable.

        Raises:
            ValueError: if the value is not allowed, or follows a schedule.
        """
        if self.schedule:
            raise ValueError(
                f"`{self._name}` follows a schedule, so it cannot be set. "
                f"Received: {self._name}={value!r}. To set it in a callback, pass a "
                "number to the optimizer."
            )
        if callable(value) and not isinstance(value, keras.Variable):
            raise ValueError(
                f"`{self._name}` can be set to a number only. Received: "
                f"{self._name}={value!r}. Pass a schedule to the optimizer."
            )
        self.number = self._check(value)
        self.variable.assign(self.number)

    def follow(self, step):
        """Sets the value of the schedule at a step, if there is a schedule.

        What is not above 0 counts as 0.
        """
        if self.schedule:
            value = self.schedule(ops.convert_to_tensor(step))
            value = ops.cast(value, self.variable.dtype)
            self.variable.assign(ops.where(value > 0, value, 0.0))

    def get_config(self):
        """Returns a float with few digits (0.05, not 0.0500000007), or a dict."""
        if self.schedule:
            return keras.saving.serialize_keras_object(self.schedule)
        return float(str(ops.convert_to_numpy(self.variable)[()]))


def check_number(owner, name, value, meaning, is_allowed, allowed):
    """Returns a number as a float.

    Args:
        owner: String, the class that has the argument.
        name: String, the argument.
        value: Number, or a scalar tensor or variable.
        meaning: String, what the argument is.
        is_allowed: Function from a float to a bool.
        allowed: String, the numbers that are allowed.

    Raises:
        ValueError: if it is not a number that is allowed.
    """
    number = _as_number(value)
    if number is None or not is_allowed(number):
        raise ValueError(
            f"Argument `{name}` of `{owner}` is {meaning} and must be {allowed}. "
            f"Received: {name}={value!r}"
        )
    return number


def check_rho(owner, rho):
    """Returns `rho` of the class `owner` as a float, or raises a `ValueError`."""
    return check_number(
        owner,
        "rho",
        rho,
        "the radius of the perturbation",
        # More is infinite in float32.
        lambda number: 0 <= number < 3.4e38,
        "a finite number >= 0",
    )


def check_fraction(owner, fraction):
    """Returns `ascent_fraction` of `owner` as a float, or raises a `ValueError`."""
    return check_number(
        owner,
        "ascent_fraction",
        fraction,
        "the share of a batch's rows that the first pass sees",
        lambda number: 1e-6 <= number <= 1,
        "a number in [1e-6, 1]",
    )


def _as_number(value):
    """Returns the float value of a number or a scalar tensor, else `None`."""
    if isinstance(value, keras.Variable) or ops.is_tensor(value):
        value = ops.convert_to_numpy(value)
    if isinstance(value, np.ndarray):
        value = value.item() if value.ndim == 0 else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)
