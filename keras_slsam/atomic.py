"""A step completes, or changes nothing.

`Staged` delays assignments until everything that may raise has been computed.
`put_back_metrics` restores the metrics. `hold_back_interrupt` delays Ctrl-C until the
step ends. If the update of the base optimizer or of an `Ascent` raises, the weights and
their state stay as it left them.

This applies to steps that Python runs. A compiled step is one call, which Python can
interrupt only before or after.
"""

import contextlib
import signal
import threading

import keras
from keras import ops


class Staged(keras.StatelessScope):
    """A scope that delays assignments until `commit`.

    Variables that were not assigned in it are read from the surrounding scope. It can
    be entered several times.

    Attributes:
        assigned: List of the `keras.Variable`s that were assigned.
    """

    def __init__(self):
        super().__init__()
        self._assigned = {}

    @property
    def assigned(self):
        return list(self._assigned.values())

    def add_update(self, update):
        variable, _ = update
        self._assigned[id(variable)] = variable
        super().add_update(update)

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def commit(self, condition=True):
        """Makes the assignments if `condition` holds.

        Args:
            condition: True, or a scalar boolean tensor.
        """
        for variable in self.assigned:
            value = self.get_current_value(variable)
            if condition is not True:
                value = ops.where(condition, value, ops.convert_to_tensor(variable))
            variable.assign(value)


def assign_if(condition, update):
    """Runs `update()`, and keeps its assignments only if `condition` holds.

    Unlike in `backend.when`, a scope can delay these assignments on every backend. A
    traced step always executes the update, so the update should be cheap.

    Args:
        condition: bool or scalar boolean tensor.
        update: Function without arguments. Its result is ignored.
    """
    if condition is not False:
        with Staged() as staged:
            update()
        staged.commit(condition)


@contextlib.contextmanager
def put_back_metrics(model):
    """Context that restores the model's metrics if an exception is raised in it."""
    before = [(variable, ops.copy(variable)) for variable in model.metrics_variables]
    try:
        yield
    except BaseException:
        if len(model.metrics_variables) > len(before):
            model.reset_metrics()  # resets those created in this step
        for variable, value in before:
            variable.assign(value)
        raise


@contextlib.contextmanager
def hold_back_interrupt():
    """Context that delays Ctrl-C until its end. A second Ctrl-C is not delayed.

    An interrupt between two assignments, or in the exit of a scope, would leave a step
    half done. Only the main thread receives interrupts, so other threads need no delay.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and callable(handler)):
        yield
        return
    received = []

    def hold(*args):
        if received:
            received.clear()
            handler(*args)
        else:
            received.append(args)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
