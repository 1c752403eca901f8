"""The loss along a line and in a plane of the weights."""

import dataclasses

import numpy as np
from keras import ops

from keras_slsam.analysis import checks
from keras_slsam.analysis.objective import Objective


@dataclasses.dataclass(frozen=True)
class Line:
    """The loss along a line.

    Attributes:
        x: Array of shape `(n,)`, the place: 0 at the model's weights, 1 at the others.
        loss: Array of shape `(n,)`.

    Example:

    >>> import numpy as np
    >>> from keras_slsam import analysis
    >>> line = analysis.Line(np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.9, 0.3]))
    >>> barrier = line.loss.max() - max(line.loss[0], line.loss[-1])
    """

    x: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plane:
    """The loss in a plane: at `origin + x * directions[0] + y * directions[1]`.

    Attributes:
        x: Array of shape `(n,)`.
        y: Array of shape `(n,)`.
        loss: Array of shape `(n, n)`. The rows belong to `y`, the columns to `x`.
        origin: List of arrays, the model's weights.
        directions: Tuple of two lists of arrays.
        anchors: Array of shape `(k, 2)`, the coordinates of the origin and of the
            weights through which the plane was laid.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> plane = keras_slsam.analysis.loss_plane(model, x, y, points=3)
    >>> plane.project([plane.origin])
    array([[0., 0.]])
    """

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    origin: list
    directions: tuple
    anchors: np.ndarray

    def project(self, trajectory):
        """Projects weights to the plane, at right angles.

        Args:
            trajectory: List of lists of arrays, each the trainable weights at one time,
                or a `TrajectoryLogger`. The coordinates of the latter have a random
                error, whose standard deviation is at most `sqrt(2 / dimensions)` of
                the distance from the origin.

        Returns:
            Array of shape `(n, 2)`, the coordinates.
        """
        sketch = getattr(trajectory, "sketch", None)
        if sketch is None:
            sketch, records = _flat, [_flat(weights) for weights in trajectory]
        else:
            records = trajectory.records
        origin = sketch(self.origin)
        axes = np.array([sketch(direction) for direction in self.directions])
        # The directions need neither have length 1 nor be orthogonal.
        exact = np.array([_flat(direction) for direction in self.directions])
        gram = exact @ exact.T
        products = [axes @ (record - origin) for record in records]
        return np.linalg.solve(gram, np.array(products).T).T


def loss_along_line(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    other_weights,
    points=21,
    span=(0.0, 1.0),
    normalize_logits=False,
    training=False,
    batch_size=32,
    verbose=0,
):
    """Computes the loss on the line from the model's weights to others.

    Two minima that are connected by a valley have no barrier on the line.

    The other weights, such as the statistics of BatchNormalization, are the model's
    own on the whole line. The cost is one loss of the whole data set per point.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays, or batches: a `tf.data.Dataset`, a PyTorch `DataLoader` or a
            `keras.utils.PyDataset`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        other_weights: List of arrays or variables, such as the `trainable_variables` of
            another model of this architecture.
        points: int >= 2, the number of points.
        span: Tuple of two floats, the first and the last place on the line: 0 is at the
            model's weights, 1 at the others.
        normalize_logits: bool, see `worst_case_sharpness`.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        `Line`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> zeros = [0 * w for w in model.get_weights()]
    >>> line = keras_slsam.analysis.loss_along_line(
    ...     model, x, y, other_weights=zeros, points=3
    ... )
    >>> line.x
    array([0. , 0.5, 1. ])

    Reference:
        Goodfellow et al., arXiv 1412.6544.
    """
    owner = "loss_along_line"
    checks.positive_int(owner, "points", points, least=2)
    try:
        first, last = map(float, span)
    except (TypeError, ValueError):
        first = last = np.nan
    if not 0 < abs(last - first) < np.inf:
        raise ValueError(
            f"Argument `span` of `{owner}` must be two different finite numbers, the "
            f"first and the last place on the line. Received: span={span!r}"
        )
    with Objective(
        model,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        training=training,
        normalize_logits=normalize_logits,
        verbose=verbose,
    ) as objective:
        origin = _arrays(objective.weights)
        other = _like(owner, "other_weights", other_weights, origin)
        direction = [one - zero for one, zero in zip(other, origin)]
        places = np.linspace(first, last, points)
        losses = [objective.loss(_at(origin, [(t, direction)])) for t in places]
    return Line(places, np.array(losses))


