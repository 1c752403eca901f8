"""Several devices of JAX take the steps of one."""

import pathlib

import keras
import numpy as np
import processes
import pytest

if keras.config.backend() != "jax":
    pytest.skip("devices of JAX", allow_module_level=True)


SCRIPT = pathlib.Path(__file__).with_name("jax_devices.py")
RANKS = {"devices": 1, "processes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Starts all processes, and returns the folder with what they found."""
    folder = tmp_path_factory.mktemp("devices")
    for kind, count in RANKS.items():
        for code, output in processes.launch(count, SCRIPT, folder, kind, timeout=300):
            assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def alone():
    return {
        method: processes.train(processes.make_model(method))
        for method in processes.METHODS
    }


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("data 2", ["sam", "slsam", "sl+s2"]),
        ("data 4", ["slsam"]),
        ("model", ["slsam", "sl+s2"]),
        ("processes", ["slsam"]),
    ],
)
def test_devices_take_the_steps_of_one(kind, methods, folder, alone):
    for method in methods:
        for rank in range(RANKS.get(kind, 1)):
            found = np.load(folder / f"{kind}-{method}-{rank}.npz")
            expected = alone[method]
            np.testing.assert_array_equal(found["masks"], expected["masks"])
            np.testing.assert_allclose(
                found["weights"], expected["weights"], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("method", processes.METHODS)
def test_gradients_of_inactive_arms_are_not_exchanged(method, folder):
    found = np.load(folder / f"data 2-{method}-0.npz")
    inside, outside = found["reduced"]
    gradients = 4 * found["size"] * (1 if method == "sl+s2" else 2)
    if method == "sam":
        inside, outside = outside - inside, 0
    # In a condition, which skips them. Besides them, only the loss is exchanged.
    assert gradients <= inside <= gradients + 8 and outside <= 8


@pytest.mark.parametrize("method", ["slsam", "sl+s2"])
def test_state_is_sharded_like_its_weights(method, folder):
    paths = np.load(folder / f"model-{method}-0.npz")["sharded"]
    of_hidden = {path.split("hidden_kernel_")[-1] for path in paths}
    assert {"momentum", "velocity"} <= of_hidden
    assert ("previous_gradient" in of_hidden) == (method == "sl+s2")
