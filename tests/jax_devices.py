"""Trains on four virtual devices of JAX, in one process or in two.

python jax_devices.py SCENARIO FOLDER, with RANK, WORLD_SIZE and MASTER_PORT
"""

import os
import pathlib
import re
import sys
import time

PROCESSES = int(os.environ["WORLD_SIZE"])
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={4 // PROCESSES**2} "
    "--xla_backend_optimization_level=0"
)

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import processes  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402
from keras import distribution  # noqa: E402

import keras_slsam  # noqa: E402


def initialize():
    """Makes this one of several processes, with a device each."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    distribution.initialize(address, PROCESSES, processes.RANK)


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


def compiled_step(model, mesh):
    """Returns the text of the program of a step, in the order of its execution."""
    by_batch = NamedSharding(mesh, PartitionSpec("batch"))
    data = [
        jax.make_array_from_process_local_data(by_batch, part)
        for part in processes.part_of_batch(0)
    ]
    state = keras_slsam.get_state(model, model.optimizer)

    def step(state, data):
        return keras_slsam.stateless_step(model, model.optimizer, state, data)

    return jax.jit(step).lower(state, tuple(data)).compile().as_text()


def computations(text):
    """Returns the lines of each computation, and the names that each one calls."""
    lines, calls, branches, name = {}, {}, set(), None
    for line in text.splitlines():
        if begin := re.match(r"(?:(ENTRY) )?%?([\w.\-]+) \(.*\{$", line):
            name = begin[1] or begin[2]
            lines[name], calls[name] = [], set()
        elif name:
            found = re.findall(r"(?:to_apply|calls|body)=%?([\w.\-]+)", line)
            of_condition = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            for several in re.findall(r"branch_computations=\{([^}]*)\}", line):
                of_condition += re.findall(r"[\w.\-]+", several)
            lines[name].append(line)
            calls[name].update(found + of_condition)
            branches.update(of_condition)
    return lines, calls, branches


def called_by(names, calls):
    """Returns the computations, and all that they call."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += calls.get(name, ())
    return found


def reduced_bytes(text):
    """Returns the bytes that devices exchange inside and outside of conditions."""
    lines, calls, branches = computations(text)
    inside, totals = called_by(branches, calls), {True: 0, False: 0}
    for name, each in lines.items():
        for line in each:
            if found := re.search(r"= (.*?) all-reduce(?:-start)?\(", line):
                for size in re.findall(r"f32\[([\d,]*)\]", found[1]):
                    count = np.prod([int(n) for n in size.split(",") if n])
                    totals[name in inside] += 4 * int(count)
    return totals[True], totals[False]


def waits(text):
    """Returns whether what exchanges in a step waits for the condition before it.

    One bool for each condition that exchanges, except the last one.
    """
    lines, calls, _ = computations(text)
    exchanging = {
        name
        for name in lines
        if any(
            "all-reduce(" in line for n in called_by([name], calls) for line in lines[n]
        )
    }
    before, pending, found = {}, None, []
    for line in lines["ENTRY"]:
        if not (begin := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)", line)):
            continue
        name, right = begin.groups()
        names = re.findall(r"%([\w.\-]+)", right)
        before[name] = set().union(*({n} | before[n] for n in names if n in before))
        if "all-reduce(" in right or exchanging.intersection(names):
            if pending:
                found.append(pending in before[name])
            pending = name if " conditional(" in right else None
    return found


def train(folder, kind, methods):
    mesh = distribute(kind)
    for method in methods:
        model = processes.make_model(method, seed=0)
        found = processes.train(model)
        found["sharded"] = [
            variable.path
            for variable in model.optimizer.variables
            if "model" in variable.value.sharding.spec
        ]
        if kind == "data 2":
            found["reduced"] = reduced_bytes(compiled_step(model, mesh))
            found["size"] = model.count_params()
        processes.write(folder, f"{kind}-{method}", found)


def scenario_devices(folder):
    train(folder, "data 2", processes.METHODS)
    train(folder, "model", ["slsam", "sl+s2"])
    train(folder, "data 4", ["slsam"])


def scenario_killed(folder):
    mesh = distribute("processes")
    model = processes.make_model("slsam", seed=0)
    # Metrics have exchanges outside of conditions.
    model.compile(model.optimizer, model.loss, metrics=["accuracy"])
    version = keras_slsam.__version__
    try:
        keras_slsam.__version__ = f"0.0.{processes.RANK}"
        processes.train(model, 0, 1)
    except ValueError as error:
        print(error, flush=True)
    keras_slsam.__version__ = version
    early = processes.train(model, 0, 5)
    # Saving creates variables, which JAX compares, so all processes must save.
    model.save(folder / f"model-{processes.RANK}.keras")
    late = processes.train(model, 5, processes.STEPS - 5)
    late["masks"] = np.concatenate([early["masks"], late["masks"]])
    if processes.RANK == 0:
        late["waits"] = waits(compiled_step(model, mesh))
    processes.write(folder, "processes", late)
    if processes.RANK == 1:
        os.kill(os.getpid(), 9)
    start = time.perf_counter()
    try:
        processes.train(model, 0, 100)
    except ValueError as error:
        seconds = time.perf_counter() - start
        print(f"an error after {seconds:.1f} s: {error}", flush=True)
        os._exit(1)  # at a usual exit JAX waits a minute for the killed process


def scenario_resumed(folder):
    distribute("processes")
    model = keras.saving.load_model(folder / "model-0.keras")
    model = keras_slsam.sharpness_aware(model)
    processes.write(folder, "resumed", processes.train(model, 5, processes.STEPS - 5))


if __name__ == "__main__":
    if PROCESSES > 1:
        initialize()
    globals()[f"scenario_{sys.argv[1]}"](pathlib.Path(sys.argv[2]))
