"""The memory that a process holds, as Linux counts it."""

import ctypes
import pathlib

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def now() -> int | None:
    """Bytes that are resident now; `None` where the system does not tell."""
    return _read("VmRSS")


def peak() -> int | None:
    """The most bytes that were resident at a time, since `reset_peak`.

    `ru_maxrss` would be the same but cannot be reset, and begins at what the parent
    process held.
    """
    return _read("VmHWM")


def reset_peak() -> None:
    """Lets `peak` begin anew, at what is in use.

    What was freed between blocks in use, glibc gives back only when asked to: after a
    compilation that can be more than a step takes.

    Raises:
        OSError: if the system tells what is resident, but not since when.
    """
    if _STATUS.exists():
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
        _CLEAR.write_text("5")


def _read(name):
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
