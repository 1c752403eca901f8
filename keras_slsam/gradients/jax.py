"""Sparse gradients on JAX, one compiled step for all masks.

Under `jit` the mask is not known while the step is traced. So the loss and all its
gradients are traced once, to a jaxpr, and each equation is marked with the set of
arms whose gradients need it. The equations with the same set run together, in one
`jax.lax.cond` on "any of these arms is active"; what the loss or every arm needs
runs unconditionally. Executed are then the forward pass, the backward pass down to
the lowest active layer, and the weight gradients of the active layers.

A loop (`scan`, `while`) or a `cond` of the model is one equation and runs whole if
any of the gradients that it yields is wanted.
"""

import collections
import contextlib
import functools
import operator

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

no_grad = contextlib.nullcontext  # JAX differentiates only what it is told to
can_compile = True
init_scope = contextlib.nullcontext

# Calls of a traced function, by the name of the primitive (which changes with JAX), and
# the parameter that holds its jaxpr. What `jax.checkpoint` recomputes stays apart from
# the forward pass: conditions do that.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}

# A condition would cost more than these do.
_CHEAP = {
    primitives.broadcast_in_dim_p,
    primitives.iota_p,
    primitives.reshape_p,
    primitives.squeeze_p,
}


def concrete(mask):
    """The entries of `mask`: Python bools, or scalar arrays while tracing."""
    if isinstance(mask, jax.core.Tracer):
        return list(jnp.unstack(mask))
    return np.asarray(mask).tolist()


def value_and_grad(loss_fn, weights, arms, active, jit_compile=False):
    """Value of `loss_fn` and the gradients of the active weights.

    Args:
        loss_fn: Pure function from a list of arrays, like `weights`, to
            `(loss, aux)` with a scalar `loss` and any structure `aux` of arrays.
        weights: List of arrays to differentiate at.
        arms: List of int, the arm of each weight.
        active: List, one entry an arm: bools, or scalar boolean arrays of which at
            least one will be true.
        jit_compile: Ignored, a traced step is compiled anyway.

    Returns:
        `((loss, aux), gradients)`; the gradient of an inactive weight is `None` if
        `active` holds bools and zero otherwise, that of an active weight that the
        loss does not reach is zero.
    """
    if all(isinstance(on, bool) for on in active):
        return _of_known(loss_fn, weights, [active[arm] for arm in arms])
    return _of_traced(loss_fn, weights, arms, active)


def _of_known(loss_fn, weights, wanted):
    """Differentiates with respect to the wanted weights only."""

    def loss_of(leaves):
        leaves = iter(leaves)
        return loss_fn([next(leaves) if on else w for w, on in zip(weights, wanted)])

    leaves = [w for w, on in zip(weights, wanted) if on]
    value, found = jax.value_and_grad(loss_of, has_aux=True)(leaves)
    found = iter(found)
    return value, [next(found) if on else None for on in wanted]


def _of_traced(loss_fn, weights, arms, active):
    """Traces the dense computation and runs its parts under conditions."""
    closed, shapes = jax.make_jaxpr(
        jax.value_and_grad(loss_fn, has_aux=True), return_shape=True
    )(weights)
    inputs = closed.jaxpr.invars
    equations, outputs, constants = _inline(closed, inputs)
    jaxpr = closed.jaxpr.replace(
        constvars=list(constants), outvars=outputs, eqns=equations
    )

    # A set of arms is an int with one bit an arm. No step leaves all of them out.
    everyone = (1 << len(active)) - 1
    own = [1 << arm for arm in arms]
    demands = [everyone] * (len(outputs) - len(own)) + own
    parts = _partition(jaxpr, demands, everyone)
    values, sets = _run(parts, {**constants, **dict(zip(inputs, weights))}, active)

    leaves = [
        jnp.asarray(v.val, v.aval.dtype) if isinstance(v, core.Literal) else values[v]
        for v in outputs
    ]
    value, gradients = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    for i, v in enumerate(outputs[len(outputs) - len(own) :]):
        # Not made for this arm alone: a loop yields the gradients of all its
        # weights, the terms of a sum have the same gradient.
        if isinstance(v, core.Literal) or sets.get(v) != own[i]:
            gradients[i] = jnp.where(active[arms[i]], gradients[i], 0)
    return value, gradients


