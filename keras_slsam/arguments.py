"""Checks of arguments: numbers, and functions from the number of the step."""

import numbers
import types
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

# A number, or a function from the number of the step, like a `LearningRateSchedule`.
Number = float | Callable


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


def is_schedule(value):
    """Returns whether a value is a function, like a `LearningRateSchedule`."""
    return callable(value) and not isinstance(value, keras.Variable)


def check_number_or_schedule(owner, name, value, check):
    """Returns a number, or the first value of a schedule, as a float.

    Args:
        owner: String, the class that has the argument.
        name: String, the argument.
        value: Number, or a function from the number of the step, an int tensor, to a
            scalar tensor.
        check: Function from a number to a float, which raises a `ValueError` if the
            number is not allowed.

    Raises:
        ValueError: if the number or the first value is not allowed, or if the schedule
            cannot be saved.
    """
    if not is_schedule(value):
        return check(value)
    received = f"Received: {name}={value!r}"
    if not can_be_saved(value):
        raise ValueError(
            f"Argument `{name}` of `{owner}` must be a number, a function or an object "
            "with a `get_config`, like a `LearningRateSchedule`. Others cannot be "
            f"saved. {received}"
        )
    try:
        return check(value(ops.convert_to_tensor(0)))
    except Exception as error:
        raise ValueError(
            f"Argument `{name}` of `{owner}` must be a number, or a function from the "
            "number of the step or draw, an int tensor, to a scalar tensor. To compute "
            "with floats, begin with `step = keras.ops.cast(step, 'float32')`. "
            f"{received}, which fails at 0: {error}"
        ) from error


def can_be_saved(function):
    """Returns whether Keras can save a callable, by its name or by its config."""
    return isinstance(function, types.FunctionType) or (
        hasattr(function, "get_config") and not isinstance(function, type)
    )


def float_dtype():
    """Returns the dtype of settings: float32, or float64 if that is Keras' `floatx`."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


def _as_number(value):
    """Returns the float value of a number or a scalar tensor, else `None`."""
    if isinstance(value, keras.Variable) or ops.is_tensor(value):
        value = ops.convert_to_numpy(value)
    if isinstance(value, np.ndarray):
        value = value.item() if value.ndim == 0 else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)
