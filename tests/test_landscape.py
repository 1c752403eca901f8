"""Lines, planes and trajectories have the losses and coordinates of their weights."""

import functools

import keras
import numpy as np
import pytest
import zoo
from keras import layers
from keras import ops

from keras_slsam import analysis
from keras_slsam import callbacks
from keras_slsam.analysis.sketch import Sketch

ROWS = 20


def make(seed=0):
    rng = np.random.default_rng(seed)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(20, "tanh"), layers.Dense(3)]
    )
    for variable in model.trainable_variables:
        variable.assign(0.5 * rng.normal(size=variable.shape).astype("float32"))
    model.compile(keras.optimizers.SGD(0.5), zoo.loss())
    return model


def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(ROWS, 6)).astype("float32"), rng.integers(0, 3, ROWS)


def weights_of(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]


def flat(weights):
    return np.concatenate([w.ravel() for w in weights]).astype("float64")


shared_model = functools.cache(make)


def loss_at(weights):
    model = shared_model()
    model.set_weights(weights)
    return model.evaluate(*data(), verbose=0)


def test_a_line_has_the_losses_of_its_ends_and_of_the_middle():
    model, other = make(), make(2)
    before = weights_of(model)
    line = analysis.loss_along_line(
        model, *data(), other_weights=other.trainable_variables, points=3, batch_size=8
    )
    np.testing.assert_array_equal(line.x, [0, 0.5, 1])
    middle = [(a + b) / 2 for a, b in zip(before, weights_of(other))]
    expected = [loss_at(w) for w in (before, middle, weights_of(other))]
    np.testing.assert_allclose(line.loss, expected, rtol=1e-5)
    for one, two in zip(before, weights_of(model)):
        np.testing.assert_array_equal(one, two)


def test_random_directions_have_the_norms_of_the_filters():
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )
    model.compile(loss=zoo.loss())
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 5, 5, 2)).astype("float32"), rng.integers(0, 4, 4)
    plane = analysis.loss_plane(model, x, y, points=3, span=0.5, seed=1)
    np.testing.assert_array_equal(plane.x, [-0.5, 0, 0.5])
    for direction in plane.directions:
        for moved, weight in zip(direction, plane.origin):
            if weight.ndim < 2:
                assert not moved.any()
                continue
            axes = tuple(range(weight.ndim - 1))
            norms = [np.sqrt(np.sum(a**2, axis=axes)) for a in (moved, weight)]
            np.testing.assert_allclose(*norms, rtol=1e-5)
    assert plane.loss[1, 1] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    one, two = plane.directions
    corner = [w - 0.5 * a + 0.5 * b for w, a, b in zip(plane.origin, one, two)]
    for variable, value in zip(model.trainable_variables, corner):
        variable.assign(value)
    assert plane.loss[2, 0] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


def test_a_plane_goes_through_three_weights():
    model, one, two = make(), make(2), make(3)
    through = one.trainable_variables, two.trainable_variables
    plane = analysis.loss_plane(model, *data(), through=through, points=4, span=0.1)
    a, b = (flat(weights_of(m)) - flat(weights_of(model)) for m in (one, two))
    length = np.linalg.norm(a)
    np.testing.assert_allclose(plane.anchors[:2], [[0, 0], [length, 0]], rtol=1e-6)
    # Distances in the plane are those between the weights.
    first, second = plane.anchors[2], plane.anchors[2] - plane.anchors[1]
    np.testing.assert_allclose(np.linalg.norm(first), np.linalg.norm(b), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(second), np.linalg.norm(b - a), rtol=1e-6)
    # A square, with a margin around the points.
    extent = np.ptp(plane.anchors, axis=0).max()
    for places, anchors in zip((plane.x, plane.y), plane.anchors.T):
        assert np.ptp(places) == pytest.approx(1.2 * extent)
        assert places[0] <= anchors.min() - 0.099 * extent
        assert places[-1] >= anchors.max() + 0.099 * extent
    found = plane.project([weights_of(m) for m in (model, one, two)])
    np.testing.assert_allclose(found, plane.anchors, atol=1e-5)
    corner = [
        w + plane.x[-1] * u + plane.y[0] * v
        for w, u, v in zip(plane.origin, *plane.directions)
    ]
    assert plane.loss[0, -1] == pytest.approx(loss_at(corner), rel=1e-5)


