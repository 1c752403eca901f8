"""The methods that are compared, each as a compiled model."""

import argparse
import typing

import keras

import keras_slsam
from benchmarks import models
from benchmarks import tutorial


class Method(typing.NamedTuple):
    """What tells a method from the others.

    Attributes:
        passes: Forward and backward passes a step.
        arms: What an arm is, or None where all weights move in every step.
    """

    passes: int
    arms: str | None = None


METHODS = {
    "AdamW": Method(1),
    "tutorial SAM": Method(2),
    "SAM": Method(2),
    "S2-SAM": Method(1),
    "SL-SAM": Method(2, "variable"),
    "SL+S2": Method(1, "variable"),
    "SL-SAM block": Method(2, "block"),
    "SL+S2 block": Method(1, "block"),
}


def chosen(names: list[str] | None) -> list[str]:
    """The methods that a user named, all by default.

    Raises:
        SystemExit: if there is none of a name.
    """
    for name in names or ():
        if name not in METHODS:
            raise SystemExit(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    return names or list(METHODS)


def prepare(name: str, args: argparse.Namespace) -> keras.Model:
    """A model of its own, compiled to be trained with the method `name`."""
    model = models.make(args)
    optimizer = keras.optimizers.AdamW(1e-5)
    if name == "tutorial SAM":
        model = tutorial.with_sam(model)
    elif name != "AdamW":
        optimizer = _sharpness_aware_optimizer(name, optimizer, args)
        model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile={"auto": "auto", "yes": True, "no": False}[args.jit_compile],
    )
    return model


def _sharpness_aware_optimizer(name, base, args):
    if name == "SAM":
        return keras_slsam.SAM(base)
    if name == "S2-SAM":
        return keras_slsam.S2SAM(base)
    # A uniform draw, so that every step costs the same on average.
    return keras_slsam.SLSAM(
        base,
        active_fraction=args.active_fraction,
        sampler="uniform",
        arms=METHODS[name].arms,
        single_step=METHODS[name].passes == 1,
        seed=args.seed,
    )