def _inline(jaxpr, inputs):
    """The equations of a jaxpr, with those of the functions that it calls.

    Args:
        jaxpr: `Jaxpr` or `ClosedJaxpr`.
        inputs: List of variables and literals, the arguments.

    Returns:
        `(equations, outputs, constants)`: a flat list, the variables and literals
        that hold the results, and a dict from variables to constant arrays.
    """
    arrays, equations = getattr(jaxpr, "consts", ()), []
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    constants = dict(zip(jaxpr.constvars, arrays))
    names = dict(zip(jaxpr.invars, inputs))

    def renamed(atoms):
        return [v if isinstance(v, core.Literal) else names.get(v, v) for v in atoms]

    for equation in jaxpr.eqns:
        arguments = renamed(equation.invars)
        inner = _body(equation)
        if inner is not None:
            body, results, more = _inline(inner, arguments)
            equations += body
            constants.update(more)
        else:
            # Two calls of one function share its jaxpr, so the variables are new.
            results = [core.Var(v.aval) for v in equation.outvars]
            equations.append(equation.replace(invars=arguments, outvars=results))
        names.update(zip(equation.outvars, results))
    return equations, renamed(jaxpr.outvars), constants


def _body(equation):
    """The jaxpr to put in an equation's place, or None."""
    if equation.primitive.name in _CALLS:
        return equation.params[_CALLS[equation.primitive.name]]
    if (
        equation.primitive is primitives.conv_general_dilated_p
        and jax.default_backend() == "cpu"
        and equation.params["dimension_numbers"] != _channels_last(equation)
    ):
        # XLA on CPU brings convolutions into the one order for which it has a fast
        # kernel, but not those in conditions, which are 20 to 100 times slower then.
        convolve = functools.partial(_convolve, equation)
        return jax.make_jaxpr(convolve)(*[v.aval for v in equation.invars])
    return None


def _channels_last(equation):
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
    """A convolution, done with the channels last."""
    given, order = equation.params["dimension_numbers"], _channels_last(equation)
    left = jnp.moveaxis(left, given.lhs_spec, order.lhs_spec)
    right = jnp.moveaxis(right, given.rhs_spec, order.rhs_spec)
    params = {**equation.params, "dimension_numbers": order}
    result = equation.primitive.bind(left, right, **params)
    return jnp.moveaxis(result, order.out_spec, given.out_spec)


def _partition(jaxpr, demands, everyone):
    """Sorts the equations of a jaxpr by the set of arms that need them.

    Two equations with the same set have none with another set between them, since
    sets only shrink along the data flow. So each set's equations are one function,
    and sets in order of decreasing size are in the order of computation.

    Args:
        jaxpr: `Jaxpr`.
        demands: List of int, the set of arms that needs each of its results.
        everyone: int, the set of all arms.

    Returns:
        Dict from sets to `Jaxpr`, in the order of computation. The jaxpr takes
        what its equations read and returns what is read elsewhere.
    """
    readers = collections.defaultdict(set)
    for v, demand in zip(jaxpr.outvars, demands):
        if not isinstance(v, core.Literal):
            readers[v] |= {demand, "output"}
    members = collections.defaultdict(list)
    for equation in reversed(jaxpr.eqns):
        needs = set().union(*(readers[v] for v in equation.outvars)) - {"output"}
        demand = functools.reduce(operator.or_, needs, 0)
        if equation.effects or (demand and not _have_zeros(equation.outvars)):
            demand = everyone
        if demand:
            members[demand].append(equation)
            for v in _variables(equation.invars):
                readers[v].add(demand)

    parts = {}
    for demand in sorted(members, key=int.bit_count, reverse=True):
        body = members[demand][::-1]
        made = dict.fromkeys(v for equation in body for v in equation.outvars)
        read = dict.fromkeys(v for e in body for v in _variables(e.invars))
        parts[demand] = jaxpr.replace(
            constvars=(),
            invars=[v for v in read if v not in made],
            outvars=[v for v in made if readers[v] - {demand}],
            eqns=body,
            effects=frozenset() if demand != everyone else jaxpr.effects,
        )
    return parts


