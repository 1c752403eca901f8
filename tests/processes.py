"""One of several processes that train together, on parts of the same batches.

python processes.py SCENARIO PATH, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
"""

import contextlib
import functools
import gc
import operator
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import keras
import numpy as np
from keras import layers
from user_ascents import Friendly

import keras_slsam

gc.set_threshold(100_000, 50, 100)  # as in conftest.py
BATCH, STEPS, EARLY = 16, 20, 5
METHODS = {
    "sam": lambda base: keras_slsam.SAM(base, rho=0.1),
    "slsam": lambda base: keras_slsam.SLSAM(
        base, rho=0.1, active_fraction=0.4, arms="layer", sampler="proportional"
    ),
    "sl+s2": lambda base: keras_slsam.SLSAM(
        base, rho=0.1, active_fraction=0.4, arms="layer", single_step=True
    ),
}
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def make_model(method, seed=RANK):
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(13, 8)(tokens)
    hidden = layers.Dense(16, activation="gelu", name="hidden")(x)
    x = layers.GlobalAveragePooling1D()(x + layers.Dense(8, name="narrow")(hidden))
    model = keras_slsam.sharpness_aware(keras.Model(tokens, layers.Dense(3)(x)))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / np.sqrt(variable.shape[0]))
    keras.utils.set_random_seed(seed)  # a sampler without a seed draws one
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base = keras.optimizers.AdamW(1e-3)
    model.compile(optimizer=METHODS[method](base), loss=loss)
    return model


def part_of_batch(step, rank=RANK, processes=PROCESSES):
    rng = np.random.default_rng(step)
    x, y = rng.integers(0, 13, (BATCH, 6)), rng.integers(0, 3, BATCH)
    rows = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    return x[rows], y[rows]


def train(model, first=0, steps=STEPS, file=None):
    """Returns the masks, and the final weights as one vector.

    If there is a file, the model is saved to it after the early steps.
    """
    masks = []
    for step in range(first, first + steps):
        model.train_on_batch(*part_of_batch(step))
        masks.append(keras.ops.convert_to_numpy(model.optimizer.active))
        if file and step + 1 == EARLY:
            model.save(file)
    return found(model, masks)


