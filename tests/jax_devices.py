"""Trains on four virtual devices of JAX.

python jax_devices.py FOLDER
"""

import os
import pathlib
import re
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import processes  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402
from keras import distribution  # noqa: E402

import keras_slsam  # noqa: E402


def distribute(kind):
    """Chooses the distribution. Returns the mesh of the devices."""
    devices = distribution.list_devices()
    if kind == "model":
        mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
        layouts = distribution.LayoutMap(mesh)
        layouts["hidden/kernel"] = (None, "model")
        layouts["(query|key|value)/kernel"] = (None, "model", None)
        chosen = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    else:
        count = 4 if kind == "data 4" else 2
        chosen = distribution.DataParallel(devices=devices[:count])
    distribution.set_distribution(chosen)
    return chosen.device_mesh.backend_mesh


def reduced_bytes(model, mesh):
    """Returns the bytes that devices exchange inside and outside of conditions."""
    by_batch = NamedSharding(mesh, PartitionSpec("batch"))
    data = [jax.device_put(part, by_batch) for part in processes.part_of_batch(0)]
    state = keras_slsam.get_state(model, model.optimizer)

    def step(state, data):
        return keras_slsam.stateless_step(model, model.optimizer, state, data)

    text = jax.jit(step).lower(state, tuple(data)).compile().as_text()
    lines, calls, branches, name = {}, {}, set(), None
    for line in text.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = begin[1]
            lines[name], calls[name] = [], set()
        elif name:
            found = re.findall(r"(?:to_apply|calls|body)=%?([\w.\-]+)", line)
            of_condition = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            for several in re.findall(r"branch_computations=\{([^}]*)\}", line):
                of_condition += re.findall(r"[\w.\-]+", several)
            lines[name].append(line)
            calls[name].update(found + of_condition)
            branches.update(of_condition)
    inside, todo = set(), list(branches)
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo += calls.get(name, ())
    totals = {True: 0, False: 0}
    for name, each in lines.items():
        for line in each:
            if found := re.search(r"= (.*?) all-reduce(?:-start)?\(", line):
                for size in re.findall(r"f32\[([\d,]*)\]", found[1]):
                    count = np.prod([int(n) for n in size.split(",") if n])
                    totals[name in inside] += 4 * int(count)
    return totals[True], totals[False]


def train(folder, kind, methods):
    mesh = distribute(kind)
    for method in methods:
        model = processes.make_model(method)
        found = processes.train(model)
        sharded = [
            variable.path
            for variable in model.optimizer.variables
            if "model" in variable.value.sharding.spec
        ]
        if kind == "data 2":
            found["reduced"] = reduced_bytes(model, mesh)
        name = f"{kind}-{method}.npz"
        np.savez(folder / name, sharded=sharded, size=model.count_params(), **found)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    train(folder, "data 2", processes.METHODS)
    train(folder, "model", ["slsam", "sl+s2"])
    train(folder, "data 4", ["slsam"])
