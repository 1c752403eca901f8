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
    """
    # In integers: 0.1 * 30 is more than 3 in floating point.
    share = fractions.Fraction(fraction).limit_denominator(1000)

    def of_tensor(tensor):
        rows = ops.shape(tensor)[0]
        return tensor[: -(-rows * share.numerator // share.denominator)]

    return keras.tree.map_structure(lambda t: t if t is None else of_tensor(t), data)
