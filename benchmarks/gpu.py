"""The command `gpu`: correctness, time, memory and the cost of conditions, at once.

For a machine with a GPU that is there for a short time. Each measurement is a separate
process, on the device that the backend chooses. The most important ones come first.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

# In float32 proper. Some GPUs round the factors of products to TensorFloat-32.
PRECISE = {"NVIDIA_TF32_OVERRIDE": "0"}
TEST = pathlib.Path(__file__).parents[1] / "tests" / "test_golden.py"
SHORT = "--rounds 3 --steps 5"
MEASUREMENTS = {
    "time": f"time {SHORT} --flop-steps 0",
    # All arms are active, so what differs from SAM is the cost of the conditions.
    "conditions": f"time {SHORT} --flop-steps 0 --active-fraction 1 "
    "--methods SAM SL-SAM 'SL-SAM block'",
    "memory": "memory --steps 2",
}


def measure(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """Runs everything on each backend, until the time is over.

    Args:
        args: The flags of this command.
        flags: More flags for the measurements, such as `["--model", "dense"]`.

    Returns:
        List of the results of the measurements.
    """
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for backend in args.backends:
        _run(f"test on {backend}", ["pytest", "-q", str(TEST)], backend, end, **PRECISE)
    files = []
    for name, line in MEASUREMENTS.items():
        for backend in args.backends:
            file = args.folder / f"{backend}-{name}.json"
            file.unlink(missing_ok=True)
            command = ["benchmarks", *shlex.split(line), *flags, "--json", str(file)]
            _run(f"{name} on {backend}", command, backend, end)
            files += [file] if file.exists() else []
    return [json.loads(file.read_text("utf-8")) for file in files]


def _run(title, module, backend, end, **environment):
    """Runs a module, and prints how it ended."""
    start = time.monotonic()
    try:
        found = subprocess.run(
            [sys.executable, "-m", *module],
            env={**os.environ, **environment, "KERAS_BACKEND": backend},
            timeout=max(end - start, 0.0),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        last = found.stdout.strip().splitlines()[-1:]
        ended = "done" if found.returncode == 0 else "FAILED"
        ended = f"{ended}: {last[0]}" if last and module[0] == "pytest" else ended
        if found.returncode:
            print(found.stdout)
    except subprocess.TimeoutExpired:
        ended = "out of time"
    print(f"{title}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
