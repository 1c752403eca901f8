"""The benchmarks measure what they say, on a chain of Dense layers."""

import argparse
import json
import sys

import keras
import numpy as np
import pytest

from benchmarks import cost_model
from benchmarks import layer_calls
from benchmarks import masks
from benchmarks import memory
from benchmarks import methods
from benchmarks import models
from benchmarks import probes
from benchmarks import report
from benchmarks import scale
from benchmarks import step_time
from benchmarks.__main__ import main

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


def reported(tmp_path, *commands):
    """The text of a page with the commands' files reported on it, and the picture."""
    page, picture = tmp_path / "page.md", tmp_path / "page.svg"
    names = ("time", "memory", "cost", "scale")
    page.write_text("".join(f"<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in names))
    report.write([tmp_path / f"{command}.json" for command in commands], page, picture)
    return page.read_text(), picture


def test_time_and_cost_and_the_report_of_them(tmp_path):
    more = ["--flop-steps", "1"]
    timed = run(tmp_path, "time", "AdamW", "SL-SAM block", more=more)
    assert {"backend", "machine", "versions", "flags", "line"} < set(timed)
    row = timed["result"]["methods"]["SL-SAM block"]
    assert row["steps"] == 4 and row["arms"] == 3
    assert 0 < row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
    dense = timed["result"]["methods"]["AdamW"]
    # On TensorFlow a step that makes variables is traced twice: Keras' own, and of
    # ours the forward pass.
    assert row["traces"] == {"jax": 1, "tensorflow": 3, "torch": None}[BACKEND]
    assert dense["traces"] == {"jax": 1, "tensorflow": 2, "torch": None}[BACKEND]
    # Forward, gradients of two inputs and three weights; kernels 8x8, 8x8 and 8x2.
    assert dense["flops"][0]["flops"] == 2 * 4 * (3 * (64 + 64 + 16) - 64)
    ratio = timed["result"]["ratios"]["SL-SAM block / AdamW"]
    assert ratio["of_means"] > 0 and len(ratio["of_rounds"]) == 2

    cost = run(tmp_path, "cost", "AdamW", "SL-SAM block")
    assert cost["result"]["layers"]["Dense"]["calls"] == 3
    assert set(cost["result"]["total"]) == set(cost_model.Costs._fields)
    prediction = cost["result"]["predictions"]["SL-SAM block"]
    assert prediction["active_share"] == pytest.approx(row["active_share"])

    text, picture = reported(tmp_path, "time", "cost")
    assert text.count("old") == 2  # of memory and scale there is nothing new
    assert text.count(timed["line"]) == text.count(cost["line"]) == 1
    assert f"| SL-SAM block | {row['mean']:.4f} |" in text
    assert f"{ratio['of_means']:.3f} ±" in text.partition("<!-- cost -->")[2]
    assert picture.stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is Linux's")
def test_memory(tmp_path):
    width = 512
    result = run(tmp_path, "memory", "AdamW", more=["--width", str(width)])["result"]
    row = result["methods"]["AdamW"]
    resident = row["resident"]
    assert 0 < resident["built"] <= resident["first_step"]
    # Two kernels with two moments each, and a gradient.
    least = 4 * width**2 * 2 * (1 + 2)
    assert resident["later_steps"] > least
    assert (row["planned"] is not None) == (BACKEND == "jax")
    if BACKEND == "jax":
        assert row["live"] is None
        assert least < row["planned"]["arguments"] < 1.1 * least
    else:
        assert all(least < live < 3 * least for live in row["live"])


def test_the_sam_of_tutorials_takes_the_same_steps():
    x, y = models.data(flags(), 12)
    found = {}
    for name in ("tutorial SAM", "SAM"):
        model = methods.prepare(name, flags())
        model.optimizer.learning_rate = 0.01
        history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        found[name] = history.history["loss"], model.get_weights()
    (losses, weights), (expected_losses, expected) = found.values()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for weight, other in zip(weights, expected):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def test_masks_and_conditions_of_a_step():
    args = flags()
    model = methods.prepare("SL-SAM", args)
    x, y = models.data(args, args.batch)
    # The first turn does not count, nor the first step of each turn.
    num_arms = len(model.trainable_variables)
    turns = np.empty((args.rounds + 1, args.steps + 1, num_arms))
    for step in np.ndindex(turns.shape[:2]):
        step_time.fit(model, x, y, args.batch)
        turns[step] = keras.ops.convert_to_numpy(model.optimizer.active)
    again = masks.of_timed_steps(num_arms, args)
    np.testing.assert_array_equal(again, np.concatenate(turns[1:, 1:]))

    count = probes.conditions(model, x, y)
    assert count is None if BACKEND == "torch" else count > num_arms


def test_costs_by_the_rule():
    def count(name):
        return cost_model.rule(name, active_share=0.2, lowest=0.3)

    assert count("AdamW") == count("S2-SAM") == 3
    assert count("SAM") == count("tutorial SAM") == 6
    assert count("SL-SAM") == pytest.approx(2 * (2 + 0.2))
    assert count("SL+S2") == pytest.approx(2 + 0.2)
    assert count("SL-SAM block") == pytest.approx(1 + 3 * (1 - 0.3) + 2 * 0.2)


def test_the_sam_of_tutorials_draws_noise_again():
    known = cost_model.EVERYTHING._replace(forward_again=0.9)
    costs = [
        cost_model.predict(name, cost_model.UNIT, known)
        for name in ("tutorial SAM", "SAM")
    ]
    assert costs == [6, pytest.approx(5.9)]


def test_what_gradients_share_counts_once():
    total = dict(forward=1.0, to_inputs=2.0, to_weights=9.0, ascent=0.1, update=0.2)
    whole = {"forward": 0.9, "forward_and_gradients": 7.0}
    expected = cost_model.Costs(0.9, 2.0, 4.1, 0.1, 0.2)
    assert cost_model.of_step(total, whole) == expected


def test_the_chain_ends_at_the_lowest_active_arm():
    calls = [cost_model.Call(1.0, 1.0, 1.0, {i: 1.0}, {i: 1.0}) for i in range(4)]
    mask = np.array([[False, True, False, True]])
    found = cost_model.shares(calls, [0, 1, 2, 3], mask)
    assert found == cost_model.Shares(3 / 4, 2 / 4, 2 / 4, 2 / 4)
    assert cost_model.lowest_active(mask) == 1 / 4


def test_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory, "of_method", lambda name, args: {"resident": {"later_steps": 1e6}}
    )
    # Quickly compiled, with two weights a layer and a head.
    monkeypatch.setattr(scale, "MODEL", "dense")
    monkeypatch.setattr(scale, "WIDTH", 8)
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
        assert (result["exponents"][name]["trace"] is None) == (BACKEND == "torch")

    text, _ = reported(tmp_path, "scale")
    assert text.count("old") == 3


def test_the_encoder_of_scale_has_the_depth_asked_for():
    args = flags(model=scale.MODEL, layers=2, width=scale.WIDTH, length=scale.LENGTH)
    # A block has 16 weights; 9 are those of embeddings and of the head.
    assert len(models.make(args).trainable_variables) == 9 + 2 * 16


def test_powers_of_the_depth():
    rows = [
        {
            "layers": depth,
            "times": {
                "SL-SAM": {"first_call": 3 * depth, "trace": depth**2, "compile": None}
            },
        }
        for depth in (6, 12, 24)
    ]
    assert scale.exponents(rows, "SL-SAM") == {
        "first_call": pytest.approx(1),
        "trace": pytest.approx(2),
        "compile": None,
    }


def test_calls_are_recorded_and_can_be_repeated():
    attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1)
    inputs = keras.Input((3, 8))
    x = keras.layers.LayerNormalization()(inputs)
    model = keras.Model(inputs, attention(x, x))
    x = keras.ops.ones((2, 3, 8))
    calls = layer_calls.record(model, x)
    kinds = ["LayerNormalization", *["EinsumDense"] * 3]
    assert [call.kind for call in calls] == [
        *kinds,
        layer_calls.ATTENTION,
        "EinsumDense",
    ]
    assert [call.num_inputs for call in calls] == [1, 1, 1, 1, 3, 1]
    assert calls[1].signature == calls[2].signature != calls[5].signature
    shapes = [tuple(call.run(call.arguments()).shape) for call in calls]
    assert shapes == [(2, 3, 8), *[(2, 3, 2, 4)] * 4, (2, 3, 8)]
    assert sum(len(call.weights) for call in calls) == len(model.trainable_variables)
