"""The base class of all samplers, including custom ones."""

import inspect
import typing

import keras
import numpy as np
from keras import ops

from keras_slsam import lost_state

_WAY_OUT = "create a `keras.Variable` in `build`"


class Arm(typing.NamedTuple):
    """What a sampler may know of an arm.

    Attributes:
        paths: Tuple of strings, the paths of the arm's variables.
        size: int, the number of weights in them.
    """

    paths: tuple
    size: int


class Sampler:
    """Base class of samplers, which draw the active arms of a step.

    A subclass creates all of its `keras.Variable`s in `build`, as attributes. It
    overrides `draw`, and if needed `update` and `get_config`. It runs inside the
    compiled step, so it must use `keras.ops`, and change state with `variable.assign`
    only.

    Example:

    A sampler that replays a table of masks.

    >>> import keras
    >>> from keras import ops
    >>> from keras_slsam import samplers
    >>> class Replay(samplers.Sampler):
    ...     def __init__(self, masks):
    ...         self.masks = masks
    ...     def build(self, num_arms):
    ...         self.row = keras.Variable(0, dtype="int32", trainable=False)
    ...     def draw(self):
    ...         mask = ops.take(ops.convert_to_tensor(self.masks), self.row, axis=0)
    ...         self.row.assign_add(1)
    ...         return mask
    >>> sampler = Replay([[True, False], [False, True]])
    >>> sampler.build(2)
    >>> ops.convert_to_numpy(sampler.draw()).tolist()
    [True, False]
    """

    probabilities = None
    """Probability of each arm in the next draw, shape `(num_arms,)`, or `None`."""

    min_probability: float = 0.0
    """Lower bound of each arm's probability if arms are drawn independently, else 0.

    With a higher bound, a compiled step has fewer conditions.
    """

    _arms: list[Arm] | None = None

    # Whether an optimizer or another sampler draws from it already.
    _in_use = False

    # Whether it is built, so that nothing would see a change of its arguments.
    _is_fixed = False

    def __setattr__(self, name, value):
        if self._is_fixed and name in _arguments(type(self)):
            scheduled = name == "active_fraction"
            raise ValueError(
                f"`{name}` of the sampler `{type(self).__name__}` cannot be set, "
                "because steps that were compiled would not see it. "
                f"Received: {name}={value!r}. Create a new sampler and optimizer, and "
                "call `model.compile` with it"
                + (", or pass a schedule." if scheduled else ".")
            )
        super().__setattr__(name, value)

    @property
    def arms(self) -> list[Arm] | None:
        """List of the `Arm`s that are drawn, or `None` before an optimizer is built.

        It is set before the sampler's `build` is called.
        """
        return self._arms

    @property
    def _kind(self):
        """String that saved state and a sampler must have in common."""
        return type(self).__name__

    def build(self, num_arms: int) -> None:
        """Creates the sampler's variables.

        Args:
            num_arms: int, the number of arms that are drawn.
        """

    def draw(self):
        """Draws the mask of one step.

        Returns:
            Boolean tensor of shape `(num_arms,)`, with at least one true entry.
        """
        raise NotImplementedError(
            f"A sampler must implement `draw()`. Received: {type(self).__name__}"
        )

    def update(self, active, norms):
        """Learns from a step. Does nothing by default.

        Args:
            active: Boolean tensor of shape `(num_arms,)`, the step's mask.
            norms: Float tensor of shape `(num_arms,)`, the gradient norms of the
                pass that gives the loss, 0 where inactive.
        """

    @property
    def variables(self) -> list[keras.Variable]:
        """List of the sampler's variables, in order of creation.

        It includes the variables of `keras.random.SeedGenerator`s and of other
        samplers, and variables in lists and dicts.
        """
        found: dict[int, keras.Variable] = {}
        for attribute in keras.tree.flatten(list(vars(self).values())):
            if isinstance(attribute, Sampler):
                found.update((id(v), v) for v in attribute.variables)
            elif isinstance(attribute, keras.random.SeedGenerator):
                found[id(attribute.state)] = attribute.state
            elif isinstance(attribute, keras.Variable):
                found[id(attribute)] = attribute
        return list(found.values())

    def get_config(self) -> dict:
        """Returns the arguments of the constructor as a dict."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Creates a sampler from the dict that `get_config` returned."""
        return cls(**config)


def _arguments(kind):
    """Returns the arguments of a class and of its base classes."""
    return {x for base in kind.mro()[:-1] for x in inspect.signature(base).parameters}


def draw_mask(sampler, num_arms):
    """Draws a mask, and checks it.

    Args:
        sampler: `Sampler`, built.
        num_arms: int.

    Returns:
        Boolean tensor of shape `(num_arms,)`.

    Raises:
        ValueError: if the sampler returns something else, or keeps state in a tensor.
    """
    with lost_state.refused(sampler, _WAY_OUT):
        mask = sampler.draw()
    shape, expected = tuple(np.shape(mask)), (num_arms,)
    if not _is_mask(mask) or (None not in shape and shape != expected):
        raise ValueError(
            "`draw()` of a sampler must return a boolean tensor of shape (num_arms,), "
            f"here {expected}. Received: {mask!r} from {sampler!r}"
        )
    return ops.cast(mask, "bool")


def learn(sampler, active, norms):
    """Lets a sampler learn.

    Raises:
        ValueError: if the sampler keeps state in a tensor.
    """
    with lost_state.refused(sampler, _WAY_OUT):
        sampler.update(active, norms)


def _is_mask(x):
    """Returns whether `x` is an array or tensor of bools or ints."""
    if not hasattr(x, "dtype"):
        return False
    dtype = keras.backend.standardize_dtype(x.dtype)
    return dtype == "bool" or keras.backend.is_int_dtype(dtype)
