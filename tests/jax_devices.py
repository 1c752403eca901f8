"""Trains on four virtual devices of JAX, in one process or in two.

python jax_devices.py SCENARIO FOLDER, with RANK, WORLD_SIZE and MASTER_PORT
"""

import contextlib
import functools
import os
import pathlib
import re
import sys

PROCESSES = int(os.environ["WORLD_SIZE"])
DEVICES = f"--xla_force_host_platform_device_count={4 // PROCESSES**2}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"

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
    if kind.startswith("model"):
        mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
        layouts = distribution.LayoutMap(mesh)
        layouts[".*hidden/kernel"] = (None, "model")
        layouts[".*narrow/kernel"] = ("model", None)
        chosen = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    else:
        count = 4 if kind.startswith("data 4") else 2
        chosen = distribution.DataParallel(
            devices=devices[:count], auto_shard_dataset=False
        )
    distribution.set_distribution(chosen)
    return chosen.device_mesh.backend_mesh


def compiled_step(model, mesh, part_of_batch=processes.part_of_batch):
    """Returns the text of the program of a step, in the order of its execution."""
    state = keras_slsam.get_state(model, model.optimizer)

    def step(state, data):
        return keras_slsam.stateless_step(model, model.optimizer, state, data)

    return compiled(step, state, mesh, part_of_batch)


def compiled_step_of_adamw(model, mesh):
    """Returns the text of the program of Keras' own step."""
    model.compile(keras.optimizers.AdamW(), model.loss)
    model.optimizer.build(model.trainable_variables)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in variables] for variables in groups)
    return compiled(model.train_step, state, mesh, processes.part_of_batch)


def compiled(step, state, mesh, part_of_batch):
    by_batch = NamedSharding(mesh, PartitionSpec("batch"))
    data = [
        jax.make_array_from_process_local_data(by_batch, part)
        for part in part_of_batch(0)
    ]
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


EXCHANGE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|send|recv)(?:-start)?\("
)


def exchanged_by(lines):
    """Returns the bytes that some lines of a program exchange."""
    total = 0
    for line in lines:
        if found := EXCHANGE.search(line):
            for bits, size in re.findall(r"(?:pred|[a-z]+(\d+))\[(.*?)\]", found[1]):
                count = np.prod([int(n) for n in size.split(",") if n], dtype=int)
                total += count * int(bits or 8) // 8
    return total


def exchanged_bytes(text):
    """Returns the bytes that devices exchange in each condition, and outside of all."""
    lines, calls, branches = computations(text)
    inside = called_by(branches, calls)
    outside = sum(
        exchanged_by(each) for name, each in lines.items() if name not in inside
    )
    of_branches = []
    for branch in branches:
        # A condition inside of another one counts for itself.
        others = called_by(branches - {branch}, calls)
        own = called_by([branch], calls) - others
        of_branches.append(sum(exchanged_by(lines[name]) for name in own))
    return sorted(n for n in of_branches if n), outside


def waits(text):
    """Returns whether what exchanges in a step waits for what exchanges before it.

    One bool for each two that follow one another.
    """
    lines, calls, _ = computations(text)
    exchanging = {
        name
        for name in lines
        if any(
            EXCHANGE.search(line) for n in called_by([name], calls) for line in lines[n]
        )
    }
    before, pending, found = {}, None, []
    for line in lines["ENTRY"]:
        if not (begin := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)", line)):
            continue
        name, right = begin.groups()
        names = re.findall(r"%([\w.\-]+)", right)
        before[name] = set().union(*({n} | before[n] for n in names if n in before))
        if EXCHANGE.search(line) or exchanging.intersection(names):
            if pending:
                found.append(pending in before[name])
            pending = name
    return found


def waits_of_branches(mesh, **kwargs):
    """Returns what `waits` returns of a step of a model with two branches.

    The exchanges of BatchNormalization are in the branch that the first condition does
    not read.
    """
    inputs = keras.Input((4,))
    deep = inputs
    for _ in range(3):
        deep = keras.layers.Dense(4, activation="tanh")(deep)
    x = keras.layers.Dense(4, name="other")(inputs)
    x = keras.layers.Dense(1)(deep + keras.layers.BatchNormalization()(x))
    model = keras_slsam.sharpness_aware(keras.Model(inputs, x))
    model.compile(
        keras_slsam.SLSAM("sgd", arms="layer", sampler="uniform", seed=0, **kwargs),
        "mse",
    )
    model.optimizer.build(model.trainable_variables)
    return waits(compiled_step(model, mesh, processes.small_part))


def sharded_steps(model, steps, broken):
    processes.take_small_steps(model, steps, broken)
    assert "model" in model.trainable_variables[0].value.sharding.spec


