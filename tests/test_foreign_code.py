"""Code that reads weights with its framework's API trains as in Keras."""

import functools
import inspect
import threading

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_slsam

BACKEND = keras.config.backend()
TINY = 1e-6

on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="TensorFlow's variables"
)


class Weighted(layers.Layer):
    """Multiplies rows by a matrix."""

    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(input_shape[-1], 5), name="matrix")

    def call(self, x):
        return self.product(x)

    def product(self, x):
        return ops.tanh(ops.matmul(x, self.matrix))


class Mapped(Weighted):
    def call(self, x):
        return ops.map(lambda row: self.product(row[None])[0], x)


class Vectorized(Weighted):
    def call(self, x):
        return ops.vectorized_map(lambda row: self.product(row[None])[0], x)


class Branched(Weighted):
    def call(self, x):
        positive = ops.sum(x) > -1e9
        return ops.cond(positive, lambda: self.product(x), lambda: -self.product(x))


class Remat(Weighted):
    def call(self, x):
        return keras.remat(self.product)(x)


class Recomputed(Weighted):
    def call(self, x):
        import tensorflow as tf

        return tf.recompute_grad(self.product)(x)


class Traced(Weighted):
    def build(self, input_shape):
        import tensorflow as tf

        super().build(input_shape)
        self.function = tf.function(self.product)

    def call(self, x):
        return self.function(x)


class Custom(Weighted):
    def call(self, x):
        import tensorflow as tf

        @tf.custom_gradient
        def product(x):
            def gradient(upstream, variables):
                (matrix,) = variables
                of_x = tf.matmul(upstream, matrix, transpose_b=True)
                return of_x, [tf.matmul(x, upstream, transpose_a=True)]

            return tf.matmul(x, tf.convert_to_tensor(self.matrix)), gradient

        return ops.tanh(product(x))


class Kept(Weighted):
    def build(self, input_shape):
        super().build(input_shape)
        self.kept = [self.matrix.value]

    def call(self, x):
        return ops.tanh(ops.matmul(x, self.kept[0]))


class Gathered(Weighted):
    def call(self, x):
        import tensorflow as tf

        rows = tf.gather(self.matrix.value, range(x.shape[-1]))
        return ops.tanh(tf.matmul(x, rows))


class Penalised(keras.Model):
    """Adds the squared gradient of the loss to the loss."""

    def __init__(self, wanted):
        super().__init__()
        self.first, self.last = layers.Dense(5, activation="tanh"), layers.Dense(1)
        self.wanted = wanted

    def call(self, x):
        return self.last(self.first(x))

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        with tf.GradientTape() as tape:
            tape.watch(x)
            inner = ops.mean(ops.square(self(x) - y))
        sources = [x] if self.wanted == "inputs" else self.trainable_variables
        if self.wanted == "values":
            sources = [v.value for v in sources]
        found = tape.gradient(
            inner, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return loss + 0.1 * sum(ops.sum(ops.square(g)) for g in found)


X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


def trained(make, optimizer, steps=3, **compile_kwargs):
    keras.utils.set_random_seed(0)
    model = make()
    model(X)
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss="mse", **compile_kwargs)
    for _ in range(steps):
        model.train_on_batch(X, 3 * X[:, :1])
    return model.get_weights()


def around(cls):
    """Returns a model around a layer, traced before it is trained, as usual."""
    dense = functools.partial(layers.Dense, use_bias=False)
    return lambda: keras.Sequential([keras.Input((4,)), dense(4), cls(), dense(1)])


def assert_same(found, expected):
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


EVERYWHERE = [Mapped, Vectorized, Branched]
TENSORFLOW = [Remat, Recomputed, Traced, Custom, Kept, Gathered]
REFUSED_EAGERLY = [Traced, Kept, Vectorized]


def marked(classes):
    mine = [
        c if c in EVERYWHERE else pytest.param(c, marks=on_tensorflow) for c in classes
    ]
    return pytest.mark.parametrize("cls", mine)


def optimizers(rho):
    sgd = keras.optimizers.SGD
    return {
        "sam": keras_slsam.SAM(sgd(0.1), rho=rho),
        "s2sam": keras_slsam.S2SAM(sgd(0.1), rho=rho),
        "slsam": keras_slsam.SLSAM(
            sgd(0.1), rho=rho, active_fraction=0.5, arms="layer", seed=0
        ),
    }


@marked(EVERYWHERE + TENSORFLOW)
def test_weights_read_with_framework_code_train_as_in_keras(cls):
    found = trained(around(cls), optimizers(TINY)["sam"], jit_compile=False)
    assert_same(found, of_keras())


