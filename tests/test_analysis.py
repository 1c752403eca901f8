"""Measures of sharpness equal what dense Hessians and closed forms say."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
import zoo
from keras import layers
from keras import ops

from keras_slsam import analysis
from keras_slsam import perturbation
from keras_slsam.active_arms import ActiveArms
from keras_slsam.analysis import objective as objectives
from keras_slsam.analysis.objective import Objective
from keras_slsam.gradients import backend

BACKEND = keras.config.backend()
ROWS = 12


def tiny():
    """Returns a network of 4, 8 and 3 units, with data."""
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(3)]
    )
    for variable in model.trainable_variables:
        variable.assign(0.7 * rng.normal(size=variable.shape).astype("float32"))
    model.compile(loss=zoo.loss(), metrics=["accuracy"])
    x = rng.normal(size=(ROWS, 4)).astype("float32")
    return model, x, rng.integers(0, 3, ROWS)


def gradient_of_tiny(flat, x, y):
    """The gradient in NumPy, which also takes complex weights."""
    shapes = (4, 8), (8,), (8, 3), (3,)
    parts = np.split(flat, np.cumsum([np.prod(s) for s in shapes])[:-1])
    kernel, bias, head, offset = (p.reshape(s) for p, s in zip(parts, shapes))
    hidden = np.tanh(x @ kernel + bias)
    powers = np.exp(hidden @ head + offset)
    errors = (powers / powers.sum(axis=1, keepdims=True) - np.eye(3)[y]) / len(x)
    below = (errors @ head.T) * (1 - hidden**2)
    parts = x.T @ below, below.sum(axis=0), hidden.T @ errors, errors.sum(axis=0)
    return np.concatenate([part.ravel() for part in parts])


def hessian_of_tiny(model, x, y):
    """The dense Hessian in float64, by complex steps."""
    flat = objectives.flatten(model.trainable_variables)
    steps = 1e-30j * np.eye(len(flat))
    columns = [gradient_of_tiny(flat + step, x.astype("float64"), y) for step in steps]
    return np.array(columns).imag / 1e-30


def quadratic():
    """Returns a model whose Hessian is diagonal, with data, and its eigenvalues."""
    eigenvalues = np.array([7.0, 4.0, 3.0, 1.0, 0.5, 0.25])
    count = len(eigenvalues)
    model = keras.Sequential([keras.Input((count,)), layers.Dense(1, use_bias=False)])
    model.compile(loss="mse")
    x = np.diag(np.sqrt(eigenvalues * count / 2)).astype("float32")
    y = 3 * np.arange(count).astype("float32")[:, None]
    return model, x, y, eigenvalues


def state_of(model):
    # Keras' dropout on PyTorch draws from PyTorch's generator.
    state = [ops.convert_to_numpy(v) for v in model.variables + model.metrics_variables]
    if BACKEND == "torch":
        import torch

        state.append(torch.get_rng_state().numpy())
    return [np.array(value) for value in state]


@contextlib.contextmanager
def unchanged(model):
    before = state_of(model)
    try:
        yield
    finally:
        for one, other in zip(before, state_of(model), strict=True):
            np.testing.assert_array_equal(one, other)


def dense_by_framework(model, x, y):
    """The dense Hessian by the framework's own differentiation, twice."""
    variables = model.trainable_variables
    shapes = [v.shape for v in variables]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def loss(flat):
        parts = [ops.reshape(p, s) for p, s in zip(ops.split(flat, ends), shapes)]
        with keras.StatelessScope(list(zip(variables, parts))):
            return model.loss(y, model(x))

    flat = ops.concatenate([ops.reshape(v, (-1,)) for v in variables])
    if BACKEND == "jax":
        import jax

        return jax.jit(jax.hessian(loss))(flat)
    if BACKEND == "torch":
        import torch

        return torch.autograd.functional.hessian(loss, flat.detach()).numpy()
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as outer:
        outer.watch(flat)
        with tf.GradientTape() as inner:
            inner.watch(flat)
            value = loss(flat)
        gradient = inner.gradient(value, flat)
    return outer.jacobian(gradient, flat, experimental_use_pfor=False).numpy()


