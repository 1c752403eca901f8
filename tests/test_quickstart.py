"""The quickstart and the digits run and print their table.

On JAX, noxfile.py runs the quickstart with the README's command.
"""

import pathlib
import sys

import keras
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import digits
import quickstart


@pytest.mark.skipif(keras.config.backend() != "torch", reason="takes long to compile")
def test_quickstart(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", "--limit=80", "--methods", "sam", "slsam"]
    )
    quickstart.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("turn ") for line in lines) == 2  # one batch each
    rows = [line.split() for line in lines[-2:]]
    assert [row[0] for row in rows] == ["SAM", "SL-SAM"]
    assert [float(row[1]) for row in rows] == [5e-5, 2e-4]
    assert all(0 < float(row[2]) <= 1 for row in rows)
    assert float(rows[0][-1]) == 1.0
    assert "share of steps" in (tmp_path / "quickstart.svg").read_text()


def test_digits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs=4"])
    monkeypatch.setattr(digits, "WIDTH", 64)
    monkeypatch.setattr(digits, "DEPTH", 1)
    digits.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["AdamW", "SAM", "SL-SAM"]
    assert all(0.5 < float(row[1]) <= 1 for row in rows)
    assert float(rows[1][-1]) == 1.0
