"""Patches of Keras that run its tests with our step.

`compile` gives a model our step and wraps its optimizer. The tests of optimizers pass
gradients to an optimizer, without a model. There, `apply` takes a step of a model whose
loss is linear in the variables, so that its gradients are the given ones.
"""

import contextlib
import functools
import types

import keras
from keras import ops
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.trainers.trainer import Trainer

import keras_slsam
from keras_slsam import fit
from keras_slsam import loss_scale
from keras_slsam import training
from keras_slsam.optimizers import SharpnessAware

BackendTrainer = keras.Model.__bases__[0]


class Routing:
    """The patches, and their state for the current test."""

    def __init__(self):
        self._depth = 0
        self.start(None)

    def start(self, make, of_optimizers=False):
        """Resets the state for a new test.

        Args:
            make: Function that wraps a Keras optimizer in `SAM` or `SLSAM`.
            of_optimizers: bool, whether the test may use optimizers without a model.
        """
        self._make = make
        self.steps = 0  # calls of our step, or its traces if it is compiled
        self._of_optimizers = of_optimizers
        self._made = {}  # id of an optimizer -> the optimizer, and ours around it
        self._models = {}  # id of an optimizer -> the optimizer, and its LinearModel

    def install(self):
        # The models of Keras' trainer tests are trainers, but not `keras.Model`s.
        fit.keras = training.keras = types.SimpleNamespace(**vars(keras))
        training.keras.Model = BackendTrainer
        training.step = self._counted(training.step)
        Trainer.compile = self._compiled(Trainer.compile)
        for cls in _with_subclasses(BaseOptimizer):
            self._patch(cls)
        BaseOptimizer.__init_subclass__ = classmethod(lambda cls: self._patch(cls))

    def _counted(self, step):
        @functools.wraps(step)
        def counted(*args, **kwargs):
            self.steps += 1
            return step(*args, **kwargs)

        return counted

    def _compiled(self, compile_model):
        @functools.wraps(compile_model)
        def compiled(model, optimizer="rmsprop", *args, **kwargs):
            if type(model).train_step is BackendTrainer.train_step:
                optimizer = self._wrap(optimizer)
                keras_slsam.sharpness_aware(model)
                if keras.config.backend() == "torch" and kwargs.get("jit_compile"):
                    kwargs["jit_compile"] = False  # True is refused
            return compile_model(model, optimizer, *args, **kwargs)

        return compiled

    def _wrap(self, optimizer):
        optimizer = keras.optimizers.get(optimizer)
        scaler, inner = loss_scale.split(optimizer)
        if inner is None or isinstance(inner, SharpnessAware):
            return optimizer
        if id(inner) not in self._made:
            self._made[id(inner)] = inner, self._make(inner)
        _, ours = self._made[id(inner)]
        if scaler is None:
            return ours
        scaler.inner_optimizer = ours
        return scaler

    def _patch(self, cls):
        routes = {
            "build": self._build,
            "apply": self._apply,
            "stateless_apply": self._stateless_apply,
        }
        for name, route in routes.items():
            if name in vars(cls) and not issubclass(cls, SharpnessAware):
                setattr(cls, name, self._outermost(vars(cls)[name], route))

    def _outermost(self, method, route):
        """Wraps a method of optimizers to take `route` if a test calls it directly."""

        @functools.wraps(method)
        def patched(optimizer, *args, **kwargs):
            by_test = self._called_by_test(optimizer)
            with self._nested():
                result = NotImplemented
                if by_test:
                    result = route(optimizer, *args, **kwargs)
                if result is NotImplemented:
                    result = method(optimizer, *args, **kwargs)
                return result

        return patched

    @contextlib.contextmanager
    def _nested(self):
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def _called_by_test(self, optimizer):
        if self._depth or not self._of_optimizers:
            return False
        if id(optimizer) in self._models:
            return True
        _, inner = loss_scale.split(optimizer)
        return id(inner) not in self._made and not isinstance(inner, SharpnessAware)

    def _build(self, optimizer, variables):
        if optimizer.built:
            return NotImplemented
        model = self._model(optimizer, variables)
        model.optimizer.build(model.trainable_variables)

    def _apply(self, optimizer, grads, trainable_variables=None):
        grads = list(grads)
        if not grads or any(gradient is None for gradient in grads):
            return NotImplemented
        model = self._model(optimizer, trainable_variables)
        model.train_on_batch({str(i): _parts(g) for i, g in enumerate(grads)})

    def _stateless_apply(self, optimizer, values, grads, trainable_values):
        model = self._model(optimizer, None)
        states = (
            (model.trainable_variables, trainable_values),
            (
                optimizer.variables,
                values,
            ),
        )
        for variables, given in states:
            for variable, value in zip(variables, given):
                variable.assign(value)
        self._apply(optimizer, grads)
        return tuple([v.value for v in variables] for variables, _ in states)

    def _model(self, optimizer, variables):
        if id(optimizer) not in self._models:
            model = LinearModel(list(variables))
            model.compile(optimizer, jit_compile=keras.config.backend() == "jax")
            self._models[id(optimizer)] = optimizer, model
        return self._models[id(optimizer)][1]


class LinearModel(keras.Model):
    """A model of the given variables, whose inputs are their gradients."""

    def __init__(self, variables):
        super().__init__()
        self.parameters = variables

    def call(self, gradients):
        return gradients

    def compute_loss(self, x, y=None, y_pred=None, sample_weight=None, training=True):
        total = 0.0
        for i, (gradient, *rows) in x.items():
            value = ops.convert_to_tensor(self.parameters[int(i)])
            if rows:
                value = ops.take(value, rows[0][0], axis=0)
            total = total + ops.sum(value * ops.cast(gradient[0], value.dtype))
        # Tests pass the gradients of the scaled loss to a `LossScaleOptimizer`.
        scale = loss_scale.read(loss_scale.split(self.optimizer)[0])
        return total if scale is None else total / ops.cast(scale, total.dtype)


def _parts(gradient):
    """Returns a gradient as a batch of one: its values, and their rows if sparse."""
    if type(gradient).__name__ == "IndexedSlices":
        parts = gradient.values, gradient.indices
    elif type(gradient).__name__ == "BCOO":
        parts = gradient.data, gradient.indices[:, 0]
    else:
        parts = (gradient,)
    return [ops.convert_to_tensor(part)[None] for part in parts]


def _with_subclasses(cls):
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
