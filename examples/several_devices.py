"""Classifies handwritten digits on all devices of a machine, with JAX or TensorFlow.

    pip install keras-slsam scikit-learn jax
    KERAS_BACKEND=jax python examples/several_devices.py

Without an accelerator it divides the CPU into two devices, with TensorFlow also without
two. For PyTorch, and for several machines, see `several_processes.py`.
"""

import contextlib

import choose_backend  # noqa: F401, before Keras
import keras
from digits import BATCH
from digits import METHODS
from digits import make_model
from sklearn.datasets import load_digits

EPOCHS = 5


def distribute():
    """Returns the number of devices, and the context in which to make the model."""
    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", 2)
        devices = keras.distribution.list_devices()
        chosen = keras.distribution.DataParallel(devices=devices)
        keras.distribution.set_distribution(chosen)
        return len(devices), contextlib.nullcontext()
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        devices = None  # all GPUs
        if len(tf.config.list_physical_devices("GPU")) < 2:
            (cpu,) = tf.config.list_physical_devices("CPU")
            halves = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
            tf.config.set_logical_device_configuration(cpu, halves)
            devices = ["CPU:0", "CPU:1"]
        strategy = tf.distribute.MirroredStrategy(devices)
        return strategy.num_replicas_in_sync, strategy.scope()
    raise SystemExit("For PyTorch see several_processes.py.")


def main():
    devices, scope = distribute()
    x, y = load_digits(return_X_y=True)
    # JAX requires that the devices divide each batch.
    x, train, test = x.astype("float32") / 16, slice(0, 1280), slice(1280, 1792)
    with scope:
        model = make_model(METHODS["SL-SAM"]())
    model.fit(x[train], y[train], BATCH, EPOCHS, verbose=0)
    accuracy = model.evaluate(x[test], y[test], verbose=0)[1]
    print(f"{devices} devices: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
