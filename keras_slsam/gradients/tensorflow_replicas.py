"""Training on the replicas of a `tf.distribute` strategy.

In a replica, TensorFlow does not assign to mirrored variables inside conditions. So
each replica takes the step of one device, on its own copies of all variables. The
copies stay equal, because the replicas average their gradients. Gradients of inactive
arms are not exchanged.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import typing
import zlib

import keras
import tensorflow as tf

from keras_slsam.gradients import alike

_Workers = tf.distribute.MultiWorkerMirroredStrategy
# The supported strategies that have replicas.
STRATEGIES = tf.distribute.MirroredStrategy, _Workers

# The `_Copies` of the replica that takes a step.
_replica = contextvars.ContextVar("replica", default=None)


def check(model, optimizer):
    """Refuses what does not work under the current strategy.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`.

    Raises:
        ValueError: naming what is not supported.
    """
    if not _has_replicas():
        return
    strategy = tf.distribute.get_strategy()
    kind = type(strategy).__name__
    if not isinstance(strategy, STRATEGIES):
        raise ValueError(
            "Sharpness-aware steps support `MirroredStrategy`, "
            "`MultiWorkerMirroredStrategy` and `OneDeviceStrategy` of `tf.distribute`. "
            f"Received: a `{kind}`."
        )
    if model.run_eagerly or model.jit_compile:
        raise ValueError(
            f"Under a `{kind}` a sharpness-aware step must run in a graph without XLA. "
            f"Received: run_eagerly={model.run_eagerly}, "
            f"jit_compile={model.jit_compile}. Set both to False in `model.compile`."
        )
    if tf.distribute.in_cross_replica_context() or tf.executing_eagerly():
        raise ValueError(
            f"Under a `{kind}`, call `keras_slsam.step` in each replica with "
            "`strategy.run`, inside a `tf.function`."
        )
    if not optimizer.built or not model.built:
        raise ValueError(
            f"Under a `{kind}` model and optimizer must be built before the first "
            "step. In the scope of the strategy, call the model on a batch, unless it "
            "has an `Input`, and then `optimizer.build(model.trainable_variables)`."
        )
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scaler
    if inner.use_ema and inner.ema_overwrite_frequency:
        raise ValueError(
            "`ema_overwrite_frequency` does not work on several replicas, as in Keras' "
            f"own step. Received: {inner.ema_overwrite_frequency}. Set it to None."
        )
    for layer in model._flatten_layers():
        # Its exchange would be in the passes, where a replica is alone.
        if getattr(layer, "synchronized", False):
            raise ValueError(
                f"The layer {layer.name!r} has `synchronized=True`, which a "
                "sharpness-aware step does not support. Set it to False: each replica "
                "then normalises with the statistics of its own rows."
            )
    for variable in _variables(model, optimizer):
        if not isinstance(variable.value, tf.distribute.DistributedValues):
            raise ValueError(
                f"The variable {variable.path!r} was created outside of the scope of "
                f"the `{kind}`. Create the model, its optimizer and its metrics, and "
                "compile it, in `with strategy.scope():`."
            )


def processes():
    """Returns the number of workers, 1 without a strategy for several."""
    strategy = tf.distribute.get_strategy()
    if not isinstance(strategy, _Workers):
        return 1
    return strategy.num_replicas_in_sync // len(strategy.extended.worker_devices)


def start(model, optimizer, weights=None):
    """Checks that all workers start with the same versions, arguments and weights.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`, built for it.
        weights: See `Backend.start`.

    Raises:
        ValueError: in all workers, if something differs.
    """
    replica = tf.distribute.get_replica_context()
    devices = replica.strategy.extended.worker_devices  # of this worker
    number = tf.get_static_value(replica.replica_id_in_sync_group)
    rank = number // len(devices)

    def gather(row):
        shape = [processes(), len(row)]
        return tf.raw_ops.CollectiveReduceV2(
            input=tf.scatter_nd([[rank]], [row], shape),
            group_size=shape[0],
            group_key=_number("workers"),
            instance_key=_number(f"start {shape}"),
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
        ).numpy()

    def find():
        return alike.facts(tf, model, optimizer, weights)

    # Outside of the graph of the step.
    with tf.init_scope(), tf.device("CPU:0"):
        alike.compare(find, gather)


def as_one_device(model, optimizer):
    """Returns a context in which a replica computes on its own copies of variables.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`, built.
    """
    if not _has_replicas():
        return contextlib.nullcontext()
    return _Copies(_variables(model, optimizer), optimizer.variables[0])


def average(gradients, arms):
    """Returns the averages over the replicas, of the gradients of active arms.

    The exchanges are in conditions, where `ReplicaContext.all_reduce` does not work.

    Args:
        gradients: List of tensors, one per variable.
        arms: `ActiveArms`.
    """
    replica = _replica.get()
    if replica is None:
        return gradients
    result = list(gradients)
    for active, indices in zip(arms.active, arms.members):
        own = [gradients[i] for i in indices]
        # Read here, because a condition does not know the shape of `IndexedSlices`.
        shapes = [gradient.shape for gradient in own]
        exchange = functools.partial(_average_together, own, shapes, replica)
        if active is not True:
            leave = functools.partial(_unread, own)
            exchange = functools.partial(tf.cond, active, exchange, leave)
        for i, gradient in zip(indices, exchange()):
            result[i] = gradient
    return result


def _unread(gradients):
    """Returns what stands for gradients of an inactive arm. None is made dense."""
    return [
        tf.zeros_like(g.values[:0]) if isinstance(g, tf.IndexedSlices) else g
        for g in gradients
    ]


def _average_together(gradients, shapes, replica):
    """Averages gradients of known shapes in one exchange for each dtype."""
    result = list(gradients)
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        places = [i for i, gradient in enumerate(gradients) if gradient.dtype == dtype]
        # Divided first, because a sum may overflow in float16.
        share = tf.constant(1 / replica.strategy.num_replicas_in_sync, dtype)
        sizes = [shapes[i].num_elements() for i in places]
        dense = [tf.convert_to_tensor(gradients[i]) for i in places]
        parts = [tf.reshape(d, [size]) * share for d, size in zip(dense, sizes)]
        flat = replica.reduce(tf.concat(parts, 0), "Add")
        for i, part in zip(places, tf.split(flat, sizes)):
            result[i] = tf.reshape(part, shapes[i])
    return result


def agree(facts, variables):
    """Checks that all processes are about to take the same step.

    Args:
        facts: See `Backend.agree`.
        variables: Not compared.
    """
    replica = _replica.get()
    if replica is None or not isinstance(replica.strategy, _Workers):
        return
    facts = facts()
    own = tf.stack([tf.cast(value, "float64") for value in facts.values()])
    own = tf.bitcast(own, "int64")  # so that a NaN equals itself
    both = tf.concat([own, tf.bitwise.invert(own)], 0)
    largest, inverted = tf.split(replica.reduce(both, "Max"), 2)
    smallest = tf.bitwise.invert(inverted)
    unlike = tf.boolean_mask(tf.constant(list(facts)), largest != smallest)
    message = (
        "All processes must take the same step. Set learning rate, `rho` and state to "
        "the same values in each process, at the same step. Received: different values "
        "of"
    )
    replica.wait_for(tf.debugging.Assert(tf.size(unlike) == 0, [message, unlike]))


def _has_replicas():
    one_device = isinstance(
        tf.distribute.get_strategy(), tf.distribute.OneDeviceStrategy
    )
    return tf.distribute.has_strategy() and not one_device


def _variables(model, optimizer):
    return model.variables + model.metrics_variables + optimizer.variables


@dataclasses.dataclass
class _Order:
    """The order of a replica's exchanges in one graph.

    Attributes:
        token: Tensor of a resource. TensorFlow keeps operations that read it in order.
        numbers: Iterator of int, by which the replicas know each exchange.
    """

    token: tf.Tensor
    numbers: typing.Iterator[int] = dataclasses.field(default_factory=itertools.count)


def _order_of(number, token):
    """Returns the order of a replica in this graph, which may have several steps.

    Args:
        number: int, of the replica.
        token: Tensor of a resource, if this is its first step.
    """
    graph = tf.compat.v1.get_default_graph()
    # An inner graph has a copy of what an outer one collects.
    found = graph.get_collection_ref(f"keras_slsam {id(graph)} {number}")
    if not found:
        found.append(_Order(token))
    return found[0]


class _Copies(keras.StatelessScope):
    """Scope in which Keras reads and assigns the copies of one replica.

    Args:
        variables: List of the `keras.Variable`s that a step may assign.
        token: One of them, a token of the order of the exchanges.

    Attributes:
        strategy: `tf.distribute.Strategy`.
    """

    def __init__(self, variables, token):
        super().__init__(initialize_variables=False)
        replica = tf.distribute.get_replica_context()
        self.strategy = replica.strategy
        number = tf.get_static_value(replica.replica_id_in_sync_group)
        for variable in variables:
            copies = self.strategy.experimental_local_results(variable.value)
            # Each process has equally many replicas, with successive numbers.
            self.state_mapping[id(variable)] = copies[number % len(copies)]
        copy = self.state_mapping[id(token)]
        self._order = _order_of(number, copy.handle)
        # With a strategy of its own, Keras neither divides the loss by the number of
        # replicas, nor exchanges gradients, nor leaves the replica to update variables.
        alone = tf.distribute.OneDeviceStrategy(copy.device)
        self._alone = tf.distribute.ReplicaContext(alone, 0)

    def __enter__(self):
        self._before = _replica.set(self)
        self._alone.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self._alone.__exit__(*args)
        _replica.reset(self._before)

    def add_update(self, update):
        variable, value = update
        if id(variable) not in self.state_mapping:
            raise ValueError(
                f"The variable {variable.path!r} is created in a step, or belongs to "
                "neither model nor optimizer, so a replica cannot assign to it. If a "
                "metric creates it, call `model.test_on_batch(x, y)` once before the "
                "first step, or on several workers compile the model without metrics. "
                "If a layer with random numbers does, give the layer its own "
                "`keras.random.SeedGenerator`."
            )
        self.state_mapping[id(variable)].assign(value)

    def reduce(self, tensor, merge):
        """Reduces a tensor over all replicas.

        Args:
            tensor: Tensor of known shape.
            merge: String, `"Add"` or `"Max"`.
        """
        number = next(self._order.numbers)
        exchange = f"{number} {merge} {tensor.dtype} {tensor.shape}"
        return tf.raw_ops.CollectiveReduceV2(
            input=tensor,
            group_size=self.strategy.num_replicas_in_sync,
            group_key=_number(self._group()),
            # TensorFlow allows one shape and dtype for each number.
            instance_key=_number(exchange),
            # Makes the order of the exchanges the same in all replicas.
            ordering_token=[self._order.token],
            merge_op=merge,
            final_op="Id",
        )

    def wait_for(self, operation):
        """Starts no later exchange before an operation has succeeded.

        If a step fails during an exchange, TensorFlow refuses all later exchanges of
        this process, and others may wait for as long as it lives. With several replicas
        per process that is still possible: they do not wait for each other's operation.

        Args:
            operation: `tf.Operation`.
        """
        with tf.control_dependencies([operation]):
            self._order.token = tf.identity(self._order.token)

    def _group(self):
        """Returns a string that names the replicas, the same in all of them."""
        if isinstance(self.strategy, _Workers):
            return str(self.strategy.cluster_resolver.cluster_spec())
        return str(self.strategy.extended.worker_devices)


def _number(text):
    """Returns a number that stands for a text.

    TensorFlow knows groups and exchanges by numbers. Those of strategies are small, so
    they differ from these.
    """
    return zlib.crc32(text.encode()) >> 1
