"""Settings that can change between two steps, like the learning rate."""

import keras
from keras import ops

from keras_slsam import arguments


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
        schedule: The function, or `None`.
        lowest: Float, the lowest number so far, or 0 with a schedule.
    """

    def __init__(self, optimizer, name, value, check):
        self._name, self._check = name, check
        self.schedule = None
        owner = type(optimizer).__name__
        number = arguments.check_number_or_schedule(owner, name, value, check)
        if arguments.is_schedule(value):
            self.schedule = value
        self.lowest = 0.0 if self.schedule else number
        dtype = arguments.float_dtype()
        self.variable = optimizer.add_variable((), dtype=dtype, name=name)
        self.variable.assign(number)

    def read_number(self):
        """Takes over a number that was loaded."""
        if not self.schedule:
            number = float(ops.convert_to_numpy(self.variable))
            self.lowest = min(self.lowest, number)

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
        if arguments.is_schedule(value):
            raise ValueError(
                f"`{self._name}` can be set to a number only. Received: "
                f"{self._name}={value!r}. Pass a schedule to the optimizer."
            )
        number = self._check(value)
        self.variable.assign(number)

    def follow(self, step):
        """Sets the value of the schedule at a step, if there is a schedule.

        What is not above 0, or not finite, counts as 0.
        """
        if self.schedule:
            value = self.schedule(ops.convert_to_tensor(step))
            value = ops.cast(value, self.variable.dtype)
            counts = ops.logical_and(value > 0, ops.isfinite(value))
            self.variable.assign(ops.where(counts, value, 0.0))

    def get_config(self):
        """Returns a float with few digits (0.05, not 0.0500000007), or a dict."""
        if self.schedule:
            return keras.saving.serialize_keras_object(self.schedule)
        return float(str(ops.convert_to_numpy(self.variable)[()]))


def check_rho(owner, rho):
    """Returns `rho` of the class `owner` as a float, or raises a `ValueError`."""
    return arguments.check_number(
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
    return arguments.check_number(
        owner,
        "ascent_fraction",
        fraction,
        "the share of a batch's rows that the first pass sees",
        lambda number: 1e-6 <= number <= 1,
        "a number in [1e-6, 1]",
    )
