"""The base optimizer's step: on active variables only, as if they were alone."""

import keras
import numpy as np
import pytest
from keras import ops
from replay import Replay

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
    """Inner product of the input and all weights: gradients do not hang on them."""

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


def inner_model(optimizer, **kwargs):
    model = keras.Sequential([keras.Input((sum(SIZES),)), Inner(**kwargs)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss=mean_output)
    return model


def train(model):
    """Weights after each step."""
    history = []
    for batch in batches():
        model.train_on_batch(batch, np.zeros((2, 1)))
        history.append(model.get_weights())
    return history


def alone(make_base, learning_rate=None):
    """Weights of variables that each have an optimizer of their own."""
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
    # Newer Keras has more of them.
    if all(hasattr(optimizers, n) for n in base.__code__.co_names if n[0].isupper())
}


@pytest.mark.parametrize("name", BASES)
def test_inactive_variables_step_as_if_alone(name):
    try:
        expected = alone(BASES[name])
    except AttributeError:  # Keras 3.12's own, on TensorFlow
        assert name == "muon"
        pytest.skip("Muon reads a path that TensorFlow's variables do not have")
    optimizer = keras_slsam.SLSAM(BASES[name](), sampler=Replay(MASKS))
    history = train(inner_model(optimizer))
    assert_same(history, expected)
    before = STARTS
    for mask, weights in zip(MASKS, history):
        for on, old, new in zip(mask, before, weights):
            assert on or np.array_equal(old, new)
        before = weights
    assert int(optimizer.iterations) == len(MASKS)


@pytest.mark.parametrize("name", ["momentum", "adamw", "nadam", "ftrl"])
def test_all_active_is_the_base_optimizer(name):
    # The gradient does not hang on the weights, so no method changes it.
    plain = keras.Sequential([keras.Input((sum(SIZES),)), Inner()])
    plain.compile(optimizer=BASES[name](), loss=mean_output)
    expected = train(plain)
    for wrapped in (
        keras_slsam.SAM(BASES[name]()),
        keras_slsam.S2SAM(BASES[name]()),
        keras_slsam.RST(BASES[name](), seed=0),
        keras_slsam.SLSAM(BASES[name](), sampler="all"),
        keras_slsam.SLSAM(BASES[name](), active_fraction=1.0, sampler="uniform"),
    ):
        assert_same(train(inner_model(wrapped)), expected)


def test_moments_of_inactive_variables_keep_every_bit():
    optimizer = keras_slsam.SLSAM(BASES["adamw"](), sampler=Replay(MASKS))
    model = inner_model(optimizer)
    optimizer.build(model.trainable_variables)

    def slots(i):
        return [
            ops.convert_to_numpy(v)
            for v in optimizer.base_optimizer.variables
            if f"part_{i}" in v.path
        ]

    assert len(slots(0)) == 2
    for mask, batch in zip(MASKS, batches()):
        before = [slots(i) for i in range(3)]
        model.train_on_batch(batch, np.zeros((2, 1)))
        for i, on in enumerate(mask):
            same = [np.array_equal(a, b) for a, b in zip(before[i], slots(i))]
            assert not any(same) if on else all(same)


def test_schedules_follow_the_global_steps():
    schedule = optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    optimizer = keras_slsam.SLSAM(
        optimizers.AdamW(schedule, weight_decay=0.1), sampler=Replay(MASKS)
    )
    history = train(inner_model(optimizer))
    expected = alone(
        lambda: optimizers.AdamW(0.1, weight_decay=0.1),
        learning_rate=lambda step: 0.1 * 0.5 ** (step / 2),
    )
    assert_same(history, expected)
    np.testing.assert_allclose(
        float(optimizer.learning_rate), 0.1 * 0.5 ** (len(MASKS) / 2), rtol=1e-5
    )
    assert optimizer.base_optimizer.get_config()["learning_rate"]["class_name"] == (
        "ExponentialDecay"
    )


