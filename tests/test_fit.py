"""Features of `fit`: each row of the table in docs/fit.md.

Most tests compare with Keras' own step. With a tiny `rho` and all arms active, every
method equals the base optimizer, so `fit` must give the same results.
"""

import copy
import os
import pathlib
import pickle
import warnings

import keras
import matrix
import numpy as np
import pytest
import test_training
import zoo
from keras import ops
from matrix import row
from replay import Replay

import keras_slsam

BACKEND = keras.config.backend()
TINY = 1e-9
RNG = np.random.default_rng(0)
X = RNG.normal(size=(14, 5)).astype("float32")
Y = RNG.integers(0, 3, 14)


def make_model(dtype=None):
    """Returns two layers and a BatchNorm, with the same weights each time."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(8, activation="tanh", dtype=dtype),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.Dense(3, dtype=dtype),
    ]
    return keras.Sequential([keras.Input((5,)), *layers])


# Arms of layers are fewer to trace and compile than the usual arms of variables.
def all_arms(base, arms="layer", **kwargs):
    """Returns SL-SAM with all arms active, which uses the code that can skip arms."""
    return keras_slsam.SLSAM(base, TINY, 1.0, sampler="uniform", arms=arms, **kwargs)


def half_the_arms(base="adam", arms="layer", **kwargs):
    return keras_slsam.SLSAM(
        base, rho=0.05, active_fraction=0.5, arms=arms, seed=0, **kwargs
    )


def compiled(optimizer, model=None, **kwargs):
    model = keras_slsam.sharpness_aware(model or make_model())
    kwargs = {"loss": zoo.loss(), "metrics": ["accuracy"], **kwargs}
    model.compile(optimizer=optimizer, **kwargs)
    return model


def fit(model, x=X, y=Y, **kwargs):
    kwargs = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, y, **kwargs).history


def values(model):
    return [ops.convert_to_numpy(v) for v in model.weights]


def assert_same(model, other, atol=2e-6):
    for one, two in zip(values(model), values(other)):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=atol)


def assert_as_keras(make_base, compile_kwargs=None, wrap=all_arms, **kwargs):
    """Checks that the base optimizer, and ours around it, train in the same way."""
    model = compiled(wrap(make_base()), **(compile_kwargs or {}))
    history = fit(model, **kwargs)
    plain = compiled(make_base(), **(compile_kwargs or {}))
    expected = fit(plain, **kwargs)
    assert sorted(history) == sorted(expected)
    for key in expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)
    assert_same(model, plain)


def adam(**kwargs):
    return lambda: keras.optimizers.Adam(0.01, **kwargs)


# --- Precision ---------------------------------------------------------------------


@row("`mixed_float16`", "a step with a gradient that is not finite is skipped")
@pytest.mark.parametrize("method", ["sam", "s2sam", "rst", "slsam", "sl+s2", "windows"])
def test_loss_scaling_changes_nothing(method):
    """Norms and gradients are unscaled, so loss scaling keeps the trajectory."""

    def make(method):
        return {
            "sam": lambda: keras_slsam.SAM("adam"),
            "s2sam": lambda: keras_slsam.S2SAM("adam"),
            "rst": lambda: keras_slsam.RST("adam", seed=0),
            "slsam": half_the_arms,
            "sl+s2": lambda: half_the_arms(single_step=True),
            "windows": lambda: half_the_arms(adam(gradient_accumulation_steps=2)()),
        }[method]()

    plain = compiled(make(method))
    expected = fit(plain)
    optimizer = keras.optimizers.LossScaleOptimizer(
        make(method), initial_scale=2.0**10, dynamic_growth_steps=3
    )
    model = compiled(optimizer)
    history = fit(model)
    for key in expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)
    assert_same(model, plain)
    np.testing.assert_allclose(
        ops.convert_to_numpy(optimizer.inner_optimizer.gradient_norms),
        ops.convert_to_numpy(plain.optimizer.gradient_norms),
        rtol=1e-3,
        atol=1e-6,
    )
    # In eight steps the scale grows twice, after every three steps.
    assert float(optimizer.dynamic_scale) == 2.0**12
    assert int(optimizer.step_counter) == 2


@row("`mixed_float16`", "a step with a gradient that is not finite is skipped")
@pytest.mark.parametrize("at", ["first pass", "second pass"])
@pytest.mark.parametrize("kind", ["sam", "slsam"])
def test_a_step_with_gradients_that_are_not_finite_is_skipped(kind, at):
    class Cube(keras.layers.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(shape=(1,), initializer="ones", name="w")
            self.v = self.add_weight(shape=(1,), initializer="ones", name="v")

        def call(self, x):
            # At w = 1 the gradient is finite. At the perturbed weight it overflows.
            return ops.sum(x) * (self.v + ops.exp(80.0 * self.w))

    class Seen(keras.layers.Layer):
        def build(self, input_shape):
            self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.seen.assign(self.seen + 1.0)
            return x

    rho = 0.2
    inner = (
        keras_slsam.SAM("adam", rho=rho)
        if kind == "sam"
        else keras_slsam.SLSAM(
            "adam", rho=rho, sampler=keras_slsam.samplers.Bandit(1.0)
        )
    )
    optimizer = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=1.0 if at == "second pass" else 2.0**100
    )
    model = keras.Sequential([keras.Input((1,)), Seen(), Cube()])
    model = compiled(optimizer, model, loss=lambda y, y_pred: y_pred, metrics=[])
    optimizer.build(model.trainable_variables)
    skipped = inner.skipped_steps
    kept = [
        v
        for v in inner.variables
        if "seed" not in v.path
        and v is not inner._selection.active
        and v is not skipped
    ]
    before = [ops.convert_to_numpy(v).copy() for v in model.weights + kept]
    scale = float(optimizer.dynamic_scale)
    model.train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    after = [ops.convert_to_numpy(v) for v in model.weights + kept]
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old, new)
    assert int(optimizer.iterations) == 0
    assert int(skipped) == 1
    assert float(optimizer.dynamic_scale) == scale / 2


@row("`mixed_float16`", "a step with a gradient that is not finite is skipped")
def test_mixed_float16():
    model = make_model("mixed_float16")
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    model = assert_trains_as_in_float32(model)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert int(model.optimizer.iterations) == 40


@row("`mixed_bfloat16`")
def test_mixed_bfloat16():
    model = assert_trains_as_in_float32(make_model("mixed_bfloat16"))
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def assert_trains_as_in_float32(model):
    """Checks that the weights and arms are those in float32. Returns the model."""

    def train(model):
        base = keras.optimizers.SGD(0.3)
        model = compiled(half_the_arms(base, sampler="uniform", arms="variable"), model)
        return model, fit(model, epochs=10)["loss"]

    single, expected = train(make_model())
    model, losses = train(model)
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    for start, one, other in zip(values(make_model()), values(single), values(model)):
        assert abs(other - one).max() < 0.1 * abs(one - start).max()
    return model


@row("`bfloat16`", "Adam never moves: its 0.999 rounds to 1, as in plain Keras")
def test_bfloat16():
    base = keras.optimizers.SGD(0.2)
    model = compiled(half_the_arms(base), make_model("bfloat16"))
    losses = fit(model, epochs=8)["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    plain = compiled(adam()(), make_model("bfloat16"))
    before = [ops.convert_to_numpy(v) for v in plain.trainable_variables]
    fit(plain)
    for old, variable in zip(before, plain.trainable_variables):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))
    optimizer = model.optimizer
    assert keras.backend.standardize_dtype(optimizer.gradient_norms.dtype) == "float32"
    norms = ops.convert_to_numpy(optimizer.gradient_norms)
    assert (norms > 0).tolist() == ops.convert_to_numpy(optimizer.active).tolist()


# --- Execution ---------------------------------------------------------------------

ACCUMULATION = "one mask per window; one ascent per micro-batch"


@row("`gradient_accumulation_steps`", ACCUMULATION)
@pytest.mark.parametrize("wrap", [all_arms, keras_slsam.SAM])
def test_gradient_accumulation_matches_keras(wrap):
    # The last batch is smaller, and the last window is not complete.
    kwargs = {} if wrap is all_arms else {"rho": TINY}

    def make_base():
        schedule = keras.optimizers.schedules.CosineDecay(0.01, 3)
        return keras.optimizers.Adam(
            schedule,
            gradient_accumulation_steps=3,
            global_clipnorm=0.3,
            use_ema=True,
            ema_momentum=0.7,
        )

    assert_as_keras(make_base, wrap=lambda base: wrap(base, **kwargs))


@row("`gradient_accumulation_steps`", ACCUMULATION)
def test_a_run_resumes_within_a_window(tmp_path):
    """Uses an embedding, whose gradients are sparse on TensorFlow."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Embedding(9, 4),
        keras.layers.Flatten(),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
    base = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    model = compiled(half_the_arms(base), model)
    x = RNG.integers(0, 9, (14, 5))

    def train(model):
        for start in (0, 4, 8, 4, 0):
            model.train_on_batch(x[start : start + 4], Y[start : start + 4])

    train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(loaded)
    before = [v.copy() for v in values(model)]
    for each in (model, loaded):
        train(each)
    assert any((old != new).any() for old, new in zip(before, values(model)))
    assert_same(loaded, model, atol=0)


