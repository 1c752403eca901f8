"""Features of `fit`: each row of the table in docs/fit.md.

Most tests compare with Keras' own step. With a tiny `rho` and all arms active, every
method equals the base optimizer, so `fit` must give the same results.
"""

import copy
import functools
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
from zoo import EAGER

import keras_slsam

BACKEND = keras.config.backend()
ON_TORCH = BACKEND == "torch"  # where a step is not traced, so that more methods run
TINY = 1e-9
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype("float32")
Y = RNG.integers(0, 3, 16)


def make_model(dtype=None):
    """Returns two layers and a BatchNorm, with the same weights each time."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(8, activation="tanh", dtype=dtype),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.Dense(3, dtype=dtype),
    ]
    return keras.Sequential([keras.Input((5,)), *layers])


def sgd(**kwargs):
    return keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)


# Arms of layers are fewer to trace and compile than the usual arms of variables.
def all_arms(base, arms="layer", **kwargs):
    """Returns SL-SAM with all arms active, which uses the code that can skip arms."""
    return keras_slsam.SLSAM(base, TINY, 1.0, sampler="uniform", arms=arms, **kwargs)


def half_the_arms(base=None, arms="layer", **kwargs):
    return keras_slsam.SLSAM(
        base or sgd(), rho=0.05, active_fraction=0.5, arms=arms, seed=0, **kwargs
    )


def compiled(optimizer, model=None, **kwargs):
    model = keras_slsam.sharpness_aware(model or make_model())
    model.compile(optimizer=optimizer, **{"loss": zoo.loss(), **kwargs})
    return model


def fit(model, x=X, y=Y, **kwargs):
    kwargs = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, y, **kwargs).history


def values(model):
    return [ops.convert_to_numpy(v).copy() for v in model.weights]


def assert_same(model, other, atol=2e-6):
    for one, two in zip(values(model), values(other)):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=atol)


def assert_same_histories(history, expected):
    assert sorted(history) == sorted(expected)
    for key in expected:
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)


def assert_as_keras(make_base, epochs=2, wrap=all_arms, **kwargs):
    """Checks that the base optimizer, and ours around it, train in the same way."""
    kwargs = {"metrics": ["accuracy"], **kwargs}
    model = compiled(wrap(make_base()), **kwargs)
    plain = compiled(make_base(), **{**EAGER, **kwargs})
    assert_same_histories(fit(model, epochs=epochs), fit(plain, epochs=epochs))
    assert_same(model, plain)


# --- Precision ---------------------------------------------------------------------


@row("`mixed_float16`", "a step with a gradient that is not finite is skipped")
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras_slsam.SAM(sgd()),
        lambda: half_the_arms(single_step=True),
        lambda: half_the_arms(sgd(gradient_accumulation_steps=2)),
        lambda: half_the_arms(),
        lambda: keras_slsam.S2SAM(sgd()),
        lambda: keras_slsam.RST(sgd(), seed=0),
    ][: 6 if ON_TORCH else 3],
    # The others differ from these in nothing that is scaled.
    ids=["sam", "sl+s2", "windows", "slsam", "s2sam", "rst"][: 6 if ON_TORCH else 3],
)
def test_loss_scaling_changes_nothing(make):
    """Norms and gradients are unscaled, so loss scaling keeps the trajectory."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        make(), initial_scale=2.0**10, dynamic_growth_steps=3
    )
    model, plain = compiled(optimizer), compiled(make(), **EAGER)
    assert_same_histories(fit(model, epochs=1), fit(plain, epochs=1))
    assert_same(model, plain)
    np.testing.assert_allclose(
        ops.convert_to_numpy(optimizer.inner_optimizer.gradient_norms),
        ops.convert_to_numpy(plain.optimizer.gradient_norms),
        rtol=1e-3,
        atol=1e-6,
    )
    # The scale grew after three of the four steps.
    assert float(optimizer.dynamic_scale) == 2.0**11
    assert int(optimizer.step_counter) == 1


