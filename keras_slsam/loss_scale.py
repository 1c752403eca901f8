"""Loss scaling for float16, where the gradients of a small loss would vanish.

For a model with the policy "mixed_float16", Keras wraps the optimizer in a
`LossScaleOptimizer`. It multiplies the loss by a scale, divides the gradients by it,
skips a step whose gradients are not finite, and adapts the scale. Norms and
perturbations use the unscaled gradients. A sharpness-aware step is skipped if the
gradients of either pass are not finite, with or without a scale.
"""

import keras
from keras import ops

from keras_slsam.gradients import backend


def split(optimizer):
    """Separates a `LossScaleOptimizer` from the optimizer inside it.

    Returns:
        Tuple of the `LossScaleOptimizer` or `None`, and the optimizer inside.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer, optimizer.inner_optimizer
    return None, optimizer


def check(optimizer):
    """Refuses settings that were set on a `LossScaleOptimizer`, and have no effect."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    for name in {"rho", "probability"} & vars(optimizer).keys():
        raise ValueError(
            f"`{name}` was set on a `LossScaleOptimizer`, which does not pass it on. "
            f"Received: {name}={vars(optimizer)[name]!r}. Delete it with `del "
            f"optimizer.{name}`, and set `optimizer.inner_optimizer.{name}`."
        )


def read(scaler):
    """Returns the current scale, a float scalar, or `None` without a `scaler`."""
    return None if scaler is None else backend.read(scaler.dynamic_scale)


def unscale(gradients, arms, scale):
    """Divides the gradients of the active arms by the scale of the loss.

    Args:
        gradients: List of tensors, one per variable. Ignored where inactive.
        arms: `ActiveArms`.
        scale: Float scalar, or `None` if the loss was not scaled.

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

    As in Keras, a skipped step halves the scale, and `dynamic_growth_steps` steps
    without a skipped one double it.

    Args:
        scaler: `keras.optimizers.LossScaleOptimizer`, built, or `None`.
        finite: bool or scalar boolean tensor, whether the gradients were finite.
    """
    if scaler is None:
        return
    steps, scale = scaler.step_counter, scaler.dynamic_scale
    due = ops.equal(steps, scaler.dynamic_growth_steps - 1)
    factor = ops.where(finite, ops.where(due, 2.0, 1.0), 0.5)
    counted = ops.logical_and(finite, ops.logical_not(due))
    scale.assign(scale * factor)
    steps.assign(ops.where(counted, steps + 1, 0))
