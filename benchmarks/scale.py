"""The command `scale`: how a sparse step changes as the model gets deeper.

For narrow encoders like BERT with several depths, it measures the step time of SL-SAM
divided by that of SAM, the number of conditions in the traced program, the seconds of
tracing and compilation, and the memory.
"""

import argparse

import numpy as np

from benchmarks import cells
from benchmarks import memory
from benchmarks import models
from benchmarks import probes
from benchmarks import step_time

DENSE, SPARSE = "SAM", "SL-SAM"
ENCODER = {"model": "bert", "width": 64, "batch": 8, "length": 32}
# The columns of seconds: the method and the part of its first call.
SECONDS = {
    "first call, s": (SPARSE, "first_call"),
    "trace, s": (SPARSE, "trace"),
    "compile, s": (SPARSE, "compile"),
    "first call of SAM, s": (DENSE, "first_call"),
}


def measure(args: argparse.Namespace) -> dict:
    """Measures each depth. Returns a list of rows."""
    return {"rows": [_row(depth, args) for depth in args.depths]}


def _row(depth, args):
    own = {"layers": depth, "flop_steps": 0, "methods": [DENSE, SPARSE]}
    args = argparse.Namespace(**{**vars(args), **ENCODER, **own})
    prepared = {name: models.prepare(name, args) for name in args.methods}
    timed = step_time.of_models(prepared, args)
    batch = models.data(args, args.batch)
    return {
        "layers": depth,
        "arms": timed[SPARSE]["arms"],
        "ratio": step_time.ratio(timed[SPARSE], timed[DENSE]),
        "conditions": probes.conditions(prepared[SPARSE], *batch),
        "times": timed,
        "memory": memory.measure(args)["methods"],
    }


def power(depths: list[int], seconds: list) -> float | None:
    """Returns the power of the depth with which seconds grow, `None` if unknown."""
    if len(depths) < 2 or not all(seconds):
        return None
    return float(np.polyfit(np.log(depths), np.log(seconds), 1)[0])


def rows(result: dict):
    """Yields a row for each depth, and one for the power of the depth (1 is linear)."""
    seconds = {
        column: [row["times"][name][part] for row in result["rows"]]
        for column, (name, part) in SECONDS.items()
    }
    for i, row in enumerate(result["rows"]):
        resident = {k: v["resident"]["later_steps"] for k, v in row["memory"].items()}
        cells_of_depth = {
            "layers": str(row["layers"]),
            "arms": str(row["arms"]),
            "SL-SAM / SAM": cells.ratio(row["ratio"]),
            "conditions": cells.number(row["conditions"]),
            **{k: cells.number(found[i], 1) for k, found in seconds.items()},
            "resident, MB": cells.number(resident[SPARSE], 0, 1e6),
            "of SAM, MB": cells.number(resident[DENSE], 0, 1e6),
        }
        yield cells_of_depth
    depths = [row["layers"] for row in result["rows"]]
    powers = {k: cells.number(power(depths, found), 2) for k, found in seconds.items()}
    yield {**dict.fromkeys(cells_of_depth, "-"), "layers": "power", **powers}
