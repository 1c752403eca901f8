"""The gradients of all arms on JAX, in one program that skips inactive arms.

The loss and all its gradients are traced once, to a jaxpr, which `partition` sorts by
the arms that need its equations. Each set of arms becomes one `jax.lax.cond` on "any of
these is active". A loop (`scan`, `while`) or a `cond` of the model is one equation.
"""

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from keras_slsam.gradients import jax_layout
from keras_slsam.gradients import jax_recompute
from keras_slsam.gradients import partition

# Calls of a traced function, by the name of the primitive, and the parameter that holds
# its jaxpr. That of `jax.checkpoint` has no public name. What it recomputes stays apart
# from the forward pass: conditions do that.
CALLS = {
    primitives.jit_p.name: "jaxpr",
    primitives.closed_call_p.name: "call_jaxpr",
    "remat2": "jaxpr",
}


class Program:
    """A function of weights that gives a value and the gradient of each weight.

    Args:
        function: Function from a list of arrays to `(value, gradients)`, of which the
            gradients are a list like the weights.
        weights: List of arrays to trace it with.
        arms: List of int, the arm of each weight.
        active: List of scalar boolean arrays, one per arm.
        twice: bool, whether there may be a second run.
    """

    def __init__(self, function, weights, arms, active, twice):
        self._arms, self._active = arms, active
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(weights)
        self._structure = jax.tree.structure(shapes)
        self._inputs, self._effects = closed.jaxpr.invars, closed.jaxpr.effects
        self._template = closed.jaxpr
        equations, self._outputs, self._constants = inline(closed, self._inputs)
        self._everyone = everyone = (1 << len(active)) - 1
        sets = [everyone] * (len(self._outputs) - len(arms)) + [
            1 << arm for arm in arms
        ]
        needs = {}
        for v, arms_of_v in zip(self._outputs, sets):
            if not isinstance(v, core.Literal):
                needs[v] = needs.get(v, 0) | arms_of_v
        nodes = [_node(equation) for equation in equations]
        independent = set()
        if twice:
            independent = partition.find_independent(nodes, self._inputs)
        partition.mark(nodes, needs, everyone, independent)
        given = [*self._inputs, *self._constants]
        jax_recompute.mark(nodes, given, needs, everyone)
        partition.place_free(nodes, needs, everyone)
        self._parts, self._parts_again, self._kept = partition.partition_passes(
            nodes, list(needs), independent
        )
        self._sets = {v: node.arms for node in nodes for v in node.makes}

    def run(self, weights):
        """The value and the gradients at the given weights.

        Args:
            weights: List of arrays.

        Returns:
            What the function returns; the gradients of inactive arms are zero.
        """
        self._values = self._evaluate(self._parts, weights, {})
        return self._results(self._values)

    def run_again(self, weights):
        """The same at weights of which the inactive ones are those of `run`."""
        return self._results(self._evaluate(self._parts_again, weights, self._values))

    def _evaluate(self, parts, weights, before):
        wanted = self._any_active({part.arms for part in parts} - {self._everyone})
        values = {**self._constants, **dict(zip(self._inputs, weights))}
        if before:
            values.update((v, before[v]) for v in self._kept)
        for part in parts:
            work = core.jaxpr_as_fun(core.ClosedJaxpr(self._jaxpr(part), ()))
            arguments = [values[v] for v in part.inputs]
            if part.arms == self._everyone:
                results = work(*arguments)
            else:
                otherwise = _zeros_like(part.outputs)
                if before and part.arms.bit_count() == 1:
                    # The zero gradient of a single arm is there: nothing is copied.
                    otherwise = _always([before[v] for v in part.outputs])
                on = wanted[part.arms]
                results = jax.lax.cond(on, work, otherwise, *arguments)
            values.update(zip(part.outputs, results))
        return values

    def _jaxpr(self, part):
        return self._template.replace(
            constvars=(),
            invars=part.inputs,
            outvars=part.outputs,
            eqns=[node.work for node in part.nodes],
            effects=self._effects if part.arms == self._everyone else frozenset(),
        )

    def _any_active(self, sets):
        """For each set of arms, whether one of them is active: scalar arrays."""
        rows = partition.membership(sets, len(self._active))
        return dict(zip(sets, jnp.any(jnp.array(self._active) & rows, axis=1)))

    def _results(self, values):
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
            if isinstance(v, core.Literal) or self._sets.get(v) != 1 << arm:
                gradients[i] = jnp.where(self._active[arm], gradients[i], 0)
        return value, gradients


def inline(jaxpr, inputs):
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
        call = CALLS.get(equation.primitive.name)
        inner = equation.params[call] if call else jax_layout.channels_last(equation)
        if inner is not None:
            body, results, more = inline(inner, arguments)
            equations += body
            constants.update(more)
        else:
            # Two calls of one function share its jaxpr, so the variables are new.
            results = [core.Var(v.aval) for v in equation.outvars]
            equations.append(equation.replace(invars=arguments, outvars=results))
        names.update(zip(equation.outvars, results))
    return equations, renamed(jaxpr.outvars), constants


def _node(equation):
    return partition.Node(
        equation,
        [v for v in equation.invars if not isinstance(v, core.Literal)],
        equation.outvars,
        always=bool(equation.effects),
        local=[v for v in equation.outvars if not _has_zeros(v)],
        free=equation.primitive in jax_recompute.FREE,
    )


def _has_zeros(variable):
    """False for tokens, references and typed random keys."""
    return isinstance(variable.aval, jax.core.ShapedArray) and not (
        jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.extended)
    )


def _zeros_like(variables):
    return lambda *_: [jnp.zeros(v.aval.shape, v.aval.dtype) for v in variables]


def _always(values):
    return lambda *_: values
