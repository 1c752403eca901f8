"""Observers: metrics of a model that get the readings of each step.

A callback attaches an observer while it needs one. A step without observers computes no
readings. As a metric, an observer is part of the state of the compiled step, so nothing
has to be read from the device between two steps.
"""

import dataclasses
import typing

import keras

from keras_slsam.gradients import backend


@dataclasses.dataclass
class Reading:
    """What an observer gets from a step.

    Attributes:
        active: Boolean tensor of shape `(num_arms,)`, the mask, all false in a skipped
            step.
        norms: Float tensor of shape `(num_arms,)`, the gradient norms of the pass that
            gives the loss. Not to be read where inactive.
        gain: Float scalar tensor, the loss at w + e minus the loss at w, or `None` if
            the step does not compute the loss of the whole batch at both.
        ascends: bool or scalar boolean tensor, whether the step had an ascent and is
            not skipped.
        rows: int or scalar int tensor, the size of the batch.
    """

    active: typing.Any
    norms: typing.Any
    gain: typing.Any
    ascends: typing.Any
    rows: typing.Any


class Observer(keras.metrics.Metric):
    """Base class of the metrics to which each step gives a `Reading`."""

    def build(self, num_arms):
        """Creates the variables.

        Args:
            num_arms: int.
        """
        raise NotImplementedError

    def update_state(self, reading):
        """Takes in a step.

        Args:
            reading: `Reading`.
        """
        raise NotImplementedError


def of(model):
    """Returns the list of the observers of a model."""
    return [metric for metric in model.metrics if isinstance(metric, Observer)]


def build(model, optimizer):
    """Creates the variables of the model's observers, once the arms are known.

    Args:
        model: `keras.Model`.
        optimizer: `SharpnessAware`.
    """
    if optimizer.built:
        for observer in of(model):
            if not observer.variables:
                with backend.variable_scope(model):
                    observer.build(len(optimizer.arms))


def attach(model, observer):
    """Makes the steps of a model give their readings to an observer.

    Args:
        model: `keras.Model`.
        observer: `Observer`.
    """
    # The list of the model's own metrics has no public name. A metric that is set as an
    # attribute of the model could not be removed again.
    if observer not in of(model):  # an interrupted training left it there
        model._metrics.append(observer)


def detach(model, observer):
    """Reverts `attach`."""
    model._metrics.remove(observer)


def clear(model):
    """Detaches all observers, such as those of a training that was interrupted."""
    for observer in of(model):
        detach(model, observer)
