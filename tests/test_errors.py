"""Bad input is refused early, with the argument, the value and a solution."""

import keras
import numpy as np
import pytest

import keras_slsam
from keras_slsam import samplers

BACKEND = keras.config.backend()
METHODS = [
    keras_slsam.SAM,
    keras_slsam.S2SAM,
    keras_slsam.SLSAM,
    keras_slsam.RST,
]


def small_model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


def fit(model, optimizer, **kwargs):
    model.compile(optimizer=optimizer, loss="mse", **kwargs)
    return model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "big", True])
def test_rho(method, rho):
    with pytest.raises(ValueError, match=r"`rho`.*>= 0.*Received"):
        method("sgd", rho=rho)


def test_settings_are_checked_when_they_are_set():
    optimizer = keras_slsam.RST("sgd")
    for rho in (-0.1, float("nan"), "big", True, keras.ops.ones(2)):
        with pytest.raises(ValueError, match=r"`rho`.*>= 0.*Received"):
            optimizer.rho = rho
    for probability in (-0.1, 1.1, float("nan"), "half", True):
        with pytest.raises(ValueError, match=r"`probability`.*\[0, 1\].*Received"):
            optimizer.probability = probability
    assert optimizer.get_config()["rho"] == 0.05
    assert optimizer.get_config()["probability"] == 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", [None, "no such optimizer", 3, object(), {"a": 1}])
def test_base_optimizer_is_none(method, base):
    with pytest.raises(ValueError, match=r"`base_optimizer`.*adamw"):
        method(base)


@pytest.mark.parametrize("method", METHODS)
def test_base_optimizer_is_missing(method):
    with pytest.raises(ValueError, match="`base_optimizer`"):
        method()


@pytest.mark.parametrize("method", METHODS)
def test_base_optimizer_is_already_wrapped(method):
    with pytest.raises(ValueError, match=r"`base_optimizer`.*optimizer already"):
        method(keras_slsam.SAM("sgd"))


@pytest.mark.parametrize("method", METHODS)
def test_base_optimizer_scales_the_loss(method):
    with pytest.raises(ValueError, match="scal"):
        method(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match="loss_scale_factor"):
        method(keras.optimizers.SGD(loss_scale_factor=2.0))


def test_base_optimizer_belongs_to_another_model():
    base = keras.optimizers.SGD()
    base.build(small_model().trainable_variables)
    optimizer = keras_slsam.SAM(base)
    with pytest.raises(ValueError, match=r"`base_optimizer`.*built.*new one"):
        optimizer.build(small_model().trainable_variables)


def test_base_optimizer_that_cannot_skip_arms():
    class Whole(keras.optimizers.Optimizer):
        def __init__(self):
            super().__init__(learning_rate=0.1)

    with pytest.raises(ValueError, match=r"update_step.*Whole"):
        keras_slsam.SLSAM(Whole())


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan"), "most", True])
@pytest.mark.parametrize("sampler", ["bandit", "proportional", "uniform", "all"])
def test_active_fraction(sampler, fraction):
    with pytest.raises(ValueError, match=r"`active_fraction`.*Received"):
        keras_slsam.SLSAM("sgd", active_fraction=fraction, sampler=sampler)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan"), "half", True])
def test_probability(probability):
    with pytest.raises(ValueError, match=r"`probability`.*\[0, 1\].*Received"):
        keras_slsam.RST("sgd", probability=probability)


@pytest.mark.parametrize("sampler", ["thompson", None, 3, samplers.Bandit])
def test_unknown_sampler(sampler):
    with pytest.raises(ValueError, match=r"`sampler`.*'bandit'.*Received"):
        keras_slsam.SLSAM("sgd", sampler=sampler)