@row("`gradient_accumulation_steps`", ACCUMULATION)
def test_one_mask_and_one_sampler_update_per_window():
    class Counting(Replay):
        def build(self, num_arms):
            super().build(num_arms)
            self.updates = keras.Variable(0, dtype="int32", trainable=False)
            self.norms = keras.Variable(np.zeros(num_arms, "float32"), trainable=False)

        def update(self, active, norms):
            self.updates.assign_add(1)
            self.norms.assign(norms)

    masks = RNG.random((4, 6)) < 0.5
    masks[:, 0] = True
    sampler = Counting(masks)
    base = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    model = compiled(keras_slsam.SLSAM(base, sampler=sampler))
    for step in range(9):
        before = model.get_weights()
        model.train_on_batch(X[:4], Y[:4])
        optimizer, window = model.optimizer, step // 3
        active = ops.convert_to_numpy(optimizer.active)
        np.testing.assert_array_equal(active, masks[window])
        trained = [v.path for v in model.trainable_variables]
        moved = [
            (old != new).any()
            for old, new, v in zip(before, model.get_weights(), model.weights)
            if v.path in trained
        ]
        assert moved == (masks[window].tolist() if step % 3 == 2 else [False] * 6)
        assert int(sampler.updates) == (step + 1) // 3
        if step % 3 == 2:
            norms = ops.convert_to_numpy(optimizer.gradient_norms)
            np.testing.assert_array_equal(ops.convert_to_numpy(sampler.norms), norms)
            assert ((norms > 0) == masks[window]).all()
    counts = ops.convert_to_numpy(optimizer._base_step._own_iterations)
    np.testing.assert_array_equal(counts, masks[:3].sum(axis=0))
    assert int(optimizer.iterations) == 3


