"""A killed and resumed run ends with the same weights as an uninterrupted one."""

import pathlib
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).parent / "kill_child.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_a_killed_run_ends_with_the_same_weights():
    flags = "--kills 1 --methods SLSAM --callbacks BackupAndRestore".split()
    done = subprocess.run(
        [sys.executable, CHILD, *flags], capture_output=True, text=True, check=True
    )
    assert "SLSAM BackupAndRestore 1 kills, 0 arrays differ" in done.stdout
