"""The base class of the three backends: all operations that need a framework's API.

An entry of `active` is a bool if its value is known while Python runs: on PyTorch, and
with `run_eagerly=True`. Inside a traced step (on JAX under `jit`, on TensorFlow in a
graph) it is a scalar boolean tensor. In both cases, work that only inactive arms need
is not executed.
"""

import contextlib

import keras
from keras import ops

from keras_slsam.gradients.generators import Generators
from keras_slsam.gradients.passes import Passes


class NoSecondDerivative(Exception):
    """An operation of the loss has no second derivative."""


class Backend:
    """The interface of `gradients`. A subclass overrides what its framework needs.

    Attributes:
        Passes: Subclass of `Passes`, the two passes of a step.
        Scope: Subclass of `keras.StatelessScope` in which the loss is computed.
        can_compile: bool, whether a step may run with `jit_compile=True`.
        starts_before_trace: bool, whether `fit` must call `start` before it traces a
            step, because it takes the values out of the variables.
    """

    Passes: type[Passes]
    Scope = keras.StatelessScope
    can_compile = True
    starts_before_trace = False

    def check_devices(self, model, optimizer):
        """Raises a `ValueError` if a step on these devices is not supported.

        Args:
            model: `keras.Model`.
            optimizer: `keras.optimizers.Optimizer`, which may not be built yet.
        """

    def as_one_device(self, model, optimizer):
        """Context in which a replica of TensorFlow takes the step of one device.

        Args:
            model: `keras.Model`.
            optimizer: `keras.optimizers.Optimizer`, built for it.
        """
        return contextlib.nullcontext()

    def processes(self):
        """Returns the number of processes that must be kept alike, usually 1."""
        return 1

    def any_process(self, condition, model):
        """Returns whether a condition holds in any of the processes to be kept alike.

        Args:
            condition: bool.
            model: `keras.Model` with trainable weights.
        """
        return condition

    def start(self, model, optimizer, weights=None):
        """Checks and shares the state of several processes before their first step.

        Args:
            model: `keras.Model`.
            optimizer: `keras.optimizers.Optimizer`, built for it.
            weights: List of arrays, the values of the model's trainable variables, or
                `None` if the variables hold them.

        Raises:
            ValueError: if the processes do not start alike.
        """

    def agree(self, facts, variables):
        """Checks that several processes are about to take the same step.

        Args:
            facts: Function that returns a dict from the name of each fact to a number,
                or to a scalar tensor.
            variables: List of the trained `keras.Variable`s, which PyTorch compares.

        Raises:
            ValueError: if something differs. In a compiled step it is the error of the
                framework.
        """

    def average(self, gradients, arms):
        """Returns the averages of gradients over several processes or replicas.

        Args:
            gradients: List of tensors, or `None` for inactive weights, which are not
                exchanged.
            arms: `ActiveArms`.
        """
        return gradients

    def no_grad(self):
        """Context in which nothing is recorded for differentiation."""
        return contextlib.nullcontext()

    def unconverted(self, function):
        """Decorator of a function that a tracer runs as it is written.

        Args:
            function: Function.
        """
        return function

    def variable_scope(self, model):
        """Context in which variables are created like those of a model.

        Args:
            model: `keras.Model`.
        """
        return contextlib.nullcontext()

    def init_scope(self):
        """Context in which variables are created outside any graph."""
        return contextlib.nullcontext()

    def generators(self, model):
        """Returns the `Generators` of a model's layers."""
        return Generators(model)

    def own_parameters(self, model, variables):
        """Lets layers that do not read Keras variables compute with other weights.

        Args:
            model: `keras.Model`.
            variables: List of the model's trainable `keras.Variable`s.

        Returns:
            Tuple of two functions. The first takes a list of tensors like the values of
            `variables`, and returns a context in which these layers compute with them.
            The second, without arguments, keeps what the first pass did to the layers'
            other state.
        """
        return lambda weights: contextlib.nullcontext(), lambda: None

    def build_first(self, model, train_function):
        """Returns a train function that creates the variables of its step first.

        They belong to the optimizer and the metrics.

        Args:
            model: `keras.Model`.
            train_function: Function of an iterator over batches.
        """
        return train_function

    def only_builds(self):
        """Returns whether this step only creates its variables, and is not executed."""
        return False

    def collect_state(self, model):
        """Brings the variables up to date during `fit`, where Keras keeps them apart.

        Until the next step, assignments to them then count.
        """

    def after(self, *structures):
        """Context whose operations run after those that compute the given tensors.

        They also run after earlier checks, like `tf.debugging.assert_equal`. Only a
        graph of TensorFlow needs it.
        """
        return contextlib.nullcontext()

    def after_exchanges(self, norms, tensors):
        """Returns tensors whose exchanges come after those of the gradients.

        Only several devices of JAX need it.

        Args:
            norms: List of scalar tensors that depend on all gradients.
            tensors: Nested structure of tensors and `None`.
        """
        return tensors

    def concrete(self, mask):
        """Returns the entries of a boolean tensor of shape `(n,)`.

        Returns:
            List of bools if they are known, else of scalar boolean tensors. Needs at
            most one synchronisation with the device.
        """
        raise NotImplementedError

    def read(self, variable):
        """Returns the value of a `keras.Variable` as a tensor, without a copy."""
        return variable.value

    def cond(self, active, true_fn, false_fn):
        """Returns the value of `true_fn()` if `active`, else of `false_fn()`.

        The other function is not executed.

        Args:
            active: bool or scalar boolean tensor.
            true_fn: Function without arguments.
            false_fn: Function without arguments, with a result of the same structure.
        """
        if isinstance(active, bool):
            return true_fn() if active else false_fn()
        return ops.cond(active, true_fn, false_fn)

    def both(self, one, other):
        """Returns whether two conditions hold: bools or scalar boolean tensors."""
        if isinstance(one, bool):
            return other if one else False
        if isinstance(other, bool):
            return one if other else False
        return ops.logical_and(one, other)

    def when(self, active, update):
        """Runs `update()`, which assigns to Keras variables, if `active`.

        A backend that traces overrides it: the default is for a known `active`.

        Args:
            active: bool or scalar boolean tensor.
            update: Function without arguments. Its result is ignored.
        """
        if active:
            update()

    def select(self, active, update):
        """Like `when`, for an update of all weights. On JAX it uses no condition.

        XLA fuses the update and the choice into one loop. A condition would need memory
        for both the old and the new weights.
        """
        self.when(active, update)

    def apply(self, optimizer, gradients, variables):
        """Applies a Keras optimizer in the way that Keras' own train step does.

        Args:
            optimizer: `keras.optimizers.Optimizer`, built for `variables`.
            gradients: List of tensors.
            variables: List of `keras.Variable`s.
        """
        optimizer.apply(gradients, variables)

    def dense(self, gradient):
        """Returns a gradient as a tensor with one entry per weight."""
        return gradient

    def squared_sum(self, gradient):
        """Computes the sum of the squares of a gradient, at least in float32."""
        dtype = keras.backend.standardize_dtype(gradient.dtype)
        # Not Keras' `result_type`, which turns float64 into float32 on JAX.
        dtype = "float64" if dtype == "float64" else "float32"
        return ops.sum(ops.square(ops.cast(gradient, dtype)))

    def multiply(self, gradient, factor):
        """Returns `factor * gradient` for a scalar `factor`, as a new tensor."""
        return gradient * ops.cast(factor, gradient.dtype)

    def add(self, weight, gradient, scale):
        """Returns `weight + scale * gradient`, as a new tensor.

        Args:
            weight: Tensor.
            gradient: Gradient of a tensor with the shape of `weight`.
            scale: Tensor, a scalar or with the shape of `weight`.
        """
        return weight + scale * gradient

    def compile(self, function, model):
        """Returns a function of tensors that is compiled for repeated calls.

        Args:
            function: Function of structures of tensors, which changes nothing.
            model: `keras.Model` whose variables it reads. Each call sees their current
                values.
        """
        raise NotImplementedError

    def differentiate(self, loss, weights):
        """Computes a loss and its gradients with respect to all weights.

        Args:
            loss: `Loss`.
            weights: List of tensors, one per trainable variable.

        Returns:
            `(loss, gradients)`, a scalar tensor and a list of tensors like `weights`,
            zero where the loss does not depend on a weight.

        Raises:
            ValueError: if a weight is read or written where it cannot be replaced.
        """
        passes = self.Passes(loss, [0] * len(weights), [True], twice=False)
        (value, _), gradients = passes.first(weights)
        return value, gradients

    def multiply_by_hessian(self, loss, weights, vectors):
        """Computes the product of the loss' Hessian and a vector.

        Args:
            loss: `Loss`.
            weights: List of tensors, at which the Hessian is taken.
            vectors: List of tensors like `weights`.

        Returns:
            List of tensors like `weights`.

        Raises:
            NoSecondDerivative: if an operation has none.
        """
        raise NotImplementedError
