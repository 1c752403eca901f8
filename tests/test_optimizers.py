"""The base optimizer updates each active variable as if it were the only one."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from replay import Replay
from zoo import EAGER

import keras_slsam
from keras_slsam import samplers

SHAPES = [(3, 4), (2,), (5, 2)]
MASKS = [
    [1, 0, 1],
    [1, 1, 0],
    [0, 1, 0],
    [1, 0, 0],
    [0, 1, 1],
    [1, 1, 1],
    [0, 0, 1],
    [1, 0, 1],
]


class Inner(keras.layers.Layer):
    """The inner product of input and weights, whose gradient ignores the weights."""

    def build(self, input_shape):
        self.parts = [
            self.add_weight(
                shape=shape,
                name=f"part_{i}",
                initializer=lambda *args, i=i, **kwargs: ops.convert_to_tensor(
                    STARTS[i]
                ),
            )
            for i, shape in enumerate(SHAPES)
        ]

    def call(self, x):
        flat = ops.concatenate([ops.reshape(w, (-1,)) for w in self.parts])
        return ops.matmul(x, ops.expand_dims(flat, 1))


STARTS = [
    np.random.default_rng(i).normal(size=shape).astype("float32")
    for i, shape in enumerate(SHAPES)
]
SIZES = [int(np.prod(shape)) for shape in SHAPES]


def batches():
    rng = np.random.default_rng(7)
    return rng.normal(size=(len(MASKS), 2, sum(SIZES))).astype("float32")


def gradients_of(batch):
    parts = np.split(batch.mean(axis=0), np.cumsum(SIZES)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES)]


def mean_output(y, y_pred):
    return ops.mean(y_pred)


def inner_model(optimizer, sharpness_aware=True, **kwargs):
    model = keras.Sequential([keras.Input((sum(SIZES),)), Inner()])
    if sharpness_aware:
        model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss=mean_output, **kwargs)
    return model


def train(model):
    """Returns the weights after each step."""
    history = []
    for batch in batches():
        model.train_on_batch(batch, np.zeros((2, 1)))
        history.append(model.get_weights())
    return history


def alone(make_base, learning_rate=None):
    """Returns the weights after each step if each variable has its own optimizer."""
    variables = [
        keras.Variable(start, name=f"part_{i}") for i, start in enumerate(STARTS)
    ]
    bases = [make_base() for _ in variables]
    for base, variable in zip(bases, variables):
        base.build([variable])
    history = []
    for step, (mask, batch) in enumerate(zip(MASKS, batches())):
        for on, base, variable, gradient in zip(
            mask, bases, variables, gradients_of(batch)
        ):
            if on:
                if learning_rate is not None:
                    base.learning_rate = float(learning_rate(step))
                base.apply([ops.convert_to_tensor(gradient)], [variable])
        history.append([ops.convert_to_numpy(v) for v in variables])
    return history


def assert_same(history, expected, rtol=2e-5, atol=2e-6):
    for weights, expected_weights in zip(history, expected):
        for weight, expected_weight in zip(weights, expected_weights):
            np.testing.assert_allclose(weight, expected_weight, rtol=rtol, atol=atol)


optimizers = keras.optimizers
BASES = {
    "sgd": lambda: optimizers.SGD(0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optimizers.Adam(0.1),
    "amsgrad": lambda: optimizers.Adam(0.1, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(0.1, weight_decay=0.1),
    "rmsprop": lambda: optimizers.RMSprop(0.1, momentum=0.5, centered=True),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "adadelta": lambda: optimizers.Adadelta(1.0),
    "adamax": lambda: optimizers.Adamax(0.1),
    "nadam": lambda: optimizers.Nadam(0.1),
    "ftrl": lambda: optimizers.Ftrl(0.1),
    "lion": lambda: optimizers.Lion(0.1, weight_decay=0.1),
    "adafactor": lambda: optimizers.Adafactor(0.1),
    "muon": lambda: optimizers.Muon(0.1, weight_decay=0.1),
    "lamb": lambda: optimizers.Lamb(0.1),
    "schedule_free": lambda: optimizers.ScheduleFreeAdamW(0.1),
}
BASES = {
    name: base
    for name, base in BASES.items()
    # Newer versions of Keras have more optimizers.
    if all(hasattr(optimizers, n) for n in base.__code__.co_names if n[0].isupper())
}


# The most different ones, which TensorFlow traces. It runs the others eagerly. JAX runs
# only these, because `alone` is slow there.
TRACED = "nesterov rmsprop amsgrad nadam ftrl lion adafactor muon lamb schedule_free"


# `test_moments_and_schedules` has AdamW.
@pytest.mark.parametrize("name", [name for name in BASES if name != "adamw"])
def test_each_variable_steps_as_if_alone(name):
    if keras.config.backend() == "jax" and name not in TRACED.split():
        pytest.skip("runs on the other backends")
    try:
        expected = alone(BASES[name])
    except AttributeError:  # raised by Keras 3.12 on TensorFlow
        assert name == "muon"
        pytest.skip("Muon reads a path that TensorFlow's variables do not have")
    optimizer = keras_slsam.SLSAM(BASES[name](), sampler=Replay(MASKS))
    history = train(inner_model(optimizer, **({} if name in TRACED.split() else EAGER)))
    assert_same(history, expected)
    before = STARTS
    for mask, weights in zip(MASKS, history):
        for on, old, new in zip(mask, before, weights):
            assert on or np.array_equal(old, new)
        before = weights
    assert int(optimizer.iterations) == len(MASKS)


@pytest.mark.parametrize("name", [n for n in ("nadam", "schedule_free") if n in BASES])
def test_a_mask_of_all_arms_equals_the_base_optimizer(name):
    """Uses the code that can skip arms."""
    expected = train(inner_model(BASES[name](), sharpness_aware=False, **EAGER))
    optimizer = keras_slsam.SLSAM(BASES[name](), sampler=Replay([[1, 1, 1]]))
    assert_same(train(inner_model(optimizer)), expected)


def test_methods_with_all_arms_active_equal_the_base_optimizer():
    # The gradient does not depend on the weights, so no method changes it.
    base = BASES["nadam"]
    expected = train(inner_model(base(), sharpness_aware=False, **EAGER))
    for method in (keras_slsam.SAM, keras_slsam.S2SAM):
        assert_same(train(inner_model(method(base()))), expected)


def test_moments_and_schedules():
    """Moments of inactive variables keep every bit, and schedules count all steps."""
    schedule = optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    optimizer = keras_slsam.SLSAM(
        optimizers.AdamW(schedule, weight_decay=0.1), sampler=Replay(MASKS)
    )
    model = inner_model(optimizer)
    optimizer.build(model.trainable_variables)

    def slots(i):
        return [
            ops.convert_to_numpy(v)
            for v in optimizer.base_optimizer.variables
            if f"part_{i}" in v.path
        ]

    assert len(slots(0)) == 2
    history = []
    for mask, batch in zip(MASKS, batches()):
        before = [slots(i) for i in range(3)]
        model.train_on_batch(batch, np.zeros((2, 1)))
        history.append(model.get_weights())
        for i, on in enumerate(mask):
            same = [np.array_equal(a, b) for a, b in zip(before[i], slots(i))]
            assert not any(same) if on else all(same)
    expected = alone(BASES["adamw"], lambda step: 0.1 * 0.5 ** (step / 2))
    assert_same(history, expected)
    np.testing.assert_allclose(
        float(optimizer.learning_rate), 0.1 * 0.5 ** (len(MASKS) / 2), rtol=1e-5
    )
    assert optimizer.base_optimizer.get_config()["learning_rate"]["class_name"] == (
        "ExponentialDecay"
    )


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_is_over_the_active_variables(clip):
    optimizer = keras_slsam.SLSAM(
        optimizers.SGD(0.5, **{clip: 0.2}), sampler=Replay(MASKS)
    )
    optimizer.learning_rate = 1.0
    history = train(inner_model(optimizer, **({} if "global" in clip else EAGER)))
    weights = [start.astype("float64") for start in STARTS]
    for mask, batch, got in zip(MASKS, batches(), history):
        gradients = [g * on for g, on in zip(gradients_of(batch), mask)]
        norms = [np.sqrt((g**2).sum()) for g in gradients]
        together = np.sqrt(sum(n**2 for n in norms))
        for i, (gradient, norm) in enumerate(zip(gradients, norms)):
            clipped = {
                "clipnorm": gradient * min(1, 0.2 / max(norm, 1e-30)),
                "clipvalue": np.clip(gradient, -0.2, 0.2),
                "global_clipnorm": gradient * min(1, 0.2 / together),
            }[clip]
            weights[i] = weights[i] - clipped
            np.testing.assert_allclose(got[i], weights[i], rtol=1e-5, atol=1e-6)


def test_weight_decay_can_be_excluded():
    base = optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer = keras_slsam.SLSAM(base, sampler=Replay(MASKS))
    optimizer.exclude_from_weight_decay(var_names=["part_0"])
    history = train(inner_model(optimizer))
    decayed = alone(lambda: optimizers.AdamW(0.1, weight_decay=0.5))
    plain = alone(lambda: optimizers.Adam(0.1))
    assert_same(history, [[p[0], *d[1:]] for d, p in zip(decayed, plain)])


def test_moving_average_covers_the_whole_model_in_each_step():
    base = optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    )
    model = inner_model(keras_slsam.SLSAM(base, sampler=Replay(MASKS)))
    history = train(model)
    weights = [start.astype("float64") for start in STARTS]
    average = None
    for step, (mask, batch, got) in enumerate(zip(MASKS, batches(), history)):
        for i, gradient in enumerate(gradients_of(batch)):
            weights[i] = weights[i] - 0.1 * mask[i] * gradient
        average = [
            w if average is None else 0.5 * a + 0.5 * w
            for w, a in zip(weights, average or weights)
        ]
        if (step + 1) % 3 == 0:
            weights = list(average)
        for weight, expected in zip(got, weights):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for weight, expected in zip(model.get_weights(), average):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_gradient_accumulation_of_the_base_optimizer():
    """A step whose norm overflows is left out of its window."""
    base = optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = inner_model(keras_slsam.SAM(base))
    weights = [start.astype("float64") for start in STARTS]
    data = [gradients_of(batch) for batch in batches()]
    for step, batch in enumerate(batches()):
        if step == 3:
            model.train_on_batch(1e30 * batch, np.zeros((2, 1)))
        model.train_on_batch(batch, np.zeros((2, 1)))
        if step % 2:
            for i in range(3):
                weights[i] = weights[i] - 0.05 * (data[step - 1][i] + data[step][i])
        for weight, expected in zip(model.get_weights(), weights):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
    assert int(model.optimizer.skipped_steps) == 1
    norms = ops.convert_to_numpy(model.optimizer.gradient_norms)
    assert np.isfinite(norms).all() and (norms > 0).all()


def test_private_names_of_keras_exist():
    """Fails if Keras moves names that `BaseStep`, the loss and the step use."""
    base = optimizers.Nadam()
    for name in (
        "_clip_gradients",
        "_use_weight_decay",
        "_apply_weight_decay",
        "_update_model_variables_moving_average",
        "_overwrite_model_variables_with_average_value",
        "_learning_rate",
        "_track_variable",
    ):
        assert hasattr(base, name), name
    base.build([keras.Variable([1.0])])
    assert base._u_product.shape == ()
    assert int(base._iterations) == 0
    base = optimizers.SGD(gradient_accumulation_steps=2)
    base.build([keras.Variable([1.0])])
    assert len(base._accumulated_gradients) == 1
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    assert model._loss_tracker.name == "loss"
    assert len(list(model._flatten_layers())) == 3


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ("variable", [1] * 8),
        ("layer", [2, 2, 2, 2]),
        ("block", [2, 4, 2]),
        (lambda variable: variable.path.endswith("bias"), [4, 4]),
    ],
)
def test_arms(arms, expected):
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.up, self.down = keras.layers.Dense(8), keras.layers.Dense(4)

        def call(self, x):
            return x + self.down(self.up(x))

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4), Block(), keras.layers.Dense(2)]
    )
    optimizer = keras_slsam.SLSAM("sgd", arms=arms)
    optimizer.build(model.trainable_variables)
    assert [len(arm) for arm in optimizer.arms] == expected
    assert {id(v) for arm in optimizer.arms for v in arm} == {
        id(v) for v in model.trainable_variables
    }


def test_the_blocks_of_a_subclassed_model_are_its_layers():
    import zoo

    model, *_ = zoo.build("subclassed")
    optimizer = keras_slsam.SLSAM("sgd", arms="block")
    optimizer.build(model.trainable_variables)
    assert len(optimizer.arms) == 3


class Tower(keras.Model):
    """A model with a weight that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.blocks = [keras.layers.Dense(4) for _ in range(3)]

    def build(self, input_shape):
        self.token = self.add_weight(shape=(4,), name="token")

    def call(self, x):
        x = x + self.token
        for block in self.blocks:
            x = block(x)
        return x


