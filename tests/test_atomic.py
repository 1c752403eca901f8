"""A step that raises, or is interrupted, changes nothing."""

import concurrent.futures
import contextlib
import itertools
import os
import signal
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_slsam
from keras_slsam import atomic
from keras_slsam import samplers

BACKEND = keras.config.backend()
POINTS = 8  # lines at which a step is interrupted


class Failure(Exception):
    pass


class Faults:
    """Raises at the n-th call of a place that the test chooses."""

    def __init__(self):
        self.place, self.countdown, self.error = None, 0, Failure

    def at(self, place, countdown=1, error=Failure):
        self.place, self.countdown, self.error = place, countdown, error

    def reached(self, place):
        if place == self.place:
            self.countdown -= 1
            if self.countdown == 0:
                self.place = None
                raise self.error(place)


class Layer(keras.layers.Layer):
    def __init__(self, faults):
        super().__init__()
        self.faults = faults

    def call(self, x):
        self.faults.reached("layer")
        return x


class Metric(keras.metrics.Mean):
    def __init__(self, faults, name):
        super().__init__(name)
        self.faults = faults

    def update_state(self, y, y_pred, sample_weight=None):
        super().update_state(y_pred)
        self.faults.reached(self.name)


class Sampler(samplers.Bandit):
    """Fails after it has assigned. Draws from a generator, like custom samplers."""

    def __init__(self, faults):
        super().__init__(0.5, seed=0)
        self.faults = faults
        self.generator = keras.random.SeedGenerator(7)

    def draw(self):
        mask = super().draw()
        keras.random.uniform((2,), seed=self.generator)
        self.faults.reached("draw")
        return mask

    def update(self, active, norms):
        super().update(active, norms)
        self.faults.reached("learn")


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, faults):
        self.faults = faults

    def __call__(self, step):
        self.faults.reached("schedule")
        return 0.1


METHODS = {
    "sam": lambda base, faults: keras_slsam.SAM(base, rho=0.5),
    "s2sam": lambda base, faults: keras_slsam.S2SAM(base, rho=0.5),
    "rst": lambda base, faults: keras_slsam.RST(base, 0.5, probability=0.9, seed=0),
    "slsam": lambda base, faults: keras_slsam.SLSAM(base, 0.5, sampler=Sampler(faults)),
    "sl+s2": lambda base, faults: keras_slsam.SLSAM(
        base, 0.5, sampler=Sampler(faults), single_step=True
    ),
}
PLACES = [
    ("layer", 1),
    ("layer", 2),  # in the second pass
    ("loss", 1),
    ("loss", 2),
    ("first metric", 1),
    ("second metric", 1),
    ("draw", 1),
    ("learn", 1),
    ("schedule", 1),
]
DATA = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")


def compiled(method, faults, base=None, **kwargs):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),  # no seed: uses PyTorch's global generator
            Layer(faults),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(1),
        ]
    )

    def loss(y, y_pred):
        faults.reached("loss")
        return ops.square(y - y_pred)

    model = keras_slsam.sharpness_aware(model)
    model.compile(
        METHODS[method](base or keras.optimizers.AdamW(Schedule(faults)), faults),
        loss,
        metrics=[Metric(faults, "first metric"), Metric(faults, "second metric")],
        **{"run_eagerly": True, **kwargs},
    )
    return model


def snapshot(model):
    """Returns everything that a step may change, as NumPy arrays."""
    optimizer = model.optimizer
    state = [*model.variables, *optimizer.variables, *model.metrics_variables]
    values = {
        f"{i} {v.path}": np.array(ops.convert_to_numpy(v)) for i, v in enumerate(state)
    }
    values["requires_grad"] = [
        getattr(v.value, "requires_grad", None) for v in model.variables
    ]
    if BACKEND == "torch":
        import torch

        values["torch"] = torch.get_rng_state().numpy()
    return values


def differences(one, other):
    assert one.keys() == other.keys()
    return [k for k in one if not np.array_equal(one[k], other[k])]


def put_back(model, values):
    optimizer = model.optimizer
    state = [*model.variables, *optimizer.variables, *model.metrics_variables]
    for i, variable in enumerate(state):
        variable.assign(values[f"{i} {variable.path}"])
    if BACKEND == "torch":
        import torch

        torch.set_rng_state(torch.tensor(values["torch"]))