@row("`gradient_accumulation_steps`", ACCUMULATION)
def test_gradient_norms_of_a_window_are_root_mean_squares():
    base = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    window = compiled(keras_slsam.SAM(base), metrics=[])
    single = compiled(keras_slsam.SAM(keras.optimizers.SGD(0.0)), metrics=[])
    squares = []
    for rows in (slice(0, 4), slice(4, 8)):
        for model in (window, single):
            model.train_on_batch(X[rows], Y[rows])
        squares.append(ops.convert_to_numpy(single.optimizer.gradient_norms) ** 2)
    np.testing.assert_allclose(
        ops.convert_to_numpy(window.optimizer.gradient_norms),
        np.sqrt(np.mean(squares, axis=0)),
        rtol=1e-4,
        atol=1e-7,
    )


@row("`gradient_accumulation_steps`", ACCUMULATION)
def test_a_norm_that_is_not_finite_affects_only_its_window():
    base = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2, clipvalue=0.01)
    model = compiled(half_the_arms(base))
    x = X[:4].copy()
    x[0] = 1e30
    for batch in (x, X[:4], X[:4], X[:4]):
        model.train_on_batch(batch, Y[:4])
    norms = ops.convert_to_numpy(model.optimizer.gradient_norms)
    assert np.isfinite(norms).all() and (norms > 0).any()


@row("`gradient_accumulation_steps`", ACCUMULATION)
@pytest.mark.parametrize("arms", ["all", "half"])
def test_a_window_of_s2sam_equals_one_large_batch(arms):
    """All micro-batches are evaluated at one point, along the last applied gradient."""

    def make(steps):
        base = keras.optimizers.Adam(0.01, gradient_accumulation_steps=steps)
        if arms == "all":
            return keras_slsam.S2SAM(base, rho=0.3)
        return keras_slsam.SLSAM(
            base,
            rho=0.3,
            single_step=True,
            sampler=Replay([[1, 0, 1, 1], [0, 1, 1, 0]]),
        )

    def model(optimizer):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
        return compiled(optimizer, keras.Sequential([keras.Input((5,)), *layers]))

    large, small = model(make(None)), model(make(2))
    fit(large, X[:12], Y[:12], batch_size=4, epochs=3)
    fit(small, X[:12], Y[:12], batch_size=2, epochs=3)
    assert_same(small, large)


@row("`steps_per_execution` > 1", "refused by Keras itself", torch="refused")
def test_steps_per_execution():
    assert_as_keras(adam(), compile_kwargs={"steps_per_execution": 3})


def assert_as_eager(**kwargs):
    model = compiled(half_the_arms(), **kwargs)
    reference = compiled(half_the_arms(), run_eagerly=True)
    fit(model), fit(reference)
    assert_same(model, reference, atol=1e-5)


@row("`jit_compile=True`", "each new mask would be compiled again", torch="refused")
def test_jit_compile():
    assert_as_eager(jit_compile=True)


@row("`jit_compile=False`")
@row('`jit_compile="auto"`')
@pytest.mark.parametrize("jit_compile", [False, "auto"])
def test_jit_compile_false_and_auto(jit_compile):
    assert_as_eager(jit_compile=jit_compile)


@row("`run_eagerly=True`")
def test_run_eagerly():
    assert_as_keras(adam(), compile_kwargs={"run_eagerly": True}, epochs=1)