def test_a_weight_of_the_model_itself_is_a_block():
    model = Tower()
    model(np.ones((2, 4)))
    optimizer = keras_slsam.SLSAM("sgd", arms="block")
    optimizer.build(model.trainable_variables)
    assert sorted(len(arm) for arm in optimizer.arms) == [1, 2, 2, 2]


@pytest.mark.parametrize("arms", ["layer", "block"])
def test_layers_with_the_same_name_in_two_models_are_two_arms(arms):
    def tower():
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, name="first")(inputs)
        return keras.Model(inputs, keras.layers.Dense(4, name="second")(x))

    inputs = keras.Input((4,))
    model = keras.Model(inputs, tower()(inputs) + tower()(inputs))
    optimizer = keras_slsam.SLSAM("sgd", arms=arms)
    optimizer.build(model.trainable_variables)
    layers = [layer for inner in model.layers for layer in getattr(inner, "layers", [])]
    expected = [{id(v) for v in la.variables} for la in layers if la.variables]
    assert len(expected) == 4
    assert [{id(v) for v in arm} for arm in optimizer.arms] == expected


def test_weights_with_the_same_name_in_a_layer_are_one_arm():
    class Experts(keras.layers.Layer):
        def build(self, input_shape):
            shape = (input_shape[-1], 2)
            self.experts = [self.add_weight(shape=shape, name="e") for _ in range(4)]

        def call(self, x):
            return sum(ops.matmul(x, expert) for expert in self.experts)

    model = keras.Sequential([keras.Input((3,)), Experts(), keras.layers.Dense(1)])
    optimizer = keras_slsam.SLSAM("sgd", arms="layer")
    optimizer.build(model.trainable_variables)
    assert [len(arm) for arm in optimizer.arms] == [4, 2]


