"""The graph of all gradients on TensorFlow, run only where arms are active.

A walk back from the gradients finds the arms that need each operation. Operations that
the same arms need become one `tf.cond` on "any of these arms is active"; what all arms
need stays outside. This skips the weight gradients of inactive layers and the backward
chain below the lowest active one.

A second run differs in the active weights only. So a walk forwards finds the arms that
each operation depends on. Where none of them is active it gives what the first gave.
What depends on no weight, or like noise on the sizes of values only, is not run again.
"""

import collections
import functools
import graphlib
import operator
import typing

import tensorflow as tf

# TensorFlow has no public name for a variable that lives as long as its handle.
from tensorflow.python.eager.context import anonymous_name

# Operations that read only sizes, and those that do not touch the data.
_SHAPES = {"Rank", "Shape", "ShapeN", "Size"}
_VIEWS = {"ExpandDims", "Identity", "Reshape", "Squeeze"}

# Operations whose results have sizes that follow from those of what they read, and from
# the integers in it.
_SIZED_BY_SIZES = _VIEWS | {
    *("Abs", "AddN", "AddV2", "AvgPool", "BatchMatMulV2", "BiasAdd", "BroadcastTo"),
    *("Cast", "ConcatV2", "Conv2D", "Cos", "DepthwiseConv2dNative", "Einsum", "Elu"),
    *("Equal", "Erf", "Exp", "FusedBatchNormV3", "GatherV2", "Greater", "GreaterEqual"),
    *("IdentityN", "LeakyRelu", "Less", "LessEqual", "Log", "LogSoftmax", "LogicalAnd"),
    *("MatMul", "Max", "MaxPool", "Maximum", "Mean", "Min", "Minimum", "Mul", "Neg"),
    *("Pack", "Pad", "Pow", "RealDiv", "Relu", "Relu6", "Rsqrt", "SelectV2", "Selu"),
    *("Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Square"),
    *("SquaredDifference", "StatelessRandomNormalV2", "StatelessRandomUniformV2"),
    *("StopGradient", "StridedSlice", "Sub", "Sum", "Tanh", "Tile", "Transpose"),
}

# Operations that cost no more than the copy of a value that is kept.
_COPIES = {"Cast", "Transpose"}

# One of so many arms is active in nearly every step: a condition would cost more.
_MANY = 64

# What is done again may be taken from the first run only where so few arms are upstream
# that often none of them is active.
_FEW = 12

# Types that have no zeros.
_HANDLES = {tf.resource, tf.string, tf.variant}

# Bytes of a constant that is not worth a copy for each of its readers.
_LARGE = 4096


