"""Which Keras optimizers can be the base optimizer of which methods."""

import keras


def get_base_optimizer(owner, base_optimizer):
    """The optimizer that an argument `base_optimizer` stands for.

    Args:
        owner: String, who asks, for the messages.
        base_optimizer: What `keras.optimizers.get` takes.

    Returns:
        `keras.optimizers.Optimizer`.

    Raises:
        ValueError: if it stands for none, or for one that cannot be used.
    """
    received = f"Received: base_optimizer={base_optimizer!r}"
    if isinstance(base_optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            f"Argument `base_optimizer` of `{owner}` must not scale the loss: the "
            "scaling goes around our optimizer. Give it the optimizer that was "
            f"wrapped. {received}"
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
            "`loss_scale_factor`: the perturbation needs the true gradients. "
            f"Received: loss_scale_factor={optimizer.loss_scale_factor!r}"
        )
    return optimizer


def _not_an_optimizer(owner, received):
    return ValueError(
        f"Argument `base_optimizer` of `{owner}` must be what `keras.optimizers.get` "
        "takes: a Keras optimizer, the name of one, or its config. "
        f'{received}. For example `keras.optimizers.AdamW(2e-5)` or "adamw".'
    )


# What Keras' own step calls, and a step with arms switched off does not.
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
    """Whether a method is of a class of the user's, or was set on the optimizer."""
    if name in vars(optimizer):
        return True
    owner = next(c for c in type(optimizer).__mro__ if name in vars(c))
    return not owner.__module__.startswith("keras.")


def check_can_skip_arms(owner, base_optimizer):
    """Checks that an optimizer can update one variable and leave out another.

    Raises:
        ValueError: if it cannot.
    """
    for name in _BYPASSED:
        if _is_overridden(base_optimizer, name):
            raise ValueError(
                f"Argument `base_optimizer` of `{owner}`, a "
                f"`{type(base_optimizer).__name__}`, overrides `{name}`, which would "
                "be lost: its `update_step` is called for each active variable. "
                "Override `update_step` in its place, or use `SAM`, `S2SAM` or `RST`."
            )
    if type(base_optimizer).update_step is keras.optimizers.Optimizer.update_step:
        raise ValueError(
            f"Argument `base_optimizer` of `{owner}` must update one variable at a "
            f"time (`update_step`), which `{type(base_optimizer).__name__}` does not: "
            "it cannot leave out the inactive ones. Use another optimizer, or `SAM`."
        )
