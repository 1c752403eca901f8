"""Sparse gradients on TensorFlow, in the graph of a step or eagerly.

A step is traced once for all masks, so its graph holds the work of every gradient;
`tensorflow_graph` puts it under conditions. Run eagerly, the tape watches the active
weights only.
"""

import contextlib
import contextvars
import threading
import unittest.mock

import keras
import tensorflow as tf

from keras_slsam.gradients import tensorflow_graph

no_grad = contextlib.nullcontext
can_compile = True
init_scope = tf.init_scope


# Held while a name of TensorFlow's is replaced.
_ONE_THREAD = threading.RLock()


def concrete(mask):
    """The entries of `mask`: bools if run eagerly, else scalar tensors."""
    return mask.numpy().tolist() if tf.executing_eagerly() else tf.unstack(mask)


class Passes:
    """The two passes of a step: one loss and its gradients, at two sets of weights.

    Args:
        loss_fn: Pure function from a list of tensors to `(loss, aux)` with a scalar
            `loss` and any structure `aux`.
        arms: List of int, the arm of each weight.
        active: List with one entry an arm: bools, or scalar boolean tensors of
            the surrounding graph, of which at least one is true.
        twice: bool, whether there may be a second pass.
        jit_compile: bool, whether XLA compiles the surrounding graph.

    Raises:
        ValueError: with several replicas, whose gradients would have to be exchanged.
    """

    def __init__(self, loss_fn, arms, active, twice=True, jit_compile=False):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                "Sharpness-aware steps under a `tf.distribute` strategy are not "
                f"supported yet. Received: {replicas} replicas. Train on one device."
            )
        if twice and all(on is True for on in active) and not tf.executing_eagerly():
            # Dense, but what hangs on no weight, like noise, is not done twice.
            arms, active = [0] * len(arms), [tf.constant(True)]
        self._loss_fn = loss_fn
        self._arms = arms
        self._active = active
        self._twice = twice
        self._jit_compile = jit_compile
        self._known = all(isinstance(on, bool) for on in active)

    def first(self, weights):
        """Value of the loss and the gradients of the active weights.

        Args:
            weights: List of tensors to differentiate at.

        Returns:
            `((loss, aux), gradients)`. The gradient of an active weight that the loss
            does not reach is zero, that of an inactive weight `None` if `active` holds
            bools and zero otherwise. Those of embeddings are `tf.IndexedSlices`.
        """
        if self._known:
            wanted = [self._active[arm] for arm in self._arms]
            return _record(self._loss_fn, weights, wanted)
        self._trace(weights)
        return self._results(self._program.run(weights), weights)

    def second(self, weights):
        """The gradients at other values of the active weights.

        Keras' random numbers are functions of seeds, its state, and the same again.
        Those of TensorFlow's own stateful operations cannot be repeated.

        Args:
            weights: List of tensors, the inactive ones those of the first pass.

        Returns:
            List like the gradients of `first`.
        """
        if self._known:
            return self.first(weights)[1]
        return self._results(self._program.run_again(weights), weights)[1]

    def _trace(self, weights):
        wanted = [True] * len(weights)
        traced = tf.function(
            lambda weights: _record(self._loss_fn, weights, wanted), autograph=False
        ).get_concrete_function(weights)
        self._outputs = value, gradients = traced.structured_outputs

        everyone = (1 << len(self._active)) - 1
        needs = [(t, everyone) for t in tf.nest.flatten(value, True) if tf.is_tensor(t)]
        own = [1 << arm for arm in self._arms]
        for weight, arms, gradient in zip(weights, own, gradients):
            if isinstance(gradient, tf.IndexedSlices):
                gradient.values.set_shape([None, *weight.shape[1:]])
                needs += [(gradient.values, arms), (gradient.indices, arms)]
            else:
                gradient.set_shape(weight.shape)
                needs.append((gradient, arms))
        self._program = tensorflow_graph.Program(
            traced, own, needs, self._active, self._twice, self._jit_compile
        )

    def _results(self, tensors, weights):
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


def read(variable):
    """The value of a `keras.Variable` as a tensor."""
    return tf.convert_to_tensor(variable.value)


def own_parameters(model, variables):
    """Nothing: all layers read their weights as Keras variables."""
    return lambda weights: contextlib.nullcontext(), lambda: None


# Whether what is traced now is the trace of `build_first`.
_builds = contextvars.ContextVar("builds", default=False)


def put_back_generators(variables):
    """Nothing: Keras' generators are variables."""
    return contextlib.nullcontext()


