"""Lets PyTorch modules compute with other weights than their own.

A `TorchModuleWrapper` does not read its weights as Keras variables. So a function mode
replaces the modules' tensors in the arguments of every PyTorch function. A mode applies
to one thread only. The modules themselves do not change, and other threads see nothing
of a step.
"""

import contextlib

import keras
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_GET_DATA, _SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__

# These neither write to a tensor nor return an alias of it. Others get a copy.
_NAMES_OF_READERS = {
    torch: "addmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d gru lstm matmul mm",
    functional: "embedding group_norm layer_norm linear multi_head_attention_forward "
    "rms_norm",
    torch.Tensor: "dim numel size",
}
_PROPERTIES = "device dtype is_leaf layout ndim requires_grad shape"
_READERS = {
    getattr(x, n) for x, names in _NAMES_OF_READERS.items() for n in names.split()
}
_READERS |= {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()}
_WRITE_NOTHING = ("requires_grad_", "retain_grad_")


class _Given(TorchFunctionMode):
    """A mode in which the PyTorch functions that this thread calls get other tensors.

    Args:
        trained: Dict from the ids of parameters to the tensors that replace them.
        others: Dict from the ids of other parameters and buffers to themselves. A copy
            replaces them when a function may write to them.
        refuse: Function that is called with the id of a trained parameter if a function
            would write to it.

    Attributes:
        copies: Dict from ids to copies.
    """

    def __init__(self, trained, others, refuse):
        super().__init__()
        self._trained = trained
        self._others = others
        self._refuse = refuse
        self._own = {}
        self.copies = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Most functions get none of these tensors, and should cost little.
        for x in (*args, *kwargs.values()):
            key = id(x)
            if key in self._trained or key in self._others or type(x) in (list, tuple):
                break
        else:
            return func(*args, **kwargs)
        if _writes(func):
            self._check(args[:1])
        if "out" in kwargs:
            self._check(kwargs["out"])
        only_reads = (
            func in _READERS
            and kwargs.get("max_norm") is None  # scales an embedding in place
            and "out" not in kwargs
        )
        if func == _GET_DATA and id(args[0]) in self._trained:
            func = torch.Tensor.detach  # the same, but counts writes
        args = [self._give(x, only_reads) for x in args]
        kwargs = {name: self._give(x, only_reads) for name, x in kwargs.items()}
        result = func(*args, **kwargs)
        # The result of a function like `add_` may become an attribute.
        return self._own.get(id(result), result)

    def _give(self, x, only_reads):
        if isinstance(x, torch.Tensor):
            key = id(x)
            if key in self._trained:
                return self._trained[key]
            if key in self.copies:
                return self.copies[key]
            if key in self._others and not only_reads:
                self.copies[key] = copy = x.detach().clone()
                self._own[id(copy)] = x
                return copy
        elif type(x) in (list, tuple):
            return type(x)([self._give(part, only_reads) for part in x])
        return x

    def _check(self, x):
        if id(x) in self._trained:
            self._refuse(id(x))
        if type(x) in (list, tuple):
            for part in x:
                self._check(part)


