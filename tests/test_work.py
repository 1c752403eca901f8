"""The saving: a step executes only the products that its active arms need.

These tests fail for a step that computes all gradients and then masks them.
"""

import functools
import importlib

import keras
import numpy as np
import pytest
import zoo
from keras import layers
from keras import ops
from replay import Replay

import keras_slsam
from keras_slsam.gradients import backend

BACKEND = keras.config.backend()
BATCH, LENGTH = 8, 5


class Products:
    """Records the matrix products of a model, in the order of its calls.

    Each product has the weights that its operands depend on, and the weights that its
    layer reads.
    """

    def __init__(self):
        self.products = []

    def dense(self, layer, upstream, rows, width):
        """Adds a Dense layer. Returns the weights that its output depends on."""
        kernel, bias = layer.kernel.path, layer.bias.path
        flops = 2 * rows * width * layer.units
        self.products.append((flops, [{kernel}, upstream], {kernel, bias}))
        return upstream | {kernel, bias}

    def matmul(self, flops, first, second):
        self.products.append((flops, [first, second], set()))
        return first | second

    def norm(self, layer, upstream):
        """Adds a layer without a product."""
        paths = {variable.path for variable in layer.trainable_variables}
        self.products.append((0, [], paths))
        return upstream | paths

    def flops(self, active, trained=None):
        """Counts the forward pass, and a product per operand that an active arm needs.

        Args:
            active: Set of the paths of the active variables.
            trained: Set of the paths of all trained variables, for the second pass. The
                second pass reuses, on JAX and TensorFlow, products that depend on none
                of them, and on PyTorch, layers that were called before a layer read an
                active weight.
        """
        total, read_so_far = 0, set()
        for flops, operands, read in self.products:
            read_so_far |= read
            again = set().union(*operands) & trained if trained else True
            if trained and BACKEND == "torch":
                again = read_so_far & active
            total += flops * bool(again)
            total += flops * sum(bool(operand & active) for operand in operands)
        return total

    def step(self, active, optimizer):
        """Counts both passes."""
        trained = {v.path for arm in optimizer.arms for v in arm}
        return self.flops(active) + self.flops(active, trained)


def dense_chain():
    widths = [7, 11, 5, 13, 3]
    chain = [layers.Dense(width, activation="tanh") for width in widths[1:]]
    model = keras.Sequential([keras.Input((widths[0],)), *chain])
    products, upstream = Products(), set()
    for layer, width in zip(chain, widths):
        upstream = products.dense(layer, upstream, BATCH, width)
    x = np.random.default_rng(0).normal(size=(BATCH, widths[0]))
    return model, products, x.astype("float32")


def transformer():
    width, hidden, rows = 8, 12, BATCH * LENGTH
    inputs = keras.Input((LENGTH, width))
    embed = layers.Dense(width)
    query, key, value = (layers.Dense(width) for _ in range(3))
    output, up, down, head = (layers.Dense(n) for n in (width, hidden, width, 3))
    norms = layers.LayerNormalization(), layers.LayerNormalization()
    x = embed(inputs)
    scores = ops.matmul(query(x), ops.transpose(key(x), (0, 2, 1)))
    attended = ops.matmul(ops.softmax(scores), value(x))
    y = norms[0](x + output(attended))
    z = norms[1](y + down(ops.gelu(up(y))))
    model = keras.Model(inputs, head(ops.mean(z, axis=1)))

    products = Products()
    x = products.dense(embed, set(), rows, width)
    # A functional model calls the key first, because its path to the output is longest.
    k, q = (products.dense(layer, x, rows, width) for layer in (key, query))
    one = 2 * BATCH * LENGTH * LENGTH * width
    scores = products.matmul(one, q, k)
    v = products.dense(value, x, rows, width)
    attended = products.matmul(one, scores, v)
    y = products.norm(norms[0], x | products.dense(output, attended, rows, width))
    inner = products.dense(up, y, rows, width)
    z = products.norm(norms[1], y | products.dense(down, inner, rows, hidden))
    products.dense(head, z, BATCH, width)
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, width))
    return model, products, x.astype("float32")


