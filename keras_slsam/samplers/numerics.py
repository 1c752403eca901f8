"""Numerics of samplers that learn: finite norms, and probabilities in the budget."""

from keras import ops


def finite(norms, active, dtype):
    """Returns the norms and the mask, with arms of non-finite norms made inactive."""
    norms = ops.cast(norms, dtype)
    active = ops.logical_and(active, ops.isfinite(norms))
    return ops.where(active, norms, 0.0), active


def relative(values):
    """Returns non-negative `values` divided by their maximum, or 0 if that is 0."""
    largest = ops.max(values)
    # XLA multiplies by the reciprocal, which would be 0 for a huge float32.
    shrink = ops.where(largest > 1, 2.0**-64, 1.0)
    return values * shrink / ops.where(largest > 0, largest * shrink, 1.0)


def project(weights, budget):
    """Projects `weights` onto `{p : sum(p) = budget, p <= 1}`, keeping proportions.

    In descending order, while the largest remaining weight times the remaining budget
    exceeds the sum of the remaining weights, its p is 1. All other weights are scaled
    to the rest of the budget. As in the authors' code, the sum counts as at least 1e-5,
    so weights that have vanished stay so.
    """
    ascending = ops.sort(weights)
    num_arms = weights.shape[0]
    descending = ops.flip(ascending)
    # Sum from the smallest weight, so that there is no cancellation.
    remaining = ops.maximum(ops.flip(ops.cumsum(ascending)), 1e-5)
    budgets = budget - ops.cast(ops.arange(num_arms), weights.dtype)
    capped = ops.cumprod(ops.cast(descending * budgets > remaining, weights.dtype))
    count = ops.sum(capped)
    # The first weight below the cap. If all are capped, its share is not used.
    position = ops.minimum(ops.cast(count, "int32"), num_arms - 1)
    scaled = weights * (budget - count) / ops.take(remaining, position)
    threshold = ops.take(descending, position)
    is_capped = ops.logical_and(
        count > 0, ops.logical_or(weights > threshold, count >= num_arms)
    )
    return ops.where(is_capped, 1.0, scaled)