def test_two_towers_with_different_weights_in_layers_with_the_same_name():
    def tower(use_bias):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, name="first", use_bias=use_bias)(inputs)
        return keras.Model(inputs, keras.layers.Dense(4, name="second")(x))

    inputs = keras.Input((4,))
    model = keras.Model(inputs, tower(False)(inputs) + tower(True)(inputs))
    optimizer = keras_slsam.SLSAM("sgd", arms="layer")
    optimizer.build(model.trainable_variables)
    assert [len(arm) for arm in optimizer.arms] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (keras_slsam.SAM, "sam"),
        (keras_slsam.S2SAM, "s2sam"),
        (keras_slsam.SLSAM, "slsam"),
        (keras_slsam.RST, "rst"),
    ],
)
def test_names(make, name):
    assert make("sgd").name == make("sgd").get_config()["name"] == name
    assert make("sgd", name="mine").name == "mine"


class Alternating(samplers.Sampler):
    """Draws all arms in even updates and one arm in odd ones, by the step count."""

    def build(self, num_arms):
        self._num_arms = num_arms

    def draw(self):
        even = self.optimizer.iterations % 2 == 0
        return ops.logical_or(even, ops.arange(self._num_arms) == 0)


def test_a_sampler_can_read_the_step_count():
    sampler = Alternating()
    base = optimizers.SGD(gradient_accumulation_steps=2)
    sampler.optimizer = keras_slsam.SLSAM(base, sampler=sampler)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)]
    )
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=sampler.optimizer, loss="mse")
    counts = []
    for _ in range(8):
        model.train_on_batch(np.ones((2, 3)), np.ones((2, 1)))
        counts.append(int(ops.sum(ops.cast(sampler.optimizer.active, "int32"))))
    assert counts == [4, 4, 1, 1, 4, 4, 1, 1]


