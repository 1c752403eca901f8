"""The parts of random graphs compute the values that are needed, and no others."""

import collections
import random

import pytest

from keras_slsam.gradients import partition
from keras_slsam.gradients.partition import Node

NUM_ARMS = 4
EVERYONE = (1 << NUM_ARMS) - 1


def make_graph(rng, **shares):
    """Makes a random graph over a few inputs, with the arms that need each output.

    Args:
        rng: `random.Random`.
        **shares: Floats, the share of nodes with each attribute.

    Returns:
        `(nodes, inputs, needs)`.
    """
    inputs = [f"input {i}" for i in range(4)]
    values, nodes = list(inputs), []
    for i in range(rng.randrange(5, 25)):
        reads = rng.sample(values, rng.randrange(min(4, len(values))))
        makes = [f"{i}.{j}" for j in range(rng.choice([1, 1, 2]))]
        flags = {name: rng.random() < share for name, share in shares.items()}
        if flags.pop("local", False):
            flags["local"] = makes[:1]
        nodes.append(Node(i, reads, makes, **flags))
        values += makes
    made = [v for v in values if v not in inputs]
    chosen = rng.sample(made, min(len(made), NUM_ARMS + 1))
    sets = [EVERYONE, *(1 << rng.randrange(NUM_ARMS) for _ in chosen[1:])]
    needs = dict(zip(chosen, sets))
    for node in nodes:
        node.copied = node.copied and not node.always and not node.local
        node.copied = node.copied and not needs.keys() & set(node.makes)
    return nodes, inputs, needs


def compute(node, values):
    read = tuple(values[v] for v in node.reads)
    return {v: hash((node.work, v, read)) for v in node.makes}


def compute_all(nodes, given):
    values = dict(given)
    for node in nodes:
        values.update(compute(node, values))
    return values


def run(parts, given, active):
    """Runs the parts that active arms need.

    Returns:
        `(values, counts)`: the values after the run, `None` if skipped, and the number
        of runs of each node.
    """
    known, counts = dict(given), collections.Counter()
    for part in parts:
        if not part.arms & active:
            known.update(dict.fromkeys(part.outputs))
            continue
        values = {v: known[v] for v in part.inputs}
        for node in part.nodes:
            values.update(compute(node, values))
            counts[node] += 1
        known.update((v, values[v]) for v in part.outputs)
    return known, counts


def wanted(nodes, needs, active):
    """Finds the nodes that the outputs of active arms depend on, by brute force."""
    values = {v for v, arms in needs.items() if arms & active}
    found = set()
    for node in reversed(nodes):
        if node.always or values.intersection(node.makes):
            found.add(node)
            values.update(node.reads)
    return found


def plan(nodes, inputs, needs):
    independent = partition.find_independent(nodes, inputs[:2])
    partition.mark(nodes, needs, EVERYONE, independent)
    partition.place_free(nodes, needs, EVERYONE)
    return independent, *partition.partition_passes(nodes, list(needs), independent)


def passes(seed, **shares):
    """Runs both passes on a random graph, for each set of active arms.

    Yields:
        `(nodes, needs, independent, active, found)`. For each pass, `found` has the
        expected values, the computed values, and the number of runs of each node.
    """
    nodes, inputs, needs = make_graph(random.Random(seed), **shares)
    independent, first, second, kept = plan(nodes, inputs, needs)
    given = {v: hash(v) for v in inputs}
    others = {**given, **{v: hash((v, "other")) for v in inputs[:2]}}
    for active in range(1, EVERYONE + 1):
        before, counts = run(first, given, active)
        known = {**others, **{v: before[v] for v in kept}}
        after, again = run(second, known, active)
        found = [
            (compute_all(nodes, given), before, counts),
            (compute_all(nodes, others), after, again),
        ]
        yield nodes, needs, independent, active, found


ALL = {"always": 0.1, "local": 0.2, "free": 0.3, "copied": 0.3}


@pytest.mark.parametrize("shares", [{}, {"copied": 0.5}, ALL])
def test_both_passes_compute_what_the_active_arms_need(shares):
    for seed in range(60):
        for _, needs, _, active, found in passes(seed, **shares):
            for expected, values, _ in found:
                for value, arms in needs.items():
                    if arms & active:
                        assert values[value] == expected[value]


@pytest.mark.parametrize("shares", [{}, {"always": 0.1}, {"copied": 0.5}])
def test_only_nodes_that_active_arms_need_run(shares):
    for seed in range(60):
        for nodes, needs, independent, active, found in passes(seed, **shares):
            needed = wanted(nodes, needs, active)
            for (_, _, counts), again in zip(found, [set(), independent]):
                assert counts.keys() <= needed
                once = {n for n in needed - again if not n.copied}
                assert all(counts[n] == 1 for n in once)
                assert not any(counts[n] for n in again if not n.copied)


def test_values_that_a_condition_cannot_return_are_read_in_the_same_part():
    for seed in range(60):
        nodes, inputs, needs = make_graph(random.Random(seed), **ALL)
        _, first, second, _ = plan(nodes, inputs, needs)
        local = {v for node in nodes for v in node.local} - needs.keys()
        for part in [*first, *second]:
            assert part.arms == EVERYONE or local.isdisjoint(part.outputs)


def test_nodes_with_effects_run_once_in_each_pass():
    for seed in range(60):
        for nodes, _, _, _, found in passes(seed, **ALL):
            for _, _, counts in found:
                assert all(counts[n] == 1 for n in nodes if n.always)


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.2, 0.5, 0.8])
def test_a_set_that_is_almost_always_active_has_no_condition(probability):
    most = int(partition.most_arms(probability))
    assert (1 - probability) ** most >= partition.RARELY * (1 - 1e-9)
    assert (1 - probability) ** (most + 1) < partition.RARELY
    assert partition.most_arms(0.0) == float("inf")
    assert partition.most_arms(1.0) == 1

    chain = [Node(i, [i], [i + 1, -i - 1]) for i in range(6)]
    needs = {-i - 1: 1 << i for i in range(6)}
    partition.mark(chain, needs, (1 << 7) - 1, most=3)
    assert [node.arms for node in chain] == [0b1111111] * 3 + [
        0b111000,
        0b110000,
        1 << 5,
    ]


def test_free_nodes_do_not_make_a_separate_part():
    view = Node("view", ["b"], ["c"], free=True)
    chain = [Node("work", ["a"], ["b"]), view, Node("more", ["c"], ["d"])]
    needs = {"b": 0b01, "d": 0b10}
    partition.mark(chain, needs, 0b111)
    assert [node.arms for node in chain] == [0b11, 0b10, 0b10]
    partition.place_free(chain, needs, 0b111)
    assert [node.arms for node in chain] == [0b11, 0b11, 0b10]


def test_copied_nodes_are_computed_by_each_part_that_reads_them():
    cheap = Node("cheap", ["a"], ["b"], copied=True)
    ends = [Node("first", ["b"], ["c"]), Node("second", ["b"], ["d"])]
    needs = {"c": 0b01, "d": 0b10}
    partition.mark([cheap, *ends], needs, 0b111)
    parts = partition.partition([cheap, *ends], list(needs))
    assert sorted(part.nodes[1].work for part in parts) == ["first", "second"]
    assert all(part.nodes[0] is cheap for part in parts)
    assert all(part.inputs == ["a"] for part in parts)
