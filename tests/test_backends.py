"""The same start gives the same trajectory on every backend, also half-way."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import trajectory

# Each backend is compared with the next, so that all three are with each other.
NEXT = {"jax": "tensorflow", "tensorflow": "torch", "torch": "jax"}
OTHERS = [name for name in NEXT if name != keras.config.backend()]


def on_backend(backend, *arguments):
    environment = dict(os.environ, KERAS_BACKEND=backend)
    command = [sys.executable, trajectory.__file__, *map(str, arguments)]
    subprocess.run(command, env=environment, check=True)


def assert_same(own, other):
    assert sorted(other) == sorted(own)
    for key in own:
        if key.endswith("masks"):
            assert own[key].shape[0] == trajectory.STEPS
            assert 0.1 < own[key].mean() < 0.6
            np.testing.assert_array_equal(own[key], other[key])
        else:
            np.testing.assert_allclose(own[key], other[key], rtol=0, atol=1e-5)


def test_twenty_steps_are_those_of_the_next_backend(tmp_path):
    file = tmp_path / "trajectory.npz"
    on_backend(NEXT[keras.config.backend()], "run", file)
    assert_same(trajectory.run_all(), np.load(file))


# What each kind adds to the state is saved and found again.
@pytest.mark.parametrize(
    ("kind", "name"),
    [("proportional", "model.keras"), ("bandit, single step", "model.weights.h5")],
)
def test_each_other_backend_goes_on_from_a_checkpoint(kind, name, tmp_path):
    model = trajectory.start(kind)
    trajectory.train(model)
    if name.endswith(".keras"):
        model.save(tmp_path / name)
    else:
        model.save_weights(tmp_path / name)
    expected = trajectory.train(model, first=trajectory.STEPS)
    for backend in OTHERS:
        file = tmp_path / f"{backend}.npz"
        on_backend(backend, "resume", kind, tmp_path / name, file)
        assert_same(expected, np.load(file))
