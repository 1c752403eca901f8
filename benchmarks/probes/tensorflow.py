"""Measuring on TensorFlow."""

import pathlib
import tempfile

import tensorflow as tf

# What a profile is written as; TensorFlow has no public reader of it.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.work.tensorflow import executed_flops

TRACES = True


def device():
    """The name of the device that computes."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "cpu"
    return tf.config.experimental.get_device_details(gpus[0])["device_name"]


def step_flops(model, x, y):
    """Takes steps of the model, and yields the FLOPs of each; all are of one trace.

    It yields none if XLA compiles the step, or if an operation's FLOPs are unknown.
    """
    step = _traceable(model)
    while not model.jit_compile:
        try:
            yield executed_flops(step, *_tensors(x, y))
        except NotImplementedError:
            return
        model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)


def conditions(model, x, y):
    """The number of `If` operations in the traced step."""
    graph = _traceable(model).get_concrete_function(*_tensors(x, y)).graph
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes += function.node_def
    return sum(node.op in {"If", "StatelessIf"} for node in nodes)


def _traceable(model):
    return tf.function(lambda x, y: model.train_step((x, y)), autograph=False)


def _tensors(x, y):
    return tf.nest.map_structure(tf.convert_to_tensor, (x, y))


def live_bytes(model, step):
    """The most bytes that are allocated at a time during `step()`.

    A profile has an entry for each block that TensorFlow's allocator of large blocks
    gives out or takes back, with the bytes that are out then, the weights' among them.
    `None` where that allocator is not in use.
    """
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
