"""Training in several processes of PyTorch, each with its own part of the batch.

The processes average the gradients of active weights, as `DistributedDataParallel` does
with all gradients. So they see the same norms, draw the same arms and take the same
step. Gradients of inactive weights are not exchanged.
"""

import hashlib
import importlib.metadata
import json

import torch
from torch import distributed

_BUCKET = 25 * 2**20  # bytes per exchange, as in `DistributedDataParallel`

_PACKAGES = ("keras-slsam", "keras", "torch")


def count():
    """Returns the number of processes, 1 without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def average(gradients):
    """Returns the averages over the processes.

    Args:
        gradients: List of tensors, or `None` where there is no gradient.
    """
    processes = count()
    if processes == 1:
        return gradients
    result, exchanges = list(gradients), []
    for bucket in _buckets(gradients):
        # Divided first, because a sum may overflow in float16.
        flat = torch.cat([gradients[i].reshape(-1) / processes for i in bucket])
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


def start(model, optimizer):
    """Checks that all processes start alike, and shares the optimizer's state.

    The state of the first process counts, because each process may have drawn its own
    seed.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`, built for it.

    Raises:
        ValueError: in all processes, if versions, arguments or weights differ, or if
        the model is sharded.
    """
    if distributed.is_available():
        _check_is_whole(model)
    if count() == 1:
        return
    weights = model.trainable_variables
    own = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own["the optimizer"] = json.dumps(optimizer.get_config(), default=repr)
    own["the number of weights"] = len(weights)
    for i, variable in enumerate(weights):
        value = variable.value.detach().cpu().contiguous()
        digest = hashlib.sha256(value.view(torch.uint8).numpy().tobytes())
        own[f"weight {i}, {variable.path!r}"] = digest.hexdigest()[:16]
    every = [None] * count()
    distributed.all_gather_object(every, own)
    first = every[0]
    unlike = [
        f"{name} is {facts.get(name)} in process {rank}, {first.get(name)} in process 0"
        for rank, facts in enumerate(every)
        for name in dict.fromkeys([*first, *facts])
        if facts.get(name) != first.get(name)
    ]
    if unlike:
        raise ValueError(
            "All processes must start with the same versions, optimizers and weights. "
            f"Received: {'; '.join(unlike[:3])}"
            + (f"; and {len(unlike) - 3} more differences" if unlike[3:] else "")
            + ". Call `keras.utils.set_random_seed(seed)` with the same seed before "
            "you create the model, or load the same file in each process."
        )
    for variable in optimizer.variables:
        distributed.broadcast(variable.value.data, src=0)


def _check_is_whole(model):
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "Weights that are sharded by `fully_shard` are not supported, because a "
            f"Keras variable holds a whole weight. Received: model={model!r}. Leave "
            "out `fully_shard`: each process then has all weights, and a step averages "
            "the gradients of active weights."
        )
