"""What is recomputed on JAX rather than kept for another condition.

What one condition keeps for another takes memory, and time to write and to copy. A
light equation is not worth that if what it reads is there anyway: weights, data, what
the forward pass keeps for the backward pass, and small things.
"""

from jax.extend.core import primitives

# A chain of more light equations than this is not light.
_LONGEST_CHAIN = 16

# What is smaller than a result by this factor does not count beside it.
_SMALL = 8

# A condition would cost more than these do.
FREE = {
    primitives.broadcast_in_dim_p,
    primitives.iota_p,
    primitives.reshape_p,
    primitives.squeeze_p,
}

# These cost no more than to write their result down and read it again.
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
        nodes: List of `partition.Node`s, equations marked with the arms that need them.
        inputs: List of variables, which are there in any case.
        outputs: List of variables.
        everyone: int, the set of all arms.
    """
    forward = {v for node in nodes if node.arms == everyone for v in node.makes}
    conditional = [node for node in nodes if node.arms not in (0, everyone)]
    kept = {v for node in conditional for v in node.reads if v in forward}
    # For each variable that is there, the number of equations to make it.
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
