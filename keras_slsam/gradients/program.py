"""The graph of all gradients, run where arms are active, on JAX and TensorFlow.

What all arms need runs in any case. The rest is in conditions, one for each set of
arms, on "any of these is active".
"""

import functools

from keras import ops

from keras_slsam.gradients import partition


class Program:
    """A traced function of weights, which gives a loss and the gradients of all arms.

    Args:
        nodes: List of `partition.Node`s, each after those that make what it reads.
        outputs: List of values, what the function returns.
        needs: List of int, the sets of arms that need them: all arms, or one.
        active: List of scalar boolean tensors, one per arm.
        independent: Set of nodes that a second run need not compute again.
        min_probability: Float, the least probability that an arm is active, or 0.
    """

    def __init__(self, nodes, outputs, needs, active, independent, min_probability):
        self._outputs, self._needs, self._active = outputs, needs, active
        self._everyone = (1 << len(active)) - 1
        wanted = {}
        for value, arms in zip(outputs, needs):
            wanted[value] = wanted.get(value, 0) | arms
        most = partition.most_arms(min_probability)
        partition.mark(nodes, wanted, self._everyone, independent, most)
        self.choose_copied(nodes, wanted)
        partition.place_free(nodes, wanted, self._everyone)
        self._parts, self._parts_again, self._kept = partition.partition_passes(
            nodes, list(wanted), independent
        )
        self._sets = {value: node.arms for node in nodes for value in node.makes}

    def choose_copied(self, nodes, outputs):
        """Marks nodes that are to be copied, where that depends on the arms."""

    def place(self, part, values):
        """Puts a part into what is being traced.

        Args:
            part: `partition.Part`.
            values: Dict from the part's inputs to tensors.

        Returns:
            List of tensors, the part's outputs.
        """
        raise NotImplementedError

    def zeros(self, part, work):
        """What stands in for a part that is skipped.

        Args:
            part: `partition.Part`.
            work: Function without arguments that places it.

        Returns:
            List of tensors like the part's outputs.
        """
        raise NotImplementedError

    def run(self, given):
        """What the function returns.

        Args:
            given: Dict from the inputs of the graph to tensors.

        Returns:
            List of tensors, zero where none of their arms is active.
        """
        self._values = self._evaluate(self._parts, given)
        return self._results(self._values)

    def run_again(self, given):
        """The same at other weights, of which the inactive ones are those of `run`."""
        kept = {value: self._values[value] for value in self._kept}
        values = self._evaluate(self._parts_again, {**given, **kept}, self._values)
        return self._results(values)

    def _evaluate(self, parts, values, before=None):
        sets = [part.arms for part in parts if part.arms != self._everyone]
        wanted = dict(zip(sets, self._any_active(sets)))
        for part in parts:
            work = functools.partial(self.place, part, values)
            if part.arms == self._everyone:
                made = work()
            else:
                skip = functools.partial(self.zeros, part, work)
                if before and part.arms.bit_count() == 1:
                    # The zero gradient of a single arm is there: nothing is written.
                    skip = functools.partial(_of, part.outputs, before)
                made = ops.cond(wanted[part.arms], work, skip)
            values.update(zip(part.outputs, made))
        return values

    def _any_active(self, sets):
        """Whether an arm of each set is active, a list of scalar boolean tensors."""
        if not sets:
            return []
        members = partition.membership(sets, len(self._active))
        found = ops.any(ops.logical_and(ops.stack(self._active), members), axis=1)
        return ops.unstack(found, len(sets))

    def _results(self, values):
        results = [values[value] for value in self._outputs]
        for i, (value, arms) in enumerate(zip(self._outputs, self._needs)):
            if self._sets.get(value, self._everyone) != arms:
                # Made for others too: a loop yields the gradients of all its weights,
                # the terms of a sum have the same gradient.
                active = self._active[arms.bit_length() - 1]
                results[i] = ops.where(active, results[i], ops.zeros_like(results[i]))
        return results


def _of(chosen, values):
    return [values[value] for value in chosen]