@row("`train_on_batch`")
def test_train_on_batch():
    model, other = compiled(half_the_arms()), compiled(half_the_arms())
    for start in range(0, 14, 4):
        model.train_on_batch(X[start : start + 4], Y[start : start + 4])
    fit(other, epochs=1)
    assert_same(model, other)


# --- Losses and weights ------------------------------------------------------------


@row("sample weights")
@row("class weights")
def test_sample_and_class_weights():
    assert_as_keras(adam(), sample_weight=np.linspace(0.1, 2.0, 14))
    assert_as_keras(adam(), class_weight={0: 1.0, 1: 0.2, 2: 3.0})


@row("several inputs, outputs and losses")
@row("added losses, regularizers")
@pytest.mark.parametrize("name", ["two_inputs_and_outputs", "dense"])
def test_several_outputs_and_added_losses(name):
    optimizer = test_training.methods(TINY)["slsam"]
    test_training.assert_same_training(name, optimizer)


@row("last batch smaller")
@row("validation data, metrics")
def test_validation_data():
    assert_as_keras(adam(), validation_data=(X[::-1].copy(), Y), epochs=2)


@row("`clipnorm`, `clipvalue`, `global_clipnorm`", "over the active variables")
@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping(clip):
    assert_as_keras(adam(**{clip: 0.01}))


# --- Learning rates and averages ---------------------------------------------------


@row("learning-rate schedules", "count all steps")
def test_schedules():
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 6)
    assert_as_keras(lambda: keras.optimizers.Adam(schedule))


@row("`LearningRateScheduler`, `ReduceLROnPlateau`")
def test_callbacks_that_set_the_learning_rate():
    def callbacks():
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", patience=1, min_delta=9.0
            ),
        ]

    plain, model = compiled(adam()()), compiled(all_arms(adam()()))
    for each in (plain, model):
        history = fit(each, epochs=4, callbacks=callbacks())
        np.testing.assert_allclose(
            history["learning_rate"], [5e-3, 2.5e-3, 1.25e-4, 6.25e-6], rtol=1e-5
        )
    assert_same(model, plain)


@row("`use_ema`, `SwapEMAWeights`", "every step averages all weights")
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_moving_average_and_swap(swap_on_epoch):
    make_base = adam(use_ema=True, ema_momentum=0.7)

    def train(optimizer):
        model = compiled(optimizer)
        callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        history = fit(model, validation_data=(X, Y), callbacks=[callback])
        return model, history

    plain, expected = train(make_base())
    model, history = train(all_arms(make_base()))
    for key in expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)
    assert_same(model, plain)
    without = compiled(all_arms("adam"))
    with pytest.raises(ValueError, match="use_ema"):
        fit(
            without,
            validation_data=(X, Y),
            callbacks=[keras.callbacks.SwapEMAWeights()],
        )


# --- What changes between two calls ------------------------------------------------


class Adds(keras.layers.Layer):
    """Adds a loss if it is switched on."""

    on = False

    def call(self, x):
        if self.on:
            self.add_loss(ops.mean(x**2))
        return x


class AwareSequential(keras_slsam.SAMTrainStep, keras.Sequential):
    pass


def changing_model(kind=keras.Sequential):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.Dropout(0.5, seed=0),
        Adds(),
        keras.layers.Dense(1),
    ]
    return kind([keras.Input((5,)), *layers])


def compile_again(model, optimizer, loss="mse", **kwargs):
    model.compile(optimizer=optimizer, loss=loss, **kwargs)


def swap_a_layer(model):
    model.pop()
    model.add(keras.layers.Dense(1, kernel_initializer="ones"))


SGD = keras.optimizers.SGD
# Functions of the model, and of the function that wraps the base optimizer.
CHANGES = {
    "loss": lambda m, wrap: compile_again(m, wrap(SGD(0.1)), "mae"),
    "loss, same optimizer": lambda m, wrap: compile_again(m, m.optimizer, "mae"),
    "metrics": lambda m, wrap: compile_again(m, wrap(SGD(0.1)), metrics=["mae"]),
    "optimizer": lambda m, wrap: compile_again(m, wrap(SGD(0.1, clipnorm=0.01))),
    "other optimizer": lambda m, wrap: compile_again(m, wrap("adam")),
    "trainable": lambda m, wrap: (
        setattr(m.layers[0], "trainable", False),
        compile_again(m, wrap(SGD(0.1))),
    ),
    "learning rate": lambda m, wrap: setattr(m.optimizer, "learning_rate", 0.01),
    "run_eagerly": lambda m, wrap: setattr(m, "run_eagerly", True),
    "added loss": lambda m, wrap: setattr(m.layers[2], "on", True),
    "added loss, compiled": lambda m, wrap: (
        setattr(m.layers[2], "on", True),
        compile_again(m, wrap(SGD(0.1))),
    ),
    "dropout": lambda m, wrap: setattr(m.layers[1], "rate", 0.0),
    "dropout, compiled": lambda m, wrap: (
        setattr(m.layers[1], "rate", 0.0),
        compile_again(m, wrap(SGD(0.1))),
    ),
    "policy": lambda m, wrap: setattr(m.layers[0], "dtype_policy", "mixed_bfloat16"),
    "policy, compiled": lambda m, wrap: (
        setattr(m.layers[0], "dtype_policy", "mixed_bfloat16"),
        compile_again(m, wrap(SGD(0.1))),
    ),
    "layer, compiled": lambda m, wrap: (
        swap_a_layer(m),
        compile_again(m, wrap(SGD(0.1))),
    ),
}
if BACKEND != "torch":  # PyTorch refuses a compiled step
    CHANGES["jit_compile"] = lambda m, wrap: setattr(
        m, "jit_compile", not m.jit_compile
    )


