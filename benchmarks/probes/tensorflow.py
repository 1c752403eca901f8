"""Measuring on TensorFlow."""

import tensorflow as tf

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
    """Nothing: TensorFlow allocates while it runs, and keeps no record on a CPU."""
    return None


def live_bytes(variables, steps):
    """Nothing: in a graph there are no tensors to be seen."""
    return None


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