@row("`mixed_float16`", "a step with a gradient that is not finite is skipped")
@pytest.mark.parametrize("kind", ["sam", "slsam"])
def test_a_step_with_gradients_that_are_not_finite_is_skipped(kind):
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
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    model = keras.Sequential([keras.Input((1,)), Seen(), Cube()])
    model = compiled(optimizer, model, loss=lambda y, y_pred: y_pred)
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
    # The gradients of the first pass overflow, then those of the second pass.
    for steps, scale in enumerate((2.0**100, 1.0), 1):
        optimizer.dynamic_scale.assign(scale)
        model.train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
        for old, variable in zip(before, model.weights + kept):
            np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))
        assert int(optimizer.iterations) == 0
        assert int(skipped) == steps
        assert float(optimizer.dynamic_scale) == scale / 2


@row("`mixed_float16`", "a step with a gradient that is not finite is skipped")
@row("`mixed_bfloat16`")
def test_mixed_precision_trains_as_float32():
    """The weights, arms and losses are those in float32."""

    def train(policy=None):
        model = make_model(policy)
        if policy == "mixed_float16":
            model.dtype_policy = keras.DTypePolicy(policy)
        base = keras.optimizers.SGD(0.3)
        model = compiled(half_the_arms(base, sampler="uniform"), model)
        return model, fit(model, epochs=5)["loss"]

    single, expected = train()
    assert expected[-1] < 0.7 * expected[0]
    for policy in ("mixed_float16", "mixed_bfloat16"):
        model, losses = train(policy)
        np.testing.assert_allclose(losses, expected, rtol=0.05)
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
        starts = values(make_model())
        for start, one, other in zip(starts, values(single), values(model)):
            assert abs(other - one).max() < 0.1 * abs(one - start).max()
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scaled == (policy == "mixed_float16")
        assert int(model.optimizer.iterations) == 20


@row("`bfloat16`", "Adam never moves: its 0.999 rounds to 1, as in plain Keras")
def test_bfloat16():
    base = keras.optimizers.SGD(0.2)
    model = compiled(half_the_arms(base), make_model("bfloat16"))
    losses = fit(model, epochs=8)["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    plain = compiled(keras.optimizers.Adam(0.01), make_model("bfloat16"), **EAGER)
    before = [ops.convert_to_numpy(v) for v in plain.trainable_variables]
    fit(plain, epochs=1)
    for old, variable in zip(before, plain.trainable_variables):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))
    optimizer = model.optimizer
    assert keras.backend.standardize_dtype(optimizer.gradient_norms.dtype) == "float32"
    norms = ops.convert_to_numpy(optimizer.gradient_norms)
    assert (norms > 0).tolist() == ops.convert_to_numpy(optimizer.active).tolist()


# --- Execution ---------------------------------------------------------------------

ACCUMULATION = "one mask per window; one ascent per micro-batch"


@row("`gradient_accumulation_steps`", ACCUMULATION)
@pytest.mark.parametrize(
    "wrap", [all_arms, lambda base: keras_slsam.SAM(base, TINY)][: 1 + ON_TORCH]
)
def test_gradient_accumulation_matches_keras(wrap):
    # The last window is not complete.
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 3)
    assert_as_keras(
        lambda: keras.optimizers.Adam(
            schedule,
            gradient_accumulation_steps=3,
            global_clipnorm=0.3,
            use_ema=True,
            ema_momentum=0.7,
        ),
        wrap=wrap,
    )


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
    x = RNG.integers(0, 9, (12, 5))

    def train(model):
        for start in (0, 4, 8, 4, 0):
            model.train_on_batch(x[start : start + 4], Y[start : start + 4])

    train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(loaded)
    before = values(model)
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

    masks = np.array([[1, 0, 1], [1, 1, 0], [1, 1, 1]], bool)
    sampler = Counting(masks)
    base = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model = compiled(keras_slsam.SLSAM(base, sampler=sampler, arms="layer"))
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
        # Each layer has two weights.
        assert moved == (np.repeat(active, 2) & (step % 3 == 2)).tolist()
        assert int(sampler.updates) == (step + 1) // 3
        if step % 3 == 2:
            norms = ops.convert_to_numpy(optimizer.gradient_norms)
            np.testing.assert_array_equal(ops.convert_to_numpy(sampler.norms), norms)
            assert ((norms > 0) == masks[window]).all()
    counts = ops.convert_to_numpy(optimizer._base_step._own_iterations)
    np.testing.assert_array_equal(counts, masks.sum(axis=0))
    assert int(optimizer.iterations) == 3


