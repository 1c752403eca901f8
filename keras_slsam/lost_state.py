"""Refuses state that neither a compiled step nor a file would have."""

import contextlib

import keras
from keras import ops

from keras_slsam.samplers import Sampler


@contextlib.contextmanager
def refused(*holders):
    """Context in which ascents and samplers must not get tensors as attributes.

    Raises:
        ValueError: at the end, if one did.
    """
    before = {id(x): x for holder in holders for _, _, x in _tensors(holder)}
    yield
    for holder in holders:
        for owner, name, x in _tensors(holder):
            if id(x) not in before:
                raise ValueError(
                    f"`{name}` of `{type(owner).__name__}` is a tensor, which the next "
                    "compiled step and a file would not have. Create a "
                    "`keras.Variable` in `build`, and change it with "
                    f"`variable.assign`. Received: {x!r}"
                )


def _tensors(holder):
    """Yields triples of an ascent or sampler, the name of an attribute, a tensor."""
    for name, value in vars(holder).items():
        for part in keras.tree.flatten(value):
            # On TensorFlow a variable is a tensor.
            if ops.is_tensor(part) and not isinstance(part, keras.Variable):
                yield holder, name, part
            elif isinstance(part, Sampler):
                yield from _tensors(part)
