"""Sparse gradients on PyTorch, eager.

Only the active weights enter the forward pass as leaves that require a
gradient. Autograd then neither computes the other weight gradients, nor keeps
the activations that they would need, nor walks below the lowest active layer.
"""

import contextlib

import keras
import torch

from keras_slsam.gradients.torch_reuse import CalledAgain
from keras_slsam.gradients.torch_reuse import Reuse

no_grad = torch.no_grad

# `torch.compile` would specialise on each mask and compile again for the next.
can_compile = False
init_scope = contextlib.nullcontext
Scope = keras.StatelessScope


def concrete(mask):
    """The entries of `mask` as Python bools: the step's one synchronisation."""
    return mask.tolist()


class Passes:
    """The two passes of a step: one loss and its gradients, at two sets of weights.

    Args:
        loss_fn: `Loss`, a pure function from a list of tensors and a function to call
            with the loss in the middle of it, to `(loss, aux)` with a scalar `loss`
            and any structure `aux`.
        arms: List of int, the arm of each weight.
        active: List of bool, one an arm.
        twice: bool, whether there may be a second pass.
        jit_compile: Ignored, PyTorch runs eagerly.
    """

    def __init__(self, loss_fn, arms, active, twice=True, jit_compile=False):
        self._loss_fn = loss_fn
        self._wanted = [active[arm] for arm in arms]
        self._twice = twice
        self._generators = []
        self._reuse = None

    def first(self, weights):
        """Value of the loss and the gradients of the active weights.

        Args:
            weights: List of tensors to differentiate at.

        Returns:
            `((loss, aux), gradients)`; the gradient of an inactive weight is `None`,
            that of an active weight that the loss does not reach is zero.
        """
        if not self._twice:
            return self._differentiate(weights)
        # Layers without a seed of their own, like Keras' Dropout on PyTorch, draw from
        # the global generators.
        kinds = {weight.device.type for weight in weights} - {"cpu"}
        modules = [torch, *map(torch.get_device_module, kinds)]
        self._generators = [(module, module.get_rng_state()) for module in modules]
        self._reuse = Reuse(self._loss_fn.model, modules)
        with self._reuse.recording() as begin_backward:
            return self._differentiate(weights, begin_backward)

    def second(self, weights):
        """The gradients at other values of the active weights.

        Args:
            weights: List of tensors, the inactive ones those of the first pass.

        Returns:
            List like the gradients of `first`.
        """
        try:
            self._reset_generators()
            with self._reuse.replaying() as begin_backward:
                return self._differentiate(weights, begin_backward)[1]
        except CalledAgain:
            self._reset_generators()
            return self._differentiate(weights)[1]

    def _reset_generators(self):
        for module, state in self._generators:
            module.set_rng_state(state)

    def _differentiate(self, weights, begin_backward=lambda: None):
        # An inactive weight is itself the leaf: the same tensor in both passes.
        leaves = [
            w.detach().requires_grad_(on) if on or w.requires_grad else w
            for w, on in zip(weights, self._wanted)
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = []

        def differentiate(loss):
            begin_backward()
            if not loss.requires_grad:
                found.extend(map(torch.zeros_like, wanted))
                return
            # In this thread: what is rematerialised must find the weights given.
            with torch.autograd.set_multithreading_enabled(False):
                found.extend(torch.autograd.grad(loss, wanted, materialize_grads=True))

        with torch.enable_grad():
            loss, aux = self._loss_fn(leaves, differentiate)
        found = iter(found)
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        aux = keras.tree.map_structure(
            lambda t: t.detach() if torch.is_tensor(t) else t, aux
        )
        return (loss.detach(), aux), gradients


def own_parameters(model, variables):
    """Lets modules of PyTorch in a model compute with other weights than their own.

    A `TorchModuleWrapper` does not read its weights as Keras variables. What the
    forward pass does to the module's buffers, like the statistics of a BatchNorm,
    stays after the first pass only.

    Args:
        model: `keras.Model`.
        variables: List of its `keras.Variable`s that `weights` stand for.

    Returns:
        Tuple of two functions. The first makes of a list of tensors, like the values of
        `variables`, a context in which the model's modules compute with them; the
        second, without arguments, takes over what the first pass did to the buffers.

    Raises:
        ValueError: if a parameter belongs to two variables.
    """
    # Keras has no public name for the layers at any depth.
    layers = model._flatten_layers()
    wrappers = [x for x in layers if isinstance(x, keras.layers.TorchModuleWrapper)]
    modules = {id(wrapper.module): wrapper.module for wrapper in wrappers}.values()
    index = {id(variable.value): i for i, variable in enumerate(variables)}
    if len(index) < len(variables):
        raise ValueError(
            "Two of the model's variables are one parameter of PyTorch, which would be "
            "updated twice. Wrap each module in one `TorchModuleWrapper` only."
        )
    passes = []

    @contextlib.contextmanager
    def given(weights):
        buffers = []
        with contextlib.ExitStack() as stack:
            for module in modules:
                tensors = {
                    name: weights[index[id(parameter)]]
                    for name, parameter in module.named_parameters()
                    if id(parameter) in index
                }
                for name, buffer in module.named_buffers():
                    tensors[name] = buffer.clone()
                    buffers.append((buffer, tensors[name]))
                stack.enter_context(_replaced(module, tensors))
            yield
        passes.append(buffers)

    def record():
        for buffer, value in passes[0]:
            buffer.copy_(value)

    return given, record


@contextlib.contextmanager
def _replaced(module, tensors):
    """A module that computes with `tensors` in the place of its own, by name."""
    own = vars(module).get("forward")
    holder = _Holder(module)
    tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    module.forward = lambda *args, **kwargs: torch.func.functional_call(
        holder, tensors, args, kwargs
    )
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _Holder(torch.nn.Module):
    """Calls a module's own `forward`, without its hooks, which its caller runs."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.run = module.forward

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def only_builds():
    """Never: Keras makes all variables before the first step."""
    return False


def build_first(model, train_function):
    """The same function."""
    return train_function


def when(active, update):
    """Runs `update()`, which assigns to Keras variables, if `active`.

    Args:
        active: bool.
        update: Function without arguments; what it returns is ignored.
    """
    if active:
        update()


def squared_sum(gradient):
    """Sum of the squares of the entries of `gradient`, at least in float32."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=dtype).square()


def multiply(gradient, factor):
    """`factor * gradient`, for a scalar `factor`."""
    return gradient * factor


def add(weight, gradient, scale):
    """`weight + scale * gradient`, a new tensor.

    Args:
        weight: Tensor.
        gradient: Tensor of the shape of `weight`.
        scale: Scalar tensor, or one of the shape of `weight`.

    Returns:
        Tensor of the shape of `weight`.
    """
    return torch.addcmul(weight, gradient, scale)


def read(variable):
    """The value of a `keras.Variable` as a tensor: it shares its memory."""
    return variable.value.detach()
