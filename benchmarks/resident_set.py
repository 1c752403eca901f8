"""The memory that a process holds, as Linux counts it."""

import ctypes
import pathlib

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def now() -> int | None:
    """Bytes that are resident now; `None` where the system does not tell."""
    return _read("VmRSS")


def peak() -> int | None:
    """The most bytes that were resident at a time since `reset_peak`."""
    return _read("VmHWM")


def reset_peak() -> None:
    """Lets `peak` start again, at what is in use.

    glibc returns freed memory between blocks in use only when asked to: after a
    compilation that can be more than a step takes.
    """
    if _STATUS.exists():
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
        _CLEAR.write_text("5")


def _read(name):
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(found[name].split()[0])