@row("`gradient_accumulation_steps`", ACCUMULATION)
def test_gradient_norms_of_a_window_are_root_mean_squares():
    base = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    window = compiled(keras_slsam.SAM(base))
    single = compiled(keras_slsam.SAM(keras.optimizers.SGD(0.0)), **EAGER)
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
def test_a_norm_that_is_not_finite_skips_only_its_micro_batch():
    """The gradients are finite, but their squares overflow."""

    def train(*batches, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8), keras.layers.Dense(3)]
        base = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        model = compiled(
            half_the_arms(base),
            keras.Sequential([keras.Input((5,)), *layers]),
            loss=lambda y, y_pred: y_pred,
            **kwargs,
        )
        for x in batches:
            model.train_on_batch(x, Y[:4])
        return model

    expected = train(X[:4], X[4:8], **EAGER)
    model = train(X[:4], np.full_like(X[:4], 1e30), X[4:8])
    assert int(model.optimizer.skipped_steps) == 1
    assert_same(model, expected)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.optimizer.gradient_norms),
        ops.convert_to_numpy(expected.optimizer.gradient_norms),
        rtol=1e-4,
    )


@row("`gradient_accumulation_steps`", ACCUMULATION)
@pytest.mark.parametrize("arms", ["half", "all"][: 1 + ON_TORCH])
def test_a_window_of_s2sam_equals_one_large_batch(arms):
    """All micro-batches are evaluated at one point, along the last applied gradient."""

    def train(steps, batch_size, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((5,)), *layers])
        base = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        optimizer = keras_slsam.S2SAM(base, rho=0.3)
        if arms == "half":
            optimizer = keras_slsam.SLSAM(
                base,
                rho=0.3,
                arms="layer",
                single_step=True,
                sampler=Replay([[1, 0], [1, 1], [0, 1]]),
            )
        fit(compiled(optimizer, model, **kwargs), batch_size=batch_size, epochs=1)
        return model

    assert_same(train(2, batch_size=2), train(None, batch_size=4, **EAGER))


@row("`steps_per_execution` > 1", "refused by Keras itself", torch="refused")
def test_steps_per_execution():
    assert_as_keras(sgd, steps_per_execution=3)


@functools.cache
def trained_eagerly():
    model = compiled(half_the_arms(), run_eagerly=True)
    fit(model, epochs=1)
    return model


def assert_as_eager(**kwargs):
    model = compiled(half_the_arms(), **kwargs)
    fit(model, epochs=1)
    assert_same(model, trained_eagerly(), atol=1e-5)


@row("`jit_compile=True`", "each new mask would be compiled again", torch="refused")
def test_jit_compile():
    assert_as_eager(jit_compile=True)


@row("`jit_compile=False`")
@row('`jit_compile="auto"`')
def test_jit_compile_false_and_auto():
    assert_as_eager(jit_compile=False)
    # On CPUs "auto" is one of the cases that are tested already.
    auto = compiled(half_the_arms(), jit_compile="auto").jit_compile
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
    plain.compile("sgd", "mse", jit_compile="auto")
    assert auto == plain.jit_compile


@row("`run_eagerly=True`")
def test_run_eagerly():
    assert_as_keras(sgd, epochs=1, run_eagerly=True)


@row("`train_on_batch`")
def test_train_on_batch():
    model, other = compiled(half_the_arms()), compiled(half_the_arms(), **EAGER)
    for start in range(0, 16, 4):
        model.train_on_batch(X[start : start + 4], Y[start : start + 4])
    fit(other, epochs=1)
    assert_same(model, other)


