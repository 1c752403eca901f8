"""The second pass does again what may hang on more than its inputs show."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_slsam import gradients as backend
from keras_slsam.loss import Loss

BACKEND = keras.config.backend()
WIDTH = 4


def check_second_pass(layer, compile_step):
    """Compares a second pass with a first one at the same weights."""
    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(WIDTH, use_bias=False),
            layer,
            layers.Dense(WIDTH, use_bias=False),
            layers.Dense(1, use_bias=False),
        ]
    )
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(rng.normal(size=(8, WIDTH)), dtype="float32")
    y = ops.convert_to_tensor(rng.normal(size=(8, 1)), dtype="float32")
    variables = model.trainable_variables

    def run(mask):
        weights = [backend.read(v) for v in variables]
        active = backend.concrete(mask)
        perturbed = [
            w + 0.5 * ops.cast(mask[i], w.dtype) * ops.cos(w)
            for i, w in enumerate(weights)
        ]

        def passes():
            loss_fn = Loss(model, variables, x, y, None)
            return backend.Passes(loss_fn, [0, 1, 2], active)

        twice = passes()
        twice.first(weights)
        found = twice.second(perturbed)
        _, expected = passes().first(perturbed)
        return [g for g in found if g is not None], [
            g for g in expected if g is not None
        ]

    run = compile_step(run)
    for mask in ([True, False, False], [True, False, True], [False, False, True]):
        found, expected = run(ops.convert_to_tensor(mask))
        for gradient, fresh in zip(found, expected):
            np.testing.assert_allclose(
                ops.convert_to_numpy(gradient),
                ops.convert_to_numpy(fresh),
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's effects")
def test_a_layer_with_an_effect_and_no_result(compile_step):
    import jax

    seen = []

    class Watched(layers.Layer):
        def call(self, x):
            jax.debug.callback(lambda value: seen.append(float(value)), x[0, 0])
            return 2.0 * x

    check_second_pass(Watched(), compile_step)
    jax.effects_barrier()
    assert len(seen) == 3 * 3  # in every pass


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's variables")
def test_data_that_go_through_a_variable_of_tensorflow(compile_step):
    import tensorflow as tf

    class Stored(layers.Layer):
        def build(self, input_shape):
            with tf.init_scope():
                self.store = tf.Variable(tf.zeros((8, WIDTH)))

        def call(self, x):
            self.store.assign(x)
            return x + tf.stop_gradient(self.store.read_value())

    check_second_pass(Stored(), compile_step)
