"""The benchmarks measure correctly, on a chain of Dense layers."""

import argparse
import json
import re
import shlex
import sys

import keras
import numpy as np
import pytest

from benchmarks import gpu
from benchmarks import long_run
from benchmarks import memory
from benchmarks import models
from benchmarks import probes
from benchmarks import process
from benchmarks import report
from benchmarks import scale
from benchmarks import step_time
from benchmarks.__main__ import main
from keras_slsam.analysis.plots import color_of

BACKEND = keras.config.backend()
SMALL = "--model dense --layers 2 --width 8 --batch 4 --rounds 2 --steps 2".split()


def flags(**changed):
    given = {
        "model": "dense",
        "layers": 2,
        "width": 8,
        "length": None,
        "batch": 4,
        "active_fraction": 0.4,
        "rounds": 2,
        "steps": 2,
        "jit_compile": "auto",
        "seed": 0,
    }
    return argparse.Namespace(**{**given, **changed})


def run(tmp_path, command, *methods, more=()):
    file = tmp_path / f"{command}.json"
    chosen = ["--methods", *methods]
    main([command, *SMALL, *more, *chosen, "--json", str(file)])
    return json.loads(file.read_text())


def reported(tmp_path, command):
    """Returns a page with the report of a command's file, and its picture."""
    page, picture = tmp_path / "page.md", tmp_path / "page.svg"
    names = ("time", "memory", "scale", "long")
    page.write_text("".join(f"<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in names))
    report.write([tmp_path / f"{command}.json"], page)
    text = page.read_text()
    assert text.count("old") == 3  # there are no results of the other commands
    return re.sub(" +", " ", text), picture


def test_time_and_its_report(tmp_path):
    more = ["--flop-steps", "1"]
    timed = run(tmp_path, "time", "AdamW", "SL-SAM block", more=more)
    assert {"backend", "machine", "versions", "flags", "line"} < set(timed)
    row = timed["result"]["methods"]["SL-SAM block"]
    assert row["steps"] == 4 and row["arms"] == 3
    assert 0 < row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
    dense = timed["result"]["methods"]["AdamW"]
    # On TensorFlow a function that creates variables is traced twice. In Keras' step
    # that is the whole step. In the sharpness-aware step it is only the forward pass.
    assert row["traces"] == {"jax": 1, "tensorflow": 3, "torch": None}[BACKEND]
    assert dense["traces"] == {"jax": 1, "tensorflow": 2, "torch": None}[BACKEND]
    # The forward pass, gradients of two inputs and of three weights. The kernels are
    # 8x8, 8x8 and 8x2.
    assert dense["flops"] == [2 * 4 * (3 * (64 + 64 + 16) - 64)]
    ratio = timed["result"]["ratios"]["SL-SAM block / AdamW"]
    assert ratio["of_means"] > 0 and len(ratio["of_rounds"]) == 2

    text, picture = reported(tmp_path, "time")
    assert text.count(timed["line"]) == 1
    assert "--json" not in timed["line"]
    assert f"| SL-SAM block | {row['mean']:.4f} |" in text
    assert f"{ratio['of_means']:.3f} ±" in text
    # The color of a backend does not depend on the other backends.
    own = {name: color_of(name).lower() for name in report.BACKENDS}
    colors = {color for color in own.values() if color in picture.read_text()}
    assert colors == {own[BACKEND]}


def test_each_method_can_have_a_separate_process(tmp_path, monkeypatch):
    def separate(function, name, args):
        assert function is step_time.of_method
        seconds = {"AdamW": 1.0, "SAM": 2.0}[name]
        row = dict.fromkeys(("active_share", "trace", "compile", "traces"))
        for part in (
            "mean",
            "median",
            "lower_quartile",
            "upper_quartile",
            "first_call",
            "cpu",
        ):
            row[part] = seconds
        return {**row, "seconds": [[seconds], [seconds]], "flops": []}

    monkeypatch.setattr(process, "separate", separate)
    run(tmp_path, "time", "AdamW", "SAM", more=["--alone"])
    text, _ = reported(tmp_path, "time")
    assert "each method in a separate process" in text
    assert "| SAM | 2.0000 | 2.0000 to 2.0000 | 2.00 | 2.000 ± 0.000 |" in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's resident set")
def test_memory(tmp_path, monkeypatch):
    # noxfile.py turns oneDNN off, and with it TensorFlow's count of live memory.
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    width = 512
    result = run(tmp_path, "memory", "AdamW", more=["--width", str(width)])["result"]
    row = result["methods"]["AdamW"]
    resident = row["resident"]
    assert 0 < resident["built"] <= resident["first_step"]
    # Two kernels with two moments each.
    least = 4 * width**2 * 2 * (1 + 2)
    assert resident["later_steps"] > least
    assert row["device"] is None or row["device"] > least  # on a GPU
    assert (row["planned"] is not None) == (BACKEND == "jax")
    if BACKEND == "jax":
        assert row["live"] is None
        assert least < row["planned"]["arguments"] < 1.1 * least
    elif row["live"] is None:
        # On CPUs where oneDNN is off by default, such as those without AVX-512,
        # TensorFlow uses another allocator.
        assert BACKEND == "tensorflow"
    else:
        assert all(least < live < 3 * least for live in row["live"])


def test_the_tutorial_sam_takes_the_same_steps():
    x, y = models.data(flags(), 12)
    found = {}
    for name in ("tutorial SAM", "SAM"):
        model = models.prepare(name, flags())
        model.optimizer.learning_rate = 0.01
        history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        found[name] = history.history["loss"], model.get_weights()
    (losses, weights), (expected_losses, expected) = found.values()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for weight, other in zip(weights, expected):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def test_masks_and_conditions_of_a_step():
    args = flags()
    model = models.prepare("SL-SAM", args)
    x, y = models.data(args, args.batch)
    # The first turn does not count, nor the first step of each turn.
    num_arms = len(model.trainable_variables)
    turns = np.empty((args.rounds + 1, args.steps + 1, num_arms))
    for step in np.ndindex(turns.shape[:2]):
        step_time.fit(model, x, y, args.batch)
        turns[step] = keras.ops.convert_to_numpy(model.optimizer.active)
    again = step_time.timed_masks("SL-SAM", num_arms, args)
    np.testing.assert_array_equal(again, turns[1:, 1:])

    count = probes.conditions(model, x, y)
    assert count is None if BACKEND == "torch" else count > num_arms
    # With all arms active, a step has the same conditions.
    every = models.prepare("SL-SAM, every arm", args)
    step_time.fit(every, x, y, args.batch)
    assert probes.conditions(every, x, y) == count
    assert keras.ops.convert_to_numpy(every.optimizer.active).all()


def test_scale(tmp_path, monkeypatch):
    resident = {"resident": {"later_steps": 1e6}}
    found = {"methods": {"SAM": resident, "SL-SAM": resident}}
    monkeypatch.setattr(memory, "measure", lambda args: found)
    # A model that compiles quickly, with two weights per layer and a head.
    dense = {"model": "dense", "width": 8, "batch": 8, "length": None}
    monkeypatch.setattr(scale, "ENCODER", dense)
    file = tmp_path / "scale.json"
    few = ["--rounds", "1", "--steps", "1", "--depths", "1", "2"]
    main(["scale", *few, "--json", str(file)])
    result = json.loads(file.read_text())["result"]
    shallow, deep = result["rows"]
    assert (shallow["arms"], deep["arms"]) == (2 + 2, 2 * 2 + 2)
    if BACKEND == "torch":
        assert shallow["conditions"] is None
    else:
        assert shallow["conditions"] < deep["conditions"] < 2 * shallow["conditions"]
    for name in ("SAM", "SL-SAM"):
        assert shallow["times"][name]["first_call"] > 0
    *_, powers = scale.rows(result)
    assert powers["first call, s"] != "-"
    assert (powers["trace, s"] == "-") == (BACKEND == "torch")
    text, _ = reported(tmp_path, "scale")
    assert "| 2 | 6 |" in text


def test_the_encoder_of_scale_has_the_given_depth():
    args = flags(**scale.ENCODER, layers=2)
    # A block has 16 weights. The embeddings and the head have 9.
    assert len(models.make(args).trainable_variables) == 9 + 2 * 16


def test_powers_of_the_depth():
    depths = [6, 12, 24]
    assert scale.power(depths, [3 * depth for depth in depths]) == pytest.approx(1)
    assert scale.power(depths, [depth**2 for depth in depths]) == pytest.approx(2)
    assert scale.power(depths, [None] * 3) is None
    assert scale.power([6], [1.0]) is None


@pytest.mark.skipif(BACKEND != "torch", reason="the same code, slower if compiled")
def test_long(tmp_path, monkeypatch):
    name = "SL-SAM proportional"
    monkeypatch.setattr(long_run, "METHODS", {name: long_run.METHODS[name]})
    monkeypatch.setattr(long_run, "THOUSAND", 3)
    file = tmp_path / "long.json"
    main(["long", "--steps", "6", "--json", str(file)])
    row = json.loads(file.read_text())["result"]["methods"][name]
    assert len(row["seconds"]) == len(row["resident"]) == 2
    # Counts of the last three steps, each of which draws at least one arm.
    assert max(row["drawn"]) <= 3 <= sum(row["drawn"])
    text, _ = reported(tmp_path, "long")
    assert f"| {name} |" in text


@pytest.mark.parametrize("line", gpu.MEASUREMENTS.values())
def test_gpu_has_commands_that_exist(line, monkeypatch):
    class Understood(Exception):
        pass

    def measure(args):
        raise Understood

    command, *flags = shlex.split(line)
    monkeypatch.setattr(report.COMMANDS[command], "measure", measure)
    with pytest.raises(Understood):
        main([command, *flags, "--model", "dense"])


@pytest.mark.skipif(BACKEND != "torch", reason="starts processes, the fastest here")
def test_gpu_measures_until_the_time_is_over(tmp_path, monkeypatch, capsys):
    line = "time --rounds 1 --steps 1 --flop-steps 0 --methods AdamW SAM"
    monkeypatch.setattr(gpu, "MEASUREMENTS", {"time": line})
    test = tmp_path / "test_one.py"
    test.write_text("def test_one():\n    pass\n")
    monkeypatch.setattr(gpu, "TEST", test)
    sizes = ["--model", "dense", "--layers", "2", "--width", "8", "--batch", "4"]
    given = ["--backends", BACKEND, "--folder", str(tmp_path)]
    with pytest.raises(SystemExit, match="0|False"):
        main(["gpu", *given, *sizes])
    printed = capsys.readouterr().out
    assert f"test on {BACKEND}: done" in printed
    assert f"time on {BACKEND}: done" in printed
    assert re.search(r"\| SAM +\| 0\.0", printed)
    # Nothing was tested, which must not look like success.
    test.unlink()
    with pytest.raises(SystemExit, match="1|True"):
        main(["gpu", *given, *sizes])
    printed = capsys.readouterr().out
    assert f"test on {BACKEND}: FAILED" in printed
    assert f"time on {BACKEND}: done" in printed
    with pytest.raises(SystemExit, match="1|True"):
        main(["gpu", *given, "--minutes", "0"])
    printed = capsys.readouterr().out
    assert f"test on {BACKEND}: out of time" in printed
    assert f"time on {BACKEND}: out of time" in printed and "| SAM" not in printed
