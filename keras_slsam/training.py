"""The train step: one text for all methods and all backends."""

import functools
import types
import warnings

import keras
from keras import ops

from keras_slsam import atomic
from keras_slsam import gradients as backend
from keras_slsam import loss_scale
from keras_slsam.loss import Loss
from keras_slsam.loss import call
from keras_slsam.optimizers.sharpness_aware import SharpnessAware


def step(model: keras.Model, optimizer: SharpnessAware, data: tuple) -> dict:
    """One sharpness-aware training step, for a training loop of your own.

    `model.fit` takes the same step. On TensorFlow call it inside a `tf.function`
    with `jit_compile=model.jit_compile`, on PyTorch as it is; on JAX compile
    `stateless_step` instead.

    Args:
        model: `keras.Model`, compiled with a loss; its `compute_loss` and
            `compute_metrics` are used.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, or a Keras
            `LossScaleOptimizer` around one of them.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch.

    Returns:
        Dict of the metrics' values so far, like that of `model.train_step`. The
        loss is that of the unperturbed weights, if the method evaluates them.

    Raises:
        ValueError: if `optimizer` is not one of ours, or the model's trainable
            weights are not those that it was built for.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> optimizer = keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0)
    >>> model.compile(loss="mse")
    >>> batch = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> logs = keras_slsam.step(model, optimizer, batch)
    >>> sorted(logs)
    ['loss']
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    _prepare(model, optimizer, x)
    scaler, optimizer = loss_scale.split(optimizer)
    variables = model.trainable_variables
    if not variables:
        warnings.warn(
            f"The model {model.name!r} does not have any trainable weights: nothing is "
            "optimized.",
            stacklevel=2,
        )
    with (
        atomic.hold_back_interrupt(),
        backend.no_grad(),
        backend.replay(model),
    ):
        scale = loss_scale.read(scaler)
        loss = Loss(model, variables, x, y, sample_weight, scale)
        if not variables or backend.only_builds():
            _, outputs = loss([v.value for v in variables])
            logs = _update_metrics(
                model, x, y, sample_weight, *loss.record_metrics(outputs)
            )
            if not backend.only_builds():
                loss.record_state(outputs)
            return logs
        first_of_window, last_of_window = optimizer.window()
        with atomic.Staged() as drawn:
            active = optimizer.draw_active(first_of_window)
            perturbs = optimizer.draw_perturbed()
            if optimizer.single_step:
                previous, squared_norm = optimizer.previous_gradients()
        passes = backend.Passes(
            loss,
            optimizer.arm_of,
            active,
            twice=not optimizer.single_step,
            jit_compile=model.jit_compile,
            min_probability=optimizer.sampler.min_probability,
        )
        weights = [backend.read(v) for v in variables]  # w
        if optimizer.single_step:
            # Up along the gradient of the last step: one pass, h = grad(w + e).
            perturbed = optimizer.perturb(weights, previous, squared_norm, active)
            (_, outputs), gradients = passes.first(perturbed)
            gradients = optimizer.unscale(gradients, active, scale)
            squares = norms = optimizer.squared_norms(gradients, active)
        else:
            # First pass, g = grad(w); second pass, h = grad(w + e).
            (_, outputs), first = passes.first(weights)
            first = optimizer.unscale(first, active, scale)
            squares = optimizer.squared_norms(first, active)

            def second():
                perturbed = optimizer.perturb(weights, first, sum(squares), active)
                found = optimizer.unscale(passes.second(perturbed), active, scale)
                return found, squares + optimizer.squared_norms(found, active)

            gradients, norms = backend.cond(
                perturbs, second, lambda: (first, squares + squares)
            )
        # The root, or XLA would repeat the sum over the arms wherever this is read.
        finite = ops.isfinite(ops.sqrt(sum(norms)))
        (finite,) = backend.concrete(ops.reshape(finite, (1,)))

        # Until here nothing has moved. Assignments come last.
        with backend.after(outputs, gradients), atomic.put_back_metrics(model):
            with optimizer.counted(finite):
                logs = _update_metrics(
                    model, x, y, sample_weight, *loss.record_metrics(outputs)
                )
            with backend.after(logs):
                with drawn, atomic.Staged() as learned:
                    atomic.assign_if(
                        finite, lambda: optimizer.learn(squares, last_of_window)
                    )
                # The base step at w, with h.
                optimizer.descend(gradients, squares, active, last_of_window, finite)
                drawn.commit()
                learned.commit()
                backend.when(finite, lambda: loss.record_state(outputs))
                loss_scale.adapt(scaler, finite)
        return logs


def stateless_step(
    model: keras.Model, optimizer: SharpnessAware, state: tuple, data: tuple
) -> tuple[dict, tuple]:
    """`step` as a pure function, to compile with `jax.jit`.

    Args:
        model: `keras.Model`, built and compiled with a loss.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, built.
        state: Tuple of four lists of arrays, the values of
            `model.trainable_variables`, `model.non_trainable_variables`,
            `optimizer.variables` and `model.metrics_variables`.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch.

    Returns:
        Tuple `(logs, state)`, the metrics' values and the new state.

    Raises:
        ValueError: as `step`, and if variables are missing in `state`.
    """
    variables = _state_variables(model, optimizer)
    sizes, given = [len(vs) for vs in variables], [len(values) for values in state]
    if (variables[0] and not optimizer.built) or sizes != given:
        raise ValueError(
            "Argument `state` of `stateless_step` must hold the values of "
            "`model.trainable_variables`, `model.non_trainable_variables`, "
            f"`optimizer.variables` and `model.metrics_variables`, {sizes} of them. "
            f"Received: {given}, with optimizer.built={optimizer.built}. Call "
            "`optimizer.build(model.trainable_variables)` first."
        )
    mapping = [pair for pairs in map(zip, variables, state) for pair in pairs]
    with keras.StatelessScope(mapping) as scope:
        logs = step(model, optimizer, data)
    if [len(vs) for vs in _state_variables(model, optimizer)] != sizes:
        raise ValueError(
            "The model, its loss or its metrics had no variables yet, so `state` does "
            "not hold them. Call `model.compile` again and `model.evaluate` on a batch "
            "before you read the state."
        )
    return logs, tuple([scope.get_current_value(v) for v in vs] for vs in variables)


class SAMTrainStep:
    """Gives a model of your own class the sharpness-aware train step.

    A mixin: put it before `keras.Model`. With an optimizer that is not ours the
    model trains as Keras does. `sharpness_aware` does the same for a model that
    exists.

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
                f"`{cls.__name__}` must name `SAMTrainStep` before `keras.Model`, "
                f"whose train step it replaces: `class {cls.__name__}(SAMTrainStep, "
                "keras.Model)`."
            )

    def train_step(self, *args):
        """The step of `fit`, with the arguments that the backend's Keras gives it."""
        if _is_ours(self.optimizer):
            return _step(self, *args)
        return super().train_step(*args)

    def make_train_function(self, force=False):
        """What `fit` calls for the function that takes its steps."""
        _make(self, super().make_train_function, force)


