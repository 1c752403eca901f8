"""Which work is needed by which arms, in the graph of any framework.

The graph holds the loss and the gradients of all weights. A walk back from these finds
the arms that need each node. Nodes that the same arms need become one part, which runs
if any of these arms is active. What the loss needs belongs to all arms, of which at
least one is active in every step.

The second pass of a step differs from the first in the weights. What depends on none of
them is not run again, so each pass has parts of its own.

A set of arms is an int with one bit per arm.
"""

import collections
import dataclasses
import functools
import math
import operator
import typing

# What is skipped in fewer steps than this share is not worth a condition.
RARELY = 0.01


@dataclasses.dataclass(eq=False)
class Node:
    """An operation, which makes values from values.

    Attributes:
        work: The framework's operation.
        reads: List of values, anything hashable.
        makes: List of values. What no node makes is an input of the graph.
        always: bool, whether it runs in every pass: it has effects.
        local: List of those of `makes` that no condition can give: other parts read
            them only if they are made without one.
        free: bool, whether a condition costs more: it runs where what it reads is made.
        copied: bool, whether it is cheaper to compute than to keep: it runs in each
            part that reads it. It makes none of the graph's outputs.
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
    """The nodes that compute the same at other values of the weights.

    Args:
        nodes: List of `Node`s, each after those that make what it reads.
        weights: Values, inputs of the graph.

    Returns:
        Set of nodes.
    """
    found, dependent = set(), set(weights)
    for node in nodes:
        if node.always or not dependent.isdisjoint(node.reads):
            dependent.update(node.makes)
        else:
            found.add(node)
    return found


def most_arms(min_probability):
    """The most arms that are worth a condition: with more, one is nearly always active.

    Args:
        min_probability: Float, the least probability that an arm is active, 0 if that
            is not known.

    Returns:
        Float, at least 1.
    """
    inactive = math.log1p(-min(min_probability, 1 - 1e-12))
    return max(math.log(RARELY) / inactive, 1.0) if inactive else math.inf


def mark(nodes, needs, everyone, independent=frozenset(), most=math.inf):
    """Finds the arms that need each node.

    Args:
        nodes: List of `Node`s, each after those that make what it reads.
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
    """Moves free nodes to the part that makes what they read, if it is one.

    Args:
        nodes: List of `Node`s, each after those that make what it reads.
        outputs: Values, the outputs of the graph. What makes them stays.
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
    """Sorts nodes by the arms that need them.

    Along the data flow the set of arms only shrinks. So no other node lies between two
    of one set, and in the order of their sizes the parts come after what they read.

    Args:
        nodes: List of marked `Node`s, each after those that make what it reads.
        outputs: List of values, to be among the outputs of their parts.

    Returns:
        List of `Part`s, in the order of computation.
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
    """The parts of both passes of a step.

    Args:
        nodes: List of marked `Node`s, each after those that make what it reads.
        outputs: List of values, the outputs of the graph.
        independent: Set of nodes that the second pass does not run.

    Returns:
        Tuple of the parts of the first pass and of the second, and the list of values
        that the second takes from the first.
    """
    again = [node for node in nodes if node.copied or node not in independent]
    second = partition(again, outputs)
    made = {v for n in nodes if n in independent and not n.copied for v in n.makes}
    read = [*outputs, *(v for part in second for v in part.inputs)]
    kept = list(dict.fromkeys(v for v in read if v in made))
    return partition(nodes, [*outputs, *kept]), second, kept
