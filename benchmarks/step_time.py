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

from benchmarks import alone
from benchmarks import cells
from benchmarks import methods
from benchmarks import models
from benchmarks import probes
from keras_slsam import samplers

# The methods that all methods are compared with.
BASES = ("AdamW", "tutorial SAM", "SAM")


class StepLog(keras.callbacks.Callback):
    """Records the seconds of each step until its result is available.

    Attributes:
        seconds: List of float, those of a clock.
        cpu: List of float, those that all cores together spent on this process.
    """

    def __init__(self):
        super().__init__()
        self.seconds, self.cpu = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # dispatch is asynchronous on some backends
        start, cpu_start = self._start
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - cpu_start)


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

    if probes.TRACES:
        model.train_step = traced
    return seconds


def measure(args: argparse.Namespace) -> dict:
    """Times the methods. Returns a dict for each, and the ratios of the step times."""
    if args.alone:
        found = {name: alone.measure("step_time", name, args) for name in args.methods}
    else:
        prepared = {name: methods.prepare(name, args) for name in args.methods}
        found = of_models(prepared, args)
    ratios = {
        f"{above} / {below}": ratio(found[above], found[below])
        for below in BASES
        for above in found
        if below in found and above != below
    }
    return {"methods": found, "ratios": ratios}


def of_method(name: str, args: argparse.Namespace) -> dict:
    """Times one method."""
    return of_models({name: methods.prepare(name, args)}, args)[name]


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
    traces = {name: log_traces(model) for name, model in prepared.items()}
    rounds, cpu = {name: [] for name in names}, {name: [] for name in names}
    first_calls = {}
    for number in range(args.rounds + 1):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            log = StepLog()
            fit(prepared[name], x, y, args.batch, log)
            if number == 0:
                first_calls[name] = log.seconds[0], sum(traces[name]) or None
            else:
                rounds[name].append(log.seconds[1:])
                cpu[name] += log.cpu[1:]
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    return {
        name: {
            **_summary(rounds[name], *first_calls[name]),
            "cpu": statistics.fmean(cpu[name]),
            **_active_arms(prepared[name].optimizer, args),
            "traces": len(traces[name]) or None,
            "flops": _flops(prepared[name], args),
        }
        for name in names
    }


def fit(model, x, y, batch_size, *callbacks):
    """Trains for one epoch, in the order of the data."""
    given = dict(batch_size=batch_size, callbacks=list(callbacks))
    model.fit(x, y, shuffle=False, verbose=0, **given)


def _summary(rounds, first_call, trace):
    """Summarises the timed steps, and the tracing and compilation in the first call."""
    seconds = np.concatenate(rounds).tolist()
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {
        "seconds": rounds,
        "mean": statistics.fmean(seconds),
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "steps": len(seconds),
        "first_call": first_call,
        "trace": trace,
        # The rest of the first call, which is neither the trace nor the step.
        "compile": trace and max(first_call - trace - median, 0.0),
    }


def ratio(above: dict, below: dict) -> dict:
    """Returns the ratios of two methods' mean and median seconds, with the spread."""
    pairs = zip(above["seconds"], below["seconds"])
    of_rounds = [statistics.fmean(a) / statistics.fmean(b) for a, b in pairs]
    error = None
    if len(of_rounds) > 1:
        error = statistics.stdev(of_rounds) / len(of_rounds) ** 0.5
    return {
        "of_means": above["mean"] / below["mean"],
        "of_medians": above["median"] / below["median"],
        "of_rounds": of_rounds,
        "standard_error": error,
    }


def _active_arms(optimizer, args):
    """Returns the number of arms of an optimizer, and the mean active share."""
    if getattr(optimizer, "probabilities", None) is None:
        return {"arms": None, "active_share": None}
    drawn = timed_masks(len(optimizer.arms), args)
    return {"arms": len(optimizer.arms), "active_share": float(drawn.mean())}


def timed_masks(num_arms: int, args: argparse.Namespace) -> np.ndarray:
    """Returns the masks of the steps that count, drawn again with the same seed.

    Returns:
        Boolean array of shape `(rounds * steps, num_arms)`.
    """
    sampler = samplers.Uniform(args.active_fraction, seed=args.seed)
    sampler.build(num_arms)
    turns = args.rounds + 1, args.steps + 1
    drawn = [keras.ops.convert_to_numpy(sampler.draw()) for _ in np.ndindex(turns)]
    return np.reshape(drawn, (*turns, num_arms))[1:, 1:].reshape(-1, num_arms)


def _flops(model, args):
    """Returns the FLOPs of a few more steps, or an empty list if they are unknown."""
    counted = probes.step_flops(model, *models.data(args, args.batch))
    return list(itertools.islice(counted, args.flop_steps))


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
