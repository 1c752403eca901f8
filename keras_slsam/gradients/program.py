"""Runs a graph of all gradients on JAX and TensorFlow, and skips inactive arms.

Work that all arms need always runs. All other work is in conditions, one per set of
arms, with the predicate "any of these arms is active".
"""

import functools

import numpy as np
from keras import ops

from keras_slsam.gradients import partition


class Program:
    """A traced function from weights to a loss and the gradients of all arms.

    Args:
        nodes: List of `partition.Node`s in topological order.
        outputs: List of values that the function returns.
        needs: List, the arm that needs each output, or `None` for all arms.
        independent: Set of nodes that the second pass does not recompute.
        passes: `Passes` of a traced step.
    """

    def __init__(self, nodes, outputs, needs, independent, passes):
        self._outputs, self._active = outputs, passes.active
        # Work for an arm that is known to be active needs no condition.
        needs = [n if n is None or self._active[n] is not True else None for n in needs]
        self._needs = needs
        self._everyone = (1 << len(self._active)) - 1
        wanted = {}
        for value, arm in zip(outputs, needs):
            arms = self._everyone if arm is None else 1 << arm
            wanted[value] = wanted.get(value, 0) | arms
        most = partition.most_arms(passes.min_probability)
        partition.mark(nodes, wanted, self._everyone, independent, most)
        self.choose_copied(nodes, wanted)
        partition.place_free(nodes, wanted, self._everyone)
        self._parts, self._parts_again, self._kept = partition.partition_passes(
            nodes, list(wanted), independent
        )
        self._sets = {value: node.arms for node in nodes for value in node.makes}

    def choose_copied(self, nodes, outputs):
        """Marks nodes as copied, where this depends on the arms that need them."""

    def given(self, weights):
        """Returns a dict from the inputs of the graph to tensors."""
        raise NotImplementedError

    def place(self, part, values):
        """Adds a part to the current trace, and returns its outputs.

        Args:
            part: `partition.Part`.
            values: Dict from the part's inputs to tensors.
        """
        raise NotImplementedError

    def zeros(self, part, work):
        """Returns zeros in place of the outputs of a part that is skipped.

        Args:
            part: `partition.Part`.
            work: Function without arguments that places the part.
        """
        raise NotImplementedError

    def choose(self, active, work, skip):
        """Returns what `work()` returns if `active`, else what `skip()` returns.

        Args:
            active: Scalar boolean tensor.
            work: Function without arguments.
            skip: Function without arguments, with a result of the same structure.
        """
        return ops.cond(active, work, skip)

    def first(self, weights):
        """Returns the outputs at `weights`, zero where their arm is inactive."""
        self._values = self.evaluate(self._parts, self.given(weights))
        return self._results(self._values)

    def second(self, weights):
        """Returns the outputs at other values of the active weights."""
        given = {**self.given(weights), **{v: self._values[v] for v in self._kept}}
        return self._results(self.evaluate(self._parts_again, given, self._values))

    def evaluate(self, parts, values, before=None):
        """Adds parts to the current trace, and returns `values` with what they make.

        Args:
            parts: List of `partition.Part`s in topological order.
            values: Dict from the inputs to tensors.
            before: Dict from the values of the first pass to tensors, in the second.
        """
        sets = [part.arms for part in parts if part.arms != self._everyone]
        wanted = dict(zip(sets, self._any_active(sets)))
        for part in parts:
            work = functools.partial(self.place, part, values)
            if part.arms == self._everyone:
                made = work()
            else:
                skip = functools.partial(self.zeros, part, work)
                if before and part.arms.bit_count() == 1:
                    # Reuse the zero gradient of the first pass for a single arm.
                    zeros = [before[value] for value in part.outputs]
                    skip = functools.partial(list, zeros)
                made = self.choose(wanted[part.arms], work, skip)
            values.update(zip(part.outputs, made))
        return values

    def _any_active(self, sets):
        """Returns whether any arm of each set is active, as scalar boolean tensors."""
        if not sets:
            return []
        arms = range(len(self._active))
        members = np.array([[each >> arm & 1 for arm in arms] for each in sets], bool)
        found = ops.any(ops.logical_and(ops.stack(self._active), members), axis=1)
        return ops.unstack(found, len(sets))

    def _results(self, values):
        results = [values[value] for value in self._outputs]
        for i, (value, arm) in enumerate(zip(self._outputs, self._needs)):
            made_for = self._sets.get(value, self._everyone)
            if arm is not None and made_for != 1 << arm:
                # Other arms need it too: a loop computes the gradients of all its
                # weights, and the terms of a sum share a gradient.
                zeros = ops.zeros_like(results[i])
                results[i] = ops.where(self._active[arm], results[i], zeros)
        return results