def test_coordinates_in_a_slanted_plane():
    """Random directions are not orthogonal, and have other lengths than 1."""
    model = make()
    plane = analysis.loss_plane(model, *data(), points=2)
    one, two = map(flat, plane.directions)
    assert abs(one @ two) > 0.01 and abs(np.linalg.norm(one) - 1) > 0.1
    moved = [w + 0.3 * a - 2 * b for w, a, b in zip(plane.origin, *plane.directions)]
    np.testing.assert_allclose(plane.project([moved]), [[0.3, -2.0]], atol=1e-5)


def test_the_error_of_a_sketch_is_as_stated():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5000))
    b += a
    product, bound = a @ b, np.sqrt(2 / 256) * np.linalg.norm(a) * np.linalg.norm(b)
    errors = []
    for seed in range(30):
        sketch = Sketch(256, seed)
        parts = [[v[:100].reshape(10, 10), v[100:]] for v in (a, b)]
        one, two = map(sketch, parts)
        errors.append(one @ two - product)
        if seed == 0:
            total = sketch([p + q for p, q in zip(*parts)])
            np.testing.assert_allclose(total, one + two, atol=1e-9)
    spread = np.sqrt(np.mean(np.square(errors)))
    assert bound / 2 < spread < 1.3 * bound
    assert abs(np.mean(errors)) < 4 * spread / 30**0.5


class Copies(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.weights = [weights_of(self.model)]

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(weights_of(self.model))


def test_a_trajectory_is_drawn_to_within_the_error_of_its_sketches():
    model, copies = make(), Copies()
    logger = callbacks.TrajectoryLogger(dimensions=4096, seed=3)
    model.fit(*data(), epochs=6, batch_size=10, verbose=0, callbacks=[copies, logger])
    assert logger.steps == [0, 2, 4, 6, 8, 10, 12]
    assert [record.shape for record in logger.records] == [(4096,)] * 7
    for one, two in zip(logger.start, copies.weights[0]):
        np.testing.assert_array_equal(one, two)
    # The plane through the end, the start and an anchor.
    plane = analysis.loss_plane(
        model, *data(), through=(logger.start, copies.weights[2]), points=2
    )
    exact, found = plane.project(copies.weights), plane.project(logger)
    distances = [np.linalg.norm(flat(w) - flat(plane.origin)) for w in copies.weights]
    bound = np.sqrt(2 / 4096) * np.array(distances)[:, None]
    assert np.all(np.abs(found - exact) <= 4 * bound + 1e-6)
    # The start, the anchor and the end lie in the plane.
    np.testing.assert_allclose(exact[[6, 0, 2]], plane.anchors, atol=1e-4)
    assert np.abs(exact[0]).max() > 20 * bound[0]


def test_a_trajectory_of_steps_goes_on_in_the_next_training():
    model = make()
    logger = callbacks.TrajectoryLogger(every=2, dimensions=64)
    for _ in range(2):
        model.fit(*data(), batch_size=5, verbose=0, callbacks=[logger])
    assert logger.steps == [0, 2, 4, 6, 8]
    np.testing.assert_allclose(logger.records[-1], logger.sketch(weights_of(model)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: callbacks.TrajectoryLogger(every=0), '`every`.*"epoch".*every=0'),
        (lambda: callbacks.TrajectoryLogger(dimensions=0), "`dimensions`.*=0"),
        (
            lambda: analysis.loss_along_line(make(), *data(), other_weights=[]),
            "`other_weights`.*shapes",
        ),
        (
            lambda: analysis.loss_plane(make(), *data(), through=[weights_of(make(2))]),
            "`through`.*two lists",
        ),
        (
            lambda: analysis.loss_plane(
                make(), *data(), through=[weights_of(make(2))] * 2
            ),
            "`through`.*one line",
        ),
        *(
            (
                lambda span=span: analysis.loss_along_line(
                    make(), *data(), other_weights=weights_of(make(2)), span=span
                ),
                "`span`.*two different finite numbers",
            )
            for span in ((0.0,), 1.0, (1.0, 1.0), (0.0, np.inf))
        ),
        (lambda: analysis.loss_plane(make(), *data(), points=1), "`points`.*=1"),
        (lambda: analysis.loss_plane(make(), *data(), span=-1), "`span`.*=-1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
