"""Fixtures for all tests. KERAS_BACKEND selects the backend.

The process that hands out the tests to others imports this module too. Functions import
Keras, which takes seconds, so that the other processes start sooner.
"""

import gc

import pytest

# Programs, which change the settings of JAX and TensorFlow.
collect_ignore = ["jax_devices.py", "tensorflow_replicas.py"]
# Files whose tests start processes and take longest. They run first, so that the short
# tests fill both workers until the end.
FIRST = (
    *("jax_devices", "tensorflow_replicas", "torch_processes", "several_devices"),
    *("kill", "quickstart"),
)

# Tracing makes many objects, and the search for garbage took more than a tenth of the
# time.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in FIRST)


@pytest.fixture
def float64(monkeypatch):
    """Computes everything in float64, like the golden trajectories."""
    import keras
    from keras.src.backend.common import dtypes

    # Because of this table, `keras.ops` computes float64 in float32 on JAX and PyTorch.
    # Keras has no public switch for it.
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    if keras.config.backend() == "jax":
        jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def fixed_seed():
    import keras

    keras.utils.set_random_seed(0)


class CompileStep:
    """Compiles a function of tensors as the backend's `fit` would."""

    def __call__(self, function, variables=()):
        import keras

        backend = keras.config.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            return tf.function(function, autograph=False)
        if backend == "jax":
            return self._jit(function, list(variables))
        return self._no_grad(function)

    def traces(self, function):
        """Returns the number of traces of a compiled function, 0 on PyTorch."""
        import keras

        backend = keras.config.backend()
        if backend == "tensorflow":
            return function.experimental_get_tracing_count()
        return function.traces[0] if backend == "jax" else 0

    def _jit(self, function, variables):
        import jax
        import keras

        traces = [0]

        @jax.jit
        def compiled(values, *args):
            traces[0] += 1
            with keras.StatelessScope(list(zip(variables, values))) as scope:
                outputs = function(*args)
            return outputs, [scope.get_current_value(v) for v in variables]

        def run(*args):
            outputs, values = compiled([v.value for v in variables], *args)
            for variable, value in zip(variables, values):
                variable.assign(value)
            return outputs

        run.traces = traces
        return run

    def _no_grad(self, function):
        from keras_slsam.gradients import backend

        def run(*args):
            with backend.no_grad():
                return function(*args)

        return run


@pytest.fixture
def compile_step():
    return CompileStep()
