"""Ascents: the directions in which a step perturbs the weights.

`Ascent` follows the gradient of the batch, which takes a pass of its own. `LastApplied`
follows the gradient that the base optimizer applied last, which takes none. You can
write your own.
"""

import keras
from keras import ops

from keras_slsam.gradients import backend


@keras.saving.register_keras_serializable("keras_slsam")
class Ascent:
    """The ascent of SAM, along the gradient of the batch, and the base class of others.

    A subclass overrides `direction`. If it has state, it also overrides `build` and
    `update`. If it does not need the gradient of the batch, it sets
    `needs_gradient = False`, and a step then has one pass.

    The methods run inside the compiled step, so they must use `keras.ops`. They are
    called for variables of active arms only, and with `all_arms` `direction` for all.
    The optimizer scales the directions to the radius `rho`.

    Example:

    The ascent of F-SAM, along the part of the gradient that is not in its running mean
    (Li et al., CVPR 2024).

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

    #: Whether `direction` depends on the gradient of the batch, which takes a pass.
    needs_gradient: bool = True

    #: Whether inactive arms are perturbed too. Not allowed with `needs_gradient`: a
    #: pass computes the gradients of active arms only.
    all_arms: bool = False

    # Whether an optimizer has it already.
    _in_use = False

    def build(
        self, optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]
    ) -> None:
        """Creates the state, with `optimizer.add_optimizer_variables`.

        Args:
            optimizer: `keras.optimizers.Optimizer`, which saves the state. The base
                optimizer, `optimizer.base_optimizer`, is built already.
            variables: List of `keras.Variable`s, the model's trainable ones.
        """

    def direction(self, index, gradient):
        """Returns the direction in which a variable is perturbed, of any length.

        It may be called several times in a step, and must not assign to variables.

        Args:
            index: int, the place of the variable in the list given to `build`.
            gradient: Tensor with the shape of the variable, the gradient of the batch,
                or `None` if `needs_gradient` is false.

        Returns:
            Tensor with the shape of the variable.
        """
        return gradient

    def update(self, index, gradient):
        """Learns from a step, for one variable. Does nothing by default.

        It is not called if the step is skipped, nor, with `needs_gradient`, if the step
        has no ascent because `rho` is 0.

        Args:
            index: int, as for `direction`.
            gradient: Tensor with the shape of the variable. If `needs_gradient`, the
                gradient of the batch that `direction` got, else the gradient that the
                base optimizer applies. With `gradient_accumulation_steps` the former is
                that of a micro-batch, and the latter the mean of a window.
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

    Args:
        all_arms: bool, whether inactive arms are perturbed too, along the gradients of
            the steps in which they were active. The norm is then that over all arms.

    Raises:
        ValueError: if `all_arms` is not a bool.

    Example:

    >>> import keras_slsam
    >>> ascent = keras_slsam.ascents.LastApplied(all_arms=True)
    >>> optimizer = keras_slsam.SLSAM("adamw", rho=0.05, ascent=ascent)

    Reference:
        Ji et al., NeurIPS 2024. With `all_arms` the rule is this package's.
    """

    needs_gradient = False

    def __init__(self, all_arms: bool = False) -> None:
        if not isinstance(all_arms, bool):
            raise ValueError(
                "Argument `all_arms` of `LastApplied` must be True or False. "
                f"Received: all_arms={all_arms!r}"
            )
        self.all_arms = all_arms

    def build(self, optimizer, variables):
        self._gradients = optimizer.add_optimizer_variables(
            variables, "previous_gradient"
        )

    def direction(self, index, gradient):
        return backend.read(self._gradients[index])

    def update(self, index, gradient):
        self._gradients[index].assign(gradient)

    def get_config(self):
        return {"all_arms": self.all_arms}


class Directions:
    """The directions of an ascent, computed when they are read.

    So a condition around an arm includes them, and they need no memory.

    Args:
        ascent: `Ascent`.
        weights: List of tensors.
        gradients: List of tensors like `weights`, or `None` without a pass for them.
    """

    def __init__(self, ascent, weights, gradients):
        self._ascent, self._weights, self._gradients = ascent, weights, gradients

    def __getitem__(self, index):
        gradient = self._gradients and backend.dense(self._gradients[index])
        direction = self._ascent.direction(index, gradient)
        weight = self._weights[index]
        if getattr(direction, "shape", None) != weight.shape:
            raise ValueError(
                f"`direction()` of `{type(self._ascent).__name__}` must return a "
                "tensor with the shape of the variable, here "
                f"{tuple(weight.shape)} for the variable {index}. "
                f"Received: {direction!r}"
            )
        return ops.cast(direction, weight.dtype)


def learns(ascent):
    """Returns whether an ascent has state that it updates."""
    return type(ascent).update is not Ascent.update
