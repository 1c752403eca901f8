"""The same start gives the same trajectory on each backend, also when resumed."""

import os
import subprocess
import sys

import keras
import numpy as np
import trajectory

# JAX and TensorFlow are compared with PyTorch, which compiles nothing. It resumes their
# checkpoints, and they resume its own.
COMPARED = {"jax": ["torch"], "tensorflow": ["torch"], "torch": ["jax", "tensorflow"]}


def on_backend(backend, *arguments):
    # The other process must import the same package as this one.
    path = os.pathsep.join(sys.path)
    environment = dict(os.environ, KERAS_BACKEND=backend, PYTHONPATH=path)
    command = [sys.executable, trajectory.__file__, *map(str, arguments)]
    subprocess.run(command, env=environment, check=True)


def assert_same(own, other):
    assert own["masks"].shape[0] == trajectory.STEPS
    assert 0.1 < own["masks"].mean() < 0.6
    np.testing.assert_array_equal(own["masks"], other["masks"])
    np.testing.assert_allclose(own["weights"], other["weights"], rtol=0, atol=1e-5)


# One process per other backend, because starting one takes longer than the steps.
def test_other_backends_take_the_same_steps_and_resume_checkpoints(tmp_path):
    own = trajectory.run_all(tmp_path)
    resumed = {kind for kind in own if kind.endswith(", resumed")}
    assert len(own) == len(trajectory.KINDS) + len(trajectory.CHECKPOINTS)
    assert len(resumed) == len(trajectory.CHECKPOINTS)
    for backend in COMPARED[keras.config.backend()]:
        takes_all = backend == "torch"
        file = tmp_path / f"{backend}.npz"
        on_backend(backend, "all" if takes_all else "resume", tmp_path, file)
        found = np.load(file)
        for kind in own if takes_all else resumed:
            other = {key: found[f"{kind}: {key}"] for key in own[kind]}
            assert_same(own[kind], other)
