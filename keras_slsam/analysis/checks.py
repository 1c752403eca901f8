"""Checks of the arguments that the measures share."""

import importlib

from keras_slsam import arguments


def positive(owner, name, value):
    """Returns a number > 0 as a float.

    Args:
        owner: String, the function that has the argument.
        name: String, the argument.
        value: The argument's value.

    Raises:
        ValueError: if it is something else.
    """
    return arguments.check_number(
        owner, name, value, "a number", lambda v: 0 < v < float("inf"), "above 0"
    )


def positive_int(owner, name, value, least=1):
    """Returns an int that is at least `least`.

    Args:
        owner: String, the function that has the argument.
        name: String, the argument.
        value: The argument's value.
        least: int.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Argument `{name}` of `{owner}` must be an int >= {least}. "
            f"Received: {name}={value!r}"
        )
    return value


def need(module):
    """Returns a module of the extra `analysis`.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is not installed. Install it with "
            "`pip install keras-slsam[analysis]`."
        ) from error
