"""Records the way of the weights through a training, in few dimensions."""

import keras
import numpy as np
from keras import ops

from keras_slsam.analysis.sketch import Sketch
from keras_slsam.gradients import backend


class TrajectoryLogger(keras.callbacks.Callback):
    """Records the way of the weights, to draw it into a plane of the loss.

    Each record is a count sketch of the trainable weights: a random linear map to
    `dimensions` numbers. So the plane may be chosen after the training:
    `plane.project(logger)` returns the coordinates. A coordinate has a random error
    with a standard deviation of at most `sqrt(2 / dimensions)` of the distance from the
    plane's origin. With 4096 dimensions these are 2 percent.

    A record is made at the start of the training too, if the model is built then. A
    training that goes on with the same logger continues the records. To the start and
    the end of a way belong the full weights, `start`, and the weights of the trained
    model.

    Args:
        every: `"epoch"`, or int, the number of steps between two records.
        dimensions: int, the number of entries of a record.
        seed: int, for the random map.

    Attributes:
        start: List of arrays, the trainable weights at the start of the training.
        steps: List of int, the number of the step of each record.
        records: List of arrays of shape `(dimensions,)`.
        sketch: The map, a function from a list of arrays like `start` to a record.

    Raises:
        ValueError: if an argument is not allowed.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = keras.random.normal((64, 4)), keras.random.normal((64, 1))
    >>> logger = keras_slsam.callbacks.TrajectoryLogger(every=1)
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[logger])
    >>> logger.steps
    [0, 1, 2, 3, 4, 5, 6]
    >>> plane = keras_slsam.analysis.loss_plane(model, x, y, points=3)
    >>> plane.project(logger).shape
    (7, 2)

    Reference:
        Charikar et al., "Finding frequent items in data streams", ICALP 2002.
    """

    def __init__(self, *, every="epoch", dimensions=4096, seed=0):
        super().__init__()
        if every != "epoch" and not (type(every) is int and every >= 1):
            raise ValueError(
                'Argument `every` of `TrajectoryLogger` must be "epoch" or a number of '
                f"steps >= 1. Received: every={every!r}"
            )
        if not (type(dimensions) is int and dimensions >= 1):
            raise ValueError(
                "Argument `dimensions` of `TrajectoryLogger` must be an int >= 1. "
                f"Received: dimensions={dimensions!r}"
            )
        self.sketch = Sketch(dimensions, seed)
        self.start, self.steps, self.records = None, [], []
        self._every, self._step = every, 0

    def on_train_begin(self, logs=None):
        if self.start is None and self.model.built:
            self._record()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_start = self._step

    def on_train_batch_end(self, batch, logs=None):
        # Called once per execution, of `steps_per_execution` steps.
        before, self._step = self._step, self._epoch_start + batch + 1
        if self._every != "epoch" and self._step // self._every > before // self._every:
            self._record()

    def on_epoch_end(self, epoch, logs=None):
        if self._every == "epoch":
            self._record()

    def _record(self):
        backend.collect_state(self.model)
        # Copies, because on PyTorch an array shares the memory of the weight.
        weights = [
            np.array(ops.convert_to_numpy(v)) for v in self.model.trainable_variables
        ]
        if self.start is None:
            self.start = weights
        self.steps.append(self._step)
        self.records.append(self.sketch(weights))
