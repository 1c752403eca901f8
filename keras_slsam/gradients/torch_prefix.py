"""Replays the beginning of the first pass in the second pass, on PyTorch.

Both passes run the same program from the same state. Until a pass reads an active
weight, the second pass computes what the first has computed. So the calls that ended
before that are recorded, and the second pass returns their outputs in the order of the
calls.

Only layers and operations of Keras and KerasHub are replayed, and only if they contain
no custom layer, function or hook, and no checkpoint (`keras.RematScope`). Such a call
depends on its arguments and their masks, on attributes, variables and random numbers.
It is replayed if all of these are the same again. Custom code may depend on more, such
as a counter in Python, so it runs in both passes. The layers that it calls are
replayed.
"""

import contextlib
import functools
import operator
import threading
import typing

import keras
import torch

# Keras has no public names for the current scope and for a tensor's mask.
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope
from torch.autograd import forward_ad

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
_CALLED = ("forward", "call")


class Scope(keras.StatelessScope):
    """A scope that records assignments, and reads until an active weight is read.

    Attributes:
        reads, writes: Lists of pairs, a variable and its value.
        is_active: bool, whether a value that requires a gradient was read.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reads, self.writes = [], []
        self.is_active = False

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if not self.is_active:
            self.reads.append((variable, value))
            self.is_active = value is not None and value.requires_grad
        return value

    def add_update(self, update):
        self.writes.append(update)
        super().add_update(update)


class Prefix:
    """The calls that ended before the first pass read an active weight.

    Args:
        model: `keras.Model`. Each pass calls it in a `Scope`.
        generators: List of modules, such as `torch`, whose `get_rng_state` and
            `set_rng_state` belong to the generators that layers draw from.
    """

    def __init__(self, model, device_modules):
        self._inside = _operations_of_keras(model)
        self._device_modules = device_modules
        self._calls = []

    def recorded(self):
        """Context of the first pass, which records calls."""
        return self._called_by(self._record)

    @contextlib.contextmanager
    def replayed(self):
        """Context of the second pass, which replays the calls and then forgets them."""
        self._calls.reverse()
        try:
            with self._called_by(self._replay):
                yield
        finally:
            self._calls.clear()

    @contextlib.contextmanager
    def _called_by(self, handle):
        """Routes operations to `handle(scope, operation, function, args, kwargs)`.

        Calls in other threads, and calls in a layer's own scope, are not part of the
        pass.
        """
        thread = threading.get_ident()

        def through(operation, function, *args, **kwargs):
            scope = get_stateless_scope()
            if isinstance(scope, Scope) and threading.get_ident() == thread:
                return handle(scope, operation, function, args, kwargs)
            return function(*args, **kwargs)

        try:
            for operation, *_ in self._inside.values():
                # Layers are PyTorch modules, which call their `forward`.
                name = "forward" if isinstance(operation, keras.Layer) else "call"
                function = getattr(operation, name)
                # Not with `setattr`, which Keras overrides to track layers.
                vars(operation)[name] = functools.partial(through, operation, function)
            yield
        finally:
            for operation, *_ in self._inside.values():
                for name in _CALLED:
                    vars(operation).pop(name, None)

    def _record(self, scope, operation, function, args, kwargs):
        if scope.is_active:
            return function(*args, **kwargs)
        lists = self._calls, scope.reads, scope.writes, scope.losses
        num_calls, *starts = map(len, lists)
        given = self._given(operation, args, kwargs)
        attributes = self._attributes(operation)
        outputs = function(*args, **kwargs)
        reads, writes, losses = (x[n:] for x, n in zip(lists[1:], starts))
        written = {id(value) for _, value in writes}
        call = _Call(
            operation,
            given,
            attributes,
            reads=[(v, _Leaf(x)) for v, x in reads if id(x) not in written],
            results=_map(_Leaf, (args, kwargs, outputs)),
            writes=[(v, _Leaf(x)) for v, x in writes],
            random_states=self._random_states(),
        )
        is_pure = not losses and _are_same(attributes, self._attributes(operation))
        # A call that read an active weight is not constant.
        if is_pure and call.is_constant():
            # Replaces the calls inside it, which will not be made.
            self._calls[num_calls:] = [call]
        return outputs

    def _replay(self, scope, operation, function, args, kwargs):
        call = self._calls[-1] if self._calls else None
        if not (
            call is not None
            and call.operation is operation  # else it may contain the next call
            and call.is_constant()
            and call.given == self._given(operation, args, kwargs)
            and _are_same(call.attributes, self._attributes(operation))
            and all(x == _Leaf(scope.get_current_value(v)) for v, x in call.reads)
        ):
            return function(*args, **kwargs)
        self._calls.pop()
        for module, state in zip(self._device_modules, call.random_states):
            module.set_rng_state(state)
        for variable, leaf in call.writes:
            scope.add_update((variable, leaf.value))
        *_, outputs = _map(lambda leaf: leaf.value, call.results)
        # Restore the masks: a layer removes them from its arguments, and later layers
        # from its outputs.
        leaves = _flatten(call.results)
        for x, leaf in zip(_flatten((args, kwargs, outputs)), leaves):
            if torch.is_tensor(x):
                set_keras_mask(x, leaf.mask)
        return outputs

    def _given(self, operation, args, kwargs):
        """Returns a snapshot of arguments, random states and inherited settings."""
        inherited = [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        if isinstance(operation, keras.Layer):
            # Such as `training`. Keras has no public name for this.
            context = vars(operation._get_call_context())
            names = sorted(context.keys() - {"entry_layer"})
            inherited += [(name, context[name]) for name in names]
        return _map(_Leaf, (args, kwargs, self._random_states(), inherited))

    def _attributes(self, operation):
        """Returns the attribute values of an operation and of those inside it."""
        parts = self._inside[id(operation)]
        return [x for p in parts for name, x in vars(p).items() if name not in _CALLED]

    def _random_states(self):
        return [module.get_rng_state() for module in self._device_modules]


class _Call(typing.NamedTuple):
    """A recorded call: what it depended on, and what it did."""

    operation: keras.Operation
    given: tuple  # arguments, random states and inherited settings
    attributes: list
    reads: list
    results: tuple  # arguments and outputs, after the call
    writes: list
    random_states: list

    def is_constant(self):
        leaves = _flatten((self.given, self.results))
        leaves += [leaf for _, leaf in self.reads + self.writes]
        return all(leaf.is_constant() for leaf in leaves)


class _Leaf:
    """A leaf of a structure and its mask, as they are now."""

    def __init__(self, value):
        self.value, self.mask = value, get_keras_mask(value)
        self._versions = _version(value), _version(self.mask)

    def is_constant(self):
        """Returns whether it has no gradient, and has not been written to since."""
        now = _version(self.value), _version(self.mask)
        return None not in now and now == self._versions

    def __eq__(self, other):
        return (
            isinstance(other, _Leaf)
            and self.is_constant()
            and other.is_constant()
            and _have_same_value(self.value, other.value)
            and _have_same_value(self.mask, other.mask)
        )


def _flatten(structure):
    leaves: list = []
    _map(leaves.append, structure)
    return leaves


def _map(function, structure):
    # Not `keras.tree`, which keeps the leaves alive until a garbage collection.
    if type(structure) in (list, tuple):
        return type(structure)([_map(function, part) for part in structure])
    if type(structure) is dict:
        return {key: _map(function, part) for key, part in structure.items()}
    return function(structure)


def _version(x):
    """Returns a number that grows when `x` is written to, or `None` if unknown."""
    if type(x) in _CONSTANTS:
        return 0
    if type(x) is not torch.Tensor or x.requires_grad or x.is_inference():
        return None
    if x.layout != torch.strided or forward_ad.unpack_dual(x).tangent is not None:
        return None
    try:
        x.data_ptr()
    except RuntimeError:  # in a transform of `torch.func`
        return None
    return x._version


def _have_same_value(one, other):
    if not (torch.is_tensor(one) and torch.is_tensor(other)):
        return type(one) is type(other) and one == other
    # An operation outside of a layer, such as a sum in a custom layer, creates a new
    # tensor in each pass. A comparison is cheap on a CPU, but waits for any other
    # device.
    return one is other or (
        one.device.type == other.device.type == "cpu"
        and (one.dtype, one.stride()) == (other.dtype, other.stride())
        and torch.equal(one, other)
    )


def _are_same(values, others):
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _operations_of_keras(model):
    """Returns the operations in a model, at any depth, in which no custom code runs.

    Returns:
        Dict from the id of each to a list of the operation and all operations inside
        it.
    """
    inside = {id(x): _parts(x) for x in _parts(model)}
    of_users = {key for key, (x, *_) in inside.items() if not _is_of_keras(x)}
    return {
        key: parts
        for key, parts in inside.items()
        if of_users.isdisjoint(map(id, parts))
    }


def _parts(operation):
    """Returns a list of an operation and the operations inside it, at any depth."""
    if not isinstance(operation, keras.Layer):
        return [operation]
    # Keras has no public name for the layers in a layer.
    layers = operation._flatten_layers()
    functions = [layer for layer in layers if isinstance(layer, keras.Function)]
    found = [*layers, *(x for function in functions for x in function.operations)]
    return list({id(x): x for x in found}.values())


def _is_of_keras(operation):
    """Returns whether an operation's own code, without its parts, is all from Keras."""
    attributes = vars(operation)
    called = [x for x in attributes.values() if callable(x)]
    return (
        all(map(_comes_with_keras, [type(operation), type(operation).call, *called]))
        # Recomputation must enter as many checkpoints as the call did.
        and getattr(operation, "_remat_mode", None) is None
        # These call code that is not an attribute, or not a layer.
        and type(operation) not in (keras.layers.TorchModuleWrapper, keras.Function)
        and not attributes.keys() & set(_CALLED)
        and not any(x for name, x in attributes.items() if name.endswith("_hooks"))
    )


def _comes_with_keras(x):
    # `functools.wraps` changes `__module__`, and a local function may hold another.
    module = getattr(x, "__globals__", {}).get("__name__") or x.__module__ or ""
    is_local = "<locals>" in getattr(x, "__qualname__", "")
    return module.split(".")[0] in ("keras", "keras_hub") and not is_local
