"""The variables of optimizer and metrics on TensorFlow, made before the first step.

Keras makes them in it, and TensorFlow traces a function again that has made some.
"""

import contextvars

import tensorflow as tf

# Whether what is traced now is the trace of `build_first`.
_builds = contextvars.ContextVar("builds", default=False)


def only_builds():
    """Whether this step is taken for the variables that it makes, and not executed."""
    return _builds.get()


def build_first(model, train_function):
    """A train function that makes variables before it is traced.

    A `tf.function` that makes variables is traced twice. So they are made in a trace of
    its own, of steps without gradients and updates. See `Backend.build_first`.
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
                # After a first trace that failed and made variables, TensorFlow would
                # execute nothing, without an error.
                model.train_function = None
            raise
        fresh = False
        return result

    return call


def _is_traced(model, iterator):
    """Whether the train step gets what the iterator over batches gives, in a graph."""
    if model.run_eagerly or tf.config.functions_run_eagerly():
        return False
    if not isinstance(iterator, tf.data.Iterator):
        return False
    specs = tf.nest.flatten(iterator.element_spec)
    return not any(isinstance(spec, tf.OptionalSpec) for spec in specs)
