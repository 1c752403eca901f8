"""Refuses state that neither a compiled step nor a file would have."""

import contextlib

import keras
from keras import ops


@contextlib.contextmanager
def refused(holder, way_out):
    """Context in which an ascent or sampler must not get tensors as attributes.

    Args:
        holder: `Ascent` or `Sampler`.
        way_out: String, how to create a variable.

    Raises:
        ValueError: at the end, if it did.
    """
    before = {id(x): x for _, x in _tensors(holder)}
    yield
    for name, x in _tensors(holder):
        if id(x) not in before:
            raise ValueError(
                f"`{name}` of `{type(holder).__name__}` is a tensor, which the next "
                f"compiled step or a file would not have. For state, {way_out}, and "
                "change it with `variable.assign`. A constant may be a NumPy array. "
                f"Received: {x!r}"
            )


def _tensors(holder):
    """Returns pairs of the name of an attribute and a tensor in it."""
    return [(name, x) for name, value in vars(holder).items() for x in _inside(value)]


def _inside(value):
    """Yields the tensors in a value, at any depth."""
    # On PyTorch this runs in each step, where `keras.tree` takes 20 times as long.
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _inside(part)
    elif isinstance(value, dict):
        yield from _inside(list(value.values()))
    # On TensorFlow a variable is a tensor.
    elif ops.is_tensor(value) and not isinstance(value, keras.Variable):
        yield value