class Program:
    """A traced function of weights, to be put into the surrounding graph.

    Args:
        traced: The function, without arguments; what it reads was captured.
        variables: List of `keras.Variable`, the weights.
        own: List of int, the set of arms of each weight, which holds one. A set of
            arms is an int with one bit an arm.
        needs: List of `(tensor, arms)`: tensors of the function, and the set of
            arms that needs each.
        active: List of scalar boolean tensors, one an arm.
        twice: bool, whether there may be a second run.
        jit_compile: bool, whether XLA compiles the surrounding graph.
    """

    def __init__(self, traced, variables, own, needs, active, twice, jit_compile):
        self._traced = traced
        self._needs = needs
        self._active = active
        self._jit_compile = jit_compile
        self._weights, self._shadows = _find_weights(traced, variables)
        self._source = _Source(traced.graph, self._weights)
        self._everyone = (1 << len(active)) - 1
        self._sets, copied = _plan(self._source, needs, self._everyone)
        upstream = dict.fromkeys(self._source.operations, self._everyone)
        results = [tensor for tensor, _ in needs]
        split = functools.partial(
            _partition, self._source, sets=self._sets, copied=copied
        )
        self._again, self._kept = {}, []
        if twice:
            weights = {read: own[i] for read, i in self._weights.items()}
            upstream = _upstream(self._source, weights, self._everyone)
            same = _same_again(self._source, weights)
            self._again = split(results, upstream=upstream, given=same)
            read = [t for part in self._again.values() for t in part.inputs]
            self._kept = [t for t in [*results, *read] if t.op in same]
        self._parts = split([*results, *self._kept], upstream=upstream, given=set())
        sets = set().union(*self._parts) - {0, self._everyone}
        self._any_active = _any_active(active, sets)

    def run(self, weights):
        """The values of the tensors in `needs` at the given weights.

        Args:
            weights: List of tensors.

        Returns:
            List of tensors, zero where none of their arms is active.
        """
        self._values = self._evaluate(self._parts, weights, {})
        return self._results(self._values)

    def run_again(self, weights):
        """The same at weights of which the inactive ones are those of `run`."""
        return self._results(self._evaluate(self._again, weights, self._values))

    def _evaluate(self, parts, weights, before):
        surrounding = tf.compat.v1.get_default_graph()
        # Keeps alive what it calls, like the bodies of loops.
        self._traced.add_to_graph(surrounding)
        values = {}
        for inner, tensor in zip(
            self._traced.graph.inputs, self._traced.captured_inputs
        ):
            if inner.name in self._shadows:
                i, tensor = self._shadows[inner.name]
                tf.raw_ops.AssignVariableOp(resource=tensor, value=weights[i])
            values[inner.name] = surrounding.capture(tensor)
        for read, i in self._weights.items():
            values[read.outputs[0].name] = weights[i]
        if before:
            values.update((tensor.name, before[tensor.name]) for tensor in self._kept)
        for (arms, upstream), part in parts.items():
            work = functools.partial(self._source.place, part, values)
            conditions = {arms}
            skip = functools.partial(_zeros, part.outputs, work, self._jit_compile)
            cheap = False
            if before and upstream != self._everyone:
                conditions.add(upstream)
                kept = {tensor.name: before[tensor.name] for tensor in part.outputs}
                skip = functools.partial(dict, kept)
                cheap = arms == self._everyone and part.is_cheap()
            conditions.discard(self._everyone)
            if not conditions or cheap:
                made = work()
            else:
                on = [self._any_active[arms] for arms in conditions]
                made = tf.cond(functools.reduce(tf.logical_and, on), work, skip)
            for tensor in part.outputs:
                made[tensor.name].set_shape(tensor.shape)
            values.update(made)
        return values

    def _results(self, values):
        def result(tensor, arms):
            value = values[tensor.name]
            if self._sets[tensor.op] == arms:
                return value
            # Made for others too: by a loop, or for a sum of several weights.
            active = self._active[arms.bit_length() - 1]
            return tf.where(active, value, tf.zeros_like(value))

        return [result(tensor, arms) for tensor, arms in self._needs]


class _Source:
    """A traced graph, to be copied piece by piece.

    Args:
        graph: `tf.Graph`.
        weights: The operations that give the weights.
    """

    def __init__(self, graph, weights):
        definition = graph.as_graph_def()
        self._versions = definition.versions
        self._nodes = {node.name: node for node in definition.node}
        # A loop's gradient adds inputs to the loop, so the graph is not in order.
        reads = {
            op: [*(t.op for t in op.inputs), *op.control_inputs]
            for op in graph.get_operations()
        }
        self.operations = list(graphlib.TopologicalSorter(reads).static_order())
        self.inputs = {tensor.op for tensor in graph.inputs} | set(weights)

    def is_small_constant(self, op):
        return op.type == "Const" and self._nodes[op.name].ByteSize() < _LARGE

    def place(self, part, values):
        """Copies a part into the current graph.

        Args:
            part: `_Part`.
            values: Dict from names of the part's inputs to tensors.

        Returns:
            Dict from names of the part's outputs to tensors.
        """
        piece = tf.compat.v1.GraphDef(versions=self._versions)
        present = {op.name for op in part.operations}
        for op in part.operations:
            node = piece.node.add()
            node.CopyFrom(self._nodes[op.name])
            # Neither colocation nor order with operations that are not here.
            node.attr.pop("_class", None)
            node.ClearField("input")
            node.input.extend(t.name for t in op.inputs)
            node.input.extend(
                f"^{before.name}"
                for before in op.control_inputs
                if before.name in present
            )
        graph = tf.compat.v1.get_default_graph()
        # Under a name of its own: the importer confuses what begins with one in use.
        found = tf.graph_util.import_graph_def(
            piece,
            {t.name: graph.capture(values[t.name], "read") for t in part.inputs},
            [t.name for t in part.outputs],
            name="sparse",
        )
        for tensor, copy in zip(part.outputs, found):
            copy.set_shape(tensor.shape)
        return {tensor.name: copy for tensor, copy in zip(part.outputs, found)}


