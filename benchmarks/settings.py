"""What a result was measured with: machine, versions, command."""

import argparse
import importlib.metadata
import os
import pathlib
import platform

import keras

import keras_slsam
from benchmarks import probes


def of_run(args: argparse.Namespace) -> dict:
    """The part of a result that says how it came about."""
    backend = keras.config.backend()
    flags = {name: value for name, value in vars(args).items() if name != "json"}
    names = ("keras", "keras-hub", "numpy", backend)
    return {
        "backend": backend,
        "machine": {
            "processor": _processor(),
            "cpus": _cpus(),
            "device": probes.device(),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "keras-slsam": keras_slsam.__version__,
            **{name: importlib.metadata.version(name) for name in names},
        },
        "flags": flags,
    }


def _processor():
    """The processor's name."""
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpus():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
