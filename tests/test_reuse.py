"""The second pass reuses only values that it would compute itself."""

import copy
import functools
import gc
import pickle
import weakref

import keras
import keras_hub
import numpy as np
import pytest
import zoo
from keras import layers
from keras import ops
from test_gradients import assert_equal
from test_gradients import check_passes
from test_gradients import functions
from test_gradients import masks
from test_gradients import of_unknown_size

from keras_slsam.gradients import backend
from keras_slsam.loss import Loss

BACKEND = keras.config.backend()
WIDTH = zoo.WIDTH

on_torch = pytest.mark.skipif(BACKEND != "torch", reason="others run Python only once")


def dense():
    return layers.Dense(WIDTH, activation="tanh")


def chain(*middle):
    """Returns Dense layers with `middle` between the first two."""
    parts = [keras.Input((WIDTH,)), dense(), *middle, dense(), layers.Dense(3)]
    return keras.Sequential(parts)


class Reader(layers.Layer):
    """Depends on the kernel of another layer, but has no gradient for it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return x + ops.stop_gradient(ops.mean(self.layer.kernel))


class Detached(layers.Layer):
    def call(self, x):
        return ops.stop_gradient(x)


class Counter(layers.Layer):
    """Has state that Keras does not track."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x * self.calls


class Sloped(Counter):
    """Has this state in an attribute of a Keras layer."""

    def __init__(self):
        super().__init__()
        self.inner = layers.LeakyReLU()

    def call(self, x):
        self.calls += 1
        self.inner.negative_slope = 0.1 * self.calls
        return self.inner(x)


class Assigning(Counter):
    """Has this state in a frozen weight of a Keras layer."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(WIDTH, trainable=False)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        self.calls += 1
        self.inner.kernel.assign(self.inner.kernel * self.calls)
        return self.inner(x)


class Drawing(Counter):
    """Has this state in PyTorch's random number generator."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dropout(0.5)

    def call(self, x):
        import torch

        self.calls += 1
        torch.rand(self.calls)
        return self.inner(x)


class Casting(Counter):
    """Has this state in the autocast setting that a Keras layer inherits."""

    def __init__(self):
        super().__init__()
        self.inner = dense()

    def call(self, x):
        import torch

        self.calls += 1
        if not hasattr(x, "device") or x.device.type == "meta":
            return self.inner(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.calls % 2 == 0):
            return ops.cast(self.inner(x), "float32")


class Writer(layers.Layer):
    """Writes to a variable that other layers read."""

    def __init__(self):
        super().__init__()
        self.total = self.add_weight(shape=(), trainable=False, initializer="zeros")

    def call(self, x):
        self.total.assign(self.total + ops.mean(x))
        return x + self.total


class InPlace(layers.Layer):
    """Changes its input in place."""

    def call(self, x):
        return x.mul_(2.0)


class Residual(layers.Layer):
    """A custom layer that contains Keras layers, with operations between them."""

    def __init__(self):
        super().__init__()
        self.parts = [layers.LayerNormalization(), dense(), layers.Dropout(0.3)]

    def call(self, x):
        normal, inner, dropout = self.parts
        x = x + dropout(inner(x))
        return normal(x) + x


def read_elsewhere():
    inputs = keras.Input((WIDTH,))
    late = layers.Dense(WIDTH)
    late.build((None, WIDTH))
    x = dense()(inputs)
    reader = Reader(late)
    return keras.Model(inputs, layers.Dense(3)(late(reader(dense()(x)))))


def shared_generator():
    generator = keras.random.SeedGenerator(3)
    first, second = layers.Dropout(0.5, seed=1), layers.Dropout(0.5, seed=1)
    for layer in (first, second):
        vars(layer)["seed_generator"] = generator
    return keras.Sequential([keras.Input((WIDTH,)), first, dense(), second, dense()])


def rematerialised():
    with keras.RematScope(mode="full"):
        return chain(layers.Dropout(0.4), Residual(), layers.Dropout(0.4))


def shared_dropout():
    inputs = keras.Input((WIDTH,))
    dropout, twice = layers.Dropout(0.5), dense()
    x = twice(dropout(inputs) + dropout(inputs))
    x = dropout(twice(dense()(x)))
    return keras.Model(inputs, layers.Dense(3)(x))


