"""The same start gives the same trajectory on every backend."""

import os
import subprocess
import sys

import keras
import numpy as np
import trajectory

# Each backend is compared with the next, so that all three are with each other.
NEXT = {"jax": "tensorflow", "tensorflow": "torch", "torch": "jax"}


def test_twenty_steps_are_those_of_the_next_backend(tmp_path):
    file = tmp_path / "trajectory.npz"
    environment = dict(os.environ, KERAS_BACKEND=NEXT[keras.config.backend()])
    subprocess.run(
        [sys.executable, trajectory.__file__, file], env=environment, check=True
    )
    other, own = np.load(file), trajectory.run_all()
    assert sorted(other) == sorted(own)
    for key in own:
        if key.endswith("masks"):
            assert own[key].shape[0] == trajectory.STEPS
            assert 0.1 < own[key].mean() < 0.6
            np.testing.assert_array_equal(own[key], other[key])
        else:
            np.testing.assert_allclose(own[key], other[key], rtol=0, atol=1e-5)
