"""The examples of several devices and processes train on each backend."""

import pathlib
import re
import subprocess
import sys

import keras
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def accuracies(script, pattern):
    command = [sys.executable, EXAMPLES / script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(rf"{pattern}: test accuracy (0\.\d+)", done.stdout)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="has processes only")
def test_two_devices():
    (accuracy,) = accuracies("several_devices.py", "2 devices")
    assert float(accuracy) > 0.8


def test_two_processes_have_the_same_weights():
    one, other = accuracies("several_processes.py", r"process \d of 2")
    assert one == other and float(one) > 0.8