def train_and_change(model, change, wrap=lambda base: base):
    """Trains, makes a change, then trains with `fit` and `train_on_batch`."""
    data = X[:8], np.full((8, 1), 5.0, "float32")
    compile_again(model, wrap(SGD(0.1)))
    keras.utils.set_random_seed(1)  # PyTorch's dropout
    fit(model, *data, epochs=1)
    change(model, wrap)
    history = fit(model, *data, epochs=1)
    model.reset_metrics()
    logs = model.train_on_batch(data[0][:4], data[1][:4], return_dict=True)
    return {**history, **logs}, model.get_weights()


def tiny_sam(base):
    return keras_slsam.SAM(base, rho=TINY)


def assert_same_results(actual, expected):
    assert sorted(actual[0]) == sorted(expected[0])
    for key, value in expected[0].items():
        np.testing.assert_allclose(actual[0][key], value, rtol=1e-3)
    for one, other in zip(actual[1], expected[1]):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


NOTE = "as in Keras; compile again if other weights become trainable"


@row("changes between two calls of `fit`", NOTE)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect_as_in_keras(change):
    change = CHANGES[change]
    expected = train_and_change(changing_model(), change)
    model = keras_slsam.sharpness_aware(changing_model())
    assert_same_results(train_and_change(model, change, tiny_sam), expected)


@row("changes between two calls of `fit`", NOTE)
@pytest.mark.parametrize("change", ["loss", "dropout, compiled"])
@pytest.mark.parametrize("wrap", [None, tiny_sam])
@pytest.mark.parametrize("mixin", [False, True])
def test_changes_take_effect_in_plain_and_mixin_steps(change, wrap, mixin):
    change = CHANGES[change]
    expected = train_and_change(changing_model(), change)
    model = changing_model(AwareSequential if mixin else keras.Sequential)
    # A reference to the old compiled step, such as in a traceback, must not matter.
    kept = []

    def keep_and_change(model, wrap):
        kept.append(model.train_function)
        change(model, wrap)

    wrap = wrap or (lambda base: base)
    model = keras_slsam.sharpness_aware(model)
    assert_same_results(train_and_change(model, keep_and_change, wrap), expected)


@row("changes between two calls of `fit`", NOTE)
@pytest.mark.parametrize("kinds", ["ours, ours", "ours, plain", "plain, ours"])
def test_an_assigned_optimizer_takes_the_next_step(kinds):
    wraps = {"ours": tiny_sam, "plain": lambda base: base}
    first, second = (wraps[kind] for kind in kinds.split(", "))
    expected = train_and_change(changing_model(), CHANGES["optimizer"])
    model = keras_slsam.sharpness_aware(changing_model())

    def assign(model, wrap):
        # On TensorFlow `fit` would build a plain optimizer in a graph.
        model.optimizer = second(SGD(0.1, clipnorm=0.01))
        model.optimizer.build(model.trainable_variables)

    assert_same_results(train_and_change(model, assign, first), expected)


@row("changes between two calls of `fit`", NOTE)
@pytest.mark.parametrize("change", ["trainable", "trainable, same optimizer", "layer"])
def test_other_trainable_weights_need_a_new_optimizer(change):
    def change_weights(model, wrap):
        if change == "layer":
            swap_a_layer(model)
        else:
            model.layers[0].trainable = False
        if change == "trainable, same optimizer":
            compile_again(model, model.optimizer)

    model = keras_slsam.sharpness_aware(changing_model())
    with pytest.raises(ValueError, match=r"other trainable weights.*`model.compile`"):
        train_and_change(model, change_weights, tiny_sam)
    _, weights = train_and_change(model, lambda model, wrap: None, tiny_sam)
    assert np.isfinite(np.concatenate([w.ravel() for w in weights])).all()


# --- Callbacks ---------------------------------------------------------------------


