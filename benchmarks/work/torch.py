"""Counts the work that a PyTorch function executes for given arguments."""

from torch.utils.flop_counter import FlopCounterMode


def executed_flops(fn, *args):
    """Returns the FLOPs of the matrix products and convolutions in `fn(*args)`."""
    with FlopCounterMode(display=False) as counter:
        fn(*args)
    return counter.get_total_flops()
