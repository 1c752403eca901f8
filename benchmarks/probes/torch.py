"""Measurements on PyTorch."""

import gc
import weakref

import torch

# These are what `torch.utils.flop_counter` uses, but have no public names.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.work.torch import executed_flops


def device():
    """Returns the name of the device that computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


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
        live.see([v.value for v in model.variables + model.optimizer.variables])
        step()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that operations read and return.

    Each storage counts once, from the first operation that uses it until it is freed.
    """

    def __init__(self):
        super().__init__()
        self.peak = self._live = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.see((args, kwargs, results))
        return results

    def see(self, values):
        for value in filter(torch.is_tensor, tree_leaves(values)):
            storage = value.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, size):
        self._live += size
        self.peak = max(self.peak, self._live)


def num_tensors():
    """Returns the number of tensors that Python holds."""
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())
