"""Keras reads and sets the attributes of the base optimizer."""

import pathlib
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_slsam

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 4)).astype("float32"), RNG.normal(size=(16, 2))
# Too small to move a float32 weight, so the optimizer equals its base up to rounding.
RHO = 1e-12
OURS = {
    "SAM": lambda base: keras_slsam.SAM(base, rho=RHO),
    "S2SAM": lambda base: keras_slsam.S2SAM(base, rho=RHO),
    "SLSAM": lambda base: keras_slsam.SLSAM(base, rho=RHO, sampler="all"),
    "RST": lambda base: keras_slsam.RST(base, rho=RHO),
}
# Attributes of a Keras optimizer that do not come from the base optimizer.
OWN = {
    "_lock",
    "_tracker",
    "_trainable_variables",
    "_variables",
    "built",
    "name",
    # Indices of the variables, for Keras' own `apply`.
    "_trainable_variables_indices",
    # From TensorFlow.
    "_distribution_strategy",
    "_obj_reference_counts_dict",
}


def adam(**kwargs):
    return keras.optimizers.Adam(0.1, name="adam", **kwargs)


def by_kind():
    """Returns Adam for kernels and SGD for the other weights."""
    biases = {".*bias": keras.optimizers.SGD(0.1, name="sgd", use_ema=True)}
    optimizers = keras.optimizers.OptimizerMap(adam(), biases)
    return keras.optimizers.MultiOptimizer(optimizers, name="multi")


BASES = {"adam": adam, "multi": by_kind}


def fit(optimizer, *callbacks, **kwargs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    arguments = {"epochs": 3, "batch_size": 16, "shuffle": False, "verbose": 0}
    history = model.fit(X, Y, callbacks=callbacks, **arguments | kwargs).history
    return model, history


def assert_same_run(one, other):
    (model, history), (other_model, other_history) = one, other
    assert history.keys() == other_history.keys()
    for key, values in history.items():
        np.testing.assert_allclose(values, other_history[key], rtol=1e-4)
    for weight, expected in zip(model.get_weights(), other_model.get_weights()):
        np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)


def test_attributes_come_from_the_base_optimizer():
    base = adam(
        weight_decay=0.1, clipnorm=1.0, use_ema=True, gradient_accumulation_steps=2
    )
    optimizer = keras_slsam.SAM(base)
    plain = keras.optimizers.Optimizer(0.1, use_ema=True, gradient_accumulation_steps=2)
    variable = keras.Variable(np.ones(2))
    for each in (plain, optimizer):
        each.build([variable])
    names = {name for name in vars(plain) if not name.startswith("_self_")} - OWN
    assert {"clipnorm", "use_ema", "_iterations", "_accumulated_gradients"} <= names
    for name in names:
        assert getattr(optimizer, name) is getattr(base, name), name
    bases = {id(v) for v in base.variables}
    made = [v.path for v in optimizer.variables if id(v) not in bases]
    assert not [path for path in made if "average" in path or "accumulator" in path]


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "weight_decay", "use_ema"])
def test_setting_an_attribute_sets_it_on_the_base_optimizer(name):
    optimizer = keras_slsam.SAM(adam())
    setattr(optimizer, name, 0.25)
    assert getattr(optimizer.base_optimizer, name) == 0.25


def test_clipping_can_be_set_later():
    def run(optimizer):
        optimizer.clipvalue = 1e-3
        return fit(optimizer)

    make = lambda: keras.optimizers.SGD(0.1)  # noqa: E731
    assert_same_run(run(OURS["SAM"](make())), run(make()))


def test_a_loss_scale_factor_is_refused():
    optimizer = keras_slsam.SAM(adam())
    optimizer.loss_scale_factor = None
    with pytest.raises(ValueError, match=r"loss_scale_factor.*LossScaleOptimizer"):
        optimizer.loss_scale_factor = 1024.0
    assert optimizer.base_optimizer.loss_scale_factor is None


def test_keras_reads_no_other_attribute():
    """Fails if a later Keras reads an attribute that is not forwarded."""
    root = pathlib.Path(keras.src.__file__).parent
    files = [*root.glob("trainers/*.py"), *root.glob("callbacks/*.py")]
    files += [*root.glob("saving/*.py"), *root.glob("models/*.py")]
    files += root.glob("backend/*/trainer.py")
    read = set()
    for file in files:
        if not file.name.endswith("_test.py"):
            text = file.read_text(encoding="utf-8")
            read.update(re.findall(r"\b(?:optimizer|opt)\.([a-z_]+)", text))
    ours = [
        c for c in keras_slsam.SAM.__mro__ if c.__module__.startswith("keras_slsam")
    ]
    handed_on = {name for c in ours for name in vars(c)}
    # The others use forwarded attributes, or belong to `LossScaleOptimizer`.
    inherited = {"apply_gradients", "scale_loss", "stateless_apply"}
    assert read - handed_on - OWN == inherited | {"inner_optimizer"}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["SAM", "SLSAM"])
def test_learning_rate_callbacks(name, base):
    def run(optimizer):
        return fit(
            optimizer,
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
            keras.callbacks.ReduceLROnPlateau(
                "loss", factor=0.1, patience=1, min_delta=100.0
            ),
        )

    ours, plain = run(OURS[name](BASES[base]())), run(BASES[base]())
    assert len([key for key in plain[1] if "learning_rate" in key]) in (1, 2)
    assert_same_run(ours, plain)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["SAM", "RST"])
def test_swap_ema_weights(name, base):
    def run(optimizer):
        return fit(optimizer, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))

    def make():
        return adam(use_ema=True) if base == "adam" else by_kind()

    assert_same_run(run(OURS[name](make())), run(make()))
    if base == "adam":
        with pytest.raises(ValueError, match="use_ema=False"):
            run(OURS[name](adam()))


@pytest.mark.parametrize("base", BASES)
def test_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard")
    collected = []

    class Board(keras.callbacks.TensorBoard):
        def _collect_learning_rate(self, logs):
            collected.append(super()._collect_learning_rate(logs))
            return collected[-1]

    board = Board(tmp_path, write_steps_per_second=True)
    fit(OURS["SAM"](BASES[base]()), board)
    names = {"adam": {"learning_rate"}}.get(
        base, {"learning_rate_adam", "learning_rate_sgd"}
    )
    assert len(collected) == 3
    for logs in collected:
        assert {key for key in logs if "learning_rate" in key} == names
        assert all(logs[key] == pytest.approx(0.1) for key in names)


def test_a_multi_optimizer_as_base_trains_as_in_keras():
    assert_same_run(fit(OURS["SAM"](by_kind())), fit(by_kind()))
    with pytest.raises(ValueError, match=r"update_step.*MultiOptimizer"):
        keras_slsam.SLSAM(by_kind())


def test_weight_decay_exclusion_applies_to_the_base_optimizer():
    def run(optimizer):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return fit(optimizer)

    make = lambda: adam(weight_decay=0.5)  # noqa: E731
    assert_same_run(run(OURS["SAM"](make())), run(make()))


def test_the_step_count_is_that_of_the_base_optimizer():
    model, _ = fit(OURS["SAM"](adam(gradient_accumulation_steps=2)), epochs=5)
    optimizer = model.optimizer
    assert int(ops.convert_to_numpy(optimizer._iterations)) == 5
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 2
