"""All state is in the optimizer's variables: a saved run goes on exactly."""

import keras
import numpy as np
import pytest
from keras import ops
from replay import Replay

import keras_slsam
from keras_slsam import samplers

OPTIMIZERS = {
    "sam": lambda: keras_slsam.SAM("adamw", adaptive=True),
    "s2sam": lambda: keras_slsam.S2SAM(keras.optimizers.SGD(0.1, momentum=0.9)),
    "bandit": lambda: keras_slsam.SLSAM("adamw", active_fraction=0.4, seed=3),
    "proportional": lambda: keras_slsam.SLSAM(
        "adam", active_fraction=0.4, sampler="proportional", arms="layer"
    ),
    "sl+s2": lambda: keras_slsam.SLSAM(
        keras.optimizers.Nadam(keras.optimizers.schedules.CosineDecay(0.01, 50)),
        sampler=samplers.Bandit(0.4, learning_rate=0.1, seed=1),
        single_step=True,
    ),
    "replay": lambda: keras_slsam.SLSAM(
        "adam", sampler=Replay(np.random.default_rng(0).random((9, 6)) < 0.6)
    ),
    "rst": lambda: keras_slsam.RST("adamw", probability=0.5),
}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 5)).astype("float32"), RNG.integers(0, 3, 8)


def make_model(optimizer):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    model = keras_slsam.sharpness_aware(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def train(model, steps):
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model


def state(model):
    return [
        ops.convert_to_numpy(v) for v in model.variables + model.optimizer.variables
    ]


def assert_same_state(model, other):
    # A metric's variables are not part of a saved model.
    for one, two in zip(model.weights, other.weights):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(one), ops.convert_to_numpy(two)
        )
    assert len(model.optimizer.variables) == len(other.optimizer.variables)
    for one, two in zip(model.optimizer.variables, other.optimizer.variables):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(one), ops.convert_to_numpy(two), err_msg=one.path
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_config_round_trip(name):
    optimizer = OPTIMIZERS[name]()
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()
    assert keras.optimizers.get(config).get_config() == optimizer.get_config()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keras_file_resumes_exactly(name, tmp_path):
    model = train(make_model(OPTIMIZERS[name]()), 4)
    model.save(tmp_path / "model.keras")
    loaded = keras_slsam.sharpness_aware(
        keras.saving.load_model(tmp_path / "model.keras")
    )
    assert type(loaded) is type(model)
    assert_same_state(model, loaded)
    assert_same_state(train(model, 4), train(loaded, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_file_resumes_exactly(name, tmp_path):
    model = train(make_model(OPTIMIZERS[name]()), 4)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make_model(OPTIMIZERS[name]())
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_state(model, other)
    assert_same_state(train(model, 4), train(other, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_that_a_step_changes_is_a_variable(name):
    """Putting all variables back repeats the step exactly."""
    model = train(make_model(OPTIMIZERS[name]()), 3)
    variables = model.weights + model.optimizer.variables
    before = [ops.convert_to_numpy(v).copy() for v in variables]
    after = [ops.convert_to_numpy(v).copy() for v in train(model, 2) and variables]
    assert any((a != b).any() for a, b in zip(after, before))
    for variable, value in zip(variables, before):
        variable.assign(value)
    again = [ops.convert_to_numpy(v) for v in train(model, 2) and variables]
    for one, two in zip(after, again):
        np.testing.assert_array_equal(one, two)


def test_arms_by_a_registered_function_survive():
    @keras.saving.register_keras_serializable("tests")
    def by_kind(variable):
        return variable.path.rpartition("/")[2]

    optimizer = keras_slsam.SLSAM("sgd", arms=by_kind)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    model = make_model(again)
    again.build(model.trainable_variables)
    assert [len(arm) for arm in again.arms] == [3, 3]


def test_a_cloned_and_a_saved_model_are_plain_keras(tmp_path):
    model = make_model("sgd")
    clone = keras.models.clone_model(model)
    assert "train_step" not in vars(clone)
    model.save(tmp_path / "model.keras")
    assert "train_step" not in vars(keras.saving.load_model(tmp_path / "model.keras"))
