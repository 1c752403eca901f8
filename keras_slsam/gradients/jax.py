"""Sparse gradients on JAX, one compiled step for all masks.

Under `jit` the mask is not known while the step is traced. So the loss and all its
gradients are traced once, to a jaxpr, and each equation is marked with the set of
arms whose gradients need it. The equations with the same set run together, in one
`jax.lax.cond` on "any of these arms is active"; what the loss or every arm needs
runs unconditionally. Executed are then the forward pass, the backward pass down to
the lowest active layer, and the weight gradients of the active layers.

A loop (`scan`, `while`) or a `cond` of the model is one equation and runs whole if
any of the gradients that it yields is wanted.

The second pass reuses from the first what depends on no weight, like a frozen prefix
and the noise of dropout. Everything else is computed again: a value kept for the second
pass takes memory, also where the model asks for it to be recomputed.
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

from keras_slsam.atomic import Staged
from keras_slsam.atomic import assign_if
from keras_slsam.gradients.replay import Replay

no_grad = contextlib.nullcontext  # JAX differentiates only what it is told to
can_compile = True
init_scope = contextlib.nullcontext
Scope = keras.StatelessScope

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

# One of so many arms is active in nearly every step: a condition would cost more.
_MANY = 64

# A light equation is one of a chain of so many at most that are recomputed.
_LIGHT_CHAIN = 16

# What is smaller than a result by this factor does not count beside it.
_SMALL = 8

# A condition would cost more than these do.
_CHEAP = {
    primitives.broadcast_in_dim_p,
    primitives.iota_p,
    primitives.reshape_p,
    primitives.squeeze_p,
}

# These cost no more than to write their result down and read it again.
_LIGHT = _CHEAP | {
    primitives.abs_p,
    primitives.add_jaxvals_p,
    primitives.add_p,
    primitives.and_p,
    primitives.convert_element_type_p,
    primitives.copy_p,
    primitives.div_p,
    primitives.eq_p,
    primitives.ge_p,
    primitives.gt_p,
    primitives.integer_pow_p,
    primitives.le_p,
    primitives.lt_p,
    primitives.max_p,
    primitives.min_p,
    primitives.mul_p,
    primitives.ne_p,
    primitives.neg_p,
    primitives.not_p,
    primitives.or_p,
    primitives.select_n_p,
    primitives.sign_p,
    primitives.square_p,
    primitives.sub_p,
    primitives.transpose_p,
}


def concrete(mask):
    """The entries of `mask`: Python bools, or scalar arrays while tracing."""
    if isinstance(mask, jax.core.Tracer):
        return list(jnp.unstack(mask))
    return np.asarray(mask).tolist()


class Passes:
    """The two passes of a step: one loss and its gradients, at two sets of weights.

    Args:
        loss_fn: Pure function from a list of arrays to `(loss, aux)` with a scalar
            `loss` and any structure `aux` of arrays.
        arms: List of int, the arm of each weight.
        active: List, one entry an arm: bools, or scalar boolean arrays of which at
            least one will be true.
        twice: bool, whether there may be a second pass.
        jit_compile: Ignored, a traced step is compiled anyway.

    Raises:
        ValueError: with several processes.
    """

    def __init__(self, loss_fn, arms, active, twice=True, jit_compile=False):
        if jax.process_count() > 1:
            raise ValueError(
                "Sharpness-aware steps in several processes of JAX are not supported "
                f"yet. Received: {jax.process_count()} processes. Train in one process."
            )
        self._loss_fn = loss_fn
        self._arms = arms
        self._active = active
        self._twice = twice
        self._known = all(isinstance(on, bool) for on in active)

    def first(self, weights):
        """Value of the loss and the gradients of the active weights.

        Args:
            weights: List of arrays to differentiate at.

        Returns:
            `((loss, aux), gradients)`; the gradient of an inactive weight is `None` if
            `active` holds bools and zero otherwise, that of an active weight that the
            loss does not reach is zero.
        """
        if self._known:
            self._replay = replay(self._loss_fn.model)
            return self._of_known(weights)
        self._trace(weights)
        self._values, sets = self._run(weights)
        return self._results(self._values, sets)

    def second(self, weights):
        """The gradients at other values of the active weights.

        Args:
            weights: List of arrays, the inactive ones those of the first pass.

        Returns:
            List like the gradients of `first`.
        """
        if self._known:
            return self._of_known(weights)[1]
        return self._results(*self._run(weights, self._values))[1]

    def _of_known(self, weights):
        wanted = [self._active[arm] for arm in self._arms]
        with self._replay:
            return _of_known(self._loss_fn, weights, wanted)

    def _trace(self, weights):
        """Traces the dense computation and sorts its parts."""
        closed, shapes = jax.make_jaxpr(
            jax.value_and_grad(self._loss_fn, has_aux=True), return_shape=True
        )(weights)
        self._structure = jax.tree.structure(shapes)
        self._inputs = closed.jaxpr.invars
        equations, self._outputs, self._constants = _inline(closed, self._inputs)
        jaxpr = closed.jaxpr.replace(
            constvars=list(self._constants), outvars=self._outputs, eqns=equations
        )
        # A set of arms is an int with one bit an arm. No step leaves all of them out.
        everyone = (1 << len(self._active)) - 1
        own = [1 << arm for arm in self._arms]
        demands = [everyone] * (len(self._outputs) - len(own)) + own
        demand = _demand(jaxpr, demands, everyone)
        fixed = _fixed(equations, self._inputs) if self._twice else set()
        keys = {e: (demand[e], e not in fixed) for e in equations}
        self._parts = _partition(jaxpr, keys, _light(jaxpr, demand, everyone), everyone)

    def _run(self, weights, before=None):
        given = {**self._constants, **dict(zip(self._inputs, weights))}
        return _run(self._parts, given, self._active, before)

    def _results(self, values, sets):
        leaves = [
            jnp.asarray(v.val, v.aval.dtype)
            if isinstance(v, core.Literal)
            else values[v]
            for v in self._outputs
        ]
        value, gradients = jax.tree.unflatten(self._structure, leaves)
        found = self._outputs[len(self._outputs) - len(gradients) :]
        for i, (v, arm) in enumerate(zip(found, self._arms)):
            # Not made for this arm alone: a loop yields the gradients of all its
            # weights, the terms of a sum have the same gradient.
            if isinstance(v, core.Literal) or sets.get(v) != 1 << arm:
                gradients[i] = jnp.where(self._active[arm], gradients[i], 0)
        return value, gradients


def _of_known(loss_fn, weights, wanted):
    """Differentiates with respect to the wanted weights only."""

    def loss_of(leaves):
        leaves = iter(leaves)
        return loss_fn([next(leaves) if on else w for w, on in zip(weights, wanted)])

    leaves = [w for w, on in zip(weights, wanted) if on]
    value, found = jax.value_and_grad(loss_of, has_aux=True)(leaves)
    found = iter(found)
    return value, [next(found) if on else None for on in wanted]


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


def _demand(jaxpr, outputs, everyone):
    """Finds the arms that need each equation.

    Args:
        jaxpr: `Jaxpr`.
        outputs: List of int, the set of arms that needs each of its results.
        everyone: int, the set of all arms, and what stands for many.

    Returns:
        Dict from equations to sets of arms.
    """
    needs = collections.defaultdict(int)
    for v, arms in zip(jaxpr.outvars, outputs):
        if not isinstance(v, core.Literal):
            needs[v] |= arms
    found = {}
    for equation in reversed(jaxpr.eqns):
        arms = functools.reduce(operator.or_, (needs[v] for v in equation.outvars), 0)
        without_zeros = arms and not _have_zeros(equation.outvars)
        # A condition cannot be, or would not pay.
        if equation.effects or without_zeros or arms.bit_count() > _MANY:
            arms = everyone
        found[equation] = arms
        for v in _variables(equation.invars):
            needs[v] |= arms
    return found


def _fixed(equations, weights):
    """The equations that depend on no weight.

    Args:
        equations: List of equations.
        weights: List of variables.

    Returns:
        Set of equations.
    """
    found, dependent = set(), set(weights)
    for equation in equations:
        if equation.effects or not dependent.isdisjoint(_variables(equation.invars)):
            dependent.update(equation.outvars)
        else:
            found.add(equation)
    return found


def _light(jaxpr, demand, everyone):
    """The equations that are recomputed wherever their results are read.

    What one condition keeps for another takes memory, and time to write and to copy.
    A light equation is not worth that if what it reads is there anyway: weights, data,
    what the forward pass keeps for the backward pass, and small things.

    Args:
        jaxpr: `Jaxpr`.
        demand: Dict from equations to int, the set of arms that needs each.
        everyone: int, the set of all arms.

    Returns:
        Set of equations.
    """
    forward = {v for e, arms in demand.items() if arms == everyone for v in e.outvars}
    kept = {
        v
        for equation, arms in demand.items()
        if arms not in (0, everyone)
        for v in _variables(equation.invars)
        if v in forward
    }
    light = set()
    # For each variable that is there, the number of equations to make it.
    effort = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], 0)
    outputs = set(_variables(jaxpr.outvars))
    for equation in jaxpr.eqns:
        result = equation.outvars[:1]
        read = [
            v
            for v in _variables(equation.invars)
            if v in effort or result and v.aval.size * _SMALL > result[0].aval.size
        ]
        if equation.primitive in _LIGHT and all(v in effort for v in read):
            count = 1 + sum(effort[v] for v in read)
            if count <= _LIGHT_CHAIN and result[0] not in outputs:
                light.add(equation)
                effort[result[0]] = count
        effort.update((v, 0) for v in equation.outvars if v in kept and v not in effort)
    return light


def _partition(jaxpr, keys, light, everyone):
    """Sorts the equations of a jaxpr by the arms that need them.

    Along the data flow the set of arms only shrinks, and what depends on a weight is
    never followed by what does not. So no other equation lies between two with the
    same key, which are one function, and in the order of the keys each comes after
    what it reads.

    Args:
        jaxpr: `Jaxpr`.
        keys: Dict from equations to `(demand, dependent)`: the set of arms that needs
            it, 0 if none does, and whether it depends on a weight.
        light: Set of equations that are part of whatever reads them.
        everyone: int, the set of all arms.

    Returns:
        Dict from keys to `Jaxpr`, in the order of computation. The jaxpr takes what its
        equations read and returns what is read elsewhere.
    """
    readers = collections.defaultdict(set)
    for v in _variables(jaxpr.outvars):
        readers[v].add(None)
    members = collections.defaultdict(list)
    for equation in reversed(jaxpr.eqns):
        parts = {keys[equation]} if keys[equation][0] else set()
        if equation in light:
            (v,) = equation.outvars
            parts = readers.pop(v, set())
        for part in parts:
            members[part].append(equation)
            for v in _variables(equation.invars):
                readers[v].add(part)

    parts = {}
    for part in sorted(members, key=lambda key: (-key[0].bit_count(), key[1])):
        body = members[part][::-1]
        made = dict.fromkeys(v for equation in body for v in equation.outvars)
        read = dict.fromkeys(v for e in body for v in _variables(e.invars))
        parts[part] = jaxpr.replace(
            constvars=(),
            invars=[v for v in read if v not in made],
            outvars=[v for v in made if readers[v] - {part}],
            eqns=body,
            effects=frozenset() if part[0] != everyone else jaxpr.effects,
        )
    return parts


def _run(parts, values, active, before=None):
    """Evaluates each part that an active arm needs.

    Args:
        parts: Dict from keys to `Jaxpr`, see `_partition`.
        values: Dict from variables to arrays, the inputs and constants.
        active: List of scalar boolean arrays, one an arm.
        before: Dict of the values of an earlier run, at other weights.

    Returns:
        `(values, sets)`: dicts from variables to arrays, zero where skipped, and
        from variables to the set of arms under whose condition they were made.
    """
    everyone = (1 << len(active)) - 1
    chosen = list({demand for demand, _ in parts} - {everyone})
    membership = [[arms >> arm & 1 for arm in range(len(active))] for arms in chosen]
    membership = np.array(membership, bool).reshape(-1, len(active))
    wanted = dict(zip(chosen, jnp.any(jnp.array(active) & membership, axis=1)))
    values, sets = dict(values), {}
    for (demand, dependent), jaxpr in parts.items():
        work = functools.partial(jax.core.eval_jaxpr, jaxpr, ())
        arguments = [values[v] for v in jaxpr.invars]
        if all(equation.primitive in _CHEAP for equation in jaxpr.eqns):
            demand = everyone
        if before is not None and not dependent:
            results = [before[v] for v in jaxpr.outvars]
        elif demand == everyone:
            results = work(*arguments)
        else:
            otherwise = _zeros_like(jaxpr.outvars)
            if before is not None and demand.bit_count() == 1:
                # The zero gradient of a single arm is there already: nothing is copied.
                otherwise = _always([before[v] for v in jaxpr.outvars])
            results = jax.lax.cond(wanted[demand], work, otherwise, *arguments)
        values.update(zip(jaxpr.outvars, results))
        sets.update(dict.fromkeys(jaxpr.outvars, demand))
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


def _always(values):
    return lambda *_: values


# Keras' generators are variables, so there are no others but Python's and NumPy's.
replay = Replay


def after(*structures):
    """Nothing: what was computed was computed."""
    return contextlib.nullcontext()


def only_builds():
    """Never: Keras makes all variables before the first step."""
    return False


def build_first(model, train_function):
    """The same function."""
    return train_function


def when(active, update):
    """Runs `update()`, which assigns to Keras variables, if `active`.

    Args:
        active: bool or scalar boolean array.
        update: Function without arguments; what it returns is ignored.
    """
    if isinstance(active, bool):
        if active:
            update()
        return
    assigned = []

    def updated():
        with Staged() as staged:
            update()
        assigned.extend(staged.assigned)
        return [staged.get_current_value(v) for v in assigned]

    # Traced before the condition, which must know what is assigned.
    update_fn = core.jaxpr_as_fun(jax.make_jaxpr(updated)())
    values = jax.lax.cond(active, update_fn, lambda: [v.value for v in assigned])
    for variable, value in zip(assigned, values):
        variable.assign(value)


# XLA makes one loop of an update of all weights and of the choice, where a condition
# takes memory for the old weights and the new ones.
select = assign_if


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


def apply(optimizer, gradients, variables):
    """The step of a Keras optimizer, as Keras' own train step asks for it.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built for `variables`.
        gradients: List of arrays.
        variables: List of `keras.Variable`s.
    """
    state = optimizer.variables
    values = optimizer.stateless_apply(
        [v.value for v in state], gradients, [v.value for v in variables]
    )
    for group, new in zip((variables, state), values):
        for variable, value in zip(group, new):
            variable.assign(value)


def read(variable):
    """The value of a `keras.Variable` as a tensor."""
    return variable.value
