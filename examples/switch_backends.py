"""Runs one experiment on each installed backend, and switches backends half-way.

    python examples/switch_backends.py --folder switch

SL-SAM trains a small convolutional network on scikit-learn's handwritten digits. Each
backend runs the whole experiment in a separate process and saves a checkpoint half-way.
Each other backend then resumes from this checkpoint. The same seed draws the same arms
(groups of weights) on every backend, so all runs follow the same trajectory, up to
rounding. The folder then has a table, `switch.csv`, and a plot of all losses,
`switch.png`.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

BACKENDS = ("jax", "tensorflow", "torch")
HALF, BATCH = 30, 64


def load():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype("float32")
    return images[:1500], digits.target[:1500], images[1500:], digits.target[1500:]


def make_model(keras):
    import keras_slsam

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )
    # Each backend has other random numbers, so NumPy makes the initial weights.
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        fan_in = max(np.prod(variable.shape[:-1]), 1)
        scale = np.sqrt(2.0 / fan_in) if len(variable.shape) > 1 else 0.0
        variable.assign((scale * rng.normal(size=variable.shape)).astype("float32"))
    model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=keras_slsam.SLSAM(
            keras.optimizers.AdamW(2e-3), active_fraction=0.5, arms="layer", seed=0
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.optimizer.build(model.trainable_variables)
    return model


def work(checkpoint, first, file):
    """Runs the steps from `first` on. Each process calls this once."""
    import keras

    images, labels, test_images, test_labels = load()
    model = make_model(keras)
    if first:
        model.load_weights(checkpoint)
    losses, masks, seconds = [], [], []
    for step in range(first, 2 * HALF):
        if step == HALF and not first:
            model.save_weights(checkpoint)
        rows = np.random.default_rng(step).integers(0, len(images), BATCH)
        model.reset_metrics()
        start = time.perf_counter()
        losses.append(model.train_on_batch(images[rows], labels[rows])[0])
        seconds.append(time.perf_counter() - start)
        masks.append(keras.ops.convert_to_numpy(model.optimizer.active))
    _, accuracy = model.evaluate(test_images, test_labels, verbose=0)
    np.savez(
        file,
        losses=losses,
        masks=masks,
        seconds=np.median(seconds[2:]),
        accuracy=accuracy,
        weights=np.concatenate([weight.ravel() for weight in model.get_weights()]),
    )


def run(folder, backend, origin=None):
    """Starts a process and returns its results.

    Args:
        folder: Path of the folder for the files.
        backend: String, the backend of the process.
        origin: String, the backend that wrote the checkpoint. If None, the process runs
            the whole experiment.
    """
    name = f"{origin}-{backend}" if origin else backend
    checkpoint = folder / f"{origin or backend}.weights.h5"
    first, file = HALF if origin else 0, folder / f"{name}.npz"
    print(f"{origin}, then {backend}" if origin else backend, flush=True)
    subprocess.run(
        [sys.executable, __file__, "--work", str(checkpoint), str(first), str(file)],
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=True,
    )
    return dict(np.load(file))


def compare(runs):
    """Yields a row for each run, with its largest difference from the first run."""
    reference = next(iter(runs.values()))
    for name, found in runs.items():
        difference = abs(found["weights"] - reference["weights"]).max()
        steps = len(found["masks"])
        yield {
            "run": name,
            "final loss": f"{found['losses'][-1]:.6f}",
            "test accuracy": f"{found['accuracy']:.4f}",
            "seconds per step": f"{found['seconds']:.4f}",
            "same arms": bool((found["masks"] == reference["masks"][-steps:]).all()),
            "largest difference": f"{difference:.1e}",
        }


def draw(runs, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for width, (name, found) in zip(range(2 * len(runs), 0, -2), runs.items()):
        steps = np.arange(2 * HALF)[-len(found["losses"]) :]
        axes.plot(steps, found["losses"], linewidth=width, alpha=0.6, label=name)
    axes.axvline(HALF, color="grey", linestyle=":")
    axes.set(xlabel="step", ylabel="loss of the batch", title="One trajectory")
    axes.legend()
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("switch"))
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        checkpoint, first, file = args.work
        work(checkpoint, int(first), file)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    runs = {name: run(args.folder, name) for name in installed}
    for origin, backend in itertools.permutations(installed, 2):
        runs[f"{origin}, then {backend}"] = run(args.folder, backend, origin)
    rows = list(compare(runs))
    with open(args.folder / "switch.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    widths = [max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]]
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print("  ".join(str(v).ljust(width) for v, width in zip(row.values(), widths)))
    draw(runs, args.folder / "switch.png")
    print(f"\nThe picture is {args.folder / 'switch.png'}")


if __name__ == "__main__":
    main()