def sharpness_aware(model: keras.Model) -> keras.Model:
    """Gives an existing model the sharpness-aware train step, in place.

    Nothing is copied, and the model's class stays what it is: a saved model loads
    without `keras_slsam`'s step and takes it again by one more call. On PyTorch a
    model that was saved on another backend may come with `jit_compile=True`, which
    is switched off with a warning.

    Args:
        model: `keras.Model`: functional, sequential, subclassed, or a KerasHub task.

    Returns:
        The same model.

    Raises:
        ValueError: if `model` is no `keras.Model`, or overrides `train_step`, or with
            KERAS_NNX_ENABLED, where the class must be a `SAMTrainStep`.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> keras_slsam.sharpness_aware(model) is model
    True
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Argument `model` of `sharpness_aware` must be a `keras.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if model.compiled and model.jit_compile and not backend.can_compile:
        warnings.warn(
            f"The model {model.name!r} was compiled with jit_compile=True, as models "
            "that were saved on another backend are. It is set to False: on PyTorch a "
            "sharpness-aware step cannot be compiled.",
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
            "overrides `train_step` itself, which would be lost. Return "
            f"`keras_slsam.{right}` there, or leave out the override."
        )
    if keras.config.is_nnx_enabled():
        raise ValueError(
            "With KERAS_NNX_ENABLED Keras takes the train step from the model's class, "
            "which `sharpness_aware` leaves as it is. Derive the class from "
            "`keras_slsam.SAMTrainStep`, or switch NNX off. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    model.train_step = types.MethodType(_train_step, model)
    model.make_train_function = types.MethodType(_make_train_function, model)
    model.train_function = None  # what `fit` has compiled holds the old step
    return model


def _is_ours(optimizer):
    return isinstance(loss_scale.split(optimizer)[1], SharpnessAware)


def _train_step(model, *args):
    """The method `train_step` of a model that `sharpness_aware` was given."""
    step = _step if _is_ours(model.optimizer) else type(model).train_step
    return step(model, *args)


def _make_train_function(model, force=False):
    """Its method `make_train_function`."""
    _make(model, functools.partial(type(model).make_train_function, model), force)


def _step(model, *args):
    """The step, with the arguments that the backend's Keras gives it."""
    if len(args) == 2:
        # The stateless trainer of the JAX backend gives `(state, data)`.
        return stateless_step(model, model.optimizer, *args)
    return step(model, model.optimizer, *args)


