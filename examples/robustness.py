"""Measures how a trained model fares after its weights or its data are disturbed."""

import contextlib

import keras
import numpy as np

from keras_slsam import analysis

NOISE_LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3)


@contextlib.contextmanager
def restored_weights(model):
    """Context that yields the trainable weights, and restores them at its end."""
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    try:
        yield before
    finally:
        for variable, value in zip(model.trainable_variables, before):
            variable.assign(value)


def accuracy(model, x, y):
    return model.evaluate(x, y, batch_size=128, verbose=0, return_dict=True)["accuracy"]


def under_weight_noise(model, x, y, seed=0):
    """Returns the accuracy with Gaussian noise on all matrices, for several levels."""
    found = analysis.accuracy_under_noise(
        model, x, y, levels=NOISE_LEVELS, seed=seed, batch_size=128
    )
    return {f"noise {level:g}": estimate.mean for level, estimate in found.items()}


def after_rounding(model, x, y):
    """Returns the accuracy with weights of 8 and 4 bits, rounded per output channel.

    Matrices and kernels are rounded to a symmetric grid, as `model.quantize` does for
    the layers that it knows. The weights are restored.
    """
    found = {}
    with restored_weights(model) as before:
        for bits in (8, 4):
            most = 2 ** (bits - 1) - 1
            for variable, value in zip(model.trainable_variables, before):
                if value.ndim > 1:
                    axes = tuple(range(value.ndim - 1))
                    step = np.abs(value).max(axis=axes, keepdims=True) / most + 1e-12
                    rounded = np.clip(np.round(value / step), -most, most) * step
                    variable.assign(rounded.astype(value.dtype))
            found[f"int{bits}"] = accuracy(model, x, y)
    return found


def on_shifted_images(model, x, y, seed=0):
    """Returns the accuracy on images with noise, blurred, and with less contrast."""
    rng = np.random.default_rng(seed)
    images = x.astype("float32")
    blurred = sum(
        np.roll(images, (i, j), axis=(1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)
    )
    shifted = {
        "noisy images": images + rng.normal(scale=20, size=images.shape),
        "blurred images": blurred / 9,
        "pale images": images.mean(axis=(1, 2, 3), keepdims=True) * 0.6 + images * 0.4,
    }
    return {
        name: accuracy(model, np.clip(values, 0, 255).astype("uint8"), y)
        for name, values in shifted.items()
    }
