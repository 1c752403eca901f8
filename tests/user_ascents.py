"""Ascents of a user, as in the documentation."""

import keras
from keras import ops

from keras_slsam import ascents


@keras.saving.register_keras_serializable("tests")
class Friendly(ascents.Ascent):
    """F-SAM: along the part of the gradient that is not in its running mean."""

    def __init__(self, momentum=0.9):
        self.momentum = momentum

    def build(self, optimizer, variables):
        self.mean = optimizer.add_optimizer_variables(variables, "mean")

    def direction(self, index, gradient):
        return gradient - self.mean[index]

    def update(self, index, gradient):
        mean = self.momentum * self.mean[index] + (1 - self.momentum) * gradient
        self.mean[index].assign(mean)

    def get_config(self):
        return {"momentum": self.momentum}


@keras.saving.register_keras_serializable("tests")
class Momentum(ascents.Ascent):
    """Momentum-SAM: against the step that SGD with momentum took last."""

    needs_gradient = False

    def build(self, optimizer, variables):
        self.base = optimizer.base_optimizer

    def direction(self, index, gradient):
        return -self.base.momentums[index]


@keras.saving.register_keras_serializable("tests")
class OnlyMatrices(ascents.Ascent):
    """Perturbs only variables with two axes, as SAM-ON does with normalisation."""

    def direction(self, index, gradient):
        return gradient if len(gradient.shape) == 2 else ops.zeros_like(gradient)
