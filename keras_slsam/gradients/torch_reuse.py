"""What the second pass takes over from the first, on PyTorch.

The second pass differs from the first in the active weights only. A layer that hangs
on none of them computes the same again, so its outputs are kept and given back.

A layer of Keras or KerasHub is a function of its arguments and their masks, of its
attributes, of the variables that it reads, and of the random numbers that it draws.
Where the second pass calls it with the same of these, bit for bit, the kept outputs are
what it would compute. Layers of users, or with functions of users in them, may depend
on more, and are computed; the layers inside them are looked at one by one.

Where Keras' Dropout depends on an active weight, its random numbers are taken over.
"""

import collections
import contextlib
import dataclasses
import functools
import operator
import threading
import types

import keras
import torch

# Keras has no public names for the scope that is open, nor for a tensor's mask.
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope
from torch.autograd import forward_ad

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
_CALLED = ("forward", "call")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CalledAgain(Exception):
    """A layer is rematerialised that the second pass took over."""


class Reuse:
    """Outputs of layers in the first pass, for the second.

    What is rematerialised is not taken over: PyTorch counts what layers save for the
    backward pass, which must be the same when they are called again.

    Args:
        model: `keras.Model`. The passes call it in a `StatelessScope` with a list
            `log` of what was read and assigned: `(variable, value, is_assigned)`.
        generators: List of the modules, like `torch`, whose `get_rng_state` and
            `set_rng_state` are those of the generators that layers draw from.
    """

    def __init__(self, model, generators):
        pure = _pure_operations(model)
        self._operations = [operation for operation, _ in pure]
        self._inside = {id(operation): inside for operation, inside in pure}
        self._generators = generators
        self._records = []
        self._called_again = set()
        self._noises = collections.defaultdict(list)

    @contextlib.contextmanager
    def recording(self):
        """Context of the first pass.

        It gives a function to call when the backward pass begins.
        """

        def note(operation, function, args, kwargs):
            self._called_again.add(id(operation))
            return function(*args, **kwargs)

        with _called_by(self._record, note, self._operations) as begin_backward:
            yield begin_backward

    @contextlib.contextmanager
    def replaying(self):
        """Context of the second pass, after which nothing is kept.

        It gives a function to call when the backward pass begins.

        Raises:
            CalledAgain: if the pass must be repeated without this context. That is
                where it rematerialises other layers than the first.
        """
        kept, taken = collections.defaultdict(list), set()
        for record in self._records:
            if id(record.operation) not in self._called_again:
                kept[id(record.operation)].append(record)
        self._records = []

        def replay(operation, function, args, kwargs):
            records = kept[id(operation)]
            for i, record in enumerate(records):
                if self._matches(record, args, kwargs):
                    taken.add(id(operation))
                    return self._replay(records.pop(i), args, kwargs)
            if _is_unseeded_dropout(operation, args, kwargs):
                return self._drop_again(operation, function, *args, **kwargs)
            return function(*args, **kwargs)

        def check(operation, function, args, kwargs):
            if id(operation) in taken:
                raise CalledAgain
            return function(*args, **kwargs)

        try:
            with _called_by(replay, check, self._operations) as begin_backward:
                yield begin_backward
        finally:
            self._noises.clear()

    def _record(self, operation, function, args, kwargs):
        scope = get_stateless_scope()
        log = getattr(scope, "log", None)
        inputs = _Tensors((args, kwargs))
        if log is None or not inputs.constant:
            if _is_unseeded_dropout(operation, args, kwargs):
                return self._drop(operation, *args)
            return function(*args, **kwargs)
        arguments = _copy((args, kwargs)), inputs.masks(), _context(operation)
        attributes = self._attributes(operation)
        first_record, first_entry = len(self._records), len(log)
        num_losses = len(scope.losses)
        before = self._random_states()
        outputs = function(*args, **kwargs)
        if not _Tensors(outputs).constant or len(scope.losses) > num_losses:
            return outputs
        if not _are_identical(attributes, self._attributes(operation)):
            return outputs
        reads, writes = _split(log[first_entry:])
        masks = inputs.masks()
        inputs.add([value for _, value in reads])
        if inputs.constant and inputs.unchanged():
            results = _Tensors(outputs)
            output_masks = results.masks()
            results.add([value for _, value in writes])
            after = self._random_states()
            record = _Record(
                operation=operation,
                inputs=inputs,
                arguments=arguments,
                attributes=attributes,
                reads=reads,
                random_before=None if _same(before, after) else before,
                results=results,
                outputs=_copy(outputs),
                masks=(masks, output_masks),
                writes=writes,
                random_after=after,
            )
            # In the place of what is inside, which will not be called.
            self._records[first_record:] = [record]
        return outputs

    def _matches(self, record, args, kwargs):
        operation, scope = record.operation, get_stateless_scope()
        arguments = (
            (args, kwargs),
            _Tensors((args, kwargs)).masks(),
            _context(operation),
        )
        return (
            record.inputs.unchanged()
            and record.results.unchanged()
            and _same(record.arguments, arguments)
            and _are_identical(record.attributes, self._attributes(operation))
            and all(
                _same(value, scope.get_current_value(variable))
                for variable, value in record.reads
            )
            and (
                record.random_before is None
                or _same(record.random_before, self._random_states())
            )
        )

    def _replay(self, record, args, kwargs):
        if record.random_before is not None:
            self._set_random_states(record.random_after)
        for update in record.writes:
            get_stateless_scope().add_update(update)
        outputs = _copy(record.outputs)
        # Layers take masks off their arguments, and others off what this one gave.
        for structure, masks in zip([(args, kwargs), outputs], record.masks):
            _Tensors(structure).set_masks(masks)
        return outputs

    def _attributes(self, operation):
        """The values of the attributes of an operation, and of those in it."""
        return [
            value
            for part in self._inside[id(operation)]
            for name, value in vars(part).items()
            if name not in _CALLED
        ]

    def _drop(self, dropout, x):
        # What PyTorch's own dropout does on a CPU, where to draw takes much longer than
        # to multiply.
        before = self._random_states()
        noise = torch.empty_like(x).bernoulli_(1 - dropout.rate).div_(1 - dropout.rate)
        layout = x.shape, x.stride(), x.dtype, dropout.rate
        entry = layout, before, noise, self._random_states()
        self._noises[id(dropout)].append(entry)
        return x * noise

    def _drop_again(self, dropout, function, x, **kwargs):
        noises, states = self._noises[id(dropout)], self._random_states()
        for i, (layout, before, noise, after) in enumerate(noises):
            now = x.shape, x.stride(), x.dtype, dropout.rate
            if layout == now and _same(before, states):
                noises.pop(i)
                self._set_random_states(after)
                return x * noise
        return function(x, **kwargs)

    def _set_random_states(self, states):
        for generator, state in zip(self._generators, states):
            generator.set_rng_state(state)

    def _random_states(self):
        return [generator.get_rng_state() for generator in self._generators]


