"""Makes `fit` take the step, by a mixin class or by a function."""

import functools
import types
import warnings

import keras

from keras_slsam import loss_scale
from keras_slsam import observers
from keras_slsam import stateless
from keras_slsam import training
from keras_slsam.gradients import backend

# The number of train functions of a model that are kept, with different observers.
_MOST_VERSIONS = 4


class SAMTrainStep:
    """Gives a custom model class the sharpness-aware train step.

    This is a mixin: list it before `keras.Model`. With an optimizer from another
    package, the model trains as usual in Keras. For an existing model, use
    `sharpness_aware`.

    Example:

    >>> import keras, keras_slsam
    >>> class Model(keras_slsam.SAMTrainStep, keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.dense = keras.layers.Dense(1)
    ...     def call(self, x):
    ...         return self.dense(x)
    >>> model = Model()
    >>> model.compile(optimizer=keras_slsam.SAM("sgd"), loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> history = model.fit(x, y, verbose=0)
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if keras.Model in order and order.index(keras.Model) < order.index(
            SAMTrainStep
        ):
            raise ValueError(
                f"`{cls.__name__}` must list `SAMTrainStep` before `keras.Model`, to "
                f"replace its train step: `class {cls.__name__}(SAMTrainStep, "
                "keras.Model)`."
            )

    def train_step(self, *args):
        """Takes one step, with the arguments that Keras passes on this backend."""
        if training.is_sharpness_aware(self.optimizer):
            return _step(self, *args)
        return super().train_step(*args)

    def make_train_function(self, force=False):
        """Makes the function that `fit` calls for its steps."""
        _make(self, super().make_train_function, force)


def sharpness_aware(model: keras.Model) -> keras.Model:
    """Gives an existing model the sharpness-aware train step, in place.

    The model's class, weights and file format do not change. A saved file does not
    contain the train step, so call this function again on a loaded model. On PyTorch, a
    model that was saved on another backend may have `jit_compile=True`, which is set to
    False with a warning.

    Args:
        model: `keras.Model`: functional, sequential, subclassed, or a KerasHub task.

    Returns:
        The same model.

    Raises:
        ValueError: if `model` is not a `keras.Model`, or overrides `train_step`, or if
            KERAS_NNX_ENABLED is set, where the class must be a `SAMTrainStep`.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> keras_slsam.sharpness_aware(model) is model
    True
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Argument `model` of `sharpness_aware` must be a `keras.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}. Of a model "
            "inside a `DistributedDataParallel` pass `model.module`."
        )
    if model.compiled and model.jit_compile and not backend.can_compile:
        warnings.warn(
            f"The model {model.name!r} was compiled with jit_compile=True, for example "
            "because it was saved on another backend. It is set to False, because a "
            "sharpness-aware step cannot be compiled on PyTorch.",
            stacklevel=2,
        )
        model.jit_compile = False
    own = vars(model).get("train_step")
    if getattr(own, "__func__", None) is _train_step:
        return model
    if own is None and isinstance(model, SAMTrainStep):
        return model
    if own is not None or type(model).train_step is not keras.Model.train_step:
        right = (
            "stateless_step(self, self.optimizer, state, data)"
            if keras.config.backend() == "jax"
            else "step(self, self.optimizer, data)"
        )
        raise ValueError(
            f"Argument `model` of `sharpness_aware`, a `{type(model).__name__}`, "
            "overrides `train_step`, and would lose its own step. Return "
            f"`keras_slsam.{right}` from the override, or remove it."
        )
    if keras.config.is_nnx_enabled():
        raise ValueError(
            "With KERAS_NNX_ENABLED, Keras takes the train step from the model's "
            "class, which `sharpness_aware` does not change. Derive the class from "
            "`keras_slsam.SAMTrainStep`, or disable NNX. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    model.train_step = types.MethodType(_train_step, model)
    model.make_train_function = types.MethodType(_make_train_function, model)
    model.train_function = None  # a compiled one holds the old step
    return model


def _train_step(model, *args):
    """The `train_step` method that `sharpness_aware` sets on a model."""
    step = (
        _step
        if training.is_sharpness_aware(model.optimizer)
        else type(model).train_step
    )
    return step(model, *args)


def _make_train_function(model, force=False):
    """The `make_train_function` method that `sharpness_aware` sets on a model."""
    _make(model, functools.partial(type(model).make_train_function, model), force)


def _step(model, *args):
    """Takes one step, with the arguments that Keras passes on this backend."""
    if len(args) == 2:
        # On JAX, Keras' trainer is stateless and passes `(state, data)`.
        return stateless.stateless_step(model, model.optimizer, *args)
    return training.step(model, model.optimizer, *args)


def _make(model, keras_make, force):
    """Makes the train function, unless the model has one for what it does now.

    Args:
        model: `keras.Model`.
        keras_make: Keras' own `make_train_function`, bound to the model.
        force: bool, whether to make it in any case. `fit` passes False at its start,
            when no callback observes yet. A callback that does passes `None`.
    """
    if force is False:
        observers.clear(model)
    scaler, optimizer = loss_scale.split(model.optimizer)
    if not training.is_sharpness_aware(optimizer):
        optimizer = None  # Keras does not compare optimizers
    else:
        optimizer._prepare_fit(model)
        if backend.starts_before_trace:
            training.start(model, model.optimizer)  # an error leaves the model whole
    always_ascends = getattr(optimizer, "_always_ascends", False)
    versions = {} if force else getattr(model.train_function, "versions", {})
    key = optimizer, *observers.of(model)
    # A function that was compiled with `rho` > 0 has no condition for the second pass.
    if key not in versions or (versions[key].always_ascends and not always_ascends):
        while len(versions) >= _MOST_VERSIONS:
            versions.pop(next(iter(versions)))  # the oldest
        versions[key] = _made(model, keras_make, optimizer, scaler)
        versions[key].always_ascends = always_ascends
        versions[key].versions = versions
    model.train_function = versions[key]


def _made(model, keras_make, optimizer, scaler):
    """Returns a new train function."""
    own = vars(model).get("train_step")
    # Each train function needs a new object, because `jax.jit` caches traces by it.
    model.train_step = functools.partial(model.train_step)
    try:
        keras_make(True)
    finally:
        if own is None:
            del model.train_step
        else:
            model.train_step = own
    function = model.train_function
    if optimizer is not None:
        function = backend.build_first(model, function)
        if backend.starts_before_trace:
            function = _started(model, model.optimizer, function)
    if scaler is not None:
        function = _checked(scaler, function)
    return function


def _started(model, optimizer, train_function):
    """Returns a train function before which the processes start alike.

    They must do so again if a callback has loaded a file.
    """

    def call(state, data):
        training.start(model, optimizer, state[0])
        return train_function(state, data)

    return call


def _checked(scaler, train_function):
    """Returns a train function that refuses settings which go to a loss scaler."""

    def call(*args):
        loss_scale.check(scaler)
        return train_function(*args)

    return call
