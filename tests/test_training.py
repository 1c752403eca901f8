"""The train step does the same as Keras' own, plus what the methods add."""

import functools
import random

import keras
import numpy as np
import pytest
import zoo
from keras import ops
from matrix import row
from replay import Replay
from zoo import EAGER

import keras_slsam
from keras_slsam.gradients import backend

BACKEND = keras.config.backend()
TINY = 1e-9
ARMS = "variable" if BACKEND == "torch" else "layer"  # fewer to trace


def methods(rho, arms="variable"):
    """Returns an optimizer for each kind of step, with all arms active."""
    sparse = {"active_fraction": 1.0, "sampler": "uniform", "arms": arms}
    return {
        "sam": keras_slsam.SAM("sgd", rho=rho),
        "s2sam": keras_slsam.S2SAM("sgd", rho=rho),
        "slsam": keras_slsam.SLSAM("sgd", rho, **sparse),
        "sl+s2": keras_slsam.SLSAM("sgd", rho, single_step=True, **sparse),
        "rst": keras_slsam.RST("sgd", rho=rho, seed=0),
    }


def traced_methods(*traced):
    """Parametrizes by `method`: those given where steps are traced, else more."""
    found = ("sam", "s2sam", "slsam") if BACKEND == "torch" else traced
    return pytest.mark.parametrize("method", found)


def compiled(name, optimizer, sharpness_aware=True, **kwargs):
    model, x, y = zoo.build(name)
    if sharpness_aware:
        model = keras_slsam.sharpness_aware(model)
    several = isinstance(y, dict)
    model.compile(
        optimizer=optimizer,
        loss={"a": zoo.loss(), "b": zoo.loss()} if several else zoo.loss(),
        loss_weights={"a": 1.0, "b": 0.5} if several else None,
        metrics={"a": ["accuracy"]} if several else ["accuracy"],
        **kwargs,
    )
    return model, x, y


def fit(model, x, y, epochs=2, batch_size=zoo.BATCH // 2, **kwargs):
    # JAX compiles the step for each size of a batch, so all have the same here.
    keras.utils.set_random_seed(1)  # PyTorch's unseeded dropout
    return model.fit(
        x, y, batch_size, epochs, shuffle=False, verbose=0, **kwargs
    ).history


@functools.cache
def trained_by_keras(name):
    """Trains with Keras' own step. Returns the history and the variables' values."""
    plain, x, y = compiled(name, "sgd", sharpness_aware=False, **EAGER)
    history = fit(plain, x, y)
    return history, [ops.convert_to_numpy(v).copy() for v in plain.variables]


def assert_same_training(name, optimizer):
    expected, values = trained_by_keras(name)
    model, x, y = compiled(name, optimizer)
    history = fit(model, x, y)
    assert sorted(history) == sorted(expected)
    for key in expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=2e-4, atol=1e-5)
    for variable, value in zip(model.variables, values):
        np.testing.assert_allclose(
            ops.convert_to_numpy(variable),
            value,
            rtol=1e-3,
            atol=2e-5,
            err_msg=variable.path,
        )


# The methods where steps are traced. test_fit.py has SL-SAM on two inputs.
METHODS_OF = {
    "attention": ("sam", "slsam", "s2sam", "rst"),
    "convolution": ("sam", "slsam", "sl+s2"),
    "lstm": ("slsam",),
    **dict.fromkeys(("dense", "tied", "unreached", "nested", "subclassed"), ("sam",)),
    **dict.fromkeys(("gru", "shared", "frozen"), ("s2sam",)),
}


@pytest.mark.parametrize("name", zoo.MODELS if BACKEND == "torch" else METHODS_OF)
def test_a_tiny_radius_equals_the_step_of_keras(name):
    """Losses, metrics, BatchNorm and seeds are the same, so they are updated once.

    The applied gradient comes from the second pass, so both passes have the same
    dropout.
    """
    optimizers = methods(TINY, ARMS)
    for method in optimizers if BACKEND == "torch" else METHODS_OF[name]:
        assert_same_training(name, optimizers[method])


