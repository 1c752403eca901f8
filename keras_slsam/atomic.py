"""A step happens whole, or not at all.

Assignments wait in `Staged` until all that may raise has been computed, metrics are put
back by `put_back_metrics`, and a Ctrl-C waits for the step's end. If the base
optimizer's own update raises, weights and moments are as Keras leaves them.

All this holds where Python runs the step. A compiled step is one call, which Python
interrupts before or after it only.
"""

import contextlib
import signal
import threading

import keras
from keras import ops


class Staged(keras.StatelessScope):
    """A scope whose assignments wait for `commit`.

    It reads from the scope around it what was not assigned in it, and may be entered
    several times.

    Attributes:
        assigned: List of the `keras.Variable`s that were assigned to.
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
        """Makes the assignments, where `condition`.

        Args:
            condition: True, or a scalar boolean tensor.
        """
        for variable in self.assigned:
            value = self.get_current_value(variable)
            if condition is not True:
                value = ops.where(condition, value, ops.convert_to_tensor(variable))
            variable.assign(value)


def assign_if(condition, update):
    """Runs `update()`, whose assignments count only where `condition`.

    Unlike those of `backend.when` they may wait in a scope on every backend. A traced
    step executes the update in any case, so it should be cheap.

    Args:
        condition: bool or scalar boolean tensor.
        update: Function without arguments; what it returns is ignored.
    """
    if condition is not False:
        with Staged() as staged:
            update()
        staged.commit(condition)


@contextlib.contextmanager
def put_back_metrics(model):
    """Context that puts the model's metrics back if something raises in it."""
    before = [(variable, ops.copy(variable)) for variable in model.metrics_variables]
    try:
        yield
    except BaseException:
        if len(model.metrics_variables) > len(before):
            model.reset_metrics()  # those that were made in this step
        for variable, value in before:
            variable.assign(value)
        raise


@contextlib.contextmanager
def hold_back_interrupt():
    """Context in which Ctrl-C waits for the end; a second one does not.

    It would fall between two assignments, or in the exit of a scope. Only the main
    thread receives it, and only there does it have to wait.
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