METHODS = {
    "sam": keras_slsam.SAM,
    "s2sam": keras_slsam.S2SAM,
    "rst": lambda base, **kwargs: keras_slsam.RST(base, seed=0, **kwargs),
    "slsam": lambda base, **kwargs: keras_slsam.SLSAM(base, sampler="all", **kwargs),
    "every arm": lambda base, **kwargs: keras_slsam.SLSAM(
        base, sampler=Replay([[1] * 4]), **kwargs
    ),
    "bandit": lambda base, **kwargs: keras_slsam.SLSAM(
        base, active_fraction=0.5, seed=0, **kwargs
    ),
    "sl+s2": lambda base, **kwargs: keras_slsam.SLSAM(
        base, active_fraction=0.5, seed=0, single_step=True, **kwargs
    ),
}
RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(6, 3)).astype("float32"), RNG.normal(size=(6, 2))


def curved_model(optimizer, sharpness_aware=True, **kwargs):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    if sharpness_aware:
        model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss="mse", **kwargs)
    return model


def steps(model, count=3):
    for _ in range(count):
        model.train_on_batch(X, Y)
    return model.get_weights()


# XLA may round two programs differently, but not two operations.
EXACT = (True, False) if keras.config.backend() == "jax" else (True,)


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize(
    ("base", "methods"),
    [("adamw", ("sam", "every arm", "part")), ("momentum", ("s2sam", "rst", "ascent"))],
)
def test_rho_of_zero_equals_the_base_optimizer(base, methods, exact):
    eagerly = {"run_eagerly": exact and keras.config.backend() == "jax"}
    plain = steps(curved_model(BASES[base](), sharpness_aware=False, **eagerly))
    more = {
        "part": functools.partial(keras_slsam.SAM, ascent_fraction=0.5),
        "ascent": functools.partial(
            keras_slsam.SAM, ascent=keras_slsam.ascents.LastApplied()
        ),
    }
    for method in methods:
        make = {**METHODS, **more}[method]
        weights = steps(curved_model(make(BASES[base](), rho=0), **eagerly))
        for weight, expected in zip(weights, plain):
            # On TensorFlow, gradients of other models may be added in another order.
            if exact:
                np.testing.assert_array_equal(weight, expected)
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-7)