@row("`ModelCheckpoint`, `EarlyStopping(restore_best_weights=True)`")
def test_checkpoint_and_early_stopping(tmp_path):
    model = compiled(half_the_arms(keras.optimizers.Adam(1.0)))
    callbacks = [
        keras.callbacks.ModelCheckpoint(
            tmp_path / "{epoch}.weights.h5", save_weights_only=True
        ),
        keras.callbacks.EarlyStopping(
            monitor="val_loss", patience=2, restore_best_weights=True
        ),
    ]
    history = fit(
        model, epochs=12, callbacks=callbacks, validation_data=(X[:6], 2 - Y[:6])
    )
    best = int(np.argmin(history["val_loss"]))
    assert best + 3 == len(history["val_loss"]) < 12
    evaluated = model.evaluate(X[:6], 2 - Y[:6], return_dict=True, verbose=0)
    np.testing.assert_allclose(evaluated["loss"], history["val_loss"][best], rtol=1e-4)
    other = compiled(half_the_arms())
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / f"{best + 1}.weights.h5")
    assert_same(other, model)
    assert int(other.optimizer.iterations) == 4 * (best + 1)


@row("`BackupAndRestore`")
def test_backup_and_restore(tmp_path):
    class Killed(Exception):
        pass

    def kill(epoch, logs):
        if epoch == 2:
            raise Killed

    def train(folder, *more):
        model = compiled(half_the_arms())
        backup = keras.callbacks.BackupAndRestore(folder)
        fit(model, epochs=4, callbacks=[backup, *more])
        return model

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(
            tmp_path / "killed",
            keras.callbacks.LambdaCallback(on_epoch_begin=kill),
        )
    resumed = train(tmp_path / "killed")
    assert int(resumed.optimizer.iterations) == 16
    assert_same(resumed, whole)


@row("`TerminateOnNaN`")
def test_terminate_on_nan():
    x = X.copy()
    x[9] = np.nan
    model = compiled(half_the_arms())
    fit(model, x, epochs=3, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert int(model.optimizer.iterations) == 2
    assert int(model.optimizer.skipped_steps) == 1


@row("`TensorBoard`", "needs the package tensorboard")
def test_tensorboard(tmp_path):
    board = keras.callbacks.TensorBoard(tmp_path, update_freq=1)
    fit(compiled(half_the_arms()), callbacks=[board])
    assert [path for path, _, files in os.walk(tmp_path) if files]


# --- Data --------------------------------------------------------------------------


def batches():
    return [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 14, 4)]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return batches()[index]


def tensorflow_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def torch_data():
    import torch

    pairs = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return torch.utils.data.DataLoader(pairs, batch_size=4)


@row("data: NumPy, `tf.data`, `DataLoader`, `PyDataset` with workers, generators")
@pytest.mark.parametrize(
    "data",
    [
        tensorflow_data,
        torch_data,
        lambda: Batches(workers=2),
        lambda: (batch for _ in range(2) for batch in batches()),
    ],
    ids=["tf.data", "DataLoader", "PyDataset", "generator"],
)
def test_data(data):
    plain, model = compiled("adam"), compiled(all_arms("adam"))
    for each in (plain, model):
        batches = data()
        steps = None if hasattr(batches, "__len__") else 4
        each.fit(batches, epochs=2, shuffle=False, steps_per_epoch=steps, verbose=0)
    assert int(model.optimizer.iterations) == 8
    assert_same(model, plain)


# --- Models ------------------------------------------------------------------------


@row("freezing layers between two `fit` calls", "compile again, with a new optimizer")
def test_freezing_and_unfreezing():
    model = compiled(half_the_arms())
    fit(model)
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()
    with pytest.raises(ValueError, match="compile"):
        model.train_on_batch(X, Y)
    compiled(half_the_arms(), model)
    fit(model)
    assert len(model.optimizer.arms) == 2
    for old, new in zip(frozen, model.layers[0].get_weights()):
        np.testing.assert_array_equal(old, new)
    model.layers[0].trainable = True
    compiled(half_the_arms(), model)
    fit(model)
    assert len(model.optimizer.arms) == 3
    assert any((a != b).any() for a, b in zip(frozen, model.layers[0].get_weights()))


