"""Norms to learn from, and probabilities that keep the budget."""

from keras import ops


def finite(norms, active, dtype):
    """Norms of the arms to learn from: a diverged gradient teaches nothing."""
    norms = ops.cast(norms, dtype)
    active = ops.logical_and(active, ops.isfinite(norms))
    return ops.where(active, norms, 0.0), active


def relative(values):
    """`values`, not negative, over the largest of them; 0 where that is 0."""
    largest = ops.max(values)
    # The reciprocal of a huge float32, by which XLA multiplies, would be 0.
    shrink = ops.where(largest > 1, 2.0**-64, 1.0)
    return values * shrink / ops.where(largest > 0, largest * shrink, 1.0)


def project(weights, budget):
    """Projects `weights` on `{p : sum(p) = budget, p <= 1}`, keeping proportions.

    In descending order, while the largest remaining weight times the remaining
    budget exceeds the sum of the remaining weights, its p is 1; the rest is
    scaled to the rest of the budget. The sum counts as 1e-5 at least, as in the
    authors' code, so weights that have vanished stay so.
    """
    ascending = ops.sort(weights)
    num_arms = weights.shape[0]
    descending = ops.flip(ascending)
    # Sums of the smallest weights are added from the smallest: no cancellation.
    remaining = ops.maximum(ops.flip(ops.cumsum(ascending)), 1e-5)
    budgets = budget - ops.cast(ops.arange(num_arms), weights.dtype)
    capped = ops.cumprod(ops.cast(descending * budgets > remaining, weights.dtype))
    count = ops.sum(capped)
    # The first weight below the cap; where all are capped its share is not used.
    position = ops.minimum(ops.cast(count, "int32"), num_arms - 1)
    scaled = weights * (budget - count) / ops.take(remaining, position)
    threshold = ops.take(descending, position)
    is_capped = ops.logical_and(
        count > 0, ops.logical_or(weights > threshold, count >= num_arms)
    )
    return ops.where(is_capped, 1.0, scaled)
