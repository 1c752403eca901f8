"""The train step: one text for all methods and all backends."""

import functools
import inspect

import keras
from keras import ops

from keras_slsam import gradients as backend
from keras_slsam.optimizers.sharpness_aware import SharpnessAware

_LAYERS_WITH_OWN_WEIGHTS = (keras.layers.TorchModuleWrapper, keras.layers.TFSMLayer)


def step(model: keras.Model, optimizer: SharpnessAware, data: tuple) -> dict:
    """One sharpness-aware training step, for a training loop of your own.

    `model.fit` takes the same step. On TensorFlow call it inside a `tf.function`,
    on PyTorch as it is; on JAX compile `stateless_step` instead.

    Args:
        model: `keras.Model`, built and compiled with a loss; its `compute_loss`
            and `compute_metrics` are used.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`.
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
    if not model.built:
        # TensorFlow's `fit` leaves it to the first step to build a subclassed model.
        model(x)
    variables = _check(model, optimizer)
    state = model.non_trainable_variables + model.metrics_variables
    loss_fn = _make_loss_function(model, variables, state, x, y, sample_weight)

    def value_and_grad(weights):
        return backend.value_and_grad(
            loss_fn, weights, optimizer.arm_of, active, model.jit_compile
        )

    with backend.no_grad():
        active = optimizer.draw_active()
        weights = [backend.read(v) for v in variables]  # w
        if optimizer.single_step:
            # Up along the gradient of the last step: one pass, h = grad(w + e).
            previous = optimizer.previous_gradients
            squared_norm = optimizer.previous_squared_norm
            perturbed = optimizer.perturb(weights, previous, squared_norm, active)
            (loss, (y_pred, updates)), gradients = value_and_grad(perturbed)
            squares = optimizer.squared_norms(gradients, active)
        else:
            # First pass, g = grad(w); second pass, h = grad(w + e).
            (loss, (y_pred, updates)), first = value_and_grad(weights)
            squares = optimizer.squared_norms(first, active)

            def second():
                perturbed = optimizer.perturb(weights, first, sum(squares), active)
                return value_and_grad(perturbed)[1]

            gradients = backend.cond(optimizer.draw_perturbed(), second, lambda: first)
        optimizer.descend(gradients, active)  # the base step at w, with h
        optimizer.learn(squares)
        for index, value in updates.items():
            state[index].assign(value)
        # Keras has no public name for the metric of the loss itself.
        model._loss_tracker.update_state(loss, sample_weight=_batch_size(x))
        return model.compute_metrics(x, y, y_pred, sample_weight)


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
        ValueError: as `step`.
    """
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
        model.metrics_variables,
    )
    mapping = [pair for pairs in map(zip, variables, state) for pair in pairs]
    with keras.StatelessScope(mapping) as scope:
        logs = step(model, optimizer, data)
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

    def train_step(self, *args):
        """The step of `fit`, with the arguments that the backend's Keras gives it."""
        return _train_step(self, super().train_step, *args)


def sharpness_aware(model: keras.Model) -> keras.Model:
    """Gives an existing model the sharpness-aware train step, in place.

    Nothing is copied, and the model's class stays what it is: a saved model loads
    without `keras_slsam`'s step and takes it again by one more call.

    Args:
        model: `keras.Model`: functional, sequential, subclassed, or a KerasHub task.

    Returns:
        The same model.

    Raises:
        ValueError: if `model` is no `keras.Model`, or overrides `train_step`.

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
    if isinstance(model, SAMTrainStep) or "train_step" in vars(model):
        return model
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"Argument `model` of `sharpness_aware`, a `{type(model).__name__}`, "
            "overrides `train_step` itself, which would be lost. Call "
            "`keras_slsam.step(self, self.optimizer, data)` there, or leave out the "
            "override."
        )
    model.train_step = functools.partial(_train_step, model, model.train_step)
    return model


def _train_step(model, keras_train_step, *args):
    optimizer = model.optimizer
    if isinstance(getattr(optimizer, "inner_optimizer", None), SharpnessAware):
        raise ValueError(
            "A model with the dtype policy 'mixed_float16' is compiled with a "
            "`LossScaleOptimizer` around the optimizer, and perturbations of scaled "
            f"gradients are not supported. Received: optimizer={optimizer!r}. Use "
            "the policy 'mixed_bfloat16' or 'float32'."
        )
    if not isinstance(optimizer, SharpnessAware):
        return keras_train_step(*args)
    if len(args) == 2:
        # The stateless trainer of the JAX backend gives `(state, data)`.
        return stateless_step(model, optimizer, *args)
    return step(model, optimizer, *args)


def _check(model, optimizer):
    if not isinstance(optimizer, SharpnessAware):
        raise ValueError(
            "Argument `optimizer` must be `SAM`, `S2SAM`, `SLSAM` or `RST` of "
            f"keras_slsam. Received: optimizer={optimizer!r}"
        )
    if model.jit_compile and not backend.can_compile:
        raise ValueError(
            "A step with drawn arms cannot be compiled on the PyTorch backend: it "
            "would be compiled again for every new mask. Received: "
            "jit_compile=True. Call `model.compile(..., jit_compile=False)`."
        )
    for layer in model._flatten_layers():
        # Keras has no public name for the layers at any depth.
        if isinstance(layer, _LAYERS_WITH_OWN_WEIGHTS):
            raise ValueError(
                f"The layer {layer.name!r}, a `{type(layer).__name__}`, reads weights "
                "that Keras cannot replace by perturbed ones, so it would be trained "
                "with wrong gradients. Write it with Keras layers, or keep it out of "
                "the model that is trained."
            )
    variables = model.trainable_variables
    if not optimizer.built:
        with backend.init_scope():
            optimizer.build(variables)
    optimizer.check_variables(variables)
    return variables


def _make_loss_function(model, variables, state, x, y, sample_weight):
    """The loss as a pure function of the weights.

    It always starts from the state of before the step, so a second pass sees the
    dropout masks of the first; what it does to the state comes out as values.
    """
    kwargs = {"training": True} if _takes_training(model) else {}
    before = [backend.read(v) for v in state]

    def loss_fn(weights):
        mapping = list(zip(variables, weights)) + list(zip(state, before))
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            start = [scope.get_current_value(v) for v in state]
            y_pred = model(x, **kwargs)
            loss = model.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
        after = [scope.get_current_value(v) for v in state]
        updates = {
            index: new
            for index, (old, new) in enumerate(zip(start, after))
            if new is not old
        }
        return loss, (y_pred, updates)

    return backend.replayed(loss_fn)


def _takes_training(model):
    parameters = inspect.signature(model.call).parameters
    return "training" in parameters


def _batch_size(x):
    return ops.shape(next(t for t in keras.tree.flatten(x) if t is not None))[0]
