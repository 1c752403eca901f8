"""Training in several processes of PyTorch, each with its own part of the batch.

The processes average the gradients of active weights, as `DistributedDataParallel` does
with all gradients. So they see the same norms, draw the same arms and take the same
step. Gradients of inactive weights are not exchanged.
"""

import keras
import torch
from torch import distributed

from keras_slsam.gradients import alike

_BUCKET = 25 * 2**20  # bytes per exchange, as in `DistributedDataParallel`


def count():
    """Returns the number of processes, 1 without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def average(gradients, arms):
    """Returns the averages over the processes.

    Args:
        gradients: List of tensors, or `None` where inactive.
        arms: `ActiveArms`.
    """
    processes = count()
    if processes == 1:
        return gradients
    result, exchanges = list(gradients), []
    for bucket in _buckets(gradients):
        # Divided first, because a sum may overflow in float16.
        flat = torch.cat([gradients[i].reshape(-1) for i in bucket]).div_(processes)
        exchanges.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
    for bucket, flat, exchange in exchanges:
        exchange.wait()
        parts = flat.split([gradients[i].numel() for i in bucket])
        for i, part in zip(bucket, parts):
            result[i] = part.view_as(gradients[i])
    return result


def _buckets(gradients):
    """Groups the indices of gradients of one type, in the order of the weights."""
    buckets, filled = {}, {}
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        kind = gradient.dtype, gradient.device
        size = gradient.numel() * gradient.element_size()
        if kind not in buckets or filled[kind] + size > _BUCKET:
            buckets.setdefault(kind, []).append([])
            filled[kind] = 0
        buckets[kind][-1].append(i)
        filled[kind] += size
    return [bucket for of_kind in buckets.values() for bucket in of_kind]


def any_process(condition, model):
    """Returns whether a condition holds in any process.

    Args:
        condition: bool.
        model: `keras.Model` with trainable weights.
    """
    if count() == 1:
        return condition
    device = model.trainable_variables[0].value.device
    largest = torch.tensor([int(condition)], device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return bool(largest)


def start(model, optimizer, weights=None):
    """Checks that all processes start alike, and shares the other state.

    Trained weights must be equal. The state of the optimizer, other weights and buffers
    are those of the first process. For example, each process may have drawn its own
    seed.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`, built for it.
        weights: See `Backend.start`.

    Raises:
        ValueError: in all processes, if versions, arguments or weights differ, or if
            a weight is sharded.
    """
    every = [None] * count()
    own = alike.facts_or_error(lambda: _facts(model, optimizer, weights))
    distributed.all_gather_object(every, own)
    alike.check(every)
    with torch.no_grad():
        for tensor in [v.value for v in optimizer.variables] + _untrained(model):
            whole = tensor.contiguous()  # others cannot be sent
            distributed.broadcast(whole, src=0)
            # A dimension that was expanded repeats one value, and cannot be written.
            once = tuple(slice(None if step else 1) for step in tensor.stride())
            tensor[once].copy_(whole[once])


def _untrained(model):
    """Returns the other weights and the buffers of a model."""
    trained = {id(v) for v in model.trainable_variables}
    others = [v.value for v in model.weights if id(v) not in trained]
    buffers = [b for module in _modules(model) for b in module.buffers(recurse=False)]
    return list({id(tensor): tensor for tensor in others + buffers}.values())


def _modules(model):
    """Returns all modules of a model, whose own `modules()` may lack its layers."""
    # Keras has no public name for the layers at any depth.
    layers = model._flatten_layers()
    return dict.fromkeys(module for layer in layers for module in layer.modules())


def _facts(model, optimizer, weights):
    """Returns what must be equal, a dict from what it is to a string."""
    _check_is_whole(model)
    sizes = [tensor.numel() for tensor in _untrained(model)]
    others = f"{len(sizes)}, {sum(sizes)} values"
    return {
        **alike.facts(torch, model, optimizer, weights),
        "the number of other weights and buffers": others,
    }


def _check_is_whole(model):
    # Not every build of PyTorch has them.
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded = [isinstance(module, FSDPModule) for module in _modules(model)]
    sharded += [isinstance(v.value.data, DTensor) for v in model.weights]
    if any(sharded):
        raise ValueError(
            "A sharpness-aware step does not support sharded weights. Received: a "
            "model with weights that are `DTensor`s, for example by `fully_shard`. "
            "Keep all weights in each process."
        )


def agree(facts, variables):
    """Checks that all processes are about to take the same step.

    Args:
        facts: Function that returns a dict from the name of each fact to a number, or
            to a scalar tensor.
        variables: List of the trained `keras.Variable`s. Their checksums are compared,
            because one process may have set them.

    Raises:
        ValueError: in all processes, if something differs.
    """
    if count() == 1:
        return
    facts, weights = facts(), [variable.value.detach() for variable in variables]
    numbers = [keras.ops.convert_to_tensor(value).double() for value in facts.values()]
    # Compared as bits, so that a NaN equals itself.
    bits = [number.view(torch.int64) for number in numbers]
    bits += map(_checksum, weights)
    own = torch.stack([x.to(weights[0].device) for x in bits])
    largest = torch.cat([own, ~own])
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    largest, smallest = largest[: len(own)], ~largest[len(own) :]
    names = [*facts, *(f"the weight {v.path!r}" for v in variables)]
    differs = (largest != smallest).tolist()  # the only synchronisation with the device
    unlike = [name for name, differs in zip(names, differs) if differs]
    if unlike:
        raise ValueError(
            "All processes must take the same step. Received: different values of "
            f"{', '.join(unlike[:3])}"
            + (f" and {len(unlike) - 3} more" if unlike[3:] else "")
            + ". Set learning rate, `rho`, weights and state to the same values in "
            "each process, at the same step. For example, let no callback restore "
            "weights in one process alone."
        )


def _checksum(weight):
    """Returns an integer that depends on all bits, and not on the order of the sum."""
    data = weight.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # so that it can be read as integers of 8 bytes
    whole = len(data) // 8 * 8
    total = data[:whole].view(torch.int64).sum()
    return total + data[whole:].sum() if whole < len(data) else total
