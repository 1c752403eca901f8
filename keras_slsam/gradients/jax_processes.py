"""Training in several processes of JAX, which run one program together."""

import concurrent.futures

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from keras_slsam.gradients import alike


def check(model, optimizer):
    """Refuses what does not work in several processes.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`.

    Raises:
        ValueError: naming what is not supported.
    """
    processes = jax.process_count()
    if processes == 1:
        return
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.DataParallel):
        raise ValueError(
            "Several processes of JAX must share a "
            "`keras.distribution.DataParallel`. "
            f"Received: {distribution} in {processes} processes. Call "
            "`keras.distribution.set_distribution` with one before you create the "
            "model."
        )
    devices = distribution.device_mesh.devices.size
    if devices != jax.device_count():
        raise ValueError(
            "The `keras.distribution.DataParallel` of several processes of JAX must "
            f"have the devices of all. Received: {devices} of {jax.device_count()} "
            "devices. Pass `devices=keras.distribution.list_devices()`."
        )
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scaler
    if getattr(inner, "ascent_fraction", 1.0) < 1:
        # Choosing rows of a sharded batch adds exchanges, which XLA does not order.
        raise ValueError(
            "In several processes of JAX the ascent must be on the whole batch. "
            f"Received: ascent_fraction={inner.ascent_fraction}. Set it to 1.0, or use "
            "one process with all devices."
        )
    _check_cpus()


def _check_cpus():
    """Raises a `ValueError` where processes on CPUs could wait for each other."""
    if jax.default_backend() != "cpu":
        return
    devices = jax.local_device_count()
    if devices > 1:
        # All devices of a process share a few threads, which block in an exchange.
        raise ValueError(
            "In several processes of JAX on CPUs, each process must have one device, "
            "or its devices may wait for each other forever. Received: "
            f"{devices} devices in this process. Start one process per device, or one "
            "process with all devices."
        )
    if jax.config.values["jax_cpu_enable_async_dispatch"]:
        # Else two programs may exchange at once, and gloo knows only the order.
        raise ValueError(
            "In several processes of JAX on CPUs, programs must run one at a time. "
            "Received: jax_cpu_enable_async_dispatch=True. Call "
            "`jax.config.update('jax_cpu_enable_async_dispatch', False)` before "
            "`keras.distribution.initialize`. JAX reads it only there, so start Python "
            "again."
        )


def start(model, optimizer, weights=None):
    """Checks that all processes start with the same versions, arguments and weights.

    Args:
        model: `keras.Model`.
        optimizer: `keras.optimizers.Optimizer`, built for it.
        weights: See `Backend.start`.

    Raises:
        ValueError: in all processes, if something differs or is not supported.
    """
    _check_cpus()  # before there is an exchange
    # In this thread, because each has its own distribution.
    refused = alike.facts_or_error(lambda: check(model, optimizer) or {})

    def find():
        return refused or alike.facts(jax, model, optimizer, weights)

    def gather(row):
        return multihost_utils.process_allgather(np.array(row))

    # A step may be being traced in this thread. Another one is outside of the trace.
    with concurrent.futures.ThreadPoolExecutor(1) as outside:
        outside.submit(alike.compare, find, gather).result()
