"""The two passes of a step: one loss and its gradients, at two sets of weights."""

import dataclasses
import typing


@dataclasses.dataclass(eq=False)
class Passes:
    """The passes of a step. Each backend has a subclass.

    Attributes:
        loss_fn: `Loss`, a pure function from a list of weights to `(loss, aux)`, with a
            scalar `loss` and any structure `aux`. See `Loss.__call__`.
        arm_of: List of int, the arm of each weight.
        active: List with one entry per arm: bools, or scalar boolean tensors inside a
            traced step. At least one is true.
        twice: bool, whether there may be a second pass.
        jit_compile: bool, whether XLA compiles the surrounding graph of TensorFlow.
        min_probability: Float, a lower bound of the probability that an arm is active
            in a traced step, 0 if unknown.
    """

    loss_fn: typing.Any
    arm_of: list
    active: list
    twice: bool = True
    jit_compile: bool = False
    min_probability: float = 0.0

    def __post_init__(self):
        """Prepares the passes."""

    def first(self, weights):
        """Computes the loss and the gradients of the active weights.

        Args:
            weights: List of tensors to differentiate at.

        Returns:
            `((loss, aux), gradients)`. The gradient of an inactive weight is `None` if
            `active` holds bools, else zero. The gradient of an active weight that the
            loss does not depend on is zero. On TensorFlow, gradients of embeddings are
            `tf.IndexedSlices`.

        Raises:
            ValueError: if a weight is read or written where it cannot be replaced.
        """
        raise NotImplementedError

    def second(self, weights):
        """Computes the loss and the gradients at other values of the active weights.

        Random numbers are the same as in the first pass, except those of TensorFlow's
        own stateful operations, which cannot be repeated.

        Args:
            weights: List of tensors. Inactive weights are the same as in the first
                pass.

        Returns:
            Like `first`.
        """
        raise NotImplementedError
