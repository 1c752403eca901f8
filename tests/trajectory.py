"""Twenty steps of SL-SAM with the library's own draws, for any backend.

`python trajectory.py FILE` writes the masks and the weights of each step.
"""

import sys

import keras
import numpy as np
from keras import layers

import keras_slsam

STEPS = 20


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


def run(sampler, single_step):
    """Masks `(STEPS, arms)`, and the final weights as one vector."""
    model = keras_slsam.sharpness_aware(make_model())
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.AdamW(3e-3),
        rho=0.05,
        active_fraction=0.3,
        sampler=sampler,
        single_step=single_step,
        seed=7,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    rng = np.random.default_rng(1)
    masks = []
    for _ in range(STEPS):
        x, y = rng.integers(0, 13, (16, 6)), rng.integers(0, 3, 16)
        model.train_on_batch(x, y)
        masks.append(keras.ops.convert_to_numpy(optimizer.active))
    return np.stack(masks), np.concatenate([w.ravel() for w in model.get_weights()])


def run_all():
    results = {}
    for sampler in ("bandit", "proportional"):
        for single_step in (False, True):
            masks, weights = run(sampler, single_step)
            results[f"{sampler}-{single_step}-masks"] = masks
            results[f"{sampler}-{single_step}-weights"] = weights
    return results


if __name__ == "__main__":
    np.savez(sys.argv[1], **run_all())
