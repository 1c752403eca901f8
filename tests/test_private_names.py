"""Private names, and names that are only looked up. A test fails if one changes."""

import keras
import numpy as np
import pytest

BACKEND = keras.config.backend()

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="JAX's names")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's names")


@on_jax
def test_calls_are_distinguished_from_other_equations():
    import jax
    from jax import numpy as jnp
    from jax.extend import core

    from keras_slsam.gradients import jax_graph

    @jax.custom_vjp
    def scaled(x):
        return 2 * x

    scaled.defvjp(lambda x: (2 * x, None), lambda _, gradient: (2 * gradient,))

    def summed(x):
        add = jax.checkpoint(lambda x: x + jnp.sin(x))
        return jax.lax.scan(lambda total, y: (add(total) * y, None), x, jnp.ones(3))[0]

    def function(x):
        return jax.checkpoint(summed)(scaled(jax.jit(jnp.tanh)(x)))

    closed = jax.make_jaxpr(jax.value_and_grad(function))(1.0)
    assert jax_graph.CALLS.keys() <= {e.primitive.name for e in closed.jaxpr.eqns}
    equations, _, _ = jax_graph.inline(closed, closed.jaxpr.invars)
    kinds = core.Jaxpr, core.ClosedJaxpr
    with_body = [
        equation.primitive.name
        for equation in equations
        if any(isinstance(value, kinds) for value in equation.params.values())
    ]
    assert set(with_body) == {"scan"}


def types_of(function, *args):
    """Returns the types of the operations of a function, and its graph."""
    import tensorflow as tf

    graph = tf.function(function, autograph=False).get_concrete_function(*args).graph
    return {op.type for op in graph.get_operations()}, graph


@on_tensorflow
def test_operations_of_tensorflow_exist():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    known = {*names.SHAPES, *names.VIEWS, *names.SIZED_BY_SIZES, *names.CHECKS}
    missing = [n for n in {*known, names.READ} if not hasattr(tf.raw_ops, n)]
    assert not missing


@on_tensorflow
def test_operations_of_tensorflow_have_the_expected_names():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    x = tf.TensorSpec([None, 3])
    rank = tf.TensorSpec(None)
    assert names.SHAPES & types_of(lambda x: (tf.shape(x), tf.size(x)), x)[0]
    assert "Rank" in types_of(tf.rank, rank)[0]
    views = [
        tf.identity,
        lambda x: tf.reshape(x, [-1]),
        lambda x: tf.expand_dims(x, 0),
        lambda x: tf.squeeze(x[None], 0),
    ]
    found = [names.VIEWS & types_of(view, x)[0] for view in views]
    assert set().union(*found) == names.VIEWS
    assert names.CONSTANT in types_of(lambda: tf.constant(2.0) + 1)[0]
    variable = tf.Variable(1.0)
    assert names.READ in types_of(lambda: variable + 1)[0]
    check = types_of(lambda x: [tf.debugging.assert_positive(x)] and x, x)[0]
    assert names.CHECKS & check


@on_tensorflow
def test_attributes_of_tensorflow_have_the_expected_names():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    variable = tf.Variable(1.0)

    def beside():
        first = tf.constant(1.0)
        with tf.compat.v1.colocate_with(first.op, ignore_existing=True):
            return tf.constant(2.0, name="second")

    _, graph = types_of(beside)
    assert names.COLOCATION in graph.get_operation_by_name("second").node_def.attr
    inner = tf.function(lambda: variable + 1.0)
    _, graph = types_of(lambda: inner())
    (call,) = [op for op in graph.get_operations() if "Call" in op.type]
    assert list(call.get_attr(names.READ_ONLY)) == [0]


@on_tensorflow
def test_graphs_of_functions_are_distinguished_from_loops():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    kinds = []

    def note(x):
        kinds.append(type(tf.compat.v1.get_default_graph()) is names.FuncGraph)
        return x

    types_of(lambda x: tf.while_loop(lambda x: x < 3.0, note, [note(x)]), 1.0)
    assert kinds == [True, False]


@on_tensorflow
def test_anonymous_variables_are_distinct():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    handles = [
        tf.raw_ops.VarHandleOp(
            dtype=tf.float32, shape=[], shared_name=names.anonymous_name()
        )
        for _ in range(2)
    ]
    for i, handle in enumerate(handles):
        tf.raw_ops.AssignVariableOp(resource=handle, value=float(i))
    values = [
        tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32)
        for handle in handles
    ]
    np.testing.assert_array_equal(values, [0.0, 1.0])


@on_tensorflow
def test_the_watcher_sees_variables_that_are_read():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    read, other = tf.Variable(1.0), tf.Variable(2.0)
    with names.VariableWatcher() as watcher:
        tf.function(lambda: read + 1.0)()
    found = {id(v) for v in watcher.watched_variables()}
    assert id(read) in found and id(other) not in found


def test_the_list_of_a_models_own_metrics():
    model, metric = keras.Sequential([keras.layers.Dense(1)]), keras.metrics.Mean()
    model._metrics.append(metric)
    assert model.metrics == [metric]
    model._metrics.remove(metric)
    assert model.metrics == []


@on_tensorflow
def test_moments_have_the_expected_name():
    import tensorflow as tf

    from keras_slsam.gradients import tensorflow_names as names

    _, graph = types_of(lambda x: tf.nn.moments(x, [-1]), tf.TensorSpec([2, 3]))
    found = [op.type for op in graph.get_operations() if names.STOPPED_MEAN in op.name]
    assert found == ["StopGradient"]


@on_jax
def test_whether_jax_dispatches_asynchronously_can_be_read():
    import jax

    assert jax.config.values["jax_cpu_enable_async_dispatch"] in (True, False)
