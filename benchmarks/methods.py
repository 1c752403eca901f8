"""The methods to compare, each as a compiled model."""

import argparse
import typing

import keras

import keras_slsam
from benchmarks import models
from benchmarks import tutorial

# From the flag `--jit-compile` to the argument of `compile`.
JIT_COMPILE = {"auto": "auto", "yes": True, "no": False}


class Sparse(typing.NamedTuple):
    """How variables are grouped into arms, and whether a step has a single pass."""

    arms: str
    single_step: bool


METHODS = {
    "AdamW": None,
    "tutorial SAM": None,
    "SAM": keras_slsam.SAM,
    "S2-SAM": keras_slsam.S2SAM,
    "SL-SAM": Sparse("variable", False),
    "SL+S2": Sparse("variable", True),
    "SL-SAM block": Sparse("block", False),
    "SL+S2 block": Sparse("block", True),
}


def prepare(name: str, args: argparse.Namespace) -> keras.Model:
    """Returns a new model, compiled for training with the method `name`."""
    model = models.make(args)
    optimizer = keras.optimizers.AdamW(1e-5)
    method = METHODS[name]
    if name == "tutorial SAM":
        model = tutorial.with_sam(model)
    elif isinstance(method, Sparse):
        # With uniform draws, every step costs the same on average.
        optimizer = keras_slsam.SLSAM(
            optimizer,
            active_fraction=args.active_fraction,
            sampler="uniform",
            seed=args.seed,
            **method._asdict(),
        )
    elif method:
        optimizer = method(optimizer)
    if method:
        model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=JIT_COMPILE[args.jit_compile],
    )
    return model
