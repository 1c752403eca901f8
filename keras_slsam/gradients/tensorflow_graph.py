"""The gradients of all arms on TensorFlow, in one graph that skips inactive arms.

The loss and all its gradients are traced once, to a graph, which `partition` sorts by
the arms that need its operations. Those that the same arms need are copied into one
`tf.cond` on "any of these arms is active".

A second run computes again what depends on the weights. What depends on none of them,
or like noise on the sizes of values only, is that of the first.
"""

import graphlib

import tensorflow as tf

from keras_slsam.gradients import partition
from keras_slsam.gradients import program
from keras_slsam.gradients import tensorflow_names as names

# Types that have no zeros.
_HANDLES = {tf.resource, tf.string, tf.variant}

# Bytes of a constant that is not worth a copy for each of its readers.
_LARGE = 4096


class Gradients(program.Program):
    """A traced function of weights, to be put into the surrounding graph.

    Args:
        traced: The function, without arguments; what it reads was captured.
        outputs: List of tensors of the function.
        needs: List of int, the arm that needs each, or `None` for all arms.
        passes: `Passes`, of a traced step.
    """

    def __init__(self, traced, outputs, needs, passes):
        self._traced = traced
        self._jit_compile = passes.jit_compile
        self._weights, self._shadows = _find_weights(traced, passes.loss_fn.variables)
        definition = traced.graph.as_graph_def()
        self._versions = definition.versions
        self._definitions = {node.name: node for node in definition.node}
        # A loop's gradient adds inputs to the loop, so the graph is not in order.
        reads = {
            op: [*(t.op for t in op.inputs), *op.control_inputs]
            for op in traced.graph.get_operations()
        }
        inputs = {tensor.op for tensor in traced.graph.inputs} | set(self._weights)
        order = graphlib.TopologicalSorter(reads).static_order()
        operations = [op for op in order if op not in inputs]
        self._tensors = {t.name: t for op in reads for t in op.outputs}
        outputs = [tensor.name for tensor in outputs]
        nodes = self._make_nodes(operations, set(outputs))
        independent = set()
        if passes.twice:
            same = _find_same(operations, self._weights)
            independent = {node for node in nodes if node.work in same}
        super().__init__(nodes, outputs, needs, independent, passes)

    def _make_nodes(self, operations, outputs):
        """The operations as nodes; values are names of tensors.

        Args:
            operations: List of operations, each after those that it depends on.
            outputs: Set of the names of tensors that are asked for.

        Returns:
            List of `partition.Node`s.
        """
        # What a `tf.cond` runs has no effects, so that order is by data alone.
        ordered = set()
        for op in reversed(operations):
            if op.op_def.is_stateful or op in ordered:
                ordered.update([op, *op.control_inputs, *(t.op for t in op.inputs)])
        nodes, copied = [], set()
        for op in operations:
            producers = {t.op for t in op.inputs}
            node = partition.Node(
                op,
                [t.name for t in op.inputs],
                [t.name for t in op.outputs],
                always=op in ordered,
                local=[t.name for t in op.outputs if t.dtype in _HANDLES],
                free=op.type in names.VIEWS or _are_scalars([*op.inputs, *op.outputs]),
            )
            # Arithmetic on constants and shapes is copied: XLA must know its results,
            # and Grappler makes use of them.
            node.copied = outputs.isdisjoint(node.makes) and (
                self._is_small_constant(op)
                or op.type in names.SHAPES
                or bool(producers and producers <= copied and _is_small_and_pure(op))
            )
            if node.copied:
                copied.add(op)
            nodes.append(node)
        return nodes

    def _is_small_constant(self, op):
        return (
            op.type == names.CONSTANT and self._definitions[op.name].ByteSize() < _LARGE
        )

    def given(self, weights):
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
        return values

    def place(self, part, values):
        for name in part.inputs:
            values[name].set_shape(self._tensors[name].shape)  # a condition loses it
        piece = tf.compat.v1.GraphDef(versions=self._versions)
        present = {node.work for node in part.nodes}
        for op in (node.work for node in part.nodes):
            node = piece.node.add()
            node.CopyFrom(self._definitions[op.name])
            # Neither colocation nor order with operations that are not here.
            node.attr.pop(names.COLOCATION, None)
            node.ClearField("input")
            node.input.extend(t.name for t in op.inputs)
            node.input.extend(
                f"^{before.name}" for before in op.control_inputs if before in present
            )
        graph = tf.compat.v1.get_default_graph()
        # Under a name of its own: the importer confuses what begins with one in use.
        found = tf.graph_util.import_graph_def(
            piece,
            {name: graph.capture(values[name], "read") for name in part.inputs},
            part.outputs,
            name="sparse",
        )
        return self._shaped(part.outputs, found)

    def zeros(self, part, work):
        tensors = [self._tensors[name] for name in part.outputs]
        if self._jit_compile and not all(t.shape.is_fully_defined() for t in tensors):
            # For XLA both branches must have one shape, which it takes from the work;
            # that is then dead, and removed.
            return [tf.zeros_like(value) for value in work()]
        # An unknown size may be 0: all that reads these zeros is skipped as well.
        shapes = [[n or 0 for n in t.shape] if t.shape.rank else [] for t in tensors]
        return [tf.zeros(shape, t.dtype) for t, shape in zip(tensors, shapes)]

    def _results(self, values):
        return self._shaped(self._outputs, super()._results(values))

    def _shaped(self, names, tensors):
        for name, tensor in zip(names, tensors):
            tensor.set_shape(self._tensors[name].shape)
        return tensors


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
        plain = [op for op in readers if op.type == names.READ]
        reads.update(dict.fromkeys(plain, i))
        if len(plain) < len(readers):
            # Not a `tf.Variable`, of which a `tf.function` may make none later on.
            with tf.init_scope():
                shadow = tf.raw_ops.VarHandleOp(
                    dtype=variables[i].dtype,
                    shape=variables[i].shape,
                    shared_name=names.anonymous_name(),
                )
            shadows[inner.name] = i, shadow
    return reads, shadows