INACTIVE = ("attention", "convolution", "frozen", "unreached")


@pytest.mark.parametrize("name", zoo.MODELS if BACKEND == "torch" else INACTIVE)
def test_fit_with_inactive_arms(name):
    arms = ARMS if name == "attention" else "variable"
    optimizer = keras_slsam.SLSAM("adam", 0.05, active_fraction=0.4, arms=arms, seed=0)
    model, x, y = compiled(name, optimizer)
    frozen = [ops.convert_to_numpy(v) for v in model.non_trainable_weights]
    history = fit(model, x, y, epochs=3)
    assert np.isfinite(history["loss"]).all()
    norms = ops.convert_to_numpy(optimizer.gradient_norms)
    active = ops.convert_to_numpy(optimizer.active)
    assert (norms[~active] == 0).all()
    if name != "unreached":
        assert (norms[active] > 0).all()
    if name == "frozen":
        for old, variable in zip(frozen, model.non_trainable_weights):
            np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))


COMPILED = [("lstm", False), ("tied", True)]
if BACKEND == "tensorflow":  # JAX compiles these in the tests above
    COMPILED += [("attention", False), ("convolution", True)]


@pytest.mark.parametrize(("name", "single_step"), COMPILED)
def test_jit_compile_gives_the_same(name, single_step):
    if BACKEND == "torch":
        pytest.skip("jit_compile is refused on PyTorch: test_errors.py")
    results = []
    for jit_compile in (False, True):
        optimizer = keras_slsam.SLSAM(
            "sgd", 0.05, 0.4, arms="layer", single_step=single_step, seed=0
        )
        model, x, y = compiled(
            name,
            optimizer,
            jit_compile=jit_compile,
            # The test above has "attention" in a graph of TensorFlow.
            run_eagerly=not jit_compile and (BACKEND == "jax" or name == "attention"),
        )
        for layer in model._flatten_layers():
            # XLA and TensorFlow draw different random numbers.
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        fit(model, x, y)
        results.append(model.get_weights())
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["s2sam", "rst"])
def test_run_eagerly_gives_the_same(method):
    results = []
    for run_eagerly in (False, True):
        optimizer = methods(0.05)[method]
        model, x, y = compiled("dense", optimizer, run_eagerly=run_eagerly)
        fit(model, x, y)
        results.append(model.get_weights())
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