class Masks(keras.callbacks.Callback):
    """The masks of all steps."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def on_train_batch_end(self, batch, logs=None):
        active = self.model.optimizer.active
        self.masks.append(keras.ops.convert_to_numpy(active))


def fit(model, batches):
    """Returns what `train` returns."""
    x, y = (np.concatenate(each) for each in zip(*batches))
    masks = Masks()
    size = len(x) // len(batches)
    model.fit(x, y, size, shuffle=False, verbose=0, callbacks=[masks])
    return found(model, masks.masks)


def sizes_of_arms(model):
    """Returns the bytes of each arm in float32."""
    arms = model.optimizer.arms
    return [4 * sum(int(np.prod(v.shape)) for v in arm) for arm in arms]


def found(model, masks):
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    return {"masks": np.stack(masks), "weights": weights}


# A process that hangs prints its tracebacks and exits. Keras also imports packages that
# it does not need, which takes a third of the start, and goes on without them.
_START = """
import faulthandler, runpy, sys
faulthandler.dump_traceback_later({timeout}, exit=True)
sys.modules.update({unused})
del sys.argv[0], sys.path[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(processes, *arguments, timeout=120, backend=None):
    """Runs a script in several processes.

    Args:
        processes: int.
        *arguments: The path of the script, and its arguments.
        timeout: Seconds.
        backend: String, the backend of the processes. If None, that of this process.

    Returns:
        List of tuples of the return code and the output of each process.
    """
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    # The processes must import the same package as this one.
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ports = _free_ports(processes)
    environment["MASTER_PORT"], environment["PORTS"] = ports[0], " ".join(ports)
    environment["WORLD_SIZE"] = str(processes)
    backend = backend or keras.config.backend()
    environment["KERAS_BACKEND"] = backend
    start = _START.format(
        timeout=timeout,
        unused=dict.fromkeys({"matplotlib", "sklearn", "jax"} - {backend}),
    )
    command = [sys.executable, "-c", start, *map(str, arguments)]
    running = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [each.communicate(timeout=timeout + 30)[0] for each in running]
        return [(each.returncode, text) for each, text in zip(running, outputs)]
    finally:
        for each in running:
            each.kill()


def run(count, *arguments, **kwargs):
    """Runs a script to its end, like `launch`. Returns the outputs of the processes."""
    found = launch(count, *arguments, **kwargs)
    for code, output in found:
        assert code == 0, output
    return [output for _, output in found]


def alone(method):
    """Returns what `train` returns, of one process with the whole batches."""
    return _alone(method, keras.config.floatx())


@functools.cache
def _alone(method, floatx):
    return train(make_model(method))


def save_one(folder, backend):
    """Saves a model that was trained on one device of another backend."""
    run(1, __file__, "one", folder, backend=backend)


def load(file):
    return keras_slsam.sharpness_aware(keras.saving.load_model(file))


def train_on(model):
    """Returns what `train` returns, after the early steps."""
    return train(model, EARLY, STEPS - EARLY)


def assert_same_later(found, tolerance=1e-5):
    """Compares what `train_on` returns with SL-SAM in one process."""
    assert_same(found, alone("slsam"), tolerance, first=EARLY)


def assert_same(found, expected, tolerance, first=0):
    expected = {**expected, "masks": expected["masks"][first:]}
    np.testing.assert_array_equal(found["masks"], expected["masks"])
    np.testing.assert_allclose(
        found["weights"], expected["weights"], rtol=0, atol=tolerance
    )


def assert_one_goes_on(file):
    """Loads a model that several devices saved, and trains it on one device."""
    assert_same_later(train_on(load(file)))


def assert_another_backend_goes_on(file, backend):
    """Like `assert_one_goes_on`, with a device of another backend."""
    run(1, __file__, "other_backend", file, backend=backend)
    assert_same_later(read(file.parent, "other backend"))


def die(folder):
    """Kills this process, and leaves the time in a file."""
    (folder / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def end_after_death(rank, within, folder, *arguments, count=2, timeout=120):
    """Runs a script in several processes, of which one kills itself.

    Args:
        rank: int, of the process that kills itself.
        within: Seconds after its death in which the other processes must end.
        folder: Path, the last argument of the script.
        *arguments: The path of the script, and its other arguments.
        count: int, the number of processes.
        timeout: Seconds.

    Returns:
        List of tuples of the return code and the output of each other process.
    """
    found = launch(count, *arguments, folder, timeout=timeout)
    ended, outputs = time.time(), "\n".join(output for _, output in found)
    code, _ = found.pop(rank)
    assert code == -signal.SIGKILL, outputs
    assert ended - float((folder / "killed").read_text()) < within, outputs
    return found


def _free_ports(count):
    import socket

    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


def write(folder, name, values):
    np.savez(folder / f"{name}-{RANK}.npz", **values)


def read(folder, name, rank=0):
    return dict(np.load(folder / f"{name}-{rank}.npz"))


def exchanged_by_adamw():
    """Returns the bytes that a step of `DistributedDataParallel` exchanges."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    model = make_model("sam")
    wrapped, sizes = torch.nn.parallel.DistributedDataParallel(model), []

    def counted(group, bucket):
        sizes.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, counted)
    x, _ = part_of_batch(0)
    wrapped(torch.as_tensor(x)).sum().backward()
    return sum(sizes)


def scenario_train(folder):
    from torch import distributed

    exchanged, exchange = [], distributed.all_reduce

    def counted(tensor, **kwargs):
        if "op" not in kwargs:  # a sum, of gradients
            exchanged.append(tensor.numel() * tensor.element_size())
        return exchange(tensor, **kwargs)

    write(folder, "adamw", {"exchanged": exchanged_by_adamw()})
    distributed.all_reduce = counted
    for method in METHODS:
        exchanged.clear()
        model = make_model(method)
        # The first process' state counts, so all draw the same arms.
        found = train(model)
        found.update(exchanged=sum(exchanged), sizes=sizes_of_arms(model))
        write(folder, method, found)
    distributed.all_reduce = exchange


def scenario_fit_and_loop(folder):
    """Trains by `fit`, and in a loop with exchanges in several pieces."""
    import torch
    from torch import distributed

    from keras_slsam.gradients import torch_processes

    exchange, calls = distributed.all_reduce, []

    def counted(*args, **kwargs):
        calls.append(args)
        return exchange(*args, **kwargs)

    distributed.all_reduce = counted
    batches = [part_of_batch(step) for step in range(STEPS)]
    trained = fit(make_model("slsam"), batches)
    write(folder, "fit", {**trained, "exchanges": len(calls)})
    calls.clear()
    model, masks = make_model("slsam"), []
    usual, torch_processes._BUCKET = torch_processes._BUCKET, 500
    for batch in batches:
        keras_slsam.step(model, model.optimizer, tuple(map(torch.as_tensor, batch)))
        masks.append(keras.ops.convert_to_numpy(model.optimizer.active))
    torch_processes._BUCKET, distributed.all_reduce = usual, exchange
    write(folder, "loop", {**found(model, masks), "exchanges": len(calls)})


def use_float64():
    from keras.src.backend.common import dtypes

    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


def scenario_float64(folder):
    use_float64()
    for method in METHODS:
        write(folder, f"{method}64", train(make_model(method)))


class Scalar(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", dtype="bfloat16")
        self.empty = self.add_weight(shape=(0, 3))

    def call(self, x):
        return x * keras.ops.cast(self.scale, x.dtype)


class Decay(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without `get_config`."""

    def __call__(self, step):
        return 0.1 / (1.0 + keras.ops.cast(step, "float32"))


def small_model(optimizer, *hidden, metrics=("mae",), **kwargs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(1)])
    model = keras_slsam.sharpness_aware(model)
    model.compile(optimizer=optimizer, loss="mse", metrics=list(metrics), **kwargs)
    return model


def small_part(step, broken=None, rank=RANK, processes=PROCESSES):
    """Returns a part of a batch. In the last part of a step, x may be infinite."""
    rng = np.random.default_rng(step)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 1))
    rows = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    scale = np.inf if step == broken and rank == processes - 1 else 1.0
    return x[rows] * scale, y[rows]


