"""The command `gpu`: correctness, time, memory and the cost of conditions, at once.

For a machine with a GPU that is there for a short time. Each measurement is a separate
process, on the device that the backend chooses. The most important ones come first.
"""

import argparse
import itertools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

# In float32 proper. Some GPUs round the factors of products to TensorFloat-32.
PRECISE = {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
TEST = pathlib.Path(__file__).parents[1] / "tests" / "test_golden.py"
SHORT = "--rounds 3 --steps 5"
MEASUREMENTS = {
    "time": f"time {SHORT} --flop-steps 0",
    # What differs from SAM is the cost of the conditions, and of drawing the arms.
    "conditions": f"time {SHORT} --flop-steps 0 "
    "--methods SAM 'SL-SAM, every arm' 'SL-SAM block, every arm'",
    "memory": "memory --steps 2",
}


def measure(args: argparse.Namespace, flags: list[str]) -> tuple[list[dict], bool]:
    """Runs everything on each backend, until the time is over.

    Args:
        args: The flags of this command.
        flags: More flags for the measurements, such as `["--model", "dense"]`.

    Returns:
        Tuple of the list of the measurements' results, and whether all tests passed
        and no measurement failed.
    """
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    files, good = [], []
    for backend in args.backends:
        test = ["pytest", "-q", str(TEST)]
        ended = _run(f"test on {backend}", test, backend, end, **PRECISE)
        good.append(ended == "done")
    pairs = list(itertools.product(MEASUREMENTS, args.backends))
    for name, backend in pairs:
        file = args.folder / f"{backend}-{name}.json"
        file.unlink(missing_ok=True)
        line = shlex.split(MEASUREMENTS[name])
        command = ["benchmarks", *line, *flags, "--json", str(file)]
        last = (name, backend) == pairs[-1]
        ended = _run(f"{name} on {backend}", command, backend, end, last)
        good.append(ended != "FAILED")
        files += [file] if file.exists() else []
    return [json.loads(file.read_text("utf-8")) for file in files], all(good)


def _run(title, module, backend, end, last=False, **environment):
    """Runs a module. Prints and returns how it ended.

    All but the last one have half of the time that is left, in case one hangs.
    """
    start = time.monotonic()
    if start >= end:
        print(f"{title}: out of time", flush=True)
        return "out of time"
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        env={**os.environ, **environment, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # some measurements start processes of their own
    )
    try:
        output, _ = process.communicate(timeout=(end - start) / (1 if last else 2))
        ended = "FAILED" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        ended = "out of time"
    if ended == "FAILED":
        print(output)
    print(f"{title}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
    return ended
