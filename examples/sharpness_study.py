"""Trains one model per method, and measures how sharp the minima are.

    python examples/sharpness_study.py --folder study
    python examples/sharpness_study.py --model cnn --label-noise 0.4 --epochs 30 \
        --seeds 0 1 2 --folder noisy
    python examples/sharpness_study.py --model minilm --data train.tsv --test dev.tsv \
        --epochs 2 --folder texts

The models and their data are those of `compare_methods.py`. Without arguments, a small
network learns scikit-learn's digits, which takes about a minute.

Of each trained model the script measures, on `--rows` rows of the training data:

- `worst case`: the highest rise of the loss within an adaptive radius, as found by an
  ascent,
- `average case`: the mean rise under noise relative to the weights,
- `top eigenvalue`: of the Hessian of the plain loss,

and its accuracy on test data. The first two normalise the logits if there are more than
two classes. A run writes its file after the training and after each
measure. If it is killed, give the command again. From all runs the script makes
`results.csv` and the picture `results.svg`.
"""

import argparse
import csv
import json
import pathlib
import time

import choose_backend  # noqa: F401, before Keras
import compare_methods
import data
import keras

import keras_slsam
from keras_slsam import analysis

METHODS = {
    "AdamW": "adamw",
    "sparse AdamW": "sparse-adamw",
    "SAM": "sam",
    "S2-SAM": "s2sam",
    "SL-SAM": "slsam-proportional",
    "SL+S2": "sl+s2",
}
SPARSE = {"sparse AdamW", "SL-SAM", "SL+S2"}
# Of each model: the learning rate, that of sparse methods, and the radius.
SETTINGS = {
    "cnn": (1e-3, 3e-3, 0.2),
    "efficientnet": (3e-4, 1e-3, 0.1),
    "minilm": (5e-5, 2e-4, 0.05),
}


def worst_case(model, x, y, args):
    return {
        "worst case": analysis.worst_case_sharpness(
            model,
            x,
            y,
            rho=args.worst_rho,
            steps=args.worst_steps,
            adaptive=True,
            normalize_logits=y.max() > 1,
            batch_size=args.measure_batch,
        )
    }


def average_case(model, x, y, args):
    found = analysis.average_case_sharpness(
        model,
        x,
        y,
        sigma=args.average_sigma,
        samples=args.average_samples,
        adaptive=True,
        normalize_logits=y.max() > 1,
        batch_size=args.measure_batch,
    )
    return {"average case": found.mean, "average case error": found.error}


def top_eigenvalue(model, x, y, args):
    found = analysis.hessian_eigenvalues(
        model, x, y, k=1, tol=1e-2, batch_size=args.measure_batch
    )
    return {"top eigenvalue": float(found.values[0]), "products": found.method}


MEASURES = {
    "worst case": (worst_case, "rise of the loss, worst case"),
    "average case": (average_case, "rise of the loss, mean under noise"),
    "top eigenvalue": (top_eigenvalue, "largest eigenvalue of the Hessian"),
}


