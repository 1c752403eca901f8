"""The layers that a model calls in a forward pass, each as a pure function."""

import contextlib
import unittest.mock

import keras

ATTENTION = "attention products"

# What of a layer's configuration does not change its arithmetic.
_LEFT_OUT = {"name", "trainable", "seed"}


class Call:
    """A call of a layer, or of a model, that can be repeated.

    Attributes:
        kind: String, what is called.
        signature: String, the same for calls that do the same work.
        weights: List of the `keras.Variable`s whose gradients are its own.
        num_inputs: int, how many of its arguments are given float tensors.

    Args:
        kind: String.
        layer: `keras.Layer` whose state the call may read.
        function: What is called.
        args, kwargs: What it is called with.
        weights: List of `keras.Variable`s.
    """

    def __init__(self, kind, layer, function, args, kwargs, weights):
        self.kind = kind
        self.weights = weights
        self._variables = weights + layer.non_trainable_variables
        self._function, self._args, self._kwargs = function, args, kwargs
        # The gradient goes to what is a floating tensor.
        self._inputs = {
            name: value
            for name, value in [*enumerate(args), *kwargs.items()]
            if _is_floating(value)
        }
        self.num_inputs = len(self._inputs)
        config = layer.get_config() if weights else {}
        self.signature = repr(
            (
                kind,
                keras.tree.map_structure(_describe, (list(args), kwargs)),
                [tuple(weight.shape) for weight in weights],
                [(k, v) for k, v in sorted(config.items()) if k not in _LEFT_OUT],
            )
        )

    def arguments(self):
        """Those of `run`: the inputs, the weights, and other state that is read."""
        values = [keras.ops.convert_to_tensor(v) for v in self._variables]
        return [*self._inputs.values(), *values]

    def run(self, arguments):
        """Repeats the call with other inputs and weights, as a pure function."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for name, value in zip(self._inputs, arguments):
            (args if isinstance(name, int) else kwargs)[name] = value
        mapping = list(zip(self._variables, arguments[self.num_inputs :]))
        with keras.StatelessScope(mapping):
            results = self._function(*args, **kwargs)
        return next(t for t in keras.tree.flatten(results) if t is not None)


def of_model(model: keras.Model, x) -> Call:
    """The call of a whole model."""
    kwargs = {"training": True}
    return Call("model", model, model, (x,), kwargs, model.trainable_variables)


def record(model: keras.Model, x) -> list[Call]:
    """The calls of a forward pass on `x`, in their order.

    Of layers that are made of layers, the parts are listed. What `MultiHeadAttention`
    does between its projections is one call.
    """
    calls, depth = [], [0]

    def recorder(kind, layer, function, weights):
        def recorded(*args, **kwargs):
            if not depth[0]:
                calls.append(Call(kind, layer, function, args, kwargs, weights))
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return recorded

    with contextlib.ExitStack() as stack:
        # Keras has no public names for the layers at any depth and for the products.
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.MultiHeadAttention):
                kind, method, weights = ATTENTION, "_compute_attention", []
            elif layer._layers or isinstance(layer, keras.layers.InputLayer):
                continue
            else:
                kind, method = type(layer).__name__, "call"
                weights = layer.trainable_variables
            recorded = recorder(kind, layer, getattr(layer, method), weights)
            stack.enter_context(unittest.mock.patch.object(layer, method, recorded))
        model(x, training=True)
    return calls


def _is_floating(value):
    return keras.ops.is_tensor(value) and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(value.dtype)
    )


def _describe(value):
    if keras.ops.is_tensor(value):
        return tuple(value.shape), keras.backend.standardize_dtype(value.dtype)
    return repr(value)
