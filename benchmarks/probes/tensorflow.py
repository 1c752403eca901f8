"""Measurements on TensorFlow."""

import pathlib
import re
import tempfile

import tensorflow as tf

# The format of a profile. TensorFlow has no public reader for it.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.work.tensorflow import executed_flops


def device():
    """Returns the name of the device that computes."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "cpu"
    return tf.config.experimental.get_device_details(gpus[0])["device_name"]


def step_flops(model, x, y):
    """Takes steps of the model, all with one trace, and yields the FLOPs of each.

    It yields nothing if XLA compiles the step, or if the FLOPs of an operation are
    unknown.
    """
    step = _traceable(model)
    while not model.jit_compile:
        try:
            yield executed_flops(step, *_tensors(x, y))
        except NotImplementedError:
            return
        model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)


def conditions(model, x, y):
    """Returns the number of `If` operations in the traced step."""
    graph = _traceable(model).get_concrete_function(*_tensors(x, y)).graph
    return len(re.findall('op: "(Stateless)?If"', str(graph.as_graph_def())))


def _traceable(model):
    return tf.function(lambda x, y: model.train_step((x, y)), autograph=False)


def _tensors(x, y):
    return tf.nest.map_structure(tf.convert_to_tensor, (x, y))


def live_bytes(model, step):
    """Returns the most bytes that are allocated at one time during `step()`.

    A profile has an entry for each block that TensorFlow's allocator of large blocks
    allocates or frees. The entry has the bytes that are allocated at that time,
    including the weights. Returns `None` if that allocator is not in use.
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