def step(model):
    data = [ops.convert_to_tensor(array) for array in DATA]
    return keras_slsam.step(model, model.optimizer, tuple(data))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_raises_changes_nothing(method):
    faults = Faults()
    model = compiled(method, faults)
    step(model)
    before = snapshot(model)
    errors = itertools.cycle([Failure, KeyboardInterrupt, MemoryError])
    reached = []
    for place, error in zip(PLACES, errors):
        faults.at(*place, error)
        with contextlib.suppress(error):
            step(model)
        if faults.place is None:
            reached.append(place)
            assert (place, differences(before, snapshot(model))) == (place, [])
        else:  # the method does not reach this place
            before = snapshot(model)
    missing = set(PLACES) - set(reached)
    once = {("layer", 2), ("loss", 2)} if method in ("s2sam", "sl+s2") else set()
    dense = {("draw", 1), ("learn", 1)} if method in ("sam", "s2sam", "rst") else set()
    assert missing == once | dense


class Checked(keras.metrics.Mean):
    """Fails if a label is 0, on TensorFlow with a check in the graph."""

    def update_state(self, y, y_pred, sample_weight=None):
        super().update_state(y_pred)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            tf.debugging.assert_positive(y)
        elif ops.min(y) <= 0:
            raise ValueError("not positive")


@pytest.mark.skipif(BACKEND == "jax", reason="nothing in a compiled step can raise")
@pytest.mark.parametrize("method", METHODS)
def test_a_check_that_fails_in_a_step_of_fit(method):
    model = compiled(method, Faults(), run_eagerly=False)
    model.compile(model.optimizer, "mse", metrics=[Checked(name="metric")])
    x, y = DATA
    model.train_on_batch(x, y + 1)
    before = snapshot(model)
    refused = ValueError
    if BACKEND == "tensorflow":
        import tensorflow as tf

        refused = tf.errors.InvalidArgumentError
    with pytest.raises(refused, match="positive"):
        model.train_on_batch(x, y)
    # Keras starts with fresh metrics. A graph's changes to them stay.
    metrics = {v.path for v in model.metrics_variables}
    moved = {name.split(" ")[-1] for name in differences(before, snapshot(model))}
    assert moved <= metrics
    model.train_on_batch(x, y + 1)


def test_metrics_created_in_a_failed_step_are_reset():
    faults = Faults()
    model = compiled("sam", faults)
    faults.at("second metric")
    with pytest.raises(Failure):
        step(model)
    assert not any(np.any(ops.convert_to_numpy(v)) for v in model.metrics_variables)


def test_an_error_in_a_constraint_changes_only_weights_and_moments():
    """As in Keras, and as `docs/fit.md` says."""
    faults = Faults()
    model = compiled("slsam", faults)
    step(model)
    kernel = model.trainable_variables[0]
    kernel.constraint = lambda x: faults.reached("constraint") or x
    before = snapshot(model)
    faults.at("constraint")
    while faults.place:
        with contextlib.suppress(Failure):
            before = snapshot(model)
            step(model)
    base = {v.path for v in model.optimizer.base_optimizer.variables}
    base |= {v.path for v in model.trainable_variables}
    moved = {name.split()[1] for name in differences(before, snapshot(model))}
    assert moved and moved <= base
    assert not any("iteration" in path for path in moved)


@pytest.fixture
def interrupts():
    """Handles Ctrl-C as Python does, also if the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interrupt_at(line):
    """Sends Ctrl-C at the n-th executed line of the package.

    Yields a list whose length is the number of executed lines.
    """
    package, lines = os.path.dirname(keras_slsam.__file__), []

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(None)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("method", ["sam", "slsam", "sl+s2"])
def test_an_interrupted_step_completes_or_changes_nothing(method):
    keras.utils.set_random_seed(0)
    model = compiled(method, Faults())
    step(model)
    before = snapshot(model)
    with interrupt_at(None) as lines:
        step(model)
    after = snapshot(model)
    assert differences(before, after)
    for line in np.linspace(1, len(lines), POINTS, dtype=int):
        put_back(model, before)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line):
            step(model)
        now = snapshot(model)
        if differences(after, now):
            assert differences(before, now) == []


@pytest.mark.usefixtures("interrupts")
def test_only_the_first_ctrl_c_is_delayed():
    held = []
    with pytest.raises(KeyboardInterrupt), atomic.hold_back_interrupt():
        signal.raise_signal(signal.SIGINT)
        held.append("the first")
        signal.raise_signal(signal.SIGINT)
        held.append("the second")
    assert held == ["the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with atomic.hold_back_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_in_another_thread():
    model = compiled("sam", Faults())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        logs = pool.submit(step, model).result()
    assert "loss" in logs
