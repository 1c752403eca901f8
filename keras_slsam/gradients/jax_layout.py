"""The layout of convolutions on JAX.

XLA on CPU brings convolutions into the one order of axes for which it has a fast
kernel, but not those in conditions, which are 20 to 100 times slower then.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import primitives


def channels_last(equation):
    """A convolution with the channels last, where the given one would be slow.

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
    """The order of the axes (batch, ..., channels), and of the kernel's (..., in, out).

    A tuple of three, of the left and right argument of a convolution and its result.
    Each tells where batch and channels, or `out` and `in`, are, and then the others.
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