@row("models cloned, saved and loaded", "call `sharpness_aware` again")
def test_cloned_and_loaded_models(tmp_path):
    model = compiled(half_the_arms())
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    fit(compiled(half_the_arms(), clone)), fit(model)
    assert_same(clone, model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(loaded)
    fit(loaded), fit(model)
    assert_same(loaded, model)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_trains_independently(copied):
    model = compiled(half_the_arms(), loss="mse")
    y = np.zeros((14, 3))
    fit(model, y=y)
    before = values(model)
    other = copied(model)
    for first, second in ((other, model), (model, other)):
        still = [value.copy() for value in values(second)]
        moved = [value.copy() for value in values(first)]
        fit(compiled(half_the_arms(), first, loss="mse"), y=y)
        assert any((a != b).any() for a, b in zip(moved, values(first)))
        for old, new in zip(still, values(second)):
            np.testing.assert_array_equal(old, new)
    assert_same(model, other)
    assert any((a != b).any() for a, b in zip(before, values(model)))


def methods():
    return {
        "sam": keras_slsam.SAM("sgd"),
        "s2sam": keras_slsam.S2SAM("sgd"),
        "slsam": half_the_arms(arms="variable"),
        "sl+s2": half_the_arms(arms="variable", single_step=True),
        "rst": keras_slsam.RST("sgd", seed=0),
    }


@row("a model without trainable weights", "with a warning; updates state and metrics")
@pytest.mark.parametrize("method", methods())
def test_a_model_without_trainable_weights(method):
    def trained(optimizer):
        keras.utils.set_random_seed(0)
        layers = [
            keras.layers.BatchNormalization(center=False, scale=False),
            keras.layers.Dropout(0.5, seed=0),
            keras.layers.Dense(3, trainable=False),
        ]
        model = keras.Sequential([keras.Input((5,)), *layers])
        model = compiled(optimizer, model, metrics=["accuracy"])
        keras.utils.set_random_seed(1)  # PyTorch's dropout
        return fit(model), model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, plain = trained("sgd")
    with pytest.warns(UserWarning, match="not have any trainable weights"):
        history, model = trained(methods()[method])
    for key in expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-5)
    assert_same(model, plain)
    assert int(model.optimizer.iterations) == 0
    # It can get trainable weights later.
    model.layers[-1].trainable = True
    before = model.layers[-1].get_weights()[0]
    fit(compiled(methods()[method], model))
    assert (model.layers[-1].get_weights()[0] != before).any()


@row("`TorchModuleWrapper`", jax="-", tensorflow="-")
@pytest.mark.parametrize("make", [all_arms, half_the_arms])
def test_torch_modules(make):
    import torch

    def model(optimizer, wrapped):
        keras.utils.set_random_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8, eps=1e-3, momentum=0.01)
        )
        reference = make_model()
        kernel, bias, *_ = reference.get_weights()
        with torch.no_grad():
            module[0].weight.copy_(torch.tensor(kernel.T))
            module[0].bias.copy_(torch.tensor(bias))
        if not wrapped:
            layers = [
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(momentum=0.99),
            ]
        else:
            layers = [keras.layers.TorchModuleWrapper(module, output_shape=(None, 8))]
        head = keras.layers.Dense(3, kernel_initializer=keras.initializers.Ones())
        model = keras.Sequential([keras.Input((5,)), *layers, head])
        if not wrapped:
            model.layers[0].set_weights([kernel, bias])
        return compiled(optimizer, model), module

    # Each weight of a module is an arm.
    expected, _ = model(make("sgd", arms="variable"), wrapped=False)
    actual, module = model(make("sgd", arms="variable"), wrapped=True)
    for each in (expected, actual):
        fit(each)
    np.testing.assert_allclose(
        module[0].weight.detach().numpy().T, expected.layers[0].get_weights()[0], 1e-4
    )
    _, _, mean, _ = expected.layers[1].get_weights()
    # Updated once per step, in the first pass.
    np.testing.assert_allclose(module[1].running_mean.numpy(), mean, 1e-4, 1e-6)
    assert "forward" not in vars(module)


def wrapped_model(*modules):
    layers = [
        keras.layers.TorchModuleWrapper(m, output_shape=(None, 5)) for m in modules
    ]
    return keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(3)])


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's modules")
def test_torch_modules_keep_hooks_and_a_patched_forward():
    import torch

    calls = []
    hooked, patched = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    hooked.register_forward_hook(lambda *args: calls.append("hook"))
    original = patched.forward
    patched.forward = forward = lambda x: calls.append("patch") or original(x)
    model = compiled(keras_slsam.SAM("sgd"), wrapped_model(hooked, patched))
    before = hooked.weight.detach().clone(), patched.weight.detach().clone()
    model.train_on_batch(X[:4], Y[:4])
    calls.clear()
    model.train_on_batch(X[:4], Y[:4])
    assert calls == ["hook", "patch"] * 2  # two passes
    assert patched.forward is forward
    for module, old in zip((hooked, patched), before):
        assert not torch.equal(module.weight, old)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's modules")
