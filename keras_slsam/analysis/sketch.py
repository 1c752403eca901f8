"""A count sketch: many weights in few dimensions, with nearly the same inner products.

Each weight is added, with a random sign, to one random entry of the sketch. The sketch
is linear. The inner product of two sketches of `m` entries is that of the weights, with
a random error of standard deviation at most `sqrt(2 / m) * ||a|| * ||b||`.

Reference:
    Charikar et al., "Finding frequent items in data streams", ICALP 2002.
"""

import numpy as np


class Sketch:
    """A random linear map from the weights of a model to a vector.

    Args:
        dimensions: int, the entries of the vector.
        seed: int. The same seed gives the same map.
    """

    def __init__(self, dimensions, seed):
        self.dimensions, self._seed = dimensions, seed

    def __call__(self, arrays):
        """Returns the sketch of a list of arrays, a float64 array.

        Args:
            arrays: List of arrays, in the same order and shapes in each call.
        """
        # Each call draws the same numbers again, because storing them takes memory.
        rng = np.random.default_rng(self._seed)
        total = np.zeros(self.dimensions)
        for array in arrays:
            # The lowest bit is the sign.
            places = rng.integers(0, 2 * self.dimensions, array.size)
            signed = np.where(places % 2, -1.0, 1.0) * np.ravel(array)
            total += np.bincount(places // 2, signed, self.dimensions)
        return total
