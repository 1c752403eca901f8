"""Loss scaling, for float16: the gradients of a small loss would vanish in it.

Keras wraps the optimizer of a model with the policy "mixed_float16" in a
`LossScaleOptimizer`, which multiplies the loss by a scale, divides the gradients by it,
leaves out a step whose gradients are not finite, and adapts the scale. Norms and
perturbations are those of the unscaled gradients. Our steps are left out where the
gradients of either pass are not finite, with a scale or without one.
"""

import keras
from keras import ops

from keras_slsam.gradients import backend


def split(optimizer):
    """Takes the `LossScaleOptimizer` off an optimizer.

    Returns:
        Tuple of the `LossScaleOptimizer` or `None`, and the optimizer inside.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer, optimizer.inner_optimizer
    return None, optimizer


def read(scaler):
    """The present scale of a `LossScaleOptimizer`, a float scalar, or `None`."""
    return None if scaler is None else backend.read(scaler.dynamic_scale)


def unscale(gradients, arms, scale):
    """Gradients of the loss, from those of the loss times `scale`.

    Args:
        gradients: List of tensors, one per variable; anything where inactive.
        arms: `ActiveArms`.
        scale: Float scalar, or `None` for a loss that was not scaled.

    Returns:
        List of tensors like `gradients`.
    """
    if scale is None:
        return gradients
    return arms.map(
        lambda i, gradient: backend.multiply(gradient, 1.0 / scale), gradients
    )


def adapt(scaler, finite):
    """Adapts the scale after a step.

    The rule is that of Keras: half of the scale after a step that was left out, twice
    the scale after `dynamic_growth_steps` steps that were not.

    Args:
        scaler: `keras.optimizers.LossScaleOptimizer`, built, or `None`.
        finite: bool or scalar boolean tensor, whether the gradients were.
    """
    if scaler is None:
        return
    steps, scale = scaler.step_counter, scaler.dynamic_scale
    due = ops.equal(steps, scaler.dynamic_growth_steps - 1)
    factor = ops.where(finite, ops.where(due, 2.0, 1.0), 0.5)
    counted = ops.logical_and(finite, ops.logical_not(due))
    scale.assign(scale * factor)
    steps.assign(ops.where(counted, steps + 1, 0))
