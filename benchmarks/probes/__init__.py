"""What is measured in a framework's own way, one file per backend.

- `TRACES`: whether a step is traced and compiled.
- `device()`: the name of the device that computes.
- `step_flops(model, x, y)`: takes steps of the model, and yields the FLOPs of each.
- `conditions(model, x, y)`: the number of conditions in the traced step.
- `planned_memory(model, x, y)`: bytes that the compiled step plans for.
- `live_bytes(model, step)`: the most bytes of tensors during `step()`.
- `num_tensors()`: how many tensors are alive.

What a backend's file lacks, its framework does not tell: the answer is `None`.
"""

import importlib
import typing

import keras

_backend: typing.Any = importlib.import_module(
    f"benchmarks.probes.{keras.config.backend()}"
)


def _unknown(*args):
    return None


TRACES = _backend.TRACES
device = _backend.device
step_flops = _backend.step_flops
conditions = getattr(_backend, "conditions", _unknown)
planned_memory = getattr(_backend, "planned_memory", _unknown)
live_bytes = getattr(_backend, "live_bytes", _unknown)
num_tensors = getattr(_backend, "num_tensors", _unknown)
