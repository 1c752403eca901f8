"""The quickstart runs on each backend and prints its table.

On JAX the tests' session runs it by the README's command.
"""

import pathlib
import sys

import keras
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import quickstart


@pytest.mark.skipif(keras.config.backend() == "jax", reason="run in noxfile.py")
def test_quickstart(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--limit=240"])
    quickstart.main()
    *_, adamw, slsam, sam = capsys.readouterr().out.splitlines()
    assert [adamw.split()[0], slsam.split()[0], sam.split()[0]] == [
        "AdamW",
        "SL-SAM",
        "SAM",
    ]
    accuracies = [float(row.split()[2]) for row in (adamw, slsam)]
    assert all(0 < accuracy <= 1 for accuracy in accuracies)
