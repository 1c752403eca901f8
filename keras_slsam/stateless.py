"""The step as a pure function of the state, as JAX compiles it."""

import keras
from keras import ops

from keras_slsam import loss_scale
from keras_slsam import training
from keras_slsam.optimizers import SharpnessAware


def get_state(
    model: keras.Model, optimizer: SharpnessAware, data: tuple | None = None
) -> tuple:
    """The state that `stateless_step` takes.

    Args:
        model: `keras.Model`, built and compiled with a loss.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, or a Keras `LossScaleOptimizer`
            around one. It is built if it is not.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch. The loss and
            most metrics make their variables when they see data: give it where the
            model was not evaluated or trained since `compile`. The metrics are reset.

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
    """Assigns a state to the variables of model and optimizer.

    Args:
        model: `keras.Model`.
        optimizer: Its optimizer, built.
        state: What `get_state` or `stateless_step` returned.

    Raises:
        ValueError: if values are missing in `state`.
    """
    groups = _variables(model, optimizer)
    _check_sizes("set_state", groups, state, optimizer)
    for group, values in zip(groups, state):
        for variable, value in zip(group, values):
            variable.assign(value)


def stateless_step(
    model: keras.Model, optimizer: SharpnessAware, state: tuple, data: tuple
) -> tuple[dict, tuple]:
    """`step` as a pure function, to compile with `jax.jit`.

    Args:
        model: `keras.Model`, built and compiled with a loss.
        optimizer: `SAM`, `S2SAM`, `SLSAM` or `RST`, built.
        state: What `get_state` or the step before returned.
        data: Tuple `(x, y)` or `(x, y, sample_weight)` of one batch.

    Returns:
        Tuple `(logs, state)`, the metrics' values and the new state.

    Raises:
        ValueError: as `step`, and if variables are missing in `state`.
    """
    variables = _variables(model, optimizer)
    _check_sizes("stateless_step", variables, state, optimizer)
    mapping = [pair for pairs in map(zip, variables, state) for pair in pairs]
    with keras.StatelessScope(mapping) as scope:
        logs = training.step(model, optimizer, data)
    after = _variables(model, optimizer)
    if [len(vs) for vs in after] != [len(vs) for vs in variables]:
        raise ValueError(
            "The model, its loss or its metrics had no variables yet, so `state` does "
            "not hold them. Give `get_state` a batch as `data`."
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
