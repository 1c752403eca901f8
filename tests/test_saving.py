"""All state is in the optimizer's variables, so a saved run resumes exactly."""

import copy
import functools
import pickle
import warnings

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
        keras.optimizers.SGD(0.1, momentum=0.9),
        sampler=Replay(np.random.default_rng(0).random((9, 6)) < 0.6),
    ),
    "rst": lambda: keras_slsam.RST(
        keras.optimizers.SGD(0.1, momentum=0.9), probability=0.5, adaptive=True
    ),
}
BACKEND = keras.config.backend()
# Not traced: SAM has no state of its own, and S2-SAM has that of SL+S2.
COVERED = set() if BACKEND == "torch" else {"sam", "s2sam"}
RESUMED = [name for name in OPTIMIZERS if name not in COVERED]
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 5)).astype("float32"), RNG.integers(0, 3, 8)


def make_model(optimizer, layers=3):
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
    # A saved model does not contain the variables of metrics.
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


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_exactly_from_files_and_from_its_variables(name, tmp_path):
    """Every state that a step changes is a variable, and is in both kinds of files."""
    model = train(make_model(OPTIMIZERS[name]()), 4)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras_slsam.sharpness_aware(
        keras.saving.load_model(tmp_path / "model.keras")
    )
    assert type(loaded) is type(model)
    assert_same_state(model, loaded)
    variables = model.weights + model.optimizer.variables
    start = [ops.convert_to_numpy(v).copy() for v in variables]
    assert_same_state(train(model, 4), train(loaded, 4))
    end = [ops.convert_to_numpy(v).copy() for v in variables]
    assert any((a != b).any() for a, b in zip(start, end))
    for variable, value in zip(variables, start):
        variable.assign(value)
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert_same_state(model, loaded)
    assert_same_state(train(model, 4), train(loaded, 4))
    for variable, value in zip(variables, end):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


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


@functools.cache
def trained(name):
    """Returns a model after three steps. Tests must not change it."""
    model = make_model(OPTIMIZERS[name]())
    model.run_eagerly = BACKEND == "tensorflow"  # compiling would take longer
    return train(model, 3)


def built(name):
    model = make_model(OPTIMIZERS[name]())
    model.optimizer.build(model.trainable_variables)
    return model


def by_weights(model, name, path):
    model.save_weights(path / "model.weights.h5")
    other = built(name)
    other.load_weights(path / "model.weights.h5")
    return other


def by_shards(model, name, path):
    model.save_weights(path / "model.weights.json", max_shard_size=1e-6)
    assert len(list(path.glob("*.h5"))) > 1
    other = built(name)
    other.load_weights(path / "model.weights.json")
    return other


def by_weights_before_build(model, name, path):
    model.save_weights(path / "model.weights.h5")
    other = make_model(OPTIMIZERS[name]())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping variable loading")
        other.load_weights(path / "model.weights.h5")
    other.optimizer.build(other.trainable_variables)
    return other


def by_whole_h5(model, name, path):
    # A copy, because saving in this format changes the compiled optimizer of the model.
    copy.deepcopy(model).save(path / "model.h5")
    other = keras.saving.load_model(path / "model.h5")
    other.optimizer.build(other.trainable_variables)
    return other


def by_values(model, name, path):
    other = built(name)
    other.set_weights(model.get_weights())
    values = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
    other.optimizer.set_weights(values)
    return other


def by_own_variables(model, name, path):
    other, store = built(name), {}
    other.set_weights(model.get_weights())
    model.optimizer.save_own_variables(store)
    other.optimizer.load_own_variables(store)
    return other


def by_pickle(model, name, path):
    return pickle.loads(pickle.dumps(model))


def by_pickled_optimizer(model, name, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping variable loading")
        optimizer = pickle.loads(pickle.dumps(copy.deepcopy(model.optimizer)))
    other = make_model(optimizer)
    other.set_weights(model.get_weights())
    optimizer.build(other.trainable_variables)
    return other


def by_tensorflow_checkpoint(model, name, path):
    import tensorflow as tf

    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    saved = checkpoint.save(path / "checkpoint")
    other = make_model(OPTIMIZERS[name]())
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    status = checkpoint.restore(saved)
    other.optimizer.build(other.trainable_variables)
    status.assert_consumed()
    return other


# The other ways do not depend on the backend, and are slow on TensorFlow and JAX.
MOST_STATE = OPTIMIZERS if BACKEND == "torch" else ["bandit", "sl+s2"]
OTHER_WAYS = [
    by_shards,
    by_weights_before_build,
    by_whole_h5,
    by_own_variables,
    by_pickle,
    by_pickled_optimizer,
]
BASIC_WAYS = [by_weights, by_values]
if BACKEND == "tensorflow":
    BASIC_WAYS.append(by_tensorflow_checkpoint)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *((way, name) for way in BASIC_WAYS for name in OPTIMIZERS),
        *((way, name) for way in OTHER_WAYS for name in MOST_STATE),
    ],
)
def test_all_state_is_restored(way, name, tmp_path):
    model = trained(name)
    before = [value.copy() for value in state(model)]
    assert_same_state(model, way(model, name, tmp_path))
    for one, two in zip(before, state(model)):
        np.testing.assert_array_equal(one, two)


