"""Starts the program in two processes on this machine, unless it is one of several.

Import this before Keras, in a program only. The first process waits for the two, and
exits. Each of the two has these variables:

- `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`: as `torchrun` sets them. JAX gets
  them as arguments.
- `LOCAL_RANK`, `LOCAL_WORLD_SIZE`: the number of the process, and of processes, on this
  machine.
- `TF_CONFIG`: the addresses of all processes, for TensorFlow.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys

PROCESSES = 2


def start():
    """Starts the processes, and returns whether one failed."""
    with contextlib.ExitStack() as stack:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(PROCESSES)]
        ports = [stack.enter_context(each).getsockname()[1] for each in servers]
    workers, running = [f"127.0.0.1:{port}" for port in ports], []
    for rank in range(PROCESSES):
        task = {"type": "worker", "index": rank}
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(PROCESSES),
            "LOCAL_WORLD_SIZE": str(PROCESSES),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(ports[0]),
            "TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task}),
        }
        command = [sys.executable, *sys.argv]
        running.append(subprocess.Popen(command, env={**os.environ, **variables}))
    codes = [each.wait() for each in running]
    return any(codes)


if "RANK" not in os.environ:
    sys.exit(start())
