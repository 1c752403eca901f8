"""Creates the variables of optimizer and metrics before TensorFlow traces a step.

Keras creates them in the first step, and TensorFlow traces a function again if it has
created variables.
"""

import contextvars

import tensorflow as tf

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

    def build(iterator):
        token = _builds.set(True)
        try:
            step = tf.function(model.train_step, autograph=False)
            step.get_concrete_function(iterator.element_spec)
        finally:
            _builds.reset(token)

    def call(iterator):
        nonlocal fresh
        try:
            if fresh and _is_traced(model, iterator):
                build(iterator)
            result = train_function(iterator)
        except BaseException:
            if fresh:
                # If a first trace fails after it has created variables, TensorFlow
                # would then execute nothing, without an error.
                model.train_function = None
            raise
        fresh = False
        return result

    return call


def _is_traced(model, iterator):
    """Returns whether the step runs in a graph, on the iterator's own batches."""
    if model.run_eagerly or tf.config.functions_run_eagerly():
        return False
    if not isinstance(iterator, tf.data.Iterator):
        return False
    specs = tf.nest.flatten(iterator.element_spec)
    return not any(isinstance(spec, tf.OptionalSpec) for spec in specs)
