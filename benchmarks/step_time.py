"""The command `time`: seconds a step, executed FLOPs, seconds of the first call.

Each method has a copy of the model, and `fit` trains it. The methods take turns, a few
steps a round, in an order that rotates, so that what else the machine does meets them
alike. The first round (tracing, compilation) and each turn's first step (a new
iterator) do not count.
"""

import argparse
import statistics
import sys
import time

import keras
import numpy as np

from benchmarks import masks
from benchmarks import methods
from benchmarks import models
from benchmarks import probes

# What the others are compared with.
BASES = ("AdamW", "tutorial SAM", "SAM")


class StepLog(keras.callbacks.Callback):
    """Records the seconds of each step, until its result is there."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # dispatch is asynchronous on some backends
        self.seconds.append(time.perf_counter() - self._start)


class TraceLog:
    """Records the seconds of each trace of a model's `train_step`.

    Where a step is traced, its Python runs for that only.
    """

    def __init__(self, model):
        self.seconds = []
        train_step = model.train_step

        def traced(*args):
            start = time.perf_counter()
            try:
                return train_step(*args)
            finally:
                self.seconds.append(time.perf_counter() - start)

        if probes.TRACES:
            model.train_step = traced


def measure(args: argparse.Namespace) -> dict:
    """Times the methods in turns, see `of_models`."""
    return of_models({name: methods.prepare(name, args) for name in args.methods}, args)


def of_models(prepared: dict, args: argparse.Namespace) -> dict:
    """Times models in turns.

    Args:
        prepared: Dict from the names of methods to models that no step has trained.
        args: The flags.

    Returns:
        Dict with a dict for each method, and the ratios of the step times.
    """
    x, y = models.data(args, args.batch * (args.steps + 1))
    names = list(prepared)
    traces = {name: TraceLog(model) for name, model in prepared.items()}
    rounds = {name: [] for name in prepared}
    first_calls = {}
    for number in range(args.rounds + 1):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            log = StepLog()
            fit(prepared[name], x, y, args.batch, log)
            if number == 0:
                first_calls[name] = log.seconds[0], list(traces[name].seconds)
            else:
                rounds[name].append(log.seconds[1:])
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    rows = {
        name: {
            **summary(np.concatenate(rounds[name]).tolist()),
            **first_call(*first_calls[name], rounds[name]),
            **active_arms(prepared[name].optimizer, args),
            "traces": len(traces[name].seconds) if probes.TRACES else None,
        }
        for name in names
    }
    for name, model in prepared.items():
        rows[name]["flops"] = count_flops(model, args)
    return {
        "jit_compile": bool(prepared[names[0]].jit_compile),
        "methods": rows,
        "ratios": {
            f"{above} / {below}": ratio(rounds[above], rounds[below])
            for below in BASES
            for above in names
            if below in rounds and above != below
        },
    }


def fit(model, x, y, batch_size, *callbacks):
    """Trains for one epoch, in the order of the data."""
    model.fit(
        x,
        y,
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def summary(seconds: list[float]) -> dict:
    """Mean, quartiles and number of the steps' seconds."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {
        "mean": statistics.fmean(seconds),
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "steps": len(seconds),
    }


def first_call(seconds, traced, rounds):
    """The first call's seconds, and what of them is tracing and compiling.

    All of the call that is neither a trace nor a step's time counts as compiling.
    """
    if not traced:
        return {"first_call": seconds, "trace": None, "compile": None}
    trace = sum(traced)
    step = statistics.median(np.concatenate(rounds).tolist())
    return {
        "first_call": seconds,
        "trace": trace,
        "compile": max(seconds - trace - step, 0.0),
    }


def ratio(above: list, below: list) -> dict:
    """The ratio of two methods' seconds: of means, with its spread, and of medians.

    Args:
        above: List of lists, the seconds of the steps of each round.
        below: The same of the other method.
    """
    of_rounds = [
        statistics.fmean(a) / statistics.fmean(b) for a, b in zip(above, below)
    ]
    several = len(of_rounds) > 1
    return {
        "of_means": float(np.mean(above) / np.mean(below)),
        "of_medians": float(np.median(above) / np.median(below)),
        "of_rounds": of_rounds,
        "standard_error": statistics.stdev(of_rounds) / len(of_rounds) ** 0.5
        if several
        else None,
    }


def active_arms(optimizer, args):
    """How many arms an optimizer has, and the mean share that the steps drew."""
    probabilities = getattr(optimizer, "probabilities", None)
    if probabilities is None:
        return {"arms": None, "active_share": None}
    drawn = masks.of_timed_steps(len(optimizer.arms), args)
    return {"arms": len(optimizer.arms), "active_share": float(drawn.mean())}


def count_flops(model, args):
    """FLOPs of a few steps, each with the share of active arms; empty if unknown."""
    batch = models.data(args, args.batch)
    count = probes.StepFlops(model)
    found = []
    for _ in range(args.flop_steps):
        flops = count(*batch)
        if flops is None:
            return []
        active = getattr(model.optimizer, "active", None)
        share = None
        if active is not None:
            share = float(keras.ops.convert_to_numpy(active).mean())
        found.append({"flops": flops, "active_share": share})
    return found


def lines(result: dict) -> list[str]:
    """The result as text."""
    text = [
        "seconds            mean  median      quartiles    steps  first  trace compile"
    ]
    for name, row in result["methods"].items():
        parts = [row["first_call"], row["trace"], row["compile"]]
        parts = " ".join("     -" if p is None else f"{p:6.1f}" for p in parts)
        text.append(
            f"{name:<14} {row['mean']:>8.4f} {row['median']:>7.4f}  "
            f"{row['lower_quartile']:.4f} to {row['upper_quartile']:.4f}"
            f" {row['steps']:>5} {parts}"
        )
    text += ["", "ratios of means, with the standard error over rounds; of medians"]
    for name, row in result["ratios"].items():
        error = row["standard_error"]
        spread = "" if error is None else f" ± {error:.3f}"
        text.append(
            f"{name:<27} {row['of_means']:.3f}{spread}; {row['of_medians']:.3f}"
        )
    return text
