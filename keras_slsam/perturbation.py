"""The ascent: the perturbation of the active weights, uphill along a direction.

    e = rho * g / (||g|| + eps)                   SAM (Foret et al., 2010.01412)
    e = rho * w^2 * g / (|| |w| g || + eps)       adaptive (ASAM, 2102.11600)

The norm is one over all active weights; the other weights stay put.
"""

from keras import ops

from keras_slsam.gradients import add
from keras_slsam.gradients import cond
from keras_slsam.gradients import multiply
from keras_slsam.gradients import squared_sum

_EPSILON = 1e-12


def squared_norms(directions, members, active, dtype, weights=None):
    """Squared norm of each arm's direction.

    Args:
        directions: List of tensors, one a variable; anything, or `None`, where the
            arm is inactive.
        members: List of lists of int, the variables of each arm.
        active: List of bools or scalar boolean tensors, one an arm.
        dtype: String, float dtype of the norms.
        weights: List of tensors. If given, the norms of `|w| * g` (ASAM).

    Returns:
        List of float scalars, one an arm, 0 where inactive.
    """

    def of_arm(indices):
        total = ops.zeros((), dtype)
        for i in indices:
            scaled = (
                directions[i]
                if weights is None
                else ops.multiply(weights[i], directions[i])
            )
            total = total + ops.cast(squared_sum(scaled), dtype)
        return total

    return [
        cond(on, lambda i=indices: of_arm(i), lambda: ops.zeros((), dtype))
        for on, indices in zip(active, members)
    ]


def unscale(gradients, members, active, scale):
    """Gradients divided by the scale of the loss, where the arm is active.

    Args:
        gradients: List of tensors, one a variable; anything, or `None`, where the
            arm is inactive.
        members: List of lists of int, the variables of each arm.
        active: List of bools or scalar boolean tensors, one an arm.
        scale: Float scalar.

    Returns:
        List of tensors like `gradients`.
    """
    return of_active(
        lambda i, gradient: multiply(gradient, 1.0 / scale), gradients, members, active
    )


def perturb(weights, directions, squared_norm, members, active, rho, adaptive=False):
    """The perturbed weights, `w + e` where active and `w` elsewhere.

    Args:
        weights: List of tensors, w.
        directions: List of tensors like `weights`, g; anything, or `None`, where
            the arm is inactive.
        squared_norm: Float scalar, the sum of `squared_norms(directions)`, or with
            `weights` too if adaptive.
        members: List of lists of int, the variables of each arm.
        active: List of bools or scalar boolean tensors, one an arm.
        rho: Float scalar, the radius.
        adaptive: bool, whether e is scaled by the squares of the weights.

    Returns:
        List of tensors like `weights`.
    """
    norm = ops.sqrt(squared_norm)
    # Without a direction there is no ascent; 1 / eps would overflow in float16. Not
    # `squared_norm > 0`, which XLA repeats, with the sum over the arms, in each use.
    scale = ops.where(norm > 0, ops.cast(rho, norm.dtype) / (norm + _EPSILON), 0.0)

    def ascended(i, weight):
        step = ops.cast(scale, weight.dtype)
        step = ops.multiply(step, ops.square(weight)) if adaptive else step
        return add(weight, directions[i], step)

    return of_active(ascended, weights, members, active)


def of_active(function, values, members, active):
    """A function of the values of the active arms; the others stay as they are.

    Args:
        function: Function of the number of a variable and its value.
        values: List of tensors, one a variable; anything where inactive.
        members: List of lists of int, the variables of each arm.
        active: List of bools or scalar boolean tensors, one an arm.

    Returns:
        List of tensors like `values`.
    """
    result = list(values)
    for on, indices in zip(active, members):
        found = cond(
            on,
            lambda i=indices: [function(j, values[j]) for j in i],
            lambda i=indices: [values[j] for j in i],
        )
        for i, value in zip(indices, found):
            result[i] = value
    return result