def test_a_sampler_object_excludes_sampler_arguments():
    for kwargs in ({"active_fraction": 0.2}, {"seed": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`.*own"):
            keras_slsam.SLSAM("sgd", sampler=samplers.Uniform(0.2), **kwargs)


@pytest.mark.parametrize("seed", [1.5, "a", True])
def test_seed(seed):
    with pytest.raises(ValueError, match=r"`seed`.*Received"):
        keras_slsam.SLSAM("sgd", seed=seed)
    with pytest.raises(ValueError, match=r"`seed`.*Received"):
        keras_slsam.RST("sgd", seed=seed)


@pytest.mark.parametrize("arms", ["neuron", None, 3])
def test_unknown_arms(arms):
    with pytest.raises(ValueError, match=r"`arms`.*'block'.*Received"):
        keras_slsam.SLSAM("sgd", arms=arms)


def test_arms_that_are_not_hashable():
    optimizer = keras_slsam.SLSAM("sgd", arms=lambda variable: [variable.path])
    for _ in range(2):  # a failed call changes nothing
        with pytest.raises(ValueError, match=r"`arms`.*hashable.*Received"):
            optimizer.build(small_model().trainable_variables)
    again = keras_slsam.SLSAM(optimizer.base_optimizer)
    again.build(small_model().trainable_variables)


@pytest.mark.parametrize("method", METHODS)
def test_model_without_the_train_step(method):
    model = small_model()
    before = model.get_weights()
    model.compile(optimizer=method("sgd"), loss="mse")
    # Not `fit`: if it raises on JAX, Keras has discarded the weights.
    with pytest.raises(ValueError, match=r"keras_slsam.sharpness_aware\(model\)"):
        model.train_on_batch(np.ones((4, 2)), np.ones((4, 1)))
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("model", [None, keras.layers.Dense(1), "model", keras.Model])
def test_sharpness_aware_of_something_else(model):
    with pytest.raises(ValueError, match=r"`model`.*keras.Model.*Received"):
        keras_slsam.sharpness_aware(model)


def test_sharpness_aware_of_a_model_with_its_own_train_step():
    class Own(keras.Model):
        def train_step(self, *args):
            return {}

    call = (
        r"keras_slsam.stateless_step\(self, self.optimizer, state, data\)"
        if BACKEND == "jax"
        else r"keras_slsam.step\(self, self.optimizer, data\)"
    )
    with pytest.raises(ValueError, match=f"Own.*overrides `train_step`.*{call}"):
        keras_slsam.sharpness_aware(Own())


def test_sharpness_aware_of_a_model_with_a_step_set_on_it():
    model = small_model()
    model.train_step = lambda *args: {}
    with pytest.raises(ValueError, match="overrides `train_step`"):
        keras_slsam.sharpness_aware(model)


def test_sharpness_aware_with_nnx_enabled(monkeypatch):
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"KERAS_NNX_ENABLED.*SAMTrainStep.*Received"):
        keras_slsam.sharpness_aware(small_model())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampler", samplers.Uniform(0.5)),
        ("base_optimizer", keras.optimizers.SGD()),
        ("adaptive", True),
        ("single_step", True),
    ],
)
def test_constructor_arguments_cannot_be_replaced(name, value):
    optimizer = keras_slsam.SLSAM("sgd")
    with pytest.raises(ValueError, match=rf"`{name}` of `SLSAM` cannot.*Received"):
        setattr(optimizer, name, value)


class Drawing(samplers.Sampler):
    """Draws the given mask."""

    def __init__(self, mask):
        self.mask = mask

    def draw(self):
        return keras.ops.convert_to_tensor(self.mask)


@pytest.mark.parametrize("mask", [[True], [[True, False]], True])
def test_sampler_with_another_shape(mask):
    model = keras_slsam.sharpness_aware(small_model())
    optimizer = keras_slsam.SLSAM("sgd", sampler=Drawing(mask))
    with pytest.raises(ValueError, match=r"`draw\(\)`.*num_arms.*\(2,\).*Received"):
        fit(model, optimizer)


def test_sampler_without_an_active_arm():
    model = keras_slsam.sharpness_aware(small_model())
    optimizer = keras_slsam.SLSAM("sgd", sampler=Drawing([False, False]))
    with pytest.raises(ValueError, match=r"`draw\(\)`.*at least one active arm"):
        fit(model, optimizer, run_eagerly=True)


def test_sampler_that_draws_ints():
    model = keras_slsam.sharpness_aware(small_model())
    optimizer = keras_slsam.SLSAM("sgd", sampler=Drawing([1, 0]))
    before = model.get_weights()
    fit(model, optimizer)
    changed = [(a != b).any() for a, b in zip(before, model.get_weights())]
    assert changed == [True, False]


def test_sampler_of_another_optimizer():
    sampler = samplers.Uniform(0.5)
    first = keras_slsam.SLSAM("sgd", sampler=sampler)
    first.build(small_model().trainable_variables)
    second = keras_slsam.SLSAM("sgd", sampler=sampler)
    with pytest.raises(ValueError, match=r"`sampler`.*another optimizer. Received"):
        second.build(small_model().trainable_variables)


def test_a_single_arm_gives_a_warning():
    optimizer = keras_slsam.SLSAM("sgd", arms="block")
    with pytest.warns(UserWarning, match="single arm"):
        optimizer.build(small_model().trainable_variables)


def test_weights_frozen_after_compile():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)]
    )
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM("sgd", seed=0)
    fit(model, optimizer)
    model.layers[0].trainable = False
    with pytest.raises(ValueError, match=r"compile"):
        keras_slsam.step(model, optimizer, (np.ones((4, 2)), np.ones((4, 1))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", ["no", 0.1, None, 1])
def test_switches_are_bools(method, value):
    with pytest.raises(ValueError, match=r"`adaptive`.*True or False.*Received"):
        method("sgd", adaptive=value)
    with pytest.raises(ValueError, match=r"`single_step`.*True or False.*Received"):
        keras_slsam.SLSAM("sgd", single_step=value)


@pytest.mark.parametrize("name", ["arms", "active", "gradient_norms"])
def test_arms_of_an_optimizer_that_is_not_built(name):
    with pytest.raises(ValueError, match=r"no arms.*optimizer.build"):
        getattr(keras_slsam.SLSAM("sgd"), name)


@pytest.mark.parametrize("model", [None, "model", small_model()])
def test_step_with_a_model_that_is_not_compiled(model):
    with pytest.raises(ValueError, match=r"`model`.*compiled.*Received"):
        keras_slsam.step(model, keras_slsam.SAM("sgd"), (np.ones((4, 2)),))


def test_step_with_another_optimizer():
    model = small_model()
    model.compile(loss="mse")
    with pytest.raises(ValueError, match=r"`optimizer`.*SLSAM.*Received"):
        keras_slsam.step(model, "sgd", (np.ones((4, 2)), np.ones((4, 1))))


@pytest.mark.skipif(BACKEND != "torch", reason="JAX and TensorFlow compile the step")
def test_jit_compile_of_a_model_saved_on_another_backend(tmp_path):
    model = small_model()
    model.compile(optimizer=keras_slsam.SAM("sgd"), loss="mse", jit_compile=True)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="the saved optimizer has 0 variables"):
        model = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="jit_compile=True.*set to False"):
        model = keras_slsam.sharpness_aware(model)
    assert model.jit_compile is False
    model.train_on_batch(np.ones((4, 2)), np.ones((4, 1)))


@pytest.mark.skipif(BACKEND != "torch", reason="JAX and TensorFlow compile the step")
@pytest.mark.parametrize("method", METHODS)
def test_jit_compile_on_torch(method):
    model = keras_slsam.sharpness_aware(small_model())
    with pytest.raises(ValueError, match=r"jit_compile=True.*jit_compile=False"):
        fit(model, method("sgd"), jit_compile=True)


@pytest.mark.skipif(BACKEND != "torch", reason="does not depend on the backend")
def test_an_unsupported_backend_is_refused():
    import pathlib
    import subprocess
    import sys

    environment = {"KERAS_BACKEND": "numpy", "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", "import keras_slsam"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(keras_slsam.__file__).parents[1],
    )
    assert "KERAS_BACKEND" in result.stderr and "'jax'" in result.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_failing_first_step_fails_again_with_the_same_error(method):
    def loss(y, y_pred):
        raise ValueError("no loss")

    model = keras_slsam.sharpness_aware(small_model())
    model.compile(optimizer=method("sgd"), loss=loss)
    for _ in range(2):
        with pytest.raises(ValueError, match="no loss"):
            model.train_on_batch(np.ones((4, 2)), np.ones((4, 1)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's strategies")
def test_a_strategy_with_one_device_needs_nothing_else():
    import tensorflow as tf

    devices = [d.name for d in tf.config.list_logical_devices("CPU")]
    with tf.distribute.OneDeviceStrategy(devices[0]).scope():
        model = keras_slsam.sharpness_aware(small_model())
        fit(model, keras_slsam.SLSAM("sgd", active_fraction=1.0, seed=0))
