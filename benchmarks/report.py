"""Prints results as tables, and writes them to docs/benchmarks.md."""

import argparse
import json
import os
import pathlib
import platform
import re
import sys

import keras
import numpy as np

import keras_slsam
from benchmarks import long_run
from benchmarks import memory
from benchmarks import picture
from benchmarks import probes
from benchmarks import scale
from benchmarks import step_time
from benchmarks.cells import markdown

COMMANDS = {"time": step_time, "memory": memory, "scale": scale, "long": long_run}
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks.md"


def origin(args: argparse.Namespace) -> dict:
    """Returns the flags, machine and versions of a measurement."""
    backend = keras.config.backend()
    frameworks = {name: sys.modules.get(name) for name in ("keras_hub", backend)}
    return {
        "backend": backend,
        "flags": {name: value for name, value in vars(args).items() if name != "json"},
        "machine": {
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "device": probes.device(),
        },
        "versions": {
            "python": platform.python_version(),
            "keras-slsam": keras_slsam.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            **{name: m.__version__ for name, m in frameworks.items() if m},
        },
    }


def _processor():
    information = pathlib.Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


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
    for name in COMMANDS:
        found = [result for result in results if result["command"] == name]
        if found:
            text = _fill(text, name, f"{tables(found)}\n\n{_origins(found)}")
        if found and name == "time":
            picture.draw(found, page.with_suffix(".svg"))
    page.write_text(text, "utf-8")


def _fill(text, name, content):
    """Returns the text with `content` between the markers `name`."""
    markers = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = markers.subn(lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text)
    if not count:
        raise SystemExit(f"The page has no marker <!-- {name} --> ... <!-- /{name} -->")
    return text


def tables(results: list[dict]) -> str:
    """Formats the results of one command: a table per setting, with all backends."""
    found = {}
    for result in results:
        rows = COMMANDS[result["command"]].rows(result["result"])
        backend = {"backend": picture.BACKENDS[result["backend"]]}
        of_setting = found.setdefault(picture.setting(result["flags"]), [])
        of_setting.extend({**backend, **row} for row in rows)
    titled = (f"{title}:\n\n{markdown(rows)}" for title, rows in found.items())
    return "\n\n".join(titled)


def _origins(results):
    """Formats the commands that were run, their machines and versions as a table."""
    machine = "{processor}, {cpus} CPUs, on {device}"
    return markdown(
        [
            {
                "command": f"`KERAS_BACKEND={result['backend']} {result['line']}`",
                "machine": machine.format(**result["machine"]),
                "versions": ", ".join(map(" ".join, result["versions"].items())),
            }
            for result in results
        ]
    )
