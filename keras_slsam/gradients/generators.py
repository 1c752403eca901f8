"""Rewinds random generators outside of Keras, so both passes draw the same numbers.

A layer that runs in Python may draw from the global generators of Python and NumPy, or
from a generator that it keeps as an attribute.
"""

import functools
import random

import keras
import numpy as np


class Generators:
    """The generators that a model's layers draw from, with their current states.

    As a context, it rewinds them if an exception is raised. Rewinding skips generators
    that did not move. It also skips the global generators of Python and NumPy if all
    layers are Keras' own, because a thread that loads data may draw from them.

    Args:
        model: `keras.Model`.
        more: List of pairs of functions, which get and set the state of a generator.
    """

    def __init__(self, model, more=()):
        holders = _of_users(model)
        generators = [*more, *_owned(holders)]
        if holders:
            generators += [
                (random.getstate, random.setstate),
                (np.random.get_state, np.random.set_state),
            ]
        self._before = [(get, set, get()) for get, set in generators]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self.rewind()

    def rewind(self):
        """Sets all generators back to their initial states."""
        for get, set, state in self._before:
            if not _same(state, get()):
                set(state)


def _of_users(model):
    """Returns the custom layers, and the custom PyTorch modules in wrappers."""
    # Keras has no public name for the layers at any depth.
    holders = model._flatten_layers()
    wrappers = [x for x in holders if isinstance(x, keras.layers.TorchModuleWrapper)]
    for wrapper in wrappers:
        holders += wrapper.module.modules()
    own = ("keras.", "keras_hub.", "torch.nn")
    return [
        holder
        for holder in holders
        if isinstance(holder, keras.layers.Lambda)  # it calls a function of a user
        or not type(holder).__module__.startswith(own)
    ]


def _owned(holders):
    """Yields functions that get and set the state of generators in attributes."""
    found = {}
    for holder in holders:
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
        elif isinstance(x, np.random.RandomState) or (
            type(x).__module__.startswith("torch") and type(x).__name__ == "Generator"
        ):
            yield x.get_state, x.set_state


def _same(state, other):
    if isinstance(state, dict):
        return all(_same(value, other[key]) for key, value in state.items())
    if hasattr(state, "shape"):
        return np.array_equal(state, other)
    if isinstance(state, tuple) and any(hasattr(x, "shape") for x in state):
        return all(map(_same, state, other))
    return state == other
