"""Dense SAM as tutorials write it: a `train_step` of the user's, one file a backend.

It lacks what `keras_slsam` takes care of: sample weights and loss scaling are not heard
of; on TensorFlow and PyTorch the two passes have different dropout masks, statistics of
BatchNorm move twice a step, and the weights are left perturbed where something raises.
"""

import functools
import importlib

import keras

RHO = 0.05


def with_sam(model):
    """Gives a model, in place, the `train_step` that a tutorial would write for it."""
    backend = keras.config.backend()
    module = importlib.import_module(f"benchmarks.tutorial.{backend}")
    model.train_step = functools.partial(module.train_step, model, RHO)
    return model
