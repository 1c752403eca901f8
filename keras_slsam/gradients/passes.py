"""What the passes of a step get, on every backend."""


class Passes:
    """The two passes of a step: one loss and its gradients, at two sets of weights.

    Each backend has a subclass with two methods. `first(weights)` returns
    `((loss, aux), gradients)`, and `second(weights)` returns the gradients at other
    values of the active weights.

    Args:
        loss_fn: `Loss`, a pure function from a list of tensors, and a function to call
            with the loss while layers still read these, to `(loss, aux)` with a scalar
            `loss` and any structure `aux`.
        arms: List of int, the arm of each weight.
        active: List with one entry per arm: bools, or scalar boolean tensors inside a
            traced step, of which at least one is true.
        twice: bool, whether there may be a second pass.
        jit_compile: bool, whether XLA compiles the graph of TensorFlow around the step.
        min_probability: Float, the least probability that an arm is active in a traced
            step, 0 if that is not known.

    Raises:
        ValueError: with several devices or processes that are not supported.
    """

    def __init__(
        self, loss_fn, arms, active, twice=True, jit_compile=False, min_probability=0.0
    ):
        self._check_devices()
        self._loss_fn = loss_fn
        self._arms = arms
        self._active = active
        self._twice = twice
        self._jit_compile = jit_compile
        self._min_probability = min_probability

    def _check_devices(self):
        raise NotImplementedError
