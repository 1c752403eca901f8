"""Measurements that use a framework's API, one file per backend.

- `TRACES`: whether a step is traced and compiled.
- `device()`: the name of the device that computes.
- `step_flops(model, x, y)`: takes steps of the model, and yields the FLOPs of each.
- `conditions(model, x, y)`: the number of conditions in the traced step.
- `planned_memory(model, x, y)`: the bytes that the compiled step plans for.
- `live_bytes(model, step)`: the most bytes of live tensors during `step()`.
- `num_tensors()`: the number of live tensors.

If a framework does not provide a measurement, its file lacks the function, which then
returns `None`.
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