def _find_weights(traced, variables):
    """Finds what reads the weights in a traced function.

    Args:
        traced: The function.
        variables: List of `keras.Variable`, the weights.

    Returns:
        `(reads, shadows)`: a dict from the operations that give a weight's value to
        its index, and a dict from names of captured variables that are read in other
        ways, as by a `tf.function` that is called, to the index and the handle of a
        variable to be read in its place.
    """
    indices = {id(v.value.handle): i for i, v in enumerate(variables)}
    reads, shadows = {}, {}
    for inner, outer in zip(traced.graph.inputs, traced.captured_inputs):
        i = indices.get(id(outer))
        if i is None:
            continue
        readers = inner.consumers()
        plain = [op for op in readers if op.type == "ReadVariableOp"]
        reads.update(dict.fromkeys(plain, i))
        if len(plain) < len(readers):
            # Not a `tf.Variable`, of which a `tf.function` may make none later on.
            with tf.init_scope():
                shadow = tf.raw_ops.VarHandleOp(
                    dtype=variables[i].dtype,
                    shape=variables[i].shape,
                    shared_name=anonymous_name(),
                )
            shadows[inner.name] = i, shadow
    return reads, shadows


def _plan(source, needs, everyone):
    """Finds for each operation the arms that need it.

    Args:
        source: `_Source`.
        needs: List of `(tensor, arms)`.
        everyone: The set of all arms, and what stands for many; no step leaves all of
            them out.

    Returns:
        `(sets, copied)`: a dict from operations to sets of arms, and the set of
        those operations that are recomputed wherever they are read.
    """
    sets = dict.fromkeys(source.operations, 0)
    given = {tensor.op for tensor, _ in needs}
    for tensor, arms in needs:
        sets[tensor.op] |= arms
    for op in reversed(source.operations):
        handles = [t for t in op.outputs if t.dtype in _HANDLES]
        others = {sets[reader] for t in handles for reader in t.consumers()}
        if (
            op in source.inputs
            or op.op_def.is_stateful
            or sets[op].bit_count() > _MANY
            or others - {0, sets[op]}  # would cross the border of a `tf.cond`
        ):
            sets[op] = everyone
        # What a `tf.cond` runs has no effects, so that order is by data alone.
        before = op.control_inputs if sets[op] == everyone else []
        for producer in [*(t.op for t in op.inputs), *before]:
            sets[producer] |= sets[op]

    # Forwards: what costs nothing needs no `tf.cond` of its own, it is done where
    # its inputs are. Arithmetic on constants and shapes is copied: XLA must know its
    # results, and Grappler makes use of them.
    copied, origins = set(), {}
    for op in source.operations:
        producers = {t.op for t in op.inputs}
        read = set().union(*(origins[producer] for producer in producers))
        if op not in given and (
            source.is_small_constant(op)
            or op.type in _SHAPES
            or (producers and producers <= copied and _is_small_and_pure(op))
        ):
            copied.add(op)
            origins[op] = read
            continue
        free = op.type in _VIEWS or _are_scalars([*op.inputs, *op.outputs])
        if sets[op] and op not in given and free and len(read - {everyone}) <= 1:
            sets[op] = max(read - {everyone}, default=everyone)
        origins[op] = {sets[op]}
    return sets, copied


def _upstream(source, own, everyone):
    """Finds for each operation the arms whose weights it depends on.

    Args:
        source: `_Source`.
        own: Dict from operations, the inputs that are weights, to sets of arms.
        everyone: The set of all arms, and what stands for more than a few.

    Returns:
        Dict from operations to sets of arms.
    """
    sets = {}
    for op in source.operations:
        if op in source.inputs:
            sets[op] = own.get(op, 0)
            continue
        read = (sets[tensor.op] for tensor in op.inputs)
        sets[op] = functools.reduce(operator.or_, read, 0)
        if _has_state(op) or sets[op].bit_count() > _FEW:
            sets[op] = everyone
    return sets


