"""What is measured in a framework's own way, with the same names in each file.

- `device()`: the name of the device that computes.
- `StepFlops(model)(x, y)`: FLOPs of the model's next step, which is taken.
- `conditions(model, x, y)`: the number of conditions in the traced step.
- `planned_memory(model, x, y)`: bytes that the compiled step plans for.
- `live_bytes(variables, steps)`: the most bytes of tensors during each step.
- `runner(function, arguments, wanted, cotangent, jit_compile)`: a pure function and
  some of its gradients, ready to be timed.
- `update_runner(optimizer, variables, gradients, jit_compile)`: an update, ready to be
  timed.

What a framework does not tell is `None`.
"""

import importlib
import typing

import keras

_backend: typing.Any = importlib.import_module(
    f"benchmarks.probes.{keras.config.backend()}"
)

TRACES = _backend.TRACES
StepFlops = _backend.StepFlops
conditions = _backend.conditions
device = _backend.device
live_bytes = _backend.live_bytes
planned_memory = _backend.planned_memory
runner = _backend.runner
update_runner = _backend.update_runner