def _writes(func):
    """Returns whether a function writes to its first argument, judging by its name."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        (in_place and name not in _WRITE_NOTHING)
        or name == "__setitem__"
        or func == _SET_DATA
    )


def own_parameters(model, variables):
    """Lets the PyTorch modules in a model compute with other weights than their own.

    Changes of buffers and of parameters that are not trained, such as the statistics of
    a BatchNorm or the weights of a momentum encoder, are kept from the first pass only.
    See `Backend.own_parameters`.

    Raises:
        ValueError: if a parameter belongs to two variables, or a module cannot compute
            with other weights.
    """
    index = {id(variable.value): i for i, variable in enumerate(variables)}
    if len(index) < len(variables):
        raise ValueError(
            "Two of the model's variables are the same PyTorch parameter, which would "
            "be updated twice. Wrap each module in one `TorchModuleWrapper` only."
        )
    others, wrappers = {}, _wrappers(model)
    known = {id(variable.value) for variable in model.variables} if wrappers else ()
    for wrapper in wrappers:
        _check_can_be_given(wrapper)
        _check_is_known(wrapper, known)
        for tensor in (*wrapper.module.parameters(), *wrapper.module.buffers()):
            if id(tensor) not in index:
                others[id(tensor)] = tensor
    if not wrappers:
        return lambda weights: contextlib.nullcontext(), lambda: None
    own = [variable.value for variable in variables]
    passes = []

    def refuse(key):
        raise error(WRITTEN, model, variables[index[key]], own[index[key]])

    @contextlib.contextmanager
    def given(weights):
        trained = {key: weights[i] for key, i in index.items()}
        mode, before = _Given(trained, others, refuse), _buffers(wrappers)
        try:
            with mode:
                yield
        finally:
            # Restore the buffers that the forward pass replaced.
            after = _buffers(wrappers)
            changed = [key for key in before if after.get(key) is not before[key]]
            passes.append((mode, [(key, after.get(key)) for key in changed]))
            for module, name in changed:
                setattr(module, name, before[module, name])

    def record():
        mode, changed = passes[0]
        for key, copy in mode.copies.items():
            others[key].copy_(copy)
        for (module, name), buffer in changed:
            setattr(module, name, buffer)

    return given, record


def _buffers(wrappers):
    return {
        (module, name): buffer
        for wrapper in wrappers
        for module in wrapper.module.modules()
        for name, buffer in module.named_buffers(recurse=False)
    }


def _wrappers(model):
    # Keras has no public name for the layers at any depth.
    layers = model._flatten_layers()
    return [x for x in layers if isinstance(x, keras.layers.TorchModuleWrapper)]


def _check_can_be_given(wrapper):
    for name, module in wrapper.module.named_modules():
        where = f"Module {name or type(module).__name__!r} of layer {wrapper.name!r}"
        if isinstance(
            module,
            (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel),
        ):
            raise ValueError(
                f"{where} is a `{type(module).__name__}`, whose replicas would not see "
                "the perturbed weights. Wrap the module inside it, `module.module`. In "
                "several processes the step averages the gradients itself."
            )
        if isinstance(module, torch.jit.ScriptModule) and (
            list(module.buffers()) or any(p.requires_grad for p in module.parameters())
        ):
            raise ValueError(
                f"{where} was compiled by `torch.jit`, which reads its weights where "
                "they cannot be replaced by perturbed ones. Wrap the original module, "
                "or freeze it and remove its buffers (`torch.jit.freeze`)."
            )


def _check_is_known(wrapper, known):
    if not wrapper.trainable:
        return
    for name, parameter in wrapper.module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(
                f"The parameter {name!r} of layer {wrapper.name!r} is not a weight of "
                "the Keras model, so it would not be trained. It was made or replaced "
                "after the module was wrapped, for example by `fully_shard`, which is "
                "not supported. Change a module before you wrap it, or set "
                "`requires_grad = False` on the parameter."
            )


def check_graph(model, loss):
    """Refuses a reentrant checkpoint in a module, which loses gradients of weights.

    Args:
        model: `keras.Model`.
        loss: Scalar tensor.
    """
    waiting, seen = [loss.grad_fn] if _wrappers(model) else [], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ValueError(
                "A module of the model uses `torch.utils.checkpoint.checkpoint` with "
                "`use_reentrant=True`, so its weights would get no gradient. Pass "
                "`use_reentrant=False`."
            )
        waiting.extend(parent for parent, _ in node.next_functions)


WRITTEN = (
    "The forward pass writes to the trainable weight {}. It would write to a perturbed "
    "weight. Remove the write, or freeze the weight: `requires_grad = False` before "
    "the module is wrapped, or `trainable = False` on the layer."
)
READ_APART = (
    "The loss depends on the trainable weight {} in a way that does not allow a "
    "perturbed value: its value was stored before the step, or the weight itself is "
    "passed to a `torch.autograd.Function` or a transform of `torch.func`. Read the "
    "weight in each call, and pass `weight.view_as(weight)` to such a function."
)


def error(text, model, variable, weight):
    """Returns a `ValueError` about `weight`, the tensor of `variable`.

    Args:
        text: `WRITTEN` or `READ_APART`.
        model: `keras.Model`.
        variable: `keras.Variable`.
        weight: The variable's tensor.
    """
    for wrapper in _wrappers(model):
        for name, parameter in wrapper.module.named_parameters():
            if parameter is weight:
                return ValueError(text.format(f"{name!r} of layer {wrapper.name!r}"))
    return ValueError(text.format(repr(variable.path)))