def penalised():
    parts = [layers.Dense(WIDTH, activity_regularizer="l2"), zoo.Penalised(), dense()]
    inner = keras.Sequential([*parts, layers.ActivityRegularization(l2=0.1)])
    return chain(inner)


def attended():
    """Returns a model whose attention removes the mask from an input it shares."""
    inputs = keras.Input((zoo.LENGTH,), dtype="int32")
    keys = layers.Embedding(zoo.VOCABULARY, WIDTH, mask_zero=True)(inputs)
    x = layers.Embedding(zoo.VOCABULARY, WIDTH)(inputs)
    for _ in range(2):
        x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(x, keys)])
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def attended_in_place():
    """Returns a model with a mask that KerasHub attaches, and attention removes."""
    inputs = keras.Input((zoo.LENGTH,), dtype="int32")
    x = keras_hub.layers.TokenAndPositionEmbedding(
        zoo.VOCABULARY, zoo.LENGTH, WIDTH, mask_zero=True
    )(inputs)
    x = keras_hub.layers.TransformerEncoder(16, 2)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


class Reversed(layers.Layer):
    """Changes the list that a model returned, and the list passed to the model."""

    def __init__(self):
        super().__init__()
        inputs = [keras.Input((WIDTH,)), keras.Input((WIDTH,))]
        hidden = dense()(layers.Subtract()(inputs))
        self.inner = keras.Model(inputs, [dense()(hidden), dense()(hidden)])

    def call(self, x):
        given = [x, x * 0.5]
        first = self.inner(given)
        first.reverse()
        given.reverse()
        second = self.inner(given)
        return first[0] - 2 * first[1] + 3 * second[0]


class Recurrent(layers.Layer):
    """Calls a cell, which keeps the noise of its dropout between calls."""

    def __init__(self):
        super().__init__()
        self.cell = layers.LSTMCell(WIDTH, dropout=0.5, seed=3)
        self.between = dense()

    def build(self, shape):
        self.cell.build(shape)
        self.between.build(shape)

    def call(self, x, training=None):
        self.cell.reset_dropout_mask()
        x, states = self.cell(x, [ops.zeros_like(x)] * 2, training=training)
        return self.cell(self.between(x), states, training=training)[0]


class Mapped(layers.Layer):
    """Calls a layer in a transform of the framework."""

    def __init__(self):
        super().__init__()
        self.inner = dense()

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return ops.vectorized_map(lambda row: self.inner(row[None])[0], x)


def masked():
    inputs = keras.Input((zoo.LENGTH,), dtype="int32")
    x = layers.Embedding(zoo.VOCABULARY, WIDTH, mask_zero=True)(inputs)
    x = layers.LSTM(WIDTH, return_sequences=True)(layers.Dropout(0.2)(x))
    x = layers.GRU(4)(x)
    return keras.Model(inputs, layers.Dense(3)(x))


MODELS = {
    "noise": lambda: chain(
        layers.GaussianNoise(0.5), dense(), layers.AlphaDropout(0.5)
    ),
    "shared generator": shared_generator,
    "batch normalisation": lambda: chain(
        layers.BatchNormalization(), dense(), layers.BatchNormalization(momentum=0.5)
    ),
    "user's layers": lambda: chain(Residual(), Residual()),
    "an operation": lambda: chain(layers.Lambda(lambda x: ops.square(x) - 0.1)),
    "read elsewhere": read_elsewhere,
    "detached": lambda: chain(dense(), Detached(), dense()),
    "a variable written": lambda: chain(Writer(), dense(), Writer()),
    "losses inside": penalised,
    "masks": masked,
    "a transform": lambda: chain(Mapped()),
}
if BACKEND == "torch":  # others run Python only once, or cannot build it
    MODELS |= {
        "unseeded dropout": lambda: chain(
            layers.Dropout(0.5), dense(), layers.Dropout(0.5)
        ),
        "seeded dropout": lambda: chain(
            layers.Dropout(0.5, seed=1), dense(), layers.Dropout(0.5, seed=2)
        ),
        "shared dropout": shared_dropout,
        "masks taken off": attended,
        "masks attached": attended_in_place,
        "lists that change": lambda: chain(Reversed()),
        "a cell": lambda: chain(Recurrent()),
        "rematerialised": rematerialised,
    }


