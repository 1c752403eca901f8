"""A jaxpr of the loss and the gradients of all arms, which skips inactive arms.

The loss and all gradients are traced once to a jaxpr. `partition` groups its equations
by the arms that need them. Each group becomes one `jax.lax.cond` with the predicate
"any of these arms is active". A loop (`scan`, `while`) or a `cond` of the model is one
equation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import keras
from jax.extend import core
from jax.extend.core import primitives

from keras_slsam.gradients import jax_layout
from keras_slsam.gradients import jax_recompute
from keras_slsam.gradients import partition
from keras_slsam.gradients import program

# Maps each primitive that calls a traced function to the parameter with its jaxpr. The
# primitive of `jax.checkpoint` has no public name. Inlining it is safe: the conditions
# keep what it recomputes apart from the forward pass.
CALLS = {
    primitives.jit_p.name: "jaxpr",
    primitives.closed_call_p.name: "call_jaxpr",
    "remat2": "jaxpr",
}


class Gradients(program.Program):
    """A function from weights to a value and the gradient of each weight.

    Args:
        function: Function from a list of arrays to `(value, gradients)`, with one
            gradient per weight.
        weights: List of arrays to trace it with.
        passes: `Passes` of a traced step.

    Attributes:
        structure: That of what `function` returns, of which `first` and `second` return
            the leaves.
    """

    def __init__(self, function, weights, passes):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(weights)
        self._jaxpr = closed.jaxpr
        self.structure = jax.tree.structure(shapes)
        equations, outputs, self._constants = inline(closed, closed.jaxpr.invars)
        for i, v in enumerate(outputs):
            if isinstance(v, core.Literal):
                outputs[i] = core.Var(v.aval)
                self._constants[outputs[i]] = jnp.asarray(v.val, v.aval.dtype)
        nodes = [_node(equation) for equation in equations]
        independent = set()
        if passes.twice:
            independent = partition.find_independent(nodes, closed.jaxpr.invars)
        others = len(outputs) - len(passes.arm_of)
        needs = [None] * others + passes.arm_of
        self._gradients = set(outputs[others:])
        if has_exchanges():
            # Work of arms that are nearly always active may have exchanges, as that of
            # BatchNorm has, which are in order only in conditions.
            passes = dataclasses.replace(passes, min_probability=0.0)
        super().__init__(nodes, outputs, needs, independent, passes)

    def choose_copied(self, nodes, outputs):
        given = [*self._jaxpr.invars, *self._constants]
        jax_recompute.mark(nodes, given, outputs, self._everyone)

    def given(self, weights):
        return {**self._constants, **dict(zip(self._jaxpr.invars, weights))}

    def place(self, part, values):
        jaxpr = self._jaxpr.replace(
            constvars=(),
            invars=part.inputs,
            outvars=part.outputs,
            eqns=[node.work for node in part.nodes],
            effects=self._jaxpr.effects if part.arms == self._everyone else frozenset(),
        )
        work = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
        made = work(*(values[v] for v in part.inputs))
        if part.arms == self._everyone and has_exchanges():
            # The first condition waits for the loss, and for the gradients of arms that
            # are always active. With `DataParallel`, all devices have these whole.
            for variable, value in zip(part.outputs, made):
                whole = value.ndim == 0 or variable in self._gradients
                if whole and value.size and jnp.issubdtype(value.dtype, jnp.floating):
                    first = value[(0,) * value.ndim]
                    self._turn = self._turn + first.astype("float32")
        return made

    def evaluate(self, parts, values, before=None):
        self._turn = jnp.zeros((), "float32")
        return super().evaluate(parts, values, before)

    def choose(self, active, work, skip):
        if not has_exchanges():
            return super().choose(active, work, skip)
        # All devices must make their exchanges in one order. On a CPU, XLA may start
        # a condition before the exchange in the previous one, so each waits for a
        # number that the previous one returns.
        made, self._turn = jax.lax.cond(
            active & is_known(self._turn),
            lambda turn: (work(), turn + 1),
            lambda turn: (skip(), turn),
            self._turn,
        )
        return made

    def zeros(self, part, work):
        return [jnp.zeros(v.aval.shape, v.aval.dtype) for v in part.outputs]


def has_exchanges():
    """Returns whether a step runs on several devices."""
    distribution = keras.distribution.distribution()
    return distribution is not None and distribution.device_mesh.devices.size > 1


def is_known(number):
    """Returns True once a scalar float tensor is computed. XLA cannot simplify it."""
    bits = jax.lax.bitcast_convert_type(number.astype("float32"), "int32")
    return bits != 0x7FADBEEF  # a NaN that no computation makes


def inline(jaxpr, inputs):
    """Returns the equations of a jaxpr, with called functions inlined.

    Args:
        jaxpr: `Jaxpr` or `ClosedJaxpr`.
        inputs: List of variables and literals, the arguments.

    Returns:
        `(equations, outputs, constants)`: a flat list, the variables and literals that
        hold the results, and a dict from variables to constant arrays.
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
            # Two calls of a function share its jaxpr, so each needs new variables.
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
    """Returns False for tokens, references and typed random keys."""
    return isinstance(variable.aval, jax.core.ShapedArray) and not (
        jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.extended)
    )
