"""The command `memory`: what each method holds, in a process of its own."""

import argparse
import json
import os
import statistics
import subprocess
import sys

# A block of this size or more is a mapping of its own, which goes back to the system as
# soon as it is freed: so the resident set follows what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(args: argparse.Namespace) -> dict:
    """The memory of each method, see `peak_memory.measure`."""
    return {"methods": {name: of_method(name, args) for name in args.methods}}


def of_method(name: str, args: argparse.Namespace) -> dict:
    """The memory of one method, measured in a new process.

    Raises:
        RuntimeError: if the process fails.
    """
    print(f"memory of {name}", file=sys.stderr, flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_TOP_PAD_"}
    flags = {k: v for k, v in vars(args).items() if k != "json"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak_memory", name, json.dumps(flags)],
        env={**environment, **MALLOC},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"The process of {name!r} ended with {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def lines(result: dict) -> list[str]:
    """The result as text."""
    text = [
        "megabytes         built  first step  later steps   minus built"
        "      in use  mean step"
    ]
    for name, row in result["methods"].items():
        resident = row["resident"]
        above = None
        if resident["built"] is not None:
            above = resident["later_steps"] - resident["built"]
        live = row["live"]
        tensors = (max(live), statistics.fmean(live)) if live else (None, None)
        values = [*resident.values(), above, *tensors]
        cells = ["-" if v is None else f"{v / 1e6:.1f}" for v in values]
        text.append(f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells))
        if row["planned"]:
            plan = (f"{k} {v / 1e6:.1f}" for k, v in row["planned"].items())
            text.append(f"{'':<14}planned: " + ", ".join(plan))
    return text
