"""The graph of all gradients on TensorFlow, run only where arms are active.

A walk back from the gradients finds the arms that need each operation. Operations that
the same arms need become one `tf.cond` on "any of these arms is active"; what all arms
need stays outside. This skips the weight gradients of inactive layers and the backward
chain below the lowest active one.
"""

import collections
import functools
import graphlib

import tensorflow as tf

# Operations that read only shapes, and those that do not touch the data.
_SHAPES = {"BroadcastGradientArgs", "Rank", "Shape", "ShapeN", "Size"}
_VIEWS = {"ExpandDims", "Identity", "Reshape", "Squeeze"}

# Types that have no zeros.
_HANDLES = {tf.resource, tf.string, tf.variant}

# Bytes of a constant that is not worth a copy for each of its readers.
_LARGE = 4096


def run(traced, needs, active, jit_compile):
    """Puts the work of a traced function into the surrounding graph.

    Args:
        traced: The function; it has no arguments, what it reads was captured.
        needs: List of `(tensor, arms)`: tensors of the function, and the set of
            arms that needs each. A set of arms is an int with one bit an arm.
        active: List of scalar boolean tensors, one an arm.
        jit_compile: bool, whether XLA compiles the surrounding graph.

    Returns:
        List of the tensors' values, zero where none of their arms is active.
    """
    surrounding = tf.compat.v1.get_default_graph()
    # Keeps alive what it calls, like the bodies of loops.
    traced.add_to_graph(surrounding)
    source = _Source(traced.graph)
    everyone = (1 << len(active)) - 1
    sets, copied = _plan(source, needs, everyone)
    values = {
        inner.name: surrounding.capture(outer)
        for inner, outer in zip(traced.graph.inputs, traced.captured_inputs)
    }
    mask = tf.stack(active)
    for arms, part in _partition(source, needs, sets, copied).items():
        work = functools.partial(source.place, part, values)
        if arms == everyone:
            made = work()
        else:
            members = [arm for arm in range(len(active)) if arms >> arm & 1]
            skip = functools.partial(_zeros, part.outputs, work, jit_compile)
            made = tf.cond(tf.reduce_any(tf.gather(mask, members)), work, skip)
        for tensor in part.outputs:
            made[tensor.name].set_shape(tensor.shape)
        values.update(made)

    def result(tensor, arms):
        value = values[tensor.name]
        if sets[tensor.op] == arms:
            return value
        # Made for others too: by a loop, or for a sum of several weights.
        return tf.where(active[arms.bit_length() - 1], value, tf.zeros_like(value))

    return [result(tensor, arms) for tensor, arms in needs]


class _Source:
    """A traced graph, to be copied piece by piece.

    Args:
        graph: `tf.Graph`.
    """

    def __init__(self, graph):
        definition = graph.as_graph_def()
        self._versions = definition.versions
        self._nodes = {node.name: node for node in definition.node}
        # A loop's gradient adds inputs to the loop, so the graph is not in order.
        reads = {
            op: [*(t.op for t in op.inputs), *op.control_inputs]
            for op in graph.get_operations()
        }
        self.operations = list(graphlib.TopologicalSorter(reads).static_order())
        self.inputs = {tensor.op for tensor in graph.inputs}

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
        found = tf.graph_util.import_graph_def(
            piece,
            {t.name: graph.capture(values[t.name]) for t in part.inputs},
            [t.name for t in part.outputs],
            name="sparse",
        )
        for tensor, copy in zip(part.outputs, found):
            copy.set_shape(tensor.shape)
        return {tensor.name: copy for tensor, copy in zip(part.outputs, found)}


def _plan(source, needs, everyone):
    """Finds for each operation the arms that need it.

    Args:
        source: `_Source`.
        needs: List of `(tensor, arms)`.
        everyone: The set of all arms; no step leaves all of them out.

    Returns:
        `(sets, copied)`: a dict from operations to sets of arms, and the set of
        those operations that are done anew wherever they are read.
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
            or (producers and producers <= copied and _are_small(op.outputs))
        ):
            copied.add(op)
            origins[op] = read
            continue
        free = op.type in _VIEWS or _are_scalars([*op.inputs, *op.outputs])
        if sets[op] and op not in given and free and len(read - {everyone}) <= 1:
            sets[op] = max(read - {everyone}, default=everyone)
        origins[op] = {sets[op]}
    return sets, copied


# Operations that run together, the tensors that they read and those that are read
# of them by others.
_Part = collections.namedtuple("_Part", ["operations", "inputs", "outputs"])


def _partition(source, needs, sets, copied):
    """Sorts operations by the set of arms that need them.

    Sets only shrink along the data flow. So nothing of another set lies between two
    operations of one, and in order of decreasing size all come after what they read.

    Returns:
        Dict from sets to `_Part`, in the order of computation.
    """
    members = collections.defaultdict(dict)
    for op in source.operations:
        if sets[op] and op not in copied and op not in source.inputs:
            members[sets[op]][op] = None
    inputs = collections.defaultdict(dict)
    outputs = collections.defaultdict(dict)
    for tensor, _ in needs:
        outputs[sets[tensor.op]][tensor.name] = tensor
    for arms, present in members.items():
        waiting = list(present)
        while waiting:
            for tensor in waiting.pop().inputs:
                if tensor.op in present:
                    continue
                if tensor.op in copied:
                    present[tensor.op] = None
                    waiting.append(tensor.op)
                else:
                    inputs[arms][tensor.name] = tensor
                    outputs[sets[tensor.op]][tensor.name] = tensor
    return {
        arms: _Part(
            list(members[arms]),
            list(inputs[arms].values()),
            [t for t in outputs[arms].values() if t.op not in source.inputs],
        )
        for arms in sorted(members, key=int.bit_count, reverse=True)
    }


def _zeros(tensors, work, jit_compile):
    """What stands in for `work` where it is skipped: a dict like its result."""
    if jit_compile and not all(t.shape.is_fully_defined() for t in tensors):
        # For XLA both branches must have one shape, which it takes from the work;
        # that is then dead, and removed.
        return {name: tf.zeros_like(value) for name, value in work().items()}
    # An unknown size may be 0: all that reads these zeros is skipped as well.
    shapes = [[n or 0 for n in t.shape] if t.shape.rank else [] for t in tensors]
    return {t.name: tf.zeros(shape, t.dtype) for t, shape in zip(tensors, shapes)}


def _are_small(tensors):
    """Whether tensors are scalars, or shapes and the like."""
    return all(
        t.dtype not in _HANDLES
        and (t.shape.rank == 0 or (t.shape.rank == 1 and t.dtype.is_integer))
        for t in tensors
    )


def _are_scalars(tensors):
    return all(t.shape.rank == 0 and t.dtype not in _HANDLES for t in tensors)