def alike_optimizer(folder):
    """Returns the same optimizer in all processes, which Keras saves differently."""
    base = keras.optimizers.SGD(name=f"sgd_{RANK}")  # a name as Keras gives it
    file = folder / f"arms_{RANK}.py"  # as on machines with other folders
    file.write_text("arms = lambda variable: variable.path")
    return keras_slsam.SLSAM(base, arms=runpy.run_path(str(file))["arms"])


OF_BATCH_NORM = "gamma", "beta", "mean", "variance"


def normalised_model():
    # One plain step, after which weights have their mean over the parts of a batch.
    return small_model(keras_slsam.SAM("sgd", rho=0.0), layers.BatchNormalization())


def normalised(rank=RANK, processes=PROCESSES):
    """Returns the weights of BatchNorm and its statistics after one step on a part."""
    model = normalised_model()
    model.train_on_batch(*small_part(0, rank=rank, processes=processes))
    weights = map(keras.ops.convert_to_numpy, model.layers[0].weights)
    return dict(zip(OF_BATCH_NORM, weights))


def assert_weights_are_shared_and_statistics_are_not(results):
    alone = [normalised(rank, len(results)) for rank in range(len(results))]
    for found, own in zip(results, alone):
        for name, value in found.items():
            shared = name in ("gamma", "beta")
            expected = np.mean([a[name] for a in alone], 0) if shared else own[name]
            np.testing.assert_allclose(value, expected, 1e-5, 1e-6)
            assert not np.allclose(alone[0][name], alone[1][name], 1e-3)


