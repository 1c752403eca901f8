"""Trains a small model in processes that are killed at random moments.

    KERAS_BACKEND=jax python tests/kill_child.py --kills 20

This kills 20 processes for each method and callback. It compares the weights and the
optimizer's state, bit for bit, with those of a run that was not killed. A run resumes
with public functions only. It does not use Keras' epoch number, which is written after
the weights: after a kill between the two, the number is one epoch behind.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import tempfile
import time
import traceback

import h5py
import keras
import numpy as np

import keras_slsam

METHODS = {
    "SLSAM": lambda: keras_slsam.SLSAM("adamw", 0.05, active_fraction=0.4, seed=0),
    "RST": lambda: keras_slsam.RST("adamw", 0.05, seed=0),
    "AdamW": lambda: keras.optimizers.AdamW(),
}
CALLBACKS = ("BackupAndRestore", "ModelCheckpoint")
STEPS, BATCH = 3, 4


class Progress(keras.callbacks.Callback):
    """Counts epochs from the optimizer's steps, which are saved with the weights.

    Random numbers of layers are not saved, so each epoch seeds them with its number.
    The result is written before the last checkpoint, so no run resumes after its end.
    """

    def __init__(self, epochs, result, started):
        super().__init__()
        self.epochs, self.result, self.started = epochs, result, started

    def epoch(self):
        return int(self.model.optimizer.iterations) // STEPS

    def on_epoch_begin(self, epoch, logs=None):
        keras.utils.set_random_seed(self.epoch())
        for variable in self.model.non_trainable_variables:
            if variable.path.endswith("seed_generator_state"):
                variable.assign(np.full(variable.shape, self.epoch()))

    def on_train_batch_end(self, batch, logs=None):
        os.write(self.started, b"a step")

    def on_epoch_end(self, epoch, logs=None):
        if self.epoch() >= self.epochs:
            state = [*self.model.weights, *self.model.optimizer.variables]
            partial = self.result.with_suffix(".partial.npz")
            np.savez(partial, *map(keras.ops.convert_to_numpy, state))
            partial.replace(self.result)
            self.model.stop_training = True


def train(folder, method, callback, epochs, started):
    """Resumes a run from the files in the folder, and trains to the end."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dropout(0.2, seed=1),
        keras.layers.Dense(1),
    ]
    model = keras_slsam.sharpness_aware(keras.Sequential(layers))
    model.compile(METHODS[method](), "mse")
    x = np.random.default_rng(0).normal(size=(STEPS * BATCH, 3))
    y = np.sin(x[:, :1])
    progress = Progress(epochs, folder / "result.npz", started)
    if callback == "BackupAndRestore":
        latest = folder / "backup" / "latest.weights.h5"
        if latest.exists() and not latest.with_name(f"{latest.name}.bkp").exists():
            try:
                h5py.File(latest).close()
            except OSError:  # killed in the first save, so there is no earlier one
                latest.unlink()
        metadata = folder / "backup" / "training_metadata.json"
        if metadata.exists():
            try:
                json.loads(metadata.read_text())
            except ValueError:  # killed while writing; Keras cannot read the file
                metadata.unlink()
        save = keras.callbacks.BackupAndRestore(
            folder / "backup", double_checkpoint=True
        )
    else:
        model.optimizer.build(model.trainable_variables)
        for file in sorted(folder.glob("*.weights.h5"), reverse=True):
            try:
                model.load_weights(file)
                break
            except OSError:  # killed while writing
                file.unlink()
        save = keras.callbacks.ModelCheckpoint(
            folder / "{epoch:04d}.weights.h5", save_weights_only=True
        )
    first = int(model.optimizer.iterations) // STEPS
    model.fit(
        *(x, y),
        batch_size=BATCH,
        initial_epoch=first,
        epochs=2 * epochs,
        shuffle=False,
        verbose=0,
        callbacks=[progress, save],
    )


def live_on(folder, method, callback, epochs, kills, seed=0):
    """Starts and kills processes until one reaches the end.

    They are forked from this process, which has imported everything and computed
    nothing.

    Returns:
        Tuple of the number of kills, and the list of the final arrays of the run.

    Raises:
        RuntimeError: if a process failed without being killed.
    """
    chance, killed = random.Random(seed), 0
    while not (folder / "result.npz").exists():
        reader, writer = os.pipe()
        process = os.fork()
        if not process:
            try:
                train(folder, method, callback, epochs, writer)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        os.read(reader, 1)  # the first step was taken, or the process ended
        if killed < kills:
            time.sleep(chance.uniform(0, 0.2))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(reader)
        if os.WIFSIGNALED(status):
            killed += 1
        elif status:
            raise RuntimeError(f"{method} with {callback} failed, see above.")
    with np.load(folder / "result.npz") as result:
        return killed, [result[name] for name in result.files]


def survives(method, callback, kills):
    """Returns the number of kills, and of arrays that differ from an unbroken run."""
    # Too many epochs for one process. Steps take longest on TensorFlow.
    epochs = (12 if keras.config.backend() == "tensorflow" else 40) * kills
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder) / "whole"
        broken = pathlib.Path(folder) / "broken"
        whole.mkdir(), broken.mkdir()
        _, expected = live_on(whole, method, callback, epochs, 0)
        killed, found = live_on(broken, method, callback, epochs, kills)
    pairs = zip(expected, found, strict=True)
    return killed, sum(not np.array_equal(one, other) for one, other in pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--callbacks", nargs="+", choices=CALLBACKS, default=CALLBACKS)
    args = parser.parse_args()
    for method in args.methods:
        for callback in args.callbacks:
            killed, different = survives(method, callback, args.kills)
            report = f"{killed} kills, {different} arrays differ"
            print(keras.config.backend(), method, callback, report, flush=True)
