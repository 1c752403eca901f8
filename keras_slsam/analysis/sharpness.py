"""Sharpness: how much the loss rises in a neighbourhood of the weights.

    max over ||e|| <= rho of  L(w + e) - L(w)             worst case
    mean over e ~ N(0, sigma^2) of  L(w + e) - L(w)       average case

An adaptive neighbourhood measures e relative to the weights, `||e / |w| ||`. It does
not change if a layer is scaled up and the next one down by the same factor.
"""

import numpy as np
from keras import ops

from keras_slsam.analysis import checks
from keras_slsam.analysis.estimate import Estimate
from keras_slsam.analysis.objective import Objective
from keras_slsam.analysis.objective import norm
from keras_slsam.analysis.objective import restored_variables


def worst_case_sharpness(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    rho=0.05,
    steps=1,
    adaptive=False,
    normalize_logits=False,
    training=False,
    batch_size=32,
    verbose=0,
):
    """Computes the highest rise of the loss within a radius, as found by an ascent.

    With `steps=1` this is the rise in SAM's direction, over the whole data set:
    `e = rho * g / ||g||`. More steps of length `2 * rho / (steps + 1)` follow the
    normalised gradient, and are projected to the ball. The result is a lower bound of
    the maximum, because an ascent may end at a local one. Compare only models of one
    architecture, with the same data and settings.

    The cost is `steps + 1` gradients of the whole data set.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays, or batches: a `tf.data.Dataset`, a PyTorch `DataLoader` or a
            `keras.utils.PyDataset`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        rho: Float > 0, the radius: the norm of e, or with `adaptive` that of `e / |w|`.
        steps: int, the number of ascent steps.
        adaptive: bool, whether the radius is relative to the weights.
        normalize_logits: bool, whether the logits of each row are divided by their
            norm around their mean over the classes. The result then does not depend on
            the scale of the logits, by which a model can lower its loss without a
            change of its predictions. Needs at least three classes.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        Float, `L(w + e) - L(w)`, the highest of the ascent's iterates, and 0 if none is
        higher than `L(w)`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> sharpness = keras_slsam.analysis.worst_case_sharpness(model, x, y, rho=0.1)
    >>> sharpness > 0
    True

    Reference:
        Foret et al., arXiv 2010.01412, equation 1; Kwon et al., arXiv 2102.11600
        (adaptive); Andriushchenko et al., arXiv 2302.07011 (normalised logits).
    """
    owner = "worst_case_sharpness"
    checks.positive(owner, "rho", rho)
    checks.positive_int(owner, "steps", steps)
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
        return worst_case(objective, rho=rho, steps=steps, adaptive=adaptive)


def worst_case(objective, *, rho, steps, adaptive):
    """Returns what `worst_case_sharpness` returns, of an `Objective` in its context."""
    # e = scale * s, where s is in the ball of radius rho.
    scales = _scales(objective.weights, adaptive)
    s = [ops.zeros_like(w) for w in objective.weights]
    weights, found = objective.weights, []
    for _ in range(steps):
        loss, gradients = objective.loss_and_gradients(weights)
        found.append(loss)
        ascent = [c * g for c, g in zip(scales, gradients)]
        factor = _ratio(2 * rho / (steps + 1), norm(ascent))
        s = [v + factor * a for v, a in zip(s, ascent)]
        factor = min(1.0, _ratio(rho, norm(s)))
        s = [factor * v for v in s]
        weights = _moved(objective.weights, scales, s)
    found.append(objective.loss(weights))
    return float(np.max(found)) - found[0]  # nan if one of them is