def counter(model, optimizer, x):
    """Returns a function that takes a step, traced once, and counts its FLOPs."""
    model.compile(loss="mse")
    y = np.zeros((BATCH, 3), "float32")
    optimizer.build(model.trainable_variables)
    data = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    count = importlib.import_module(f"benchmarks.probes.{BACKEND}").executed_flops
    if BACKEND == "jax":
        import jax

        step = jax.jit(
            lambda state, data: keras_slsam.stateless_step(
                model, optimizer, state, data
            )
        )
        return lambda: count(step, keras_slsam.get_state(model, optimizer), data)

    def step(x, y):
        return keras_slsam.step(model, optimizer, (x, y))

    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(step, autograph=False)
    return lambda: count(step, *data)


def executed(model, optimizer, x):
    """Returns the FLOPs of the products of one step."""
    return counter(model, optimizer, x)()


def masks(num_arms):
    rng = np.random.default_rng(0)
    chosen = [np.arange(num_arms) == arm for arm in (0, num_arms // 2, num_arms - 1)]
    chosen.append(np.arange(num_arms) >= num_arms // 2)
    chosen += [rng.random(num_arms) < 0.25 for _ in range(3)]
    return [mask for mask in chosen if mask.any()]


@pytest.mark.parametrize(
    ("make", "single_step"),
    [(dense_chain, False), (dense_chain, True), (transformer, False)],
)
def test_a_step_executes_only_what_the_active_arms_need(make, single_step):
    model, products, x = make()
    chosen = masks(len(model.trainable_variables))[:: 2 if make is transformer else 1]
    sampler = Replay(chosen)
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler, single_step=single_step)
    count = counter(model, optimizer, x)
    for row, mask in enumerate(chosen):
        sampler.row.assign(row)
        active = {v.path for v, on in zip(model.trainable_variables, mask) if on}
        found = count()
        if single_step:
            assert found == products.flops(active)
        else:
            assert found == products.step(active, optimizer)


def test_arms_of_several_variables():
    model, products, x = transformer()
    num_arms = sum(bool(layer.trainable_variables) for layer in model.layers)
    mask = [arm % 2 == 1 for arm in range(num_arms)]
    optimizer = keras_slsam.SLSAM("sgd", arms="layer", sampler=Replay([mask]))
    optimizer.build(model.trainable_variables)
    active = {v.path for arm, on in zip(optimizer.arms, mask) if on for v in arm}
    assert executed(model, optimizer, x) == products.step(active, optimizer)


def test_an_arm_that_is_always_active_adds_only_its_own_work():
    model, products, x = dense_chain()
    paths = [variable.path for variable in model.trainable_variables]
    masks = [[arm == only for arm in range(len(paths) - 1)] for only in (0, 6)]
    optimizer = keras_slsam.SLSAM(
        "sgd", sampler=Replay(masks), always_active=f"^{paths[-2]}$"
    )
    count = counter(model, optimizer, x)
    for row, drawn in enumerate((paths[0], paths[-1])):
        optimizer.sampler.row.assign(row)
        assert count() == products.step({drawn, paths[-2]}, optimizer)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has no conditions")
def test_inactive_work_is_skipped_for_any_number_of_arms(compile_step):
    depth, width = 70, 2
    variables = [keras.Variable(np.eye(width, dtype="float32")) for _ in range(depth)]
    x = np.ones((BATCH, width), "float32")

    def function(weights):
        return ops.sum(functools.reduce(ops.matmul, weights, x))

    @compile_step
    def gradients(mask):
        loss_fn = zoo.loss_of(function, variables)
        active = backend.concrete(mask)
        passes = backend.Passes(loss_fn, list(range(depth)), active, twice=False)
        (loss, _), found = passes.first([backend.read(v) for v in variables])
        return loss, found

    count = importlib.import_module(f"benchmarks.probes.{BACKEND}").executed_flops
    # The forward pass, input gradients above the lowest active layer, weight gradients.
    products = depth + 2 + 3
    mask = ops.arange(depth) >= depth - 3
    assert count(gradients, mask) == products * 2 * BATCH * width * width


def test_work_that_is_almost_never_skipped_has_no_condition():
    chain = [layers.Dense(5, use_bias=False) for _ in range(4)]
    model = keras.Sequential([keras.Input((5,)), *chain, layers.Dense(3)])
    model.layers[-1].trainable = False
    sampler = Replay([[False, False, False, True]])
    sampler.min_probability = 0.85  # three are inactive in 0.3 % of all steps
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler, single_step=True)
    x = np.ones((BATCH, 5), "float32")
    one, last = 2 * BATCH * 5 * 5, 2 * BATCH * 5 * 3
    # The forward pass, the last layer's backward pass, and one gradient. Three arms
    # need the gradient of the third layer's output, which is computed even if all three
    # are inactive.
    backward = one * (BACKEND != "torch")
    assert executed(model, optimizer, x) == 4 * one + 2 * last + one + backward


def test_dense_methods_execute_everything():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    assert executed(model, keras_slsam.SAM("sgd"), x) == 2 * everything
    assert executed(model, keras_slsam.S2SAM("sgd"), x) == everything


def test_a_frozen_lower_half_is_computed_once():
    model, products, x = dense_chain()
    for layer in model.layers[:2]:
        layer.trainable = False
    mask = [arm % 3 > 0 for arm in range(len(model.trainable_variables))]
    optimizer = keras_slsam.SLSAM("sgd", sampler=Replay([mask]))
    optimizer.build(model.trainable_variables)
    active = {v.path for v, on in zip(model.trainable_variables, mask) if on}
    found = executed(model, optimizer, x)
    assert found == products.step(active, optimizer) < 2 * products.flops(active)


def test_rst_skips_the_second_pass():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    optimizer = keras_slsam.RST("sgd", seed=0)
    count = counter(model, optimizer, x)
    for probability in (0, 1):
        optimizer.probability = probability
        assert count() == (1 + probability) * everything


@pytest.mark.parametrize("method", ["SAM", "S2SAM", "SLSAM", "RST"])
def test_rho_of_zero_has_no_second_pass(method):
    model, products, x = dense_chain()
    kwargs = {"sampler": Replay([[1] * 8])} if method == "SLSAM" else {}
    if method == "RST":
        kwargs = {"probability": 1, "seed": 0}
    optimizer = getattr(keras_slsam, method)("sgd", rho=0.1, **kwargs)
    optimizer.rho = 0.0
    everything = products.flops({v.path for v in model.trainable_variables})
    assert executed(model, optimizer, x) == everything


class Block(layers.Layer):
    """A residual block that keeps a wide activation for the backward pass."""

    def __init__(self, width):
        super().__init__()
        self.up = layers.Dense(16 * width, activation="gelu")
        self.down = layers.Dense(width)

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.up.units))

    def call(self, x):
        return x + self.down(self.up(x))


@pytest.mark.skipif(BACKEND != "jax", reason="only XLA reports its planned memory")
def test_remat_scope_saves_memory():
    from benchmarks.probes.jax import planned_memory

    x, y = np.ones((1024, 8), "float32"), np.ones((1024, 1), "float32")

    def temporaries(method, mode):
        with keras.RematScope(mode=mode):
            blocks = [Block(8) for _ in range(2)]
        model = keras.Sequential([keras.Input((8,)), *blocks, layers.Dense(1)])
        model = keras_slsam.sharpness_aware(model)
        model.compile(optimizer=method("sgd"), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return planned_memory(model, x, y)["temporary"]

    sparse = temporaries(keras_slsam.SLSAM, "full")
    assert sparse < 0.6 * temporaries(keras_slsam.SLSAM, None)
    assert sparse < temporaries(keras_slsam.SAM, "full")
