"""Measurements on TensorFlow."""

import contextlib
import math
import pathlib
import re
import tempfile

import tensorflow as tf
from tensorflow.compat import v1

# Calls of functions that were not inlined. The trace does not show their operations.
_CALLS = {"If", "PartitionedCall", "StatefulPartitionedCall", "While", "XlaLaunch"}


def device():
    """Returns the name of the device that computes."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "cpu"
    return tf.config.experimental.get_device_details(gpus[0])["device_name"]


def device_peak():
    """Returns the most bytes that were allocated on a GPU, `None` on a CPU."""
    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def step_flops(model, x, y):
    """Takes steps of the model, all with one trace, and yields the FLOPs of each.

    It yields nothing if XLA compiles the step, or if the FLOPs of an operation are
    unknown.
    """
    step, tensors = _step(model, x, y)
    with contextlib.suppress(NotImplementedError):
        while not model.jit_compile:
            yield executed_flops(step, *tensors)
            model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)


def conditions(model, x, y):
    """Returns the number of `If` operations in the traced step."""
    step, tensors = _step(model, x, y)
    graph = step.get_concrete_function(*tensors).graph.as_graph_def()
    return len(re.findall('op: "(Stateless)?If"', str(graph)))


def _step(model, x, y):
    """Returns a step of the model that can be traced, and its arguments."""
    step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
    return step, tf.nest.map_structure(tf.convert_to_tensor, (x, y))


def live_bytes(model, step):
    """Returns the most bytes that are allocated at one time during `step()`.

    A profile has an entry for each block that TensorFlow's allocator of large blocks
    allocates or frees. The entry has the bytes that are allocated at that time,
    including the weights. Returns `None` if that allocator is not in use.
    """
    # The format of a profile. TensorFlow has no public reader for it.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            step()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = xplane_pb2.XSpace.FromString(file.read_bytes()).planes
    return max(
        (
            stat.int64_value or stat.uint64_value
            for plane in planes
            for line in plane.lines
            for event in line.events
            for stat in event.stats
            if plane.stat_metadata[stat.metadata_id].name == "bytes_allocated"
        ),
        default=None,
    )


def executed_flops(fn, *args):
    """Returns the FLOPs of the matrix products and convolutions in `fn(*args)`.

    A multiplication and an addition count two, as in `torch.utils.flop_counter`. A
    session runs the graph of `fn` on copies of the variables, without optimising the
    graph, and traces every operation. Branches that are not taken, and loops without an
    iteration, are not in the trace.

    Args:
        fn: `tf.function`, not compiled by XLA. Its variables do not change.
        *args: The arguments, tensors.

    Raises:
        NotImplementedError: if the FLOPs of an executed operation are unknown.
    """
    nodes, executed = _trace(fn.get_concrete_function(*args), args)
    shapes = {}
    for stats in executed:
        for output in stats.output:
            dims = output.tensor_description.shape.dim
            name = f"{stats.node_name}:{output.slot}".removesuffix(":0")
            shapes[name] = [dim.size for dim in dims]
    found = [nodes[stats.node_name] for stats in executed if stats.node_name in nodes]
    return sum(_flops(node, shapes) for node in found)


def _trace(concrete, args):
    """Runs a concrete function in a session.

    Returns:
        `(nodes, executed)`: the operations by name, and the statistics of each
        execution of an operation, with shapes.
    """
    values = {id(v.handle): v.numpy() for v in concrete.variables}
    given = [*tf.nest.flatten(args), *concrete.captured_inputs]
    fetched = [t.name for t in concrete.outputs]
    fetched += [op.name for op in concrete.graph.control_outputs]
    with tf.Graph().as_default():
        inputs = {
            inner.name: v1.Variable(values[id(t)], use_resource=True).handle
            if t.dtype == tf.resource
            else tf.constant(t.numpy())
            for inner, t in zip(concrete.inputs, given)
        }
        definition = concrete.graph.as_graph_def()
        fetched = tf.graph_util.import_graph_def(definition, inputs, fetched, name="")
        config = v1.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.graph_options.optimizer_options.opt_level = -1
        full = v1.RunOptions(
            trace_level=v1.RunOptions.FULL_TRACE, output_partition_graphs=True
        )
        metadata = v1.RunMetadata()
        with v1.Session(config=config) as session:
            session.run(v1.global_variables_initializer())
            session.run(fetched, options=full, run_metadata=metadata)
    nodes = {node.name: node for g in metadata.partition_graphs for node in g.node}
    devices = metadata.step_stats.dev_stats
    return nodes, [stats for device in devices for stats in device.node_stats]


def _flops(node, shapes):
    """Returns the FLOPs of an operation, from the shapes of all results by name."""
    kind = node.op.removeprefix("_Mkl")
    inputs = [shapes.get(name) for name in node.input if name[0] != "^"]
    output = shapes.get(node.name)
    if kind in {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}:
        *_, rows, columns = inputs[0]
        return 2 * math.prod(output) * rows * columns // max(output[-2], 1)
    if kind == "Einsum":
        equation = node.attr["equation"].s.decode()
        terms = equation.partition("->")[0].split(",")
        if len(terms) == 1:
            return 0  # a transposition or a sum
        if len(terms) == 2 and "." not in equation:
            sizes = dict(zip("".join(terms), [*inputs[0], *inputs[1]]))
            return 2 * math.prod(sizes.values())
    layer, _, gradient = kind.partition("Backprop")
    if layer in {"Conv2D", "DepthwiseConv2dNative"}:
        height, width, channels, _ = output if gradient == "Filter" else inputs[1]
        channels = channels if layer == "Conv2D" else 1
        entries = math.prod(inputs[2] if gradient else output)
        return 2 * entries * height * width * channels
    if kind in _CALLS or any(part in kind for part in ("MatMul", "Einsum", "Conv")):
        raise NotImplementedError(f"The FLOPs of {node.op} are unknown: {node.name!r}.")
    return 0