def _same_again(source, weights):
    """Finds the operations that give the same at other values of the weights.

    Args:
        source: `_Source`.
        weights: The operations, of the inputs, that are weights.

    Returns:
        Set of operations.
    """
    same, same_sizes = set(), set()
    for op in source.operations:
        if op in source.inputs:
            same_sizes.add(op)
            if op not in weights:
                same.add(op)
            continue
        if all(t.shape.is_fully_defined() for t in op.outputs):
            same_sizes.add(op)
        if _has_state(op):
            continue
        producers = {t.op for t in op.inputs}
        integers = {t.op for t in op.inputs if t.dtype.is_integer}
        if producers <= (same_sizes if op.type in _SHAPES else same):
            same.add(op)
            same_sizes.add(op)
        elif (
            op.type in _SIZED_BY_SIZES and producers <= same_sizes and integers <= same
        ):
            same_sizes.add(op)
    return same - source.inputs


class _Part(typing.NamedTuple):
    """Operations that run together, what they read, and what is read of them."""

    operations: list
    inputs: list
    outputs: list

    def is_cheap(self):
        return all(op.type in _VIEWS | _COPIES for op in self.operations)


def _partition(source, results, sets, upstream, copied, given):
    """Sorts operations by the arms that need them, and by those upstream.

    Along the data flow the first sets only shrink and the others only grow. So nothing
    else lies between two operations with the same two sets, and in order of these
    sizes all come after what they read.

    Args:
        source: `_Source`.
        results: List of tensors, to be among the outputs of their parts.
        sets: Dict from operations to the sets of arms that need them.
        upstream: Dict from operations to the sets of arms that they depend on.
        copied: Set of the operations that are recomputed wherever they are read.
        given: Set of operations whose results are known, and in no part.

    Returns:
        Dict from pairs of sets to `_Part`, in the order of computation.
    """
    given = given | source.inputs
    keys = {op: (sets[op], upstream[op]) for op in source.operations}
    members = collections.defaultdict(dict)
    for op in source.operations:
        if sets[op] and op not in copied and op not in given:
            members[keys[op]][op] = None
    inputs = collections.defaultdict(dict)
    outputs = collections.defaultdict(dict)
    for tensor in results:
        outputs[keys[tensor.op]][tensor.name] = tensor
    for key, present in members.items():
        waiting = list(present)
        while waiting:
            for tensor in waiting.pop().inputs:
                if tensor.op in present:
                    continue
                if tensor.op in copied:
                    present[tensor.op] = None
                    waiting.append(tensor.op)
                else:
                    inputs[key][tensor.name] = tensor
                    outputs[keys[tensor.op]][tensor.name] = tensor
    return {
        key: _Part(
            list(members[key]),
            list(inputs[key].values()),
            [t for t in outputs[key].values() if t.op not in given],
        )
        for key in sorted(members, key=lambda k: (-k[0].bit_count(), k[1].bit_count()))
    }


def _has_state(op):
    """Whether data may also flow through a state, like that of a variable."""
    handles = any(t.dtype in _HANDLES for t in [*op.inputs, *op.outputs])
    return op.op_def.is_stateful or handles


def _any_active(active, sets):
    """For each set of arms, whether one of them is active: scalar boolean tensors."""
    mask = tf.stack(active)
    members = {
        arms: [arm for arm in range(len(active)) if arms >> arm & 1] for arms in sets
    }
    return {arms: tf.reduce_any(tf.gather(mask, m)) for arms, m in members.items()}


def _zeros(tensors, work, jit_compile):
    """What stands in for `work` where it is skipped: a dict like its result."""
    if jit_compile and not all(t.shape.is_fully_defined() for t in tensors):
        # For XLA both branches must have one shape, which it takes from the work;
        # that is then dead, and removed.
        return {name: tf.zeros_like(value) for name, value in work().items()}
    # An unknown size may be 0: all that reads these zeros is skipped as well.
    shapes = [[n or 0 for n in t.shape] if t.shape.rank else [] for t in tensors]
    return {t.name: tf.zeros(shape, t.dtype) for t, shape in zip(tensors, shapes)}


def _is_small_and_pure(op):
    """Whether an operation gives scalars, or shapes and the like, and nothing else."""
    return not _has_state(op) and all(
        t.shape.rank == 0 or (t.shape.rank == 1 and t.dtype.is_integer)
        for t in op.outputs
    )


def _are_scalars(tensors):
    return all(t.shape.rank == 0 and t.dtype not in _HANDLES for t in tensors)
