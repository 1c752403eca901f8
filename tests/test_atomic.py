"""A step that raises, or is interrupted, leaves everything as it was."""

import contextlib
import os
import random
import signal
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_slsam
from keras_slsam import samplers

BACKEND = keras.config.backend()


class Failure(Exception):
    pass


class Faults:
    """Raises where a test wants it: at the n-th call of a place."""

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
    """Fails after it has assigned. Draws as users' samplers do, from a generator."""

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
SPARSE, TWICE = ("slsam", "sl+s2"), ("sam", "rst", "slsam")
PLACES = [
    (place, countdown, method)
    for method in METHODS
    for place, countdown in [
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
    if (countdown == 1 or method in TWICE)
    and (place not in ("draw", "learn") or method in SPARSE)
]
DATA = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")


def compiled(method, faults, base=None, **kwargs):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),  # without a seed: PyTorch's global generator
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
    """All that a step may move, as NumPy arrays."""
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


def step(model):
    data = [ops.convert_to_tensor(array) for array in DATA]
    return keras_slsam.step(model, model.optimizer, tuple(data))


@pytest.mark.parametrize(("place", "countdown", "method"), PLACES)
def test_a_step_that_raises_leaves_everything_as_it_was(place, countdown, method):
    faults = Faults()
    model = compiled(method, faults)
    step(model)
    before = snapshot(model)
    for error in (Failure, KeyboardInterrupt, MemoryError):
        faults.at(place, countdown, error)
        with pytest.raises(error):
            step(model)
        assert differences(before, snapshot(model)) == []
    step(model)
    assert differences(before, snapshot(model)) != []