class Fails(keras.layers.Layer):
    """Raises in its n-th call."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def call(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("in the middle of a step")
        return x


@pytest.mark.parametrize("call", [1, 2])
def test_weights_are_restored_if_a_step_raises(call):
    fails = Fails(at=None)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            fails,
            keras.layers.Dense(1),
        ]
    )
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM("sgd", rho=0.5, active_fraction=1.0, seed=0)
    model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
    data = np.ones((2, 3), "float32"), np.ones((2, 1), "float32")
    model.train_on_batch(*data)
    before = model.get_weights()
    trainable = [getattr(v.value, "requires_grad", None) for v in model.variables]
    fails.at = fails.calls + call
    with pytest.raises(RuntimeError, match="middle of a step"):
        model.train_on_batch(*data)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert trainable == [
        getattr(v.value, "requires_grad", None) for v in model.variables
    ]
    model.train_on_batch(*data)
    assert any((a != b).any() for a, b in zip(before, model.get_weights()))


def test_weights_are_restored_if_a_metric_raises():
    def broken(y, y_pred):
        raise RuntimeError("in a metric")

    model, x, y = compiled("dense", "sgd")
    model.compile(
        optimizer=keras_slsam.SLSAM("sgd", active_fraction=0.5, seed=0),
        loss=zoo.loss(),
        metrics=[broken],
        run_eagerly=True,
    )
    before = model.get_weights()
    x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    with pytest.raises(RuntimeError, match="in a metric"):
        keras_slsam.step(model, model.optimizer, (x, y))
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


@row("masks of outputs, in losses and metrics")
def test_metrics_see_the_mask_of_the_outputs():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(5, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model = keras_slsam.sharpness_aware(model)
    model.compile(methods(TINY)["slsam"], zoo.loss(), metrics=["accuracy"])
    # Predictions are right for all tokens, and wrong for all padding.
    predicted = np.argmax(ops.convert_to_numpy(model(tokens)), axis=-1)
    y = np.where(tokens > 0, predicted, 1 - predicted)
    expected = model.evaluate(tokens, y, return_dict=True, verbose=0)
    logs = model.train_on_batch(tokens, y, return_dict=True)
    assert logs["accuracy"] == expected["accuracy"] == 1.0
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-5)


@traced_methods("sam")
def test_sample_weights_and_a_mask_of_the_outputs(method):
    """On PyTorch, Keras multiplies one by the other in place."""
    rng = np.random.default_rng(0)
    tokens, y = rng.integers(0, 4, (6, 7)), rng.normal(size=(6, 7, 2))
    weights = rng.random((6, 7)).astype("float32")

    def trained(optimizer, **kwargs):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((7,), dtype="int32")
        x = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(2)(x))
        model = keras_slsam.sharpness_aware(model)
        model.compile(optimizer=optimizer, loss="mse", **kwargs)
        model.fit(tokens, y, 4, 2, sample_weight=weights, shuffle=False, verbose=0)
        return model.get_weights()

    for one, other in zip(trained("sgd", **EAGER), trained(methods(TINY)[method])):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


class Rematerialised(keras.layers.Layer):
    def __init__(self, remat):
        super().__init__()
        self.dense = keras.layers.Dense(5, activation="tanh")
        self.remat = remat

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return (keras.remat(self.dense) if self.remat else self.dense)(x)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras' own step has no gradients there")
@traced_methods("slsam")  # test_foreign_code.py has the others
def test_rematerialised_layers(method):
    x = np.linspace(-1, 1, 24).reshape(6, 4).astype("float32")

    def trained(remat, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [Rematerialised(remat), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model = keras_slsam.sharpness_aware(model)
        model.compile(methods(0.5)[method], "mse", **kwargs)
        for _ in range(3):
            model.train_on_batch(x, x[:, :1])
        return model.get_weights()

    for one, other in zip(trained(False, **EAGER), trained(True)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras' own step raises there")
def test_remat_scope():
    def trained(mode):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode=mode):
            layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
            model = keras.Sequential([keras.Input((4,)), *layers])
        model = keras_slsam.sharpness_aware(model)
        optimizer = keras_slsam.SLSAM("sgd", rho=0.5, active_fraction=0.6, seed=0)
        model.compile(optimizer=optimizer, loss="mse")
        x = np.linspace(-1, 1, 24).reshape(6, 4).astype("float32")
        for _ in range(4):
            model.train_on_batch(x, x[:, :1])
        return model.get_weights()

    for one, other in zip(trained(None), trained("full")):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND == "jax", reason="refused by Keras on JAX")
@traced_methods("sam", "slsam")
def test_random_numbers_without_a_seed(method):
    """They are new in each step, and the same in both of its passes."""

    class Noise(keras.layers.Layer):
        def call(self, x):
            return x + keras.random.normal(ops.shape(x))

    def outputs(optimizer, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(1), Noise()]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model = keras_slsam.sharpness_aware(model)
        model.compile(optimizer, lambda y, y_pred: ops.mean(y_pred), **kwargs)
        x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
        losses = []
        for _ in range(4):
            losses.append(model.train_on_batch(x, y))
            model.reset_metrics()
        return losses

    plain, ours = outputs("sgd", **EAGER), outputs(methods(TINY)[method])
    assert len(set(np.round(plain, 3))) == 4
    np.testing.assert_allclose(ours, plain, rtol=1e-4)


class DrawsOutside(keras.layers.Layer):
    """Draws from Python's and NumPy's generators, and from its own generator."""

    def __init__(self):
        super().__init__()
        self.own = np.random.default_rng(0)
        self.several = [random.Random(0), np.random.RandomState(0)]

    def call(self, x):
        python, numpy = self.several
        noise = random.random() + np.random.rand() + self.own.random()
        return x * (noise + python.random() + numpy.rand())


def lambda_that_draws():
    return keras.layers.Lambda(lambda x: x * (random.random() + np.random.rand()))


@pytest.mark.parametrize("drawing", [DrawsOutside, lambda_that_draws])
def test_random_numbers_of_python_and_numpy(drawing):
    """They are new in each step, the same in both passes, and advance by one pass."""

    def trained(optimizer):
        keras.utils.set_random_seed(0)
        random.seed(0), np.random.seed(0)
        layers = [keras.layers.Dense(3), drawing(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model = keras_slsam.sharpness_aware(model)
        model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
        x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
        for _ in range(2):
            model.train_on_batch(x, y)
        return [*model.get_weights(), random.random(), np.random.rand()]

    plain = trained("sgd")
    for method in ("sam", "slsam"):
        for one, other in zip(plain, trained(methods(TINY)[method])):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="others: test_errors")
def test_several_processes_need_a_shared_distribution(monkeypatch):
    import jax

    model, x, y = compiled("dense", keras_slsam.SAM("sgd"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="Received: None in 2 processes"):
        model.train_on_batch(x, y)
    shared = keras.distribution.DataParallel(auto_shard_dataset=False)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: shared)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match="jax_cpu_enable_async_dispatch=True"):
        model.train_on_batch(x, y)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    with pytest.raises(ValueError, match="Received: 2 devices"):
        model.train_on_batch(x, y)


class Centred(keras.layers.Layer):
    """Subtracts a running mean, which it updates first."""

    def build(self, input_shape):
        self.mean = self.add_weight(
            shape=(input_shape[-1],), initializer="zeros", trainable=False
        )

    def call(self, x):
        self.mean.assign(0.5 * self.mean + 0.5 * ops.mean(x, axis=0))
        return x - self.mean


@traced_methods("slsam")
def test_a_variable_that_is_read_after_it_was_assigned(method):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 1))

    def trained(optimizer, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(3), Centred(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model = keras_slsam.sharpness_aware(model)
        model.compile(optimizer=optimizer, loss="mse", **kwargs)
        for _ in range(5):
            model.train_on_batch(x, y)
        return model.get_weights()

    # On JAX, Keras' own step differentiates through the assigned value.
    expected = trained(methods(TINY)["sam"] if BACKEND == "jax" else "sgd", **EAGER)
    assert abs(expected[2]).max() > 0.01
    for one, other in zip(trained(methods(TINY)[method]), expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_layer_that_assigns_to_its_trainable_weight_is_refused():
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(3))
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=keras_slsam.SAM("sgd"), loss="mse")
    with pytest.raises(ValueError, match="assigns to the trainable weight.*kernel"):
        model.train_on_batch(np.ones((2, 4)), np.ones((2, 1)))


def test_a_custom_compute_loss():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):  # without the argument `training`, like `compute_loss`
            return self.dense(x)

        def compute_loss(self, x, y, y_pred, sample_weight=None):
            return 3.0 * ops.mean(y_pred)

    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    model = keras_slsam.sharpness_aware(Own())
    model.compile(optimizer=keras_slsam.SLSAM("sgd", active_fraction=1.0, seed=0))
    output = model.predict(x, verbose=0)
    logs = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], 3 * output.mean(), rtol=1e-5)
    after = model.predict(x, verbose=0)
    np.testing.assert_allclose(after - output, -0.01 * 3.0 * 3, rtol=1e-4)


def test_compute_loss_is_called_by_position():
    class Own(keras.Model):
        def compute_loss(self, inputs, targets, preds, w=None):
            return 3.0 * ops.mean(preds * w)

    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    weights = np.arange(4, dtype="float32")
    inputs = keras.Input((2,))
    model = keras_slsam.sharpness_aware(Own(inputs, keras.layers.Dense(1)(inputs)))
    model.compile(optimizer=keras_slsam.SAM("sgd"))
    expected = 3 * (model.predict(x, verbose=0)[:, 0] * weights).mean()
    history = model.fit(x, y, sample_weight=weights, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)


class Outputs(keras.Model):
    """Returns `wrap(tensor)`, and records the types that its metrics get."""

    def __init__(self, wrap):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")
        self.wrap = wrap

    def call(self, x):
        return self.wrap(self.dense(x))

    def compute_loss(self, x, y, y_pred, sample_weight):
        return ops.mean((keras.tree.flatten(y_pred)[0] - y) ** 2)

    def compute_metrics(self, x, y, y_pred, sample_weight):
        self.seen = keras.tree.map_structure(lambda t: type(t).__name__, y_pred)
        return self.get_metrics_result()


NESTED = {"b": 2.0, "d": [3, True], "e": np.arange(3)}
if BACKEND != "jax":  # Keras cannot build such a model on JAX
    NESTED.update(name="b", part=slice(2))
OUTPUTS = {
    "None": lambda tensor: (tensor, None),
    "nested": lambda tensor: {"a": (tensor, None), "c": [tensor], **NESTED},
}


@pytest.mark.parametrize(("run_eagerly", "method"), [(False, "slsam"), (True, "sam")])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_outputs_that_are_not_tensors(outputs, run_eagerly, method):
    def trained(optimizer):
        model = keras_slsam.sharpness_aware(Outputs(OUTPUTS[outputs]))
        model.compile(optimizer=optimizer, run_eagerly=run_eagerly)
        x, y = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")
        return model.fit(x, y, 2, shuffle=False, verbose=0).history["loss"], model.seen

    losses, seen = trained("sgd")
    ours, seen_by_ours = trained(methods(TINY)[method])
    np.testing.assert_allclose(ours, losses, rtol=1e-4)
    assert seen_by_ours == seen


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends build beforehand")
def test_an_eager_model_is_built_as_keras_does():
    """Builds the model by a call with data, not with symbolic tensors."""

    class Reads(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x * float(ops.convert_to_numpy(x).max()))

    model = keras_slsam.sharpness_aware(Reads())
    model.compile(optimizer=keras_slsam.SAM("sgd"), loss="mse", run_eagerly=True)
    history = model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


class Counts(keras.layers.Layer):
    """Counts the calls in Python, which are traces if the step is compiled."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


