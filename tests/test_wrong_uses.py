"""Wrong uses of a model: each is refused, and the model can still be trained."""

import pathlib

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_slsam
from keras_slsam import samplers

BACKEND = keras.config.backend()
X, Y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")


@pytest.fixture(scope="module", autouse=True)
def fixed_seed():
    """In place of that in conftest.py. A new seed clears TensorFlow's caches."""
    keras.utils.set_random_seed(0)


def compiled(optimizer=None, units=2):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(units), layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    if optimizer is None:
        optimizer = keras_slsam.SLSAM("adam", active_fraction=0.5, seed=0)
    model.compile(optimizer=optimizer, loss="mse")
    return model


def make_model(optimizer=None):
    model = compiled(optimizer)
    model.train_on_batch(X, Y)
    return model


def built(*args, **kwargs):
    model = compiled(*args, **kwargs)
    model.optimizer.build(model.trainable_variables)
    return model


def step(model, *data, optimizer=None):
    return keras_slsam.step(model, optimizer or model.optimizer, data)


def fit(model, x=X, y=Y, **kwargs):
    return model.fit(x, y, verbose=0, **kwargs)


def set_in_callback(model, **attributes):
    """Sets attributes of the optimizer at the end of the first batch."""

    def change(batch, logs):
        for name, value in attributes.items():
            setattr(model.optimizer, name, value)

    fit(model, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=change)])


def saved(folder, optimizer=None, **kwargs):
    """Saves the weights of another model, and returns the path."""
    path = folder / "other.weights.h5"
    built(optimizer, **kwargs).save_weights(path)
    return path


def truncated(model, folder, name):
    path = folder / name
    model.save_weights(path) if "weights" in name else model.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def foreign(folder, name):
    path = folder / name
    path.write_text("Once upon a time")
    return path


def config(model, **changes):
    """Returns the optimizer's config with entries changed, or removed if `None`."""
    found = {**model.optimizer.get_config(), **changes}
    return {key: value for key, value in found.items() if value is not None}


class Draws(samplers.Sampler):
    """Draws the given mask."""

    def __init__(self, mask):
        self.mask = mask

    def draw(self):
        return self.mask() if callable(self.mask) else ops.convert_to_tensor(self.mask)


class Learns(samplers.Uniform):
    def update(self, active, norms):
        raise ValueError("cannot learn")


class Knows(samplers.Uniform):
    def __init__(self, active_fraction):
        super().__init__(active_fraction, seed=0)
        self.min_probability = None


def train_with(sampler):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM("sgd", sampler=sampler)
    model.compile(optimizer=optimizer, loss="mse")
    model.train_on_batch(X, Y)


class Assigns(layers.Layer):
    """Assigns to its own weight when it is called."""

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        self.weight.assign(self.weight * 0.5)
        return x * self.weight


def train_layer(layer):
    model = keras.Sequential([keras.Input((3,)), layer, layers.Dense(1)])
    make = keras_slsam.sharpness_aware(model)
    make.compile(optimizer=keras_slsam.SAM("sgd"), loss="mse")
    make.train_on_batch(X, Y)


def without_step(optimizer):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse")
    model.train_on_batch(X, Y)


def own_step():
    class Own(keras.Model):
        def train_step(self, *args):
            return {}

    return Own()


def frozen(model):
    model.layers[0].trainable = False
    try:
        fit(model)
    finally:
        model.layers[0].trainable = True


def stored(model, without=None, replaced=None):
    """Returns the optimizer's state as Keras saves it, with a fault."""
    store = {}
    model.optimizer.save_own_variables(store)
    if without:
        del store[without]
    if replaced:
        store[replaced] = np.zeros((7, 7))
    return store


def values(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables]


