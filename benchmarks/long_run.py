"""The command `long`: how a step changes over many thousands of steps.

It trains a small model with dropout and BatchNorm. It measures memory and step time in
the first thousand steps and the last thousand, and counts the traces of the step. It
finds the arm that was drawn least in the last half of the steps, and how often it was
drawn.
"""

import argparse
import gc
import statistics
import sys

import keras
import numpy as np

import keras_slsam
from benchmarks import cells
from benchmarks import methods
from benchmarks import probes
from benchmarks import resident_set
from benchmarks import step_time
from keras_slsam import samplers

THOUSAND = 1000
WIDTH, BATCH = 16, 8


def _counted(sampler):
    """Returns a subclass of a sampler's class that counts the draws of each arm."""

    class Counted(sampler):
        def build(self, num_arms):
            super().build(num_arms)
            zeros = np.zeros(num_arms)
            self.counts = keras.Variable(zeros, dtype="int32", trainable=False)

        def draw(self):
            mask = super().draw()
            self.counts.assign_add(keras.ops.cast(mask, "int32"))
            return mask

    return Counted


# The sampler, and whether a step has a single pass.
METHODS = {
    "SAM": None,
    "SL-SAM bandit": (_counted(samplers.Bandit), False),
    "SL-SAM proportional": (_counted(samplers.Proportional), False),
    "SL+S2 bandit": (_counted(samplers.Bandit), True),
}


def measure(args: argparse.Namespace) -> dict:
    """Trains with each method for `args.steps` steps."""
    return {"methods": {name: _of_method(name, args) for name in METHODS}}


def _of_method(name, args):
    model, optimizer = _prepare(name, args)
    traces = step_time.log_traces(model)
    x = np.random.default_rng(args.seed).normal(size=(THOUSAND * BATCH, WIDTH))
    y = np.sin(x[:, :1])
    found = {"seconds": [], "resident": [], "tensors": []}
    counts = []
    for thousand in range(max(args.steps // THOUSAND, 2)):
        log = step_time.StepLog()
        step_time.fit(model, x, y, BATCH, log)
        gc.collect()
        found["seconds"].append(statistics.median(log.seconds[1:]))
        found["resident"].append(resident_set.now())
        found["tensors"].append(probes.num_tensors())
        if METHODS[name]:
            counts.append(keras.ops.convert_to_numpy(optimizer.sampler.counts))
        print(f"{name}: {thousand + 1},000 steps", file=sys.stderr, flush=True)
    drawn = (counts[-1] - counts[len(counts) // 2 - 1]).tolist() if counts else None
    return {**found, "traces": len(traces) or None, "drawn": drawn}


def _prepare(name, args):
    """Returns a compiled model and its optimizer."""
    keras.utils.set_random_seed(args.seed)
    model = keras.Sequential([keras.Input((WIDTH,))])
    for _ in range(2):
        model.add(keras.layers.Dense(WIDTH, activation="relu"))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.Dropout(0.1))
    model.add(keras.layers.Dense(1))
    base = keras.optimizers.AdamW(1e-3)
    if name == "SAM":
        optimizer = keras_slsam.SAM(base)
    else:
        counted, single_step = METHODS[name]
        sampler = counted(args.active_fraction, seed=args.seed)
        optimizer = keras_slsam.SLSAM(base, sampler=sampler, single_step=single_step)
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer, "mse", jit_compile=methods.JIT_COMPILE[args.jit_compile])
    return model, optimizer


def rows(result: dict):
    """Yields a row for each method, with the first thousand steps and the last."""
    for name, row in result["methods"].items():
        milliseconds = [1000 * seconds for seconds in row["seconds"]]
        yield {
            "method": name,
            "ms per step": _ends(milliseconds, lambda ms: cells.number(ms, 2)),
            "resident, MB": _ends(row["resident"], cells.megabytes),
            "tensors": _ends(row["tensors"], cells.number),
            "traces": cells.number(row["traces"]),
            "drawn": cells.number(row["drawn"] and min(row["drawn"])),
        }


def _ends(values, cell):
    """Formats the first and the last value."""
    return "-" if values[0] is None else f"{cell(values[0])}, {cell(values[-1])}"
