"""What a framework does in its own way: the base class of the three backends.

An arm's entry in `active` is a bool where its value is known while Python runs: on
PyTorch, and with `run_eagerly=True`. Inside a traced step, on JAX under `jit` and in a
graph of TensorFlow, it is a scalar boolean tensor. Either way, work that only inactive
arms need is not executed.
"""

import contextlib

import keras
from keras import ops

from keras_slsam.gradients.generators import Generators
from keras_slsam.gradients.passes import Passes


class Backend:
    """The interface of `gradients`. A subclass overrides what its framework needs.

    Attributes:
        Passes: Subclass of `Passes`, the two passes of a step.
        Scope: The `keras.StatelessScope` that the loss is computed in.
        can_compile: bool, whether a step may run with `jit_compile=True`.
    """

    Passes: type[Passes]
    Scope = keras.StatelessScope
    can_compile = True

    def check_devices(self):
        """Raises a `ValueError` with several devices or processes, if not supported."""

    def no_grad(self):
        """Context in which nothing is recorded for differentiation."""
        return contextlib.nullcontext()

    def init_scope(self):
        """Context in which variables are made, outside any graph."""
        return contextlib.nullcontext()

    def generators(self, model):
        """The `Generators` of a model's layers that are no Keras variables."""
        return Generators(model)

    def own_parameters(self, model, variables):
        """Lets layers that do not read Keras variables compute with other weights.

        Args:
            model: `keras.Model`.
            variables: List of its `keras.Variable`s that `weights` stand for.

        Returns:
            Tuple of two functions. The first makes of a list of tensors, like the
            values of `variables`, a context in which these layers compute with them;
            the second, without arguments, takes over what the first pass did to their
            other state.
        """
        return lambda weights: contextlib.nullcontext(), lambda: None

    def build_first(self, model, train_function):
        """A train function that makes the variables of optimizer and metrics first.

        Args:
            model: `keras.Model`.
            train_function: Function of an iterator over batches.

        Returns:
            Function like `train_function`.
        """
        return train_function

    def only_builds(self):
        """Whether this step is taken for the variables that it makes, not executed."""
        return False

    def after(self, *structures):
        """Context whose operations run after those that give the tensors in these.

        And after the checks before it, which give no tensors.
        """
        return contextlib.nullcontext()

    def concrete(self, mask):
        """The entries of a boolean tensor of shape `(n,)`.

        Returns:
            List of bools if they are known, else of scalar boolean tensors. At most
            one synchronisation with the device.
        """
        raise NotImplementedError

    def read(self, variable):
        """The value of a `keras.Variable` as a tensor, not a copy."""
        return variable.value

    def cond(self, active, true_fn, false_fn):
        """The value of `true_fn()` where `active`, else of `false_fn()`.

        Args:
            active: bool or scalar boolean tensor.
            true_fn: Function without arguments.
            false_fn: Function without arguments, of the same structure.

        Returns:
            What the function that was taken returns; the other is not executed.
        """
        if isinstance(active, bool):
            return true_fn() if active else false_fn()
        return ops.cond(active, true_fn, false_fn)

    def both(self, one, other):
        """Whether two conditions hold: bools, or scalar boolean tensors."""
        if isinstance(one, bool):
            return other if one else False
        if isinstance(other, bool):
            return one if other else False
        return ops.logical_and(one, other)

    def when(self, active, update):
        """Runs `update()`, which assigns to Keras variables, if `active`.

        Args:
            active: bool or scalar boolean tensor.
            update: Function without arguments; what it returns is ignored.
        """
        if active:
            update()

    def select(self, active, update):
        """The same for an update of all weights: on JAX without a condition.

        XLA makes one loop of the update and the choice, where a condition takes memory
        for the old weights and the new ones.
        """
        self.when(active, update)

    def apply(self, optimizer, gradients, variables):
        """The step of a Keras optimizer, as Keras' own train step asks for it.

        Args:
            optimizer: `keras.optimizers.Optimizer`, built for `variables`.
            gradients: List of tensors.
            variables: List of `keras.Variable`s.
        """
        optimizer.apply(gradients, variables)

    def squared_sum(self, gradient):
        """Sum of the squares of a gradient's entries, at least in float32."""
        dtype = keras.backend.result_type(gradient.dtype, "float32")
        return ops.sum(ops.square(ops.cast(gradient, dtype)))

    def multiply(self, gradient, factor):
        """`factor * gradient` for a scalar `factor`, a new tensor."""
        return gradient * ops.cast(factor, gradient.dtype)

    def add(self, weight, gradient, scale):
        """`weight + scale * gradient`, a new tensor.

        Args:
            weight: Tensor.
            gradient: Gradient of a tensor of the shape of `weight`.
            scale: Scalar tensor, or one of the shape of `weight`.

        Returns:
            Tensor of the shape of `weight`.
        """
        return weight + scale * gradient
