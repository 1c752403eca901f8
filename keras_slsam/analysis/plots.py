"""Plots of what the measures and the callbacks found.

Each function draws into the given axes, or into those of a new figure, and returns the
axes: `axes.figure.savefig("picture.svg")` writes the picture. They need the extra
`pip install keras-slsam[analysis]`.
"""

import numpy as np

from keras_slsam.analysis import checks
from keras_slsam.analysis.colors import BLACK
from keras_slsam.analysis.colors import BLUE
from keras_slsam.analysis.colors import VERMILLION
from keras_slsam.analysis.colors import color_of

__all__ = [
    "arm_choice",
    "color_of",
    "landscape",
    "probabilities",
    "sharpness_and_accuracy",
    "spectrum",
]

# At a page's width, 6.5 inches, all text is at least as large as in a footnote.
_WIDTH = 6.5
_SMALL = 8
_MOST_NAMES = 40
# From dark to light for every kind of colour blindness, and in print.
_MAP = "cividis"
_MARKERS = "osD^vP*X"


def arm_choice(logger, *, ax=None):
    """Draws which arms were active over time, as a heat map.

    Args:
        logger: `keras_slsam.callbacks.ArmLogger` with at least one record.
        ax: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes. A row is an arm, the first one at the top. A column is a record. The
        colour is the share of the steps in which the arm was active.

    Raises:
        ValueError: if the logger has no records.
        ImportError: if matplotlib is not installed.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="top")])
    >>> model = keras_slsam.sharpness_aware(model)
    >>> model.compile(keras_slsam.SLSAM("adamw", active_fraction=0.5, seed=0), "mse")
    >>> x, y = keras.random.normal((64, 4)), keras.random.normal((64, 1))
    >>> logger = keras_slsam.callbacks.ArmLogger()
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[logger])
    >>> axes = keras_slsam.analysis.plots.arm_choice(logger)
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['top/kernel', 'top/bias']
    """
    return _heat_map(
        "arm_choice", logger, "active", "share of steps in which it was active", ax
    )


def probabilities(logger, *, ax=None):
    """Draws the probabilities of the arms over time, as a heat map.

    Args:
        logger: `keras_slsam.callbacks.ArmLogger` with at least one record, of a sampler
            that has probabilities.
        ax: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes. A row is an arm, the first one at the top. A column is a record. The
        colour is the probability that the arm is active in the next draw.

    Raises:
        ValueError: if the logger has no records, or these have no probabilities.
        ImportError: if matplotlib is not installed.

    Example:

    >>> import types
    >>> import keras_slsam
    >>> logger = types.SimpleNamespace(names=["one", "two"])
    >>> logger.records = [{"step": 8, "probability": [0.2, 0.9]}]
    >>> axes = keras_slsam.analysis.plots.probabilities(logger)
    >>> axes.get_xlabel()
    'step'
    """
    return _heat_map(
        "probabilities", logger, "probability", "probability in the next draw", ax
    )


