"""The examples of several devices and processes train on each backend."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import keras
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
ON_TORCH = keras.config.backend() == "torch"
# Without it, the script starts both processes.
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"


def found(script, pattern, *launcher):
    process = subprocess.Popen(
        [sys.executable, *launcher, EXAMPLES / script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of its processes can be ended
    )
    try:
        output, _ = process.communicate(timeout=400)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])
        raise
    assert process.returncode == 0, output
    return re.findall(pattern, output)


@pytest.mark.skipif(ON_TORCH, reason="has processes only")
def test_two_devices():
    pattern = r"2 devices: test accuracy (0\.\d+)"
    (accuracy,) = found("several_devices.py", pattern)
    assert float(accuracy) > 0.8


def test_two_processes_have_the_same_weights():
    pattern = (
        r"process \d of 2: test accuracy (0\.\d+), norm of the weights (\d+\.\d{9})"
    )
    launcher = TORCHRUN if ON_TORCH else ()
    one, other = found("several_processes.py", pattern, *launcher)
    assert one == other and float(one[0]) > 0.8
