"""Sparse gradients equal the dense ones for active arms, and do not exist otherwise."""

import re

import keras
import numpy as np
import pytest
import zoo
from keras import layers
from keras import ops

from keras_slsam.gradients import backend
from keras_slsam.loss import Loss

BACKEND = keras.config.backend()


def make_function(name, arms_of, compile_step):
    """Returns a compiled function of a mask, and the arms.

    The function returns `(loss, gradients, aux)`.
    """
    model, x, y = zoo.build(name)
    model.compile(loss=zoo.loss())
    variables = model.trainable_variables
    model.evaluate(x, y, verbose=0)
    arms = arms_of(len(variables))

    def run(mask):
        keras.utils.set_random_seed(0)  # PyTorch's unseeded dropout
        inputs = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
        loss_fn = Loss(model, variables, *inputs, None)
        weights = [backend.read(v) for v in variables]
        active = backend.concrete(mask) if mask is not None else [True] * len(arms)
        (loss, _), gradients = backend.Passes(loss_fn, arms, active).first(weights)
        return loss, [
            ops.zeros_like(w)
            if g is None
            else backend.add(ops.zeros_like(w), g, ops.ones((), w.dtype))
            for w, g in zip(weights, gradients)
        ]

    return compile_step(run), arms


def one_each(count):
    return list(range(count))


def pairs(count):
    return [i // 2 for i in range(count)]


# Arms of several weights work in the same way in all models, so two models test them.
@pytest.mark.parametrize(
    ("name", "arms_of"),
    [
        *((name, one_each) for name in zoo.MODELS),
        *((name, pairs) for name in ("attention", "tied")),
    ],
)
def test_active_gradients_equal_the_dense_ones(name, arms_of, compile_step):
    sparse, arms = make_function(name, arms_of, compile_step)
    dense, _ = make_function(name, arms_of, lambda run: compile_step(lambda: run(None)))
    loss, expected = dense()
    expected = [ops.convert_to_numpy(gradient) for gradient in expected]
    rng = np.random.default_rng(0)
    num_arms = max(arms) + 1
    masks = [rng.random(num_arms) < share for share in (0.3, 0.6)]
    masks += [np.arange(num_arms) == arm for arm in (0, num_arms - 1)]
    masks.append(np.ones(num_arms, bool))
    for mask in masks:
        if not mask.any():
            continue
        sparse_loss, gradients = sparse(ops.convert_to_tensor(mask))
        np.testing.assert_allclose(float(sparse_loss), float(loss), rtol=1e-5)
        for gradient, dense_gradient, arm in zip(gradients, expected, arms):
            np.testing.assert_allclose(
                ops.convert_to_numpy(gradient),
                dense_gradient * mask[arm],
                rtol=1e-4,
                atol=2e-6,
            )


def test_one_trace_serves_all_masks(compile_step):
    function, arms = make_function("attention", one_each, compile_step)
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = rng.random(len(arms)) < 0.3
        mask[0] = True
        function(ops.convert_to_tensor(mask))
    assert compile_step.traces(function) <= 1


def test_an_inactive_update_changes_no_bit(compile_step):
    variable = keras.Variable(np.float32([1.1, 2.2]))
    other = keras.Variable(np.float32([3.3]))

    def run(mask):
        for on, step in zip(backend.concrete(mask), (10.0, 100.0)):
            backend.when(on, lambda step=step: variable.assign(variable + step * other))

    run = compile_step(run, [variable, other])
    before = ops.convert_to_numpy(variable).copy()
    run(ops.convert_to_tensor([False, False]))
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), before)
    run(ops.convert_to_tensor([True, False]))
    np.testing.assert_allclose(ops.convert_to_numpy(variable), before + 33.0)
    run(ops.convert_to_tensor([False, True]))
    np.testing.assert_allclose(ops.convert_to_numpy(variable), before + 363.0)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's literals")
def test_gradients_may_be_constants(compile_step):
    weights = [ops.ones(()), ops.ones(()), ops.ones((2,))]

    @compile_step
    def run(mask):
        loss_fn = lambda weights: (weights[0] + 2.0, ())  # noqa: E731
        passes = backend.Passes(loss_fn, one_each(3), backend.concrete(mask))
        return passes.first(weights)[1], passes.second(weights)[1]

    for mask in ([True, True, False], [False, False, True]):
        for gradients in run(ops.convert_to_tensor(mask)):
            expected = [np.float32(mask[0]), np.float32(0.0), np.zeros(2, "float32")]
            for gradient, value in zip(gradients, expected):
                np.testing.assert_array_equal(gradient, value)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's IndexedSlices")
