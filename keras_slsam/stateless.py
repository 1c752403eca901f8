"""The step as a pure function of the state, to compile with `jax.jit`."""

import keras
from keras import ops

from keras_slsam import loss_scale
from keras_slsam import training
from keras_slsam.optimizers import SharpnessAware


def get_state(
    model: keras.Model, optimizer: SharpnessAware, data: tuple | None = None
) -> tuple:
    """Returns the state that `stateless_step` takes.

    Args:
        model: `keras.Model`, built and compiled with a loss.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, or a Keras `LossScaleOptimizer`
            around one of them. It is built if necessary.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch, or `None`. The
            loss and most metrics create their variables when they see data. So pass a
            batch if the model was not evaluated or trained since `compile`. This resets
            the metrics.

    Returns:
        Tuple of four lists of arrays, the values of `model.trainable_variables`,
        `model.non_trainable_variables`, `optimizer.variables` and
        `model.metrics_variables`.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> state = keras_slsam.get_state(model, keras_slsam.SAM("sgd"))
    >>> [len(values) for values in state]
    [2, 0, 8, 2]
    """
    if data is not None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        model.test_on_batch(x, y, sample_weight)
        model.reset_metrics()
    for each in (optimizer, loss_scale.split(optimizer)[1]):
        if not each.built:
            each.build(model.trainable_variables)
    groups = _variables(model, optimizer)
    return tuple([ops.copy(v) for v in group] for group in groups)


def set_state(model: keras.Model, optimizer: SharpnessAware, state: tuple) -> None:
    """Assigns a state to the variables of the model and the optimizer.

    Args:
        model: `keras.Model`.
        optimizer: The optimizer, built.
        state: What `get_state` or `stateless_step` returned.

    Raises:
        ValueError: if `state` lacks values, or if `optimizer` is not built.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> optimizer = keras_slsam.SAM("sgd")
    >>> state = keras_slsam.get_state(model, optimizer)
    >>> model.set_weights([2 * weight for weight in model.get_weights()])
    >>> keras_slsam.set_state(model, optimizer, state)  # the weights as before
    """
    groups = _variables(model, optimizer)
    _check_sizes("set_state", groups, state, optimizer)
    with loss_scale.split(optimizer)[1]._changed_rho():
        for group, values in zip(groups, state):
            for variable, value in zip(group, values):
                variable.assign(value)


def stateless_step(
    model: keras.Model, optimizer: SharpnessAware, state: tuple, data: tuple
) -> tuple[dict, tuple]:
    """Takes one step, as a pure function to compile with `jax.jit`.

    Args:
        model: `keras.Model`, built and compiled with a loss.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, or a Keras `LossScaleOptimizer`
            around one of them, built.
        state: What `get_state` or the previous step returned.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch.

    Returns:
        Tuple `(logs, state)`, the values of the metrics and the new state.

    Raises:
        ValueError: as `step`, and if `state` lacks variables.

    Example:

    >>> import functools, keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> optimizer = keras_slsam.SAM("sgd")
    >>> step = functools.partial(keras_slsam.stateless_step, model, optimizer)
    >>> batch = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> state = keras_slsam.get_state(model, optimizer, batch)
    >>> if keras.config.backend() == "jax":
    ...     import jax
    ...     logs, state = jax.jit(step)(state, batch)
    """
    variables = _variables(model, optimizer)
    _check_sizes("stateless_step", variables, state, optimizer)
    mapping = [pair for pairs in map(zip, variables, state) for pair in pairs]
    with keras.StatelessScope(mapping) as scope:
        logs = training.step(model, optimizer, data)
    after = _variables(model, optimizer)
    if [len(vs) for vs in after] != [len(vs) for vs in variables]:
        raise ValueError(
            "Argument `state` of `stateless_step` lacks variables that the model, its "
            "loss or its metrics create in the first step. Give `get_state` a batch as "
            "`data`."
        )
    return logs, tuple([scope.get_current_value(v) for v in vs] for vs in variables)


def _variables(model, optimizer):
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
        model.metrics_variables,
    )


def _check_sizes(function, variables, state, optimizer):
    sizes, given = [len(vs) for vs in variables], [len(values) for values in state]
    if (variables[0] and not optimizer.built) or sizes != given:
        raise ValueError(
            f"Argument `state` of `{function}` must hold the values of "
            "`model.trainable_variables`, `model.non_trainable_variables`, "
            f"`optimizer.variables` and `model.metrics_variables`, {sizes} of them. "
            f"Received: {given}, with optimizer.built={optimizer.built}. "
            "`keras_slsam.get_state(model, optimizer)` returns them."
        )
