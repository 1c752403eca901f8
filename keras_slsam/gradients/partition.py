"""Finds which arms need which operations of a graph, for any framework.

The graph holds the loss and the gradients of all weights. A backward walk marks each
node with the set of arms that need it. Nodes with the same set form a part, which runs
if any of these arms is active. All arms need the loss, and at least one arm is active
in every step.

The second pass differs from the first in the weights only. It does not run nodes that
depend on no weight, so each pass has its own parts.

A set of arms is an int with one bit per arm.
"""

import collections
import dataclasses
import functools
import math
import operator
import typing

# Work that is skipped in a smaller share of the steps than this has no condition.
RARELY = 0.01


@dataclasses.dataclass(eq=False)
class Node:
    """An operation that computes values from values.

    Attributes:
        work: The framework's operation.
        reads: List of hashable values.
        makes: List of values. A value that no node makes is an input of the graph.
        always: bool, whether it runs in every pass, because it has effects.
        local: List of values in `makes` that a condition cannot return. Other parts can
            read them only if they are made outside conditions.
        free: bool, whether it is cheaper than a condition. It runs in the part that
            makes its inputs.
        copied: bool, whether it is cheaper to recompute than to keep. It runs in each
            part that reads it, and makes no output of the graph.
        arms: int, the set of arms that need it, 0 if none does.
    """

    work: typing.Any
    reads: list
    makes: list
    always: bool = False
    local: list = dataclasses.field(default_factory=list)
    free: bool = False
    copied: bool = False
    arms: int = 0


class Part(typing.NamedTuple):
    """Nodes that run together, if any of their arms is active."""

    arms: int
    nodes: list
    inputs: list
    outputs: list


def find_independent(nodes, weights):
    """Returns the set of nodes that depend on no weight and have no effects.

    Args:
        nodes: List of `Node`s in topological order.
        weights: Values, inputs of the graph.
    """
    found, dependent = set(), set(weights)
    for node in nodes:
        if node.always or not dependent.isdisjoint(node.reads):
            dependent.update(node.makes)
        else:
            found.add(node)
    return found


def most_arms(min_probability):
    """Returns the largest number of arms that are worth a condition, at least 1.

    If a set has more arms, one of them is nearly always active.

    Args:
        min_probability: Float, a lower bound of the probability that an arm is active,
            0 if unknown.
    """
    inactive = math.log1p(-min(min_probability, 1 - 1e-12))
    return max(math.log(RARELY) / inactive, 1.0) if inactive else math.inf


def mark(nodes, needs, everyone, independent=frozenset(), most=math.inf):
    """Marks each node with the set of arms that need it.

    Args:
        nodes: List of `Node`s in topological order.
        needs: Dict from the graph's outputs to the sets of arms that need them.
        everyone: int, the set of all arms.
        independent: Set of nodes that the second pass does not run.
        most: Number, the most arms under one condition.
    """
    arms_of, readers = collections.defaultdict(int, needs), collections.defaultdict(set)
    for node in reversed(nodes):
        arms = functools.reduce(operator.or_, [arms_of[v] for v in node.makes], 0)
        here = arms, node in independent
        crosses = any(readers[v] - {here} for v in node.local)
        if node.always or crosses or arms.bit_count() > most:
            arms = everyone
        node.arms = arms
        for value in node.reads if arms else ():
            arms_of[value] |= arms
            readers[value].add((arms, node in independent))


def place_free(nodes, outputs, everyone):
    """Moves free nodes to the part that makes their inputs, if there is only one.

    Args:
        nodes: List of `Node`s in topological order.
        outputs: Values, the outputs of the graph. Nodes that make them do not move.
        everyone: int, the set of all arms.
    """
    outputs, made_by = set(outputs), collections.defaultdict(set)
    for node in nodes:
        parts = set().union(*(made_by[v] for v in node.reads)) - {everyone}
        moves = node.free and node.arms and outputs.isdisjoint(node.makes)
        if moves and not node.copied and len(parts) <= 1:
            node.arms = max(parts, default=everyone)
        made_by.update((v, parts if node.copied else {node.arms}) for v in node.makes)


def partition(nodes, outputs):
    """Groups nodes by the set of arms that need them.

    Along the data flow, the set only shrinks. So no other node lies between two nodes
    of one set, and a part comes after the parts that it reads if larger sets come
    first.

    Args:
        nodes: List of marked `Node`s in topological order.
        outputs: List of values that must be among the outputs of their parts.

    Returns:
        List of `Part`s in topological order.
    """
    readers = collections.defaultdict(set)
    for value in outputs:
        readers[value].add(None)
    members = collections.defaultdict(list)
    for node in reversed(nodes):
        parts = {node.arms} if node.arms else set()
        if node.copied:
            parts = set().union(*(readers.pop(v, ()) for v in node.makes))
        for arms in parts:
            members[arms].append(node)
            for value in node.reads:
                readers[value].add(arms)
    found = []
    for arms in sorted(members, key=int.bit_count, reverse=True):
        body = members[arms][::-1]
        made = dict.fromkeys(v for node in body for v in node.makes)
        read = dict.fromkeys(v for node in body for v in node.reads)
        inputs = [v for v in read if v not in made]
        found.append(Part(arms, body, inputs, [v for v in made if readers[v] - {arms}]))
    return found


def partition_passes(nodes, outputs, independent):
    """Groups the nodes of both passes of a step.

    Args:
        nodes: List of marked `Node`s in topological order.
        outputs: List of values, the outputs of the graph.
        independent: Set of nodes that the second pass does not run.

    Returns:
        Tuple of the parts of the first pass, the parts of the second, and the list of
        values that the second pass reuses from the first.
    """
    again = [node for node in nodes if node.copied or node not in independent]
    second = partition(again, outputs)
    made = {v for n in nodes if n in independent and not n.copied for v in n.makes}
    read = [*outputs, *(v for part in second for v in part.inputs)]
    kept = list(dict.fromkeys(v for v in read if v in made))
    return partition(nodes, [*outputs, *kept]), second, kept
