"""Changes convolutions on JAX to the layout that is fast inside conditions.

On CPU, XLA has a fast kernel for one order of the axes. It changes convolutions to this
order, but not inside conditions, where they are then 20 to 100 times slower.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import primitives


def channels_last(equation):
    """Returns a convolution with channels last, if the given one would be slow.

    Args:
        equation: Equation of a jaxpr.

    Returns:
        `ClosedJaxpr` that computes the same, or `None` for any other equation.
    """
    if (
        equation.primitive is not primitives.conv_general_dilated_p
        or jax.default_backend() != "cpu"
        or equation.params["dimension_numbers"] == _order(equation)
    ):
        return None
    convolve = functools.partial(_convolve, equation)
    return jax.make_jaxpr(convolve)(*[v.aval for v in equation.invars])


def _order(equation):
    """Returns dimension numbers: (batch, ..., channels), for the kernel (..., in, out).

    There is one entry for the left argument, the right argument and the result. It
    lists the axis of batch and of channels (or `out` and `in`), then the other axes.
    """
    rank = equation.outvars[0].aval.ndim
    between = tuple(range(1, rank - 1))
    outer = (0, rank - 1, *between)
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    return jax.lax.ConvDimensionNumbers(outer, kernel, outer)


def _convolve(equation, left, right):
    given, order = equation.params["dimension_numbers"], _order(equation)
    left = jnp.moveaxis(left, given.lhs_spec, order.lhs_spec)
    right = jnp.moveaxis(right, given.rhs_spec, order.rhs_spec)
    params = {**equation.params, "dimension_numbers": order}
    result = equation.primitive.bind(left, right, **params)
    return jnp.moveaxis(result, order.out_spec, given.out_spec)
