"""Random numbers that are the same on every backend: Threefry 2x32 in `keras.ops`.

`keras.random` gives different numbers on each backend. Threefry is a counter-based
generator: a pure function of a key and a counter, made of additions, rotations and
exclusive ors of 32-bit integers. So the same seed draws the same numbers on JAX,
TensorFlow and PyTorch.

Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
(Threefry-2x32, 20 rounds).
"""

import numbers
import random

from keras import ops

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def make_seed(seed, owner):
    """Returns the initial seed: `seed`, or a fresh one if it is `None`.

    Args:
        seed: int or `None`. Fresh seeds come from Python's `random`, as in Keras'
            layers, so `keras.utils.set_random_seed` fixes them.
        owner: String, the name of the caller, for the message.

    Returns:
        int in the range of a signed 32-bit integer.

    Raises:
        ValueError: if `seed` is neither an int nor `None`.
    """
    if seed is None:
        seed = random.randint(1, 10**9)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise ValueError(
            f"Argument `seed` of `{owner}` must be an int or None (a fresh seed). "
            f"Received: seed={seed!r}"
        )
    return (int(seed) + 2**31) % 2**32 - 2**31


def draw(state, size):
    """Draws uniform numbers in [0, 1), different in each call.

    Args:
        state: `keras.Variable`, int32 of shape `(2,)`: the seed, and the number of this
            draw, which grows by 1.
        size: int, how many numbers to draw.

    Returns:
        float32 tensor of shape `(size,)`, see `uniform`.
    """
    seed, number = state[0], state[1]
    unit = uniform(seed, number, size)
    state.assign(ops.stack([seed, number + 1]))
    return unit


def uniform(seed, draw, size):
    """Returns uniform numbers in [0, 1) for one draw.

    Args:
        seed: int32 scalar tensor, the key.
        draw: int32 scalar tensor, the number of this draw. Each draw gives different
            numbers.
        size: int, how many numbers to draw.

    Returns:
        float32 tensor of shape `(size,)`. Near 0 the numbers have the full resolution
        of float32, so `uniform(...) < p` holds with probability `p` even for a `p` of
        1e-8.
    """
    index = ops.arange(size, dtype="int32")
    high, low = _threefry((seed, ops.zeros_like(seed)), (draw, index))
    # Halves of 16 bits are exact in float32, and so are products with 2**-k.
    unit = _half(high, 16) * 2.0**-16 + (
        _half(high, 0) * 2.0**-32
        + (_half(low, 16) * 2.0**-48 + _half(low, 0) * 2.0**-64)
    )
    return ops.minimum(unit, 1.0 - 2.0**-24)


def _threefry(key, counter):
    schedule = (*key, ops.bitwise_xor(ops.bitwise_xor(*key), _PARITY))
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = ops.bitwise_xor(x0, _rotate(x1, distance))
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + (block + 1)
    return x0, x1


def _rotate(x, distance):
    # The right shift of a signed integer copies its sign: mask it off.
    wrapped = ops.bitwise_and(ops.right_shift(x, 32 - distance), (1 << distance) - 1)
    return ops.bitwise_or(ops.left_shift(x, distance), wrapped)


def _half(word, shift):
    return ops.cast(ops.bitwise_and(ops.right_shift(word, shift), 0xFFFF), "float32")
