"""The command `time`: seconds per step, executed FLOPs, seconds of the first call.

Each method trains its own copy of the model with `fit`. The methods take turns: each
takes a few steps per round, in an order that rotates, so other work on the machine
affects all of them alike. The first round (tracing, compilation) and the first step of
each turn (a new iterator) do not count. With `--alone` each method has a separate
process, and the processes run one after the other.
"""

import argparse
import itertools
import statistics
import sys
import time

import keras
import numpy as np

from benchmarks import cells
from benchmarks import models
from benchmarks import probes
from benchmarks import process

# The methods that all methods are compared with.
BASES = ("AdamW", "tutorial SAM", "SAM")


class StepLog(keras.callbacks.Callback):
    """Records the seconds of each step until its result is available.

    Attributes:
        steps: List with two numbers for each step: the seconds of a clock, and those
            that all cores together spent on this process.
    """

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # dispatch is asynchronous on some backends
        end = time.perf_counter(), time.process_time()
        self.steps.append(np.subtract(end, self._start))


def log_traces(model: keras.Model) -> list[float]:
    """Returns a list that records the seconds of each trace of a model's `train_step`.

    A compiled step runs its Python code only while it is traced. If steps run eagerly,
    the list stays empty.
    """
    seconds = []
    train_step = model.train_step

    def traced(*args):
        start = time.perf_counter()
        try:
            return train_step(*args)
        finally:
            seconds.append(time.perf_counter() - start)

    if keras.config.backend() != "torch":
        model.train_step = traced
    return seconds


def measure(args: argparse.Namespace) -> dict:
    """Times the methods. Returns a dict for each, and the ratios of the step times."""
    if args.alone:
        found = {n: process.separate(of_method, n, args) for n in args.methods}
    else:
        found = of_models({n: models.prepare(n, args) for n in args.methods}, args)
    ratios = {
        f"{above} / {below}": ratio(found[above], found[below])
        for below in BASES
        for above in found
        if below in found and above != below
    }
    return {"methods": found, "ratios": ratios}


def of_method(name: str, args: argparse.Namespace) -> dict:
    """Times one method."""
    return of_models({name: models.prepare(name, args)}, args)[name]


def of_models(prepared: dict, args: argparse.Namespace) -> dict:
    """Times several models, which take turns.

    Args:
        prepared: Dict from the names of methods to models that have not been trained.
        args: The flags.

    Returns:
        Dict with a dict for each method. `seconds` has a list for each round, with the
        seconds of its steps.
    """
    x, y = models.data(args, args.batch * (args.steps + 1))
    names = list(prepared)
    logs = {name: StepLog() for name in names}
    callbacks = {name: [logs[name]] for name in names}
    for name in models.CALLBACKS.keys() & names:
        callbacks[name].append(models.CALLBACKS[name]())
    traces = {name: log_traces(model) for name, model in prepared.items()}
    for number in range(args.rounds + 1):
        for name in names:
            fit(prepared[name], x, y, args.batch, callbacks[name])
        names.append(names.pop(0))
        if number == 0:
            traced = {name: sum(traces[name]) or None for name in names}
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    found = {}
    batch = models.data(args, args.batch)
    for name, model in prepared.items():
        sparse = isinstance(models.METHODS[name], dict)
        arms = len(model.optimizer.arms) if sparse else None
        flops = itertools.islice(probes.step_flops(model, *batch), args.flop_steps)
        found[name] = {
            **_summary(logs[name].steps, args.rounds, traced[name]),
            "arms": arms,
            "active_share": arms and float(timed_masks(name, arms, args).mean()),
            "traces": len(traces[name]) or None,
            "flops": list(flops),
        }
    return found


def fit(model, x, y, batch_size, callbacks=None):
    """Trains for one epoch, in the order of the data."""
    model.fit(x, y, batch_size, shuffle=False, verbose=0, callbacks=callbacks)


def _summary(steps, rounds, trace):
    """Summarises the timed steps, and the tracing and compilation in the first call."""
    turns = np.reshape(steps, (rounds + 1, -1, 2))
    first_call = float(turns[0, 0, 0])
    seconds, cpu = turns[1:, 1:, 0], turns[1:, 1:, 1]
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {
        "seconds": seconds.tolist(),
        "mean": float(seconds.mean()),
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "cpu": float(cpu.mean()),
        "steps": seconds.size,
        "first_call": first_call,
        "trace": trace,
        # The rest of the first call, which is neither the trace nor the step.
        "compile": trace and max(first_call - trace - median, 0.0),
    }


def ratio(above: dict, below: dict) -> dict:
    """Returns the ratios of two methods' mean and median seconds, with the spread."""
    upper, lower = (np.mean(row["seconds"], axis=1) for row in (above, below))
    of_rounds = upper / lower
    error = of_rounds.std(ddof=1) / len(upper) ** 0.5 if len(upper) > 1 else None
    return {
        "of_means": above["mean"] / below["mean"],
        "of_medians": above["median"] / below["median"],
        "of_rounds": of_rounds.tolist(),
        "standard_error": error,
    }


def timed_masks(name: str, num_arms: int, args: argparse.Namespace) -> np.ndarray:
    """Returns the masks of the steps that count, drawn again with the same seed.

    They are a boolean array of shape `(rounds, steps, num_arms)`.
    """
    sampler = models.sampler(name, args)
    sampler.build(num_arms)
    turns = args.rounds + 1, args.steps + 1
    drawn = [keras.ops.convert_to_numpy(sampler.draw()) for _ in np.ndindex(turns)]
    return np.reshape(drawn, (*turns, num_arms))[1:, 1:]


def rows(result: dict):
    """Yields the table, a row for each method."""
    for name, row in result["methods"].items():
        ratios = {base: result["ratios"].get(f"{name} / {base}") for base in BASES}
        medians = [found and found["of_medians"] for found in ratios.values()]
        flops = statistics.fmean(row["flops"]) / 1e9 if row["flops"] else None
        yield {
            "method": name,
            "s per step": cells.number(row["mean"], 4),
            "quartiles": f"{row['lower_quartile']:.4f} to {row['upper_quartile']:.4f}",
            "CPU, s": cells.number(row["cpu"], 2),
            **{f"× {base}": cells.ratio(found) for base, found in ratios.items()},
            "of medians": " ".join(cells.number(median, 2) for median in medians),
            "active": cells.number(row["active_share"], 2),
            "GFLOP": cells.number(flops, 2),
            "first call, s": cells.number(row["first_call"], 1),
            "trace, s": cells.number(row["trace"], 1),
            "compile, s": cells.number(row["compile"], 1),
            "traces": cells.number(row["traces"]),
        }
