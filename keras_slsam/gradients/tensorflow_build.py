"""Creates the variables of optimizer and metrics before TensorFlow traces a step.

Keras creates them in the first step, and TensorFlow traces a function again if it has
created variables.
"""

import contextvars
import itertools
import types

import tensorflow as tf

from keras_slsam.gradients import tensorflow_replicas

# Whether `build_first` is tracing now.
_builds = contextvars.ContextVar("builds", default=False)


def only_builds():
    """Returns whether this step only creates its variables, and is not executed."""
    return _builds.get()


def build_first(model, train_function):
    """Returns a train function that creates variables before it is traced.

    They are created in a separate trace, of steps without gradients and updates. See
    `Backend.build_first`.
    """
    fresh = True

    def build(data):
        token = _builds.set(True)
        try:
            step = tf.function(model.train_step, autograph=False)
            step.get_concrete_function(data)
        finally:
            _builds.reset(token)

    def call(iterator):
        nonlocal fresh
        try:
            if fresh and _is_traced(model):
                data, iterator = _peek(iterator)
                if data is not None:
                    build(data)
            result = train_function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise  # the data end, and nothing has failed
        except BaseException:
            if fresh:
                # If a first trace fails after it has created variables, TensorFlow
                # would then execute nothing, without an error.
                model.train_function = None
            raise
        fresh = False
        return result

    return call


def _is_traced(model):
    """Returns whether the step runs in a graph, and not in replicas."""
    if model.run_eagerly or tf.config.functions_run_eagerly():
        return False
    # For replicas Keras has built everything.
    return not isinstance(model.distribute_strategy, tensorflow_replicas.STRATEGIES)


def _peek(iterator):
    """Looks at the data of a step.

    Args:
        iterator: Iterator over batches. It must not be used again.

    Returns:
        Tuple of what to trace a step with, or `None` if unknown, and an iterator over
        all batches.
    """
    if isinstance(iterator, types.GeneratorType):  # of `train_on_batch`
        batch = next(iterator)
        return batch, itertools.chain([batch], iterator)
    if isinstance(iterator, tf.data.Iterator):
        spec = iterator.element_spec
        leaves = tf.nest.flatten(spec)
        if not any(isinstance(leaf, tf.OptionalSpec) for leaf in leaves):
            return spec, iterator
    return None, iterator
