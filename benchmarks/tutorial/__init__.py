"""Dense SAM as tutorials write it: a custom `train_step`, one file per backend.

It lacks what `keras_slsam` takes care of. Sample weights and loss scaling are ignored.
On TensorFlow and PyTorch the two passes have different dropout masks, the statistics of
BatchNorm move twice per step, and the weights stay perturbed if something raises.
"""

import functools
import importlib

import keras

RHO = 0.05


def with_sam(model):
    """Gives a model the `train_step` that a tutorial would write, in place."""
    backend = keras.config.backend()
    module = importlib.import_module(f"benchmarks.tutorial.{backend}")
    model.train_step = functools.partial(module.train_step, model, RHO)
    return model
