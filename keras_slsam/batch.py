"""The first rows of a batch, for an ascent on part of it."""

import fractions

import keras
from keras import ops


def first_rows(data, fraction):
    """Returns the first `ceil(fraction * rows)` rows of a batch.

    Args:
        data: Structure of tensors of shape `(rows, ...)`, and of `None`s.
        fraction: Float in (0, 1].

    Returns:
        Structure like `data`.

    Raises:
        ValueError: if the tensors do not have the same number of rows, or cannot be
            sliced.
    """
    tensors = [t for t in keras.tree.flatten(data) if t is not None]
    shapes = [tuple(getattr(t, "shape", ())) for t in tensors]
    rows = {shape[0] for shape in shapes if shape} - {None}
    if len(rows) > 1 or () in shapes:
        raise ValueError(_RULE.format(fraction, f"tensors of shapes {shapes}"))
    for tensor in tensors:
        if not hasattr(tensor, "__getitem__"):
            raise ValueError(_RULE.format(fraction, type(tensor).__name__))
    # In integers: 0.1 * 30 is more than 3 in floating point.
    share = fractions.Fraction(fraction).limit_denominator(10**6)

    def of_tensor(tensor):
        if tensor is None:
            return None
        count = ops.shape(tensor)[0]
        if not isinstance(count, int):
            count = ops.cast(count, "int64")
        return tensor[: -(-count * share.numerator // share.denominator)]

    return keras.tree.map_structure(of_tensor, data)


_RULE = (
    "With `ascent_fraction` below 1 all inputs, targets and sample weights must have "
    "one row per sample, and be tensors that can be sliced. Received: "
    "ascent_fraction={}, and {}. Use `ascent_fraction=1`."
)
