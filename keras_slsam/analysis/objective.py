"""The mean loss of a model over a whole data set, as a function of the weights.

Passes over the data are pure: they read the model's weights and its other state, and
assign to none of them. So nothing has to be restored if one of them raises.
"""

import contextlib
import warnings

import keras
import numpy as np
from keras import ops

from keras_slsam.gradients import backend
from keras_slsam.gradients.interface import NoSecondDerivative
from keras_slsam.loss import Loss

EXACT, CENTRAL_DIFFERENCES = "exact", "central differences"


class Objective:
    """The mean loss of a model over a data set, its gradient and its Hessian.

    At the start of each context it reads the model's weights. At the end it resets
    random generators outside of Keras, such as those that Dropout uses on PyTorch. What
    was compiled is kept for the next context.

    Args:
        model: `keras.Model`, built and compiled with a loss.
        x, y, sample_weight: The data, as for `model.evaluate`.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        training: bool, whether layers such as Dropout and BatchNormalization are in
            training mode. All passes then see the same dropout masks.
        normalize_logits: bool, whether the logits of each row are divided by their
            norm around their mean.
        verbose: 0 or 1, whether to show progress.

    Attributes:
        model: The model.
        variables: List of its trainable variables.
        weights: List of tensors, the values of `variables` at the start of the context.
        method: String, `"exact"` or `"central differences"`, how the latest product
            with the Hessian was computed.
    """

    def __init__(
        self,
        model,
        x,
        y=None,
        sample_weight=None,
        *,
        batch_size=32,
        training=False,
        normalize_logits=False,
        verbose=0,
    ):
        _check(model, batch_size)
        self.model, self.variables = model, model.trainable_variables
        self.method, self._reads_weights = EXACT, False
        self._batches = _batches(model, x, y, sample_weight, batch_size)
        self._options = {"training": training}
        if normalize_logits:
            _check_logits(model)
            self._options["outputs"] = _normalize
        self._verbose = verbose
        compiled = lambda function: backend.compile(function, model)  # noqa: E731
        self._value = compiled(lambda weights, batch: self._loss_of(batch)(weights)[0])
        self._gradients = compiled(
            lambda weights, batch: backend.differentiate(self._loss_of(batch), weights)
        )
        self._products = compiled(
            lambda weights, vectors, batch: backend.multiply_by_hessian(
                self._loss_of(batch), weights, vectors
            )
        )

    def __enter__(self):
        backend.collect_state(self.model)
        self.weights = [backend.read(v) for v in self.variables]
        self._generators = backend.generators(self.model)
        self._bar = keras.utils.Progbar(None, verbose=self._verbose, unit_name="batch")
        self._seen = 0
        return self

    def __exit__(self, *error):
        self._generators.rewind()
        self._bar.update(self._seen, finalize=True)

    def loss(self, weights):
        """Returns the loss at `weights`, a float."""
        (total,) = self._mean(lambda batch: [self._value(weights, batch)])
        return float(total)

    def loss_and_gradients(self, weights):
        """Returns the loss at `weights`, a float, and the list of its gradients."""

        def of_batch(batch):
            value, gradients = self._gradients(weights, batch)
            return [value, *gradients]

        value, *gradients = self._mean(of_batch)
        return float(value), gradients

    def product(self, vectors):
        """Returns the product of the Hessian at the model's weights and a vector.

        Args:
            vectors: List of tensors like the weights.

        Returns:
            List of tensors like the weights.
        """
        if not self._reads_weights:
            # Refuses layers that read weights where they cannot be replaced. On
            # PyTorch a product would be wrong without an error.
            self.loss_and_gradients(self.weights)
            self._reads_weights = True
        if self.method == EXACT:
            try:
                return self._mean(
                    lambda batch: self._products(self.weights, vectors, batch)
                )
            except NoSecondDerivative as error:
                self.method = CENTRAL_DIFFERENCES
                warnings.warn(
                    f"The loss of {self.model.name!r} has no second derivative: "
                    f"{error}. Its Hessian is computed by central differences of "
                    "gradients instead.",
                    stacklevel=2,
                )
        return self._central_differences(vectors)

    def _central_differences(self, vectors):
        # The error of rounding grows as 1 / step, that of the third derivative as the
        # square of the step.
        length = norm(vectors)
        if length == 0.0:
            return [ops.zeros_like(v) for v in vectors]
        dtype = keras.backend.standardize_dtype(self.weights[0].dtype)
        step = np.finfo("float64" if dtype == "float64" else "float32").eps ** (1 / 3)
        gradients = [
            self.loss_and_gradients(add(self.weights, vectors, sign * step / length))[1]
            for sign in (1, -1)
        ]
        return [(g - h) * (length / (2 * step)) for g, h in zip(*gradients)]

    def _loss_of(self, batch):
        return Loss(self.model, self.variables, *batch, **self._options)

    def _mean(self, function):
        """Returns the means over the rows of lists of tensors."""
        self._generators.rewind()
        rows, totals = 0, None
        for batch in self._batches():
            count = len(keras.tree.flatten(batch)[0])
            # The loss of several outputs creates variables. At the end of this scope,
            # outside of the compiled function, they get their values.
            with keras.StatelessScope():
                found = function(batch)
            parts = [part * count for part in found]
            totals = parts if totals is None else list(map(ops.add, totals, parts))
            rows += count
            self._seen += 1
            self._bar.update(self._seen)
        if totals is None:
            raise ValueError(
                "Argument `x` gave no batches. A generator can be read only once: pass "
                "arrays, a `tf.data.Dataset`, a `DataLoader` or a `PyDataset`. "
                "Received: an empty iteration."
            )
        return [total / rows for total in totals]


