"""Steps of SL-SAM with the library's own draws, for any backend.

python trajectory.py run FILE                       twenty steps of each kind
python trajectory.py resume KIND CHECKPOINT FILE    goes on from a checkpoint
"""

import sys

import keras
import numpy as np
from keras import layers

import keras_slsam

STEPS = 20
KINDS = {
    "bandit": {"sampler": "bandit"},
    "proportional": {"sampler": "proportional"},
    "bandit, single step": {"sampler": "bandit", "single_step": True},
    "proportional, single step": {"sampler": "proportional", "single_step": True},
}


def make_model():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(13, 8)(tokens)
    attended = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization()(x + attended)
    hidden = layers.Dense(16, activation="gelu")(x)
    x = layers.LayerNormalization()(x + layers.Dense(8)(hidden))
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(tokens, layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        value = rng.normal(size=variable.shape) / np.sqrt(variable.shape[0])
        variable.assign(value.astype("float32"))
    return model


def start(kind):
    model = keras_slsam.sharpness_aware(make_model())
    base = keras.optimizers.AdamW(3e-3)
    optimizer = keras_slsam.SLSAM(
        base, rho=0.05, active_fraction=0.3, seed=7, **KINDS[kind]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def train(model, first=0, steps=STEPS):
    """Masks `(steps, arms)`, and the final weights as one vector."""
    masks = []
    for step in range(first, first + steps):
        rng = np.random.default_rng(step)
        x, y = rng.integers(0, 13, (16, 6)), rng.integers(0, 3, 16)
        model.train_on_batch(x, y)
        masks.append(keras.ops.convert_to_numpy(model.optimizer.active))
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    return {"masks": np.stack(masks), "weights": weights}


def run_all():
    results = {}
    for kind in KINDS:
        for key, value in train(start(kind)).items():
            results[f"{kind}: {key}"] = value
    return results


def resume(kind, file):
    """Goes on after `STEPS` steps, from a file of a model or of weights."""
    if file.endswith(".keras"):
        model = keras_slsam.sharpness_aware(keras.saving.load_model(file))
    else:
        model = start(kind)
        model.optimizer.build(model.trainable_variables)
        model.load_weights(file)
    return train(model, first=STEPS)


if __name__ == "__main__":
    task, *arguments, result = sys.argv[1:]
    np.savez(result, **{"run": run_all, "resume": resume}[task](*arguments))
