"""The base class of samplers, which is what a sampler of your own derives from."""

import keras


class Sampler:
    """Draws the arms that are active in a step. Base class of all samplers.

    A subclass makes all its `keras.Variable`s in `build`, as attributes, and
    overrides `draw`, and `update` and `get_config` where it needs to. It runs
    inside the compiled step, so it speaks `keras.ops` and changes state by
    `variable.assign` only.

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

    #: Probability of each arm in the next draw, shape `(num_arms,)`, or `None`.
    probabilities = None

    #: The least probability of an arm, where arms are drawn independently, else 0. A
    #: compiled step has no conditions for work that is left out in hardly any step.
    min_probability: float = 0.0

    def build(self, num_arms: int) -> None:
        """Makes the sampler's variables.

        Args:
            num_arms: int, the number of arms.
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
        """Learns from a step. By default nothing.

        Args:
            active: Boolean tensor of shape `(num_arms,)`, the step's mask.
            norms: Float tensor of shape `(num_arms,)`, the norms of the first
                pass's gradients, 0 where inactive.
        """

    @property
    def variables(self) -> list[keras.Variable]:
        """List of the sampler's variables, in the order they were made.

        Those of `keras.random.SeedGenerator`s and of other samplers, and those in
        lists and dicts, are among them.
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
        """Makes a sampler from the dict that `get_config` returned."""
        return cls(**config)
