"""Measurements on PyTorch."""

import gc
import weakref

import torch

# These are what `torch.utils.flop_counter` uses, but have no public names.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def device():
    """Returns the name of the device that computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def device_peak():
    """Returns the most bytes that were allocated on a GPU, `None` on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def executed_flops(fn, *args):
    """Returns the FLOPs of the matrix products and convolutions in `fn(*args)`."""
    with FlopCounterMode(display=False) as counter:
        fn(*args)
    return counter.get_total_flops()


def step_flops(model, x, y):
    """Takes steps of the model, and yields the FLOPs of each."""
    while True:
        yield executed_flops(
            lambda: model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)
        )


def live_bytes(model, step):
    """Returns the most bytes of tensors that are alive at one time during `step()`.

    They include the weights and the optimizer's variables. They do not include
    temporary memory inside an operation.
    """
    with _LiveBytes() as live:
        variables = model.variables + model.optimizer.variables
        live.see([variable.value for variable in variables])
        step()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the storages of the tensors that operations read and return."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.see((args, kwargs, results))
        return results

    def see(self, values):
        tensors = filter(torch.is_tensor, tree_leaves(values))
        self._storages.update(tensor.untyped_storage() for tensor in tensors)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._storages))


def num_tensors():
    """Returns the number of tensors that Python holds."""
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())
