"""Measuring on PyTorch."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.work.torch import executed_flops

TRACES = False  # a step runs eagerly


def device():
    """The name of the device that computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


class StepFlops:
    """FLOPs of a model's steps."""

    def __init__(self, model):
        self._model = model

    def __call__(self, x, y):
        """FLOPs of the next step, which is taken."""
        return executed_flops(
            lambda: self._model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)
        )


def conditions(model, x, y):
    """Nothing: a step that runs eagerly has no conditions in it."""
    return None


def planned_memory(model, x, y):
    """Nothing: PyTorch allocates while it runs."""
    return None


def live_bytes(variables, steps):
    """The most bytes of tensors that are alive at a time during each of several steps.

    Args:
        variables: List of `keras.Variable`s that are alive all the time.
        steps: List of functions without arguments.

    Returns:
        List of int.
    """
    peaks = []
    with _LiveBytes() as live:
        for variable in variables:
            live.see(variable.value)
        for step in steps:
            live.reset_peak()
            step()
            peaks.append(live.peak)
    return peaks


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that operations read and make.

    Each storage counts once, from the operation that first sees it until it is freed.
    What an operation allocates for itself is not seen.

    Attributes:
        peak: int, the most bytes that were alive at a time since `reset_peak`.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known = weakref.WeakSet()

    def reset_peak(self):
        self.peak = self._live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        torch.utils._pytree.tree_map_(self.see, (args, kwargs))
        results = function(*args, **kwargs)
        torch.utils._pytree.tree_map_(self.see, results)
        return results

    def see(self, value):
        if not torch.is_tensor(value):
            return
        storage = value.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size):
        self._live -= size


def runner(function, arguments, wanted=(), cotangent=None, jit_compile=False):
    """A function and some of its gradients.

    Args:
        function: Function of a list of tensors.
        arguments: That list.
        wanted: Indices of the arguments to differentiate by.
        cotangent: Gradient of the function's result.
        jit_compile: Ignored, all runs eagerly.

    Returns:
        Function without arguments, which computes both and waits for the end.
    """
    arguments = [tensor.detach().clone() for tensor in arguments]
    for i in wanted:
        arguments[i].requires_grad_()
    chosen = [arguments[i] for i in wanted]

    def run():
        with torch.set_grad_enabled(bool(wanted)):
            result = function(arguments)
        if bool(wanted) and result.requires_grad:
            torch.autograd.grad(result, chosen, cotangent, allow_unused=True)
        _wait()

    return run


def update_runner(optimizer, variables, gradients, jit_compile=False):
    """An optimizer's update; each call makes one.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built for `variables`.
        variables: List of `keras.Variable`s, which move.
        gradients: List of tensors.
        jit_compile: Ignored, all runs eagerly.

    Returns:
        Function without arguments.
    """

    def run():
        with torch.no_grad():
            optimizer.apply(gradients, variables)
        _wait()

    return run


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