def test_a_conditional_second_pass_works_for_losses_with_prefix_names():
    """Some names in the gradient graph of this loss are prefixes of other names."""

    def trained(optimizer, **kwargs):
        layers = [keras.Input((3,)), keras.layers.Dense(1, activation="sigmoid")]
        model = keras.Sequential(layers)
        model.set_weights([np.ones((3, 1)), np.zeros(1)])
        keras_slsam.sharpness_aware(model)
        model.compile(optimizer, "binary_crossentropy", jit_compile=False, **kwargs)
        x = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
        model.train_on_batch(x, np.arange(8.0)[:, None] % 2)
        return model.get_weights()

    expected = trained(keras.optimizers.SGD(0.1), **EAGER)
    for one, two in zip(trained(keras_slsam.SAM(BASES["sgd"](), rho=0)), expected):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["s2sam", "rst", "every arm"])
def test_rho_can_be_set_between_steps(method):
    """Each step equals that of an optimizer that was created with the value."""
    model = curved_model(METHODS[method](BASES["momentum"](), rho=0.0))
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    assert any(v is optimizer.rho for v in optimizer.variables)
    for rho in (0.0, 0.5):
        optimizer.rho = rho
        assert float(optimizer.rho) == np.float32(rho)
        assert optimizer.get_config()["rho"] == rho
        again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert float(again.rho) == np.float32(rho)
        before = [ops.convert_to_numpy(v) for v in optimizer.variables]
        other = curved_model(METHODS[method](BASES["momentum"](), rho=rho), **EAGER)
        other.optimizer.build(other.trainable_variables)
        other.set_weights(model.get_weights())
        for variable, value in zip(other.optimizer.variables, before):
            variable.assign(value)
        for one, two in zip(steps(model, 2), steps(other, 2)):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_a_loaded_rho_takes_effect():
    model = curved_model(keras_slsam.SAM(BASES["sgd"](), rho=0.0), **EAGER)
    other = curved_model(keras_slsam.SAM(BASES["sgd"](), rho=0.3))
    steps(other, 1)
    other.set_weights(model.get_weights())
    other.optimizer.rho.assign(0.0)  # as when a file is loaded
    for one, two in zip(steps(model), steps(other)):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "accumulates"),
    [
        *((method, False) for method in ("sam", "s2sam", "rst", "bandit")),
        *((method, True) for method in ("sam", "s2sam", "bandit", "sl+s2")),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(method, accumulates):
    base = optimizers.Adam(
        0.1,
        clipvalue=0.5,
        weight_decay=0.1,
        use_ema=True,
        gradient_accumulation_steps=2 if accumulates else None,
    )
    model = curved_model(METHODS[method](base, rho=0.1))
    optimizer = model.optimizer
    steps(model, 3)
    kept = [
        v
        for v in model.weights + optimizer.variables
        if not any(word in v.path for word in ("seed", "active", "skipped", "variable"))
    ]
    before = [ops.convert_to_numpy(v).copy() for v in kept]
    for skipped, bad in enumerate((np.inf, np.nan), 1):
        spoiled = X.copy()
        spoiled[0, 0] = bad
        loss = model.train_on_batch(spoiled, Y)
        assert np.isfinite(loss) == np.isfinite(np.tanh(bad))  # reported unchanged
        for old, variable in zip(before, kept):
            new = ops.convert_to_numpy(variable)
            np.testing.assert_array_equal(old, new, err_msg=variable.path)
        assert int(optimizer.skipped_steps) == skipped
    weights = steps(model, 4)
    assert all(np.isfinite(weight).all() for weight in weights)
    assert any((a != b).any() for a, b in zip(before, weights))
    assert int(optimizer.skipped_steps) == 2


class Overrides(optimizers.SGD):
    """Centralises the gradients, and halves them in what Keras' own step calls."""

    def apply(self, grads, trainable_variables=None):
        grads = [g - ops.mean(g) for g in grads]
        super().apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(g * 0.5, v) for g, v in grads_and_vars])

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        grads = [g * 0.5 for g in grads]
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)


