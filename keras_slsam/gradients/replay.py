"""Random numbers outside of Keras and the framework, the same in both passes.

A layer that runs in Python may draw from the global generators of Python and NumPy, or
from one that it keeps as an attribute.
"""

import functools
import random

import keras
import numpy as np


class Replay:
    """A context in which generators give the same random numbers each time.

    Where it ends with an exception they are as they were before the first time. A
    generator that did not move is left alone: another thread may draw from it.

    Args:
        model: `keras.Model`.
        more: List of pairs of functions, which get and set the state of a generator.
    """

    def __init__(self, model, more=()):
        generators = [
            (random.getstate, random.setstate),
            (np.random.get_state, np.random.set_state),
            *more,
            *_owned(model),
        ]
        self._before = [(get, set, get()) for get, set in generators]

    def __enter__(self):
        self.rewind()
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self.rewind()

    def rewind(self):
        """Sets all generators to where they were at the beginning."""
        for get, set, state in self._before:
            if not _same(state, get()):
                set(state)


def _owned(model):
    """The generators that layers, and modules of PyTorch in them, have as attributes.

    Yields:
        Pairs of functions, which get and set the state of a generator.
    """
    # Keras has no public name for the layers at any depth.
    holders = model._flatten_layers()
    wrappers = [x for x in holders if isinstance(x, keras.layers.TorchModuleWrapper)]
    for wrapper in wrappers:
        holders += wrapper.module.modules()
    found = {}
    for holder in holders:
        if not type(holder).__module__.startswith(("keras.", "keras_hub.")):
            for x in vars(holder).values():
                for part in x if isinstance(x, (list, tuple)) else [x]:
                    found[id(part)] = part
    for x in found.values():
        if isinstance(x, np.random.Generator):
            bits = x.bit_generator
            yield (
                functools.partial(getattr, bits, "state"),
                functools.partial(setattr, bits, "state"),
            )
        elif isinstance(x, random.Random):
            yield x.getstate, x.setstate
        elif type(x).__name__ in ("RandomState", "Generator"):  # NumPy's, PyTorch's
            yield x.get_state, x.set_state


def _same(state, other):
    if isinstance(state, dict):
        return all(_same(value, other[key]) for key, value in state.items())
    if hasattr(state, "shape"):
        return np.array_equal(state, other)
    if isinstance(state, tuple) and any(hasattr(x, "shape") for x in state):
        return all(map(_same, state, other))
    return state == other
