"""Classifies handwritten digits with AdamW, SAM and SL-SAM, in less than a minute.

    pip install keras-slsam scikit-learn jax
    KERAS_BACKEND=jax python examples/digits.py

The methods take turns: each trains for one epoch. (1) and (2) mark the two lines that
make the training sharpness-aware.
"""

import argparse
import time

import choose_backend  # noqa: F401, before Keras
import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_slsam

BATCH, WIDTH, DEPTH = 64, 768, 4


def adamw(learning_rate=1e-3):
    return keras.optimizers.AdamW(learning_rate)


# A sparse step moves only some of the weights, so it needs a higher learning rate.
METHODS = {
    "AdamW": adamw,
    "SAM": lambda: keras_slsam.SAM(adamw(), rho=0.05),
    "SL-SAM": lambda: keras_slsam.SLSAM(  # (1)
        adamw(3e-3), rho=0.05, sampler="proportional", arms="layer", seed=0
    ),
}


def make_model(optimizer, metrics=("accuracy",)):
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(DEPTH)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    model = keras_slsam.sharpness_aware(model)  # (2)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=list(metrics),
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    x, y = load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    train, test = slice(0, 1280), slice(1280, None)
    models = {name: make_model(make()) for name, make in METHODS.items()}
    seconds = {name: [] for name in models}
    for _ in range(args.epochs):
        for name, model in models.items():
            start = time.perf_counter()
            model.fit(x[train], y[train], batch_size=BATCH, verbose=0)
            seconds[name].append(time.perf_counter() - start)
    print(f"Keras {keras.__version__} on {keras.config.backend()}")
    print("method  test accuracy  s/epoch  time / SAM's")
    # Without the first epoch, which includes compilation.
    times = {name: np.median(found[1:] or found) for name, found in seconds.items()}
    for name, model in models.items():
        accuracy = model.evaluate(x[test], y[test], verbose=0)[1]
        ratio = times[name] / times["SAM"]
        print(f"{name:<7} {accuracy:>13.3f} {times[name]:>8.3f} {ratio:>13.2f}")


if __name__ == "__main__":
    main()