def loss_plane(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    through=None,
    span=None,
    points=21,
    normalize_logits=False,
    training=False,
    seed=0,
    batch_size=32,
    verbose=0,
):
    """Computes the loss in a plane through the model's weights.

    By default the plane has two random directions. They are filter-normalised: each
    output filter of a kernel, and each output column of a matrix, has the norm of the
    model's own. Biases and other vectors, such as those of normalisation layers, do not
    change. So planes of models with weights of different sizes may be compared.

    With `through`, the plane goes through the model's weights and two others, such as
    the start of the training and another model, and its coordinates are distances: the
    first direction leads to the first of them.

    The cost is `points^2` losses of the whole data set.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays or batches, see `loss_along_line`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        through: Tuple of two lists of arrays or variables, like
            `model.trainable_variables`, or `None` for random directions.
        span: Float > 0. With random directions both coordinates go from `-span` to
            `span`, by default 1. With `through` it is the margin around the three
            points, as a share of their extent, by default 0.25.
        points: int >= 2, the number of points in each direction.
        normalize_logits: bool, see `worst_case_sharpness`.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        seed: int. The same seed draws the same directions on every backend.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        `Plane`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> plane = keras_slsam.analysis.loss_plane(model, x, y, points=5)
    >>> plane.loss.shape
    (5, 5)

    Reference:
        Li et al., arXiv 1712.09913 (filter normalisation); Garipov et al., arXiv
        1802.10026 (planes through three points).
    """
    owner = "loss_plane"
    checks.positive_int(owner, "points", points, least=2)
    if span is not None:
        checks.positive(owner, "span", span)
    with Objective(
        model,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        training=training,
        normalize_logits=normalize_logits,
        verbose=verbose,
    ) as objective:
        origin = _arrays(objective.weights)
        if through is None:
            rng = np.random.default_rng(seed)
            directions = _random(rng, origin), _random(rng, origin)
            anchors = np.zeros((1, 2))
            low, high = np.full((2, 2), 1.0 if span is None else span) * [[-1], [1]]
        else:
            directions, anchors = _through(owner, through, origin)
            # A square around the points.
            middle = (anchors.min(axis=0) + anchors.max(axis=0)) / 2
            half = (0.5 + (0.25 if span is None else span)) * np.ptp(anchors, axis=0)
            low, high = middle - half.max(), middle + half.max()
        columns, rows = np.linspace(low, high, points).T
        losses = [
            [
                objective.loss(_at(origin, [(a, directions[0]), (b, directions[1])]))
                for a in columns
            ]
            for b in rows
        ]
    return Plane(columns, rows, np.array(losses), origin, directions, anchors)


def _random(rng, weights):
    """Returns a random direction, filter-normalised."""
    direction = []
    for weight in weights:
        noise = rng.normal(size=weight.shape)
        if weight.ndim < 2:
            noise = np.zeros(weight.shape)
        # The last axis of a kernel has the output filters.
        axes = tuple(range(weight.ndim - 1))
        norms = [
            np.sqrt(np.sum(np.square(a, dtype="float64"), axis=axes, keepdims=True))
            for a in (weight, noise)
        ]
        direction.append(noise * norms[0] / (norms[1] + 1e-12))
    return direction


def _through(owner, others, origin):
    """Returns orthonormal directions to two other weights, and all coordinates."""
    if len(others) != 2:
        raise ValueError(
            f"Argument `through` of `{owner}` must be a tuple of two lists of weights. "
            f"Received: {len(others)} of them"
        )
    first, second = (
        [one - zero for one, zero in zip(_like(owner, "through", w, origin), origin)]
        for w in others
    )
    length = np.linalg.norm(_flat(first))
    along = _flat(first) @ _flat(second) / length if length else 0.0
    across = [b - a * (along / (length or 1.0)) for a, b in zip(first, second)]
    height = np.linalg.norm(_flat(across))
    if min(length, height) <= 1e-6 * max(np.linalg.norm(_flat(origin)), length):
        raise ValueError(
            f"Argument `through` of `{owner}` must hold two weights that do not lie on "
            "one line with the model's own. Received: weights at the distance "
            f"{length:g} from the model, and {height:g} from the line"
        )
    directions = [a / length for a in first], [c / height for c in across]
    return directions, np.array([[0.0, 0.0], [length, 0.0], [along, height]])


def _at(origin, moves):
    """Returns `origin + sum of t * direction`, as tensors."""
    weights = []
    for i, weight in enumerate(origin):
        moved = weight + sum(t * direction[i] for t, direction in moves)
        weights.append(ops.convert_to_tensor(moved.astype(weight.dtype)))
    return weights


def _arrays(tensors):
    return [np.array(ops.convert_to_numpy(t)) for t in tensors]


def _flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays], dtype="float64")


def _like(owner, name, weights, origin):
    """Returns other weights as float64 arrays, which must have the model's shapes."""
    arrays = _arrays(weights)
    shapes, expected = [[a.shape for a in some] for some in (arrays, origin)]
    if shapes != expected:
        raise ValueError(
            f"Argument `{name}` of `{owner}` must hold arrays with the shapes of "
            f"`model.trainable_variables`, {expected}. Received: {shapes}"
        )
    return [a.astype("float64") for a in arrays]