def test_learning_rate_can_be_set():
    optimizer = keras_slsam.SLSAM("sgd", sampler=Replay(MASKS))
    optimizer.learning_rate = 0.0
    history = train(inner_model(optimizer))
    assert_same(history, [STARTS] * len(MASKS))


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_is_over_the_active_variables(clip):
    optimizer = keras_slsam.SLSAM(
        optimizers.SGD(1.0, **{clip: 0.2}), sampler=Replay(MASKS)
    )
    history = train(inner_model(optimizer))
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


@pytest.mark.parametrize("excluded", [["part_0"], ["part_0", "part_1", "part_2"]])
def test_weight_decay_can_be_excluded(excluded):
    base = optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer = keras_slsam.SLSAM(base, sampler=Replay(MASKS))
    optimizer.exclude_from_weight_decay(var_names=excluded)
    history = train(inner_model(optimizer))
    decayed = alone(lambda: optimizers.AdamW(0.1, weight_decay=0.5))
    plain = alone(lambda: optimizers.Adam(0.1))
    expected = [
        [(p if f"part_{i}" in excluded else d)[i] for i in range(3)]
        for d, p in zip(decayed, plain)
    ]
    assert_same(history, expected)


@pytest.mark.parametrize("frequency", [None, 3])
def test_moving_average_is_of_the_whole_model_each_step(frequency):
    base = optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=frequency
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
        if frequency and (step + 1) % frequency == 0:
            weights = list(average)
        for weight, expected in zip(got, weights):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for weight, expected in zip(model.get_weights(), average):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_constraints_hold_for_active_variables():
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(2, kernel_constraint="non_neg", use_bias=False)
    model = keras_slsam.sharpness_aware(keras.Model(inputs, dense(inputs)))
    optimizer = keras_slsam.SLSAM(optimizers.SGD(1.0), sampler=Replay([[1]]))
    model.compile(optimizer=optimizer, loss=mean_output)
    model.train_on_batch(np.ones((2, 3)), np.zeros((2, 1)))
    assert (model.get_weights()[0] >= 0).all()


def test_gradient_accumulation_of_the_base_optimizer():
    base = optimizers.SGD(0.1, gradient_accumulation_steps=2)
    history = train(inner_model(keras_slsam.SAM(base)))
    weights = [start.astype("float64") for start in STARTS]
    data = [gradients_of(batch) for batch in batches()]
    for step, got in enumerate(history):
        if step % 2:
            for i in range(3):
                weights[i] = weights[i] - 0.05 * (data[step - 1][i] + data[step][i])
        for weight, expected in zip(got, weights):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_keras_parts_that_have_no_public_name():
    """Fails where Keras moves what `BaseStep`, the loss and the step use."""
    base = optimizers.Nadam()
    for name in (
        "_clip_gradients",
        "_use_weight_decay",
        "_apply_weight_decay",
        "_update_model_variables_moving_average",
        "_overwrite_model_variables_with_average_value",
        "_learning_rate",
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


def test_blocks_of_a_subclassed_model_are_not_the_model():
    import zoo

    model, *_ = zoo.build("subclassed")
    optimizer = keras_slsam.SLSAM("sgd", arms="block")
    optimizer.build(model.trainable_variables)
    assert len(optimizer.arms) == 3


class Tower(keras.Model):
    """A model with a weight of its own."""

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


def test_a_weight_of_the_model_is_a_block_of_its_own():
    model = Tower()
    model(np.ones((2, 4)))
    optimizer = keras_slsam.SLSAM("sgd", arms="block")
    optimizer.build(model.trainable_variables)
    assert sorted(len(arm) for arm in optimizer.arms) == [1, 2, 2, 2]


@pytest.mark.parametrize("arms", ["layer", "block"])
def test_layers_of_the_same_name_in_two_models_are_two_arms(arms):
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


def test_weights_of_one_name_in_a_layer_are_one_arm():
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


def test_towers_with_other_weights_in_layers_of_the_same_name():
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
    """All arms in even updates and one arm in odd ones, by the optimizer's count."""

    def build(self, num_arms):
        self._num_arms = num_arms

    def draw(self):
        even = self.optimizer.iterations % 2 == 0
        return ops.logical_or(even, ops.arange(self._num_arms) == 0)


def test_a_sampler_reads_the_count_of_steps():
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
