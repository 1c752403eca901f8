"""A separate process for a method, and the resident set of this process."""

import argparse
import concurrent.futures
import ctypes
import multiprocessing
import os
import pathlib
import re
import sys
from unittest import mock

_STATUS = pathlib.Path("/proc/self/status")


def separate(function, name: str, args: argparse.Namespace, **environment):
    """Returns the result of `function(name, args)`, called in a new process.

    The process starts with the environment variables that are given as keywords.
    """
    print(f"{function.__module__} of {name}", file=sys.stderr, flush=True)
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as processes:
            return processes.submit(function, name, args).result()


def resident(entry: str) -> int | None:
    """Returns the bytes of an entry in Linux's status of this process.

    `"VmRSS"` is what is resident now, and `"VmHWM"` its peak since `reset_peak`.
    """
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{entry}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1])


def reset_peak() -> None:
    """Resets the peak to the memory in use.

    glibc returns freed memory between blocks in use only on request. After a
    compilation this can be more memory than a step needs.
    """
    if _STATUS.exists():
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