@pytest.mark.parametrize(
    ("method", "passes"), [("sam", 2), ("s2sam", 1), ("slsam", 2), ("sl+s2", 1)]
)
def test_number_of_forward_passes(method, passes):
    counts = Counts()
    model = keras.Sequential([keras.Input((3,)), counts, keras.layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=methods(0.05)[method], loss="mse", run_eagerly=True)
    data = np.ones((2, 3), "float32"), np.ones((2, 1), "float32")
    model.train_on_batch(*data)
    before = counts.calls
    model.train_on_batch(*data)
    assert counts.calls - before == passes


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is traced on PyTorch")
@pytest.mark.parametrize(
    "single_step", [True] if BACKEND == "tensorflow" else [False, True]
)
def test_no_retrace_after_the_first_steps(single_step):
    counts = Counts()
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8)(counts(keras.layers.Dense(8)(inputs)))
    model = keras_slsam.sharpness_aware(keras.Model(inputs, x))
    optimizer = keras_slsam.SLSAM(
        "adamw", active_fraction=0.4, single_step=single_step, seed=0
    )
    model.compile(optimizer=optimizer, loss="mse")
    data = np.ones((10, 8), "float32"), np.ones((10, 8), "float32")
    model.fit(*data, batch_size=4, epochs=1, verbose=0)
    before = counts.calls
    model.fit(*data, batch_size=4, epochs=6, verbose=0)
    assert counts.calls == before


