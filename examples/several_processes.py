"""Classifies handwritten digits in several processes of PyTorch.

    pip install keras-slsam scikit-learn torch
    torchrun --nproc-per-node 2 examples/several_processes.py

Each process has its part of every batch, and on a machine with GPUs its own GPU.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from sklearn.datasets import load_digits
from torch import distributed
from torch.utils import data

import keras_slsam

BATCH, EPOCHS = 64, 5


def main():
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpus else "gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    x, y = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    x = x.float() / 16
    train, test = slice(0, 1280), slice(1280, None)

    keras.utils.set_random_seed(0)  # the same weights in each process
    hidden = [keras.layers.Dense(256, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=keras_slsam.SLSAM(
            keras.optimizers.AdamW(3e-3), rho=0.05, sampler="proportional"
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    keras.utils.set_random_seed(rank)  # other noise in each, if there is dropout
    rows = data.TensorDataset(x[train], y[train])
    sampler = data.DistributedSampler(rows)
    loader = data.DataLoader(rows, BATCH // processes, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.fit(loader, verbose=0)
    accuracy = model.evaluate(x[test], y[test], verbose=0)[1]
    print(f"process {rank} of {processes}: test accuracy {accuracy:.3f}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