SLSAM, ADAM = keras_slsam.SLSAM, keras.optimizers.Adam()
# From a name to a function of a model and a folder, and a part of the error message.
WRONG = {
    # Data.
    "features of another size": (lambda m, _: fit(m, X[:, :2]), "shape"),
    "features of another rank": (lambda m, _: fit(m, X[0]), "cardinality"),
    "fewer labels": (lambda m, _: fit(m, y=Y[:2]), "cardinality"),
    "fewer sample weights": (
        lambda m, _: fit(m, sample_weight=np.ones(3)),
        "cardinality",
    ),
    "class weights and sample weights": (
        lambda m, _: fit(m, class_weight={0: 1.0}, sample_weight=np.ones(4)),
        "class_weight",
    ),
    "text": (lambda m, _: fit(m, np.array([["a"] * 3] * 4)), "."),
    "no data": (lambda m, _: m.fit(verbose=0), "."),
    "step without data": (lambda m, _: step(m), "."),
    "step with four things": (lambda m, _: step(m, X, Y, Y, Y), "."),
    "step with features of another size": (
        lambda m, _: step(m, X[:, :2], Y),
        "shape",
    ),
    # Callbacks and attributes.
    "rho below 0 in a callback": (
        lambda m, _: set_in_callback(m, rho=-1.0),
        r"`rho`.*>= 0.*Received: rho=-1.0",
    ),
    "rho is not a number": (lambda m, _: set_in_callback(m, rho="big"), "`rho`.*big"),
    "rho is nan": (lambda m, _: setattr(m.optimizer, "rho", np.nan), "`rho`.*nan"),
    "rho is a list": (lambda m, _: setattr(m.optimizer, "rho", [0.1]), "`rho`"),
    "another sampler": (
        lambda m, _: setattr(m.optimizer, "sampler", samplers.All()),
        "`sampler` of `SLSAM` cannot be replaced.*new `SLSAM`",
    ),
    "another base optimizer": (
        lambda m, _: setattr(m.optimizer, "base_optimizer", "sgd"),
        "`base_optimizer` of `SLSAM` cannot be replaced",
    ),
    "adaptive later": (
        lambda m, _: setattr(m.optimizer, "adaptive", True),
        "`adaptive` of `SLSAM` cannot be replaced",
    ),
    "single_step later": (
        lambda m, _: setattr(m.optimizer, "single_step", True),
        "`single_step` of `SLSAM` cannot be replaced",
    ),
    "accumulation later": (
        lambda m, _: setattr(m.optimizer, "gradient_accumulation_steps", 2),
        "`gradient_accumulation_steps`.*cannot be changed.*new base optimizer",
    ),
    "an average later": (
        lambda m, _: setattr(m.optimizer, "use_ema", True),
        "`use_ema`.*cannot be changed",
    ),
    "a loss scale factor": (
        lambda m, _: setattr(m.optimizer, "loss_scale_factor", 2.0),
        "`loss_scale_factor`.*LossScaleOptimizer",
    ),
    "the average of weights that are not averaged": (
        lambda m, _: fit(m, callbacks=[keras.callbacks.SwapEMAWeights(True)]),
        "use_ema",
    ),
    "a schedule that returns text": (
        lambda m, _: fit(
            m, callbacks=[keras.callbacks.LearningRateScheduler(lambda *_: "low")]
        ),
        ".",
    ),
    # The optimizer without the step.
    "apply": (
        lambda m, _: m.optimizer.apply([ops.zeros(v.shape) for v in m.weights]),
        r"keras_slsam.sharpness_aware\(model\)",
    ),
    "a model that has no step": (
        lambda m, _: without_step(SLSAM("sgd")),
        r"keras_slsam.sharpness_aware\(model\)",
    ),
    "the optimizer of another model": (
        lambda m, _: make_model(m.optimizer),
        "built for other trainable weights",
    ),
    "the base optimizer of another": (
        lambda m, _: make_model(SLSAM(m.optimizer.base_optimizer)),
        "`base_optimizer`.*built for other variables",
    ),
    "the sampler of another": (
        lambda m, _: make_model(SLSAM("sgd", sampler=m.optimizer.sampler)),
        "`sampler`.*another optimizer",
    ),
    "an optimizer in an optimizer": (
        lambda m, _: keras_slsam.SAM(m.optimizer),
        "optimizer already",
    ),
    "step of a Keras optimizer": (
        lambda m, _: step(m, X, Y, optimizer=keras.optimizers.SGD()),
        "`optimizer` must be `SAM`",
    ),
    "step of None": (
        lambda m, _: keras_slsam.step(m, None, (X, Y)),
        "`optimizer` must be `SAM`",
    ),
    "step of another optimizer that is built": (
        lambda m, _: step(m, X, Y, optimizer=built().optimizer),
        "built for other trainable weights",
    ),
    "stateless_step without state": (
        lambda m, _: keras_slsam.stateless_step(m, m.optimizer, ([], [], [], []), X),
        "`state` of `stateless_step`",
    ),
    # Frozen and unfrozen weights.
    "a frozen layer": (lambda m, _: frozen(m), "other trainable weights.*compile"),
    # Samplers.
    "a mask of another shape": (lambda m, _: train_with(Draws([True])), r"num_arms"),
    "a mask of another rank": (
        lambda m, _: train_with(Draws([[True] * 4])),
        "num_arms",
    ),
    "a mask that is a number": (lambda m, _: train_with(Draws(True)), "num_arms"),
    "no mask": (lambda m, _: train_with(Draws(lambda: None)), r"num_arms.*None"),
    "a mask of text": (lambda m, _: train_with(Draws(lambda: "on")), r"num_arms.*'on'"),
    "a mask of nan": (
        lambda m, _: train_with(Draws([float("nan")] * 4)),
        "boolean tensor",
    ),
    "a sampler of no probability": (
        lambda m, _: train_with(Knows(0.5)),
        "`min_probability`.*None",
    ),
    "a sampler without draw": (
        lambda m, _: train_with(samplers.Sampler()),
        r"must implement `draw\(\)`",
    ),
    "a sampler that cannot learn": (
        lambda m, _: train_with(Learns(0.5, seed=0)),
        "cannot learn",
    ),
    "a sampler by class": (lambda m, _: SLSAM("sgd", sampler=Learns), "`sampler`"),
    "a sampler by another name": (
        lambda m, _: SLSAM("sgd", sampler="thompson"),
        "`sampler`.*'bandit'",
    ),
    "arms that are lists": (
        lambda m, _: make_model(SLSAM("sgd", arms=lambda v: [v.path])),
        "`arms`.*hashable",
    ),
    "arms that are nan": (
        lambda m, _: make_model(SLSAM("sgd", arms=lambda v: float("nan"))),
        "`arms`.*nan",
    ),
    "arms by another name": (lambda m, _: SLSAM("sgd", arms="neuron"), "`arms`"),
    # Models.
    "a layer": (lambda m, _: keras_slsam.sharpness_aware(m.layers[0]), "keras.Model"),
    "a class": (lambda m, _: keras_slsam.sharpness_aware(type(m)), "keras.Model"),
    "a function": (lambda m, _: keras_slsam.sharpness_aware(fit), "keras.Model"),
    "a model that has its own step": (
        lambda m, _: keras_slsam.sharpness_aware(own_step()),
        "overrides `train_step`",
    ),
    "a model that is not compiled": (
        lambda m, _: step(keras.Sequential([layers.Dense(1)]), X, Y, optimizer="sgd"),
        "compiled with a loss",
    ),
    "a layer that moves its weight": (
        lambda m, _: train_layer(Assigns()),
        "assigns to the trainable weight",
    ),
    "spectral normalization": (
        lambda m, _: train_layer(layers.SpectralNormalization(layers.Dense(2))),
        "assigns to the trainable weight",
    ),
    # Files.
    "truncated weights": (
        lambda m, folder: m.load_weights(truncated(m, folder, "a.weights.h5")),
        ".",
    ),
    "a truncated model": (
        lambda m, folder: keras.saving.load_model(truncated(m, folder, "a.keras")),
        ".",
    ),
    "a truncated whole h5": (
        lambda m, folder: keras.saving.load_model(truncated(m, folder, "a.h5")),
        ".",
    ),
    "foreign weights": (
        lambda m, folder: m.load_weights(foreign(folder, "a.weights.h5")),
        ".",
    ),
    "a foreign model": (
        lambda m, folder: keras.saving.load_model(foreign(folder, "a.keras")),
        ".",
    ),
    "weights that are not there": (
        lambda m, folder: m.load_weights(folder / "none.weights.h5"),
        ".",
    ),
    "weights of a larger model": (
        lambda m, folder: m.load_weights(saved(folder, units=5)),
        "shape",
    ),
    "state of SAM": (
        lambda m, folder: m.load_weights(saved(folder, keras_slsam.SAM("adam"))),
        "method='SAM', not 'SLSAM'",
    ),
    "state of SL+S2": (
        lambda m, folder: m.load_weights(
            saved(folder, SLSAM("adam", single_step=True))
        ),
        "ascent='LastApplied', not 'Ascent'",
    ),
    "state of other arms": (
        lambda m, folder: m.load_weights(saved(folder, SLSAM("adam", arms="layer"))),
        r"arms=\[0, 0, 1, 1\], not \[0, 1, 2, 3\]",
    ),
    "state of another sampler": (
        lambda m, folder: m.load_weights(
            saved(folder, SLSAM("adam", sampler="proportional"))
        ),
        "sampler='Proportional', not 'Bandit'",
    ),
    "state of another base optimizer": (
        lambda m, folder: m.load_weights(saved(folder, SLSAM("sgd"))),
        "base_optimizer='SGD', not 'Adam'",
    ),
    "state of a Keras optimizer": (
        lambda m, folder: m.load_weights(saved(folder, keras.optimizers.Adam())),
        "was not saved by it, but by another optimizer",
    ),
    "state without an entry": (
        lambda m, _: m.optimizer.load_own_variables(stored(m, without="1")),
        "not complete",
    ),
    "state of an entry of another shape": (
        lambda m, _: m.optimizer.load_own_variables(stored(m, replaced="3")),
        "shapes",
    ),
    "weights of the optimizer that are too few": (
        lambda m, _: m.optimizer.set_weights(values(m)[:-1]),
        "values",
    ),
    "weights of the optimizer that are too many": (
        lambda m, _: m.optimizer.set_weights([*values(m), 1.0]),
        "values",
    ),
    "weights of the optimizer in another order": (
        lambda m, _: m.optimizer.set_weights(values(m)[::-1]),
        "shapes",
    ),
    # Configs, also from older and newer versions.
    "a config without base_optimizer": (
        lambda m, _: SLSAM.from_config(config(m, base_optimizer=None)),
        "`base_optimizer`",
    ),
    "a config with an unknown argument": (
        lambda m, _: SLSAM.from_config(config(m, temperature=2)),
        "temperature",
    ),
    "a config of an unknown base optimizer": (
        lambda m, _: SLSAM.from_config(config(m, base_optimizer="no such one")),
        "`base_optimizer`",
    ),
    "a config of an unknown sampler": (
        lambda m, _: SLSAM.from_config(config(m, sampler="thompson")),
        "`sampler`",
    ),
    "a config with rho below 0": (
        lambda m, _: SLSAM.from_config(config(m, rho=-0.1)),
        "`rho`",
    ),
    "a config with a fraction above 1": (
        lambda m, _: SLSAM.from_config(config(m, active_fraction=2)),
        "`active_fraction`",
    ),
    # Arguments.
    "no base optimizer": (lambda m, _: SLSAM(), "`base_optimizer`"),
    "a number as base optimizer": (lambda m, _: SLSAM(3), "`base_optimizer`"),
    "a class as base optimizer": (
        lambda m, _: SLSAM(keras.optimizers.Adam),
        "`base_optimizer`",
    ),
    "a loss scaler as base optimizer": (
        lambda m, _: SLSAM(keras.optimizers.LossScaleOptimizer(ADAM)),
        "must not scale the loss",
    ),
    "a fraction of 0": (lambda m, _: SLSAM("sgd", active_fraction=0), "`active_fra"),
    "a fraction in percent": (
        lambda m, _: SLSAM("sgd", active_fraction=20),
        "`active_fraction`",
    ),
    "a fraction beside a sampler": (
        lambda m, _: SLSAM("sgd", sampler=samplers.All(), active_fraction=0.2),
        "`active_fraction`.*own",
    ),
    "a seed beside a sampler": (
        lambda m, _: SLSAM("sgd", sampler=samplers.All(), seed=1),
        "`seed`.*own",
    ),
    "a seed of text": (lambda m, _: SLSAM("sgd", seed="a"), "`seed`"),
    "a probability above 1": (
        lambda m, _: keras_slsam.RST("sgd", probability=1.5),
        "`probability`",
    ),
    "a probability above 1 later": (
        lambda m, _: setattr(keras_slsam.RST("sgd"), "probability", 1.5),
        "`probability`",
    ),
    "adaptive by number": (lambda m, _: SLSAM("sgd", adaptive=1), "`adaptive`"),
    "single_step by number": (
        lambda m, _: SLSAM("sgd", single_step=1),
        "`single_step`",
    ),
    "the momentum of a sampler": (
        lambda m, _: samplers.Proportional(0.2, momentum=1.0),
        "`momentum`",
    ),
    "the least probability above the fraction": (
        lambda m, _: samplers.Proportional(0.1, min_probability=0.2),
        "`min_probability`.*Received",
    ),
    "the learning rate of a bandit": (
        lambda m, _: samplers.Bandit(0.1, learning_rate=-1),
        "`learning_rate`",
    ),
}


# Wrong uses that are refused in a callback, after a step.
TRAIN_BEFORE = {
    "rho below 0 in a callback",
    "rho is not a number",
    "the average of weights that are not averaged",
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_use_is_refused_and_training_continues(name, model, tmp_path):
    use, message = WRONG[name]
    # Keras and the frameworks raise other types of errors for data and files.
    refusals = (ValueError, TypeError, NotImplementedError)
    kinds = Exception if message == "." else refusals
    before = values(model)
    with pytest.raises(kinds, match=message) as raised:
        use(model, tmp_path)
    # An error of Keras or a framework must not come from our code by chance.
    ours = pathlib.Path(keras_slsam.__file__).parent
    assert message != "." or ours not in pathlib.Path(raised.traceback[-1].path).parents
    if name not in TRAIN_BEFORE:
        for one, other in zip(before, values(model)):
            np.testing.assert_array_equal(one, other)
    weights = model.get_weights()
    model.train_on_batch(X, Y)
    assert any((a != b).any() for a, b in zip(weights, model.get_weights()))
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_the_table_is_long():
    assert len(WRONG) >= 80
