"""The memory of one method, in this process: a part of the command `memory`.

    python -m benchmarks.peak_memory METHOD FLAGS

FLAGS are those of the runner as JSON. The last line printed is the result as JSON.
"""

import argparse
import functools
import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from benchmarks import methods
from benchmarks import models
from benchmarks import probes
from benchmarks import resident_set
from benchmarks import step_time


def measure(method: str, args: argparse.Namespace) -> dict:
    """Trains with a method, and records what it took: a dict of bytes.

    Resident are `built` before the first step, with the model, and at most
    `first_step` in the first one (with tracing and compilation, and the optimizer's
    state) and `later_steps` in those that follow. `live` is a list, the tensors of
    PyTorch or the blocks of TensorFlow in each step; `planned` is JAX's compiled step.
    """
    x, y = models.data(args, args.batch * (args.steps + 1))
    batch = models.data(args, args.batch)
    model = methods.prepare(method, args)
    resident_set.reset_peak()
    built = resident_set.now()
    step_time.fit(model, *batch, args.batch)
    in_first_step = resident_set.peak()
    resident_set.reset_peak()
    step_time.fit(model, x, y, args.batch)
    in_later_steps = resident_set.peak()
    variables = model.variables + model.optimizer.variables
    live = probes.live_bytes(variables, _steps(model, x, y, args.batch))
    return {
        "resident": {
            "built": built,
            "first_step": in_first_step,
            "later_steps": in_later_steps,
        },
        "live": live,
        "planned": probes.planned_memory(model, *batch),
    }


def _steps(model, x, y, batch_size):
    """Functions that take one step each, with the batches in turn."""

    def step(start):
        rows = slice(start, start + batch_size)
        of_batch = keras.tree.map_structure(lambda array: array[rows], (x, y))
        step_time.fit(model, *of_batch, batch_size)

    return [functools.partial(step, i) for i in range(0, len(y), batch_size)]


if __name__ == "__main__":
    print(
        json.dumps(measure(sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))))
    )
