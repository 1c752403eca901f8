"""The runner. On each backend: `KERAS_BACKEND=jax python -m benchmarks COMMAND`.

time      seconds a step of each method, executed FLOPs, seconds of the first call
memory    what each method holds, each in a process of its own
cost      what forward, backward passes and update cost by kind of layer, and what
          a step of each method should cost by that
scale     6 to 48 layers: time, conditions, compilation, memory
long      thousands of steps: whether memory and step time stay flat, arms drawn
report    writes docs/benchmarks.md's tables and picture from the files of --json
"""

import argparse
import importlib
import json
import os
import pathlib
import shlex
import sys

# glibc gives large blocks back to the system at each step and pages them in again,
# which costs more than some of the differences measured here. Read at process start.
MALLOC = dict.fromkeys(
    ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"),
    "4294967296",
)
if os.environ.get("KERAS_BACKEND") == "jax":
    # It never keeps blocks as large as XLA's in the arenas of other threads.
    MALLOC["MALLOC_ARENA_MAX"] = "1"
DOCS = pathlib.Path(__file__).parents[1] / "docs"
COMMANDS = {
    "time": "step_time",
    "memory": "memory",
    "cost": "cost",
    "scale": "scale",
    "long": "long_run",
}


def parser() -> argparse.ArgumentParser:
    """The flags: what all commands share, and each command's own."""
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--active-fraction", type=float, default=0.2)
    add("--rounds", type=_count, default=5, help="timed rounds")
    add("--steps", type=_count, default=5, help="timed steps a round")
    add("--jit-compile", choices=("auto", "yes", "no"), default="auto")
    add("--seed", type=int, default=0)
    add("--json", type=pathlib.Path, metavar="FILE", help="write the result there too")

    model = argparse.ArgumentParser(add_help=False)
    add = model.add_argument
    models = ("minilm", "bert", "efficientnet", "dense")
    add("--model", choices=models, default="minilm")
    add("--batch", type=_count, default=32)
    add("--length", type=_count, help="tokens of a text, pixels of an image's side")
    add("--layers", type=_count, help="of bert and dense")
    add("--width", type=_count, help="of bert and dense")
    add("--methods", nargs="+", help="of the methods in benchmarks/methods.py")

    runner = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = runner.add_subparsers(dest="command", required=True)
    of = {
        name: commands.add_parser(name, parents=parents, allow_abbrev=False)
        for name, parents in {
            "time": [model, shared],
            "memory": [model, shared],
            "cost": [model, shared],
            "scale": [shared],
            "long": [shared],
            "report": [],
        }.items()
    }
    of["time"].add_argument(
        "--flop-steps", type=int, default=3, help="steps whose FLOPs are counted"
    )
    of["scale"].add_argument(
        "--depths", type=_count, nargs="+", default=[6, 12, 24, 48], help="layers"
    )
    of["long"].set_defaults(steps=20_000)
    add = of["report"].add_argument
    add("files", nargs="+", type=pathlib.Path, metavar="FILE")
    add("--page", type=pathlib.Path, default=DOCS / "benchmarks.md")
    add("--picture", type=pathlib.Path, default=DOCS / "benchmarks.svg")
    return runner


def _count(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def main(argv: list[str]) -> None:
    """Runs a command.

    Args:
        argv: The command and its flags.
    """
    args = parser().parse_args(argv)
    if args.command == "report":
        from benchmarks import report

        report.write(args.files, args.page, args.picture)
        return

    from benchmarks import methods
    from benchmarks import models
    from benchmarks import settings

    if "model" in args:
        args.methods = methods.chosen(args.methods)
        args = models.with_sizes(args)
    command = importlib.import_module(f"benchmarks.{COMMANDS[args.command]}")
    measured = command.measure(args)
    result = {
        "command": args.command,
        "line": f"python -m benchmarks {shlex.join(_without_json(argv))}",
        **settings.of_run(args),
        "result": measured,
    }
    print("\n".join(command.lines(result["result"])))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _without_json(argv):
    """The flags without where the result goes, which does not change it."""
    flags = iter(argv)
    for flag in flags:
        if flag == "--json":
            next(flags)
        elif not flag.startswith("--json="):
            yield flag


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    settled = all(os.environ.get(name) == value for name, value in MALLOC.items())
    if sys.platform == "linux" and not settled:
        again = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **MALLOC})
    main(sys.argv[1:])
