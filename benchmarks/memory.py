"""The command `memory`: what each method holds, in a process of its own."""

import argparse
import functools
import statistics

from benchmarks import alone
from benchmarks import cells
from benchmarks import methods
from benchmarks import models
from benchmarks import probes
from benchmarks import resident_set
from benchmarks import step_time

# A block of this size or more is a mapping of its own, which returns to the system as
# soon as it is freed: the resident set follows what is in use. The pad is glibc's own.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "131072",
}


def measure(args: argparse.Namespace) -> dict:
    """The memory of each method, see `of_method`."""
    found = {n: alone.measure("memory", n, args, **MALLOC) for n in args.methods}
    return {"methods": found}


def of_method(name: str, args: argparse.Namespace) -> dict:
    """Trains with a method in this process, and records what it takes, in bytes.

    Resident are `built` before the first step, with the model, and at most
    `first_step` in the first one (with tracing, compilation, and the optimizer's state)
    and `later_steps` in those that follow. `live` lists the peak of the tensors of
    PyTorch, or of the blocks of TensorFlow, in each step. `planned` is what JAX's
    compiled step plans.
    """
    batch = models.data(args, args.batch)
    several = models.data(args, args.batch * (args.steps + 1))
    model = methods.prepare(name, args)
    resident_set.reset_peak()
    resident = {"built": resident_set.now()}
    for part, data in {"first_step": batch, "later_steps": several}.items():
        step_time.fit(model, *data, args.batch)
        resident[part] = resident_set.peak()
        resident_set.reset_peak()
    step = functools.partial(step_time.fit, model, *batch, args.batch)
    live = [probes.live_bytes(model, step) for _ in range(args.steps + 1)]
    return {
        "resident": resident,
        "live": None if None in live else live,
        "planned": probes.planned_memory(model, *batch),
    }


def rows(result: dict):
    """The table: a row for each method."""
    for name, row in result["methods"].items():
        resident, live, plan = row["resident"], row["live"], row["planned"]
        built = resident["built"]
        planned = plan and (
            plan["arguments"] + plan["outputs"] - plan["alias"] + plan["temporary"]
        )
        found = {
            "resident at most": resident["later_steps"],
            "above the built model": built and resident["later_steps"] - built,
            "first step above it": built and resident["first_step"] - built,
            "in use at most": live and max(live),
            "mean step": live and statistics.fmean(live),
            "planned, temporary": plan and plan["temporary"],
            "planned, in all": planned,
        }
        found = {f"{k}, MB": cells.megabytes(v, 1) for k, v in found.items()}
        yield {"method": name, **found}
