"""A killed and resumed run ends with the same weights as an uninterrupted one."""

import pathlib
import sys

import keras
import processes
import pytest

if keras.config.backend() != "torch":
    # test_fit.py and the tests of several processes resume on each backend.
    pytest.skip("starts many processes", allow_module_level=True)
CHILD = pathlib.Path(__file__).parent / "kill_child.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_a_killed_run_ends_with_the_same_weights():
    flags = "--kills 1 --methods SLSAM --callbacks BackupAndRestore".split()
    (output,) = processes.run(1, CHILD, *flags, timeout=400)
    assert "SLSAM BackupAndRestore 1 kills, 0 arrays differ" in output
