"""The methods to compare, each as a compiled model."""

import argparse

import keras

import keras_slsam
from benchmarks import models
from benchmarks import tutorial

# From the flag `--jit-compile` to the argument of `compile`.
JIT_COMPILE = {"auto": "auto", "yes": True, "no": False}
# The class of a dense optimizer, or arguments of SL-SAM.
METHODS = {
    "AdamW": None,
    "tutorial SAM": None,
    "SAM": keras_slsam.SAM,
    "S2-SAM": keras_slsam.S2SAM,
    "SL-SAM": {"arms": "variable"},
    "SL+S2": {"arms": "variable", "single_step": True},
    "SL-SAM block": {"arms": "block"},
    "SL+S2 block": {"arms": "block", "single_step": True},
}


def prepare(name: str, args: argparse.Namespace) -> keras.Model:
    """Returns a new model, compiled for training with the method `name`."""
    model = models.make(args)
    optimizer = keras.optimizers.AdamW(1e-5)
    method = METHODS[name]
    if isinstance(method, dict):
        # With uniform draws, every step costs the same on average.
        method = {"sampler": "uniform", "seed": args.seed, **method}
        optimizer = keras_slsam.SLSAM(
            optimizer, active_fraction=args.active_fraction, **method
        )
    elif method:
        optimizer = method(optimizer)
    if name == "tutorial SAM":
        tutorial.use_sam(model)
    elif method:
        model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=JIT_COMPILE[args.jit_compile],
    )
    return model