def take_small_steps(model, steps=3, broken=None):
    for step in range(steps):
        model.train_on_batch(*small_part(step, broken))


def take_equal_steps(model, steps, broken):
    """Like `take_small_steps`, with the first of two parts in each process."""
    for step in range(steps):
        model.train_on_batch(*small_part(step, broken, 0, 2))


def fit_small(model, steps, broken, rows=slice(None)):
    """Like `take_small_steps` of two processes, with whole batches."""

    def whole(step):
        parts = [small_part(step, broken, rank, 2) for rank in range(2)]
        return [np.concatenate(each)[rows] for each in zip(*parts)]

    x, y = (np.concatenate(each) for each in zip(*map(whole, range(steps))))
    model.fit(x, y, 8, shuffle=False, verbose=0)


# On PyTorch and TensorFlow an ascent on half of the rows is on the first half of each
# process, and each process has the statistics of its own rows.
STEPS_OF_ONE = {
    "part": functools.partial(fit_small, rows=[0, 1, 4, 5, 2, 3, 6, 7]),
    "normalised": take_equal_steps,
}


def small(kind, take_steps=take_small_steps, **kwargs):
    """Takes steps that need more than gradients of trained weights to be the same.

    Other arguments go to `compile`.
    """
    keras.utils.set_random_seed(0)
    sgd = keras.optimizers.SGD
    # jax_devices.py shards a layer of this name.
    steps, broken, hidden = 3, None, layers.Dense(3, name="narrow")
    optimizer = keras_slsam.SAM(sgd(0.1))
    half = functools.partial(keras_slsam.SLSAM, active_fraction=0.5, seed=1)
    if kind == "scaled":  # a gradient that is not finite in one process
        optimizer, broken = keras.optimizers.LossScaleOptimizer(optimizer), 1
    elif kind == "mixed":
        # With the usual scale, the gradients of fewer rows may overflow.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0)
        hidden = layers.Dense(3, dtype="mixed_float16", name="narrow")
    elif kind == "normalised":
        normal, dropout = layers.BatchNormalization(), layers.Dropout(0.5, seed=1)
        hidden = keras.Sequential([hidden, normal, dropout])
    elif kind == "scalar":
        hidden = Scalar()
    elif kind == "accumulated":
        hidden = keras.Sequential([hidden, layers.LayerNormalization()])
        optimizer = half(sgd(0.1, gradient_accumulation_steps=2), single_step=True)
    elif kind == "scheduled":  # the exchanges of an ascent are in a condition
        rho = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.0, 0.1, 0.0])
        optimizer = half(sgd(0.1), rho=rho)
        steps = 5
    elif kind == "random":
        optimizer = keras_slsam.RST(sgd(0.1), probability=0.5, seed=3)
        steps = 6
    elif kind == "ascent":  # of a user, with a state
        optimizer = half(sgd(0.1), rho=0.5, adaptive=True, ascent=Friendly())
    elif kind == "part":
        optimizer = half(sgd(0.1), ascent_fraction=0.5)
    elif kind == "frozen":
        hidden.trainable = False
    elif kind == "averaged":
        base = keras.optimizers.AdamW(0.1, use_ema=True, ema_momentum=0.5)
        optimizer = half(base)
    model = small_model(optimizer, hidden, **kwargs)
    if kind == "frozen" and RANK == 1:
        hidden.kernel.assign(hidden.kernel * 3)
    take_steps(model, steps, broken)
    state = [*model.weights, *optimizer.variables]
    if keras.config.backend() != "torch":  # there each process has its own metrics
        state += model.metrics_variables
    found = [keras.ops.convert_to_numpy(v).astype("float32").ravel() for v in state]
    return np.concatenate(found)


# All kinds of training are tested with these.
FEW = "scaled", "mixed", "accumulated", "averaged"
SMALL = *FEW, "scalar", "scheduled", "random", "ascent", "frozen", "part"


