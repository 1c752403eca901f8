"""Work really done on PyTorch: the products that were executed."""

from torch.utils.flop_counter import FlopCounterMode


def executed_flops(fn, *args):
    """FLOPs of the matrix products and convolutions of one call of `fn`."""
    with FlopCounterMode(display=False) as counter:
        fn(*args)
    return counter.get_total_flops()
