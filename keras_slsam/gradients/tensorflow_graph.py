"""A graph of the loss and the gradients of all arms, which skips inactive arms.

The loss and all gradients are traced once to a TensorFlow graph. `partition` groups its
operations by the arms that need them. Each group is copied into one `tf.cond` with the
predicate "any of these arms is active".

The second pass recomputes values that depend on the weights. It reuses values that
depend on no weight, or only on the size of tensors, as noise does.
"""

import graphlib

import tensorflow as tf

from keras_slsam.gradients import partition
from keras_slsam.gradients import program
from keras_slsam.gradients import tensorflow_names as names

# Types that have no zeros.
_HANDLES = {tf.resource, tf.string, tf.variant}

# A constant of at least this many bytes is not copied for each of its readers.
_LARGE = 4096


class Gradients(program.Program):
    """A traced function from weights to a value and the gradient of each weight.

    Args:
        traced: The function, without arguments. It captures what it reads.
        outputs: List of tensors of the function.
        needs: List, the arm that needs each output, or `None` for all arms.
        passes: `Passes` of a traced step.
    """

    def __init__(self, traced, outputs, needs, passes):
        self._traced = traced
        self._jit_compile = passes.jit_compile
        self._weights, self._shadows = _find_weights(traced, passes.loss_fn.variables)
        definition = traced.graph.as_graph_def()
        self._versions = definition.versions
        self._definitions = {node.name: node for node in definition.node}
        # The gradient of a loop adds inputs to it, so the operations are not in order.
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
        """Returns the operations as nodes, whose values are names of tensors.

        Args:
            operations: List of operations in topological order.
            outputs: Set of the names of the function's output tensors.
        """
        # Work in a `tf.cond` must have no effects, because data flow alone orders it.
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
            # Copy arithmetic on constants and shapes: XLA must know its results, and
            # Grappler optimizes with them.
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
        # Keeps called functions alive, such as the bodies of loops.
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
            values[name].set_shape(self._tensors[name].shape)  # lost in a condition
        piece = tf.compat.v1.GraphDef(versions=self._versions)
        present = {node.work for node in part.nodes}
        for op in (node.work for node in part.nodes):
            node = piece.node.add()
            node.CopyFrom(self._definitions[op.name])
            # Drop colocation with operations that are not in this part, and their
            # order.
            node.attr.pop(names.COLOCATION, None)
            node.ClearField("input")
            node.input.extend(t.name for t in op.inputs)
            node.input.extend(
                f"^{before.name}" for before in op.control_inputs if before in present
            )
        graph = tf.compat.v1.get_default_graph()
        # A separate scope: the importer confuses names that begin with a name in use.
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
            # XLA needs the same shapes in both branches. It takes them from the work,
            # and then removes that as dead code.
            return [tf.zeros_like(value) for value in work()]
        # An unknown size may be 0, because everything that reads these zeros is
        # skipped.
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

    Returns:
        `(reads, shadows)`: a dict from the operations that read a weight to its index,
        and a dict from the names of captured variables that are also read in other
        ways, such as by a called `tf.function`, to the weight's index and the handle of
        a variable to read instead.
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
            # Not a `tf.Variable`, because a `tf.function` must not create one in a
            # later call.
            with tf.init_scope():
                shadow = tf.raw_ops.VarHandleOp(
                    dtype=variables[i].dtype,
                    shape=variables[i].shape,
                    shared_name=names.anonymous_name(),
                )
            shadows[inner.name] = i, shadow
    return reads, shadows


def _find_same(operations, weights):
    """Returns the set of operations that do not depend on the weights.

    The size of a tensor is a separate value, because noise depends on the size of the
    tensor that it is added to, but not on the tensor.

    Args:
        operations: List of operations in topological order.
        weights: The operations that read the weights.
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
    """Returns whether data may also flow through state, such as a variable."""
    handles = any(t.dtype in _HANDLES for t in [*op.inputs, *op.outputs])
    return op.op_def.is_stateful or handles


def _is_small_and_pure(op):
    """Returns whether an operation is pure, and returns only scalars or int vectors."""
    return not _has_state(op) and all(
        t.shape.rank == 0 or (t.shape.rank == 1 and t.dtype.is_integer)
        for t in op.outputs
    )


def _are_scalars(tensors):
    return all(t.shape.rank == 0 and t.dtype not in _HANDLES for t in tensors)
