"""Settings that can change between two steps, like the learning rate."""

import math
import numbers

import keras
from keras import ops


def add(optimizer, name, value):
    """Adds the scalar `keras.Variable` of a setting to an optimizer."""
    dtype = "float64" if keras.config.floatx() == "float64" else "float32"
    variable = optimizer.add_variable((), dtype=dtype, name=name)
    variable.assign(value)
    return variable


def as_float(variable):
    """Returns the value of a scalar variable in few digits: 0.05, not 0.0500000007."""
    return float(str(ops.convert_to_numpy(variable)[()]))


def checked_rho(owner, rho):
    """Returns `rho` as a float, and checks that it is finite and >= 0.

    Args:
        owner: String, the name of the caller, for the message.
        rho: Number, or a scalar tensor or variable.

    Raises:
        ValueError: if it is not.
    """
    number = _as_number(rho)
    if number is None or not (number >= 0 and math.isfinite(number)):
        raise ValueError(
            f"Argument `rho` of `{owner}` is the radius of the perturbation and "
            f"must be a finite number >= 0. Received: rho={rho!r}"
        )
    return number


def checked_probability(probability):
    """Returns `probability` as a float, and checks that it is in [0, 1].

    Args:
        probability: Number, or a scalar tensor or variable.

    Raises:
        ValueError: if it is not.
    """
    number = _as_number(probability)
    if number is None or not 0 <= number <= 1:
        raise ValueError(
            "Argument `probability` of `RST` is the share of SAM steps and must "
            f"be a number in [0, 1]. Received: probability={probability!r}"
        )
    return number


def checked_fraction(owner, fraction):
    """`ascent_fraction` as a float, if it is one that is allowed.

    Raises:
        ValueError: if it is not.
    """
    number = _as_number(fraction)
    if number is None or not 0 < number <= 1:
        raise ValueError(
            f"Argument `ascent_fraction` of `{owner}` is the share of a batch's rows "
            "that the first pass sees and must be a number in (0, 1]. "
            f"Received: ascent_fraction={fraction!r}"
        )
    return number


def _as_number(value):
    """Returns the float value of a number or a scalar tensor, else `None`."""
    if isinstance(value, keras.Variable) or ops.is_tensor(value):
        value = ops.convert_to_numpy(value)
        value = value.item() if value.ndim == 0 else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)
