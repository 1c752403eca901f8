"""Measuring on TensorFlow."""

import pathlib
import tempfile

import tensorflow as tf

# What a profile is written as; TensorFlow has no public reader of it.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.work.tensorflow import executed_flops

TRACES = True  # a step is traced, its graph optimised or compiled


def device():
    """The name of the device that computes."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "cpu"
    return tf.config.experimental.get_device_details(gpus[0])["device_name"]


class StepFlops:
    """FLOPs of a model's steps; all are of one trace."""

    def __init__(self, model):
        self._model = model
        self._step = _traceable(model)

    def __call__(self, x, y):
        """FLOPs of the next step, which is taken; `None` if XLA compiles it."""
        if self._model.jit_compile:
            return None
        try:
            flops = executed_flops(self._step, *_tensors(x, y))
        except NotImplementedError:
            return None
        self._model.fit(x, y, batch_size=len(y), shuffle=False, verbose=0)
        return flops


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


def planned_memory(model, x, y):
    """Nothing: TensorFlow allocates while it runs."""
    return None


def live_bytes(variables, steps):
    """The most bytes that are allocated at a time during each of several steps.

    A profile has an entry for each block that TensorFlow's allocator of large blocks
    gives out or takes back, with the bytes that are out then, the weights' with them.

    Args:
        variables: Ignored.
        steps: List of functions without arguments.

    Returns:
        List of int, or `None` where that allocator is not in use.
    """
    peaks = [max(_allocated(step), default=None) for step in steps]
    return None if None in peaks else peaks


def _allocated(step):
    """The bytes that are allocated during a step, after each change."""
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            step()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = xplane_pb2.XSpace.FromString(file.read_bytes()).planes
    for plane in planes:
        names = {i: entry.name for i, entry in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                for stat in event.stats:
                    if names[stat.metadata_id] == "bytes_allocated":
                        yield stat.int64_value or stat.uint64_value


def runner(function, arguments, wanted=(), cotangent=None, jit_compile=False):
    """A function and some of its gradients, traced.

    Args:
        function: Pure function of a list of tensors.
        arguments: That list.
        wanted: Indices of the arguments to differentiate by.
        cotangent: Gradient of the function's result.
        jit_compile: bool, whether XLA compiles it.

    Returns:
        Function without arguments, which computes both and waits for the end.
    """

    @tf.function(jit_compile=jit_compile, autograph=False)
    def run(arguments, cotangent):
        chosen = [arguments[i] for i in wanted]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(chosen)
            result = function(arguments)
        if not wanted:
            return result
        return result, tape.gradient(result, chosen, output_gradients=cotangent)

    return lambda: _wait(run(arguments, cotangent))


def update_runner(optimizer, variables, gradients, jit_compile=False):
    """An optimizer's update, traced; each call makes one.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built for `variables`.
        variables: List of `keras.Variable`s, which move.
        gradients: List of tensors.
        jit_compile: bool, whether XLA compiles it.

    Returns:
        Function without arguments.
    """

    @tf.function(jit_compile=jit_compile, autograph=False)
    def run(gradients):
        optimizer.apply(gradients, variables)

    return lambda: _wait(run(gradients))


def _wait(result):
    tf.test.experimental.sync_devices()
    return result