def compiled_model(method, shape, classes, seed, args):
    keras.utils.set_random_seed(seed)
    model = compare_methods.MODELS[args.model][1](args, classes, shape)
    model = keras_slsam.sharpness_aware(model)
    rate = args.sparse_learning_rate if method in SPARSE else args.learning_rate
    base = keras.optimizers.AdamW(rate)
    make = compare_methods.METHODS[METHODS[method]]
    model.compile(
        optimizer=make(base, {"rho": args.rho}, args.active_fraction, seed),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def run(method, seed, train, test, args):
    """Takes the steps of a run that its file does not have yet."""
    name = f"{METHODS[method]}-{seed}-{keras.config.backend()}"
    file, weights = args.folder / f"{name}.json", args.folder / f"{name}.weights.h5"
    settings = {k: str(v) for k, v in vars(args).items() if k not in NOT_SETTINGS}
    record = {"method": method, "seed": seed, "settings": settings}
    if file.exists():
        record = json.loads(file.read_text())
        if record["settings"] != settings:
            raise SystemExit(
                f"{file} has other settings: {record['settings']}. Give another "
                "--folder."
            )
    if set(MEASURES) <= set(record):
        return record
    train, _, _ = compare_methods.hold_out(train, args, seed)
    x, y = train
    classes = int(max(y.max(), test[1].max())) + 1
    model = compiled_model(method, x.shape[1:], classes, seed, args)
    start = time.perf_counter()
    if "accuracy" in record:
        model.optimizer.build(model.trainable_variables)  # it is in the file, too
        model.load_weights(weights)
    else:
        print(f"{name}: training", flush=True)
        model.fit(
            x,
            y,
            batch_size=args.batch_size,
            epochs=args.epochs,
            verbose=0,
            callbacks=[compare_methods.Seeds(seed)],
        )
        scores = model.evaluate(*test, batch_size=128, verbose=0, return_dict=True)
        trained = model.evaluate(x, y, batch_size=128, verbose=0, return_dict=True)
        record["accuracy"] = scores["accuracy"]
        record["training accuracy"] = trained["accuracy"]
        record["training loss"] = trained["loss"]
        record["seconds"] = {"training": time.perf_counter() - start}
        model.save_weights(weights)
        write(record, file)
    some = data.shuffled(x, y, seed=0, limit=args.rows)
    for measure, (function, _) in MEASURES.items():
        if measure in record:
            continue
        start = time.perf_counter()
        record.update(function(model, *some, args))
        record["seconds"][measure] = time.perf_counter() - start
        write(record, file)
        seconds = record["seconds"][measure]
        print(f"{name}: {measure} {record[measure]:.4g}, {seconds:.0f} s", flush=True)
    return record


def write(record, file):
    partial = file.with_suffix(".partial")  # a kill must not leave half a file
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(file)


def write_csv(records, file):
    columns = ["method", "seed", "accuracy", "training accuracy", "training loss"]
    columns += [*MEASURES, "average case error", "products"]
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def draw(records, file):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, (measure, (_, label)) in zip(panels, MEASURES.items()):
        analysis.plots.sharpness_and_accuracy(
            records, measure=measure, label=label, ax=panel
        )
        panel.set(ylabel="")
    panels[0].set(ylabel="test accuracy")
    for panel in panels[:-1]:
        panel.get_legend().remove()
    figure.savefig(file)


# Flags that say where and how many, or set only the speed.
NOT_SETTINGS = ("folder", "methods", "seeds", "measure_batch")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=pathlib.Path, default=pathlib.Path("study"))
    add("--model", choices=SETTINGS, default="cnn")
    add("--data", type=pathlib.Path, help="file to train on")
    add("--test", type=pathlib.Path, help="texts to test on")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--learning-rate", type=float, help="default: by model")
    add(
        "--sparse-learning-rate",
        type=float,
        help="of sparse methods; default: by model",
    )
    add("--rho", type=float, help="radius of the training; default: by model")
    add("--active-fraction", type=float, default=0.2)
    add("--label-noise", type=float, default=0.0, help="share of wrong labels")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=32)
    add("--length", type=int, help="tokens per text; default: 16, with --data 64")
    add("--image-size", type=int, default=32, help="of EfficientNet's input")
    add("--limit", type=int, help="examples to train on, chosen at random")
    add("--rows", type=int, default=256, help="training examples to measure on")
    add("--measure-batch", type=int, default=64)
    add("--worst-rho", type=float, default=0.5, help="adaptive radius to measure in")
    add("--worst-steps", type=int, default=5)
    add("--average-sigma", type=float, default=0.1, help="noise, relative to weights")
    add("--average-samples", type=int, default=5)
    args = parser.parse_args()
    rate, sparse_rate, rho = SETTINGS[args.model]
    args.learning_rate = args.learning_rate or rate
    args.sparse_learning_rate = args.sparse_learning_rate or sparse_rate
    args.rho = rho if args.rho is None else args.rho
    args.length = args.length or (64 if args.data else 16)
    args.folder.mkdir(parents=True, exist_ok=True)

    train, test = compare_methods.MODELS[args.model][0](args)
    if args.limit is not None:
        train = data.shuffled(*train, seed=0, limit=args.limit)
    records = [
        run(method, seed, train, test, args)
        for seed in args.seeds
        for method in args.methods
    ]
    write_csv(records, args.folder / "results.csv")
    draw(records, args.folder / "results.svg")
    for record in records:
        print(
            f"{record['method']:<12} seed {record['seed']}  "
            f"accuracy {record['accuracy']:.3f}  "
            + "  ".join(f"{measure} {record[measure]:.4g}" for measure in MEASURES)
        )


if __name__ == "__main__":
    main()
