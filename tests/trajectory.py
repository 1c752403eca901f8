"""Takes steps of SL-SAM and RST with the package's own draws, on any backend.

python trajectory.py THEIRS OWN    resumes from the checkpoints in the folder THEIRS,
    takes steps of each kind, and writes checkpoints and all results into the folder OWN
"""

import pathlib
import sys

import keras
import numpy as np
from keras import layers
from keras import ops
from user_ascents import Friendly
from user_ascents import Momentum

import keras_slsam
from keras_slsam import samplers

STEPS = 20
FRACTION = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.2, 0.5])
KINDS = {
    "bandit": {"sampler": "bandit"},
    "proportional, single step": {"sampler": "proportional", "single_step": True},
    "all that is scheduled or fixed": {
        "sampler": lambda: samplers.Hold(samplers.Proportional(FRACTION, seed=7), 2),
        "always_active": "layer_normalization",
        "active_fraction": None,
        "seed": None,
        "ascent_fraction": 0.25,
        "rho": keras.optimizers.schedules.PiecewiseConstantDecay(
            [5, 9], [0.0, 0.1, 0.05]
        ),
    },
    "ascent of the user": {
        "sampler": "uniform",
        "arms": "layer",
        "active_fraction": 0.4,
        "ascent": Friendly,
    },
    "ascent that needs no gradient": {
        "base_optimizer": lambda: keras.optimizers.SGD(3e-2, momentum=0.9),
        "sampler": "uniform",
        "ascent": Momentum,
    },
    "randomized": {
        "rho": lambda step: 0.1 / ops.cast(1 + step, "float32"),
        "probability": keras.optimizers.schedules.PiecewiseConstantDecay(
            [12], [0.5, 0.2]
        ),
    },
}
# Together these two kinds have all state of the optimizers and of samplers that learn.
CHECKPOINTS = {
    "bandit": "model.keras",
    "proportional, single step": "model.weights.h5",
}


def adamw():
    return keras.optimizers.AdamW(3e-3)


def make_model():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(13, 8)(tokens)
    attended = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization()(x + attended)
    x = layers.LayerNormalization()(x + layers.Dense(8, activation="gelu")(x))
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(tokens, layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        value = rng.normal(size=variable.shape) / np.sqrt(variable.shape[0])
        variable.assign(value.astype("float32"))
    return model


def start(kind):
    model = keras_slsam.sharpness_aware(make_model())
    kwargs = {"base_optimizer": adamw, "seed": 7, **KINDS[kind]}
    if kind != "randomized":
        kwargs = {"rho": 0.05, "active_fraction": 0.3, **kwargs}
    for argument in ("base_optimizer", "sampler", "ascent"):
        if callable(kwargs.get(argument)):
            kwargs[argument] = kwargs[argument]()
    make = keras_slsam.RST if kind == "randomized" else keras_slsam.SLSAM
    optimizer = make(**kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def train(model, first=0, steps=STEPS):
    """Returns the masks `(steps, arms)`, and the final weights as one vector."""
    masks = []
    for step in range(first, first + steps):
        rng = np.random.default_rng(step)
        x, y = rng.integers(0, 13, (16, 6)), rng.integers(0, 3, 16)
        model.train_on_batch(x, y)
        masks.append(keras.ops.convert_to_numpy(model.optimizer.active))
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    return {"masks": np.stack(masks), "weights": weights}


def run_all(folder):
    """Takes twenty steps of each kind.

    The kinds with a checkpoint write it into the folder, and take twenty more steps.
    """
    results = {}
    for kind in KINDS:
        model = start(kind)
        results[kind] = train(model)
        if kind in CHECKPOINTS:
            file = folder / CHECKPOINTS[kind]
            model.save(file) if file.suffix == ".keras" else model.save_weights(file)
            results[f"{kind}, later"] = train(model, first=STEPS)
    return results


def resume(folder):
    """Takes twenty more steps from each checkpoint, of a model or of weights."""
    results = {}
    for kind, name in CHECKPOINTS.items():
        file = folder / name
        if file.suffix == ".keras":
            model = keras_slsam.sharpness_aware(keras.saving.load_model(file))
        else:
            model = start(kind)
            model.optimizer.build(model.trainable_variables)
            model.load_weights(file)
        results[f"{kind}, resumed"] = train(model, first=STEPS)
    return results


if __name__ == "__main__":
    theirs, own = map(pathlib.Path, sys.argv[1:])
    results = {**resume(theirs), **run_all(own)}
    np.savez(
        own / "results.npz",
        **{
            f"{kind}: {key}": value
            for kind, result in results.items()
            for key, value in result.items()
        },
    )
