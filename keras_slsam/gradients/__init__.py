"""Sparse gradients: the only room that knows a framework.

Rules of the room:

- One file a backend, the same names in each, and files that these are made of; only
  the active backend's are imported. Everything else in the package speaks `keras.ops`.
- An arm's entry in `active` is a Python bool where its value is known while
  Python runs (PyTorch, `run_eagerly=True`) and a scalar boolean tensor inside a
  traced step (JAX under `jit`, TensorFlow in a graph). Work that only inactive
  arms need is not executed either way.

What each file holds:

- `no_grad()`: context in which nothing is recorded for differentiation.
- `can_compile`: whether the step may run with `jit_compile=True`.
- `init_scope()`: context in which variables are made, outside any graph.
- `concrete(mask)`: the entries of a boolean tensor of shape `(num_arms,)`, as
  Python bools if they are known, else as scalar boolean tensors. At most one
  synchronisation with the device.
- `Passes`, a subclass of that in `passes.py`: the passes of a step. `first` gives loss,
  auxiliary outputs and the gradients of the active weights, `second` the gradients at
  other values of these, with the same random numbers.
- `Scope`: the `keras.StatelessScope` that the loss is computed in.
- `read(variable)`: the value of a `keras.Variable` as a tensor, not a copy.
- `when(active, update)`: run an update, which assigns to Keras variables, only if
  `active`.
- `select(active, update)`: the same for an update of all weights. JAX executes it and
  keeps the old values, which takes less than a condition around it.
- `apply(optimizer, gradients, variables)`: the step of a Keras optimizer, by the method
  that Keras' own train step calls.
- `cond(active, true_fn, false_fn)`, `both(one, other)` (in this file): a value by
  `active`, and whether two conditions hold.
- `own_parameters(model, variables)`: contexts in which layers that do not read their
  weights as Keras variables compute with other weights, and what takes over their
  state.
- `build_first(model, train_function)`: a train function that makes the variables of
  optimizer and metrics before it is traced, where Keras does not.
- `after(*structures)`: context whose operations run after those that give the tensors
  in the structures, and after the checks in them.
- `replay(model)`: context in which the generators of random numbers that are no
  variables give the same each time. If something raises in it, they are set back.
- `only_builds()`: whether this step is taken for that only, and not executed.
- `multiply(gradient, factor)`: `factor * gradient`, a new tensor.
- `squared_sum(gradient)`: sum of the squares of a gradient's entries.
- `add(weight, gradient, scale)`: `weight + scale * gradient`, a new tensor.
"""

import keras

if keras.config.backend() == "jax":
    from keras_slsam.gradients.jax import Passes
    from keras_slsam.gradients.jax import Scope
    from keras_slsam.gradients.jax import add
    from keras_slsam.gradients.jax import after
    from keras_slsam.gradients.jax import apply
    from keras_slsam.gradients.jax import build_first
    from keras_slsam.gradients.jax import can_compile
    from keras_slsam.gradients.jax import concrete
    from keras_slsam.gradients.jax import init_scope
    from keras_slsam.gradients.jax import multiply
    from keras_slsam.gradients.jax import no_grad
    from keras_slsam.gradients.jax import only_builds
    from keras_slsam.gradients.jax import own_parameters
    from keras_slsam.gradients.jax import read
    from keras_slsam.gradients.jax import replay
    from keras_slsam.gradients.jax import select
    from keras_slsam.gradients.jax import squared_sum
    from keras_slsam.gradients.jax import when
elif keras.config.backend() == "tensorflow":
    from keras_slsam.gradients.tensorflow import Passes
    from keras_slsam.gradients.tensorflow import Scope
    from keras_slsam.gradients.tensorflow import add
    from keras_slsam.gradients.tensorflow import after
    from keras_slsam.gradients.tensorflow import apply
    from keras_slsam.gradients.tensorflow import build_first
    from keras_slsam.gradients.tensorflow import can_compile
    from keras_slsam.gradients.tensorflow import concrete
    from keras_slsam.gradients.tensorflow import init_scope
    from keras_slsam.gradients.tensorflow import multiply
    from keras_slsam.gradients.tensorflow import no_grad
    from keras_slsam.gradients.tensorflow import only_builds
    from keras_slsam.gradients.tensorflow import own_parameters
    from keras_slsam.gradients.tensorflow import read
    from keras_slsam.gradients.tensorflow import replay
    from keras_slsam.gradients.tensorflow import select
    from keras_slsam.gradients.tensorflow import squared_sum
    from keras_slsam.gradients.tensorflow import when
elif keras.config.backend() == "torch":
    from keras_slsam.gradients.torch import Passes
    from keras_slsam.gradients.torch import Scope
    from keras_slsam.gradients.torch import add
    from keras_slsam.gradients.torch import after
    from keras_slsam.gradients.torch import apply
    from keras_slsam.gradients.torch import build_first
    from keras_slsam.gradients.torch import can_compile
    from keras_slsam.gradients.torch import concrete
    from keras_slsam.gradients.torch import init_scope
    from keras_slsam.gradients.torch import multiply
    from keras_slsam.gradients.torch import no_grad
    from keras_slsam.gradients.torch import only_builds
    from keras_slsam.gradients.torch import own_parameters
    from keras_slsam.gradients.torch import read
    from keras_slsam.gradients.torch import replay
    from keras_slsam.gradients.torch import select
    from keras_slsam.gradients.torch import squared_sum
    from keras_slsam.gradients.torch import when
else:
    raise ImportError(
        "keras_slsam runs on the 'jax', 'tensorflow' and 'torch' backends. "
        f"Received: KERAS_BACKEND={keras.config.backend()!r}. Set the environment "
        "variable KERAS_BACKEND to one of them before keras is imported."
    )


def cond(active, true_fn, false_fn):
    """The value of `true_fn()` where `active`, else of `false_fn()`.

    Args:
        active: bool or scalar boolean tensor.
        true_fn: Function without arguments.
        false_fn: Function without arguments, of the same structure.

    Returns:
        What the function that was taken returns; the other is not executed.
    """
    if isinstance(active, bool):
        return true_fn() if active else false_fn()
    return keras.ops.cond(active, true_fn, false_fn)


def both(one, other):
    """Whether two conditions hold.

    Args:
        one: bool or scalar boolean tensor.
        other: bool or scalar boolean tensor.

    Returns:
        bool if that is known, else a scalar boolean tensor.
    """
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return keras.ops.logical_and(one, other)