class OneHot(keras_slsam.SAMTrainStep, keras.Model):
    """Converts the data for the loss."""

    def train_step(self, data):
        x, y = data[:2]
        return super().train_step((x, ops.one_hot(y, 3)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's second trace")
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
def test_variables_are_made_before_the_first_trace(method, eager, monkeypatch):
    passes = []
    first = backend.Passes.first
    monkeypatch.setattr(
        backend.Passes, "first", lambda *args: passes.append(1) or first(*args)
    )

    def loss(y, y_pred):
        if eager:
            y.numpy()
        return keras.losses.categorical_crossentropy(y, y_pred, from_logits=True)

    inputs = keras.Input((8,))
    model = OneHot(inputs, keras.layers.Dense(3)(inputs))
    model.compile(
        optimizer=keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0),
        loss=loss,
        metrics=["accuracy"],
        run_eagerly=eager,
    )
    x = np.random.default_rng(0).normal(size=(10, 8)).astype("float32")
    y = np.arange(10) % 3
    expected = (model.predict(x, verbose=0).argmax(axis=1) == y).mean()
    model.optimizer.learning_rate = 0.0
    if method == "fit":
        accuracy = model.fit(x, y, batch_size=5, verbose=0).history["accuracy"][0]
    else:
        for _ in range(2):
            accuracy = model.train_on_batch(x, y, return_dict=True)["accuracy"]
    # Once if the step is traced, and in both steps otherwise.
    assert len(passes) == (2 if eager else 1)
    assert accuracy == pytest.approx(expected)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's program size")
@pytest.mark.parametrize("method", ["sam", "slsam"])
def test_the_compiled_step_grows_in_proportion_to_the_depth(method):
    import jax

    def size(depth):
        model = keras.Sequential([keras.Input((4,))])
        for _ in range(depth):
            model.add(keras.layers.Dense(4, activation="tanh"))
        model.compile(loss="mse")
        data = np.ones((3, 4), "float32"), np.ones((3, 4), "float32")
        optimizer = methods(rho=0.05)[method]
        step = jax.jit(
            lambda state: keras_slsam.stateless_step(model, optimizer, state, data)
        )
        state = keras_slsam.get_state(model, optimizer, data)
        program = step.lower(state).compile()
        return program.as_text().count("\n")

    sizes = [size(depth) for depth in (3, 6, 12)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


@pytest.mark.skipif(BACKEND != "torch", reason="one program on JAX and TensorFlow")
@pytest.mark.parametrize("accumulated", [None, 2])
@pytest.mark.parametrize("sampler", ["bandit", "proportional", "uniform"])
def test_two_synchronisations_per_step(sampler, accumulated, monkeypatch):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Synchronisations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # `.item()`, `bool()`, `int()` and data-dependent shapes call these.
            name = func.overloadpacket.__name__
            self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero")
            return func(*args, **(kwargs or {}))

    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self)
    )

    def count(optimizer):
        model, x, y = compiled("dense", optimizer)
        x, y = torch.tensor(x), torch.tensor(y)
        for _ in range(2):
            lists.clear()
            with Synchronisations() as synchronisations:
                model.train_step((x, y))
        return synchronisations.count + len(lists)

    def base():
        return keras.optimizers.AdamW(gradient_accumulation_steps=accumulated)

    plain = count(base())
    ours = count(keras_slsam.SLSAM(base(), sampler=sampler, seed=0))
    # One for the mask, and one for the check that the gradients are finite.
    assert ours <= plain + 2