def _make(model, keras_make, force):
    """Has Keras make the train function, unless it has one for this optimizer.

    Args:
        model: `keras.Model`.
        keras_make: Its method `make_train_function` without ours.
        force: bool, whether to make it in any case.
    """
    _, optimizer = loss_scale.split(model.optimizer)
    if not _is_ours(optimizer):
        optimizer = None  # Keras compares nothing
    elif optimizer.built:
        optimizer.check_variables(model.trainable_variables)
    before = model.train_function
    made_for, ascends = getattr(before, "made_for", (optimizer, False))
    # With `rho` above 0 both passes were compiled, without a condition.
    force = force or made_for is not optimizer or (ascends and not optimizer.ascends)
    own = vars(model).get("train_step")
    # A function of its own for each that Keras makes: `jax.jit` knows its traces by it.
    model.train_step = functools.partial(model.train_step)
    try:
        keras_make(force)
    finally:
        if own is None:
            del model.train_step
        else:
            model.train_step = own
    if model.train_function is before:
        return
    if optimizer is not None:
        model.train_function = backend.build_first(model, model.train_function)
    model.train_function.made_for = optimizer, getattr(optimizer, "ascends", False)


def _state_variables(model, optimizer):
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
        model.metrics_variables,
    )


def _prepare(model, optimizer, x):
    """Checks what a step is called with, and builds what is not built yet."""
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            "Argument `model` must be a `keras.Model` that was compiled with a loss. "
            f"Received: model={model!r}. Call `model.compile(loss=...)` first."
        )
    if not _is_ours(optimizer):
        raise ValueError(
            "Argument `optimizer` must be `SAM`, `S2SAM`, `SLSAM` or `RST` of "
            f"keras_slsam. Received: optimizer={optimizer!r}"
        )
    if model.jit_compile and not backend.can_compile:
        raise ValueError(
            "A sharpness-aware step cannot be compiled on the PyTorch backend: with "
            "arms switched off it would be compiled again for every new mask. "
            "Received: jit_compile=True. Call `model.compile(..., jit_compile=False)`, "
            "or set `model.jit_compile = False` on a model that was loaded."
        )
    for layer in model._flatten_layers():
        # Keras has no public name for the layers at any depth.
        if isinstance(layer, keras.layers.TFSMLayer) and layer.trainable_variables:
            raise ValueError(
                f"The layer {layer.name!r}, a `TFSMLayer`, reads weights that Keras "
                "cannot replace by perturbed ones, so it would be trained with wrong "
                "gradients. Set its `trainable = False`, or write it with Keras layers."
            )
    inner = loss_scale.split(optimizer)[1]
    # A `LossScaleOptimizer` may have been built when no weight was trainable.
    unbuilt = inner if optimizer.built else optimizer
    if not unbuilt.built:
        if not all(layer.built for layer in model._flatten_layers()):
            # TensorFlow's `fit` leaves it to the first step. The scope makes variables
            # outside any graph, and keeps nothing else.
            with keras.StatelessScope():
                call(model, x)
        with backend.init_scope():
            unbuilt.build(model.trainable_variables)
    inner.check_variables(model.trainable_variables)


def _update_metrics(model, x, y, sample_weight, loss, y_pred):
    # Keras has no public name for the metric of the loss itself.
    model._loss_tracker.update_state(loss, sample_weight=_batch_size(x))
    return model.compute_metrics(x, y, y_pred, sample_weight)


def _batch_size(x):
    return ops.shape(next(t for t in keras.tree.flatten(x) if t is not None))[0]
