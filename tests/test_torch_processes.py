"""Several processes of PyTorch take the steps of one with the whole batch."""

import keras
import numpy as np
import processes
import pytest

if keras.config.backend() != "torch":
    pytest.skip("processes of PyTorch", allow_module_level=True)


def of(folder, name, count):
    return [processes.read(folder, name, rank) for rank in range(count)]


def assert_steps_of_one(folder, count):
    for method in processes.METHODS:
        expected = processes.alone(method)
        for found in of(folder, method, count):
            processes.assert_same(found, expected, 1e-5)
            # Only gradients of active arms are exchanged, once per pass.
            passes = 1 if method == "sl+s2" else 2
            active = (found["masks"] * found["sizes"]).sum()
            assert found["exchanged"] == passes * active
            if method != "sam":  # it has one arm per variable
                assert found["sizes"].tolist() == [416, 576, 544, 108]  # as in the docs
            everything = found["sizes"].sum() * len(found["masks"])
            assert (active < everything) == (method != "sam")
    # As many bytes as AdamW for each pass, if all arms are active.
    assert of(folder, "adamw", count)[0]["exchanged"] == found["sizes"].sum()


# One test, because starting processes takes longer than the steps.
def test_two_processes(tmp_path, request):
    processes.save_one(tmp_path, "jax")
    processes.run(2, processes.__file__, "all", tmp_path)
    assert_steps_of_one(tmp_path, 2)
    assert_other_state_is_the_same(tmp_path)
    assert_what_would_drift_apart_is_refused(tmp_path)
    assert_a_loaded_state_is_shared(tmp_path)
    normalised = of(tmp_path, "normalised", 2)
    processes.assert_weights_are_shared_and_statistics_are_not(normalised)
    assert_buffers_are_shared_and_noise_is_not(tmp_path)
    expected = processes.alone("slsam")
    for fit, loop in zip(of(tmp_path, "fit", 2), of(tmp_path, "loop", 2)):
        processes.assert_same(fit, expected, 1e-5)
        processes.assert_same(loop, expected, 1e-5)
        assert loop["exchanges"] > fit["exchanges"]  # in more pieces
    for found in of(tmp_path, "from one", 2):
        processes.assert_same_later(found)
    request.getfixturevalue("float64")
    assert_steps_of_one_in_float64(tmp_path, 2)


def assert_steps_of_one_in_float64(folder, count):
    for method in processes.METHODS:
        expected = processes.alone(method)
        for found in of(folder, f"{method}64", count):
            processes.assert_same(found, expected, 1e-10)


def assert_other_state_is_the_same(folder):
    for kind in *processes.SMALL, "normalised":
        take_steps = processes.STEPS_OF_ONE.get(kind, processes.take_small_steps)
        expected = processes.small(kind, take_steps)
        for found in of(folder, "small", 2):
            tolerance = 2e-3 if kind == "mixed" else 1e-6  # it is in float16
            np.testing.assert_allclose(found[kind], expected, 1e-5, tolerance)


def assert_what_would_drift_apart_is_refused(folder):
    for errors in of(folder, "errors", 2):
        errors = {name: str(error) for name, error in errors.items()}
        assert "`trainable_variables[3]` is (16, 8) float32" in errors["weights"]
        assert "in process 1" in errors["weights"]
        assert "`rho` is 0.2 in process 1, 0.1 in process 0" in errors["rho"]
        assert "the optimizer is SLSAM in process 1, SAM in" in errors["method"]
        assert "`rho`, whether there is an ascent" in errors["rho later"]
        assert "16.0" in errors["scale"]
        assert "keras_slsam is 0.0.1 in process 1, 0.0.0 in" in errors["version"]
        assert "different values of the weight 'embedding" in errors["weights later"]
        assert (
            errors["one fails"] == "In process 1: ZeroDivisionError: division by zero"
        )
        assert "the scale of the loss" in errors["scale later"]
        assert "other weights and buffers" in errors["other layers"]
        assert "the state of the optimizer is" in errors["state"]
        assert "the arm of each weight is [0, 1, 0, 1] in process 1" in errors["arms"]
        assert "is nothing (ZeroDivisionError) in process 1" in errors["one config"]
        assert not {"nan", "alike"} & errors.keys()
        assert not [name for name in errors if "without" in name]
        assert "`model.module`" in errors["wrapped"]
        assert "`model.module`" in errors["wrapped too early"]
        assert "`module.module`" in errors["wrapped inside"]
        for name in "sharded", "a sharded layer", "a sharded module":
            assert "`DTensor`s, for example by `fully_shard`" in errors[name]


def assert_a_loaded_state_is_shared(folder):
    first, other = of(folder, "restored", 2)
    processes.assert_same(other, first, 0)
    # The state is that of the first process, which went on.
    np.testing.assert_array_equal(
        first["masks"], of(folder, "slsam", 1)[0]["masks"][2:5]
    )


def assert_buffers_are_shared_and_noise_is_not(folder):
    first, other = of(folder, "shared", 2)
    for found in first, other:
        np.testing.assert_array_equal(found["own"], [0.0, 1.0, 2.0])
        np.testing.assert_array_equal(found["expanded"], [1.0, 1.0, 1.0])
    assert (first["Dropout"] != other["Dropout"]).any()
    # Its generator got its seed when the layer was created.
    np.testing.assert_array_equal(first["GaussianNoise"], other["GaussianNoise"])


def assert_all_end_after_death(rank, count, folder, scenario):
    found = processes.end_after_death(
        rank, 20, folder, processes.__file__, scenario, count=count
    )
    for code, output in found:
        assert code == 1 and "RuntimeError" in output, output


def test_four_processes_and_a_killed_one(tmp_path, request):
    assert_all_end_after_death(1, 4, tmp_path, "killed")
    assert_steps_of_one(tmp_path, 4)
    # Two processes resume. Then the first one is killed.
    assert_all_end_after_death(0, 2, tmp_path, "resumed")
    for resumed, whole in zip(of(tmp_path, "resumed", 2), of(tmp_path, "whole", 2)):
        processes.assert_same(resumed, whole, 1e-5, first=5)
    for resumed in of(tmp_path, "resumed by two", 2):
        processes.assert_same(resumed, whole, 1e-6, first=5)
    processes.assert_one_goes_on(tmp_path / "model.keras")
    processes.assert_another_backend_goes_on(tmp_path / "model.keras", "jax")
    request.getfixturevalue("float64")
    assert_steps_of_one_in_float64(tmp_path, 4)