@contextlib.contextmanager
def restored_variables(model):
    """Context that yields the trainable weights, and restores them at its end.

    It also restores the metrics, and random generators outside of Keras.

    Args:
        model: `keras.Model`.

    Yields:
        List of arrays, the values of `model.trainable_variables`.
    """
    backend.collect_state(model)
    generators = backend.generators(model)
    weights = [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    metrics = [(v, ops.convert_to_numpy(v).copy()) for v in model.metrics_variables]
    try:
        yield weights
    finally:
        for variable, value in zip(model.trainable_variables, weights):
            variable.assign(value)
        model.reset_metrics()  # also those that were created since
        for variable, value in metrics:
            variable.assign(value)
        generators.rewind()


def add(weights, vectors, factor):
    """Returns `weights + factor * vectors`, lists of tensors."""
    return [w + ops.cast(factor, w.dtype) * v for w, v in zip(weights, vectors)]


def norm(vectors):
    """Returns the norm of a list of tensors, a float."""
    return float(sum(float(backend.squared_sum(v)) for v in vectors)) ** 0.5


def flatten(tensors):
    """Returns a list of tensors as one vector, a float64 array."""
    arrays = [np.ravel(ops.convert_to_numpy(t)) for t in tensors]
    return np.concatenate(arrays, dtype="float64")


def unflatten(vector, like):
    """Returns a vector as a list of tensors.

    Args:
        vector: Array of shape `(n,)`.
        like: List of tensors with the shapes and dtypes of the results.
    """
    ends = np.cumsum([int(np.prod(w.shape)) for w in like])
    return [
        ops.convert_to_tensor(part.reshape(w.shape), dtype=w.dtype)
        for part, w in zip(np.split(vector, ends[:-1]), like)
    ]


def _normalize(logits):
    """Divides logits by their norm around their mean over the classes.

    As in the code of Andriushchenko et al., arXiv 2302.07011. Crossentropy does not
    depend on the mean.
    """
    shape = getattr(logits, "shape", ())
    if len(shape) < 2 or shape[-1] < 3:
        raise ValueError(
            "`normalize_logits=True` needs one output with the logits of at least "
            "three classes: normalised logits of two are always the same. "
            f"Received: outputs={logits!r}"
        )
    centred = logits - ops.mean(logits, axis=-1, keepdims=True)
    return centred / ops.norm(centred, axis=-1, keepdims=True)


def _check(model, batch_size):
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            "Argument `model` must be a `keras.Model` that was compiled with a loss. "
            f"Received: model={model!r}. Call `model.compile(loss=...)` first."
        )
    if not model.built or not model.trainable_variables:
        raise ValueError(
            "Argument `model` must be built, and have trainable weights. "
            f"Received: model={model!r}. Call it on a batch first."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            "Argument `batch_size` must be a positive int. "
            f"Received: batch_size={batch_size!r}"
        )


def _check_logits(model):
    if not getattr(model.loss, "from_logits", False):
        raise ValueError(
            "`normalize_logits=True` needs a model whose outputs are logits, and a "
            "loss that knows it. Received: a model compiled with "
            f"loss={model.loss!r}. Compile it with a loss object that has "
            "`from_logits=True`, such as `SparseCategoricalCrossentropy`."
        )


def _batches(model, x, y, sample_weight, batch_size):
    """Returns a function that yields the batches of one pass, `(x, y, weights)`."""
    unpack = keras.utils.unpack_x_y_sample_weight
    # Tasks of KerasHub take raw data, and expect it preprocessed in `call`.
    prepare = getattr(model, "preprocess_samples", keras.utils.pack_x_y_sample_weight)
    arrays = (np.ndarray, dict, list, tuple)
    if y is None and not (ops.is_tensor(x) or isinstance(x, arrays)):
        if isinstance(x, keras.utils.PyDataset):
            batches = lambda: (x[i] for i in range(len(x)))  # noqa: E731
        else:
            batches = lambda: iter(x)  # noqa: E731

        def prepared():
            for batch in batches():
                yield _as_tensors(unpack(prepare(*unpack(batch))))

        return prepared
    data = unpack(prepare(x, y, sample_weight))
    data = keras.tree.map_structure(_as_array, data)
    arrays = [a for a in keras.tree.flatten(data) if a is not None]
    rows = {len(array) for array in arrays}
    if len(rows) != 1 or rows == {0}:
        raise ValueError(
            "Arguments `x`, `y` and `sample_weight` must have the same number of rows, "
            f"at least one. Received: arrays of shapes {[a.shape for a in arrays]}"
        )
    (count,) = rows

    def sliced():
        for start in range(0, count, batch_size):
            yield _as_tensors(
                keras.tree.map_structure(
                    lambda a, i=start: None if a is None else a[i : i + batch_size],
                    data,
                )
            )

    return sliced


def _as_array(value):
    if value is None:
        return None
    if ops.is_tensor(value):
        return ops.convert_to_numpy(value)
    value = np.asarray(value)
    # As in `fit`: data in float64 is computed in Keras' default float.
    return value.astype(keras.config.floatx()) if value.dtype == "float64" else value


def _as_tensors(batch):
    return keras.tree.map_structure(
        lambda v: None if v is None else ops.convert_to_tensor(_as_array(v)), batch
    )
