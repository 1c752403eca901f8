"""A run that is killed and resumed ends where one that was not killed does."""

import pathlib
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).parent / "kill_child.py"


@pytest.mark.skipif(sys.platform != "linux", reason="its processes are forked")
def test_a_run_that_was_killed_ends_in_the_same_weights():
    flags = "--kills 2 --methods SLSAM --callbacks BackupAndRestore".split()
    done = subprocess.run(
        [sys.executable, CHILD, *flags], capture_output=True, text=True, check=True
    )
    assert "SLSAM BackupAndRestore 2 kills, 0 arrays differ" in done.stdout
