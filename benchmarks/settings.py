"""What a result was measured with: machine, versions, command."""

import argparse
import os
import pathlib
import platform
import sys

import keras
import numpy as np

import keras_slsam
from benchmarks import probes


def of_run(args: argparse.Namespace) -> dict:
    """The part of a result that says how it came about."""
    backend = keras.config.backend()
    flags = {name: value for name, value in vars(args).items() if name != "json"}
    frameworks = {name: sys.modules.get(name) for name in ("keras_hub", backend)}
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
            "keras": keras.__version__,
            "numpy": np.__version__,
            **{name: m.__version__ for name, m in frameworks.items() if m},
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
