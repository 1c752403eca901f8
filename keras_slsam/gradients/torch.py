"""Sparse gradients on PyTorch, eager: only the active weights require a gradient.

Autograd then does not compute the other weight gradients, does not keep activations
that only they need, and stops at the lowest active layer.
"""

import keras
import torch

# `torch.autograd.grad` does not apply the thread's modes in the backward pass, where
# recomputation needs them.
from torch.autograd.graph import _engine_run_backward
from torch.nn import attention

from keras_slsam.gradients import passes
from keras_slsam.gradients import torch_modules
from keras_slsam.gradients import torch_prefix
from keras_slsam.gradients import torch_processes
from keras_slsam.gradients.generators import Generators
from keras_slsam.gradients.interface import Backend
from keras_slsam.gradients.interface import NoSecondDerivative


class Passes(passes.Passes):
    """The passes on PyTorch, eager, with a known mask."""

    def __post_init__(self):
        self._wanted = [self.active[arm] for arm in self.arm_of]
        self._own = [variable.value for variable in self.loss_fn.variables]

    def first(self, weights):
        if not self.twice:
            return self._differentiate(weights)
        model = self.loss_fn.model
        self._prefix = torch_prefix.Prefix(model, _device_modules(model))
        with self._prefix.recorded():
            return self._differentiate(weights)

    def second(self, weights):
        with self._prefix.replayed():
            return self._differentiate(weights)

    def _differentiate(self, weights):
        # An inactive weight is the leaf itself, so both passes read the same tensor.
        leaves = [
            w.detach().requires_grad_(on) if on or w.requires_grad else w
            for w, on in zip(weights, self._wanted)
        ]
        for leaf, own in zip(leaves, self._own):
            # Hooks of the weight get the gradient of the leaf.
            for hook in (own._backward_hooks or {}).values():
                if leaf.requires_grad:
                    leaf.register_hook(hook)
        versions = [leaf._version for leaf in leaves]
        gradients = [None] * len(leaves)

        def differentiate(loss):
            for i, (leaf, version) in enumerate(zip(leaves, versions)):
                if leaf._version != version:
                    raise self._error(torch_modules.WRITTEN, i)
            torch_modules.check_graph(self.loss_fn.model, loss)
            gradients[:] = self._gradients(loss, leaves)

        with torch.enable_grad():
            loss, aux = self.loss_fn(leaves, differentiate)
        aux = keras.tree.map_structure(
            lambda t: t.detach() if torch.is_tensor(t) else t, aux
        )
        return (loss.detach(), aux), gradients

    def _gradients(self, loss, leaves):
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        own = [i for i, weight in enumerate(self._own) if weight.requires_grad]
        found = [None] * (len(wanted) + len(own))
        if loss.requires_grad:
            inputs = *wanted, *(self._own[i] for i in own)
            # Run in this thread, so that recomputation sees the given weights.
            with torch.autograd.set_multithreading_enabled(False):
                found = _engine_run_backward(
                    (loss,),
                    (torch.ones_like(loss),),
                    False,  # keep_graph
                    False,  # create_graph
                    inputs,
                    True,  # allow_unreachable
                    accumulate_grad=False,
                )
        # The leaf does not get a gradient that reaches the weight itself.
        for i, gradient in zip(own, found[len(wanted) :]):
            if gradient is not None:
                raise self._error(torch_modules.READ_APART, i)
        found = iter(found)
        gradients = []
        for leaf, on in zip(leaves, self._wanted):
            gradient = next(found) if leaf.requires_grad else None
            if on and gradient is None:
                gradient = torch.zeros_like(leaf)
            if gradient is not None and gradient.is_sparse:
                gradient = gradient.to_dense()
            gradients.append(gradient)
        return gradients

    def _error(self, text, i):
        loss_fn = self.loss_fn
        return torch_modules.error(
            text, loss_fn.model, loss_fn.variables[i], self._own[i]
        )


def _device_modules(model):
    """Returns the modules with the `get_rng_state` of each of the model's devices."""
    kinds = {variable.value.device.type for variable in model.variables} - {"cpu"}
    return [torch, *map(torch.get_device_module, kinds)]


class TorchBackend(Backend):
    """PyTorch, eager, with a known mask."""

    Passes = Passes
    Scope = torch_prefix.Scope
    # `torch.compile` would compile again for each new mask.
    can_compile = False
    own_parameters = staticmethod(torch_modules.own_parameters)
    processes = staticmethod(torch_processes.count)
    any_process = staticmethod(torch_processes.any_process)
    start = staticmethod(torch_processes.start)
    agree = staticmethod(torch_processes.agree)
    average = staticmethod(torch_processes.average)

    def no_grad(self):
        return torch.no_grad()

    def generators(self, model):
        # Layers without their own seed, such as Keras' Dropout on PyTorch, draw from
        # the global generators of the devices.
        states = [(m.get_rng_state, m.set_rng_state) for m in _device_modules(model)]
        return Generators(model, states)

    def concrete(self, mask):
        return mask.tolist()  # a synchronisation

    def read(self, variable):
        return variable.value.detach()  # shares its memory

    def squared_sum(self, gradient):
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.linalg.vector_norm(gradient, dtype=dtype).square()

    def multiply(self, gradient, factor):
        return gradient * factor

    def add(self, weight, gradient, scale):
        return torch.addcmul(weight, gradient, scale)

    def compile(self, function, model):
        return torch.no_grad()(function)

    def multiply_by_hessian(self, loss, weights, vectors):
        leaves = [w.detach().requires_grad_() for w in weights]

        def differentiate(value):
            gradients = torch.autograd.grad(
                value, leaves, create_graph=True, materialize_grads=True
            )
            # Not `torch.autograd.grad`, which does not reach the node that refuses a
            # second derivative, and leaves its part out.
            sum((g * v).sum() for g, v in zip(gradients, vectors)).backward()

        # The fused kernels of attention have no second derivative.
        plain = attention.sdpa_kernel(attention.SDPBackend.MATH)
        try:
            with torch.enable_grad(), plain:
                loss(leaves, differentiate)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NoSecondDerivative(str(error)) from error
        return [torch.zeros_like(w) if w.grad is None else w.grad for w in leaves]