def _is_unseeded_dropout(operation, args, kwargs):
    return (
        type(operation) is keras.layers.Dropout
        and 0 < operation.rate < 1
        and operation.noise_shape is None
        and not operation._remat_mode
        # The condition by which Keras leaves it to PyTorch.
        and operation.seed_generator._initial_seed is None
        and len(args) == 1
        and kwargs == {"training": True}
        and type(args[0]) is torch.Tensor
        and args[0].is_floating_point()
        and args[0].device.type == "cpu"
    )


@dataclasses.dataclass
class _Record:
    """One call of a layer: what it depends on, and what came of it."""

    operation: keras.Operation
    inputs: "_Tensors"  # all those that it depends on
    arguments: tuple
    attributes: list
    reads: list
    random_before: list | None  # if it draws
    results: "_Tensors"
    outputs: object
    masks: tuple  # of the arguments and of the outputs, after the call
    writes: list
    random_after: list


class _Tensors:
    """The tensors in a structure, and whether they stay what they are.

    Attributes:
        constant: bool, whether all are plain tensors without a gradient, and the rest
            of the structure is too simple to change.
    """

    def __init__(self, structure):
        self.constant = True
        self._tensors = []
        self._versions = []
        self.add(structure)

    def add(self, structure):
        """Takes another structure in."""
        if type(structure) in (list, tuple):
            for part in structure:
                self.add(part)
        elif type(structure) is dict:
            self.add(list(structure.values()))
        elif _is_plain(structure):
            mask = get_keras_mask(structure)
            self._tensors.append(structure)
            self._versions.append((structure, structure._version))
            if _is_plain(mask):
                self._versions.append((mask, mask._version))
        elif type(structure) not in _CONSTANTS:
            self.constant = False

    def unchanged(self):
        """Whether no tensor was changed in place since it was taken in."""
        return all(
            tensor._version == version and not tensor.requires_grad
            for tensor, version in self._versions
        )

    def masks(self):
        """List of the masks that Keras attached to the tensors, or `None`."""
        return [get_keras_mask(tensor) for tensor in self._tensors]

    def set_masks(self, masks):
        """Attaches masks, a list like that of `masks`."""
        for tensor, mask in zip(self._tensors, masks):
            set_keras_mask(tensor, mask)


def _is_plain(x):
    return (
        type(x) is torch.Tensor
        and x.layout is torch.strided
        and not (x.requires_grad or x.is_complex() or x.is_inference() or x.is_neg())
        and forward_ad.unpack_dual(x).tangent is None
        and not _is_transformed(x)
    )


