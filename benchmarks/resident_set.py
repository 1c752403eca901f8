"""The resident set of this process, as Linux counts it."""

import ctypes
import pathlib

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def now() -> int | None:
    """Returns the bytes that are resident now, or `None` if the system does not say."""
    return _read("VmRSS")


def peak() -> int | None:
    """Returns the most bytes that were resident at one time since `reset_peak`."""
    return _read("VmHWM")


def reset_peak() -> None:
    """Resets `peak` to the memory in use.

    glibc returns freed memory between blocks in use only on request. After a
    compilation this can be more memory than a step needs.
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