def test_eigenvalues_equal_those_of_dense_hessians():
    model, x, y = tiny()
    with unchanged(model):
        found = analysis.hessian_eigenvalues(model, x, y, k=5, batch_size=4)
    assert found.method == "exact"
    # The reference in NumPy is the same on every backend.
    for dense in (hessian_of_tiny(model, x, y), dense_by_framework(model, x, y)):
        expected = np.linalg.eigvalsh(dense)[::-1][:5]
        np.testing.assert_allclose(found.values, expected, rtol=1e-3)


def test_eigenvalues_of_arms_are_those_of_diagonal_blocks():
    model, x, y = tiny()
    dense = hessian_of_tiny(model, x, y)
    variables = model.trainable_variables
    arms = [variables[2:3], [variables[3], variables[1]], variables[3:]]
    entries = np.split(np.arange(67), [32, 40, 64])
    blocks = [entries[2], np.r_[entries[3], entries[1]], entries[3]]
    found = analysis.hessian_eigenvalues(model, x, y, k=4, which="SA", arms=arms)
    assert len(found) == 3
    for result, rows in zip(found, blocks):
        expected = np.linalg.eigvalsh(dense[np.ix_(rows, rows)])[:4][::-1]
        np.testing.assert_allclose(result.values, expected, rtol=1e-3, atol=1e-6)


def test_the_spectrum_of_a_quadratic_is_known():
    model, x, y, eigenvalues = quadratic()
    found = analysis.hessian_eigenvalues(model, x, y, k=3, batch_size=4)
    np.testing.assert_allclose(found.values, eigenvalues[:3], rtol=1e-4)
    # With vectors of signs there is no variance if the Hessian is diagonal.
    trace = analysis.hessian_trace(model, x, y, samples=3)
    assert trace.mean == pytest.approx(eigenvalues.sum(), rel=1e-5)
    assert trace.error < 1e-4
    assert (trace.samples, trace.method) == (3, "exact")
    density = analysis.spectral_density(model, x, y, steps=50, samples=2, width=0.02)
    for nodes, weights in zip(density.nodes, density.weights):
        np.testing.assert_allclose(nodes, eigenvalues[::-1], rtol=1e-3)
        np.testing.assert_allclose(weights, np.full(6, 1 / 6), rtol=1e-3)
    assert np.trapezoid(density.density, density.grid) == pytest.approx(1.0, abs=1e-3)
    mean = np.trapezoid(density.density * density.grid, density.grid)
    assert mean == pytest.approx(eigenvalues.mean(), rel=1e-3)


def test_trace_and_density_agree_with_the_dense_spectrum():
    model, x, y = tiny()
    dense = hessian_of_tiny(model, x, y)
    trace = analysis.hessian_trace(model, x, y, samples=50, seed=1)
    assert abs(trace.mean - np.trace(dense)) < 4 * trace.error
    # For vectors of signs: twice the sum of the squares beside the diagonal.
    variance = 2 * (np.sum(dense**2) - np.sum(np.diag(dense) ** 2))
    assert trace.error == pytest.approx((variance / 50) ** 0.5, rel=0.3)
    found = analysis.spectral_density(model, x, y, steps=25, samples=4)
    eigenvalues = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(found.nodes.max(axis=1), eigenvalues[-1], rtol=1e-3)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, rtol=1e-6)
    # The quadrature is exact for polynomials. For a square, the mean over the vectors
    # is |H|^2 / n, up to its spread.
    squares = (found.weights * found.nodes**2).sum(axis=1)
    error = squares.std(ddof=1) / 2
    assert abs(squares.mean() - np.mean(eigenvalues**2)) < 4 * error


