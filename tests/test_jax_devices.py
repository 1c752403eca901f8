"""Several devices of JAX take the steps of one."""

import pathlib
import re

import keras
import numpy as np
import processes
import pytest

if keras.config.backend() != "jax":
    pytest.skip("devices of JAX", allow_module_level=True)
SCRIPT = pathlib.Path(__file__).with_name("jax_devices.py")
KINDS = {
    "data 2": ["sam", "slsam", "sl+s2"],
    "data 4": ["slsam"],
    "model": ["slsam", "sl+s2"],
}


def assert_inactive_arms_are_not_exchanged(method, found):
    inside, outside = found["reduced"]
    gradients = 4 * found["size"] * (1 if method == "sl+s2" else 2)
    if method == "sam":
        inside, outside = outside - inside, 0
    # The all-reduce of a gradient is inside the conditional of its arm, so it is not
    # executed for an inactive arm. Only that of the loss is outside.
    assert gradients <= inside <= gradients + 8 and outside <= 8


def assert_state_is_sharded_like_its_weights(method, found):
    of_hidden = {path.split("hidden_kernel_")[-1] for path in found["sharded"]}
    assert {"momentum", "velocity"} <= of_hidden
    assert ("previous_gradient" in of_hidden) == (method == "sl+s2")


# One test, because starting a process takes longer than the steps.
def test_devices_take_the_steps_of_one(tmp_path):
    processes.run(1, SCRIPT, "devices", tmp_path, timeout=300)
    alone = {method: processes.alone(method) for method in processes.METHODS}
    for kind, methods in KINDS.items():
        for method in methods:
            found = np.load(tmp_path / f"{kind}-{method}-0.npz")
            processes.assert_same(found, alone[method], 1e-5)
            if kind == "data 2":
                assert_inactive_arms_are_not_exchanged(method, found)
            if kind == "model":
                assert_state_is_sharded_like_its_weights(method, found)


def test_two_processes_and_a_killed_one(tmp_path):
    first, killed = processes.launch(2, SCRIPT, "killed", tmp_path, timeout=300)
    assert killed[0] == -9, killed[1]
    assert re.search(r"an error after .* s: .*Gloo", first[1]), first[1]
    for _, output in (first, killed):
        assert "keras_slsam is 0.0.1 in process 1, 0.0.0 in process 0" in output
    expected = processes.alone("slsam")
    found = [np.load(tmp_path / f"processes-{rank}.npz") for rank in range(2)]
    for each in found:
        processes.assert_same(each, expected, 1e-5)
    # The exchanges have one order, which does not depend on timing.
    waits = found[0]["waits"]
    assert len(waits) > 20 and waits.all()

    processes.run(2, SCRIPT, "resumed", tmp_path, timeout=300)
    for rank in range(2):
        resumed = np.load(tmp_path / f"resumed-{rank}.npz")
        np.testing.assert_array_equal(resumed["masks"], expected["masks"][5:])
        np.testing.assert_allclose(resumed["weights"], expected["weights"], atol=1e-5)
