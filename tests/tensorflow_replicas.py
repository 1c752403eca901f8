"""Trains on the replicas of a `tf.distribute` strategy.

python tensorflow_replicas.py SCENARIO FOLDER, with RANK, WORLD_SIZE and PORTS
"""

import collections
import functools
import json
import os
import pathlib
import sys

RANK, WORKERS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if WORKERS > 1:
    workers = [f"127.0.0.1:{port}" for port in os.environ["PORTS"].split()]
    task = {"type": "worker", "index": RANK}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})

import keras  # noqa: E402
import numpy as np  # noqa: E402
import processes  # noqa: E402
import tensorflow as tf  # noqa: E402

import keras_slsam  # noqa: E402

DEVICES = [f"CPU:{i}" for i in range(4)]
SMALL = tuple(kind for kind in processes.SMALL if kind != "frozen")


def mirrored(count):
    return tf.distribute.MirroredStrategy(DEVICES[:count])


def built(strategy, method):
    with strategy.scope():
        model = processes.make_model(method)
        model.optimizer.build(model.trainable_variables)
    return model


def whole_batches(steps=processes.STEPS):
    return [processes.part_of_batch(step, 0, 1) for step in range(steps)]


@functools.cache
def compiled_step(strategy, model):
    """Returns a function that takes one step on all replicas."""

    def one(data):
        return keras_slsam.step(model, model.optimizer, data)

    return tf.function(lambda data: strategy.run(one, args=(data,)), autograph=False)


def run(strategy, model, *batches):
    """Takes steps like `fit`, which Keras does not support with several workers."""
    step, masks = compiled_step(strategy, model), []
    for batch in batches:
        step(batch)
        masks.append(keras.ops.convert_to_numpy(model.optimizer.active))
    return processes.found(model, masks)


def take_steps(strategy, model, first=0, steps=processes.STEPS):
    """Takes steps on this process' parts. It has one replica."""
    parts = map(processes.part_of_batch, range(first, first + steps))
    return run(strategy, model, *parts)


def take_later_steps(strategy, model):
    later = processes.STEPS - processes.EARLY
    return take_steps(strategy, model, processes.EARLY, later)


def count_exchanges():
    """Returns a dict of the bytes of gradients that each graph exchanges.

    Each branch of a condition is a graph.
    """
    exchange, counts = tf.raw_ops.CollectiveReduceV2, collections.Counter()

    def counted(input, **kwargs):
        if kwargs["merge_op"] == "Add":
            graph = tf.compat.v1.get_default_graph()
            counts[graph] += input.shape.num_elements() * input.dtype.size
        return exchange(input=input, **kwargs)

    tf.raw_ops.CollectiveReduceV2 = counted
    return counts


def error_of(call, *arguments):
    try:
        call(*arguments)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        return str(error)
    return "no error"


def exchanged_by_adamw():
    """Returns the bytes that each replica exchanges in a step of Keras' AdamW."""
    reduce, sizes = tf.distribute.ReplicaContext.all_reduce, []

    def counted(self, op, values, *args):
        sizes.extend(
            v.shape.num_elements() * v.dtype.size for v in tf.nest.flatten(values)
        )
        return reduce(self, op, values, *args)

    strategy = mirrored(2)
    with strategy.scope():
        model = processes.make_model("sam")
        model.compile(keras.optimizers.AdamW(), model.loss)
    tf.distribute.ReplicaContext.all_reduce = counted
    x, y = processes.part_of_batch(0)
    model.fit(x, y, len(x), verbose=0)
    tf.distribute.ReplicaContext.all_reduce = reduce
    return sum(sizes) / 2


def scenario_mirrored(folder):
    processes.write(folder, "adamw", {"exchanged": exchanged_by_adamw()})
    with mirrored(2).scope():
        loaded = processes.load(folder / "one.keras")
    late = processes.fit(loaded, whole_batches()[processes.EARLY :])
    processes.write(folder, "from one", late)
    counts = count_exchanges()
    for precision, usual, other in ((32, 4, 2), (64, 2, 4)):
        if precision == 64:
            processes.use_float64()
        # SL-SAM, which has the most conditions, runs with both numbers of replicas.
        runs = [(usual, method) for method in processes.METHODS] + [(other, "slsam")]
        for replicas, method in runs:
            counts.clear()
            model = built(mirrored(replicas), method)
            early = processes.fit(model, whole_batches()[: processes.EARLY])
            if (precision, replicas, method) == (32, 4, "slsam"):
                model.save(folder / "model.keras")
            late = processes.fit(model, whole_batches()[processes.EARLY :])
            late["masks"] = np.concatenate([early["masks"], late["masks"]])
            inside = sorted(n for graph, n in counts.items() if "cond" in graph.name)
            outside = sum(counts.values()) - sum(inside)
            name = f"{replicas}-{precision}-{method}"
            sizes = processes.sizes_of_arms(model)
            late.update(inside=inside, outside=outside, sizes=sizes)
            processes.write(folder, name, late)