# --- Losses and weights ------------------------------------------------------------


@row("several inputs, outputs and losses")
@row("added losses, regularizers")
@pytest.mark.parametrize("name", ["two_inputs_and_outputs", "dense"])
def test_several_outputs_and_added_losses(name):
    optimizer = test_training.methods(TINY)["slsam"]
    test_training.assert_same_training(name, optimizer)


@row("sample weights")
@row("class weights")
@row("last batch smaller")
@row("validation data, metrics")
@row("`clipnorm`, `clipvalue`, `global_clipnorm`", "over the active variables")
@row("learning-rate schedules", "count all steps")
def test_arguments_of_fit_clipping_and_schedules():
    def train(wrap):
        schedule = keras.optimizers.schedules.CosineDecay(1.0, 15)
        base = keras.optimizers.SGD(schedule, clipnorm=0.1)
        model = compiled(wrap(base), metrics=["accuracy"])
        # The last batch is smaller.
        data = {"x": X[:14], "y": Y[:14], "validation_data": (X[::-1].copy(), Y)}
        first = fit(model, **data, sample_weight=np.linspace(0.1, 2.0, 14))
        second = fit(model, **data, class_weight={0: 1.0, 1: 0.2, 2: 3.0})
        return model, first, second

    model, *histories = train(all_arms)
    plain, *expected = train(lambda base: base)
    for one, other in zip(histories, expected):
        assert_same_histories(one, other)
    assert_same(model, plain)


# --- Learning rates and averages ---------------------------------------------------


@row("`LearningRateScheduler`, `ReduceLROnPlateau`")
@row("`clipnorm`, `clipvalue`, `global_clipnorm`", "over the active variables")
def test_callbacks_that_set_the_learning_rate():
    def callbacks():
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", patience=1, min_delta=9.0
            ),
        ]

    def make_base():
        return keras.optimizers.SGD(1.0, clipvalue=0.01)

    model, plain = compiled(all_arms(make_base())), compiled(make_base())
    for each in (model, plain):
        history = fit(each, epochs=4, callbacks=callbacks())
        np.testing.assert_allclose(
            history["learning_rate"], [0.5, 0.25, 1.25e-2, 6.25e-4], rtol=1e-5
        )
    assert_same(model, plain)


@row("`use_ema`, `SwapEMAWeights`", "every step averages all weights")
def test_moving_average_and_swap():
    kwargs = {"use_ema": True, "ema_momentum": 0.7}
    model, plain = compiled(all_arms(sgd(**kwargs))), compiled(sgd(**kwargs))

    def train(model, swap_on_epoch):
        # On JAX a second `fit` of Keras fails too: the first leaves a weight and its
        # average in one buffer.
        model.set_weights(model.get_weights())
        callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        return fit(model, validation_data=(X, Y), callbacks=[callback])

    for swap_on_epoch in (False, True):
        assert_same_histories(train(model, swap_on_epoch), train(plain, swap_on_epoch))
        assert_same(model, plain)
    without = compiled(all_arms("sgd"))
    with pytest.raises(ValueError, match="use_ema"):
        train(without, swap_on_epoch=False)


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


def changing_model(kind=keras.Sequential, run_eagerly=False):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.Dropout(0.5, seed=0),
        Adds(),
        keras.layers.Dense(1),
    ]
    model = kind([keras.Input((5,)), *layers])
    model.run_eagerly = run_eagerly
    return model


SGD = keras.optimizers.SGD
DATA = X[:8], np.full((8, 1), 5.0, "float32")


def compile_again(model, optimizer, loss="mse", **kwargs):
    model.compile(optimizer, loss, run_eagerly=model.run_eagerly, **kwargs)


def swap_a_layer(model):
    model.pop()
    model.add(keras.layers.Dense(1, kernel_initializer="ones"))


def change_layers(model):
    model.layers[0].dtype_policy = "mixed_bfloat16"
    model.layers[1].rate = 0.0
    model.layers[2].on = True


