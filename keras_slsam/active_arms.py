"""The active arms of a step, and operations on their variables only."""

import numpy as np
from keras import ops

from keras_slsam.gradients import backend


class ActiveArms:
    """The arms that are active in a step.

    Methods take lists with one entry per variable. Entries of inactive arms are not
    read, and may be `None`.

    Args:
        members: List of lists of int, the variables of each arm.
        active: List of bools or scalar boolean tensors, one per arm.
        dtype: String, float dtype of the norms.

    Attributes:
        members: As given.
        active: As given.
        dtype: As given.
    """

    def __init__(self, members, active, dtype):
        self.members = members
        self.active = active
        self.dtype = dtype

    @property
    def mask(self):
        """The mask, a boolean tensor of shape `(num_arms,)`."""
        return ops.convert_to_tensor(self.active, dtype="bool")

    def fingerprint(self):
        """Returns a float scalar that differs between masks, but for rare pairs."""
        # Integers below 2 ** 24, whose sums are the same in any order in float64.
        numbers = np.random.default_rng(0).integers(1, 2**24, len(self.members))
        mask = ops.cast(self.mask, "float64")
        return ops.sum(mask * ops.convert_to_tensor(numbers, mask.dtype))

    def where(self, condition):
        """Returns these arms if `condition` holds, else no active arms.

        Args:
            condition: bool or scalar boolean tensor.
        """
        active = [backend.both(on, condition) for on in self.active]
        return ActiveArms(self.members, active, self.dtype)

    def map(self, function, values):
        """Applies a function to the values of the active arms.

        Args:
            function: Function of the index of a variable and its value.
            values: List of tensors, one per variable.

        Returns:
            List of tensors like `values`, unchanged where inactive.
        """
        result = list(values)
        for on, indices in zip(self.active, self.members):
            found = backend.cond(
                on,
                lambda i=indices: [function(j, values[j]) for j in i],
                lambda i=indices: [values[j] for j in i],
            )
            for i, value in zip(indices, found):
                result[i] = value
        return result

    def squared_norms(self, directions, weights=None):
        """Computes the squared norm of the direction of each arm.

        Args:
            directions: List of tensors, one per variable.
            weights: List of tensors, or `None`. If given, the norms are those of
                `|w| * g` (ASAM).

        Returns:
            List of float scalars, one per arm, 0 where inactive.
        """

        def of_arm(indices):
            total = ops.zeros((), self.dtype)
            for i in indices:
                scaled = directions[i]
                if weights is not None:
                    scaled = ops.multiply(weights[i], scaled)
                total = total + ops.cast(backend.squared_sum(scaled), self.dtype)
            return total

        return [
            backend.cond(
                on,
                lambda i=indices: of_arm(i),
                lambda: ops.zeros((), self.dtype),
            )
            for on, indices in zip(self.active, self.members)
        ]

    def when(self, update, arms=None):
        """Runs `update(arm)`, which assigns to Keras variables, for each active arm.

        Args:
            update: Function of the index of an arm.
            arms: Iterable of int, the arms to consider. All by default.
        """
        for arm in range(len(self.members)) if arms is None else arms:
            backend.when(self.active[arm], lambda arm=arm: update(arm))
