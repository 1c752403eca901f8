"""Several devices of JAX take the steps of one."""

import functools
import pathlib
import re
import signal

import keras
import numpy as np
import processes
import pytest

if keras.config.backend() != "jax":
    pytest.skip("devices of JAX", allow_module_level=True)
SCRIPT = pathlib.Path(__file__).with_name("jax_devices.py")


def end_after_death(rank, scenario, folder):
    return processes.end_after_death(rank, 30, folder, SCRIPT, scenario, timeout=400)


def assert_inactive_arms_are_not_exchanged(method, found):
    # Each condition has the exchange of its own arm, once per pass, so that of an
    # inactive arm is not executed. Only the loss of each pass is exchanged outside.
    passes = 1 if method == "sl+s2" else 2
    if method == "sam":
        assert not found["inside"].size
        assert found["outside"] == passes * found["sizes"].sum() + 4
    else:
        np.testing.assert_array_equal(
            found["inside"], sorted(passes * found["sizes"].tolist())
        )
        assert found["outside"] == passes * 4


def assert_exchanges_have_one_order(method, found):
    # Each but the first waits for the one before it, so timing does not matter. In each
    # pass of SL-SAM the four arms have one each.
    fewest = {"sam": 1, "slsam": 8, "sl+s2": 4}[method]
    assert found["waits"].all() and len(found["waits"]) >= fewest


def assert_inactive_shards_are_not_exchanged(found):
    # A device has half of the gradients of "hidden", with the bias, and half of the
    # kernel of "narrow". In each pass the forward pass and the gradient of the
    # embedding also add up the activations of half of the batch.
    embedding, hidden, narrow, head = found["sizes"]
    activations = 4 * processes.BATCH // 2 * 6 * 8
    inside = found["inside"].tolist()
    assert hidden / 2 == (narrow - 32) / 2 + 32 == 288 and inside.count(288) == 2 * 2
    assert inside.count(head) == inside.count(embedding + activations) == 2
    assert found["outside"] == 2 * (activations + 4)


def assert_state_is_sharded_like_its_weights(method, found):
    of_hidden = {path.split("hidden_kernel_")[-1] for path in found["sharded"]}
    assert {"momentum", "velocity"} <= of_hidden
    assert ("previous_gradient" in of_hidden) == (method == "sl+s2")


@functools.cache
def of_one(kind):
    """Returns the state after the same steps of one device, in float32."""
    return processes.small(kind)


def assert_small_steps_are_those_of_one(found):
    for kind, values in found.items():
        tolerance = {"scalar": 1e-3, "mixed": 2e-3}.get(kind, 1e-6)  # in 16 bits
        np.testing.assert_allclose(values, of_one(kind), 1e-5, tolerance)


# One test, because starting a process takes longer than the steps.
def test_devices_take_the_steps_of_one(tmp_path, request):
    processes.save_one(tmp_path, "torch")
    processes.run(1, SCRIPT, "devices", tmp_path, timeout=400)
    expected = processes.alone("slsam")
    for kind in "data 2", "model":
        processes.assert_same_later(processes.read(tmp_path, f"{kind} from one"))
        processes.assert_one_goes_on(tmp_path / f"{kind}.keras")
    for method in processes.METHODS:
        expected = processes.alone(method)
        found = processes.read(tmp_path, f"data 2-{method}")
        processes.assert_same(found, expected, 1e-5)
        assert_inactive_arms_are_not_exchanged(method, found)
        assert_exchanges_have_one_order(method, found)
        parallel = processes.read(tmp_path, f"model-{method}")
        processes.assert_same(parallel, expected, 1e-5)
        assert_state_is_sharded_like_its_weights(method, parallel)
        if method == "slsam":
            assert_inactive_shards_are_not_exchanged(parallel)
    other = processes.read(tmp_path, "data 4-slsam")
    processes.assert_same(other, processes.alone("slsam"), 1e-5)
    adamw = processes.read(tmp_path, "adamw")
    assert not adamw["inside"].size and adamw["outside"] == found["sizes"].sum() + 4
    for waits in processes.read(tmp_path, "order").values():
        assert waits.all() and len(waits) > 15
    assert_small_steps_are_those_of_one(processes.read(tmp_path, "small"))
    assert_small_steps_are_those_of_one(processes.read(tmp_path, "small model"))

    request.getfixturevalue("float64")
    for method in processes.METHODS:
        found = processes.read(tmp_path, f"data 4 in float64-{method}")
        processes.assert_same(found, processes.alone(method), 1e-10)
    for kind in "data 2", "model":
        found = processes.read(tmp_path, f"{kind} in float64-slsam")
        processes.assert_same(found, processes.alone("slsam"), 1e-10)


def assert_an_error_ended_the_other(found, codes):
    ((code, output),) = found
    assert code in codes and re.search("an error: .*Gloo", output), output


def test_two_processes_and_a_killed_one(tmp_path, request):
    processes.save_one(tmp_path, "torch")
    assert_an_error_ended_the_other(end_after_death(1, "killed", tmp_path), {1})
    for method in processes.METHODS:
        expected = processes.alone(method)
        for rank in range(2):
            found = processes.read(tmp_path, f"processes-{method}", rank)
            processes.assert_same(found, expected, 1e-5)
            if method == "slsam":  # it has the most
                assert_exchanges_have_one_order(method, found)
    for rank in range(2):
        assert_small_steps_are_those_of_one(processes.read(tmp_path, "small", rank))
        errors = {
            k: str(v) for k, v in processes.read(tmp_path, "errors", rank).items()
        }
        assert "keras_slsam is 0.0.1 in process 1, 0.0.0 in" in errors["version"]
        assert "`trainable_variables[3]` is (16, 8) float32" in errors["weights"]
        assert "`adaptive` is True in process 1, False in" in errors["arguments"]
        assert errors["alike"] == "no error"
        assert "ascent_fraction=0.5" in errors["part"]
        assert "jax_cpu_enable_async_dispatch=True" in errors["dispatch"]
        assert "1 of 2 devices" in errors["alone"]
        assert "ModelParallel" in errors["model"]
        backed_up = processes.read(tmp_path, "backed up", rank)
        assert backed_up["epochs"].tolist() == [1, 2]
        np.testing.assert_allclose(
            backed_up["resumed"], backed_up["whole"], rtol=0, atol=1e-6
        )

    # Without the first process, JAX may abort the other after its error.
    found = end_after_death(0, "resumed", tmp_path)
    assert_an_error_ended_the_other(found, {1, -signal.SIGABRT})
    expected = processes.alone("slsam")
    for rank in range(2):
        for name in "from one", "resumed":
            processes.assert_same_later(processes.read(tmp_path, name, rank))
    processes.assert_one_goes_on(tmp_path / "model-0.keras")
    processes.assert_another_backend_goes_on(tmp_path / "model-0.keras", "torch")
    request.getfixturevalue("float64")
    expected = processes.alone("slsam")
    for rank in range(2):
        found = processes.read(tmp_path, "in float64", rank)
        processes.assert_same(found, expected, 1e-10)