def test_custom_loop_takes_the_same_step_as_fit():
    def prepared(**kwargs):
        optimizer = keras_slsam.SLSAM(
            "adamw", active_fraction=0.5, arms="layer", seed=0
        )
        return compiled("two_inputs_and_outputs", optimizer, **kwargs)

    model, x, y = prepared(**EAGER)
    data = keras.tree.map_structure(lambda a: np.concatenate([a] * 4), (x, y))
    history = fit(model, *data, epochs=1, batch_size=zoo.BATCH)
    custom, x, y = prepared()
    logs = run_custom_loop(custom, custom.optimizer, (x, y), steps=4)
    for one, other in zip(model.get_weights(), custom.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    # Metrics and the losses of the outputs are averages over all steps.
    assert sorted(history) == sorted(logs) and len(logs) == 4
    for key, (value,) in history.items():
        np.testing.assert_allclose(float(logs[key]), value, rtol=1e-4)


def run_custom_loop(model, optimizer, batch, steps):
    """Runs the training loops of the README. Returns the last metrics."""
    batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
    if BACKEND == "jax":
        import jax

        step = jax.jit(
            lambda state, data: keras_slsam.stateless_step(
                model, optimizer, state, data
            )
        )
        state = keras_slsam.get_state(model, optimizer, batch)
        for _ in range(steps):
            logs, state = step(state, batch)
        keras_slsam.set_state(model, optimizer, state)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(
            lambda x, y: keras_slsam.step(model, optimizer, (x, y)),
            jit_compile=model.jit_compile,
        )
        for _ in range(steps):
            logs = step(*batch)
    else:
        for _ in range(steps):
            logs = keras_slsam.step(model, optimizer, batch)
    return logs


def test_state_that_lacks_variables_is_refused():
    optimizer = keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0)
    model, x, y = compiled("dense", optimizer)
    empty = ([], [], [], [])
    way_out = r"`state`.*get_state\(model, optimizer\)"
    with pytest.raises(ValueError, match=way_out):
        keras_slsam.stateless_step(model, optimizer, empty, (x, y))
    with pytest.raises(ValueError, match=way_out):
        keras_slsam.set_state(model, optimizer, empty)
    state = keras_slsam.get_state(model, optimizer)
    if BACKEND == "jax":  # on other backends only `fit` and `step` create variables
        with pytest.raises(ValueError, match="Give `get_state` a batch"):
            keras_slsam.stateless_step(model, optimizer, state, (x, y))