def _find_same(operations, weights):
    """Finds the operations that give the same at other values of the weights.

    The size of a tensor is a value of its own: noise depends on that of the tensor that
    it is added to, and not on the tensor.

    Args:
        operations: List of operations.
        weights: The operations that give the weights.

    Returns:
        Set of operations.
    """
    nodes = []
    for op in operations:
        reads, makes = (
            [t.name for t in tensors] for tensors in (op.inputs, op.outputs)
        )
        sizes = [("size", name) for name in reads]
        if op.type in names.SHAPES:
            reads = sizes
        nodes.append(partition.Node(op, reads, makes, always=_has_state(op)))
        if all(t.shape.is_fully_defined() for t in op.outputs):
            sizes = []
        elif op.type in names.SIZED_BY_SIZES:
            sizes += [t.name for t in op.inputs if t.dtype.is_integer]
        else:
            sizes = makes
        nodes.append(partition.Node(None, sizes, [("size", name) for name in makes]))
    read = [op.outputs[0].name for op in weights]
    return {node.work for node in partition.find_independent(nodes, read)} - {None}


def _has_state(op):
    """Whether data may also flow through a state, like that of a variable."""
    handles = any(t.dtype in _HANDLES for t in [*op.inputs, *op.outputs])
    return op.op_def.is_stateful or handles


def _is_small_and_pure(op):
    """Whether an operation gives scalars, or shapes and the like, and nothing else."""
    return not _has_state(op) and all(
        t.shape.rank == 0 or (t.shape.rank == 1 and t.dtype.is_integer)
        for t in op.outputs
    )


def _are_scalars(tensors):
    return all(t.shape.rank == 0 and t.dtype not in _HANDLES for t in tensors)