def module_of_tiny(weights):
    """The network of `tiny` as a module of PyTorch."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(map(torch.tensor, weights))

        def forward(self, x):
            kernel, bias, head, offset = self.weights
            return torch.tanh(x @ kernel + bias) @ head + offset

    return Module()


@pytest.mark.skipif(BACKEND != "torch", reason="curvlinops")
def test_products_and_eigenvalues_agree_with_curvlinops():
    import torch
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    model, x, y = tiny()
    data = [(torch.tensor(x[:6]), torch.tensor(y[:6]))]
    data.append((torch.tensor(x[6:]), torch.tensor(y[6:])))
    module = module_of_tiny(model.get_weights())
    parameters = list(module.parameters())
    other = HessianLinearOperator(
        module, torch.nn.CrossEntropyLoss(), parameters, data, progressbar=False
    ).to_scipy()
    with Objective(model, x, y, batch_size=4) as objective:
        vector = np.random.default_rng(0).normal(size=67).astype("float32")
        vectors = objectives.unflatten(vector, objective.weights)
        product = objectives.flatten(objective.product(vectors))
    np.testing.assert_allclose(product, other @ vector, rtol=1e-4, atol=1e-5)
    expected = eigsh(other, k=3, which="LA", return_eigenvectors=False)[::-1]
    found = analysis.hessian_eigenvalues(model, x, y, k=3).values
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.skipif(BACKEND != "jax", reason="matfree")
def test_the_density_agrees_with_matfree():
    import jax
    from matfree import decomp

    model, x, y = tiny()
    dense = jax.numpy.asarray(hessian_of_tiny(model, x, y), dtype="float32")
    start = np.random.default_rng(0).choice([-1.0, 1.0], 67)
    tridiagonal = decomp.tridiag_sym(10, reortho="full")
    other = tridiagonal(lambda v: dense @ v, start.astype("float32") / 67**0.5)
    nodes, vectors = np.linalg.eigh(np.asarray(other.J_small))
    found = analysis.spectral_density(model, x, y, steps=10, samples=1, seed=0)
    np.testing.assert_allclose(found.nodes[0], nodes, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.weights[0], vectors[0] ** 2, rtol=1e-2, atol=1e-5)


def with_layer(layer):
    """Returns `tiny` with one more layer before the head."""
    model, x, y = tiny()
    first, head = model.layers
    model = keras.Sequential([keras.Input((4,)), first, layer, head])
    model.compile(loss=zoo.loss())
    return model, x, y


def test_layer_normalisation_has_the_same_eigenvalues_everywhere():
    model, x, y = with_layer(layers.LayerNormalization())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = analysis.hessian_eigenvalues(model, x, y, k=2)
    # `tf.nn.moments` stops the gradient at the mean.
    method = "central differences" if BACKEND == "tensorflow" else "exact"
    assert found.method == method
    said = [str(w.message) for w in caught if "second derivative" in str(w.message)]
    assert len(said) == (BACKEND == "tensorflow")
    np.testing.assert_allclose(found.values, LAYER_NORMALISATION, rtol=1e-3)


# From JAX and PyTorch.
LAYER_NORMALISATION = [5.617521051946006, 4.99380808115752]


class Once(layers.Layer):
    """A tanh whose derivative cannot be differentiated."""

    def call(self, x):
        if BACKEND == "jax":
            import jax

            tanh = jax.custom_vjp(ops.tanh)

            def backward(output, gradient):
                slope = jax.pure_callback(lambda y: 1 - np.asarray(y) ** 2, x, output)
                return (gradient * slope,)

            tanh.defvjp(lambda x: (ops.tanh(x),) * 2, backward)
            return tanh(x)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            @tf.custom_gradient
            def refuse(y):
                def backward(gradient):
                    raise LookupError("no second derivative")

                return y, backward

            @tf.custom_gradient
            def tanh(x):
                y = tf.tanh(x)
                return y, lambda gradient: gradient * refuse(1 - y**2)

            return tanh(x)
        import torch

        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(context, x):
                y = torch.tanh(x)
                context.save_for_backward(y)
                return y

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(context, gradient):
                (y,) = context.saved_tensors
                return gradient * (1 - y**2)

        return Tanh.apply(x)


def test_without_a_second_derivative_gradients_are_compared():
    model, x, y = tiny()
    other = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8), Once(), layers.Dense(3)]
    )
    other.set_weights(model.get_weights())
    other.compile(loss=zoo.loss())
    with pytest.warns(UserWarning, match="central differences"), unchanged(other):
        found = analysis.hessian_eigenvalues(other, x, y, k=3, batch_size=6)
    assert found.method == "central differences"
    expected = np.linalg.eigvalsh(hessian_of_tiny(model, x, y))[::-1][:3]
    np.testing.assert_allclose(found.values, expected, rtol=1e-3)


def test_batch_normalisation_is_in_inference_mode_unless_asked():
    model, x, y = with_layer(layers.BatchNormalization())
    expected = model.evaluate(x, y, verbose=0)
    with unchanged(model), Objective(model, x, y) as objective:
        loss = objective.loss(objective.weights)
    assert loss == pytest.approx(expected, rel=1e-5)
    options = {"batch_size": len(x), "training": True}
    with unchanged(model), Objective(model, x, y, **options) as objective:
        loss = objective.loss(objective.weights)
    trained = ops.convert_to_numpy(model.loss(y, model(x, training=True)))
    assert loss == pytest.approx(trained, rel=1e-5)
    assert abs(trained - expected) > 1e-3


def test_dropout_is_the_same_in_all_passes():
    model, x, y = with_layer(layers.Dropout(0.5, seed=0))
    options = {"batch_size": 6, "training": True}
    with unchanged(model), Objective(model, x, y, **options) as objective:
        one, two = (objective.loss(objective.weights) for _ in range(2))
        three, _ = objective.loss_and_gradients(objective.weights)
    assert one == two == pytest.approx(three, rel=1e-6)
    assert abs(model.evaluate(x, y, verbose=0) - one) > 1e-3


def test_the_loss_is_that_of_evaluate():
    """With uneven batches, sample weights and regularisers."""
    model, x, y = zoo.build("dense")
    model.compile(loss=zoo.loss(), metrics=["accuracy"])
    sample_weight = np.linspace(0.5, 2.0, len(x)).astype("float32")
    expected = model.evaluate(
        x, y, sample_weight=sample_weight, batch_size=4, verbose=0, return_dict=True
    )
    # The last batch has two rows.
    with Objective(model, x, y, sample_weight, batch_size=4) as objective:
        loss = objective.loss(objective.weights)
    assert loss == pytest.approx(expected["loss"], rel=1e-5)


def test_an_objective_is_compiled_once_for_many_weights(monkeypatch):
    """A callback measures again at the end of each epoch."""
    model, x, y = tiny()
    traces = []
    trace = Objective._loss_of
    monkeypatch.setattr(
        Objective, "_loss_of", lambda *args: traces.append(1) or trace(*args)
    )
    objective, found = Objective(model, x, y, batch_size=12), []
    for _ in range(2):
        with objective:
            loss, _ = objective.loss_and_gradients(objective.weights)
        found.append(loss)
        model.set_weights([2 * w for w in model.get_weights()])
    assert abs(found[0] - found[1]) > 0.01
    assert len(traces) == (2 if BACKEND == "torch" else 1)


def test_the_loss_may_create_its_variables():
    """One of several outputs does so when it sees the first data."""
    model, x, y = zoo.build("two_inputs_and_outputs")
    model.compile(loss=zoo.loss())
    with Objective(model, x, y) as objective:
        loss, _ = objective.loss_and_gradients(objective.weights)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)


class Batches(keras.utils.PyDataset):
    def __init__(self, *data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return tuple(part[4 * index : 4 * index + 4] for part in self.data)


def test_data_may_be_batches():
    import tensorflow as tf
    import torch

    model, x, y = tiny()
    dataset = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    kinds = [
        Batches(x, y),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
        torch.utils.data.DataLoader(dataset, batch_size=4),
    ]
    with Objective(model, x, y) as objective:
        expected = objective.loss(objective.weights)
    for data in kinds:
        with Objective(model, data) as objective:
            for _ in range(2):
                loss = objective.loss(objective.weights)
                assert loss == pytest.approx(expected, rel=1e-6)


def weights_of(model):
    return [backend.read(v) for v in model.trainable_variables]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_of_one_step_is_where_sam_ascends_to(adaptive):
    model, x, y = tiny()
    with unchanged(model):
        found = analysis.worst_case_sharpness(model, x, y, rho=0.3, adaptive=adaptive)
    with Objective(model, x, y) as objective:
        loss, gradients = objective.loss_and_gradients(objective.weights)
        arms = ActiveArms([[0, 1, 2, 3]], [True], "float32")
        perturbed = perturbation.perturb(
            weights_of(model), gradients, None, arms, 0.3, adaptive
        )
        expected = objective.loss(perturbed) - loss
    assert found == pytest.approx(expected, rel=1e-4)
    more = analysis.worst_case_sharpness(
        model, x, y, rho=0.3, steps=5, adaptive=adaptive
    )
    assert more > found


def test_the_worst_case_of_a_quadratic_is_reached():
    model, x, y, eigenvalues = quadratic()
    # At the minimum the direction is that of the largest eigenvalue.
    minimum = y / np.diag(x)[:, None]
    model.set_weights([(minimum + 1e-3).astype("float32")])
    found = analysis.worst_case_sharpness(model, x, y, rho=0.5, steps=30)
    assert found == pytest.approx(0.5**2 * eigenvalues[0] / 2, rel=0.02)


def test_normalised_logits_ignore_their_scale():
    model, x, y = tiny()
    options = {"rho": 0.2, "steps": 2, "adaptive": True}

    def measure(**more):
        return analysis.worst_case_sharpness(model, x, y, **options, **more)

    before = measure(normalize_logits=True), measure()
    kernel, bias, head, offset = model.get_weights()
    model.set_weights([kernel, bias, 3 * head, 3 * offset])
    assert measure(normalize_logits=True) == pytest.approx(before[0], rel=1e-4)
    assert abs(measure() - before[1]) > 0.01
    # With the loss of the normalised logits at hand.
    logits = model.predict(x, verbose=0)
    logits -= logits.mean(axis=-1, keepdims=True)
    logits /= np.linalg.norm(logits, axis=-1, keepdims=True)
    with Objective(model, x, y, normalize_logits=True) as objective:
        loss = objective.loss(objective.weights)
    assert loss == pytest.approx(float(model.loss(y, logits)), rel=1e-5)


def test_the_average_case_of_a_quadratic_is_half_its_trace():
    model, x, y, eigenvalues = quadratic()
    minimum = y / np.diag(x)[:, None]
    model.set_weights([minimum.astype("float32")])
    with unchanged(model):
        found = analysis.average_case_sharpness(model, x, y, sigma=0.5, samples=100)
    # Var(e . H e / 2) = sigma^4 / 2 * sum of the squared eigenvalues.
    error = (0.5**4 / 2 * np.sum(eigenvalues**2) / 100) ** 0.5
    assert found.error == pytest.approx(error, rel=0.4)
    assert abs(found.mean - 0.5**2 / 2 * eigenvalues.sum()) < 4 * error
    adaptive = analysis.average_case_sharpness(
        model, x, y, sigma=0.5, samples=100, adaptive=True
    )
    expected = 0.5**2 / 2 * np.sum(eigenvalues * minimum.ravel() ** 2)
    assert abs(adaptive.mean - expected) < 4 * adaptive.error


def test_accuracy_under_noise():
    model, x, y = tiny()
    accuracy = model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    with unchanged(model):
        found = analysis.accuracy_under_noise(
            model, x, y, levels=(0.0, 2.0), samples=4, seed=3
        )
    assert found[0.0].mean == pytest.approx(accuracy) and found[0.0].error == 0
    # By hand.
    rng, before, scores = np.random.default_rng(3), model.get_weights(), []
    for _ in range(4):
        model.set_weights(
            [
                w + 2 * w.std() * rng.normal(size=w.shape) if w.ndim > 1 else w
                for w in before
            ]
        )
        scores.append(model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"])
    assert found[2.0].mean == pytest.approx(np.mean(scores), rel=1e-5)
    assert found[2.0].error == pytest.approx(np.std(scores, ddof=1) / 2, rel=1e-5)


class Fails(Batches):
    def __getitem__(self, index):
        if index == 2:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_nothing_changes_if_a_measure_raises():
    model, x, y = tiny()
    model.evaluate(x, y, verbose=0)
    data = Fails(x, y)
    for measure in (
        lambda: analysis.worst_case_sharpness(model, data, training=True),
        lambda: analysis.average_case_sharpness(model, data),
        lambda: analysis.hessian_eigenvalues(model, data),
        lambda: analysis.accuracy_under_noise(model, data, levels=[0.5]),
    ):
        # In `evaluate`, TensorFlow raises an error of its own.
        with unchanged(model), pytest.raises(Exception, match="the disk is gone"):
            measure()


def test_a_callback_measures_the_current_weights():
    model, x, y = tiny()
    found = []

    class Measure(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with Objective(model, x, y) as objective:
                found.append(objective.loss(objective.weights))

    model.fit(x, y, batch_size=6, callbacks=[Measure()], verbose=0)
    assert found[0] != found[1]
    expected = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert found[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("worst_case_sharpness", {"rho": 0.0}, "`rho`.*above 0.*rho=0.0"),
        ("worst_case_sharpness", {"steps": 0}, "`steps`.*int >= 1.*steps=0"),
        ("worst_case_sharpness", {"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ("average_case_sharpness", {"sigma": -1}, "`sigma`.*sigma=-1"),
        ("average_case_sharpness", {"samples": 1.5}, "`samples`.*samples=1.5"),
        ("accuracy_under_noise", {"levels": [-1]}, "`levels`.*>= 0.*-1.0"),
        ("accuracy_under_noise", {"metric": "auc"}, "`metric`.*accuracy.*'auc'"),
        ("hessian_eigenvalues", {"k": 0}, "`k`.*k=0"),
        ("hessian_eigenvalues", {"which": "XX"}, "`which`.*which='XX'"),
        ("hessian_eigenvalues", {"arms": [[]]}, "`arms`.*optimizer.arms"),
        ("hessian_trace", {"samples": 0}, "`samples`.*samples=0"),
        ("spectral_density", {"width": 0}, "`width`.*width=0"),
    ],
)
def test_wrong_arguments(function, arguments, message):
    model, x, y = tiny()
    with pytest.raises(ValueError, match=message):
        getattr(analysis, function)(model, x, y, **arguments)


def test_wrong_models_and_data():
    model, x, y = tiny()
    with pytest.raises(ValueError, match="the same number of rows.*12.*9"):
        analysis.worst_case_sharpness(model, x, y[:9])
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="from_logits=True"):
        analysis.worst_case_sharpness(model, x, y, normalize_logits=True)
    two = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    two.compile(loss=zoo.loss())
    with pytest.raises(ValueError, match="at least three classes"):
        analysis.worst_case_sharpness(two, x, y % 2, normalize_logits=True)
    with pytest.raises(ValueError, match="compiled with a loss"):
        analysis.worst_case_sharpness(keras.Sequential([layers.Dense(1)]), x, y)
    unbuilt = keras.Sequential([layers.Dense(1)])
    unbuilt.compile(loss="mse")
    with pytest.raises(ValueError, match="must be built"):
        analysis.worst_case_sharpness(unbuilt, x, y)


def test_the_extra_is_named_if_it_is_missing(monkeypatch):
    import sys

    model, x, y = tiny()
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"pip install keras-slsam\[analysis\]"):
        analysis.hessian_eigenvalues(model, x, y)


def test_a_loss_that_is_not_finite_is_not_flat():
    model, x, y = tiny()
    model.layers[0].kernel.assign(np.full(model.layers[0].kernel.shape, np.nan))
    assert np.isnan(analysis.worst_case_sharpness(model, x, y))


def test_a_generator_is_refused():
    model, x, y = tiny()
    with pytest.raises(ValueError, match="can be read only once"):
        analysis.worst_case_sharpness(model, ((x, y) for _ in range(2)))