def _is_transformed(x):
    """Whether a tensor belongs to a transform of `torch.func`, and has no memory."""
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return False


def _copy(structure):
    """A structure of new lists, tuples and dicts, with the same tensors in it."""
    if type(structure) in (list, tuple):
        return type(structure)(map(_copy, structure))
    if type(structure) is dict:
        return {key: _copy(value) for key, value in structure.items()}
    return structure


def _are_identical(values, others):
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _same(one, other):
    """Whether two structures are equal, tensors in them bit for bit."""
    if type(one) is not type(other):
        return False
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is dict:
        return list(one) == list(other) and _same(
            list(one.values()), list(other.values())
        )
    if type(one) is torch.Tensor:
        return one is other or _same_bits(one, other)
    return type(one) in _CONSTANTS and one == other


def _same_bits(one, other):
    # What is no layer, like a sum of two outputs, was computed again. To compare is
    # cheap, but would wait for the device elsewhere.
    return (
        one.device.type == other.device.type == "cpu"
        and _is_plain(one)
        and _is_plain(other)
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and torch.equal(*(t.view(_BITS[t.element_size()]) for t in (one, other)))
    )


def _split(log):
    """What was read before it was assigned, and all that was assigned."""
    reads, writes, assigned = [], [], set()
    for variable, value, is_assigned in log:
        if is_assigned:
            writes.append((variable, value))
            assigned.add(id(variable))
        elif id(variable) not in assigned:
            reads.append((variable, value))
    return reads, writes


def _context(operation):
    """What a call inherits from those that it is in, like `training` or autocast."""
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    if not isinstance(operation, keras.Layer):
        return autocast, {}
    # Keras has no public name for it.
    context = vars(operation._get_call_context())
    return autocast, {name: x for name, x in context.items() if name != "entry_layer"}


@contextlib.contextmanager
def _called_by(forward, backward, operations):
    """Has operations called by `forward(operation, function, args, kwargs)`.

    It gives a function that changes it to `backward`, for the rest of the context.
    """
    thread, call = threading.get_ident(), [forward]

    def through(operation, function, *args, **kwargs):
        if threading.get_ident() != thread:
            return function(*args, **kwargs)
        return call[-1](operation, function, args, kwargs)

    try:
        for operation in operations:
            # Layers are modules of PyTorch, called by their `forward`.
            name = "forward" if isinstance(operation, keras.Layer) else "call"
            # Not by `setattr`, by which Keras keeps account of layers.
            vars(operation)[name] = functools.partial(
                through, operation, getattr(operation, name)
            )
        yield lambda: call.append(backward)
    finally:
        for operation in operations:
            for name in _CALLED:
                vars(operation).pop(name, None)


def _pure_operations(model):
    """The layers and operations of a model, at any depth, that hold no user's code.

    Returns:
        List of pairs: an operation, and a list of it and of all those in it.
    """
    found = {}

    def look(operation):
        if id(operation) not in found:
            found[id(operation)] = operation, False, {}  # as long as it is not known
            parts = []
            if isinstance(operation, keras.Layer):
                # Keras has no public name for the layers in a layer.
                parts += operation._flatten_layers(include_self=False, recursive=False)
            if isinstance(operation, keras.Function):
                parts += operation.operations
            is_pure, inside = _is_pure(operation), {id(operation): operation}
            for part in parts:
                _, part_is_pure, more = look(part)
                is_pure = is_pure and part_is_pure
                inside.update(more)
            found[id(operation)] = operation, is_pure, inside
        return found[id(operation)]

    look(model)
    return [
        (operation, list(inside.values()))
        for operation, is_pure, inside in found.values()
        if is_pure
    ]


def _is_pure(operation):
    """Whether an operation, apart from its parts, is Keras' code only."""
    functions = [type(operation), type(operation).call]
    values = vars(operation).values()
    # That of Keras' parameters is a module, which nobody calls.
    functions += [
        x for x in values if callable(x) and not isinstance(x, torch.nn.ParameterDict)
    ]
    return (
        all(map(_is_of_keras, functions))
        and not isinstance(operation, keras.layers.TorchModuleWrapper)
        and not set(_CALLED) & set(vars(operation))
        and not any(x for name, x in vars(operation).items() if name.endswith("_hooks"))
    )


def _is_of_keras(x):
    module = getattr(x, "__module__", None) or ""
    made = False
    if isinstance(x, types.FunctionType):
        module = x.__globals__["__name__"]  # `functools.wraps` cannot change it
        # A function made in a function may hold others.
        made = "<locals>" in x.__qualname__
    return module.split(".")[0] in ("keras", "keras_hub") and not made
