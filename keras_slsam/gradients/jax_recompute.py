"""Chooses what JAX recomputes in a condition, rather than keeps for it.

A value that one condition keeps for another takes memory, and time to write and copy. A
light equation is recomputed if its inputs are available anyway: weights, data, values
that the forward pass keeps for the backward pass, and small values.
"""

from jax.extend.core import primitives

# A longer chain of light equations is not light.
_LONGEST_CHAIN = 16

# An input that is this many times smaller than the result does not count.
_SMALL = 8

# These cost less than a condition.
FREE = {
    primitives.broadcast_in_dim_p,
    primitives.iota_p,
    primitives.reshape_p,
    primitives.squeeze_p,
}

# These cost no more than writing their result and reading it again.
_LIGHT = FREE | {
    getattr(primitives, f"{name}_p")
    for name in (
        *("abs", "add", "add_jaxvals", "and", "convert_element_type", "copy", "div"),
        *("eq", "ge", "gt", "integer_pow", "le", "lt", "max", "min", "mul", "ne"),
        *("neg", "not", "or", "select_n", "sign", "square", "sub", "transpose"),
    )
}


def mark(nodes, inputs, outputs, everyone):
    """Marks the nodes that are recomputed wherever their results are read.

    Args:
        nodes: List of `partition.Node`s, marked with the arms that need them.
        inputs: List of variables that are always available.
        outputs: List of variables.
        everyone: int, the set of all arms.
    """
    forward = {v for node in nodes if node.arms == everyone for v in node.makes}
    conditional = [node for node in nodes if node.arms not in (0, everyone)]
    kept = {v for node in conditional for v in node.reads if v in forward}
    # Maps each available variable to the number of equations that recompute it.
    effort, outputs = dict.fromkeys(inputs, 0), set(outputs)
    for node in nodes:
        result = node.makes[:1]
        read = [
            v
            for v in node.reads
            if v in effort or result and v.aval.size * _SMALL > result[0].aval.size
        ]
        if node.work.primitive in _LIGHT and all(v in effort for v in read):
            count = 1 + sum(effort[v] for v in read)
            if count <= _LONGEST_CHAIN and result[0] not in outputs:
                node.copied = True
                effort[result[0]] = count
        effort.update((v, 0) for v in node.makes if v in kept and v not in effort)
