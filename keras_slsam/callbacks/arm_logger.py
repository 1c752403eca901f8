"""Logs which arms are active, and what their gradients and updates are."""

import csv
import os
import re

import numpy as np
from keras import ops

from keras_slsam import arguments
from keras_slsam import training
from keras_slsam.callbacks import tensorboard
from keras_slsam.callbacks.observing import Observing
from keras_slsam.observers import Observer


class ArmLogger(Observing):
    """Records for each arm how often it is active, and how it moves.

    The record of an epoch is made at its end. Until then the compiled step counts, so
    nothing is read from the device between two steps. A logger belongs to one model. If
    you call `fit` again with it, the records go on.

    A record is a dict:

    - `"epoch"`: int, from 0.
    - `"step"`: int, the optimizer's `iterations`.
    - `"active"`: array of shape `(num_arms,)`, the share of the steps since the last
      record in which an arm was active. A skipped step does not count as active.
    - `"probability"`: array like it, of the arm in the next draw, or `None` if the
      sampler has no probabilities.
    - `"gradient_norm"`: array like it, the mean of the arm's gradient norm over the
      steps in which it was active since the last record, nan if there are none.
    - `"update_ratio"`: array like it, the norm of the change of the arm's weights since
      the last record, divided by their norm then: inf if that is 0, nan if the model
      was not built then.

    Args:
        filename: String or path of a CSV file to write, with a row per record and arm,
            or `None`.
        log_dir: String or path of a folder for TensorBoard, with scalars and a heat map
            of `"active"`, or `None`. Needs the packages of `keras-slsam[analysis]`.
        every: `"epoch"`, or int, the number of steps after which a record is made
            within an epoch too. Each record then waits for the device.

    Attributes:
        records: List of the records.
        names: List of strings, the name of each arm: the path of its variable, or what
            the paths of its variables have in common.

    Raises:
        ValueError: if `every` is not allowed, or, at the start of the training, if the
            optimizer is not from this package.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="top")])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> model.compile(keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0), "mse")
    >>> x, y = keras.random.normal((64, 4)), keras.random.normal((64, 1))
    >>> logger = keras_slsam.callbacks.ArmLogger()
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[logger])
    >>> len(logger.records), logger.names
    (2, ['top/kernel', 'top/bias'])
    """

    def __init__(
        self,
        filename: str | os.PathLike | None = None,
        *,
        log_dir: str | os.PathLike | None = None,
        every: str | int = "epoch",
    ) -> None:
        super().__init__()
        steps = None if every == "epoch" else every
        if steps is not None and not (type(every) is int and every >= 1):
            raise ValueError(
                'Argument `every` of `ArmLogger` must be "epoch" or a number of steps '
                f">= 1. Received: every={every!r}"
            )
        self._filename, self._log_dir, self._steps = filename, log_dir, steps
        self._writer = None
        self.records: list[dict] = []
        self.names: list[str] = []

    def on_train_begin(self, logs=None):
        if not training.is_sharpness_aware(self.model.optimizer):
            raise ValueError(
                "`ArmLogger` needs an optimizer of keras_slsam, which has arms. "
                f"Received: optimizer={self.model.optimizer!r}"
            )
        if self._filename is not None and not self.records:
            with open(self._filename, "w", newline="") as file:
                csv.writer(file).writerow(_COLUMNS)
        if self._log_dir is not None and self._writer is None:
            self._writer = tensorboard.Writer(self._log_dir)
        self._weights = self._read_weights()
        self._observe(_ArmSums, "arm_sums")

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._seen = epoch, 0
        self._before = 0.0  # Keras has reset the sums

    def on_train_batch_end(self, batch, logs=None):
        if self._steps is not None and (batch + 1) // self._steps > self._seen:
            self._seen = (batch + 1) // self._steps
            self._optimizer._collect_state()
            self._record()

    def on_epoch_end(self, epoch, logs=None):
        self._record()

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self._writer is not None:
            self._writer.flush()

    def _record(self):
        optimizer = self._optimizer
        if not self._observer.variables:
            return  # the model has no trainable weights
        sums = ops.convert_to_numpy(self._observer.sums).astype("float64")
        active, norms, steps = sums - self._before
        if not steps[0]:
            return  # the last steps of an epoch have a record already
        self._before = sums
        weights = self._read_weights()
        before, self._weights = self._weights, weights
        probabilities = optimizer.probabilities
        with np.errstate(divide="ignore", invalid="ignore"):
            record = {
                "epoch": self._epoch,
                "step": int(ops.convert_to_numpy(optimizer.iterations)),
                "active": active / steps,
                "probability": None
                if probabilities is None
                else ops.convert_to_numpy(probabilities),
                "gradient_norm": norms / active,
                "update_ratio": self._norms(weights, before) / self._norms(before)
                if before
                else np.full_like(active, np.nan),
            }
        self.names = _names(optimizer.arms, self.model.name)
        self.records.append(record)
        if self._filename is not None:
            with open(self._filename, "a", newline="") as file:
                csv.writer(file).writerows(_rows(record, self.names))
        if self._writer is not None:
            self._writer.write(self)

    def _read_weights(self):
        # Copies, because on PyTorch an array shares the memory of the weight.
        return [
            np.array(ops.convert_to_numpy(ops.cast(v, "float32")), "float32")
            for v in self.model.trainable_variables
        ]

    def _norms(self, weights, others=None):
        """Returns the norm of the weights of each arm, or of their differences."""
        if others is not None:
            weights = [one - other for one, other in zip(weights, others)]
        squares = [float(np.vdot(weight, weight)) for weight in weights]
        members = self._optimizer._selection.members
        return np.sqrt([sum(squares[i] for i in arm) for arm in members])


class _ArmSums(Observer):
    """How often each arm was active, its sum of norms, and the number of steps.

    Its result is empty, so the logs do not have it.
    """

    def build(self, num_arms):
        dtype = arguments.float_dtype()
        self.sums = self.add_variable((3, num_arms), "zeros", dtype=dtype, name="sums")

    def update_state(self, reading):
        norms = ops.where(reading.active, reading.norms, 0.0)
        rows = [reading.active, norms, ops.ones_like(norms)]
        self.sums.assign_add(
            ops.stack([ops.cast(row, self.sums.dtype) for row in rows])
        )

    def result(self):
        return {}


_QUANTITIES = ("active", "probability", "gradient_norm", "update_ratio")
_COLUMNS = ("epoch", "step", "arm", *_QUANTITIES)


def _rows(record, names):
    """Yields the rows of a CSV file for a record."""
    for arm, name in enumerate(names):
        values = [record[quantity] for quantity in _QUANTITIES]
        values = ["" if value is None else f"{value[arm]:.6g}" for value in values]
        yield [record["epoch"], record["step"], name, *values]


def _names(arms, model_name):
    """Returns a different name for each arm, given lists of variables."""
    names = []
    for arm in arms:
        paths = [v.path.removeprefix(f"{model_name}/").split("/") for v in arm]
        name = "/".join(os.path.commonprefix(paths) or paths[0])
        same = sum(re.sub(r" \(\d+\)$", "", other) == name for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names
