"""`rho` and `probability` as state: set between steps, or given as a schedule."""

import functools

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from replay import Replay
from test_work import counter
from test_work import dense_chain
from test_work import executed

import keras_slsam

BACKEND = keras.config.backend()
RATE, STEPS = 0.1, 6
RADII = [0.0, 0.3, 0.0, 0.5, 0.1, 0.2]
BATCHES = np.random.default_rng(0).normal(size=(STEPS, 8, 4)).astype("float32")
TARGETS = np.random.default_rng(1).normal(size=(STEPS, 8, 1)).astype("float32")
START = np.linspace(-1, 1, 4).reshape(4, 1)


@keras.saving.register_keras_serializable("tests")
class Table(keras.optimizers.schedules.LearningRateSchedule):
    """Gives the values of a list."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def __call__(self, step):
        return ops.take(ops.convert_to_tensor(self.values), ops.cast(step, "int32"))

    def get_config(self):
        return {"values": self.values}


def compiled(rho, method=keras_slsam.SAM, **kwargs):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.set_weights([START])
    model = keras_slsam.sharpness_aware(model)
    optimizer = method(keras.optimizers.SGD(RATE), rho=rho)
    model.compile(optimizer=optimizer, loss="mse", **kwargs)
    return model


def gradient(w, x, y):
    return 2 * x.T @ (x @ w - y) / len(x)


def by_hand(radii):
    w = START
    for rho, x, y in zip(radii, BATCHES, TARGETS):
        g = gradient(w, x, y)
        w = w - RATE * gradient(w + rho * g / np.linalg.norm(g), x, y)
    return w


def fit(model, callbacks=(), part=slice(None)):
    x, y = BATCHES[part].reshape(-1, 4), TARGETS[part].reshape(-1, 1)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model.get_weights()[0]


def load_radius_of_0(optimizer):
    optimizer.set_weights(
        [
            ops.convert_to_numpy(0.0 * v if v is optimizer.rho else v)
            for v in optimizer.variables
        ]
    )


def test_rho_follows_a_schedule_that_is_saved_with_the_model(tmp_path):
    model = compiled(Table(RADII))
    np.testing.assert_allclose(fit(model, part=slice(4)), by_hand(RADII[:4]), rtol=1e-5)
    assert float(model.optimizer.rho) == pytest.approx(RADII[3])
    model.save(tmp_path / "model.keras")
    model = keras_slsam.sharpness_aware(
        keras.saving.load_model(tmp_path / "model.keras")
    )
    assert model.optimizer.get_config()["rho"]["config"] == {"values": RADII}
    assert float(model.optimizer.rho) == pytest.approx(RADII[3])
    found = fit(model, part=slice(4, None))
    np.testing.assert_allclose(found, by_hand(RADII), rtol=1e-5)


def test_rho_follows_a_function_that_gets_a_tensor():
    kinds = []

    def rho(step):
        kinds.append(ops.is_tensor(step))
        return 0.1 * ops.cast(step, "float32")

    expected = by_hand([0.1 * step for step in range(STEPS)])
    np.testing.assert_allclose(fit(compiled(rho)), expected, rtol=1e-5)
    assert all(kinds) and len(kinds) > 1


@keras.saving.register_keras_serializable("tests")
def every_second(step):
    return ops.where(step % 2 == 0, 0.5, 0.0)


def test_a_function_is_saved_by_its_name():
    optimizer = keras_slsam.RST("sgd", rho=every_second, probability=every_second)
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    for setting in (again._rho, again._probability):
        assert setting.schedule is every_second


def test_rho_follows_a_function_that_returns_a_number():
    model = compiled(lambda step: RADII[int(step)], run_eagerly=True)
    np.testing.assert_allclose(fit(model), by_hand(RADII), rtol=1e-5)


def test_a_rho_that_a_callback_sets_acts_on_the_next_step(tmp_path):
    model = compiled(0.0)

    def change(batch, logs):
        if batch + 1 < STEPS:
            model.optimizer.rho = RADII[batch + 1]

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
    expected = by_hand([0.0, *RADII[1:]])
    np.testing.assert_allclose(fit(model, [callback]), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert float(restored.rho) == pytest.approx(RADII[-1])


def test_a_probability_that_a_callback_sets_acts_on_the_next_step(tmp_path):
    model = compiled(0.3, functools.partial(keras_slsam.RST, probability=0.0))
    after = [1.0, 0.0, 1.0, 0.0, 1.0, 0.25]

    def change(batch, logs):
        model.optimizer.probability = after[batch]

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
    expected = by_hand([0.0, 0.3, 0.0, 0.3, 0.0, 0.3])
    np.testing.assert_allclose(fit(model, [callback]), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert float(restored.probability) == 0.25


def test_a_probability_follows_a_schedule_that_is_saved_with_the_model(tmp_path):
    chosen = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    rst = functools.partial(keras_slsam.RST, probability=Table(chosen))
    model = compiled(0.3, rst)
    expected = by_hand([0.3 * each for each in chosen])
    np.testing.assert_allclose(fit(model), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert restored.get_config()["probability"]["config"] == {"values": chosen}
    assert float(restored.probability) == chosen[-1]


def test_a_step_without_a_radius_or_not_chosen_executes_one_pass():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    chosen = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    optimizer = keras_slsam.RST("sgd", rho=Table(RADII), probability=Table(chosen))
    count = counter(model, optimizer, x)
    for step, (rho, probability) in enumerate(zip(RADII, chosen)):
        optimizer.iterations.assign(step)
        assert count() == everything * (2 if rho and probability else 1)


def test_a_schedule_leaves_out_the_second_pass_of_the_active_arms():
    model, products, x = dense_chain()
    mask = [arm % 3 == 1 for arm in range(len(model.trainable_variables))]
    active = {v.path for v, on in zip(model.trainable_variables, mask) if on}
    optimizer = keras_slsam.SLSAM("sgd", rho=Table(RADII), sampler=Replay([mask]))
    count = counter(model, optimizer, x)
    for step in (0, 1, 2):
        optimizer.iterations.assign(step)
        one, both = products.flops(active), products.step(active, optimizer)
        assert count() == (both if RADII[step] else one)


def test_a_radius_that_is_set_to_0_leaves_out_the_second_pass():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    optimizer = keras_slsam.SAM("sgd", rho=0.0)
    count = counter(model, optimizer, x)
    for rho in (0.0, 0.2, 0.0):
        optimizer.rho = rho
        assert count() == everything * (2 if rho else 1)


def test_a_radius_of_0_in_a_state_leaves_out_the_second_pass():
    model, products, x = dense_chain()
    optimizer = keras_slsam.SAM("sgd", rho=0.2)
    model.compile(loss="mse")
    weights, others, own, metrics = keras_slsam.get_state(model, optimizer)
    place = [v is optimizer.rho for v in optimizer.variables].index(True)
    own[place] = 0 * own[place]
    keras_slsam.set_state(model, optimizer, (weights, others, own, metrics))
    everything = products.flops({v.path for v in model.trainable_variables})
    assert executed(model, optimizer, x) == everything


def test_a_schedule_cannot_be_set():
    optimizer = keras_slsam.RST("sgd", rho=Table(RADII), probability=Table([0.5]))
    plain = keras_slsam.SAM("sgd")
    with pytest.raises(ValueError, match="Pass a schedule to the optimizer"):
        plain.rho = Table(RADII)
    with pytest.raises(ValueError, match="`rho` follows a schedule.*0.2"):
        optimizer.rho = 0.2
    with pytest.raises(ValueError, match="`probability` follows a schedule.*0.2"):
        optimizer.probability = 0.2


def test_a_schedule_that_starts_below_0_is_refused():
    with pytest.raises(ValueError, match="`rho`.*>= 0.*Received"):
        keras_slsam.SAM("sgd", rho=lambda step: -0.1)


# S2-SAM has no direction in the first step.
@pytest.mark.parametrize(("method", "first"), [("SAM", 0.2), ("S2SAM", 0.0)])
def test_a_schedule_below_0_or_not_finite_counts_as_0(method, first):
    model = compiled(Table([0.2, -0.5, np.nan, np.inf]), getattr(keras_slsam, method))
    for x, y in zip(BATCHES[:4], TARGETS):
        model.train_on_batch(x, y)
    expected = by_hand([first, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-5)
    assert float(model.optimizer.rho) == 0


class Radius:
    def at(self, step):
        return 0.1


@pytest.mark.parametrize(
    "rho",
    [
        *(Table, Radius().at, functools.partial(max, 0.1)),
        *(lambda: 0.1, lambda step: None),
    ],
)
def test_functions_that_cannot_be_schedules_are_refused(rho):
    with pytest.raises(ValueError, match="`rho` of `SAM`.*(saved|ops.cast).*Received"):
        keras_slsam.SAM("sgd", rho=rho)


def test_a_radius_is_set_within_a_loss_scaler_only():
    model = compiled(0.3)
    scaler = keras.optimizers.LossScaleOptimizer(model.optimizer)
    model.compile(optimizer=scaler, loss="mse")

    def change(optimizer, batch, logs):
        if batch + 1 < STEPS:
            optimizer.rho = RADII[batch + 1]

    def setting(optimizer):
        change_it = functools.partial(change, optimizer)
        return keras.callbacks.LambdaCallback(on_train_batch_end=change_it)

    with pytest.raises(ValueError, match="`rho` was set on.*`del optimizer.rho`"):
        fit(model, [setting(scaler)])
    del scaler.rho
    model.set_weights([START])
    found = fit(model, [setting(scaler.inner_optimizer)])
    expected = by_hand([0.3, *RADII[1:]])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")
def test_a_callback_sets_rho_under_a_distribution():
    distribution = keras.distribution.DataParallel(devices=["cpu:0"])
    keras.distribution.set_distribution(distribution)
    try:
        model = compiled(0.3)

        def change(batch, logs):
            model.optimizer.rho = [0.0, 0.0, 0.2, 0.1, 0.0, 0.0][batch]

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
        expected = by_hand([0.3, 0.0, 0.0, 0.2, 0.1, 0.0])
        np.testing.assert_allclose(fit(model, [callback]), expected, rtol=1e-5)
    finally:
        keras.distribution.set_distribution(None)


def test_a_train_function_without_a_condition_is_made_again_for_a_radius_of_0():
    model = compiled(0.1)
    x, y = BATCHES[0], TARGETS[0]
    model.train_on_batch(x, y)
    before, optimizer = model.train_function, model.optimizer
    # The radius is loaded first, and set later.
    load_radius_of_0(optimizer)
    model.train_on_batch(x, y)
    with_a_condition = model.train_function
    assert with_a_condition is not before
    for rho in (0.2, 0.0, 0.1):
        optimizer.rho = rho
        model.train_on_batch(x, y)
        assert model.train_function is with_a_condition


def test_a_radius_that_changes_to_0_and_back_compiles_once():
    model, functions = compiled(0.1), []

    def change(batch, logs):
        functions.append(model.train_function)
        model.optimizer.rho = RADII[batch]

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
    expected = by_hand([0.1, *RADII[:-1]])
    np.testing.assert_allclose(fit(model, [callback]), expected, rtol=1e-5)
    first, second, *others = functions
    assert first is not second and all(each is second for each in others)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="data of TensorFlow")
def test_a_radius_is_set_to_0_where_data_of_unknown_length_end():
    import tensorflow as tf

    model = compiled(0.3)
    spec = tuple(tf.TensorSpec(part.shape[1:]) for part in (BATCHES, TARGETS))
    data = tf.data.Dataset.from_generator(
        lambda: zip(BATCHES[:3], TARGETS), output_signature=spec
    )

    def change(batch, logs):
        if batch == 2:
            model.optimizer.rho = 0.0

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
    model.fit(data, epochs=2, verbose=0, callbacks=[callback])
    w = by_hand([0.3] * 3)
    for x, y in zip(BATCHES[:3], TARGETS):
        w = w - RATE * gradient(w, x, y)
    np.testing.assert_allclose(model.get_weights()[0], w, rtol=1e-5)


class Overrides(keras.Model):
    """Takes the step in a `train_step` of its own."""

    def train_step(self, *args):
        if BACKEND == "jax":
            return keras_slsam.stateless_step(self, self.optimizer, *args)
        return keras_slsam.step(self, self.optimizer, *args)


def test_a_callback_sets_rho_of_a_model_with_its_own_train_step():
    inputs = keras.Input((4,))
    model = Overrides(inputs, layers.Dense(1, use_bias=False)(inputs))
    model.set_weights([START])
    optimizer = keras_slsam.SAM(keras.optimizers.SGD(RATE), rho=RADII[1])
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)

    def change(batch, logs):
        optimizer.rho = [0.3, 0.2, 0.5, 0.1, 0.4, 0.4][batch]

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
    expected = by_hand([RADII[1], 0.3, 0.2, 0.5, 0.1, 0.4])
    np.testing.assert_allclose(fit(model, [callback]), expected, rtol=1e-5)