def train(folder, kind, methods=tuple(processes.METHODS)):
    mesh = distribute(kind)
    for method in methods:
        model = processes.make_model(method, seed=0)
        to_save = method == "slsam" and kind in ("data 2", "model")
        file = folder / f"{kind}.keras" if to_save else None
        found = processes.train(model, file=file)
        found["sharded"] = [
            variable.path
            for variable in model.optimizer.variables
            if "model" in variable.value.sharding.spec
        ]
        if kind == "data 2" or (kind, method) == ("model", "slsam"):
            found["sizes"] = processes.sizes_of_arms(model)
            text = compiled_step(model, mesh)
            inside, outside = exchanged_bytes(text)
            found.update(inside=inside, outside=outside, waits=waits(text))
        processes.write(folder, f"{kind}-{method}", found)
    if kind in ("data 2", "model"):
        resumed = processes.train_on(processes.load(folder / "one.keras"))
        processes.write(folder, f"{kind} from one", resumed)
    if kind == "model":
        kinds = *processes.FEW, "normalised"
        few = {each: processes.small(each, sharded_steps) for each in kinds}
        processes.write(folder, "small model", few)
    if kind == "data 2":
        inside, outside = exchanged_bytes(compiled_step_of_adamw(model, mesh))
        processes.write(folder, "adamw", {"inside": inside, "outside": outside})
        kinds = *processes.SMALL, "normalised"
        small = {kind: processes.small(kind) for kind in kinds}
        processes.write(folder, "small", small)
        order = {
            "nearly always": waits_of_branches(mesh, active_fraction=0.9),
            "always": waits_of_branches(
                mesh, active_fraction=0.5, always_active="other"
            ),
        }
        processes.write(folder, "order", order)


def scenario_devices(folder):
    train(folder, "data 2")
    train(folder, "data 4", ["slsam"])
    train(folder, "model")
    jax.config.update("jax_enable_x64", True)
    processes.use_float64()
    train(folder, "data 4 in float64")
    train(folder, "data 2 in float64", ["slsam"])
    train(folder, "model in float64", ["slsam"])


def error_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(folder):
    """Returns the errors of what several processes do not support."""
    version, own = keras_slsam.__version__, distribution.distribution()
    errors = {}

    def refused(name, **kwargs):
        model = processes.make_model("sam", seed=0)
        model.compile(keras_slsam.SAM("sgd", **kwargs), model.loss)
        errors[name] = error_of(lambda: processes.train(model, 0, 1))

    keras_slsam.__version__ = f"0.0.{processes.RANK}"
    refused("version")
    keras_slsam.__version__ = version

    model = processes.make_model("sam", seed=0)
    weight = model.trainable_variables[3]
    # Of a number in an array JAX does not see that it differs.
    weight.assign(weight.value + 1e-3 * jax.numpy.array(processes.RANK))
    errors["weights"] = error_of(lambda: processes.train(model, 0, 1))

    refused("arguments", adaptive=processes.RANK == 1)
    model = processes.small_model(processes.alike_optimizer(folder))
    errors["alike"] = error_of(lambda: processes.take_small_steps(model, 1))
    refused("part", ascent_fraction=0.5)
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    refused("dispatch")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mesh = distribution.DeviceMesh((1,), ("batch",), jax.local_devices())
    distribution.set_distribution(distribution.DataParallel(device_mesh=mesh))
    refused("alone")
    mesh = distribution.DeviceMesh((2, 1), ("batch", "model"), jax.devices())
    layouts = distribution.LayoutMap(mesh)
    distribution.set_distribution(
        distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    refused("model")
    distribution.set_distribution(own)
    return errors


class Interrupts(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise KeyboardInterrupt


def backed_up(folder):
    """Returns what a `fit` that goes on from a backup did, and a whole one."""

    def fit(*callbacks):
        model = processes.make_model("slsam", seed=0)
        x, y = processes.part_of_batch(0)
        history = model.fit(x, y, len(x), epochs=3, verbose=0, callbacks=callbacks)
        return history.epoch, np.concatenate([w.ravel() for w in model.get_weights()])

    backup = functools.partial(
        keras.callbacks.BackupAndRestore, str(folder / f"backup-{processes.RANK}")
    )
    _, whole = fit()
    with contextlib.suppress(KeyboardInterrupt):
        fit(backup(), Interrupts())
    epochs, resumed = fit(backup())
    return {"whole": whole, "resumed": resumed, "epochs": epochs}


def die_or_wait(folder, model, rank):
    """Kills one process. The others must get an error."""
    if processes.RANK == rank:
        processes.die(folder)
    try:
        processes.train(model, 0, 1000)
    except ValueError as error:
        print(f"an error: {error}", flush=True)
        os._exit(1)  # at a usual exit JAX waits 100 s for the killed process


def scenario_killed(folder):
    mesh = distribute("processes")
    for method in processes.METHODS:
        model = processes.make_model(method, seed=0)
        # Metrics have exchanges outside of conditions.
        model.compile(model.optimizer, model.loss, metrics=["accuracy"])
        # Saving creates variables, which JAX compares, so all processes must save.
        file = folder / f"model-{processes.RANK}.keras"
        found = processes.train(model, file=file if method == "slsam" else None)
        if method == "slsam":
            found["waits"] = waits(compiled_step(model, mesh))
        processes.write(folder, f"processes-{method}", found)
    kinds = *processes.FEW, "normalised"
    few = {kind: processes.small(kind) for kind in kinds}
    processes.write(folder, "small", few)
    processes.write(folder, "errors", refusals(folder))
    processes.write(folder, "backed up", backed_up(folder))
    jax.config.update("jax_enable_x64", True)
    processes.use_float64()
    model = processes.make_model("slsam", seed=0)
    processes.write(folder, "in float64", processes.train(model))
    die_or_wait(folder, model, rank=1)


def scenario_resumed(folder):
    distribute("processes")
    for name, file in {"from one": "one.keras", "resumed": "model-0.keras"}.items():
        model = processes.load(folder / file)
        processes.write(folder, name, processes.train_on(model))
    die_or_wait(folder, model, rank=0)


if __name__ == "__main__":
    if PROCESSES > 1:
        initialize()
    globals()[f"scenario_{sys.argv[1]}"](pathlib.Path(sys.argv[2]))