def make(name):
    """Returns a model that is compiled with a loss, and its data."""
    if name in zoo.MODELS:
        model, x, y = zoo.build(name)
    else:
        keras.utils.set_random_seed(0)
        model, y, x = MODELS[name](), zoo.labels(), zoo._features()
        if name.startswith("masks"):
            x = zoo._tokens()
            x[:, 3:] = 0
    model.compile(loss=zoo.loss())
    return model, *keras.tree.map_structure(ops.convert_to_tensor, (x, y))


@pytest.mark.parametrize("name", MODELS)
def test_second_pass_equals_a_separate_pass(name, compile_step):
    check_passes(*make(name), compile_step)


@on_torch
@pytest.mark.parametrize("name", ["unseeded dropout", "attention", "rematerialised"])
def test_recording_does_not_change_the_first_pass(name):
    model, x, y = make(name)
    variables = model.trainable_variables
    weights = [backend.read(v) for v in variables]
    arms = list(range(len(variables)))
    found = []
    with backend.no_grad():
        for twice in (True, False):
            keras.utils.set_random_seed(0)
            loss = Loss(model, variables, x, y, None)
            passes = backend.Passes(loss, arms, [True] * len(arms), twice)
            (loss, _), gradients = passes.first(weights)
            found.append((loss, gradients))
    assert_equal(*found, [True] * len(arms))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's graph")
@pytest.mark.parametrize("sparse", [True, False])
def test_noise_is_drawn_once_in_a_graph(sparse, compile_step):
    from benchmarks.probes import tensorflow as probes

    model = chain(layers.Dropout(0.5), dense(), layers.Dropout(0.5))
    model.compile(loss=zoo.loss())
    variables = model.trainable_variables
    data = [ops.convert_to_tensor(part) for part in (zoo._features(), zoo.labels())]

    @compile_step
    def step(*data):
        loss = Loss(model, variables, *map(of_unknown_size, data), None)
        active = [True] * len(variables)
        if sparse:
            active = backend.concrete(ops.convert_to_tensor(active))
        passes = backend.Passes(loss, list(range(len(variables))), active)
        weights = [backend.read(v) for v in variables]
        gradients = passes.first(weights)[1]
        return gradients, passes.second([0.9 * w for w in weights])[1]

    nodes, executed = probes._trace(step.get_concrete_function(*data), data)
    kinds = [nodes[s.node_name].op for s in executed if s.node_name in nodes]
    assert kinds.count("StatelessRandomUniformV2") == 2


@pytest.mark.skipif(BACKEND != "tensorflow", reason="shapes are known elsewhere")
def test_noise_of_a_size_that_depends_on_the_weights(compile_step):
    import tensorflow as tf

    sizes = []

    class Chosen(layers.Layer):
        """Draws noise for the rows whose first entry is positive."""

        def call(self, x):
            rows = tf.boolean_mask(x, x[:, 0] > 0.4)
            tf.numpy_function(lambda n: sizes.append(int(n)), [tf.shape(rows)[0]], [])
            noise = tf.random.stateless_uniform(tf.shape(rows), seed=(1, 2))
            return x + tf.reduce_sum(rows * noise) / 10

    model = chain(Chosen(), dense())
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    check_passes(model, x, y, compile_step)
    assert len(set(sizes)) > 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="shapes are known elsewhere")
def test_a_shape_that_depends_on_the_weights(compile_step):
    import tensorflow as tf

    table = np.arange(16, dtype="float32").reshape(4, 4)

    def function(weights):
        entries, column = weights
        shape = tf.where(column > 0, [4, 1], [1, 4])
        sums = tf.reshape(entries, shape) + tf.ones((4, 4))
        return tf.reduce_sum(sums * table) + column

    loss_fn = zoo.loss_of(
        function, [keras.Variable(np.ones(4, "float32")), keras.Variable(0.0)]
    )

    @compile_step
    def gradients():
        entries = tf.ones(4)
        passes = backend.Passes(loss_fn, [0, 1], [True, True])
        row = passes.first([entries, tf.constant(0.0)])[1]
        return row[0], passes.second([entries, tf.constant(1.0)])[1][0]

    row, column = gradients()
    np.testing.assert_array_equal(row, table.sum(axis=0))
    np.testing.assert_array_equal(column, table.sum(axis=1))


