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
    """Yields pairs of the name of an attribute and a tensor in it."""
    for name, value in vars(holder).items():
        for part in keras.tree.flatten(value):
            # On TensorFlow a variable is a tensor.
            if ops.is_tensor(part) and not isinstance(part, keras.Variable):
                yield name, part