def scenario_small(folder):
    found = {kind: small(kind) for kind in SMALL}
    # With equal rows, each process has the statistics and noise of one alone.
    found["normalised"] = small("normalised", take_equal_steps)
    write(folder, "small", found)
    write(folder, "normalised", normalised())


def scenario_refused(folder):
    import torch
    from torch.distributed.fsdp import fully_shard

    errors = {}

    def refused(name, call, *arguments):
        try:
            call(*arguments)
        except ValueError as raised:
            errors[name] = str(raised)

    model = make_model("sam")
    if RANK == 1:
        model.trainable_variables[3].assign(model.trainable_variables[3] + 1e-3)
    refused("weights", train, model, 0, 1)

    model = make_model("sam")
    model.optimizer.rho = 0.1 * (1 + RANK)
    refused("rho", train, model, 0, 1)

    refused("method", train, make_model("slsam" if RANK else "sam"), 0, 1)

    model = make_model("sam")
    train(model, 0, 1)
    model.optimizer.rho = 0.1 if RANK else 0.0
    refused("rho later", train, model, 1, 1)

    scaler = keras.optimizers.LossScaleOptimizer(
        keras_slsam.SAM("sgd"), initial_scale=2.0 ** (3 + RANK)
    )
    refused("scale", take_small_steps, small_model(scaler))

    keras_slsam.__version__ = f"0.0.{RANK}"
    refused("version", train, make_model("sam"), 0, 1)
    keras_slsam.__version__ = "0.0"

    model = make_model("sam")
    train(model, 0, 1)
    before = model.get_weights()
    train(model, 1, 1)
    if RANK == 1:
        model.set_weights(before)
    refused("weights later", train, model, 2, 1)

    scaler = keras.optimizers.LossScaleOptimizer(keras_slsam.SAM("sgd"))
    model = small_model(scaler)
    take_small_steps(model, 1)
    scaler.dynamic_scale.assign(scaler.dynamic_scale / (1 + RANK))
    refused("scale later", take_small_steps, model)

    normalizations = layers.BatchNormalization, layers.LayerNormalization
    model = small_model(keras_slsam.SAM("sgd"), normalizations[RANK]())
    refused("other layers", take_small_steps, model)

    model = make_model("sam")
    if RANK == 1:
        model.layers[1].modules = lambda: 1 / 0
    refused("one fails", train, model, 0, 1)

    by_layer, by_kind = (
        lambda variable: "narrow" in variable.path,
        lambda variable: variable.path.endswith("kernel"),
    )
    optimizer = keras_slsam.SLSAM("sgd", arms=by_kind if RANK else by_layer)
    model = small_model(optimizer, layers.Dense(3, name="narrow"))
    refused("arms", take_small_steps, model)

    model = make_model("sam")
    if RANK == 1:
        model.optimizer.get_config = lambda: 1 / 0
    refused("one config", train, model, 0, 1)

    # Keras cannot save `arms`, so arguments are not compared.
    base = keras.optimizers.SGD(use_ema=RANK == 1)
    optimizer = keras_slsam.SLSAM(base, arms=operator.attrgetter("path"))
    refused("state", take_small_steps, small_model(optimizer))

    # The same in all processes, so they take the step.
    refused("alike", take_small_steps, small_model(alike_optimizer(folder)))
    optimizer = keras_slsam.SLSAM("sgd", arms=operator.attrgetter("path"))
    refused("an argument without a config", take_small_steps, small_model(optimizer))
    optimizer = keras_slsam.SAM("sgd")
    optimizer.get_config = lambda: 1 / 0
    refused("an optimizer without a config", take_small_steps, small_model(optimizer))
    optimizer = keras_slsam.SAM(keras.optimizers.SGD(Decay()))
    refused("a schedule without a config", take_small_steps, small_model(optimizer))
    model = make_model("sam")
    model.optimizer.learning_rate = np.nan
    refused("nan", train, model, 0, 1)

    model = make_model("sam")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    batch = tuple(torch.as_tensor(part) for part in part_of_batch(0))
    refused("wrapped", keras_slsam.step, wrapped, model.optimizer, batch)
    refused("wrapped too early", keras_slsam.sharpness_aware, wrapped)
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model = small_model(keras_slsam.SAM("sgd"), layers.TorchModuleWrapper(module))
    refused("wrapped inside", take_small_steps, model, 1)

    model = make_model("sam")
    fully_shard(model)
    refused("sharded", train, model, 0, 1)
    dense = layers.Dense(3)
    model = small_model(keras_slsam.SAM("sgd"), dense)
    fully_shard(dense)
    refused("a sharded layer", take_small_steps, model, 1)
    module = torch.nn.Linear(4, 4)
    wrapper = layers.TorchModuleWrapper(module)
    model = small_model(keras_slsam.SAM("sgd"), wrapper)
    fully_shard(module)
    refused("a sharded module", take_small_steps, model, 1)
    write(folder, "errors", errors)