@on_torch
def test_keras_layers_in_a_custom_layer_are_replayed():
    from benchmarks.probes.torch import executed_flops

    model = chain(Residual())
    with backend.no_grad():
        passes, weights = passes_of(model, lambda arms: [arm in (6, 7) for arm in arms])
        passes.first(weights)
        found = executed_flops(passes.second, weights)
    product, head = 2 * zoo.BATCH * WIDTH**2, 2 * zoo.BATCH * WIDTH * 3
    # The last two layers forward, the kernel of one, and the input of the other.
    assert found == 2 * (product + head)


@on_torch
def test_a_layer_that_draws_twice_is_replayed():
    from benchmarks.probes.torch import executed_flops

    recurrent = layers.LSTM(WIDTH, dropout=0.5, recurrent_dropout=0.5, seed=1)
    model = chain(layers.Reshape((2, -1)), recurrent)
    with backend.no_grad():
        model(zoo._features(), training=True)  # the first call creates attributes
        passes, weights = passes_of(model, lambda arms: [arm > 6 for arm in arms])
        passes.first(weights)
        found = executed_flops(passes.second, weights)
    # The last layer: the forward pass, and the gradient of its kernel.
    assert found == 2 * (2 * zoo.BATCH * WIDTH * 3)


@on_torch
def test_a_loss_that_is_added_in_a_replayed_layer_is_added():
    class Product(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            return ops.mean(y_pred) * sum(self.losses)

    inner = keras.Sequential([layers.Dense(WIDTH, activity_regularizer="l2")])
    model = Product([keras.Input((WIDTH,)), inner, dense()])
    with backend.no_grad():
        passes, weights = passes_of(model, lambda arms: [arm > 1 for arm in arms])
        (loss, _), first = passes.first(weights)
        (again, _), second = passes.second(weights)
    assert_equal((again, second[2:]), (loss, first[2:]), [True] * 2)


@on_torch
def test_a_layer_after_a_module_sees_its_perturbed_weight(compile_step):
    """This holds even if no gradient shows the dependence."""
    import torch

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x + self.shift.detach()

    shifted = layers.TorchModuleWrapper(Shifted(), output_shape=(None, WIDTH))
    model = chain(shifted)
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    both, alone = functions(model, x, y, compile_step)
    *_, last, _ = model.trainable_variables
    mask = [v.shape == () or v is last for v in model.trainable_variables]
    perturbed, _, second = both(ops.convert_to_tensor(mask))
    assert_equal(second, alone(perturbed), mask)


@on_torch
@pytest.mark.parametrize("transform", [True, False])
def test_forward_mode_derivatives_are_not_missed(transform, compile_step):
    import torch
    from torch.autograd import forward_ad

    class Forwards(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = dense()
            self.inner.build((None, WIDTH))

        def call(self, x):
            if isinstance(x, keras.KerasTensor) or x.device.type == "meta":
                return self.inner(x)
            if transform:
                return sum(torch.func.jvp(self.inner, (x,), (torch.ones_like(x),)))
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                return sum(forward_ad.unpack_dual(self.inner(dual)))

    model = chain(Forwards())
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    check_passes(model, x, y, compile_step)


@on_torch
@pytest.mark.parametrize("kind", [Counter, Sloped, Assigning, Drawing, Casting])
def test_hidden_state_is_not_missed(kind, compile_step):
    inner = keras.Sequential([dense(), Counter()])
    model = chain(kind(), inner, dense())
    counters = [x for x in model._flatten_layers() if isinstance(x, Counter)]
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    both, alone = functions(model, x, y, compile_step)
    for mask in masks(len(model.trainable_variables)):
        for counter in counters:
            counter.calls = 0
        perturbed, _, found = both(ops.convert_to_tensor(mask))
        assert [counter.calls for counter in counters] == [2, 2]
        for counter in counters:
            counter.calls = 1
        assert_equal(found, alone(perturbed), mask)


@on_torch
@pytest.mark.parametrize(
    "wrap", [lambda function: function, keras.remat, functools.wraps(ops.tanh)]
)
def test_custom_functions_are_called_in_both_passes(wrap):
    calls = []

    def function(x):
        calls.append(1)
        return 2 * x

    model = chain(layers.Activation(wrap(function)))
    with backend.no_grad():
        passes, weights = passes_of(model, lambda arms: [arm > 3 for arm in arms])
        calls.clear()  # from building the model
        passes.first(weights)
        passes.second(weights)
    assert len(calls) == 2


@on_torch
@pytest.mark.parametrize("where", ["first", "middle", "function", "shared"])
def test_in_place_changes_are_not_missed(where, compile_step):
    if where == "first":
        model = keras.Sequential([keras.Input((WIDTH,)), InPlace(), dense(), dense()])
    elif where == "middle":
        # Identity returns the output of the previous layer, which changes.
        model = chain(layers.Identity(), InPlace(), dense(), InPlace(), dense())
    elif where == "function":
        model = chain(layers.Activation(lambda x: x.mul_(2.0)), dense())
    else:
        inputs = keras.Input((WIDTH,))
        first = dense()
        x = layers.Dense(WIDTH)(inputs)
        model = keras.Model(inputs, dense()(first(x) + InPlace()(x) + first(x)))
    model.compile(loss=zoo.loss())
    y = ops.convert_to_tensor(zoo.labels())
    for mask in masks(len(model.trainable_variables)):
        x = ops.convert_to_tensor(zoo._features())
        both, alone = functions(model, x, y, compile_step)
        try:
            perturbed, _, found = both(ops.convert_to_tensor(mask))
        except RuntimeError as error:
            assert "inplace" in str(error)  # PyTorch refuses it
            continue
        if where != "first":
            x = ops.convert_to_tensor(zoo._features())
        else:
            x = ops.convert_to_tensor(2 * zoo._features())
        _, alone = functions(model, x, y, compile_step)
        # PyTorch may refuse to differentiate the other weights.
        assert_equal(found, alone(perturbed, mask.tolist()), mask)


@on_torch
def test_hooks_are_not_missed(compile_step):
    model, x, y = make("nested")
    inner = model.layers[2].layers[0]
    offsets = iter(range(100))
    handle = inner.register_forward_hook(lambda layer, args, out: out + next(offsets))
    both, alone = functions(model, x, y, compile_step)
    mask = np.arange(len(model.trainable_variables)) > 5
    perturbed, _, found = both(ops.convert_to_tensor(mask))
    assert next(offsets) == 2
    handle.remove()
    inner.register_forward_hook(lambda layer, args, out: out + 1)
    assert_equal(found, alone(perturbed), mask)


class Checkpointed(layers.Layer):
    """Rematerialises a layer in selected calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.count = 0
        self.inner = rematerialised_parts()
        self.late = dense()

    def call(self, x, training=None):
        from torch.utils.checkpoint import checkpoint

        def inner(x):
            return self.late(self.inner(x, training=training))

        self.count += 1
        if self.count not in self.calls:
            return inner(x)
        return checkpoint(inner, x, use_reentrant=False)


def rematerialised_parts():
    with keras.RematScope(mode="full"):
        return keras.Sequential([layers.Dropout(0.5), dense(), layers.Dropout(0.5)])


@on_torch
@pytest.mark.parametrize("calls", [(), (1,), (2,), (1, 2)])
def test_rematerialised_layers_are_not_replayed(calls, compile_step):
    model = chain(Checkpointed(calls))
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    both, alone = functions(model, x, y, compile_step)
    for mask in masks(len(model.trainable_variables)):
        model.layers[1].count = 0
        perturbed, _, found = both(ops.convert_to_tensor(mask))
        model.layers[1].count = 2
        assert_equal(found, alone(perturbed), mask)


class Watcher(layers.Layer):
    """Keeps weak references to its inputs."""

    def call(self, x):
        vars(self).setdefault("seen", []).append(weakref.ref(x))
        return x * 1.0


def passes_of(model, active):
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    variables = model.trainable_variables
    weights = [backend.read(v) for v in variables]
    loss = Loss(model, variables, x, y, None)
    arms = list(range(len(weights)))
    return backend.Passes(loss, arms, active(arms)), weights


@on_torch
def test_nothing_is_kept_after_the_step():
    watchers = [Watcher(), Watcher()]
    model = chain(watchers[0], dense(), watchers[1])
    for watcher in watchers:
        watcher.seen.clear()  # symbolic tensors
    gc.collect()
    gc.disable()
    try:
        with backend.no_grad():
            passes, weights = passes_of(model, lambda arms: [a > 3 for a in arms])
            passes.first(weights)
            assert all(watcher.seen[0]() is not None for watcher in watchers)
            passes.second(weights)
        assert [len(watcher.seen) for watcher in watchers] == [2, 2]
        assert not any(ref() is not None for w in watchers for ref in w.seen)
        watching = weakref.ref(passes)
        del passes
        assert watching() is None
        with backend.no_grad():  # has no second pass
            passes, _ = passes_of(model, lambda arms: [a > 3 for a in arms])
            passes.first(weights)
            del passes
        assert not any(ref() is not None for w in watchers for ref in w.seen)
    finally:
        gc.enable()


@on_torch
def test_layers_are_unchanged_after_a_step():
    model = chain(keras.Sequential([dense(), layers.Dropout(0.5)]))
    before = [set(vars(layer)) for layer in model._flatten_layers()]
    with backend.no_grad():
        passes, weights = passes_of(model, lambda arms: [a > 3 for a in arms])
        passes.first(weights)
        after_first = [set(vars(layer)) for layer in model._flatten_layers()]
        weights[-1] = weights[-1][:1]
        with pytest.raises(ValueError):
            passes.second(weights)
    assert not any("forward" in names for names in after_first)
    after = [set(vars(layer)) for layer in model._flatten_layers()]
    assert [new - old for new, old in zip(after, before)] == [
        new - old for new, old in zip(after_first, before)
    ]
    x = zoo._features()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(copied(x).detach(), model(x).detach())


@on_torch
def test_calls_in_another_thread_are_not_replayed(monkeypatch):
    import threading

    import torch

    threads, inner = [], layers.Dropout(0.5)
    dropout = torch.nn.functional.dropout

    def drawing(*args, **kwargs):
        threads.append(threading.current_thread())
        return dropout(*args, **kwargs)

    class Predict(layers.Layer):
        def call(self, x):
            # The same call as the next call of `inner` in the passes.
            call = {"args": (x,), "kwargs": {"training": True}}
            thread = threading.Thread(target=inner, **call)
            thread.start()
            thread.join()
            return x

    model = chain(Predict(), inner)
    monkeypatch.setattr(torch.nn.functional, "dropout", drawing)
    with backend.no_grad():
        passes, weights = passes_of(model, lambda arms: [arm > 1 for arm in arms])
        threads.clear()  # from building the model
        passes.first(weights)
        passes.second(weights)
    # The other thread calls the layer in both passes. The pass itself calls it once,
    # and then replays the call.
    in_a_pass = [thread is threading.current_thread() for thread in threads]
    assert in_a_pass == [False, True, False]


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's effects")
def test_a_layer_with_an_effect_and_no_result(compile_step):
    import jax

    seen = []

    class Watched(layers.Layer):
        def call(self, x):
            jax.debug.callback(lambda value: seen.append(float(value)), x[0, 0])
            return 2.0 * x

    model = chain(Watched())
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    seen.clear()
    check_passes(model, x, y, compile_step)
    jax.effects_barrier()
    # The effect runs in every pass: one at the weights, and three with each mask.
    assert len(seen) == 1 + 3 * len(masks(len(model.trainable_variables)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's variables")
def test_data_stored_in_a_tensorflow_variable(compile_step):
    import tensorflow as tf

    class Stored(layers.Layer):
        def build(self, input_shape):
            with tf.init_scope():
                self.store = tf.Variable(tf.zeros((zoo.BATCH, WIDTH)))

        def call(self, x):
            self.store.assign(x)
            return x + tf.stop_gradient(self.store.read_value())

    model = chain(Stored())
    model.compile(loss=zoo.loss())
    x, y = map(ops.convert_to_tensor, (zoo._features(), zoo.labels()))
    check_passes(model, x, y, compile_step)
