"""The command `scale`: what becomes of a sparse step as the model gets deeper.

An encoder like BERT of a small width, at several depths: the ratio of the step times of
SL-SAM and SAM, the conditions in the traced program, the seconds of tracing and
compiling, the memory.
"""

import argparse

import numpy as np

from benchmarks import memory
from benchmarks import methods
from benchmarks import models
from benchmarks import probes
from benchmarks import step_time

DENSE, SPARSE = "SAM", "SL-SAM"
MODEL, WIDTH, BATCH, LENGTH = "bert", 64, 8, 32


def measure(args: argparse.Namespace) -> dict:
    """Measures each depth: a list of rows, and how each method's seconds grow."""
    rows = [_row(depth, args) for depth in args.depths]
    growth = {name: exponents(rows, name) for name in (DENSE, SPARSE)}
    return {"rows": rows, "exponents": growth}


def _row(depth, args):
    args = argparse.Namespace(
        **{
            **vars(args),
            "model": MODEL,
            "layers": depth,
            "width": WIDTH,
            "length": LENGTH,
            "batch": BATCH,
            "flop_steps": 0,
        }
    )
    prepared = {name: methods.prepare(name, args) for name in (DENSE, SPARSE)}
    timed = step_time.of_models(prepared, args)
    batch = models.data(args, args.batch)
    sparse = timed["methods"][SPARSE]
    return {
        "layers": depth,
        "arms": sparse["arms"],
        "ratio": timed["ratios"][f"{SPARSE} / {DENSE}"],
        "conditions": probes.conditions(prepared[SPARSE], *batch),
        "times": {
            name: {part: row[part] for part in ("first_call", "trace", "compile")}
            for name, row in timed["methods"].items()
        },
        "memory": {name: memory.of_method(name, args) for name in (DENSE, SPARSE)},
    }


def exponents(rows: list[dict], method: str) -> dict:
    """The powers of the depth with which a method's first call grows.

    1 is linear; `None` where there is nothing to tell.
    """
    depths = [row["layers"] for row in rows]
    found = {}
    for part in ("first_call", "trace", "compile"):
        seconds = [row["times"][method][part] for row in rows]
        known = len(rows) > 1 and all(seconds)
        found[part] = (
            float(np.polyfit(np.log(depths), np.log(seconds), 1)[0]) if known else None
        )
    return found


def lines(result: dict) -> list[str]:
    """The result as text."""
    text = [
        "layers  arms  SL-SAM / SAM  conditions  trace, s  compile, s  resident, MB"
    ]
    for row in result["rows"]:
        times = row["times"][SPARSE]
        resident = row["memory"][SPARSE]["resident"]["later_steps"]
        cells = [
            "-" if value is None else f"{value:{form}}"
            for value, form in [
                (row["ratio"]["of_means"], ".3f"),
                (row["conditions"], "d"),
                (times["trace"], ".1f"),
                (times["compile"], ".1f"),
                (resident and resident / 1e6, ".0f"),
            ]
        ]
        text.append(
            f"{row['layers']:>6} {row['arms']:>5} {cells[0]:>13} {cells[1]:>11} "
            f"{cells[2]:>9} {cells[3]:>11} {cells[4]:>13}"
        )
    return text + growth(result)


def growth(result: dict) -> list[str]:
    """How the seconds of the first call grow with the depth, a line a method."""
    text = []
    for name, powers in result["exponents"].items():
        known = [f"{p.replace('_', ' ')} {n:.2f}" for p, n in powers.items() if n]
        if known:
            text.append(
                f"{name} grows with the depth to the power of {', '.join(known)}"
            )
    return text
