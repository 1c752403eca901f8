"""The ascent: perturbs the active weights by a step of length rho.

    e = rho * g / (||g|| + eps)                   SAM (Foret et al., 2010.01412)
    e = rho * w^2 * g / (|| |w| g || + eps)       adaptive (ASAM, 2102.11600)

The norm is taken over all active weights. Inactive weights are not perturbed. An
`Ascent` chooses the direction g.
"""

from keras import ops

from keras_slsam.gradients import backend

_EPSILON = 1e-12


def perturb(weights, directions, squares, arms, rho, adaptive=False):
    """Returns the perturbed weights, `w + e` where active and `w` elsewhere.

    Args:
        weights: List of tensors, w.
        directions: List of tensors like `weights`, g, or `Directions`. Ignored where
            inactive, and may be `None` there.
        squares: List of float scalars, the squared norms of the arms' directions, or
            `None` if they are not known.
        arms: `ActiveArms`.
        rho: Float scalar, the radius.
        adaptive: bool, whether e is scaled by the squares of the weights.

    Returns:
        List of tensors like `weights`.
    """
    if adaptive:
        squares = arms.squared_norms(directions, weights)
    elif squares is None:
        squares = arms.squared_norms(directions)
    norm = ops.sqrt(sum(squares))
    # A zero direction gives no ascent; 1 / eps would overflow in float16. The condition
    # reads `norm`, because XLA would repeat the sum at each use.
    scale = ops.where(norm > 0, ops.cast(rho, norm.dtype) / (norm + _EPSILON), 0.0)

    def ascended(i, weight):
        step = ops.cast(scale, weight.dtype)
        step = ops.multiply(step, ops.square(weight)) if adaptive else step
        return backend.add(weight, directions[i], step)

    return arms.map(ascended, weights)
