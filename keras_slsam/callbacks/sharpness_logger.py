"""Logs how much the loss rises by the perturbation."""

import keras
from keras import ops

from keras_slsam import arguments
from keras_slsam import training
from keras_slsam.analysis import checks
from keras_slsam.analysis.objective import Objective
from keras_slsam.analysis.sharpness import worst_case
from keras_slsam.callbacks.observing import Observing
from keras_slsam.observers import Observer


class SharpnessLogger(Observing):
    """Adds the sharpness to the logs: how much the loss rises within `rho`.

    A step with two passes computes the loss at `w + e` and at `w`. Their difference is
    an estimate of the sharpness that costs nothing. Its mean over the steps of an epoch
    that had an ascent is in the logs as `"sharpness"`: in the progress bar, in
    `History`, and for `EarlyStopping(mode="min")`. It belongs to the `rho` of each
    step, and to small batches in training mode. So compare it between epochs, not
    between methods. It is nan if no step of the epoch had an ascent.

    With `validation_data`, `"val_sharpness"` is measured at the end of an epoch by
    `keras_slsam.analysis.worst_case_sharpness`, on all of these data and with any
    optimizer. It costs `steps + 1` passes over the data, and may be compared.

    List this callback before those that read its logs. A logger belongs to one model.

    Args:
        validation_data: Tuple `(x, y)` or `(x, y, sample_weight)` of arrays, or `None`.
        rho: Float > 0, the radius for `"val_sharpness"`.
        steps: int, the number of steps of its ascent.
        adaptive: bool, whether its perturbation is scaled by the weights.
        batch_size: int, the number of rows per batch of its passes.

    Raises:
        ValueError: if an argument is out of its range, or, at the start of the
            training, if there is nothing to log: without `validation_data` the
            optimizer must take two passes on the whole batch.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> model.compile(keras_slsam.SAM("sgd"), "mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> logger = keras_slsam.callbacks.SharpnessLogger(validation_data=(x, y))
    >>> history = model.fit(x, y, verbose=0, callbacks=[logger])
    >>> sorted(history.history)
    ['loss', 'sharpness', 'val_sharpness']

    Reference:
        Foret et al., "Sharpness-aware minimization for efficiently improving
        generalization", arXiv 2010.01412, equation 1.
    """

    def __init__(
        self,
        validation_data: tuple | None = None,
        *,
        rho: float = 0.05,
        steps: int = 1,
        adaptive: bool = False,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        owner = "SharpnessLogger"
        self._measure = {
            "rho": checks.positive(owner, "rho", rho),
            "steps": checks.positive_int(owner, "steps", steps),
            "adaptive": adaptive,
        }
        self._data = None
        self._batch_size = checks.positive_int(owner, "batch_size", batch_size)
        if validation_data is not None:
            self._data = keras.utils.unpack_x_y_sample_weight(validation_data)

    def on_train_begin(self, logs=None):
        self._objective = None
        optimizer = self._optimizer
        if training.is_sharpness_aware(optimizer) and optimizer._two_passes:
            self._observe(_MeanGain, "sharpness")
        elif self._data is None:
            raise ValueError(
                "`SharpnessLogger` without `validation_data` needs an optimizer that "
                "takes two passes on the whole batch, such as `SAM` or `SLSAM`. "
                f"Received: optimizer={optimizer!r}. Pass `validation_data`, on which "
                "the sharpness is measured at the end of each epoch."
            )

    def on_epoch_end(self, epoch, logs=None):
        if self._data is None:
            return
        # One for all epochs, so that its functions are compiled once.
        if self._objective is None:
            self._objective = Objective(
                self.model, *self._data, batch_size=self._batch_size
            )
        with self._objective:
            logs["val_sharpness"] = worst_case(self._objective, **self._measure)


class _MeanGain(Observer):
    """The mean of the loss at w + e minus the loss at w, over steps with an ascent."""

    def build(self, num_arms):
        dtype = arguments.float_dtype()
        self.total = self.add_variable((), "zeros", dtype=dtype, name="total")
        self.rows = self.add_variable((), "zeros", dtype=dtype, name="rows")

    def update_state(self, reading):
        rows = ops.cast(reading.rows, self.rows.dtype)
        rows = ops.where(reading.ascends, rows, 0.0)
        gain = ops.cast(reading.gain, self.total.dtype)
        self.total.assign_add(ops.where(rows > 0, gain * rows, 0.0))
        self.rows.assign_add(rows)

    def result(self):
        if not self.variables:  # the model has no trainable weights
            return {}
        mean = ops.divide_no_nan(self.total, self.rows)
        return ops.where(self.rows > 0, mean, float("nan"))