def change_attributes(model, wrap):
    change_layers(model)
    model.optimizer.learning_rate = 0.01
    if BACKEND != "torch":  # PyTorch refuses a compiled step
        model.jit_compile = not model.jit_compile


def change_the_loss(model, wrap):
    compile_again(model, model.optimizer, "mae")


def freeze(model, wrap):
    model.layers[0].trainable = False
    compile_again(model, wrap(SGD(0.1)))


def change_everything(model, wrap):
    change_layers(model)
    swap_a_layer(model)
    base = keras.optimizers.Adagrad(1.0, clipnorm=0.1)
    compile_again(model, wrap(base), "mae", metrics=["mse"])


def fit_data(model):
    keras.utils.set_random_seed(1)  # PyTorch's dropout
    return fit(model, *DATA, epochs=1)


def train_and_change(model, change, wrap=lambda base: base):
    """Trains, makes a change, then trains again."""
    compile_again(model, wrap(SGD(0.1)))
    fit_data(model)
    change(model, wrap)
    return fit_data(model), model.get_weights()


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
@pytest.mark.parametrize("change", [change_the_loss, freeze])
def test_changes_take_effect_as_in_keras(change):
    expected = train_and_change(changing_model(**EAGER), change)
    model = keras_slsam.sharpness_aware(changing_model())
    assert_same_results(train_and_change(model, change, tiny_sam), expected)


@row("changes between two calls of `fit`", NOTE)
@pytest.mark.parametrize("eager", [False, True])
def test_changes_of_attributes_take_effect_as_in_keras(eager):
    def change(model, wrap):
        change_attributes(model, wrap)
        model.run_eagerly = eager

    def results(model, wrap=lambda base: base):
        logs, weights = train_and_change(model, change, wrap)
        model.reset_metrics()
        # TensorFlow traces again, because this passes sample weights, `None`.
        loss = model.train_on_batch(DATA[0][:4], DATA[1][:4])
        return {**logs, "on batch": loss}, weights + model.get_weights()

    expected = results(changing_model())
    model = keras_slsam.sharpness_aware(changing_model())
    assert_same_results(results(model, tiny_sam), expected)


@row("changes between two calls of `fit`", NOTE)
def test_a_new_compile_takes_effect_in_every_step():
    """In steps of Keras or of this package, with or without the mixin."""
    expected = train_and_change(changing_model(**EAGER), change_everything)
    # A reference to the old compiled step, such as in a traceback, must not matter.
    kept = []

    def keep_and_change(model, wrap):
        kept.append(model.train_function)
        change_everything(model, wrap)

    for kind in (keras.Sequential, AwareSequential):
        for wrap in (lambda base: base, tiny_sam):
            model = keras_slsam.sharpness_aware(changing_model(kind))
            actual = train_and_change(model, keep_and_change, wrap)
            assert_same_results(actual, expected)


@row("changes between two calls of `fit`", NOTE)
def test_an_assigned_optimizer_takes_the_next_step():
    model = keras_slsam.sharpness_aware(changing_model())
    plain = changing_model(**EAGER)
    compile_again(model, tiny_sam(SGD(0.1)))
    compile_again(plain, SGD(0.1))
    fit_data(model), fit_data(plain)
    # From ours to ours, to Keras' own, and back.
    for clipnorm, wrap in enumerate((tiny_sam, lambda base: base, tiny_sam), 1):
        # On TensorFlow `fit` would build a plain optimizer in a graph.
        model.optimizer = wrap(SGD(0.1, clipnorm=0.1 * clipnorm))
        model.optimizer.build(model.trainable_variables)
        compile_again(plain, SGD(0.1, clipnorm=0.1 * clipnorm))
        actual, expected = [(fit_data(m), m.get_weights()) for m in (model, plain)]
        assert_same_results(actual, expected)


