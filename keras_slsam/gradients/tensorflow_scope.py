"""The scope in which layers read and assign variables in a pass on TensorFlow."""

import keras
import tensorflow as tf

from keras_slsam.gradients import tensorflow_names as names

_ASSIGNED = (
    "The variable {0!r} is assigned by a layer inside its own `tf.function` or loop, "
    "so the two passes of a step would not see the same state. Remove the "
    "`tf.function`, since `fit` compiles the whole step, or move what assigns "
    "(Dropout, BatchNormalization, a seed generator) out of the loop."
)


class Scope(keras.StatelessScope):
    """A stateless scope that may return `tf.Variable`s as values of weights.

    In the body of a loop or branch it returns tensors that are read outside of it. A
    `tf.function` that a layer calls keeps its trace after the step, so it reads the
    variables themselves, and must not assign.

    Args:
        state_mapping: List of `(keras.Variable, tf.Variable or tensor)`.
        **kwargs: As for `keras.StatelessScope`.
    """

    def __init__(self, state_mapping, **kwargs):
        weights = [(k, v) for k, v in state_mapping if isinstance(v, tf.Variable)]
        tensors = [(k, v) for k, v in state_mapping if not isinstance(v, tf.Variable)]
        super().__init__(tensors, **kwargs)
        self.state_mapping.update((id(k), v) for k, v in weights)
        self._graph = _current_graph()
        self._changed = set()

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if self._is_in_function():
            if id(variable) in self._changed:
                raise ValueError(_ASSIGNED.format(variable.path))
            return None
        if isinstance(value, tf.Variable) and _current_graph() is not self._graph:
            with self._graph.as_default():
                return tf.convert_to_tensor(value)
        return value

    def add_update(self, update):
        variable, _ = update
        if _current_graph() is not self._graph:
            raise ValueError(_ASSIGNED.format(variable.path))
        self._changed.add(id(variable))
        super().add_update(update)

    def _is_in_function(self):
        """Returns whether the forward pass is tracing a `tf.function` that it calls."""
        graph = _current_graph()
        while graph is not self._graph:
            # Graphs of loops and branches have other classes.
            if graph is None or type(graph) is names.FuncGraph:
                return True
            graph = graph.outer_graph
        return False


def check_state(traced, variables):
    """Refuses an already traced `tf.function` that assigns to state of both passes."""
    known = {id(v.value.handle): v for v in variables}
    for inner, outer in zip(traced.graph.inputs, traced.captured_inputs):
        variable = known.get(id(outer))
        for op in inner.consumers() if variable is not None else []:
            # This attribute lists the variables that a call only reads.
            noted = names.READ_ONLY in op.node_def.attr
            read = op.get_attr(names.READ_ONLY) if noted else []
            places = [i for i, tensor in enumerate(op.inputs) if tensor is inner]
            if op.type != names.READ and not set(places) <= set(read):
                raise ValueError(_ASSIGNED.format(variable.path))


def _current_graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
