"""The two passes of a step: one loss and its gradients, at two sets of weights."""


class Passes:
    """The passes of a step. Each backend has a subclass.

    Args:
        loss_fn: `Loss`, a pure function from a list of tensors, and a function to call
            with the loss while layers still read these, to `(loss, aux)` with a scalar
            `loss` and any structure `aux`.
        arm_of: List of int, the arm of each weight.
        active: List with one entry per arm: bools, or scalar boolean tensors inside a
            traced step, of which at least one is true.
        twice: bool, whether there may be a second pass.
        jit_compile: bool, whether XLA compiles the graph of TensorFlow around the step.
        min_probability: Float, the least probability that an arm is active in a traced
            step, 0 if that is not known.
    """

    def __init__(
        self,
        loss_fn,
        arm_of,
        active,
        twice=True,
        jit_compile=False,
        min_probability=0.0,
    ):
        self.loss_fn = loss_fn
        self.arm_of = arm_of
        self.active = active
        self.twice = twice
        self.jit_compile = jit_compile
        self.min_probability = min_probability

    def first(self, weights):
        """Value of the loss and the gradients of the active weights.

        Args:
            weights: List of tensors to differentiate at.

        Returns:
            `((loss, aux), gradients)`. The gradient of an inactive weight is `None` if
            `active` holds bools and zero otherwise. That of an active weight that the
            loss does not reach is zero. On TensorFlow those of embeddings are
            `tf.IndexedSlices`.

        Raises:
            ValueError: if a weight is read or written where it cannot be replaced.
        """
        raise NotImplementedError

    def second(self, weights):
        """The gradients at other values of the active weights.

        Random numbers are those of the first pass. Only those of TensorFlow's own
        stateful operations cannot be repeated.

        Args:
            weights: List of tensors, the inactive ones those of the first pass.

        Returns:
            List like the gradients of `first`.
        """
        raise NotImplementedError