@functools.cache
def of_keras():
    # Of the usual layer: with `Custom`, Keras' own step on TensorFlow may read a weight
    # in the backward pass after it was updated.
    return trained(around(Weighted), keras.optimizers.SGD(0.1), jit_compile=False)


@marked(EVERYWHERE + TENSORFLOW)
@pytest.mark.parametrize("method", ["slsam", "s2sam"])
def test_weights_read_with_framework_code_are_perturbed(cls, method):
    """With and without inactive arms, results equal those of the usual layer."""
    found = trained(around(cls), optimizers(0.5)[method], jit_compile=False)
    assert_same(found, of_the_usual_layer(method))


@functools.cache
def of_the_usual_layer(method):
    return trained(around(Weighted), optimizers(0.5)[method], jit_compile=False)


@on_tensorflow
@marked([c for c in TENSORFLOW + [Branched, Mapped] if c not in REFUSED_EAGERLY])
def test_weights_read_with_framework_code_eagerly(cls):
    found = trained(around(cls), optimizers(0.5)["slsam"], run_eagerly=True)
    assert_same(found, of_the_usual_layer("slsam"))


@on_tensorflow
@pytest.mark.parametrize("cls", REFUSED_EAGERLY)
def test_functions_that_would_read_unperturbed_weights_are_refused(cls):
    model = keras_slsam.sharpness_aware(around(cls)())
    model.compile(optimizer=optimizers(0.5)["sam"], loss="mse", run_eagerly=True)
    before = model.get_weights()
    with pytest.raises(ValueError, match="matrix' is read by a `tf.function`"):
        model.train_on_batch(X, X[:, :1])
    assert_same(model.get_weights(), before)
    model.compile(optimizer=optimizers(0.5)["sam"], loss="mse")
    model.train_on_batch(X, X[:, :1])


@on_tensorflow
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("wanted", ["inputs", "variables", "values"])
def test_inner_tapes(wanted, eager):
    def make():
        return Penalised(wanted)

    kwargs = {"run_eagerly": eager, "jit_compile": False}
    expected = trained(make, keras.optimizers.SGD(0.1), 2, **kwargs)
    assert_same(trained(make, optimizers(TINY)["sam"], 2, **kwargs), expected)


@on_tensorflow
def test_a_custom_function_is_unchanged_after_a_step():
    model = keras_slsam.sharpness_aware(around(Traced)())
    model.compile(optimizer=optimizers(0.5)["slsam"], loss="mse", jit_compile=False)
    layer = model.layers[1]
    model.train_on_batch(X, X[:, :1])
    model.layers[1].matrix.assign(np.ones((4, 5)))
    np.testing.assert_allclose(
        layer.function(ops.convert_to_tensor(X)),
        np.tanh(X @ np.ones((4, 5))),
        rtol=1e-4,
    )


@on_tensorflow
def test_a_layer_that_assigns_in_its_own_function_is_refused():
    import tensorflow as tf

    class Noisy(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = layers.Dropout(0.5)

        @tf.function
        def call(self, x, training=False):
            return self.dropout(x, training=training)

    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Noisy()])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizers(0.5)["sam"], loss="mse", jit_compile=False)
    with pytest.raises(ValueError, match="seed_generator_state.* is assigned"):
        model.train_on_batch(X, X)


@on_tensorflow
def test_another_thread_recomputes_during_a_step():
    import tensorflow as tf

    found = []

    def recompute():
        x = tf.constant(3.0)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.recompute_grad(tf.square)(x)
        found.append(float(tape.gradient(y, x)))

    class Starts(layers.Layer):
        def call(self, x):
            thread = threading.Thread(target=recompute)
            thread.start()
            thread.join()
            return x

    trained(around(Starts), optimizers(0.5)["sam"], 1, jit_compile=False)
    assert found and set(found) == {6.0}


@on_tensorflow
def test_a_custom_loop_runs_code_as_it_is_written():
    """As in `fit`. AutoGraph would take seconds to convert all that a step calls."""
    import tensorflow as tf

    files = []

    class Along(keras_slsam.ascents.Ascent):
        def direction(self, index, gradient):
            return gradient

        def update(self, index, gradient):
            files.append(inspect.currentframe().f_code.co_filename)

    model, optimizer = around(Weighted)(), keras_slsam.SAM("sgd", ascent=Along())
    model.compile(loss="mse")
    optimizer.build(model.trainable_variables)
    step = tf.function(lambda x: keras_slsam.step(model, optimizer, (x, x[:, :1])))
    step(ops.convert_to_tensor(X))
    assert files and set(files) == {__file__}
