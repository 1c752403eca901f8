"""Ascents: the directions in which a step perturbs the weights.

`Ascent` follows the gradient of the batch, which takes a pass of its own. `LastApplied`
follows the gradient that was applied last, which takes none. You can write your own.
"""

import keras
from keras import ops

from keras_slsam import lost_state
from keras_slsam.gradients import backend

__all__ = ["Ascent", "LastApplied"]


@keras.saving.register_keras_serializable("keras_slsam")
class Ascent:
    """The ascent of SAM, along the gradient of the batch, and the base class of others.

    A subclass overrides `direction`. If it has state, it also overrides `build` and
    `update`. If it does not need the gradient of the batch, it sets
    `needs_gradient = False`, and a step then has one pass.

    The methods run inside the compiled step, so they must use `keras.ops`. Inactive
    arms have no direction. The optimizer scales the directions to the radius `rho`.

    Example:

    The ascent of F-SAM: along the gradient without its running mean (Li et al., CVPR
    2024).

    >>> import keras, keras_slsam
    >>> class Friendly(keras_slsam.ascents.Ascent):
    ...     def build(self, optimizer, variables):
    ...         self.mean = optimizer.add_optimizer_variables(variables, "mean")
    ...     def direction(self, index, gradient):
    ...         return gradient - self.mean[index]
    ...     def update(self, index, gradient):
    ...         mean = self.mean[index]
    ...         mean.assign(0.9 * mean + 0.1 * gradient)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> model.compile(keras_slsam.SAM("adamw", ascent=Friendly()), "mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> history = model.fit(x, y, verbose=0)

    Reference:
        Foret et al., arXiv 2010.01412, equation 2.
    """

    needs_gradient: bool = True
    """Whether `direction` needs the gradient of the batch, which takes a pass."""

    # Whether an optimizer has it already.
    _in_use = False

    def build(
        self, optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]
    ) -> None:
        """Creates the state.

        Args:
            optimizer: `keras.optimizers.Optimizer`, which saves the state. Create it
                with its methods `add_optimizer_variables` and `add_variable`. The base
                optimizer, `optimizer.base_optimizer`, is built already. An attribute
                that is a tensor is refused, because no file has it. A constant may be a
                NumPy array.
            variables: List of `keras.Variable`s, the model's trainable ones.
        """

    def direction(self, index, gradient):
        """Returns the direction in which a variable is perturbed, of any length.

        It is called several times in a step, so it must not change state or draw random
        numbers.

        Args:
            index: int, the place of the variable in the list given to `build`.
            gradient: Tensor with the shape of the variable, the gradient of the batch.
                `None` if `needs_gradient` is false.

        Returns:
            Tensor with the shape of the variable.
        """
        return gradient

    def update(self, index, gradient):
        """Learns from a step, for one variable of an active arm.

        Does nothing by default. It is called before the base optimizer's step. It is
        not called if the step is skipped. If `needs_gradient` is true, it is not called
        if `rho` is 0 either, because the step then has no ascent.

        Args:
            index: int, as for `direction`.
            gradient: Tensor with the shape of the variable. If `needs_gradient` is
                true, the gradient that `direction` got. Otherwise the gradient that is
                applied, before clipping. With `gradient_accumulation_steps` this is the
                mean of a window, and `update` is called at its end.
        """

    def get_config(self) -> dict:
        """Returns the arguments of the constructor as a dict."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Creates an ascent from the dict that `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable("keras_slsam")
class LastApplied(Ascent):
    """The ascent of S2-SAM, along the gradient that was last applied to each variable.

    `S2SAM` and `SLSAM(single_step=True)` have it. A variable to which no gradient was
    applied yet is not perturbed.

    Example:

    >>> import keras_slsam
    >>> ascent = keras_slsam.ascents.LastApplied()
    >>> optimizer = keras_slsam.SAM("adamw", ascent=ascent)  # as `S2SAM("adamw")`

    Reference:
        Ji et al., NeurIPS 2024.
    """

    needs_gradient = False

    def build(self, optimizer, variables):
        self._gradients = optimizer.add_optimizer_variables(
            variables, "previous_gradient"
        )

    def direction(self, index, gradient):
        return backend.read(self._gradients[index])

    def update(self, index, gradient):
        self._gradients[index].assign(gradient)


class Directions:
    """The directions of an ascent, each computed where it is read.

    In a compiled step a condition around an arm then includes its directions.

    Args:
        ascent: `Ascent`.
        weights: List of tensors.
        gradients: List of tensors like `weights`, or `None` without a pass for them.
    """

    def __init__(self, ascent, weights, gradients):
        self._ascent, self._weights, self._gradients = ascent, weights, gradients

    def __getitem__(self, index):
        weight, gradient = self._weights[index], None
        if self._gradients:
            # TensorFlow may not know the shape of a gradient that it makes dense.
            dense = backend.dense(self._gradients[index])
            gradient = ops.reshape(dense, weight.shape)
        direction = self._ascent.direction(index, gradient)
        if getattr(direction, "shape", None) != weight.shape:
            raise ValueError(
                f"`direction()` of `{type(self._ascent).__name__}` must return a "
                "tensor with the shape of the variable, here "
                f"{tuple(weight.shape)} for the variable {index}. "
                f"Received: {direction!r}"
            )
        return ops.cast(direction, weight.dtype)


def follows_batch(ascent):
    """Returns whether the direction is the gradient of the batch itself."""
    return type(ascent).direction is Ascent.direction


def learns(ascent):
    """Returns whether the ascent has an `update`."""
    return type(ascent).update is not Ascent.update


def learn(ascent, gradients, indices):
    """Calls `update` for some variables.

    Args:
        ascent: `Ascent`, or `None`.
        gradients: List of tensors, one per variable.
        indices: Iterable of int, the variables.
    """
    if ascent is not None:
        for i in indices:
            ascent.update(i, backend.dense(gradients[i]))


def get(owner, ascent, single_step):
    """Returns the ascent that the arguments `ascent` and `single_step` ask for.

    Args:
        owner: String, the optimizer's class.
        ascent: `Ascent`, or `None`.
        single_step: bool, whether the ascent is `LastApplied`.

    Raises:
        ValueError: if `ascent` is something else, or cannot be used.
    """
    if ascent is None:
        return LastApplied() if single_step else Ascent()
    if not isinstance(ascent, Ascent):
        raise ValueError(
            f"Argument `ascent` of `{owner}` must be a `keras_slsam.ascents.Ascent` or "
            f"None. Received: ascent={ascent!r}"
        )
    if single_step:
        raise ValueError(
            f"Argument `ascent` of `{owner}` is not allowed with `single_step=True`, "
            f"which chooses `LastApplied`. Received: ascent={ascent!r}"
        )
    if follows_batch(ascent) and not ascent.needs_gradient:
        raise ValueError(
            f"Argument `ascent` of `{owner}` has `needs_gradient=False`, so it must "
            f"override `direction`. Received: ascent={ascent!r}"
        )
    return ascent


def refusing_tensors(ascent):
    """Context in which an ascent must not get tensors as attributes."""
    way_out = "create a variable in `build` with `optimizer.add_variable`"
    return lost_state.refused(ascent, way_out)


def build(ascent, optimizer, variables):
    """Creates the state of an ascent, and checks that the optimizer saves it.

    Raises:
        ValueError: if the ascent has a variable that the optimizer does not know, or
            keeps state in a tensor.
    """
    with refusing_tensors(ascent):
        ascent.build(optimizer, variables)
    known = {id(v) for v in [*optimizer.variables, *variables]}
    for name, value in vars(ascent).items():
        for part in keras.tree.flatten(value):
            drawn = isinstance(part, keras.random.SeedGenerator)
            own = isinstance(part, keras.Variable) and id(part) not in known
            if drawn or own:
                raise ValueError(
                    f"`{name}` of the ascent `{type(ascent).__name__}` is state that "
                    f"the optimizer would not save. Received: {part!r}. Create it in "
                    "`build` with `optimizer.add_optimizer_variables` or "
                    "`optimizer.add_variable`. Random directions are not supported."
                )
