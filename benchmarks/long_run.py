"""The command `long`: how a step changes over many thousands of steps.

It trains a small model with dropout and BatchNorm. It measures memory and step time in
the first thousand steps and the last thousand, and counts the traces of the step. It
finds the arm that was drawn least in the last half of the steps, and how often it was
drawn.
"""

import argparse
import gc
import sys

import keras
import numpy as np
from keras import layers

import keras_slsam
from benchmarks import cells
from benchmarks import models
from benchmarks import probes
from benchmarks import process
from benchmarks import step_time

THOUSAND = 1000
WIDTH, BATCH = 16, 8
# The arguments of SL-SAM.
METHODS = {
    "SAM": {},
    "SL-SAM bandit": {"sampler": "bandit"},
    "SL-SAM proportional": {"sampler": "proportional"},
    "SL+S2 bandit": {"sampler": "bandit", "single_step": True},
}


def measure(args: argparse.Namespace) -> dict:
    """Trains with each method for `args.steps` steps."""
    return {"methods": {name: _of_method(name, args) for name in METHODS}}


def _of_method(name, args):
    keras.utils.set_random_seed(args.seed)
    model = keras.Sequential([keras.Input((WIDTH,))])
    for _ in range(2):
        model.add(layers.Dense(WIDTH, activation="relu"))
        model.add(layers.BatchNormalization())
        model.add(layers.Dropout(0.1))
    model.add(layers.Dense(1))
    model = keras_slsam.sharpness_aware(model)
    method, kwargs = keras_slsam.SAM, METHODS[name]
    if kwargs:
        method = keras_slsam.SLSAM
        kwargs = {"active_fraction": args.active_fraction, "seed": args.seed, **kwargs}
    optimizer = method(keras.optimizers.AdamW(1e-3), **kwargs)
    model.compile(optimizer, "mse", jit_compile=models.JIT_COMPILE[args.jit_compile])
    traces = step_time.log_traces(model)
    x = np.random.default_rng(args.seed).normal(size=(THOUSAND * BATCH, WIDTH))
    log = step_time.StepLog()
    found = {"resident": [], "tensors": []}
    counts = []
    for thousand in range(max(args.steps // THOUSAND, 2)):
        step_time.fit(model, x, np.sin(x[:, :1]), BATCH, [log])
        gc.collect()
        found["resident"].append(process.resident("VmRSS"))
        found["tensors"].append(probes.num_tensors())
        # The steps that each arm has taken. They are unknown for a dense method.
        taken = [v for v in optimizer.variables if v.name == "own_iterations"]
        counts += [np.copy(keras.ops.convert_to_numpy(v)) for v in taken]
        print(f"{name}: {thousand + 1},000 steps", file=sys.stderr, flush=True)
    drawn = (counts[-1] - counts[len(counts) // 2 - 1]).tolist() if counts else None
    seconds = np.reshape(log.steps, (-1, THOUSAND, 2))[:, 1:, 0]
    found["seconds"] = np.median(seconds, axis=1).tolist()
    return {**found, "traces": len(traces) or None, "drawn": drawn}


def rows(result: dict):
    """Yields a row for each method, with the first thousand steps and the last."""
    for name, row in result["methods"].items():
        yield {
            "method": name,
            "ms per step": _ends(row["seconds"], 2, 1e-3),
            "resident, MB": _ends(row["resident"], 0, 1e6),
            "tensors": _ends(row["tensors"]),
            "traces": cells.number(row["traces"]),
            "drawn": cells.number(row["drawn"] and min(row["drawn"])),
        }


def _ends(values, *form):
    """Formats the first and the last value."""
    first, last = (cells.number(value, *form) for value in (values[0], values[-1]))
    return first if first == "-" else f"{first}, {last}"