def named_model():
    """Returns a model with names, because `set_state_tree` identifies paths."""
    base = keras.optimizers.Adam(0.01, name="base")
    optimizer = keras_slsam.SLSAM(base, sampler="proportional", single_step=True)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(3, name="head")], name="model"
    )
    model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy",
        run_eagerly=BACKEND == "tensorflow",
    )
    optimizer.build(model.trainable_variables)
    return model


def test_all_state_is_restored_from_a_state_tree():
    model, other = train(named_model(), 3), named_model()
    other.set_state_tree(model.get_state_tree("numpy_array"))
    assert_same_state(model, other)


@pytest.mark.skipif(
    not hasattr(keras.callbacks, "OrbaxCheckpoint"), reason="newer than Keras 3.12"
)
def test_all_state_is_restored_by_orbax(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    folder = str(tmp_path / "orbax")
    saver = keras.callbacks.OrbaxCheckpoint(folder, save_on_background=False)
    model, other = named_model(), named_model()
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[saver])
    other.load_weights(folder)
    assert_same_state(model, other)


def test_a_state_dict_of_torch_holds_the_weights():
    if BACKEND != "torch":
        pytest.skip("for the PyTorch backend")
    model, other = named_model(), named_model()
    assert len(model.state_dict()) == len(keras.models.clone_model(model).state_dict())
    other.load_state_dict(model.state_dict())
    for one, two in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(one, two)


def test_a_run_resumes_from_an_h5_file(tmp_path):
    model = copy.deepcopy(trained("sam"))
    model.save(tmp_path / "model.h5")
    other = keras.saving.load_model(tmp_path / "model.h5")
    for each in (model, other):
        keras_slsam.sharpness_aware(each).run_eagerly = True
        train(each, 1)
    assert_same_state(model, other)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, keras.models.clone_model])
def test_a_copy_trains_only_itself(copier):
    model = trained("sam")
    before = [value.copy() for value in state(model)]
    other = copier(model)
    with pytest.raises(ValueError, match=r"keras_slsam.sharpness_aware\(model\)"):
        other.train_on_batch(X, Y)
    other = keras_slsam.sharpness_aware(other)
    other.run_eagerly = True
    kernel = other.get_weights()[0]
    train(other, 1)
    assert (other.get_weights()[0] != kernel).any()
    for one, two in zip(before, state(model)):
        np.testing.assert_array_equal(one, two)


def slsam(base="adam", **kwargs):
    return keras_slsam.SLSAM(
        base, **{"active_fraction": 0.5, "arms": "layer", **kwargs}
    )


UNLIKE = {
    "arms=.0, 0, 1, 1, 2, 2., not .0, 1, 2": lambda: slsam(arms="variable"),
    "arms=.0, 0, 1, 1, 2, 2., not .0, 1, 1, 1, 1, 2": lambda: slsam(
        arms=lambda variable: variable.shape[0]
    ),
    "sampler='Bandit', not 'Uniform'": lambda: slsam(sampler="uniform"),
    "sampler='Bandit', not 'Proportional'": lambda: slsam(sampler="proportional"),
    "ascent='Ascent', not 'LastApplied'": lambda: slsam(single_step=True),
    "base_optimizer='Adam', not 'RMSprop'": lambda: slsam("rmsprop"),
    "method='SLSAM', not 'SAM'": lambda: keras_slsam.SAM("adam"),
    "method='SLSAM', not 'RST'": lambda: keras_slsam.RST("adam"),
}


