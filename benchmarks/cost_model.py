"""What a step of each method costs, from what its parts cost.

A step consists of forward passes `F`, backward passes to the inputs `I` and to the
weights `W`, the ascent `A` (the norm, and the perturbed weights) and the update `U`.
With a share `i` of the backward chain run, a share `w` of the weight gradients
computed, a share `u` of the weights moved, and a share `r` of the forward pass run
again by the second pass, a step of `n` passes costs

    (1 + (n - 1) r) F + n (i I + w W) + u (A + U)

where AdamW has no ascent. That a pass costs 1:1:1 without ascent and update is the rule
of docs/methods.md.
"""

import typing

import numpy as np

from benchmarks import methods


class Costs(typing.NamedTuple):
    """What the parts of a step cost, in any unit."""

    forward: float
    to_inputs: float
    to_weights: float
    ascent: float
    update: float


class Shares(typing.NamedTuple):
    """What of a step is done, each a share of the whole in [0, 1]."""

    forward_again: float
    to_inputs: float
    to_weights: float
    update: float


class Call(typing.NamedTuple):
    """A layer's call in the forward pass, with what it costs.

    Attributes:
        forward: Cost of the call.
        forward_again: Cost of the call in the second pass, if it is made there: nothing
            for dropout, whose noise is known by then.
        to_inputs: Cost of the gradients of its inputs.
        to_weights: Dict from indices of trainable weights to the cost of the gradient.
        update: Dict from indices of trainable weights to the cost of ascent and update;
            each weight is in one call's.
    """

    forward: float
    forward_again: float
    to_inputs: float
    to_weights: dict[int, float]
    update: dict[int, float]


UNIT = Costs(1.0, 1.0, 1.0, 0.0, 0.0)  # the rule
EVERYTHING = Shares(1.0, 1.0, 1.0, 1.0)


def of_step(total: dict, whole: dict) -> Costs:
    """What the parts of a step cost.

    The forward pass is that of the model in one piece. What the gradients of a layer's
    weights share is in each of them, so all gradients of weights together are what the
    model in one piece takes besides the forward pass and the gradients of inputs.

    Args:
        total: Dict of `Costs`' fields, the sums over all calls.
        whole: Dict, `forward` and `forward_and_gradients` of the model in one piece.
    """
    forward = whole["forward"]
    to_weights = whole["forward_and_gradients"] - forward - total["to_inputs"]
    return Costs(**{**total, "forward": forward, "to_weights": max(to_weights, 0.0)})


def predict(method: str, costs: Costs, shares: Shares) -> float:
    """The cost of a step.

    Example:

    >>> predict("AdamW", UNIT, EVERYTHING), predict("SAM", UNIT, EVERYTHING)
    (3.0, 6.0)
    >>> predict("SL-SAM", UNIT, Shares(1.0, 1.0, 0.2, 0.2))
    4.4
    """
    passes = methods.METHODS[method].passes
    # The SAM of tutorials draws noise again.
    again = 1.0 if method == "tutorial SAM" else shares.forward_again
    forward = (1 + (passes - 1) * again) * costs.forward
    backward = shares.to_inputs * costs.to_inputs + shares.to_weights * costs.to_weights
    ascent = 0.0 if method == "AdamW" else costs.ascent
    return forward + passes * backward + shares.update * (ascent + costs.update)


def rule(method: str, active_share: float, lowest: float) -> float:
    """The cost by the rule: 1:1:1, and all is done above the lowest active arm.

    With one arm per variable that is taken to be at the input.

    Args:
        method: The method's name.
        active_share: The share of active arms.
        lowest: Where the lowest active block is, as a share of the depth.
    """
    arms = methods.METHODS[method].arms
    if arms is None:
        return predict(method, UNIT, EVERYTHING)
    chain = 1.0 - lowest if arms == "block" else 1.0
    return predict(method, UNIT, Shares(chain, chain, active_share, active_share))


def shares(calls: list[Call], arm_of: list[int], masks: np.ndarray) -> Shares:
    """The mean shares over masks, of all that a model's calls could cost.

    The gradient of a call's inputs is needed where a call before it has an active
    weight, and the second pass calls again what has one, or has one before it. That is
    exact for a chain, and a little more than needed where layers stand
    side by side, like the three projections before an attention.

    Args:
        calls: The calls, in the order of the forward pass.
        arm_of: The arm of each trainable weight.
        masks: Boolean array of shape `(steps, num_arms)`.
    """
    again = to_inputs = to_weights = update = 0.0
    for mask in masks:
        reached = False
        for call in calls:
            to_inputs += call.to_inputs * reached
            for weight, cost in call.to_weights.items():
                to_weights += cost * mask[arm_of[weight]]
            for weight, cost in call.update.items():
                update += cost * mask[arm_of[weight]]
            reached = reached or any(mask[arm_of[w]] for w in call.to_weights)
            again += call.forward_again * reached
    steps = len(masks)
    return Shares(
        _share(again, steps * sum(call.forward for call in calls)),
        _share(to_inputs, steps * sum(call.to_inputs for call in calls)),
        _share(to_weights, steps * sum(sum(c.to_weights.values()) for c in calls)),
        _share(update, steps * sum(sum(c.update.values()) for c in calls)),
    )


def lowest_active(masks: np.ndarray) -> float:
    """Where the lowest active arm is, as a mean share of all arms."""
    return float(masks.argmax(axis=1).mean() / masks.shape[1])


def _share(part, whole):
    return part / whole if whole else 0.0