def after(*structures):
    """Context whose operations run after those that give the tensors in a graph.

    And after the graph's checks, like `tf.debugging.assert_equal`, which give none.

    Args:
        *structures: Structures of tensors.
    """
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    tensors = [t for t in tf.nest.flatten(structures, True) if tf.is_tensor(t)]
    checks = [
        op
        for op in tf.compat.v1.get_default_graph().get_operations()
        if op.type in ("Assert", "If")
    ]
    return tf.control_dependencies([tf.group(*tensors, *checks)])


def only_builds():
    """Whether this step is taken for the variables that it makes, and not executed."""
    return _builds.get()


def build_first(model, train_function):
    """A train function that makes variables before it is traced.

    A `tf.function` that makes variables is traced twice. So they are made in a trace of
    its own, of steps without gradients and updates.

    Args:
        model: `keras.Model`.
        train_function: Function of an iterator over batches.

    Returns:
        Function like `train_function`.
    """
    pending = True

    def call(iterator):
        nonlocal pending
        if pending and _is_traced(model, iterator):
            token = _builds.set(True)
            try:
                step = tf.function(model.train_step, autograph=False)
                step.get_concrete_function(iterator.element_spec)
            finally:
                _builds.reset(token)
        pending = False
        return train_function(iterator)

    return call


def _is_traced(model, iterator):
    """Whether the train step gets what the iterator over batches gives, in a graph."""
    if model.run_eagerly or tf.config.functions_run_eagerly():
        return False
    if not isinstance(iterator, tf.data.Iterator):
        return False
    specs = tf.nest.flatten(iterator.element_spec)
    return not any(isinstance(spec, tf.OptionalSpec) for spec in specs)


def when(active, update):
    """Runs `update()`, which assigns to Keras variables, if `active`.

    Args:
        active: bool or scalar boolean tensor.
        update: Function without arguments; what it returns is ignored.
    """
    if not isinstance(active, bool):
        # Both branches give nothing, whatever `update` returns.
        tf.cond(active, lambda: [update()] and None, lambda: None)
    elif active:
        update()


def squared_sum(gradient):
    """Sum of the squares of the entries of `gradient`, at least in float32."""
    dtype = keras.backend.result_type(gradient.dtype.name, "float32")
    if isinstance(gradient, tf.IndexedSlices):
        gradient = gradient.values
    return 2 * tf.nn.l2_loss(tf.cast(gradient, dtype))  # no buffer for the squares


def multiply(gradient, factor):
    """`factor * gradient`, for a scalar `factor`; `tf.IndexedSlices` stay such."""
    factor = tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * factor
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * factor


def add(weight, gradient, scale):
    """`weight + scale * gradient`, a new tensor.

    Args:
        weight: Tensor.
        gradient: Tensor of the shape of `weight`, or `tf.IndexedSlices`.
        scale: Scalar tensor, or one of the shape of `weight`.

    Returns:
        Tensor of the shape of `weight`.
    """
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.gather(scale, gradient.indices) if scale.shape.rank else scale
        indices = gradient.indices[:, tf.newaxis]
        return tf.tensor_scatter_nd_add(weight, indices, rows * gradient.values)
    return weight + scale * gradient


def _record(loss_fn, weights, wanted):
    """Value and gradients, by a tape that watches the wanted weights only."""
    # A tape knows tensors: two weights may be the same one, until copied.
    weights = [tf.identity(w) for w in weights]
    watched = [w for w, on in zip(weights, wanted) if on]
    refused = unittest.mock.patch.object(tf, "recompute_grad", _refuse_recomputation)
    with tf.GradientTape(watch_accessed_variables=False) as tape, _ONE_THREAD, refused:
        tape.watch(watched)
        loss, aux = loss_fn(weights)
    found = tape.gradient(loss, watched, None, tf.UnconnectedGradients.ZERO)
    found = map(_sum_duplicates, found)
    return (loss, aux), [next(found) if on else None for on in wanted]


def _refuse_recomputation(function):
    """Stands in for `tf.recompute_grad`, which differentiates by variables only."""
    raise ValueError(
        "Rematerialisation (`keras.remat`, `keras.RematScope`) is not supported on the "
        f"TensorFlow backend: the gradients of {function!r} would be lost. Leave it "
        "out, or use another backend."
    )


def _sum_duplicates(gradient):
    """Rows of the same index add up in the place of one, the others become 0.

    Squares of rows, in a norm or in an optimizer's moments, are right only then.
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