def scenario_shared(folder):
    """Shares buffers, and draws noise in each process."""
    import torch

    class Buffers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("own", torch.arange(3.0) + RANK)
            self.register_buffer("expanded", torch.tensor([1.0 + RANK]).expand(3))

        def forward(self, x):
            return x

    module = Buffers()
    model = small_model(keras_slsam.SAM("sgd"), layers.TorchModuleWrapper(module))
    take_small_steps(model, 1)
    found = {name: value.numpy() for name, value in module.named_buffers()}
    usual, with_generator = layers.Dropout(0.5), layers.GaussianNoise(1.0)
    model = small_model(keras_slsam.SAM("sgd"), usual, with_generator)
    keras.utils.set_random_seed(RANK)
    take_small_steps(model, 1)
    for layer in usual, with_generator:
        noise = layer(np.ones((1, 64), "float32"), training=True)
        found[type(layer).__name__] = keras.ops.convert_to_numpy(noise)
    write(folder, "shared", found)


def scenario_restored(folder):
    """One process alone loads an earlier state of the optimizer."""
    model = make_model("slsam")
    train(model, 0, 1)
    variables = model.optimizer.variables
    before = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
    train(model, 1, 1)
    if RANK == 1:
        model.optimizer.set_weights(before)
    write(folder, "restored", train(model, 2, 3))
    model = load(folder / "one.keras")
    write(folder, "from one", train_on(model))
    return model


def scenario_all(folder):
    scenario_train(folder)
    scenario_fit_and_loop(folder)
    scenario_small(folder)
    scenario_refused(folder)
    scenario_shared(folder)
    model = scenario_restored(folder)
    scenario_float64(folder)
    return model


def scenario_killed(folder):
    scenario_train(folder)
    train(make_model("slsam"), 0, 7, folder / "model.keras" if RANK == 0 else None)
    scenario_float64(folder)
    model = make_model("slsam")
    train(model, 0, 2)
    if RANK == 1:
        die(folder)
    train(model, 2, 100)


def scenario_one(folder):
    train(make_model("slsam"), 0, EARLY, folder / "one.keras")


def scenario_other_backend(file):
    write(file.parent, "other backend", train_on(load(file)))


def scenario_resumed(folder):
    write(folder, "resumed", train_on(load(folder / "model.keras")))
    whole = make_model("slsam")
    file = folder / "of two.keras" if RANK == 0 else None
    write(folder, "whole", train(whole, file=file))
    write(folder, "resumed by two", train_on(load(folder / "of two.keras")))
    if RANK == 0:
        die(folder)
    train(whole, 0, 100)


if __name__ == "__main__":
    scenario, path = globals()[f"scenario_{sys.argv[1]}"], pathlib.Path(sys.argv[2])
    if PROCESSES == 1:
        scenario(path)
        sys.exit()
    from torch import distributed

    distributed.init_process_group("gloo")
    model = scenario(path)
    distributed.destroy_process_group()
    if model is not None:
        train(model, 0, 1)  # goes on alone
