"""Plots draw what they are given into the axes they are given."""

import sys
import types

import keras
import numpy as np
import pytest
from matplotlib import colors as matplotlib_colors
from matplotlib.figure import Figure

from keras_slsam import analysis
from keras_slsam.analysis import plots

# They are the same on every backend.
pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="once, on the fastest backend"
)


@pytest.fixture
def ax():
    return Figure().add_subplot()


def logger(arms=3, probability=True):
    rng = np.random.default_rng(0)
    records = [
        {
            "step": step,
            "active": rng.random(arms),
            "probability": rng.random(arms) if probability else None,
        }
        for step in (10, 20, 40)
    ]
    names = [f"layer_{i}/kernel" for i in range(arms)]
    return types.SimpleNamespace(names=names, records=records)


def plane(anchors=((0.0, 0.0),)):
    x, y = np.linspace(-1, 1, 5), np.linspace(-2, 2, 5)
    loss = x**2 + y[:, None] ** 2
    origin = [np.zeros(3)]
    directions = [np.eye(3)[0]], [np.eye(3)[1]]
    return analysis.Plane(x, y, loss, origin, directions, np.array(anchors))


@pytest.mark.parametrize("key", ["active", "probability"])
def test_a_heat_map_has_a_row_per_arm_and_a_column_per_record(key, ax):
    shown = logger()
    draw = {"active": plots.arm_choice, "probability": plots.probabilities}[key]
    assert draw(shown, ax=ax) is ax
    (mesh,) = ax.collections
    values = np.array([record[key] for record in shown.records]).T
    np.testing.assert_array_equal(mesh.get_array(), values)
    assert mesh.get_clim() == (0, 1)
    # A column ends at the step of its record. The first arm is at the top.
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 10, 20, 40])
    assert [t.get_text() for t in ax.get_yticklabels()] == shown.names
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "step"
    assert ax.figure.axes[1].get_ylabel()


def test_many_arms_have_some_of_their_names():
    axes = plots.arm_choice(logger(arms=105))
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == [f"layer_{i}/kernel" for i in range(0, 105, 3)]
    assert axes.figure.get_size_inches()[1] <= 8


@pytest.mark.parametrize("anchors", [[(0, 0)], [(0, 0), (0.5, 0), (0.1, 0.7)]])
def test_a_contour_has_the_trajectory_and_the_anchors(anchors, ax):
    way = [[np.array([0.1 * i, -0.2 * i, 5.0])] for i in range(4)]
    shown = plane(anchors)
    assert plots.landscape(shown, way, ax=ax) is ax
    line = ax.lines[-1]
    np.testing.assert_allclose(
        line.get_xydata(), [[0.1 * i, -0.2 * i] for i in range(4)]
    )
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["training", "model", *["other weights"] * (len(anchors) > 1)]
    points = [c.get_offsets() for c in ax.collections if len(c.get_offsets()) > 0]
    np.testing.assert_allclose(np.concatenate(points[-2:])[-len(anchors) :], anchors)
    unit = "distance of weights" if len(anchors) > 1 else "1 = norm of each filter"
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"x, {unit}", f"y, {unit}")
    assert ax.figure.axes[1].get_ylabel() == "loss"


def test_a_surface_has_three_labelled_axes():
    ax = Figure().add_subplot(projection="3d")
    way = [[np.array([0.5, 1.0, 0.0])], [np.zeros(3)]]
    assert plots.landscape(plane(), way, kind="surface", ax=ax) is ax
    assert ax.get_zlabel() == "loss"
    x, y, z = ax.lines[-1].get_data_3d()
    np.testing.assert_allclose([x, y], [[0.5, 0], [1, 0]])
    lift = 0.02 * np.quantile(plane().loss, 0.95)
    np.testing.assert_allclose(z, [1.25 + lift, lift])
    assert plots.landscape(plane(), kind="surface").name == "3d"


def density(scale):
    grid = np.linspace(-1, 1, 50)
    values = scale * np.exp(-(grid**2) * 50)
    return analysis.SpectralDensity(grid, values, grid[:2], grid[:2], "exact")


def test_spectra_have_the_colours_of_their_methods(ax):
    assert plots.spectrum(density(1), density(2), labels=["SAM", "AdamW"], ax=ax) is ax
    colors = [line.get_color() for line in ax.lines]
    assert colors == [plots.color_of("SAM"), plots.color_of("AdamW")]
    assert ax.get_yscale() == "log"
    assert ax.lines[1].get_ydata()[25] == pytest.approx(density(2).density[25])
    assert "eigenvalue" in ax.get_xlabel() and "density" in ax.get_ylabel()


def test_a_point_per_run(ax):
    runs = [
        {"method": "SAM", "worst": 0.5, "accuracy": 0.8},
        {"method": "SAM", "worst": 0.6, "accuracy": 0.7},
        {"method": "jax", "worst": 0.9, "accuracy": 0.6},
    ]
    found = plots.sharpness_and_accuracy(runs, measure="worst", label="rise", ax=ax)
    assert found is ax
    sam, other = ax.collections
    np.testing.assert_allclose(sam.get_offsets(), [(0.5, 0.8), (0.6, 0.7)])
    expected = matplotlib_colors.to_rgba(plots.color_of("jax"))
    np.testing.assert_allclose(other.get_facecolor()[0], expected)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rise", "accuracy")


def test_methods_and_backends_have_a_colour_each():
    names = ["AdamW", "SAM", "S2-SAM", "SL-SAM", "SL+S2", "jax", "tensorflow", "torch"]
    assert len({plots.color_of(name) for name in names}) == len(names)
    for one, other in (
        ("SL-SAM + S2-SAM", "sl+s2"),
        ("slsam-bandit", "SL-SAM block"),
        ("PyTorch", "torch"),
        ("adamw-ema", "AdamW"),
        ("s2sam", "S2-SAM"),
    ):
        assert plots.color_of(one) == plots.color_of(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.landscape(plane(), kind="map"), "`kind`.*'surface'.*'map'"),
        (
            lambda: plots.landscape(plane(), kind="surface", ax=Figure().subplots()),
            "`ax`.*three-dimensional",
        ),
        (lambda: plots.probabilities(logger(probability=False)), "`logger`.*without"),
        (
            lambda: plots.arm_choice(types.SimpleNamespace(records=[])),
            "`logger`.*0 records",
        ),
        (lambda: plots.spectrum(density(1), labels=[]), "`labels`.*1 densities"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_extra_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install keras-slsam\[analysis\]"):
        plots.arm_choice(logger())
