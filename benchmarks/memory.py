"""The command `memory`: the memory of each method, in a separate process."""

import argparse
import functools
import statistics

from benchmarks import cells
from benchmarks import models
from benchmarks import probes
from benchmarks import process
from benchmarks import step_time

# glibc maps each block of this size or more separately, and returns it to the system as
# soon as it is freed. So the resident set follows the memory in use. The pad is glibc's
# default.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "131072",
}


def measure(args: argparse.Namespace) -> dict:
    """Measures the memory of each method, see `of_method`."""
    found = {n: process.separate(of_method, n, args, **MALLOC) for n in args.methods}
    return {"methods": found}


def of_method(name: str, args: argparse.Namespace) -> dict:
    """Trains with a method in this process, and records its memory in bytes.

    `resident` has three entries. `built` is the resident set before the first step,
    with the model. `first_step` is its peak in the first step, with tracing,
    compilation and the optimizer's state. `later_steps` is its peak in the following
    steps. `live` lists the peak of PyTorch's tensors, or of TensorFlow's blocks, in
    each step. `planned` is the memory that JAX's compiled step plans for. `device` is
    the peak of the GPU's allocator in this process, and `None` on a CPU.
    """
    batch = models.data(args, args.batch)
    several = models.data(args, args.batch * (args.steps + 1))
    model = models.prepare(name, args)
    process.reset_peak()
    resident = {"built": process.resident("VmRSS")}
    for part, data in {"first_step": batch, "later_steps": several}.items():
        step_time.fit(model, *data, args.batch)
        resident[part] = process.resident("VmHWM")
        process.reset_peak()
    on_device = probes.device_peak()
    step = functools.partial(step_time.fit, model, *batch, args.batch)
    live = [probes.live_bytes(model, step) for _ in range(args.steps + 1)]
    return {
        "resident": resident,
        "device": on_device,
        "live": None if None in live else live,
        "planned": probes.planned_memory(model, *batch),
    }


def rows(result: dict):
    """Yields the table, a row for each method."""
    for name, row in result["methods"].items():
        resident, live, plan = row["resident"], row["live"], row["planned"]
        built, later = resident["built"], resident["later_steps"]
        passed = plan and plan["arguments"] + plan["outputs"] - plan["alias"]
        found = {
            "resident at most": later,
            "above the built model": built and later - built,
            "first step above it": built and resident["first_step"] - built,
            "on the GPU at most": row["device"],
            "in use at most": live and max(live),
            "mean step": live and statistics.fmean(live),
            "planned, temporary": plan and plan["temporary"],
            "planned, in all": plan and passed + plan["temporary"],
        }
        found = {f"{k}, MB": cells.number(v, 1, 1e6) for k, v in found.items()}
        yield {"method": name, **found}
