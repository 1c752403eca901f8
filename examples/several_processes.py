"""Classifies handwritten digits in two processes, each with its part of every batch.

    pip install keras-slsam scikit-learn jax
    KERAS_BACKEND=jax python examples/several_processes.py

This starts both processes on this machine. On other machines start each process with
the variables that `child_processes.py` sets. For PyTorch, `torchrun` sets them:

    KERAS_BACKEND=torch torchrun --nproc-per-node 2 examples/several_processes.py
"""

import os

import child_processes  # noqa: F401, before Keras
import choose_backend  # noqa: F401, before Keras
import keras
import numpy as np
from digits import BATCH
from digits import METHODS
from digits import make_model
from sklearn.datasets import load_digits

import keras_slsam

EPOCHS = 5


def parts(count, rank, processes, epoch=None):
    """Returns the rows of a process: its part of each batch, one after the other."""
    rows = np.arange(count)
    if epoch is not None:  # the same order in all processes
        rows = np.random.default_rng(epoch).permutation(count)
    return rows.reshape(-1, processes, BATCH // processes)[:, rank].ravel()


def train_with_jax(train, test, rank, processes):
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    keras.distribution.initialize(address, processes, rank)
    distribution = keras.distribution.DataParallel(
        devices=keras.distribution.list_devices(), auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)
    model = make_model(METHODS["SL-SAM"]())
    size = BATCH // processes
    for epoch in range(EPOCHS):
        rows = parts(len(train[0]), rank, processes, epoch)
        x, y = (each[rows] for each in train)
        model.fit(x, y, size, shuffle=False, verbose=0)
    rows = parts(len(test[0]), rank, processes)
    x, y = (each[rows] for each in test)
    return model, model.evaluate(x, y, size, verbose=0)[1]


def train_with_tensorflow(train, test, rank, processes):
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = make_model(METHODS["SL-SAM"](), metrics=())
        model.optimizer.build(model.trainable_variables)

    def step(data):
        return keras_slsam.step(model, model.optimizer, data)

    # Keras' own `fit` and `evaluate` do not support several workers.
    on_replicas = tf.function(lambda data: strategy.run(step, args=(data,)))
    for epoch in range(EPOCHS):
        rows = parts(len(train[0]), rank, processes, epoch)
        for batch in np.split(rows, len(train[0]) // BATCH):
            on_replicas(tuple(each[batch] for each in train))
    x, y = test
    found = keras.ops.convert_to_numpy(model(x)).argmax(axis=-1)
    return model, np.mean(found == y)


def train_with_torch(train, test, rank, processes):
    import torch
    from torch import distributed
    from torch.utils import data

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count() >= here  # NCCL needs one for each process
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpus else "gloo")
    model = make_model(METHODS["SL-SAM"]())
    keras.utils.set_random_seed(rank)  # other noise in each, if there is dropout
    rows = data.TensorDataset(*map(torch.as_tensor, train))
    sampler = data.DistributedSampler(rows)
    loader = data.DataLoader(rows, BATCH // processes, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.fit(loader, verbose=0)
    accuracy = model.evaluate(*test, verbose=0)[1]
    distributed.destroy_process_group()
    return model, accuracy


TRAIN = {
    "jax": train_with_jax,
    "tensorflow": train_with_tensorflow,
    "torch": train_with_torch,
}


def main():
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    x, y = load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    train, test = (x[:1280], y[:1280]), (x[1280:1792], y[1280:1792])
    model, accuracy = TRAIN[keras.config.backend()](train, test, rank, processes)
    norm = np.sqrt(sum(np.square(w).sum(dtype="float64") for w in model.get_weights()))
    print(
        f"process {rank} of {processes}: test accuracy {accuracy:.3f}, norm of the "
        f"weights {norm:.9f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