@row("changes between two calls of `fit`", NOTE)
def test_other_trainable_weights_need_a_new_optimizer():
    refused = functools.partial(
        pytest.raises, ValueError, match=r"other trainable weights.*`model.compile`"
    )
    model = keras_slsam.sharpness_aware(changing_model())
    compile_again(model, tiny_sam(SGD(0.1)))
    fit_data(model)
    model.layers[0].trainable = False
    with refused():
        fit_data(model)
    compile_again(model, model.optimizer)
    with refused():
        fit_data(model)
    model.layers[0].trainable = True
    fit_data(model)
    swap_a_layer(model)
    with refused():
        fit_data(model)
    compile_again(model, tiny_sam(SGD(0.1)))
    fit_data(model)
    assert all(np.isfinite(w).all() for w in model.get_weights())


# --- Callbacks ---------------------------------------------------------------------


@row("`ModelCheckpoint`, `EarlyStopping(restore_best_weights=True)`")
@row("`TensorBoard`", "needs the package tensorboard")
def test_callbacks_that_write_and_stop(tmp_path):
    model = compiled(half_the_arms())
    callbacks = [
        keras.callbacks.ModelCheckpoint(
            tmp_path / "{epoch}.weights.h5", save_weights_only=True
        ),
        keras.callbacks.EarlyStopping(
            monitor="val_loss", patience=2, restore_best_weights=True
        ),
        keras.callbacks.TensorBoard(tmp_path / "board", update_freq=1),
    ]
    history = fit(
        model, epochs=12, callbacks=callbacks, validation_data=(X[:6], 2 - Y[:6])
    )
    best = int(np.argmin(history["val_loss"]))
    assert best + 3 == len(history["val_loss"]) < 12
    assert list((tmp_path / "board").glob("*/*"))
    loss = model.evaluate(X[:6], 2 - Y[:6], verbose=0)
    np.testing.assert_allclose(loss, history["val_loss"][best], rtol=1e-4)
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
        if epoch == 1:
            raise Killed

    def train(folder, *more, **kwargs):
        model = compiled(half_the_arms(), **kwargs)
        backup = keras.callbacks.BackupAndRestore(folder)
        fit(model, callbacks=[backup, *more])
        return model

    whole = train(tmp_path / "whole", **EAGER)
    with pytest.raises(Killed):
        killer = keras.callbacks.LambdaCallback(on_epoch_begin=kill)
        train(tmp_path / "killed", killer, **EAGER)
    resumed = train(tmp_path / "killed")
    assert int(resumed.optimizer.iterations) == 8
    assert_same(resumed, whole)


@row("`TerminateOnNaN`")
def test_terminate_on_nan():
    x = X.copy()
    x[9] = np.nan
    model = compiled(half_the_arms(), **EAGER)
    fit(model, x, epochs=3, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert int(model.optimizer.iterations) == 2
    assert int(model.optimizer.skipped_steps) == 1


# --- Data --------------------------------------------------------------------------


def batches():
    return [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 16, 4)]


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
def test_data():
    model, plain = compiled(all_arms("sgd")), compiled("sgd")
    kinds = (
        tensorflow_data,
        torch_data,
        lambda: Batches(workers=2),
        lambda: (batch for batch in batches()),
    )
    for epochs, data in enumerate(kinds, 1):
        for each in (model, plain):
            each.fit(data(), shuffle=False, verbose=0)
        assert int(model.optimizer.iterations) == 4 * epochs
        assert_same(model, plain)


# --- Models ------------------------------------------------------------------------


@row("freezing layers between two `fit` calls", "compile again, with a new optimizer")
def test_freezing_and_unfreezing():
    model = make_model()
    layer = model.layers[0]
    layer.trainable = False
    frozen = layer.get_weights()
    fit(compiled(half_the_arms(), model))
    assert len(model.optimizer.arms) == 2
    for old, new in zip(frozen, layer.get_weights()):
        np.testing.assert_array_equal(old, new)
    layer.trainable = True
    with pytest.raises(ValueError, match="compile"):
        model.train_on_batch(X[:4], Y[:4])
    fit(compiled(half_the_arms(), model))
    assert len(model.optimizer.arms) == 3
    assert any((a != b).any() for a, b in zip(frozen, layer.get_weights()))
    layer.trainable = False
    with pytest.raises(ValueError, match="compile"):
        model.train_on_batch(X[:4], Y[:4])


