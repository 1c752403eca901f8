"""Prints results as tables, and writes them and a picture to docs/benchmarks.md."""

import argparse
import json
import os
import pathlib
import platform
import re
import sys

import keras

import keras_slsam
from benchmarks import long_run
from benchmarks import memory
from benchmarks import models
from benchmarks import probes
from benchmarks import scale
from benchmarks import step_time
from benchmarks.cells import markdown
from keras_slsam.analysis.plots import color_of

COMMANDS = {"time": step_time, "memory": memory, "scale": scale, "long": long_run}
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks.md"


def origin(args: argparse.Namespace) -> dict:
    """Returns the backend, flags, machine and versions of a measurement."""
    backend = keras.config.backend()
    packages = map(sys.modules.get, ("keras", "numpy", "keras_hub", backend))
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "backend": backend,
        "flags": {name: value for name, value in vars(args).items() if name != "json"},
        "machine": {
            "processor": model[1] if model else platform.machine(),
            "cpus": os.cpu_count(),
            "device": probes.device(),
        },
        "versions": {
            "python": platform.python_version(),
            "keras-slsam": keras_slsam.__version__,
            **{m.__name__: m.__version__ for m in packages if m},
        },
    }


def write(files: list[pathlib.Path], page: pathlib.Path = PAGE) -> None:
    """Writes results into a page, and draws a picture of the results of `time`.

    The page has markers `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is a command.
    The text between them is replaced if there are results of this command.

    Args:
        files: Files that the commands wrote with `--json`, on any backend.
        page: The page in Markdown. The picture has its name with the suffix `.svg`.

    Raises:
        SystemExit: if the page lacks a marker.
    """
    results = [json.loads(file.read_text("utf-8")) for file in files]
    text = page.read_text("utf-8")
    for name in dict.fromkeys(result["command"] for result in results):
        found = [result for result in results if result["command"] == name]
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise SystemExit(f"The page has no <!-- {name} --> and <!-- /{name} -->.")
        text = "\n\n".join([before + start, section(found), end + after])
        if name == "time":
            _draw(found, page.with_suffix(".svg"))
    page.write_text(text, "utf-8")


def section(results: list[dict]) -> str:
    """Formats the results of one command, and where they come from."""
    return f"{tables(results)}\n\n{_origins(results)}"


def tables(results: list[dict]) -> str:
    """Formats the results of one command: a table per setting, with all backends."""
    found = []
    for title, shown in _by_setting(results).items():
        rows = [
            {"backend": BACKENDS[result["backend"]], **row}
            for result in shown
            for row in COMMANDS[result["command"]].rows(result["result"])
        ]
        found.append(f"{title}:\n\n{markdown(rows)}")
    return "\n\n".join(found)


def _by_setting(results):
    """Groups results by the model with its sizes, and what else tells them apart."""
    found = {}
    for result in results:
        flags, parts = result["flags"], []
        if "model" in flags:
            length = f" x {flags['length']}" if flags["length"] else ""
            layers = f"{flags['layers']} x {flags['width']}" if flags["layers"] else ""
            title = models.MODELS[flags["model"]].title
            parts = [title, layers, f"batch {flags['batch']}{length}"]
        compiled = {"auto": "", "yes": "XLA", "no": "not compiled"}
        alone = "each method in a separate process" if flags.get("alone") else ""
        parts.append(f"active fraction {flags['active_fraction']}")
        parts += [compiled[flags["jit_compile"]], alone]
        found.setdefault(", ".join(filter(None, parts)), []).append(result)
    return found


def _origins(results):
    """Formats the commands that were run, their machines and versions as a table."""
    machine = "{processor}, {cpus} CPUs, on {device}"
    rows = [
        {
            "command": f"`KERAS_BACKEND={result['backend']} {result['line']}`",
            "machine": machine.format(**result["machine"]),
            "versions": ", ".join(map(" ".join, result["versions"].items())),
        }
        for result in results
    ]
    return markdown(rows)


def _draw(timed, file):
    """Draws the ratios in results of `time`, with their standard errors."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = _by_setting(timed)
    figure = Figure(figsize=(8, 3.2 * len(settings)), layout="tight")
    axes = figure.subplots(len(settings), squeeze=False)
    for (title, shown), axis in zip(settings.items(), axes.flat):
        found = {method for result in shown for method in result["result"]["methods"]}
        names = [method for method in models.METHODS if method in found - {"AdamW"}]
        width = 0.8 / len(shown)
        for i, result in enumerate(shown):
            ratios = [result["result"]["ratios"].get(f"{m} / AdamW") for m in names]
            known = [k for k, ratio in enumerate(ratios) if ratio]
            axis.bar(
                [k + (i - (len(shown) - 1) / 2) * width for k in known],
                [ratios[k]["of_means"] for k in known],
                width,
                yerr=[ratios[k]["standard_error"] or 0.0 for k in known],
                label=BACKENDS[result["backend"]],
                color=color_of(result["backend"]),
                edgecolor="black",
                linewidth=0.5,
            )
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel("step time / AdamW's")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=8)
    # The same results must give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