class Wrapper(optimizers.Optimizer):
    def __init__(self, inner):
        super().__init__(learning_rate=0.1)
        self.inner = inner

    def apply(self, grads, trainable_variables=None):
        self.inner.apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        pass


def set_on_it():
    base = optimizers.SGD()
    base.apply_gradients = lambda grads_and_vars: None
    return base


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Overrides, "apply"),
        (lambda: Wrapper(optimizers.SGD()), "apply"),
        (set_on_it, "apply_gradients"),
    ],
)
def test_an_override_that_would_be_ignored_is_refused(make, name):
    with pytest.raises(ValueError, match=rf"overrides `{name}`.*update_step.*`SAM`"):
        keras_slsam.SLSAM(make())


def test_dense_methods_call_the_methods_that_keras_calls():
    plain = steps(curved_model(Overrides(0.1), sharpness_aware=False, **EAGER))
    for make in (keras_slsam.SAM, keras_slsam.RST):
        weights = steps(curved_model(make(Overrides(0.1), rho=0)))
        for weight, expected in zip(weights, plain):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


class Signed(optimizers.SGD):
    """Has a custom `update_step`, which records the type of its variable."""

    seen = None

    def update_step(self, gradient, variable, learning_rate):
        type(self).seen = type(variable)
        super().update_step(ops.sign(gradient), variable, learning_rate)