def _run(parts, values, active):
    """Evaluates each part whose set has an active arm.

    Args:
        parts: Dict from sets of arms to `Jaxpr`, in the order of computation.
        values: Dict from variables to arrays, the inputs and constants.
        active: List of scalar boolean arrays, one an arm.

    Returns:
        `(values, sets)`: dicts from variables to arrays, zero where skipped, and
        from variables to the set of arms under whose condition they were made.
    """
    membership = [[part >> arm & 1 for arm in range(len(active))] for part in parts]
    wanted = jnp.any(jnp.array(active) & np.array(membership, bool), axis=1)
    everyone = (1 << len(active)) - 1
    values, sets = dict(values), {}
    for (part, jaxpr), on in zip(parts.items(), wanted):
        work = functools.partial(jax.core.eval_jaxpr, jaxpr, ())
        arguments = [values[v] for v in jaxpr.invars]
        if part == everyone or all(e.primitive in _CHEAP for e in jaxpr.eqns):
            part, results = everyone, work(*arguments)
        else:
            results = jax.lax.cond(on, work, _zeros_like(jaxpr.outvars), *arguments)
        values.update(zip(jaxpr.outvars, results))
        sets.update(dict.fromkeys(jaxpr.outvars, part))
    return values, sets


def _variables(atoms):
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _have_zeros(variables):
    """False for tokens, references and typed random keys."""
    return all(
        isinstance(v.aval, jax.core.ShapedArray)
        and not jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.extended)
        for v in variables
    )


def _zeros_like(variables):
    return lambda *_: [jnp.zeros(v.aval.shape, v.aval.dtype) for v in variables]


def when(active, update, variables):
    """Runs `update()`, which assigns to `variables`, if `active`.

    Args:
        active: bool or scalar boolean array.
        update: Function without arguments; what it returns is ignored.
        variables: List of the `keras.Variable`s that it may read or assign to.
    """
    if isinstance(active, bool):
        if active:
            update()
        return
    # An inner scope sees nothing of the outer one.
    state = [(v, v.value) for v in variables]
    assigned = []

    def updated():
        with keras.StatelessScope(state) as scope:
            before = [scope.get_current_value(v) for v in variables]
            update()
            after = [scope.get_current_value(v) for v in variables]
        changed = [i for i, old in enumerate(before) if after[i] is not old]
        assigned.extend(variables[i] for i in changed)
        return [after[i] for i in changed]

    # Traced before the condition, which must know what is assigned.
    update_fn = core.jaxpr_as_fun(jax.make_jaxpr(updated)())
    values = jax.lax.cond(active, update_fn, lambda: [v.value for v in assigned])
    for variable, value in zip(assigned, values):
        variable.assign(value)


def squared_sum(gradient):
    """Sum of the squares of the entries of `gradient`, at least in float32."""
    dtype = jnp.promote_types(gradient.dtype, jnp.float32)
    return jnp.sum(jnp.square(gradient.astype(dtype)))


def multiply(gradient, factor):
    """`factor * gradient`, for a scalar `factor`."""
    return gradient * factor.astype(gradient.dtype)


def add(weight, gradient, scale):
    """`weight + scale * gradient`, a new tensor.

    Args:
        weight: Tensor.
        gradient: Tensor of the shape of `weight`.
        scale: Scalar tensor, or one of the shape of `weight`.

    Returns:
        Tensor of the shape of `weight`.
    """
    return weight + scale * gradient


def own_parameters(model, variables):
    """Nothing: all layers read their weights as Keras variables."""
    return lambda weights: contextlib.nullcontext(), lambda: None


def replayed(loss_fn):
    """`loss_fn` itself: here Keras' random numbers are functions of its seeds."""
    return loss_fn


def read(variable):
    """The value of a `keras.Variable` as a tensor."""
    return variable.value
