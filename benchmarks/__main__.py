"""The runner. On each backend: `KERAS_BACKEND=jax python -m benchmarks COMMAND`.

time      seconds per step of each method, executed FLOPs, seconds of the first call
memory    the memory of each method, each in a separate process
scale     6 to 48 layers: time, conditions, compilation, memory
long      thousands of steps: whether memory and step time stay flat, the arms drawn
gpu       tests, time, memory and the cost of conditions, on all backends at once
report    writes the tables and the picture of docs/benchmarks.md from --json files
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import sys

# By default glibc returns large blocks to the system in each step and pages them in
# again. That costs more than some of the differences measured here. glibc reads these
# settings when the process starts.
KEPT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
MALLOC = dict.fromkeys(KEPT, "4294967296")
if os.environ.get("KERAS_BACKEND") == "jax":
    # glibc never keeps blocks as large as XLA's in the arenas of other threads.
    MALLOC["MALLOC_ARENA_MAX"] = "1"


def main(argv: list[str]) -> None:
    """Runs the command in `argv` with its flags."""
    from benchmarks import gpu
    from benchmarks import models
    from benchmarks import report

    runner = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = runner.add_subparsers(dest="command", required=True)
    for name in ("time", "memory", "scale", "long"):
        add = commands.add_parser(name, allow_abbrev=False).add_argument
        add("--active-fraction", type=float, default=0.2)
        add("--rounds", type=_count, default=5, help="timed rounds")
        steps = 20_000 if name == "long" else 5
        add("--steps", type=_count, default=steps, help="timed steps of each round")
        add("--jit-compile", choices=("auto", "yes", "no"), default="auto")
        add("--seed", type=int, default=0)
        add("--json", type=pathlib.Path, help="also write the result to this file")
        if name in ("time", "memory"):
            add("--model", choices=models.MODELS, default="minilm")
            add("--batch", type=_count, default=32)
            add("--length", type=_count, help="tokens of a text, or pixels of a side")
            add("--layers", type=_count, help="for bert and dense")
            add("--width", type=_count, help="for bert and dense")
            every = list(models.METHODS)
            usual = [name for name in every if name not in models.OPTIONAL]
            add("--methods", nargs="+", choices=every, default=usual, metavar="METHOD")
        if name == "time":
            add("--flop-steps", type=int, default=3, help="steps whose FLOPs to count")
            add("--alone", action="store_true", help="use a process for each method")
        if name == "scale":
            depths = [6, 12, 24, 48]
            add("--depths", type=_count, nargs="+", default=depths, help="layers")
    commands.add_parser("report").add_argument("files", nargs="+", type=pathlib.Path)
    every = list(report.BACKENDS)
    add = commands.add_parser(
        "gpu", help="other flags are passed on", allow_abbrev=False
    ).add_argument
    add("--backends", nargs="+", choices=every, default=every)
    add("--folder", type=pathlib.Path, default=pathlib.Path("gpu"))
    add("--minutes", type=float, default=10.0, help="the time for everything")
    args, others = runner.parse_known_args(argv)
    if args.command == "gpu":
        results, good = gpu.measure(args, others)
        for name in ("time", "memory"):
            if found := [r for r in results if r["command"] == name]:
                print(report.section(found))
        sys.exit(not good)
    if others:
        runner.error(f"unrecognized arguments: {shlex.join(others)}")
    if args.command == "report":
        report.write(args.files)
        return
    if "model" in args:
        models.set_sizes(args)
    measured = report.COMMANDS[args.command].measure(args)
    line = re.sub(r" --json[= ]\S+", "", shlex.join(argv))
    result = {
        "command": args.command,
        "line": f"python -m benchmarks {line}",
        **report.origin(args),
        "result": measured,
    }
    print(report.tables([result]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _count(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {number}")
    return number


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        again = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **MALLOC})
    main(sys.argv[1:])