@pytest.mark.parametrize("arms", ["layer", "block"])
def test_each_weight_of_a_torch_module_is_an_arm(arms):
    import torch

    model = wrapped_model(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    model = compiled(half_the_arms(arms=arms), model)
    model.train_on_batch(X[:4], Y[:4])
    assert [len(arm) for arm in model.optimizer.arms] == [1, 1, 1, 1, 2]


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's modules")
def test_buffers_of_torch_modules_are_restored_if_a_step_raises():
    import torch

    def broken(y, y_pred):
        raise RuntimeError("in a metric")

    norm = torch.nn.BatchNorm1d(5)
    model = wrapped_model(norm)
    model = compiled(keras_slsam.SAM("sgd"), model, metrics=[broken])
    with pytest.raises(RuntimeError, match="in a metric"):
        keras_slsam.step(
            model, model.optimizer, (torch.tensor(X[:4]), torch.tensor(Y[:4]))
        )
    assert norm.num_batches_tracked == 0


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's modules")
def test_a_torch_module_in_two_layers_is_refused():
    import torch

    module = torch.nn.Linear(5, 5)
    model = compiled(keras_slsam.SAM("sgd"), wrapped_model(module, module))
    with pytest.raises(ValueError, match="one `TorchModuleWrapper` only"):
        model.train_on_batch(X[:4], Y[:4])


@row("`JaxLayer`", tensorflow="-", torch="-")
def test_jax_layers():
    import jax.numpy as jnp

    kernel, bias = make_model().get_weights()[:2]
    layer = keras.layers.JaxLayer(
        lambda params, inputs: jnp.tanh(inputs @ params["kernel"] + params["bias"]),
        params={"bias": bias, "kernel": kernel},
    )
    reference = make_model()
    head = make_model().layers[1:]
    model = keras.Sequential([keras.Input((5,)), layer, *head])
    names = [v.path.rpartition("/")[2] for v in layer.trainable_variables]
    order = [0, 1] if "kernel" in names[0] else [1, 0]
    masks = [[1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    swapped = [[mask[order[0]], mask[order[1]], *mask[2:]] for mask in masks]
    compiled(keras_slsam.SLSAM("sgd", rho=0.1, sampler=Replay(swapped)), model)
    compiled(keras_slsam.SLSAM("sgd", rho=0.1, sampler=Replay(masks)), reference)
    fit(model), fit(reference)
    np.testing.assert_allclose(
        model.predict(X, verbose=0), reference.predict(X, verbose=0), 1e-4, 1e-5
    )


@row("`FlaxLayer`", tensorflow="-", torch="-")
def test_flax_layers():
    from flax import linen

    class Module(linen.Module):
        @linen.compact
        def __call__(self, x, training):
            x = linen.tanh(linen.Dense(8)(x))
            return linen.BatchNorm(
                use_running_average=not training, momentum=0.99, epsilon=1e-3
            )(x)

    reference = make_model()
    layer = keras.layers.FlaxLayer(Module())
    model = keras.Sequential([keras.Input((5,)), layer, make_model().layers[-1]])
    # Flax sorts by name: bias and scale of BatchNorm, bias and kernel, mean, variance.
    order = [3, 2, 1, 0, 4, 5]
    weights = reference.get_weights()
    layer.set_weights([weights[i] for i in order])
    masks = [[1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1]]
    swapped = [[mask[i] for i in order] for mask in masks]
    compiled(keras_slsam.SLSAM("sgd", rho=0.1, sampler=Replay(swapped)), model)
    compiled(keras_slsam.SLSAM("sgd", rho=0.1, sampler=Replay(masks)), reference)
    fit(model), fit(reference)
    expected = reference.get_weights()
    for i, value in zip([*order, 6, 7], model.get_weights()):
        np.testing.assert_allclose(value, expected[i], 1e-4, 1e-6)


@row("layers written in TensorFlow", jax="-", torch="-")
def test_layers_written_in_tensorflow():
    import tensorflow as tf

    class Own(keras.layers.Dense):
        def call(self, x):
            return tf.tanh(tf.matmul(x, self.kernel) + self.bias)

    reference = make_model()
    own = Own(8)
    model = keras.Sequential([keras.Input((5,)), own, *make_model().layers[1:]])
    own.set_weights(reference.layers[0].get_weights())
    for each in (model, reference):
        fit(compiled(half_the_arms(), each))
    assert_same(model, reference)


def model_with_a_layer_from_a_file(folder):
    make_model().export(folder / "saved", verbose=False)
    layer = keras.layers.TFSMLayer(folder / "saved", call_endpoint="serve")
    return keras.Sequential([keras.Input((5,)), layer, keras.layers.Dense(3)])


@row(
    "`TFSMLayer` that is trained",
    "freeze it",
    jax="-",
    torch="-",
    tensorflow="refused",
)
def test_tfsm_layer(tmp_path):
    model = compiled(half_the_arms(), model_with_a_layer_from_a_file(tmp_path))
    assert model.layers[0].trainable_variables
    with pytest.raises(ValueError, match=r"TFSMLayer.*trainable = False") as refusal:
        fit(model)
    raise refusal.value


@row("`TFSMLayer` that is frozen", jax="-", torch="-")
def test_frozen_tfsm_layer(tmp_path):
    model = model_with_a_layer_from_a_file(tmp_path)
    model.layers[0].trainable = False
    compiled(half_the_arms(arms="variable"), model)
    fit(model)
    assert len(model.optimizer.arms) == 2


def test_the_documented_table_matches_these_tests():
    docs = pathlib.Path(__file__).parent.parent / "docs" / "fit.md"
    assert matrix.table() in docs.read_text("utf-8")
