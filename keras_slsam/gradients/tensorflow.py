"""Sparse gradients on TensorFlow, in the graph of a step or eagerly.

A step is traced once for all masks, so its graph holds the work of all gradients.
`tensorflow_graph` puts it under conditions. In an eager step, the tape watches the
active weights only.

The forward pass reads its weights as `tf.Variable`s, as in Keras' own step, because
code such as inner tapes and custom gradients looks for them. In a graph these are the
model's own variables, and the values of the pass replace what is read. An eager step
reads new variables with the values of the pass instead.
"""

import contextlib

import keras
import tensorflow as tf

from keras_slsam.gradients import passes
from keras_slsam.gradients import tensorflow_build
from keras_slsam.gradients import tensorflow_graph
from keras_slsam.gradients import tensorflow_names as names
from keras_slsam.gradients import tensorflow_replicas
from keras_slsam.gradients import tensorflow_scope
from keras_slsam.gradients.interface import Backend
from keras_slsam.gradients.interface import NoSecondDerivative


class Passes(passes.Passes):
    """The passes on TensorFlow, in the graph of a step or eagerly."""

    def __post_init__(self):
        self._eager = tf.executing_eagerly()
        if all(on is True for on in self.active) and not self._eager:
            # A dense step has one arm, so that noise and other values that depend on no
            # weight are computed once.
            self.arm_of, self.active = [0] * len(self.arm_of), [tf.constant(True)]

    def first(self, weights):
        if self._eager:
            return self._run(weights)
        self._trace()
        return self._unflatten(self._gradients.first(weights), weights)

    def second(self, weights):
        if self._eager:
            return self._run(weights)
        return self._unflatten(self._gradients.second(weights), weights)

    def _run(self, weights):
        own = [v.value for v in self.loss_fn.variables]
        weights = [tf.Variable(w, name=v.name) for w, v in zip(weights, own)]
        wanted = [self.active[arm] for arm in self.arm_of]
        with _refuse_reads(
            self.loss_fn.variables,
            "In an eager step, perturbed values do not reach it there. Received: "
            "run_eagerly=True. Compile the model with run_eagerly=False, or call "
            "`tf.config.run_functions_eagerly(True)` as well.",
        ):
            return _record(self.loss_fn, weights, wanted)

    def _trace(self):
        variables = [v.value for v in self.loss_fn.variables]
        wanted = [True] * len(variables)
        traced = tf.function(
            lambda: _record(self.loss_fn, variables, wanted), autograph=False
        ).get_concrete_function()
        self._outputs = value, gradients = traced.structured_outputs
        tensorflow_scope.check_state(traced, self.loss_fn.state)

        outputs = [t for t in tf.nest.flatten(value, True) if tf.is_tensor(t)]
        needs = [None] * len(outputs)
        for weight, arm, gradient in zip(variables, self.arm_of, gradients):
            if isinstance(gradient, tf.IndexedSlices):
                gradient.values.set_shape([None, *weight.shape[1:]])
                parts = [gradient.values, gradient.indices]
            else:
                gradient.set_shape(weight.shape)
                parts = [gradient]
            outputs += parts
            needs += [arm] * len(parts)
        self._gradients = tensorflow_graph.Gradients(traced, outputs, needs, self)

    def _unflatten(self, tensors, weights):
        results = iter(tensors)
        value, gradients = self._outputs
        value = tf.nest.map_structure(
            lambda t: next(results) if tf.is_tensor(t) else t,
            value,
            expand_composites=True,
        )
        return value, [
            tf.IndexedSlices(next(results), next(results), tf.shape(weight))
            if isinstance(gradient, tf.IndexedSlices)
            else next(results)
            for weight, gradient in zip(weights, gradients)
        ]


