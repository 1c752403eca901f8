"""Sparse gradients equal the dense ones for active arms, and do not exist otherwise."""

import re

import keras
import numpy as np
import pytest
import zoo
from keras import layers
from keras import ops

from keras_slsam.active_arms import ActiveArms
from keras_slsam.gradients import backend
from keras_slsam.loss import Loss

BACKEND = keras.config.backend()


def of_unknown_size(batch):
    """Returns data as in `fit` on TensorFlow, where the last batch may be smaller."""
    if BACKEND != "tensorflow":
        return batch
    import tensorflow as tf

    shape = [None, *batch.shape[1:]]
    return tf.compat.v1.placeholder_with_default(batch, shape)


def functions(model, x, y, compile_step, arms=None):
    """Returns a compiled function of a mask, and one of weights.

    The first takes both passes of a step, and returns the perturbed weights and the
    losses with gradients. The other takes one dense pass.
    """
    variables = model.trainable_variables
    arms = arms or list(range(len(variables)))
    members = [np.flatnonzero(np.equal(arms, arm)) for arm in range(max(arms) + 1)]
    rng = np.random.default_rng(1)
    noise = [
        ops.convert_to_tensor(0.1 * rng.normal(size=v.shape), "float32")
        for v in variables
    ]

    def passes(active):
        keras.utils.set_random_seed(0)  # PyTorch's unseeded dropout
        batch = keras.tree.map_structure(of_unknown_size, (x, y))
        return backend.Passes(Loss(model, variables, *batch, None), arms, active)

    def dense(found, weights):
        (loss, _), gradients = found
        return loss, [
            ops.zeros_like(w)
            if g is None
            else backend.add(ops.zeros_like(w), g, ops.ones((), w.dtype))
            for w, g in zip(weights, gradients)
        ]

    def both(mask):
        active = backend.concrete(mask)
        step, weights = passes(active), [backend.read(v) for v in variables]
        selected = ActiveArms(members, active, "float32")
        perturbed = selected.map(lambda i, w: w + noise[i], weights)
        first = dense(step.first(weights), weights)
        return perturbed, first, dense(step.second(perturbed), weights)

    def alone(weights, active=None):
        active = active or [True] * len(members)
        return dense(passes(active).first(weights), weights)

    return compile_step(both), compile_step(alone)


def masks(num_arms):
    rng = np.random.default_rng(0)
    chosen = [np.arange(num_arms) >= first for first in range(0, num_arms, 3)]
    chosen += [np.arange(num_arms) == arm for arm in (0, num_arms // 2, num_arms - 1)]
    chosen += [rng.random(num_arms) < 0.3 for _ in range(3)]
    return [mask for mask in chosen if mask.any()]


def assert_equal(found, expected, mask):
    """Compares losses, and gradients that are zero where the mask is false."""
    (loss, gradients), (dense_loss, dense_gradients) = found, expected
    np.testing.assert_allclose(float(loss), float(dense_loss), rtol=1e-5)
    # PyTorch executes the same operations in the same order.
    tolerances = {"rtol": 0} if BACKEND == "torch" else {"rtol": 1e-4, "atol": 2e-6}
    for gradient, dense_gradient, on in zip(gradients, dense_gradients, mask):
        np.testing.assert_allclose(
            ops.convert_to_numpy(gradient),
            ops.convert_to_numpy(dense_gradient) * on,
            **tolerances,
        )


def check_passes(model, x, y, compile_step, arms=None):
    """Compares both passes with a dense pass at the same weights, for many masks."""
    both, alone = functions(model, x, y, compile_step, arms)
    weights = [backend.read(v) for v in model.trainable_variables]
    arms = arms or list(range(len(weights)))
    expected = alone(weights)
    for mask in masks(max(arms) + 1):
        perturbed, first, second = both(ops.convert_to_tensor(mask))
        assert_equal(first, expected, mask[arms])
        assert_equal(second, alone(perturbed), mask[arms])
    assert compile_step.traces(both) <= 1


# Their traced graphs are like those of `dense` and `gru`.
SAME_GRAPH = set() if BACKEND == "torch" else {"nested", "subclassed", "lstm"}


# Arms of several weights work in the same way in all models, so one model tests them.
@pytest.mark.parametrize(
    ("name", "pairs"),
    [*((name, False) for name in zoo.MODELS if name not in SAME_GRAPH), ("tied", True)],
)
def test_active_gradients_equal_the_dense_ones(name, pairs, compile_step):
    model, x, y = zoo.build(name)
    model.compile(loss=zoo.loss())
    x, y = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
    model.compute_loss(x, y, model(x))  # builds the loss
    arms = [i // 2 for i in range(len(model.trainable_variables))] if pairs else None
    check_passes(model, x, y, compile_step, arms)


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
        passes = backend.Passes(loss_fn, [0, 1, 2], backend.concrete(mask))
        return passes.first(weights)[1], passes.second(weights)[1]

    for mask in ([True, True, False], [False, False, True]):
        for gradients in run(ops.convert_to_tensor(mask)):
            expected = [np.float32(mask[0]), np.float32(0.0), np.zeros(2, "float32")]
            for gradient, value in zip(gradients, expected):
                np.testing.assert_array_equal(gradient, value)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's IndexedSlices")
def test_embedding_gradients_stay_sparse():
    import tensorflow as tf

    inputs = keras.Input((zoo.LENGTH,), dtype="int32")
    embed = layers.Embedding(zoo.VOCABULARY, zoo.WIDTH)
    outputs = layers.Dense(zoo.CLASSES)(layers.Flatten()(embed(inputs)))
    model, x, y = keras.Model(inputs, outputs), zoo._tokens(), zoo.labels()
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
@pytest.mark.parametrize(
    ("kind", "data_format"),
    [
        *((kind, "channels_last") for kind in ("Conv1D", "Conv2D", "Conv3D")),
        ("DepthwiseConv2D", "channels_last"),
        ("Conv2D", "channels_first"),
    ],
)
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
    arms = list(range(len(weights)))
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