@pytest.mark.parametrize("when", ["built", "not built"])
@pytest.mark.parametrize("message", UNLIKE)
def test_state_of_a_different_optimizer_is_refused(message, when, tmp_path):
    model = make_model(slsam())
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make_model(UNLIKE[message]())
    if when == "built":
        other.optimizer.build(other.trainable_variables)
    before = [value.copy() for value in state(other)[len(other.variables) :]]
    with pytest.raises(ValueError, match=message):
        other.load_weights(tmp_path / "model.weights.h5")
        other.optimizer.build(other.trainable_variables)
    if when == "built":
        for one, two in zip(before, state(other)[len(other.variables) :]):
            np.testing.assert_array_equal(one, two)
        with pytest.warns(UserWarning, match=message):
            other.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)


def test_state_of_other_trainable_weights_is_refused(tmp_path):
    model, other = make_model(slsam()), make_model(slsam())
    other.layers[0].trainable = False
    for each in (model, other):
        each.optimizer.build(each.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="0, 0, 1, 1, 2, 2., not .0, 0, 1, 1"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_state_of_a_keras_optimizer_is_not_loaded(tmp_path):
    make = {"adam": lambda: "adam", "ours": lambda: keras_slsam.SAM("adam")}
    model = make_model(make["adam"]())
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = make_model(make["ours"]())
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        fresh.load_weights(tmp_path / "model.weights.h5")  # to start new training
    fresh.optimizer.build(fresh.trainable_variables)
    assert int(fresh.optimizer.iterations) == 0
    message = "was not saved by it.*mixed_float16.*skip_mismatch.*compile=False"
    with pytest.raises(ValueError, match=message):
        fresh.load_weights(tmp_path / "model.weights.h5")


def test_values_that_do_not_fit_are_refused():
    optimizer = built("bandit").optimizer
    values = [ops.convert_to_numpy(v) + 1 for v in optimizer.variables]
    for wrong in (values[:-1], [*values, values[0]], values[::-1]):
        with pytest.raises(ValueError, match=r"is \d+ values.*Received: \d+ values"):
            optimizer.set_weights(wrong)
    assert int(optimizer.iterations) == 0


def test_a_sampler_that_makes_variables_after_build_is_refused():
    class Late(samplers.Uniform):
        def draw(self):
            if not hasattr(self, "late"):
                self.late = keras.Variable(0, dtype="int32", trainable=False)
            return super().draw()

    model = make_model(keras_slsam.SLSAM("sgd", sampler=Late(0.5)))
    with pytest.raises(ValueError, match="create a variable.*stateless scope"):
        train(model, 2)


def by_name(variable):
    return variable.path.rpartition("/")[2]


def test_a_function_is_saved_by_name(tmp_path):
    """As in Keras for a loss function: register it, or name it when loading."""
    model = make_model(keras_slsam.SLSAM("sgd", arms=by_name))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="`arms`.*by_name.*register.*custom_objects"):
        keras.saving.load_model(tmp_path / "model.keras")
    other = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"by_name": by_name}
    )
    assert_same_state(model, other)


def test_a_sampler_is_saved_by_name():
    class Mine(samplers.Uniform):
        pass

    config = keras_slsam.SLSAM("sgd", sampler=Mine(0.5)).get_config()
    with pytest.raises(ValueError, match="`sampler`.*Mine.*custom_objects"):
        keras_slsam.SLSAM.from_config(config)
    again = keras_slsam.SLSAM.from_config(config, custom_objects={"Mine": Mine})
    assert type(again.sampler) is Mine


def test_a_lambda_loads_only_with_safe_mode_off(tmp_path):
    model = make_model(keras_slsam.SLSAM("sgd", arms=lambda v: v.path[-4:]))
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="lambda"):
        model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="lambda.*safe_mode=False"):
        keras.saving.load_model(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert len(other.optimizer.arms) == 2


# Keras does not save a variable of Nadam, even without our optimizer around it.
@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - {"sl+s2"}))
def test_a_loss_scale_optimizer_saves_all_state(kind):
    model = built(kind)
    scaled = keras.optimizers.LossScaleOptimizer(OPTIMIZERS[kind]())
    scaled.build(model.trainable_variables)
    shapes = [v.shape for v in model.optimizer.variables]
    assert [v.shape for v in scaled.inner_optimizer.variables] == shapes
    assert [v.shape for v in scaled.variables][-len(shapes) :] == shapes


def test_state_that_does_not_fit_is_refused_in_every_step():
    model = make_model(keras_slsam.SAM("sgd"))
    model.optimizer.set_weights([np.zeros(3)] * 4)
    for _ in range(2):
        with pytest.raises(ValueError):
            model.train_on_batch(X, Y)