def test_a_state_is_a_copy_that_can_be_restored():
    optimizer = keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0)
    model, x, y = compiled("dense", optimizer, **EAGER)
    before = keras_slsam.get_state(model, optimizer, (x, y))
    assert not any(np.any(ops.convert_to_numpy(value)) for value in before[3])
    model.train_on_batch(x, y)
    after = keras_slsam.get_state(model, optimizer)

    def equal(state, other):
        pairs = zip(keras.tree.flatten(state), keras.tree.flatten(other), strict=True)
        return [np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs]

    assert not all(equal(before, after))
    keras_slsam.set_state(model, optimizer, before)
    assert all(equal(before, keras_slsam.get_state(model, optimizer)))
    assert not all(equal(before, after))


def test_get_state_does_not_change_a_scaled_optimizer():
    inner = keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0)
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    model, x, y = compiled("dense", inner)
    first = keras_slsam.get_state(model, scaled, (x, y))
    scaled.dynamic_scale.assign(2.0)
    second = keras_slsam.get_state(model, scaled)
    assert [len(values) for values in first] == [len(values) for values in second]
    assert float(ops.convert_to_numpy(scaled.dynamic_scale)) == 2.0


def test_the_state_of_a_model_that_is_built_by_data():
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile(loss="mse")
    data = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    optimizer = keras_slsam.SAM("sgd")
    state = keras_slsam.get_state(model, optimizer, data)
    assert optimizer.built and len(state[0]) == 2


def test_a_plain_optimizer_trains_as_keras_does():
    assert_same_training("dense", "sgd")


