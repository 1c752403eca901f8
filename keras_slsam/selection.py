"""Selects the active arms: a sampler draws them, and learns from their gradients."""

import numpy as np
from keras import ops

from keras_slsam import atomic
from keras_slsam.active_arms import ActiveArms
from keras_slsam.gradients import backend
from keras_slsam.samplers.sampler import draw_mask
from keras_slsam.samplers.sampler import learn


class Selection:
    """Draws the active arms of each step, and lets the sampler learn.

    Args:
        sampler: `samplers.Sampler`, built.
        arm_of: List of int, the arm of each variable.
        members: List of lists of int, the variables of each arm.
        all_active: bool, whether all arms are active in every step.
        always_active: List of int, arms that are active in every step. The sampler does
            not know them.
        dtype: String, float dtype of the norms.
        owner: `keras.optimizers.Optimizer`, which creates and holds `active` and
            `norms`. The sampler creates its own variables.

    Attributes:
        arm_of: As given.
        members: As given.
        always_active: As given.
        active: `keras.Variable` of shape `(num_arms,)`, the mask of the last step.
        norms: `keras.Variable` of shape `(num_arms,)`, the gradient norms of the last
            step.
    """

    def __init__(
        self, sampler, arm_of, members, all_active, always_active, dtype, owner
    ):
        self.arm_of = arm_of
        self.members = members
        self._sampler = sampler
        self._all_active = all_active
        self.always_active = always_active
        # Where the sampler's arms are among all, and the other way round. An arm that
        # is always active has the place after those of the sampler.
        self._drawn = [i for i in range(len(members)) if i not in always_active]
        self._places = np.full(len(members), len(self._drawn))
        self._places[self._drawn] = np.arange(len(self._drawn))
        shape = (len(members),)
        self.active = owner.add_variable(shape, dtype="bool", name="active")
        self.norms = owner.add_variable(shape, dtype=dtype, name="norms")

    def draw(self, first, ascends):
        """Draws the active arms.

        Args:
            first: bool or scalar boolean tensor, whether this is the first step of a
                window of accumulated gradients. In the others the arms stay.
            ascends: True or scalar boolean tensor, whether this step has an ascent. It
                is returned with the arms, so that PyTorch synchronises once for both.

        Returns:
            Tuple of `ActiveArms` and `ascends`, which hold scalar boolean tensors
            inside a traced step, and otherwise bools. If all arms are always active,
            the arms hold bools.

        Raises:
            ValueError: if the sampler's mask has another shape, or if it is known that
                no arm is active.
        """
        atomic.assign_if(first, self._draw)
        flags = [] if self._all_active else [backend.read(self.active)]
        if ascends is not True:
            flags.append(ops.reshape(ascends, (1,)))
        found = backend.concrete(ops.concatenate(flags)) if flags else []
        if ascends is not True:
            ascends = found.pop()
        active = [True] * len(self.members) if self._all_active else found
        for arm in self.always_active:
            active[arm] = True  # known in a traced step too
        if not any(on is not False for on in active):
            raise ValueError(
                "`draw()` of a sampler must return at least one active arm. "
                f"Received: none from {self._sampler!r}"
            )
        return ActiveArms(self.members, active, self.norms.dtype), ascends

    def _draw(self):
        mask = draw_mask(self._sampler, len(self._drawn))
        self.active.assign(self.of_all_arms(mask, True))

    def of_all_arms(self, values, always):
        """Returns the values of all arms, given those of the arms that are drawn.

        Args:
            values: Tensor with one entry per arm that is drawn.
            always: Scalar, the value of the arms that are always active.
        """
        if not self.always_active:
            return values
        always = ops.full((1,), always, dtype=values.dtype)
        return ops.take(ops.concatenate([values, always]), self._places)

    def _of_drawn_arms(self, values):
        return ops.take(values, self._drawn) if self.always_active else values

    def learn(self, squares, position, last):
        """Records the norms of the arms, and lets the sampler learn from them.

        In a window of accumulated gradients the norms are root mean squares, and the
        sampler learns once, in the last step.

        Args:
            squares: List of float scalars, the arms' squared gradient norms.
            position: Int tensor, the number of earlier steps in this window, or `None`
                without accumulation.
            last: Whether this is the last step of a window.
        """
        squares = ops.stack(squares)
        if position is not None:
            position = ops.cast(position, squares.dtype)
            # Ignore norms of the previous window, which may not be finite.
            before = ops.where(position > 0, ops.square(self.norms) * position, 0.0)
            squares = (before + squares) / (position + 1)
        norms = ops.sqrt(squares)
        self.norms.assign(norms)
        active = self._of_drawn_arms(backend.read(self.active))
        norms = self._of_drawn_arms(norms)
        atomic.assign_if(last, lambda: learn(self._sampler, active, norms))
