"""Measures one method in a separate process.

    python -m benchmarks.alone MODULE METHOD FLAGS

FLAGS are the flags of the runner as JSON. The last printed line is the result as JSON.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys


def measure(module: str, name: str, args: argparse.Namespace, **environment) -> dict:
    """Calls `benchmarks.MODULE.of_method(name, args)` in a new process.

    Args:
        module: The module's name.
        name: The method's name.
        args: The flags.
        **environment: Environment variables of the process.

    Returns:
        The dict that the call returned.

    Raises:
        RuntimeError: if the process fails.
    """
    print(f"{module} of {name}", file=sys.stderr, flush=True)
    flags = json.dumps({k: v for k, v in vars(args).items() if k != "json"})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.alone", module, name, flags],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"The process of {name!r} failed with exit code {done.returncode}."
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name, flags = sys.argv[1:]
    of_method = importlib.import_module(f"benchmarks.{module}").of_method
    print(json.dumps(of_method(name, argparse.Namespace(**json.loads(flags)))))
