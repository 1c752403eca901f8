"""The train step: one implementation for all methods and backends."""

import warnings
import weakref

import keras
from keras import ops

from keras_slsam import ascents
from keras_slsam import atomic
from keras_slsam import loss_scale
from keras_slsam import observers
from keras_slsam.gradients import backend
from keras_slsam.loss import Loss
from keras_slsam.loss import call
from keras_slsam.optimizers.sharpness_aware import SharpnessAware
from keras_slsam.uphill import UphillGradients


@backend.unconverted
def step(model: keras.Model, optimizer: SharpnessAware, data: tuple) -> dict:
    """Takes one sharpness-aware training step, for custom training loops.

    `model.fit` takes the same step. On TensorFlow call it inside a `tf.function` with
    `jit_compile=model.jit_compile`. On PyTorch call it directly. On JAX compile
    `stateless_step` instead.

    Args:
        model: `keras.Model`, compiled with a loss. The step calls its `compute_loss`
            and `compute_metrics`.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, or a Keras `LossScaleOptimizer`
            around one of them.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch.

    Returns:
        Dict of the values of the metrics so far, as from `model.train_step`. The loss
        is computed at the unperturbed weights if the method evaluates the whole batch
        there.

    Raises:
        ValueError: if `optimizer` is not from this package or was built for other
            trainable weights, or if a feature is not supported.

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
    optimizer._trained_model = weakref.ref(model)
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
        backend.as_one_device(model, scaler or optimizer),
        backend.generators(model),
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
        selection, base_step = optimizer._selection, optimizer._base_step
        is_first, is_last = base_step.window()
        with atomic.Staged() as drawn:
            ascends, rho = optimizer._draw_ascent()
            arms, ascends = selection.draw(is_first, ascends)
        backend.agree(
            lambda: {
                "the number of arms": len(arms.members),
                "which arms are active": arms.fingerprint(),
                "`rho`": rho,
                "whether there is an ascent": ascends,
                "`learning_rate`": optimizer.learning_rate,
                "`iterations`": optimizer.iterations,
                "the scale of the loss": 1.0 if scale is None else scale,
            },
            variables,
        )
        observed = observers.of(model)
        uphill = UphillGradients(model, optimizer, arms, rho, scale, bool(observed))
        if optimizer._two_passes:
            found = uphill.two_passes(loss, ascends)
        elif optimizer.ascent.needs_gradient:
            part = loss.part(optimizer.ascent_fraction)
            found = uphill.two_passes_of_part(part, loss, ascends)
        else:
            found = uphill.one_pass(loss)
        outputs, gradients, squares, norms, first = found
        # The square root keeps XLA from repeating the sum over the arms at each use.
        finite = ops.isfinite(ops.sqrt(sum(norms)))
        (finite,) = backend.concrete(ops.reshape(finite, (1,)))

        batch, seen = backend.after_exchanges(
            norms, ((x, y, sample_weight), outputs[:-1])
        )
        # Nothing has been assigned so far. All assignments come last.
        with backend.after(outputs, gradients), atomic.put_back_metrics(model):
            if observed:
                reading = observers.Reading(
                    arms.where(finite).mask,
                    ops.sqrt(ops.stack(squares)),
                    uphill.gain,
                    backend.both(ascends, finite),
                    _batch_size(x),
                )
                for observer in observed:
                    observer.update_state(reading)
            with base_step.counted(finite):
                logs = _update_metrics(
                    model, *batch, *loss.record_metrics((*seen, outputs[-1]))
                )
            with backend.after(logs), ascents.refusing_tensors(optimizer.ascent):
                with drawn:
                    position = base_step.position()
                    atomic.assign_if(
                        finite, lambda: selection.learn(squares, position, is_last)
                    )
                uphill.learn(first, backend.both(finite, ascends))
                # The base optimizer's step from w, with h.
                base_step(gradients, arms, is_last, finite)
                drawn.commit()
                backend.when(finite, lambda: loss.record_state(outputs))
                loss_scale.adapt(scaler, finite)
        return logs


def is_sharpness_aware(optimizer):
    """Returns whether `optimizer` is a `SharpnessAware`, also inside a loss scaler."""
    return isinstance(loss_scale.split(optimizer)[1], SharpnessAware)


def _prepare(model, optimizer, x):
    """Checks the arguments of a step, and builds what is not built yet."""
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            "Argument `model` must be a `keras.Model` that was compiled with a loss. "
            f"Received: model={model!r}. Call `model.compile(loss=...)` first. Of a "
            "model inside a `DistributedDataParallel` pass `model.module`: the step "
            "averages the gradients itself."
        )
    if not is_sharpness_aware(optimizer):
        raise ValueError(
            "Argument `optimizer` must be `SAM`, `S2SAM`, `SLSAM` or `RST` of "
            f"keras_slsam. Received: optimizer={optimizer!r}"
        )
    loss_scale.check(optimizer)
    if model.jit_compile and not backend.can_compile:
        raise ValueError(
            "A sharpness-aware step cannot be compiled on the PyTorch backend, because "
            "it would be compiled again for each new mask. "
            "Received: jit_compile=True. Call `model.compile(..., jit_compile=False)`, "
            "or set `model.jit_compile = False` on a loaded model."
        )
    if model.trainable_variables or not model.built:
        backend.check_devices(model, optimizer)
    for layer in model._flatten_layers():
        # Keras has no public name for the layers at any depth.
        if isinstance(layer, keras.layers.TFSMLayer) and layer.trainable_variables:
            raise ValueError(
                f"The layer {layer.name!r}, a `TFSMLayer`, reads weights that Keras "
                "cannot replace by perturbed ones, so it would be trained with wrong "
                "gradients. Set `trainable = False` on it, or rewrite it with Keras "
                "layers."
            )
    inner = loss_scale.split(optimizer)[1]
    # A `LossScaleOptimizer` may have been built while no weight was trainable.
    unbuilt = inner if optimizer.built else optimizer
    if not unbuilt.built:
        if not all(layer.built for layer in model._flatten_layers()):
            # On TensorFlow, `fit` leaves building to the first step. The scope creates
            # variables outside any graph, and discards everything else.
            with keras.StatelessScope():
                call(model, x)
        with backend.init_scope():
            unbuilt.build(model.trainable_variables)
    inner._check_variables(model.trainable_variables)
    with backend.init_scope():
        observers.build(model, inner)
    if model.trainable_variables:
        start(model, optimizer)


def start(model, optimizer, weights=None):
    """Makes the processes start alike, unless they did already.

    Args:
        model: `keras.Model` with trainable weights.
        optimizer: `keras.optimizers.Optimizer`. If it is not built, nothing is done.
        weights: See `Backend.start`.
    """
    inner = loss_scale.split(optimizer)[1]
    processes = backend.processes()
    # One process may have loaded the optimizer's state alone.
    if inner.built and backend.any_process(inner._processes != processes, model):
        if processes > 1:
            backend.start(model, optimizer, weights)
        inner._processes = processes


def _update_metrics(model, x, y, sample_weight, loss, y_pred):
    # Keras has no public name for the metric of the loss itself.
    model._loss_tracker.update_state(loss, sample_weight=_batch_size(x))
    return model.compute_metrics(x, y, y_pred, sample_weight)


def _batch_size(x):
    return ops.shape(next(t for t in keras.tree.flatten(x) if t is not None))[0]