def landscape(plane, trajectory=None, *, kind="contour", levels=25, ax=None):
    """Draws the loss in a plane, and the way of a training in it.

    Args:
        plane: `keras_slsam.analysis.Plane`.
        trajectory: `keras_slsam.callbacks.TrajectoryLogger`, or a list of lists of
            arrays, what `plane.project` takes. Or `None`.
        kind: `"contour"` or `"surface"`.
        levels: int, the number of contours.
        ax: `matplotlib.axes.Axes`, or `None` for new ones. For a surface they must be
            three-dimensional, `figure.add_subplot(projection="3d")`.

    Returns:
        The axes. A circle is the model, squares are the other weights through which the
        plane was laid, and the line is the training, with a dot per record. Losses
        above the 95th percentile are drawn as this one.

    Raises:
        ValueError: if an argument is not allowed.
        ImportError: if matplotlib is not installed.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> plane = keras_slsam.analysis.loss_plane(model, x, y, points=5)
    >>> axes = keras_slsam.analysis.plots.landscape(plane)
    >>> axes.get_xlabel()
    'x, 1 = norm of each filter'
    """
    if kind not in ("contour", "surface"):
        raise ValueError(
            "Argument `kind` of `landscape` must be 'contour' or 'surface'. "
            f"Received: kind={kind!r}"
        )
    if kind == "surface" and ax is not None and not hasattr(ax, "plot_surface"):
        raise ValueError(
            "With kind='surface', argument `ax` of `landscape` must be "
            "three-dimensional axes, `figure.add_subplot(projection='3d')`. "
            f"Received: ax={ax!r}"
        )
    distances = len(plane.anchors) > 1
    unit = "distance of weights" if distances else "1 = norm of each filter"
    labels = {f"{k}label": f"{k}, {unit}" for k in ("x", "y")}
    way = np.zeros((0, 2)) if trajectory is None else plane.project(trajectory)
    # Losses far above the others would leave one colour for all others.
    top = np.quantile(plane.loss, 0.95)
    loss = np.minimum(plane.loss, top)
    if kind == "contour":
        ax = _axes(ax, height=4.6)
        filled = ax.contourf(plane.x, plane.y, loss, levels, cmap=_MAP)
        ax.contour(
            plane.x, plane.y, loss, levels, colors="white", linewidths=0.3, alpha=0.6
        )
        ax.figure.colorbar(filled, ax=ax, label="loss")
        _draw_way(ax, way, ())
        _draw_anchors(ax, plane.anchors, ())
        ax.set(**labels)
        if distances:
            ax.set_aspect("equal")
    else:
        ax = _axes(ax, height=4.6, projection="3d")
        ax.plot_surface(
            *np.meshgrid(plane.x, plane.y), loss, cmap=_MAP, linewidth=0, alpha=0.85
        )
        _draw_way(ax, way, (_heights(plane, loss, way),))
        _draw_anchors(ax, plane.anchors, (_heights(plane, loss, plane.anchors),))
        ax.set(zlabel="loss", **labels)
    ax.legend(fontsize=_SMALL, loc="upper right")
    return ax


def spectrum(*found, labels=None, ax=None):
    """Draws the density of the eigenvalues of one or several Hessians.

    The density has a logarithmic scale: nearly all eigenvalues are close to 0, and the
    few large ones matter.

    Args:
        *found: `keras_slsam.analysis.SpectralDensity`, one or several.
        labels: List of strings, one per density, such as the methods, which then have
            their colours. Or `None`.
        ax: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ValueError: if the number of labels is not that of the densities.
        ImportError: if matplotlib is not installed.

    Example:

    >>> import keras, keras_slsam
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = keras.random.normal((8, 4)), keras.random.normal((8, 1))
    >>> density = keras_slsam.analysis.spectral_density(model, x, y, steps=3)
    >>> axes = keras_slsam.analysis.plots.spectrum(density, labels=["SAM"])
    >>> axes.get_xlabel()
    'eigenvalue of the Hessian'
    """
    if labels is not None and len(labels) != len(found):
        raise ValueError(
            "Argument `labels` of `spectrum` must have a string per density. "
            f"Received: labels={labels!r}, with {len(found)} densities"
        )
    ax = _axes(ax)
    # What lies below is far from any node.
    floor = min(density.density.max() for density in found) * 1e-6
    for density, label in zip(found, labels or [None] * len(found)):
        color = BLUE if label is None else color_of(label)
        shown = np.where(density.density > floor, density.density, np.nan)
        ax.semilogy(density.grid, shown, color=color, label=label)
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="density (share per unit)")
    ax.grid(alpha=0.3)
    if labels is not None:
        ax.legend(fontsize=_SMALL)
    return ax


