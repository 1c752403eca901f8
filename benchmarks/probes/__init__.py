"""Measurements that use a framework's API, one file per backend.

- `device()`: the name of the device that computes.
- `executed_flops(fn, *args)`: the FLOPs of the products that `fn` really executes.
- `step_flops(model, x, y)`: takes steps of the model, and yields the FLOPs of each.
- `conditions(model, x, y)`: the number of conditions in the traced step.
- `planned_memory(model, x, y)`: the bytes that the compiled step plans for.
- `device_peak()`: the most bytes that were allocated on a GPU.
- `live_bytes(model, step)`: the most bytes of live tensors during `step()`.
- `num_tensors()`: the number of live tensors.

If a framework does not provide a measurement, its file lacks the function, which then
returns `None`.
"""

import importlib

import keras

_backend = importlib.import_module(f"benchmarks.probes.{keras.config.backend()}")


def __getattr__(name):
    """Returns what the backend's file has, or a function that returns `None`."""
    if f"- `{name}(" not in __doc__:
        raise AttributeError(name)
    return getattr(_backend, name, lambda *args: None)
