"""The direction of the ascent: SAM's, S2-SAM's, and those of a user."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from replay import Replay
from test_rho import load_radius_of_0
from test_work import dense_chain
from test_work import executed
from user_ascents import Friendly
from user_ascents import Momentum
from user_ascents import OnlyMatrices

import keras_slsam
from keras_slsam import ascents
from keras_slsam import samplers

RATE, RHO, MOMENTUM = 0.1, 0.3, 0.9
MASKS = [[True, False], [True, True], [False, True], [True, True], [True, False]]
BATCHES = [
    (rng.normal(size=(6, 3)), rng.normal(size=(6, 2)))
    for rng in map(np.random.default_rng, range(5))
]
START = [np.random.default_rng(9).normal(size=shape) for shape in ((3, 2), (2,))]


def by_hand(direction, masks, rho=None):
    """Takes steps of SGD with momentum on a linear model with NumPy.

    Args:
        direction: Function of a dict from names to lists of arrays: `g`, the batch's
            gradients, `mean` of the earlier ones, `velocity` of the weights, `applied`,
            the gradients last applied.
        masks: The active arms of each step.
        rho: The radius of each step.
    """
    w = [v.copy() for v in START]
    state = {k: [0 * v for v in w] for k in ("mean", "velocity", "applied")}
    for (x, y), mask, radius in zip(BATCHES, masks, rho or [RHO] * len(masks)):

        def gradients(weights, x=x, y=y):
            error = x @ weights[0] + weights[1] - y
            return [x.T @ error * 2 / error.size, error.sum(0) * 2 / error.size]

        g = gradients(w)
        d = [v * on for v, on in zip(direction({"g": g, **state}), mask)]
        norm = np.sqrt(sum((v**2).sum() for v in d))
        h = gradients([v + radius * e / (norm + 1e-12) for v, e in zip(w, d)])
        for i in np.flatnonzero(mask):
            if radius:
                state["mean"][i] = 0.9 * state["mean"][i] + 0.1 * g[i]
            state["applied"][i] = h[i]
            state["velocity"][i] = MOMENTUM * state["velocity"][i] - RATE * h[i]
            w[i] = w[i] + state["velocity"][i]
    return w, state


def linear(optimizer, **kwargs):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    model.set_weights(START)
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss="mse", **kwargs)
    return model


def train(optimizer, batches=BATCHES, **kwargs):
    model = linear(optimizer, **kwargs)
    for batch in batches:
        model.train_on_batch(*(a.astype("float32") for a in batch))
    return model.get_weights()


def sgd(**kwargs):
    return keras.optimizers.SGD(RATE, momentum=MOMENTUM, **kwargs)


def sparse(**kwargs):
    return keras_slsam.SLSAM(sgd(), RHO, sampler=Replay(MASKS), **kwargs)


DIRECTIONS = {
    "gradient": (ascents.Ascent, lambda s: s["g"]),
    "last applied": (ascents.LastApplied, lambda s: s["applied"]),
    "friendly": (Friendly, lambda s: [g - m for g, m in zip(s["g"], s["mean"])]),
    "momentum": (Momentum, lambda s: [-v for v in s["velocity"]]),
    "matrices": (OnlyMatrices, lambda s: [s["g"][0], 0 * s["g"][1]]),
}


@pytest.mark.parametrize(
    ("method", "name"),
    [*(("slsam", name) for name in DIRECTIONS), ("sam", "friendly")],
)
def test_steps_match_the_formula(method, name):
    ascent, formula = DIRECTIONS[name]
    if method == "sam":
        found = train(keras_slsam.SAM(sgd(), RHO, ascent=ascent()))
        expected, _ = by_hand(formula, [[True, True]] * 5)
    else:
        found = train(sparse(ascent=ascent()))
        expected, _ = by_hand(formula, MASKS)
    for got, wanted in zip(found, expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_adaptive_scales_any_direction():
    found = train(keras_slsam.SAM(sgd(), RHO, True, ascent=OnlyMatrices()), BATCHES[:1])
    # |w| d instead of d in the norm, and w^2 d as the ascent.
    w, (x, y) = START, BATCHES[0]
    error = x @ w[0] + w[1] - y
    d = x.T @ error * 2 / error.size
    perturbed = w[0] + RHO * w[0] ** 2 * d / np.linalg.norm(w[0] * d)
    error = x @ perturbed + w[1] - y
    h = x.T @ error * 2 / error.size, error.sum(0) * 2 / error.size
    for got, start, gradient in zip(found, w, h):
        np.testing.assert_allclose(got, start - RATE * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("single", [False, True])
def test_last_applied_is_the_ascent_of_a_single_step(single):
    def make(**kwargs):
        if single:
            return sparse(**kwargs or {"single_step": True})
        kwargs = {"rho": RHO, **kwargs}
        return (keras_slsam.SAM if "ascent" in kwargs else keras_slsam.S2SAM)(
            sgd(), **kwargs
        )

    found = train(make(ascent=ascents.LastApplied()))
    for got, expected in zip(found, train(make())):
        np.testing.assert_array_equal(got, expected)


def test_an_ascent_learns_only_from_steps_that_have_one():
    radii = [0.3, 0.0, 0.3, 0.0, 0.3]

    def rho(step):
        return ops.take(ops.convert_to_tensor(radii), step)

    optimizer = keras_slsam.SAM(sgd(), rho=rho, ascent=Friendly())
    formula = DIRECTIONS["friendly"][1]
    expected, state = by_hand(formula, [[True, True]] * 5, radii)
    for got, wanted in zip(train(optimizer), expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    for mean, wanted in zip(optimizer.ascent.mean, state["mean"]):
        np.testing.assert_allclose(ops.convert_to_numpy(mean), wanted, rtol=1e-4)


def test_an_ascent_does_not_learn_with_a_radius_of_0_that_a_callback_loads():
    model = linear(keras_slsam.SAM(sgd(), RHO, ascent=Friendly()))
    model.train_on_batch(*BATCHES[0])
    optimizer = model.optimizer
    x, y = map(np.concatenate, zip(*BATCHES[1:3]))
    callback = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: load_radius_of_0(optimizer)
    )
    model.fit(x, y, 6, shuffle=False, verbose=0, callbacks=[callback])
    expected, state = by_hand(
        DIRECTIONS["friendly"][1], [[True, True]] * 3, [RHO, 0, 0]
    )
    for got, wanted in zip(model.get_weights(), expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(optimizer.ascent.mean, state["mean"]):
        got = ops.convert_to_numpy(got)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_ascent_does_not_learn_from_a_step_that_is_skipped(fraction):
    optimizer = keras_slsam.SAM(sgd(), ascent_fraction=fraction, ascent=Friendly())
    x, y = BATCHES[0]
    train(optimizer, [BATCHES[0], (x * np.inf, y)])
    assert int(optimizer.skipped_steps) == 1
    for mean in optimizer.ascent.mean:
        assert np.isfinite(ops.convert_to_numpy(mean)).all()
        assert np.any(ops.convert_to_numpy(mean))


def test_an_ascent_learns_from_part_of_a_batch():
    x, y = BATCHES[0]
    optimizer = keras_slsam.SAM(sgd(), ascent_fraction=0.5, ascent=Friendly())
    train(optimizer, [(x, y)])
    error = x[:3] @ START[0] + START[1] - y[:3]
    mean = ops.convert_to_numpy(optimizer.ascent.mean[0])
    np.testing.assert_allclose(mean, 0.1 * x[:3].T @ error * 2 / error.size, rtol=1e-5)


def test_what_is_applied_is_the_mean_of_a_window():
    learned = []

    class Records(ascents.LastApplied):
        def update(self, index, gradient):
            super().update(index, gradient)
            learned.append(index)

    optimizer = keras_slsam.SAM(
        keras.optimizers.SGD(RATE, gradient_accumulation_steps=2),
        rho=0.0,
        ascent=Records(),
    )
    found = train(optimizer, BATCHES[:2], run_eagerly=True)
    assert learned == [0, 1]
    for got, start, variable in zip(found, START, optimizer.ascent._gradients):
        applied = ops.convert_to_numpy(variable)
        np.testing.assert_allclose(got, start - RATE * applied, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ascent", [Friendly, OnlyMatrices])
def test_known_masks_and_traced_masks_give_the_same(ascent):
    def run(eagerly):
        model = keras.Sequential(
            [keras.Input((4,), dtype="int32"), layers.Embedding(7, 3), layers.Dense(2)]
        )
        rng = np.random.default_rng(0)
        model.set_weights([rng.normal(size=v.shape) for v in model.weights])
        sampler = Replay([[True, True, False], [False, True, True]])
        optimizer = keras_slsam.SLSAM(
            keras.optimizers.SGD(0.1),
            sampler=sampler,
            ascent=ascent(),
            ascent_fraction=0.5,
        )
        model = keras_slsam.sharpness_aware(model)
        scaler = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
        model.compile(
            optimizer=optimizer if eagerly else scaler, loss="mse", run_eagerly=eagerly
        )
        for seed in range(3):
            rng = np.random.default_rng(seed)
            model.train_on_batch(rng.integers(0, 7, (6, 4)), rng.normal(size=(6, 4, 2)))
        means = getattr(optimizer.ascent, "mean", [])
        means = [ops.convert_to_numpy(mean) for mean in means]
        assert all(np.any(mean) for mean in means)
        return model.get_weights() + means

    # The scaler must not matter either: an ascent gets gradients without its factor.
    for compiled, eager in zip(run(False), run(True)):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_an_ascent_without_a_gradient_costs_one_pass():
    model, products, x = dense_chain()
    everything = products.flops({v.path for v in model.trainable_variables})
    base = keras.optimizers.SGD(momentum=0.9)
    assert executed(model, keras_slsam.SAM(base, ascent=Momentum()), x) == everything

    model, products, x = dense_chain()
    optimizer = keras_slsam.SAM("sgd", ascent=Friendly())
    assert executed(model, optimizer, x) == 2 * everything


def test_state_and_arguments_are_saved(tmp_path):
    model = linear(sparse(ascent=Friendly(0.8)))
    for batch in BATCHES[:2]:
        model.train_on_batch(*batch)
    model.save(tmp_path / "model.keras")
    restored = keras_slsam.sharpness_aware(
        keras.saving.load_model(tmp_path / "model.keras")
    )
    assert restored.optimizer.ascent.momentum == 0.8
    for each in (model, restored):
        for batch in BATCHES[2:]:
            each.train_on_batch(*batch)
    for got, expected in zip(restored.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(got, expected)

    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="ascent='Friendly', not 'Ascent'"):
        linear(sparse()).load_weights(tmp_path / "model.weights.h5")


class Wrong(ascents.Ascent):
    def __init__(self, found):
        self.found = found

    def direction(self, index, gradient):
        return self.found(gradient)


@pytest.mark.parametrize(
    "found",
    [lambda g: None, lambda g: 1.0, lambda g: g[:1], lambda g: [g]],
    ids=["nothing", "number", "part", "list"],
)
def test_a_direction_must_have_the_shape_of_the_variable(found):
    with pytest.raises(ValueError, match=r"`direction\(\)` of `Wrong`.*\(3, 2\)"):
        train(keras_slsam.SAM("sgd", ascent=Wrong(found)))


@pytest.mark.parametrize("value", ["friendly", Friendly, 1, lambda: None])
def test_what_is_no_ascent_is_refused(value):
    with pytest.raises(ValueError, match="`ascent` of `SAM`.*Ascent.*Received"):
        keras_slsam.SAM("sgd", ascent=value)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="`ascent` of `SLSAM`.*single_step=True"):
        keras_slsam.SLSAM("sgd", single_step=True, ascent=Friendly())

    class Nothing(ascents.Ascent):
        needs_gradient = False

    with pytest.raises(ValueError, match="`SAM` has `needs_gradient=False`.*override"):
        keras_slsam.SAM("sgd", ascent=Nothing())
    with pytest.raises(ValueError, match="`ascent_fraction`.*Momentum"):
        keras_slsam.SAM("sgd", ascent_fraction=0.5, ascent=Momentum())
    optimizer = keras_slsam.SAM("sgd", ascent=Friendly())
    with pytest.raises(ValueError, match="`ascent` of `SAM` cannot be replaced"):
        optimizer.ascent = Momentum()


@pytest.mark.parametrize(
    "make",
    [
        lambda v: [keras.Variable(ops.zeros(v.shape))],
        lambda v: keras.random.SeedGenerator(0),
    ],
    ids=["variable", "random"],
)
def test_state_that_would_be_lost_is_refused(make):
    class Loses(ascents.Ascent):
        def build(self, optimizer, variables):
            self.own = make(variables[0])

    model = linear(keras_slsam.SAM("sgd", ascent=Loses()))
    with pytest.raises(ValueError, match="`own` of the ascent `Loses`.*would not save"):
        model.train_on_batch(*BATCHES[0])
    with pytest.raises(ValueError, match="or for these in a step.*Create a new one"):
        model.train_on_batch(*BATCHES[0])


class KeepsTensors(ascents.Ascent):
    """Keeps the last gradients in a list, from `build` on or from `update` on."""

    def __init__(self, from_build):
        self.from_build, self.last = from_build, {}

    def build(self, optimizer, variables):
        if self.from_build:
            self.last = dict(enumerate(ops.zeros(v.shape) for v in variables))

    def update(self, index, gradient):
        self.last[index] = gradient


class Averages(samplers.Sampler):
    """Keeps the mean of the norms in a tensor."""

    def __init__(self):
        self.mean = 0.0

    def draw(self):
        return ops.ones((2,), "bool")

    def update(self, active, norms):
        self.mean = 0.9 * self.mean + 0.1 * norms


class Alternates(samplers.Sampler):
    """Keeps the next mask in a tensor."""

    def build(self, num_arms):
        self.mask = ops.arange(num_arms) % 2

    def draw(self):
        self.mask = 1 - self.mask
        return self.mask


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ascent": KeepsTensors(True)}, "`last` of `KeepsTensors`.*add_variable"),
        ({"ascent": KeepsTensors(False)}, "`last` of `KeepsTensors`.*add_variable"),
        ({"sampler": Alternates()}, "`mask` of `Alternates`.*keras.Variable"),
        ({"sampler": Averages()}, "`mean` of `Averages`.*keras.Variable"),
        ({"sampler": samplers.Hold(Averages(), 1)}, "`mean` of `Averages`"),
    ],
    ids=["build", "update", "draw", "sampler", "held sampler"],
)
def test_state_in_tensors_is_refused(kwargs, message):
    model = linear(keras_slsam.SLSAM("sgd", **{"sampler": "all", **kwargs}))
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(*BATCHES[0])
    if "sampler" in kwargs:
        for got, start in zip(model.get_weights(), START):
            np.testing.assert_allclose(got, start, rtol=1e-6)


def test_a_base_optimizer_that_cannot_be_built_takes_no_step():
    class Fails(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            raise ValueError("no space")

    model = linear(keras_slsam.SAM(Fails(RATE)))
    for message in ("no space", "Create a new one"):
        with pytest.raises(ValueError, match=message):
            model.train_on_batch(*BATCHES[0])


def test_an_ascent_serves_one_optimizer():
    ascent = Friendly()
    train(keras_slsam.SAM("sgd", ascent=ascent))
    with pytest.raises(ValueError, match="`ascent` of `SAM` is used by another"):
        train(keras_slsam.SAM("sgd", ascent=ascent))
