"""The spectrum of the Hessian, from products with vectors only.

Eigenvalues are computed by SciPy's Lanczos method. Trace and density are means over
random vectors (Hutchinson; stochastic Lanczos quadrature).
"""

import dataclasses

import numpy as np
from keras import ops

from keras_slsam.analysis import checks
from keras_slsam.analysis.estimate import Estimate
from keras_slsam.analysis.objective import Objective
from keras_slsam.analysis.objective import flatten
from keras_slsam.analysis.objective import unflatten


@dataclasses.dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of a Hessian.

    Attributes:
        values: Array of shape `(k,)`, in descending order.
        method: `"exact"`, or `"central differences"` if an operation of the model has
            no second derivative.

    Example:

    >>> import numpy as np
    >>> from keras_slsam import analysis
    >>> found = analysis.Eigenvalues(np.array([3.0, 1.0]), "exact")
    >>> sharpest = found.values[0]
    """

    values: np.ndarray
    method: str


@dataclasses.dataclass(frozen=True)
class Trace(Estimate):
    """An estimate of the trace of a Hessian, the sum of its eigenvalues.

    Attributes:
        mean: Float.
        error: Float, the standard error of the mean, nan for one sample.
        samples: int, the number of random vectors.
        method: As for `Eigenvalues`.

    Example:

    >>> from keras_slsam import analysis
    >>> analysis.Trace.of([1.0, 2.0, 3.0], method="exact").mean
    2.0
    """

    method: str


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """The density of the eigenvalues of a Hessian.

    It is a sum of Gaussians of a small width, at nodes with weights.

    Attributes:
        grid: Array of shape `(n,)`, eigenvalues in ascending order.
        density: Array of shape `(n,)`, the share of all eigenvalues per unit. Its
            integral is 1.
        nodes: Array of shape `(samples, steps)`, the nodes of each random vector.
        weights: Array like `nodes`. The weights of each vector have the sum 1.
        method: As for `Eigenvalues`.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> found = keras_slsam.analysis.spectral_density(model, x, y, steps=2)
    >>> found.grid.shape == found.density.shape
    True
    """

    grid: np.ndarray
    density: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    method: str


def hessian_eigenvalues(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    k=5,
    which="LA",
    arms=None,
    tol=1e-4,
    training=False,
    seed=0,
    batch_size=32,
    verbose=0,
):
    """Computes eigenvalues of the Hessian of the loss over a whole data set.

    The largest one is the curvature in the steepest direction. The cost is some dozens
    of products with the Hessian, each about two gradients of the whole data set, and
    memory for about 25 vectors of the size of the weights in float64.

    Where an operation has no second derivative, the products are central differences of
    gradients. This is said by a warning, and in the result. On TensorFlow this holds
    for models with LayerNormalization.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays, or batches: a `tf.data.Dataset`, a PyTorch `DataLoader` or a
            `keras.utils.PyDataset`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        k: int, the number of eigenvalues.
        which: `"LA"` for the largest, `"SA"` for the smallest.
        arms: List of arms, each a list of trainable variables, such as
            `optimizer.arms`. The Hessian of an arm is the diagonal block of its
            variables. By default the Hessian of all trainable variables is used.
        tol: Float > 0, the accuracy at which the method stops, relative to the largest
            absolute value.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        seed: int, for the first vector of the method.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        `Eigenvalues`, or with `arms` a list of them, one per arm. They have fewer than
        `k` values if there are fewer weights.

    Raises:
        ValueError: if an argument is out of its range.
        ImportError: if SciPy is not installed.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> found = keras_slsam.analysis.hessian_eigenvalues(model, x, y, k=2)
    >>> found.values.shape, found.method
    ((2,), 'exact')
    """
    owner = "hessian_eigenvalues"
    checks.positive_int(owner, "k", k)
    checks.positive(owner, "tol", tol)
    if which not in ("LA", "SA"):
        raise ValueError(
            f"Argument `which` of `{owner}` must be 'LA', the largest, or 'SA', the "
            f"smallest. Received: which={which!r}"
        )
    with Objective(
        model,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        training=training,
        verbose=verbose,
    ) as objective:
        found = [
            _eigenvalues(_Block(objective, indices), k, which, tol, seed)
            for indices in _indices(owner, objective.variables, arms)
        ]
        method = objective.method
    found = [Eigenvalues(values, method) for values in found]
    return found[0] if arms is None else found


def hessian_trace(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    samples=10,
    training=False,
    seed=0,
    batch_size=32,
    verbose=0,
):
    """Estimates the trace of the Hessian of the loss over a whole data set.

    It is the mean of `v . H v` over random vectors v of signs. The cost is one product
    with the Hessian per sample, about two gradients of the whole data set.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays or batches, see `hessian_eigenvalues`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        samples: int, the number of random vectors.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        seed: int. The same seed draws the same vectors on every backend.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        `Trace`, with its standard error over the vectors.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> keras_slsam.analysis.hessian_trace(model, x, y, samples=4).samples
    4

    Reference:
        Hutchinson, Communications in Statistics 19, 1990.
    """
    checks.positive_int("hessian_trace", "samples", samples)
    rng = np.random.default_rng(seed)
    with Objective(
        model,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        training=training,
        verbose=verbose,
    ) as objective:
        hessian = _Block(objective, range(len(objective.variables)))
        vectors = (rng.choice([-1.0, 1.0], hessian.size) for _ in range(samples))
        found = [float(v @ hessian(v)) for v in vectors]
    return Trace.of(found, method=objective.method)


def spectral_density(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    steps=30,
    samples=3,
    points=500,
    width=0.01,
    training=False,
    seed=0,
    batch_size=32,
    verbose=0,
):
    """Estimates the density of the eigenvalues of the Hessian.

    For each random vector, the Lanczos method gives a small tridiagonal matrix. Its
    eigenvalues are the nodes of a quadrature, and the squares of the first entries of
    its eigenvectors are the weights.

    The cost is `samples * steps` products with the Hessian, each about two gradients of
    the whole data set, and memory for `steps` vectors of the size of the weights.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays or batches, see `hessian_eigenvalues`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        steps: int, the number of nodes per vector, at most the number of weights.
        samples: int, the number of random vectors.
        points: int >= 2, the number of points of the grid.
        width: Float > 0, the standard deviation of the Gaussians, as a share of the
            range of the nodes.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        seed: int. The same seed draws the same vectors on every backend.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        `SpectralDensity`.

    Raises:
        ValueError: if an argument is out of its range.
        ImportError: if SciPy is not installed.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> found = keras_slsam.analysis.spectral_density(model, x, y, steps=3)
    >>> found.nodes.shape
    (3, 3)

    Reference:
        Ghorbani et al., arXiv 1901.10159, section 2.
    """
    owner = "spectral_density"
    checks.positive_int(owner, "steps", steps)
    checks.positive_int(owner, "samples", samples)
    checks.positive_int(owner, "points", points, least=2)
    checks.positive(owner, "width", width)
    linalg = checks.need("scipy.linalg")
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    with Objective(
        model,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        training=training,
        verbose=verbose,
    ) as objective:
        hessian = _Block(objective, range(len(objective.variables)))
        steps = min(steps, hessian.size)
        for _ in range(samples):
            start = rng.choice([-1.0, 1.0], hessian.size)
            values, vectors = linalg.eigh_tridiagonal(*_lanczos(hessian, start, steps))
            # The method stops early in an invariant space. Nodes without weight follow.
            more = steps - len(values)
            nodes.append(np.pad(values, (0, more), "edge"))
            weights.append(np.pad(vectors[0] ** 2, (0, more)))
    nodes, weights = np.array(nodes), np.array(weights)
    low, high = nodes.min(), nodes.max()
    deviation = width * ((high - low) or abs(high) or 1.0)
    grid = np.linspace(low - 5 * deviation, high + 5 * deviation, points)
    distances = (grid[:, None] - nodes.ravel()) / deviation
    gaussians = np.exp(-(distances**2) / 2) / (deviation * np.sqrt(2 * np.pi))
    density = gaussians @ weights.ravel() / samples
    return SpectralDensity(grid, density, nodes, weights, objective.method)


class _Block:
    """A diagonal block of the Hessian, as a function from a vector to the product."""

    def __init__(self, objective, indices):
        self._objective, self._indices = objective, list(indices)
        self._like = [objective.weights[i] for i in self._indices]
        self._zeros = [ops.zeros_like(w) for w in objective.weights]
        self.size = sum(int(np.prod(w.shape)) for w in self._like)

    def __call__(self, vector):
        vectors = list(self._zeros)
        for i, part in zip(self._indices, unflatten(vector.ravel(), self._like)):
            vectors[i] = part
        product = self._objective.product(vectors)
        return flatten([product[i] for i in self._indices])


def _eigenvalues(hessian, k, which, tol, seed):
    linalg = checks.need("scipy.sparse.linalg")
    size = hessian.size
    if k >= size:  # more than ARPACK can find
        matrix = np.array([hessian(row) for row in np.eye(size)])
        values = checks.need("scipy.linalg").eigvalsh((matrix + matrix.T) / 2)
        return values[::-1]
    start = np.random.default_rng(seed).normal(size=size)
    largest, vector = 0.0, start
    for _ in range(3):
        vector = hessian(vector / np.linalg.norm(vector))
        largest = np.linalg.norm(vector)
        if largest == 0.0:  # the loss does not depend on these weights
            return np.zeros(k)
    # ARPACK's tolerance is relative to each value, so it would not end at those that
    # are zero up to rounding. It sees them shifted.
    shift = largest if which == "LA" else -largest

    def shifted(vector):
        product = hessian(vector)
        product += shift * vector.ravel()
        return product

    operator = linalg.LinearOperator((size, size), matvec=shifted, dtype="float64")
    values = linalg.eigsh(
        operator, k, which=which, v0=start, tol=tol, return_eigenvectors=False
    )
    return np.sort(values)[::-1] - shift


def _lanczos(hessian, start, steps):
    """Returns the diagonals of the tridiagonal matrix of the Lanczos method.

    Rounding costs the vectors their orthogonality, so each is made orthogonal to all
    before it, twice.

    Args:
        hessian: `_Block`.
        start: Array of shape `(n,)`, the first vector, of any length.
        steps: int, the size of the matrix, at most n.
    """
    basis = np.zeros((steps, len(start)), "float32")
    diagonal, beside = [], []
    vector = start / np.linalg.norm(start)
    for step in range(steps):
        basis[step] = vector
        product = hessian(vector)
        diagonal.append(vector @ product)
        for before in [*basis[: step + 1]] * 2:
            product -= (before @ product) * before
        length = np.linalg.norm(product)
        if step + 1 == steps or length <= 1e-6 * np.abs(diagonal).max():
            break
        beside.append(length)
        vector = product / length
    return np.array(diagonal), np.array(beside)


def _indices(owner, variables, arms):
    """Returns the indices of the variables of each arm, or of all variables."""
    if arms is None:
        return [range(len(variables))]
    index = {id(v): i for i, v in enumerate(variables)}
    try:
        found = [[index[id(v)] for v in arm] for arm in arms]
    except (KeyError, TypeError):
        found = []
    if not found or not all(found):
        raise ValueError(
            f"Argument `arms` of `{owner}` must be a list of lists of trainable "
            "variables of the model, such as `optimizer.arms`. "
            f"Received: arms={arms!r}"
        )
    return found