def test_mixin():
    class Model(keras_slsam.SAMTrainStep, keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Model()
    model.compile(optimizer=keras_slsam.SAM("sgd", rho=0.1), loss="mse")
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    assert int(model.optimizer.iterations) == 1
    assert keras_slsam.sharpness_aware(model) is model


def test_mixin_after_the_model_is_refused():
    with pytest.raises(ValueError, match=r"`SAMTrainStep` before `keras.Model`"):

        class Model(keras.Model, keras_slsam.SAMTrainStep):
            pass


def test_sharpness_aware_twice_is_once():
    model, x, y = compiled("dense", keras_slsam.SAM("sgd"))
    step = model.train_step
    assert keras_slsam.sharpness_aware(model) is model
    assert model.train_step is step


@pytest.mark.parametrize("single_step", [False, True])
def test_adaptive_perturbation_matches_the_formula(single_step):
    """Compares with NumPy: one Dense layer, mean squared error."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    masks = [[True, False], [True, True], [False, True], [True, True]]
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    start = [rng.normal(size=(3, 2)), rng.normal(size=2)]
    model.set_weights(start)
    model = keras_slsam.sharpness_aware(model)
    rho = 0.3
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.SGD(0.1),
        rho,
        sampler=Replay(masks),
        adaptive=True,
        single_step=single_step,
    )
    model.compile(optimizer=optimizer, loss="mse")

    def gradients(weights):
        error = x @ weights[0] + weights[1] - y
        return [x.T @ error * 2 / error.size, error.sum(0) * 2 / error.size]

    weights, previous = [w.copy() for w in start], [0 * w for w in start]
    for mask in masks:
        g = gradients(weights)
        along = previous if single_step else g
        scaled = [abs(w) * a for w, a in zip(weights, along)]
        norm = np.sqrt(sum((s**2).sum() for s, on in zip(scaled, mask) if on))
        ascent = [
            on * rho / (norm + 1e-12) * w**2 * a
            for w, a, on in zip(weights, along, mask)
        ]
        h = gradients([w + e for w, e in zip(weights, ascent)])
        norms = [
            np.sqrt((f**2).sum()) * on for f, on in zip(h if single_step else g, mask)
        ]
        weights = [w - 0.1 * on * f for w, f, on in zip(weights, h, mask)]
        previous = [f if on else p for f, p, on in zip(h, previous, mask)]
        model.train_on_batch(x.astype("float32"), y.astype("float32"))
        np.testing.assert_allclose(
            ops.convert_to_numpy(optimizer.gradient_norms), norms, rtol=1e-4, atol=1e-6
        )
        for got, expected in zip(model.get_weights(), weights):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_rst_perturbs_a_share_of_the_steps_that_can_be_set():
    def step(model):
        model.set_weights(start)
        model.train_on_batch(x, y)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    optimizer = keras_slsam.RST("sgd", rho=0.5, probability=0.0, seed=0)
    model, x, y = compiled("dense", optimizer)
    start = model.get_weights()
    sam = step(compiled("dense", keras_slsam.SAM("sgd", rho=0.5), **EAGER)[0])
    plain = step(compiled("dense", "sgd", **EAGER)[0])
    assert abs(plain - sam).max() > 1e-4
    counts = []
    for change, probability in ((0.0, 0.0), (1.0, 1.0), (-0.5, 0.5)):
        optimizer.probability = optimizer.probability + change
        assert optimizer.get_config()["probability"] == probability
        weights = np.stack([step(model) for _ in range(12)])
        is_sam = abs(weights - sam).max(axis=1) < 1e-6
        is_plain = abs(weights - plain).max(axis=1) < 1e-6
        assert (is_sam ^ is_plain).all()
        counts.append(is_sam.sum())
    assert counts[:2] == [0, 12] and 2 <= counts[2] <= 10


def test_a_thread_that_loads_data_draws_each_number_once():
    """A step does not reset the global generators if no layer may draw from them."""
    model, x, y = compiled("shared", keras_slsam.SAM("sgd"))
    numbers = []
    loss = model.compute_loss

    def drawing(*args, **kwargs):
        numbers.append(np.random.random())
        return loss(*args, **kwargs)

    model.compute_loss = drawing
    model.run_eagerly = True
    model.train_on_batch(x, y)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras' own step refuses them, too")
def test_logs_may_be_variables():
    class Logging(keras.Sequential):
        def compute_metrics(self, *args):
            logs = super().compute_metrics(*args)
            return {**logs, "rate": self.optimizer.learning_rate}

    model = Logging([keras.Input((3,)), keras.layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(keras_slsam.SAM(keras.optimizers.SGD(0.25)), "mse")
    history = model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0).history
    assert history["rate"] == [0.25]
