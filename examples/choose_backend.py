"""Selects an installed backend and its settings. Import this before Keras."""

import importlib.util
import os

if "KERAS_BACKEND" not in os.environ:
    names = ("jax", "tensorflow", "torch")
    installed = [name for name in names if importlib.util.find_spec(name)]
    os.environ["KERAS_BACKEND"] = installed[0]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # faster on a busy machine