def test_a_custom_update_step_is_called():
    plain = steps(curved_model(Signed(0.01), sharpness_aware=False, **EAGER))
    expected_type = Signed.seen
    for method in ("slsam", "every arm"):
        Signed.seen = None
        weights = steps(curved_model(METHODS[method](Signed(0.01), rho=0)))
        for weight, expected in zip(weights, plain):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
        assert Signed.seen is expected_type


@pytest.mark.parametrize("method", ["sam", "every arm"])
def test_metrics_read_the_learning_rate_after_the_step(method):
    schedule = optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    optimizer = METHODS[method](optimizers.SGD(schedule))

    def rate(y, y_pred):
        return ops.zeros(ops.shape(y)[:1]) + optimizer.learning_rate

    model = curved_model(optimizer, metrics=[rate])
    for step in range(3):
        model.reset_metrics()
        logs = model.train_on_batch(X, Y, return_dict=True)
        # As with Keras' own step on TensorFlow and PyTorch.
        np.testing.assert_allclose(logs["rate"], 0.1 * 0.5 ** (step + 1), rtol=1e-5)
    assert int(optimizer.iterations) == 3


def test_nadam_counts_each_window_once():
    """All arms are active, and each window is one update of Nadam."""

    def base():
        return optimizers.Nadam(0.1, gradient_accumulation_steps=2)

    expected = train(inner_model(base(), sharpness_aware=False, **EAGER))[-1]
    found = train(inner_model(keras_slsam.S2SAM(base(), rho=0.0)))[-1]
    for one, two in zip(found, expected):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_constraints_apply_after_averages_and_in_each_step():
    def trained(wrap, **kwargs):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(2, kernel_constraint="unit_norm")
        model = keras.Sequential([keras.Input((3,)), dense, keras.layers.Dense(1)])
        model = keras_slsam.sharpness_aware(model)
        base = optimizers.Adam(0.1, use_ema=True, gradient_accumulation_steps=3)
        model.compile(wrap(base), "mse", **kwargs)
        x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
        model.fit(x, x[:, :1], batch_size=4, shuffle=False, verbose=0)
        return model.get_weights()

    sparse = {"rho": 0.0, "sampler": "uniform", "active_fraction": 1.0}
    for found, expected in zip(
        trained(lambda base: keras_slsam.SLSAM(base, **sparse)),
        trained(lambda base: base, **EAGER),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_from_config_does_not_change_the_config():
    schedule = optimizers.schedules.CosineDecay(0.1, 10)
    config = keras_slsam.SAM(optimizers.AdamW(schedule)).get_config()
    before = repr(config)
    keras_slsam.SAM.from_config(config)
    assert repr(config) == before
