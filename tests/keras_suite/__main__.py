"""Runs Keras' own tests with our step.

KERAS_BACKEND=jax python tests/keras_suite --optimizer=sam
KERAS_BACKEND=jax python tests/keras_suite --optimizer=slsam keras/src/optimizers
KERAS_BACKEND=jax python tests/keras_suite --optimizer=both --variants=2
KERAS_BACKEND=jax python tests/keras_suite --optimizer=none -k test_fit

All other arguments go to pytest. Paths are relative to Keras' installation.
"""

import importlib.util
import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent

if __name__ == "__main__":
    os.chdir(pathlib.Path(importlib.util.find_spec("keras").origin).parents[1])
    own = [f"--config-file={HERE / 'pytest.ini'}", "--rootdir=.", "-p", "plugin"]
    sys.exit(pytest.main([*own, *sys.argv[1:]]))
