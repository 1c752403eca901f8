"""The ascent on part of a batch: which rows each pass sees, and what it costs."""

import keras
import numpy as np
import pytest
from keras import layers
from replay import Replay
from test_work import BATCH
from test_work import dense_chain
from test_work import executed

import keras_slsam

RATE, RHO = 0.1, 0.5


def regression(rows, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 4)), rng.normal(size=(rows, 1))


def linear(optimizer, x, y, **kwargs):
    """Trains a linear model for an epoch. Returns its kernel and the loss."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, use_bias=False)])
    model.set_weights([np.linspace(-1, 1, 4).reshape(4, 1)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss="mse")
    history = model.fit(x, y, shuffle=False, verbose=0, **kwargs).history
    return model.get_weights()[0], history["loss"][0]


def gradient(w, x, y, weight=None):
    weight = np.ones(len(x)) if weight is None else weight
    return 2 * x.T @ (weight[:, None] * (x @ w - y)) / len(x)


def expected(batches, rows_of_ascent):
    """SAM by hand: the weights, and the mean loss at the perturbed weights."""
    w, losses = np.linspace(-1, 1, 4).reshape(4, 1), []
    for (x, y, weight), first in zip(batches, rows_of_ascent):
        g = gradient(w, x[:first], y[:first], weight[:first])
        perturbed = w + RHO * g / np.linalg.norm(g)
        error = (x @ perturbed - y)[:, 0]
        losses.append(np.sum(weight * error**2))
        w = w - RATE * gradient(perturbed, x, y, weight)
    return w, sum(losses) / sum(len(x) for x, _, _ in batches)


@pytest.mark.filterwarnings("ignore:`SLSAM` found a single arm")
@pytest.mark.parametrize(
    ("method", "weights"),
    [("sam", None), ("slsam", None), ("slsam", "sample"), ("sam", "class")],
)
def test_the_first_pass_sees_the_first_rows(method, weights):
    x, y = regression(20)
    weight, given = np.ones(20), {}
    if weights == "sample":
        weight = np.random.default_rng(1).uniform(0.5, 2.0, 20)
        given = {"sample_weight": weight}
    if weights == "class":
        y = np.where(y > 0, 1, 0)
        weight, given = np.where(y[:, 0], 2.0, 0.5), {"class_weight": {0: 0.5, 1: 2.0}}
    # Three tenths of 8 rows are 2.4, of the last 4 rows 1.2: rounded up.
    cuts = [(0, 8, 3), (8, 16, 3), (16, 20, 2)]
    batches = [(x[a:b], y[a:b], weight[a:b]) for a, b, _ in cuts]
    w, loss = expected(batches, [first for *_, first in cuts])
    kwargs = {"rho": RHO, "ascent_fraction": 0.3}
    optimizer = (
        keras_slsam.SAM(keras.optimizers.SGD(RATE), **kwargs)
        if method == "sam"
        else keras_slsam.SLSAM(
            keras.optimizers.SGD(RATE), sampler=Replay([[True]]), **kwargs
        )
    )
    found, found_loss = linear(optimizer, x, y, batch_size=8, **given)
    np.testing.assert_allclose(found, w, rtol=1e-5)
    assert found_loss == pytest.approx(loss, rel=1e-5)


def test_a_tenth_of_thirty_rows_is_three():
    x, y = regression(30)
    optimizer = keras_slsam.SAM(
        keras.optimizers.SGD(RATE), rho=RHO, ascent_fraction=0.1
    )
    w, _ = expected([(x, y, np.ones(30))], [3])
    found, _ = linear(optimizer, x, y, batch_size=30)
    np.testing.assert_allclose(found, w, rtol=1e-5)


def test_at_least_one_row_is_seen():
    x, y = regression(8)
    optimizer = keras_slsam.SAM(
        keras.optimizers.SGD(RATE), rho=RHO, ascent_fraction=1e-4
    )
    w, _ = expected([(x, y, np.ones(8))], [1])
    found, _ = linear(optimizer, x, y, batch_size=8)
    np.testing.assert_allclose(found, w, rtol=1e-5)


class Draws(layers.Layer):
    """Draws from NumPy when it is called, and records the number."""

    def __init__(self):
        super().__init__()
        self.rng, self.drawn = np.random.default_rng(0), []

    def call(self, x):
        self.drawn.append(self.rng.random())
        return x * self.drawn[-1]


def test_both_passes_draw_the_same_numbers():
    draws = Draws()
    model = keras.Sequential([keras.Input((4,)), draws, layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SAM("sgd", ascent_fraction=0.5)
    model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
    model.train_on_batch(*regression(8))
    draws.drawn.clear()
    model.train_on_batch(*regression(8))
    model.train_on_batch(*regression(8))
    first, again, second, again_too = draws.drawn
    assert first == again != second == again_too


def test_a_first_pass_that_is_not_finite_is_skipped():
    x, y = regression(8)
    x[0] = np.inf
    optimizer = keras_slsam.SAM("sgd", ascent_fraction=0.25)
    found, _ = linear(optimizer, x, y, batch_size=8)
    np.testing.assert_allclose(found, np.linspace(-1, 1, 4).reshape(4, 1), rtol=1e-6)
    assert int(optimizer.skipped_steps) == 1


def test_inputs_without_a_common_number_of_rows_are_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(loss="mse")
    optimizer = keras_slsam.SAM("sgd", ascent_fraction=0.5)
    x, y = (keras.ops.convert_to_tensor(a, dtype="float32") for a in regression(8))
    for data in ((x, y[:6]), (x, y, keras.ops.ones(()))):
        with pytest.raises(ValueError, match="ascent_fraction=0.5.*shapes"):
            keras_slsam.step(model, optimizer, data)


def test_nested_inputs_and_targets():
    x, y = regression(8)
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b")}
    dense = layers.Dense(1, use_bias=False, name="c")
    joined = layers.Concatenate()([inputs["a"], inputs["b"]])
    model = keras.Model(inputs, {"c": dense(joined)})
    model.set_weights([np.linspace(-1, 1, 4).reshape(4, 1)])
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SAM(
        keras.optimizers.SGD(RATE), rho=RHO, ascent_fraction=0.5
    )
    model.compile(optimizer=optimizer, loss={"c": "mse"})
    model.train_on_batch({"a": x[:, :2], "b": x[:, 2:]}, {"c": y})
    w, _ = expected([(x, y, np.ones(8))], [4])
    np.testing.assert_allclose(model.get_weights()[0], w, rtol=1e-5)


def test_batch_statistics_are_those_of_the_whole_batch_and_count_once():
    x, _ = regression(8)
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(momentum=0.5), layers.Dense(1)]
    )
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SAM("sgd", ascent_fraction=0.25)
    model.compile(optimizer=optimizer, loss="mse")
    model.train_on_batch(x, np.ones((8, 1)))
    mean = keras.ops.convert_to_numpy(model.layers[0].moving_mean)
    np.testing.assert_allclose(mean, 0.5 * x.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_masked_steps_count_in_neither_pass_nor_metrics():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3, 4)), rng.normal(size=(8, 3, 1))
    x[1, 1:] = x[5, 2] = 0.0
    kept = x.any(axis=-1)
    start = np.linspace(-1, 1, 4).reshape(4, 1)
    model = keras.Sequential(
        [keras.Input((3, 4)), layers.Masking(), layers.Dense(1, use_bias=False)]
    )
    model.set_weights([start])
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SAM(
        keras.optimizers.SGD(RATE), rho=RHO, ascent_fraction=0.5
    )
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    logs = model.train_on_batch(x, y, return_dict=True)
    g = gradient(start, x[:4][kept[:4]], y[:4][kept[:4]])
    perturbed = start + RHO * g / np.linalg.norm(g)
    w = start - RATE * gradient(perturbed, x[kept], y[kept])
    np.testing.assert_allclose(model.get_weights()[0], w, rtol=1e-5)
    error = x[kept] @ perturbed - y[kept]
    assert logs["loss"] == pytest.approx(np.mean(error**2), rel=1e-5)
    assert logs["mae"] == pytest.approx(np.mean(abs(error)), rel=1e-5)


def test_accumulated_micro_batches_have_an_ascent_each():
    """This is m-SAM."""
    x, y = regression(8)
    base = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    found, _ = linear(keras_slsam.SAM(base, rho=RHO), x, y, batch_size=4)
    w, gradients = np.linspace(-1, 1, 4).reshape(4, 1), []
    for part in (x[:4], y[:4]), (x[4:], y[4:]):
        g = gradient(w, *part)
        gradients.append(gradient(w + RHO * g / np.linalg.norm(g), *part))
    np.testing.assert_allclose(found, w - RATE * np.mean(gradients, 0), rtol=1e-5)


def test_the_first_pass_costs_its_share_of_the_rows():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    optimizer = keras_slsam.SAM("sgd", ascent_fraction=0.25)
    assert BATCH % 4 == 0
    assert executed(model, optimizer, x) == everything * 5 / 4

    model, products, x = dense_chain()
    mask = [arm % 3 == 1 for arm in range(len(model.trainable_variables))]
    active = {v.path for v, on in zip(model.trainable_variables, mask) if on}
    optimizer = keras_slsam.SLSAM("sgd", sampler=Replay([mask]), ascent_fraction=0.25)
    assert executed(model, optimizer, x) == products.flops(active) * 5 / 4


def test_without_a_radius_there_is_one_pass():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    optimizer = keras_slsam.SAM("sgd", rho=0.0, ascent_fraction=0.5)
    assert executed(model, optimizer, x) == everything


def test_the_argument_is_saved():
    optimizer = keras_slsam.SLSAM("sgd", ascent_fraction=0.25)
    restored = keras_slsam.SLSAM.from_config(optimizer.get_config())
    assert restored.ascent_fraction == 0.25
    optimizer = keras_slsam.SAM("sgd", ascent_fraction=0.25)
    assert keras_slsam.SAM.from_config(optimizer.get_config()).ascent_fraction == 0.25


@pytest.mark.parametrize("value", [0, 1.5, -0.1, True, "half", None, float("nan")])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="`ascent_fraction` of `SAM`.*Received"):
        keras_slsam.SAM("sgd", ascent_fraction=value)


def test_a_single_step_has_no_pass_for_it():
    with pytest.raises(ValueError, match="single_step.*ascent_fraction=0.5"):
        keras_slsam.SLSAM("sgd", single_step=True, ascent_fraction=0.5)
