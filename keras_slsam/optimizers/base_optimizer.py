"""Checks which Keras optimizers can be the base optimizer of which methods."""

import keras


def get_base_optimizer(owner, base_optimizer):
    """Returns the optimizer that an argument `base_optimizer` specifies.

    Args:
        owner: String, the name of the caller, for the messages.
        base_optimizer: Anything that `keras.optimizers.get` accepts.

    Raises:
        ValueError: if it specifies no optimizer, or one that cannot be used.
    """
    received = f"Received: base_optimizer={base_optimizer!r}"
    if isinstance(base_optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            f"Argument `base_optimizer` of `{owner}` must not scale the loss. Pass the "
            "optimizer inside it, and put a `LossScaleOptimizer` around the outer "
            f"optimizer. {received}"
        )
    try:
        optimizer = keras.optimizers.get(base_optimizer)
    except (ValueError, TypeError, KeyError) as error:
        raise _not_an_optimizer(owner, received) from error
    if optimizer is None:
        raise _not_an_optimizer(owner, received)
    if optimizer.loss_scale_factor:
        raise ValueError(
            f"Argument `base_optimizer` of `{owner}` must not have a "
            "`loss_scale_factor`, because the perturbation needs unscaled gradients. "
            f"Received: loss_scale_factor={optimizer.loss_scale_factor!r}. Put a "
            "`keras.optimizers.LossScaleOptimizer` around the outer optimizer instead."
        )
    return optimizer


def _not_an_optimizer(owner, received):
    return ValueError(
        f"Argument `base_optimizer` of `{owner}` must be accepted by "
        "`keras.optimizers.get`: a Keras optimizer, the name of one, or its config. "
        f'{received}. Pass `keras.optimizers.AdamW(2e-5)` or "adamw", for example.'
    )


# Methods that Keras' own step calls, but a step with inactive arms does not.
_BYPASSED = (
    "apply",
    "apply_gradients",
    "stateless_apply",
    "_backend_apply_gradients",
    "_backend_increment_gradient_accumulators",
    "_backend_reset_gradient_accumulators",
    "_filter_empty_gradients",
    "_overwrite_variables_directly_with_gradients",
)


def _is_overridden(optimizer, name):
    """Returns whether a custom class, or the instance itself, overrides a method."""
    if name in vars(optimizer):
        return True
    owner = next(c for c in type(optimizer).__mro__ if name in vars(c))
    return not owner.__module__.startswith("keras.")


def check_can_skip_arms(owner, base_optimizer):
    """Checks that an optimizer can update some variables and skip others.

    Raises:
        ValueError: if it cannot.
    """
    for name in _BYPASSED:
        if _is_overridden(base_optimizer, name):
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}`, a "
                f"`{type(base_optimizer).__name__}`, overrides `{name}`, which is not "
                "called: `update_step` is called for each active variable instead. "
                "Override `update_step`, or use `SAM` or `RST` without `ascent`."
            )
    if type(base_optimizer).update_step is keras.optimizers.Optimizer.update_step:
        raise ValueError(
            f"Argument `base_optimizer` of `{owner}` must update one variable at a "
            f"time (`update_step`). `{type(base_optimizer).__name__}` does not, so it "
            "cannot skip variables. Use another optimizer, or `SAM` without `ascent`."
        )
