"""The same start gives the same trajectory on each backend, also when resumed."""

import keras
import numpy as np
import processes
import pytest
import trajectory

if keras.config.backend() == "torch":
    pytest.skip("JAX and TensorFlow are compared with PyTorch", allow_module_level=True)


def assert_same(found, expected):
    assert expected["masks"].shape[0] == trajectory.STEPS
    np.testing.assert_array_equal(found["masks"], expected["masks"])
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=0, atol=1e-5)


# One test, because starting a process takes longer than the steps.
def test_pytorch_takes_the_same_steps_and_checkpoints_go_both_ways(tmp_path):
    own, other = tmp_path / "own", tmp_path / "torch"
    own.mkdir()
    other.mkdir()
    expected = trajectory.run_all(own)
    processes.run(1, trajectory.__file__, own, other, timeout=400, backend="torch")
    found = np.load(other / "results.npz")

    def of_torch(name):
        return {key: found[f"{name}: {key}"] for key in ("masks", "weights")}

    for name, result in expected.items():
        assert 0.1 < result["masks"].mean() < 0.6 or name == "randomized"
        assert_same(of_torch(name), result)
    resumed = trajectory.resume(other)
    assert len(resumed) == 2
    for kind in trajectory.CHECKPOINTS:
        later = expected[f"{kind}, later"]
        assert_same(resumed[f"{kind}, resumed"], later)
        assert_same(of_torch(f"{kind}, resumed"), later)
