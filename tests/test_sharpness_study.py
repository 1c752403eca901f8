"""The study of sharpness measures each method, and takes up where it was stopped."""

import csv
import json
import pathlib
import sys

import keras
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import sharpness_study

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="once, on the fastest backend"
)
FLAGS = "--limit=64 --epochs=1 --rows=16 --worst-steps=1 --average-samples=2"


def test_sharpness_study(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    flags = [*FLAGS.split(), "--methods", "AdamW", "SL-SAM", f"--folder={folder}"]
    monkeypatch.setattr(sys, "argv", ["sharpness_study.py", *flags])

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setitem(sharpness_study.MEASURES, "top eigenvalue", (stop, ""))
        sharpness_study.main()
    (file,) = folder.glob("*.json")
    before = json.loads(file.read_text())
    assert "worst case" in before and "top eigenvalue" not in before

    capsys.readouterr()
    sharpness_study.main()
    assert capsys.readouterr().out.count("training") == 1  # of the second method
    after = json.loads(file.read_text())
    assert {name: after[name] for name in before if name != "seconds"} == {
        name: value for name, value in before.items() if name != "seconds"
    }
    assert after["top eigenvalue"] > 0
    with open(folder / "results.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["AdamW", "SL-SAM"]
    assert float(rows[0]["top eigenvalue"]) == after["top eigenvalue"]
    assert "<svg" in (folder / "results.svg").read_text()
    monkeypatch.setattr(sys, "argv", ["sharpness_study.py", *flags, "--rho=9"])
    with pytest.raises(SystemExit, match="other settings"):
        sharpness_study.main()
