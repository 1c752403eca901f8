"""Plots of what the measures and the callbacks found.

Each function draws into the given axes, or into new ones, and returns the axes. They
need the extra `pip install keras-slsam[analysis]`.
"""

from keras_slsam.analysis import checks
from keras_slsam.analysis.colors import color_of

__all__ = ["color_of", "sharpness_and_accuracy"]

# At a page's width, 6.5 inches, all text is at least as large as in a footnote.
_SIZE = (6.5, 4.0)
_MARKERS = "osD^vP*X"


def sharpness_and_accuracy(runs, *, measure, accuracy="accuracy", label=None, ax=None):
    """Draws accuracy against sharpness, with a point per run.

    If flat minima are better, the points fall from left to right.

    Args:
        runs: List of dicts with the key `"method"`, and with the numbers to draw. Runs
            of one method have one colour.
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
    ax.legend(fontsize=8)
    return ax


def _axes(ax, **kwargs):
    """Returns the given axes, or those of a new figure."""
    if ax is not None:
        return ax
    figure = checks.need("matplotlib.figure").Figure(
        figsize=_SIZE, layout="constrained"
    )
    return figure.add_subplot(**kwargs)