def train_pair(strategy):
    """Returns the weights of two models that one function trains."""
    with strategy.scope():
        models = [
            processes.small_model(keras_slsam.SAM("sgd"), metrics=()) for _ in range(2)
        ]
        for model in models:
            model.optimizer.build(model.trainable_variables)

    def step(x, y):
        for model, target in zip(models, (y, -y)):
            keras_slsam.step(model, model.optimizer, (x, target))

    on_replicas = tf.function(lambda *data: strategy.run(step, data), autograph=False)
    count = strategy.num_replicas_in_sync
    for number in range(3):
        parts = [processes.small_part(number, None, i, count) for i in range(count)]
        data = [
            strategy.experimental_distribute_values_from_function(
                lambda replica, of_all=of_all: tf.constant(
                    of_all[replica.replica_id_in_sync_group], "float32"
                )
            )
            for of_all in zip(*parts)
        ]
        on_replicas(*data)
    weights = [w.ravel() for model in models for w in model.get_weights()]
    return np.concatenate(weights)


class Noise(keras.layers.Layer):
    """Draws from the generator that Keras shares between all layers without one."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


def fit_equal_rows(model, steps, broken):
    """Like `processes.take_equal_steps` in two replicas."""
    parts = [processes.small_part(step, broken, 0, 2) for step in range(steps)]
    x, y = (
        np.concatenate([part for part in each for _ in range(2)])
        for each in zip(*parts)
    )
    model.fit(x, y, 8, shuffle=False, verbose=0)


def normalised(strategy):
    """Returns what `processes.normalised` returns, of each replica."""
    with strategy.scope():
        model = processes.normalised_model()
    processes.fit_small(model, 1, None)
    found = [{}, {}]
    for name, variable in zip(processes.OF_BATCH_NORM, model.layers[0].weights):
        copies = strategy.experimental_local_results(variable.value)
        for of_replica, copy in zip(found, copies):
            of_replica[name] = copy.numpy()
    return found


def scenario_small(folder):
    strategy = mirrored(2)
    one = tf.distribute.MirroredStrategy(DEVICES[3:])  # other devices work too
    few = processes.fit(built(one, "slsam"), whole_batches(3))
    processes.write(folder, "one", few)
    with strategy.scope():
        results = {kind: processes.small(kind, processes.fit_small) for kind in SMALL}
        results["normalised"] = processes.small("normalised", fit_equal_rows)
    processes.write(folder, "small", results)
    for rank, found in enumerate(normalised(strategy)):
        np.savez(folder / f"normalised-{rank}.npz", **found)
    alone = train_pair(tf.distribute.OneDeviceStrategy(DEVICES[0]))
    processes.write(folder, "pair", {"alone": alone, "both": train_pair(strategy)})

    def outside():
        optimizer = keras_slsam.SAM("sgd")
        with strategy.scope():
            model = processes.small_model(optimizer)
        processes.fit_small(model, 1, None)

    def compiled(**kwargs):
        with strategy.scope():
            model = processes.small_model(keras_slsam.SAM("sgd"))
            model.compile(keras_slsam.SAM("sgd"), "mse", **kwargs)
        processes.fit_small(model, 1, None)

    def with_metric():
        with strategy.scope():
            model = processes.small_model(keras_slsam.SAM("sgd"))
            model.optimizer.build(model.trainable_variables)
        run(strategy, model, processes.small_part(0))

    def synchronized():
        layer = keras.layers.BatchNormalization(synchronized=True)
        with strategy.scope():
            model = processes.small_model(keras_slsam.SAM("sgd"), layer)
        processes.fit_small(model, 1, None)

    def unbuilt():
        with strategy.scope():
            model = processes.make_model("sam")
        take_steps(strategy, model, 0, 1)

    def overwritten():
        with strategy.scope():
            base = keras.optimizers.SGD(use_ema=True, ema_overwrite_frequency=2)
            model = processes.small_model(keras_slsam.SAM(base))
        processes.fit_small(model, 1, None)

    def noise_without_generator():
        with strategy.scope():
            model = processes.small_model(keras_slsam.SAM("sgd"), Noise())
        processes.fit_small(model, 1, None)

    def not_in_replicas():
        model = built(strategy, "sam")
        x, y = map(tf.constant, processes.part_of_batch(0))
        with strategy.scope():
            tf.function(lambda: keras_slsam.step(model, model.optimizer, (x, y)))()

    def of_another_kind():
        other = tf.distribute.experimental.CentralStorageStrategy(DEVICES[:2])
        take_steps(other, built(other, "sam"), 0, 1)

    errors = {
        "outside": error_of(outside),
        "eager": error_of(lambda: compiled(run_eagerly=True)),
        "jit": error_of(lambda: compiled(jit_compile=True)),
        "unbuilt": error_of(unbuilt),
        "metric": error_of(with_metric),
        "synchronized": error_of(synchronized),
        "overwritten": error_of(overwritten),
        "noise": error_of(noise_without_generator),
        "not in replicas": error_of(not_in_replicas),
        "kind": error_of(of_another_kind),
    }
    processes.write(folder, "errors", errors)


def die_or_wait(folder, strategy, model, rank):
    """Kills one worker. The others must get an error."""
    if RANK == rank:
        processes.die(folder)
    take_steps(strategy, model, 0, 1000)


def scenario_killed(folder):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        random = keras_slsam.RST(keras.optimizers.SGD(0.1))  # each draws its own seed
        model = processes.small_model(random, metrics=())
        model.optimizer.build(model.trainable_variables)
    run(strategy, model, *map(processes.small_part, range(6)))

    def steps_of_loop(part, model, steps, broken):
        model.optimizer.build(model.trainable_variables)
        for step in range(steps):
            compiled_step(strategy, model)(part(step, broken))
        # As at the end of `fit`.
        model.optimizer.finalize_variable_values(model.trainable_variables)

    own = functools.partial(steps_of_loop, processes.small_part)
    equal = functools.partial(
        steps_of_loop, functools.partial(processes.small_part, rank=0, processes=2)
    )
    with strategy.scope():
        kinds = *processes.FEW, "part"
        few = {kind: processes.small(kind, own, metrics=()) for kind in kinds}
        few["normalised"] = processes.small("normalised", equal, metrics=())
    processes.write(folder, "small", few)
    for method in processes.METHODS:
        model = built(strategy, method)
        early = take_steps(strategy, model, 0, processes.EARLY)
        if method == "slsam":
            model.save(folder / f"model-{RANK}.keras")
        late = take_later_steps(strategy, model)
        masks = np.concatenate([early["masks"], late["masks"]])
        processes.write(folder, f"workers-{method}", {**late, "masks": masks})
    rate, errors = model.optimizer.learning_rate.numpy(), {}
    # Many times, because whether a worker is left waiting depends on timing.
    for _ in range(30):
        model.optimizer.learning_rate = rate * (1 + RANK)
        errors["rate"] = error_of(take_steps, strategy, model, 0, 1)
        model.optimizer.learning_rate = np.nan  # in all, so it is not a difference
        errors["nan"] = error_of(take_steps, strategy, model, 0, 1)
        assert errors["rate"] != "no error" and errors["nan"] == "no error"
    version = keras_slsam.__version__
    keras_slsam.__version__ = f"0.0.{RANK}"
    errors["version"] = error_of(take_steps, strategy, built(strategy, "sam"), 0, 1)
    keras_slsam.__version__ = version
    other = built(strategy, "sam")
    other.trainable_variables[3].assign_add(np.full((16, 8), 1e-3 * RANK))
    errors["weights"] = error_of(take_steps, strategy, other, 0, 1)
    other = built(strategy, "sam")
    other.optimizer.base_optimizer.weight_decay = 0.1 * RANK
    errors["arguments"] = error_of(take_steps, strategy, other, 0, 1)
    with strategy.scope():
        other = processes.small_model(processes.alike_optimizer(folder), metrics=())
        other.optimizer.build(other.trainable_variables)
    errors["alike"] = error_of(run, strategy, other, processes.small_part(0))
    processes.write(folder, "errors", errors)
    processes.use_float64()
    model = built(strategy, "slsam")
    processes.write(folder, "in float64", take_steps(strategy, model))
    die_or_wait(folder, strategy, model, rank=1)


def scenario_resumed(folder):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    for name, file in {"from one": "one.keras", "resumed": "model-0.keras"}.items():
        with strategy.scope():
            model = keras.saving.load_model(folder / file)
        processes.write(folder, name, take_later_steps(strategy, model))
    die_or_wait(folder, strategy, model, rank=0)


if __name__ == "__main__":
    (cpu,) = tf.config.list_physical_devices("CPU")
    if WORKERS == 1:
        several = [tf.config.LogicalDeviceConfiguration() for _ in DEVICES]
        tf.config.set_logical_device_configuration(cpu, several)
    globals()[f"scenario_{sys.argv[1]}"](pathlib.Path(sys.argv[2]))