def sharpness_and_accuracy(runs, *, measure, accuracy="accuracy", label=None, ax=None):
    """Draws accuracy against sharpness, with a point per run.

    If flat minima are better, the points fall from left to right.

    Args:
        runs: List of dicts with the key `"method"`, and with the numbers to draw. Runs
            of one method have one colour and one marker.
        measure: String, the key of the sharpness.
        accuracy: String, the key of the accuracy.
        label: String, the label of the axis of the sharpness, by default `measure`.
        ax: `matplotlib.axes.Axes`, or `None` for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    >>> import keras_slsam
    >>> runs = [
    ...     {"method": "AdamW", "worst case": 0.9, "accuracy": 0.81},
    ...     {"method": "SAM", "worst case": 0.4, "accuracy": 0.84},
    ... ]
    >>> axes = keras_slsam.analysis.plots.sharpness_and_accuracy(
    ...     runs, measure="worst case"
    ... )
    >>> axes.get_ylabel()
    'accuracy'
    """
    ax = _axes(ax)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for method, marker in zip(methods, _MARKERS * len(methods)):
        points = [
            (run[measure], run[accuracy]) for run in runs if run["method"] == method
        ]
        ax.scatter(
            *zip(*points), marker=marker, s=40, color=color_of(method), label=method
        )
    ax.set(xlabel=label or measure, ylabel=accuracy)
    ax.grid(alpha=0.3)
    # Beside the axes, where no point is.
    ax.legend(fontsize=_SMALL, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _heat_map(owner, logger, key, label, ax):
    """Draws a value of the records, with a row per arm and a column per record."""
    values = [record[key] for record in logger.records]
    if not values or any(value is None for value in values):
        raise ValueError(
            f"Argument `logger` of `{owner}` must have at least one record with "
            f"{key!r}. Received: {len(values)} records"
            + (" of a sampler without probabilities" if values else "")
        )
    names = logger.names
    ax = _axes(ax, height=max(2.0, min(0.9 + 0.18 * len(names), 8.0)))
    # A column reaches from the record before to its own step.
    steps = [record["step"] for record in logger.records]
    edges = [0, *steps] if steps[0] > 0 else range(len(steps) + 1)
    image = ax.pcolormesh(
        edges,
        np.arange(len(names) + 1) - 0.5,
        np.array(values).T,
        cmap=_MAP,
        rasterized=True,  # a vector picture would have lines between the cells
    )
    image.set_clim(0, 1)
    ax.invert_yaxis()
    # Every name where there is space, else some of them.
    every = -(-len(names) // _MOST_NAMES)
    shown = range(0, len(names), every)
    size = _SMALL if len(names) < 30 else 6
    ax.set_yticks(shown, [names[i] for i in shown], fontsize=size)
    ax.set(xlabel="step")
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def _draw_way(ax, way, heights):
    """Draws a trajectory, with a mark per record."""
    if len(way):
        ax.plot(*way.T, *heights, color="white", linewidth=3, zorder=4)
        ax.plot(
            *way.T,
            *heights,
            color=VERMILLION,
            linewidth=1.2,
            marker=".",
            markersize=4,
            zorder=5,
            label="training",
        )


def _draw_anchors(ax, anchors, heights):
    marks = [("o", "model", slice(0, 1)), ("s", "other weights", slice(1, None))]
    for marker, label, rows in marks:
        if len(anchors[rows]):
            ax.scatter(
                *anchors[rows].T,
                *(height[rows] for height in heights),
                marker=marker,
                s=36,
                color="white",
                edgecolor=BLACK,
                zorder=6,
                label=label,
            )


def _heights(plane, loss, places):
    """Returns the interpolated loss at places, a bit above the surface."""
    lift = 0.02 * np.ptp(loss)
    found = []
    for x, y in places:
        along = [np.interp(x, plane.x, row) for row in loss]
        found.append(np.interp(y, plane.y, along) + lift)
    return np.array(found)


def _axes(ax, height=4.0, **kwargs):
    """Returns the given axes, or those of a new figure."""
    if ax is not None:
        return ax
    figure = checks.need("matplotlib.figure").Figure(
        figsize=(_WIDTH, height), layout="constrained"
    )
    return figure.add_subplot(**kwargs)