def average_case_sharpness(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    sigma=0.01,
    samples=10,
    adaptive=False,
    normalize_logits=False,
    training=False,
    seed=0,
    batch_size=32,
    verbose=0,
):
    """Estimates the mean rise of the loss under Gaussian noise on the weights.

    For a small `sigma` it is `sigma^2 / 2` times the trace of the Hessian, so it sees
    all directions, where the worst case sees the steepest one.

    The cost is `samples + 1` losses of the whole data set.

    Args:
        model: `keras.Model`, built and compiled with a loss. It does not change.
        x: Arrays or batches, see `worst_case_sharpness`.
        y: Arrays of targets, `None` if `x` consists of batches.
        sample_weight: Array of weights of the rows, or `None`.
        sigma: Float > 0, the standard deviation of the noise on each weight, or with
            `adaptive` its ratio to the weight's absolute value.
        samples: int, the number of draws of the noise.
        adaptive: bool, whether the noise is relative to the weights.
        normalize_logits: bool, see `worst_case_sharpness`.
        training: bool, whether Dropout and BatchNormalization are in training mode.
        seed: int. The same seed draws the same noise on every backend.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        `Estimate` of the mean of `L(w + e) - L(w)`, with its standard error over the
        draws.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> found = keras_slsam.analysis.average_case_sharpness(model, x, y, sigma=0.1)
    >>> found.samples
    10

    Reference:
        Andriushchenko et al., arXiv 2302.07011, section 2.
    """
    owner = "average_case_sharpness"
    checks.positive(owner, "sigma", sigma)
    checks.positive_int(owner, "samples", samples)
    rng = np.random.default_rng(seed)
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
        scales = _scales(objective.weights, adaptive)
        base, found = objective.loss(objective.weights), []
        for _ in range(samples):
            noise = [
                ops.convert_to_tensor(sigma * rng.normal(size=w.shape), dtype=w.dtype)
                for w in objective.weights
            ]
            weights = _moved(objective.weights, scales, noise)
            found.append(objective.loss(weights) - base)
    return Estimate.of(found)


def accuracy_under_noise(
    model,
    x,
    y=None,
    *,
    levels=(0.05, 0.1, 0.15, 0.2, 0.3),
    samples=3,
    metric="accuracy",
    seed=0,
    batch_size=32,
    verbose=0,
):
    """Evaluates a model with Gaussian noise on its matrices and kernels.

    The noise of a level has that ratio of its standard deviation to the one of the
    matrix. Biases and other vectors keep their values. The draws are the same for all
    levels, backends and models of one architecture. Weights and metrics are restored,
    whatever happens.

    The cost is `samples` evaluations per level.

    Args:
        model: `keras.Model`, built and compiled with the metric.
        x: Arrays or batches, as for `model.evaluate`.
        y: Arrays of targets, `None` if `x` consists of batches.
        levels: Sequence of floats >= 0.
        samples: int, the number of draws per level.
        metric: String, the name of the metric in what `model.evaluate` returns.
        seed: int.
        batch_size: int, the rows of a batch. Ignored if `x` consists of batches.
        verbose: 0 or 1, whether to show progress.

    Returns:
        Dict from each level to an `Estimate` of the metric.

    Raises:
        ValueError: if an argument is out of its range, or if the model has no such
            metric.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse", metrics=["mae"])
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> noisy = keras_slsam.analysis.accuracy_under_noise
    >>> sorted(noisy(model, x, y, levels=[0.0, 0.5], metric="mae"))
    [0.0, 0.5]
    """
    owner = "accuracy_under_noise"
    levels = [float(level) for level in levels]
    if not levels or not all(level >= 0 for level in levels):
        raise ValueError(
            f"Argument `levels` of `{owner}` must be numbers >= 0, at least one. "
            f"Received: levels={levels}"
        )
    checks.positive_int(owner, "samples", samples)
    result = {}
    batches = {} if y is None else {"batch_size": batch_size}
    with restored_variables(model) as before:
        for level in levels:
            rng = np.random.default_rng(seed)
            scores = []
            for _ in range(samples):
                for variable, value in zip(model.trainable_variables, before):
                    if value.ndim > 1:
                        noise = level * value.std() * rng.normal(size=value.shape)
                        variable.assign((value + noise).astype(value.dtype))
                logs = model.evaluate(
                    x, y, verbose=verbose, return_dict=True, **batches
                )
                if metric not in logs:
                    raise ValueError(
                        f"Argument `metric` of `{owner}` must be one of "
                        f"{sorted(logs)}. Received: metric={metric!r}. Compile the "
                        "model with `metrics=[...]`."
                    )
                scores.append(logs[metric])
            result[level] = Estimate.of(scores)
    return result


def _scales(weights, adaptive):
    """Returns what a perturbation is relative to: |w|, or 1."""
    return [ops.abs(w) if adaptive else ops.ones_like(w) for w in weights]


def _moved(weights, scales, s):
    return [w + c * v for w, c, v in zip(weights, scales, s)]


def _ratio(one, other):
    return one / other if other else 0.0
