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
    that did not move. It also skips global generators that no layer draws from, because
    a thread that loads data may draw from them.

    Args:
        model: `keras.Model`.
        unseeded: List of pairs of functions, which get and set the state of the
            generators of Keras' layers without a seed, and of PyTorch's modules.
        by_data: bool, whether to include `unseeded` also if no layer draws, because the
            caller iterates over data that may.
    """

    def __init__(self, model, unseeded=(), by_data=False):
        # Keras has no public name for the layers at any depth.
        layers = model._flatten_layers()
        holders = _of_users([*layers, *keras.tree.flatten(model.loss)])
        generators = list(_owned(holders))
        if by_data or holders or any(map(_draws, layers)):
            generators += unseeded
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


def _draws(layer):
    """Returns whether a layer of Keras may draw random numbers."""
    return isinstance(layer, keras.layers.TorchModuleWrapper) or any(
        isinstance(x, keras.random.SeedGenerator) for x in vars(layer).values()
    )


def _of_users(holders):
    """Returns the custom layers and losses, and custom PyTorch modules in wrappers."""
    holders = list(holders)
    wrappers = [x for x in holders if isinstance(x, keras.layers.TorchModuleWrapper)]
    for wrapper in wrappers:
        holders += wrapper.module.modules()
    own = ("keras.", "keras_hub.", "torch.nn")
    return [
        holder
        for holder in holders
        if isinstance(holder, keras.layers.Lambda)  # it calls a function of a user
        or not getattr(holder, "__module__", "keras.").startswith(own)
    ]


def _owned(holders):
    """Yields functions that get and set the state of generators in attributes."""
    found = {}
    for holder in holders:
        for x in getattr(holder, "__dict__", {}).values():
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