class TensorFlowBackend(Backend):
    """TensorFlow, in the graph of a step or eagerly."""

    Passes = Passes
    Scope = tensorflow_scope.Scope
    build_first = staticmethod(tensorflow_build.build_first)
    only_builds = staticmethod(tensorflow_build.only_builds)

    check_devices = staticmethod(tensorflow_replicas.check)
    processes = staticmethod(tensorflow_replicas.processes)
    start = staticmethod(tensorflow_replicas.start)
    as_one_device = staticmethod(tensorflow_replicas.as_one_device)
    average = staticmethod(tensorflow_replicas.average)
    agree = staticmethod(tensorflow_replicas.agree)

    # AutoGraph takes seconds to convert all that a step calls.
    unconverted = staticmethod(tf.autograph.experimental.do_not_convert)

    def variable_scope(self, model):
        return model.distribute_strategy.scope()

    def init_scope(self):
        return tf.init_scope()

    def after(self, *structures):
        if tf.executing_eagerly():
            return contextlib.nullcontext()
        tensors = [
            tf.convert_to_tensor(t)  # a `keras.Variable` may be among the logs
            for t in tf.nest.flatten(structures, True)
            if tf.is_tensor(t)
        ]
        checks = [
            op
            for op in tf.compat.v1.get_default_graph().get_operations()
            if op.type in names.CHECKS
        ]
        return tf.control_dependencies([tf.group(*tensors, *checks)])

    def concrete(self, mask):
        return mask.numpy().tolist() if tf.executing_eagerly() else tf.unstack(mask)

    def read(self, variable):
        return tf.convert_to_tensor(variable.value)

    def when(self, active, update):
        if isinstance(active, bool):
            super().when(active, update)
        else:
            # Both branches return nothing, whatever `update` returns.
            tf.cond(active, lambda: [update()] and None, lambda: None)

    def apply(self, optimizer, gradients, variables):
        optimizer.apply_gradients(zip(gradients, variables))

    def dense(self, gradient):
        return tf.convert_to_tensor(gradient)

    def squared_sum(self, gradient):
        dtype = keras.backend.result_type(gradient.dtype.name, "float32")
        if isinstance(gradient, tf.IndexedSlices):
            gradient = gradient.values
        return 2 * tf.nn.l2_loss(tf.cast(gradient, dtype))  # no buffer for the squares

    def multiply(self, gradient, factor):
        if isinstance(gradient, tf.IndexedSlices):
            values = super().multiply(gradient.values, factor)
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return super().multiply(gradient, factor)

    def add(self, weight, gradient, scale):
        if isinstance(gradient, tf.IndexedSlices):
            rows = tf.gather(scale, gradient.indices) if scale.shape.rank else scale
            indices = gradient.indices[:, tf.newaxis]
            return tf.tensor_scatter_nd_add(weight, indices, rows * gradient.values)
        return super().add(weight, gradient, scale)

    def compile(self, function, model):
        return tf.function(function, autograph=False)

    def differentiate(self, loss, weights):
        with _refuse_reads(loss.variables, _UNREACHED):
            (value, _), gradients = _record(loss, weights, [True] * len(weights))
        return value, [tf.convert_to_tensor(g) for g in gradients]

    def multiply_by_hessian(self, loss, weights, vectors):
        try:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                _, gradients = self.differentiate(loss, weights)
                _refuse_moments()
                along = tf.add_n(
                    [tf.reduce_sum(g * v) for g, v in zip(gradients, vectors)]
                )
            found = tape.gradient(along, weights)
        except LookupError as error:
            raise NoSecondDerivative(str(error)) from error
        if all(product is None for product in found):
            raise NoSecondDerivative("the gradient does not depend on any weight")
        return [
            tf.zeros_like(w) if product is None else tf.convert_to_tensor(product)
            for w, product in zip(weights, found)
        ]


def _refuse_moments():
    """Raises if the graph has `tf.nn.moments`, as in LayerNormalization.

    It stops the gradient at the mean. That does not change the first derivative, but
    the second would be wrong without an error.
    """
    if tf.executing_eagerly():
        raise NoSecondDerivative("whether there is one cannot be seen in eager code")
    graph = tf.compat.v1.get_default_graph().as_graph_def()
    called = (node for f in graph.library.function for node in f.node_def)
    for node in (*graph.node, *called):
        if names.STOPPED_MEAN in node.name:
            raise NoSecondDerivative(
                f"`tf.nn.moments` stops the gradient of the mean, in {node.name!r}"
            )


_UNREACHED = (
    "Other values do not reach it there. Remove the `tf.function`, or call "
    "`tf.config.run_functions_eagerly(True)`."
)


@contextlib.contextmanager
def _refuse_reads(variables, why):
    """Context that raises if its code reads the values of variables themselves."""
    with names.VariableWatcher() as watcher:
        yield
    read = {id(v) for v in watcher.watched_variables()}
    for variable in variables:
        if id(variable.value) in read:
            raise ValueError(
                f"The weight {variable.path!r} is read by a `tf.function` that a "
                f"layer or the loss calls, or in another way that bypasses Keras. {why}"
            )


def _record(loss_fn, weights, wanted):
    """Returns `((loss, aux), gradients)`, from a tape that watches wanted weights only.

    Args:
        loss_fn: `Loss`.
        weights: List of `tf.Variable`s or tensors that the loss reads.
        wanted: List of bool.
    """
    watched = [w for w, on in zip(weights, wanted) if on]
    found = []

    def differentiate(loss):
        gradients = tape.gradient(loss, watched, None, tf.UnconnectedGradients.ZERO)
        found.extend(map(_sum_duplicates, gradients))

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        value = loss_fn(weights, differentiate)
    found = iter(found)
    return value, [next(found) if on else None for on in wanted]


def _sum_duplicates(gradient):
    """Sums rows with the same index into one of them, and sets the others to 0.

    Otherwise squares of rows, in a norm or in an optimizer's moments, would be wrong.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices = gradient.indices
    owners = tf.tensor_scatter_nd_update(
        tf.zeros(gradient.dense_shape[:1], tf.int32),
        indices[:, tf.newaxis],
        tf.range(tf.size(indices)),
    )
    values = tf.math.unsorted_segment_sum(
        gradient.values, tf.gather(owners, indices), num_segments=tf.size(indices)
    )
    return tf.IndexedSlices(values, indices, gradient.dense_shape)
