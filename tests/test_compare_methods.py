"""The comparison of the methods takes up where it was stopped, and reads its runs."""

import csv
import pathlib
import sys

import keras
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import compare_methods
import comparison

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="once, on the fastest backend"
)
FLAGS = "--model=cnn --limit=96 --epochs=2 --parts=1 --label-noise=0.2"


def compare(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *FLAGS.split(), *flags])
    compare_methods.main()


def rows_of(folder):
    with open(folder / "results.csv") as stream:
        return list(csv.DictReader(stream))


def test_compare_methods(tmp_path, monkeypatch):
    methods = "--methods", "adamw-ema", "sparse-adamw"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    compare(monkeypatch, *methods, "--robust", f"--folder={whole}")

    scores_of, calls = compare_methods.scores_of, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scores_of(*args)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(compare_methods, "scores_of", stop)
        compare(context, *methods, "--robust", f"--folder={stopped}")
    compare(monkeypatch, *methods, "--robust", f"--folder={stopped}")
    rows = rows_of(whole)
    assert [row["method"] for row in rows] == ["adamw-ema"] * 2 + ["sparse-adamw"] * 2
    for row, again in zip(rows, rows_of(stopped)):
        assert {**again, "seconds": row["seconds"]} == row
        assert 0 <= float(row["memorised"]) <= 1
    for name in ("int8", "int4", "noise 0.05", "noise 0.3", "noisy images"):
        assert 0 <= float(rows[-1][name]) <= 1 and not rows[0][name]
    page = (whole / "results.md").read_text()
    assert "| best by validation " in page and "| at equal training loss " in page
    assert "<svg" in (whole / "arms.svg").read_text()

    without = f"--folder={tmp_path / 'without'}"
    compare(monkeypatch, "--methods", "adamw", without)
    with pytest.raises(SystemExit, match="without --robust"):
        compare(monkeypatch, "--methods", "adamw", without, "--robust")
    with pytest.raises(SystemExit, match="another experiment"):
        compare(monkeypatch, "--methods", "adamw", without, "--batch-size=16")


def test_the_training_loss_is_the_crossentropy_without_smoothing_and_dropout():
    model = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(4)])
    smoothed = compare_methods.SmoothedCrossentropy(4, 0.5)
    model.compile(loss=smoothed, metrics=["accuracy"])
    x, y = np.ones((4, 8), "float32"), np.arange(4)
    model.fit(x, y, verbose=0)
    bias = np.array([2.0, 1.0, 0.0, -1.0])
    model.layers[1].set_weights([np.zeros((8, 4)), bias])
    wrong = np.array([True, True, True, False])
    found = compare_methods.scores_of(model, (x, y), (x, y), (x, y), wrong)
    expected = np.log(np.exp(bias).sum()) - bias.mean()
    assert found["training_loss"] == pytest.approx(expected, 1e-5)
    assert found["memorised"] == pytest.approx(1 / 3) and found["accuracy"] == 0.25


def test_accuracy_at_a_training_loss():
    losses, scores = (2.0, 1.0, 1.5, 0.5), (0.2, 0.6, 0.4, 0.7)
    points = [{"training_loss": x, "accuracy": y} for x, y in zip(losses, scores)]
    found = [comparison.at_loss(points, loss) for loss in (2.5, 1.5, 1.0, 0.75)]
    # It first falls to 1.5 half way between the first two evaluations.
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.625])
    assert np.isnan(comparison.at_loss(points, 0.25))
    points[0]["training_loss"] = np.nan
    assert comparison.at_loss(points, 1.0) == 0.6