def test_embedding_gradients_stay_sparse():
    import tensorflow as tf

    model, x, y = zoo.build("attention")
    model.compile(loss=zoo.loss())
    variables = model.trainable_variables
    kinds = []

    @tf.function
    def run(mask):
        loss_fn = Loss(model, variables, x, y, None)
        weights = [backend.read(v) for v in variables]
        arms = list(range(len(weights)))
        active = backend.concrete(mask)
        _, gradients = backend.Passes(loss_fn, arms, active).first(weights)
        kinds.extend(type(gradient) for gradient in gradients)
        return gradients[0], backend.squared_sum(gradients[0])

    mask = [True] + [False] * (len(variables) - 1)
    gradient, squared = run(tf.constant(mask))
    assert kinds[0] is tf.IndexedSlices
    # Tokens occur more than once, so their rows are added up before they are squared.
    assert len(np.unique(x)) < x.size
    dense = tf.convert_to_tensor(gradient).numpy()
    np.testing.assert_allclose(float(squared), (dense**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_squares_are_summed_in_float32_or_better(dtype, float64, monkeypatch):
    monkeypatch.undo()  # Keras' table as it is; on JAX x64 stays switched on
    value, count = (1e25, 4) if dtype == "float64" else (256.0, 3)
    gradient = ops.convert_to_tensor(np.full(count, value), dtype=dtype)
    found = backend.squared_sum(gradient)
    expected = "float64" if dtype == "float64" else "float32"
    assert keras.backend.standardize_dtype(found.dtype) == expected
    assert float(found) == pytest.approx(count * value**2)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own random numbers")
def test_stateful_operations_run_once(compile_step):
    import tensorflow as tf

    seen = []

    variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0, 4.0])]

    def function(weights):
        scale = tf.random.uniform([])
        tf.numpy_function(lambda n: seen.append(int(n)), [tf.shape(weights[0])[0]], [])
        return scale * tf.reduce_sum(weights[0] * weights[1])

    def run(mask):
        loss_fn = zoo.loss_of(function, variables)
        passes = backend.Passes(loss_fn, [0, 1], backend.concrete(mask), twice=False)
        return passes.first([backend.read(v) for v in variables])

    (loss, _), (first, second) = compile_step(run)(tf.constant([True, False]))
    scale = float(loss) / 11
    np.testing.assert_allclose(first, [3 * scale, 4 * scale], rtol=1e-6)
    np.testing.assert_array_equal(second, [0, 0])
    assert seen == [2]


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's layout")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", ["Conv1D", "Conv2D", "Conv3D", "DepthwiseConv2D"])
def test_convolutions_have_the_layout_of_the_fast_kernel(kind, data_format):
    import jax

    rank = int(kind[-2])
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((9,) * (rank + 1))])
    for _ in range(2):
        convolve = getattr(layers, kind)
        count = () if kind.startswith("Depthwise") else (9,)
        layer = convolve(*count, kernel_size=3, data_format=data_format)
        model.add(layer)
    model.compile(loss="mse")
    x = rng.normal(size=(5, *model.input_shape[1:])).astype("float32")
    y = rng.normal(size=(5, *model.output_shape[1:])).astype("float32")
    variables = model.trainable_variables
    weights = [backend.read(v) for v in variables]
    arms = one_each(len(weights))
    loss_fn = Loss(model, variables, x, y, None)

    @jax.jit
    def sparse(mask):
        active = backend.concrete(mask)
        return backend.Passes(loss_fn, arms, active).first(weights)

    mask = np.array([True, False, True, True])
    compiled = sparse.lower(mask).compile()
    orders = re.findall(r" convolution\(.*dim_labels=([\w>-]+)", compiled.as_text())
    assert len(orders) >= 3  # one gradient of the input, two of the weights
    digits = "".join(map(str, range(rank)))
    assert set(orders) == {f"b{digits}f_{digits}io->b{digits}f"}

    _, expected = backend.Passes(loss_fn, arms, [True] * len(arms)).first(weights)
    _, found = compiled(mask)
    for gradient, dense_gradient, on in zip(found, expected, mask):
        np.testing.assert_allclose(gradient, dense_gradient * on, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="others plan buffers in advance")
def test_activations_of_inactive_arms_are_not_kept():
    import torch

    width, batch = 64, 128
    model = keras.Sequential([keras.Input((width,))])
    for _ in range(4):
        model.add(keras.layers.Dense(width, use_bias=False))
    model.compile(loss="mse")
    x = y = torch.ones(batch, width)
    variables = model.trainable_variables
    weights = [backend.read(v) for v in variables]
    own = {w.data_ptr() for w in weights}

    def kept(active):
        tensors = {}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                tensors[tensor.data_ptr()] = tensor.numel()
            return tensor

        loss_fn = Loss(model, variables, x, y, None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backend.Passes(loss_fn, [0, 1, 2, 3], active).first(weights)
        return sum(tensors.values()) / (batch * width)

    loss_only = kept([False, False, False, True]) - 1  # the last layer's input
    assert kept([False, True, False, False]) - loss_only <= 1.01
    assert kept([True] * 4) - loss_only >= 3.99
