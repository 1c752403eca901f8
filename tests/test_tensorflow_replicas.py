"""Replicas of TensorFlow's strategies take the steps of one device."""

import functools
import pathlib
import signal

import keras
import numpy as np
import processes
import pytest
from zoo import EAGER

if keras.config.backend() != "tensorflow":
    pytest.skip("strategies of TensorFlow", allow_module_level=True)
SCRIPT = pathlib.Path(__file__).with_name("tensorflow_replicas.py")


def run(count, scenario, folder):
    processes.run(count, SCRIPT, scenario, folder, timeout=400)


def end_after_death(rank, scenario, folder):
    return processes.end_after_death(rank, 30, folder, SCRIPT, scenario, timeout=400)


# Few tests, because starting processes takes longer than the steps.
def test_mirrored_replicas(tmp_path, request):
    processes.save_one(tmp_path, "torch")
    run(1, "mirrored", tmp_path)
    processes.assert_same_later(processes.read(tmp_path, "from one"))
    for method in processes.METHODS:
        expected = processes.alone(method)
        found = processes.read(tmp_path, f"4-32-{method}")
        processes.assert_same(found, expected, 1e-5)
    two = processes.read(tmp_path, "2-32-slsam")
    processes.assert_same(two, processes.alone("slsam"), 1e-5)
    adamw = processes.read(tmp_path, "adamw")["exchanged"]
    assert adamw == expected["weights"].nbytes
    processes.assert_one_goes_on(tmp_path / "model.keras")
    processes.assert_another_backend_goes_on(tmp_path / "model.keras", "torch")

    request.getfixturevalue("float64")
    for method in processes.METHODS:
        expected = processes.alone(method)
        found = processes.read(tmp_path, f"2-64-{method}")
        processes.assert_same(found, expected, 1e-10)
        # A compiled step has the exchanges of all arms. Each of those that may be
        # inactive is in a condition of its own, in each pass and replica.
        programs = 2 * (1 if method == "sl+s2" else 2)
        sizes = 2 * found["sizes"]  # float64
        assert sizes.sum() == 2 * adamw
        if method == "sam":
            assert not found["inside"].size
            assert found["outside"] == programs * sizes.sum()
        else:
            np.testing.assert_array_equal(
                found["inside"], sorted(programs * sizes.tolist())
            )
            assert not found["outside"]
    four = processes.read(tmp_path, "4-64-slsam")
    processes.assert_same(four, processes.alone("slsam"), 1e-10)


def test_other_state_and_refusals(tmp_path):
    run(1, "small", tmp_path)
    small = processes.read(tmp_path, "small")
    equal = processes.small("normalised", processes.take_equal_steps, **EAGER)
    # The metrics, in the last variables, count the rows of both.
    np.testing.assert_allclose(small.pop("normalised")[:-4], equal[:-4], 1e-5, 1e-6)
    normalised = [processes.read(tmp_path, "normalised", rank) for rank in range(2)]
    processes.assert_weights_are_shared_and_statistics_are_not(normalised)
    for kind, found in small.items():
        tolerance = {"scalar": 1e-4, "mixed": 2e-3}.get(kind, 1e-6)  # in 16 bits
        take_steps = processes.STEPS_OF_ONE.get(kind, processes.fit_small)
        expected = processes.small(kind, take_steps, **EAGER)
        np.testing.assert_allclose(found, expected, 1e-5, tolerance)
    pair = processes.read(tmp_path, "pair")
    np.testing.assert_allclose(pair["both"], pair["alone"], rtol=1e-5, atol=1e-6)
    few = processes.train(processes.make_model("slsam"), 0, 3)
    processes.assert_same(processes.read(tmp_path, "one"), few, 1e-5)
    errors = {
        name: str(error) for name, error in processes.read(tmp_path, "errors").items()
    }
    assert "`model.test_on_batch(x, y)`" in errors["metric"]
    assert "`synchronized=True`" in errors["synchronized"]
    assert "`with strategy.scope():`" in errors["outside"]
    assert "run_eagerly=True" in errors["eager"]
    assert "jit_compile=True" in errors["jit"]
    assert "`optimizer.build(model.trainable_variables)`" in errors["unbuilt"]
    assert "`ema_overwrite_frequency`" in errors["overwritten"]
    assert "its own `keras.random.SeedGenerator`" in errors["noise"]
    assert "`strategy.run`, inside a `tf.function`" in errors["not in replicas"]
    assert "CentralStorageStrategy" in errors["kind"]


@functools.cache
def of_one(kind):
    """Returns the state after the same steps of one device, in float32."""
    take_steps = processes.STEPS_OF_ONE.get(kind, processes.fit_small)
    return processes.small(kind, take_steps, metrics=(), **EAGER)


def test_workers_and_a_killed_one(tmp_path, request):
    processes.save_one(tmp_path, "torch")
    ((code, output),) = end_after_death(1, "killed", tmp_path)
    assert code == 1 and "UnavailableError" in output, output
    for method in processes.METHODS:
        expected = processes.alone(method)
        for rank in range(2):
            found = processes.read(tmp_path, f"workers-{method}", rank)
            processes.assert_same(found, expected, 1e-5)
    for rank in range(2):
        for kind, found in processes.read(tmp_path, "small", rank).items():
            tolerance = 2e-3 if kind == "mixed" else 1e-6  # it is in float16
            # The loss, in the last variables, counts the rows of both.
            last = -2 if kind == "normalised" else None
            expected = of_one(kind)[:last]
            np.testing.assert_allclose(found[:last], expected, 1e-5, tolerance)
        errors = {
            k: str(v) for k, v in processes.read(tmp_path, "errors", rank).items()
        }
        named = errors["rate"].split("different values of")[1]
        assert "`learning_rate`" in named and "`iterations`" not in named
        # The workers exchange nothing while a step is refused, so they can go on.
        assert errors["nan"] == "no error"
        assert "keras_slsam is 0.0.1 in process 1, 0.0.0 in" in errors["version"]
        assert "`trainable_variables[3]` is (16, 8) float32" in errors["weights"]
        assert "weight_decay` is 0.1 in process 1, 0.0 in" in errors["arguments"]
        assert errors["alike"] == "no error"

    # TensorFlow may end the others when the first one dies.
    ((code, output),) = end_after_death(0, "resumed", tmp_path)
    assert code == -signal.SIGABRT or "UnavailableError" in output, output
    for rank in range(2):
        processes.assert_same_later(processes.read(tmp_path, "from one", rank))
        processes.assert_same_later(processes.read(tmp_path, "resumed", rank), 1e-6)
    processes.assert_one_goes_on(tmp_path / "model-0.keras")
    request.getfixturevalue("float64")
    expected = processes.alone("slsam")
    for rank in range(2):
        found = processes.read(tmp_path, "in float64", rank)
        processes.assert_same(found, expected, 1e-10)