@row("models cloned, saved and loaded", "call `sharpness_aware` again")
def test_cloned_and_loaded_models(tmp_path):
    model = compiled(half_the_arms())
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    fit(compiled(half_the_arms(), clone, **EAGER), epochs=1), fit(model, epochs=1)
    assert_same(clone, model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(loaded)
    loaded.run_eagerly = EAGER["run_eagerly"]
    fit(loaded, epochs=1), fit(model, epochs=1)
    assert_same(loaded, model)


def test_copies_train_independently():
    model = compiled(half_the_arms(), loss="mse")
    y = np.zeros((16, 3))
    fit(model, y=y)
    copies = copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    models = (*copies, model)
    for each in models:
        before = [values(other) for other in models]
        fit(compiled(keras_slsam.SAM("sgd"), each, loss="mse"), y=y)
        for other, old in zip(models, before):
            same = all((a == b).all() for a, b in zip(old, values(other)))
            assert same == (other is not each)
    for each in copies:
        assert_same(each, model)


@row("a model without trainable weights", "with a warning; updates state and metrics")
@pytest.mark.parametrize(
    "make",
    # The step of all methods ends before they differ.
    [half_the_arms, keras_slsam.SAM, keras_slsam.S2SAM, keras_slsam.RST][
        : 4 if ON_TORCH else 1
    ],
)
def test_a_model_without_trainable_weights(make):
    def trained(optimizer, **kwargs):
        keras.utils.set_random_seed(0)
        layers = [
            keras.layers.BatchNormalization(center=False, scale=False),
            keras.layers.Dropout(0.5, seed=0),
            keras.layers.Dense(3, trainable=False),
        ]
        model = keras.Sequential([keras.Input((5,)), *layers])
        model = compiled(optimizer, model, metrics=["accuracy"], **kwargs)
        keras.utils.set_random_seed(1)  # PyTorch's dropout
        return fit(model), model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, plain = trained("sgd", **EAGER)
    with pytest.warns(UserWarning, match="not have any trainable weights"):
        history, model = trained(make("adam"))
    assert_same_histories(history, expected)
    assert_same(model, plain)
    assert int(model.optimizer.iterations) == 0
    # It can get trainable weights later.
    model.layers[-1].trainable = True
    before = model.layers[-1].get_weights()[0]
    fit(compiled(half_the_arms(arms="variable"), model))
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
    fit(compiled(half_the_arms(), model), epochs=1)
    fit(compiled(half_the_arms(), reference, **EAGER), epochs=1)
    assert_same(model, reference)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    make_model().export(folder, verbose=False)
    return folder


def model_with_a_layer_from_a_file(folder):
    layer = keras.layers.TFSMLayer(folder, call_endpoint="serve")
    return keras.Sequential([keras.Input((5,)), layer, keras.layers.Dense(3)])


@row(
    "`TFSMLayer` that is trained",
    "freeze it",
    jax="-",
    torch="-",
    tensorflow="refused",
)
def test_tfsm_layer(exported):
    model = compiled(half_the_arms(), model_with_a_layer_from_a_file(exported))
    assert model.layers[0].trainable_variables
    with pytest.raises(ValueError, match=r"TFSMLayer.*trainable = False") as refusal:
        fit(model)
    raise refusal.value


@row("`TFSMLayer` that is frozen", jax="-", torch="-")
def test_frozen_tfsm_layer(exported):
    model = model_with_a_layer_from_a_file(exported)
    model.layers[0].trainable = False
    compiled(half_the_arms(arms="variable"), model)
    fit(model)
    assert len(model.optimizer.arms) == 2


def test_the_documented_table_matches_these_tests():
    docs = pathlib.Path(__file__).parent.parent / "docs" / "fit.md"
    assert matrix.table() in docs.read_text("utf-8")
