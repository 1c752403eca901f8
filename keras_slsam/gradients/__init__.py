"""Sparse gradients: the only room that knows a framework.

The rest of the package uses `backend` from here, and speaks `keras.ops` otherwise.

| module | idea |
| --- | --- |
| `interface` | the class of `backend`, a subclass for each framework |
| `passes` | the two passes of a step |
| `generators` | random numbers outside of Keras, the same in both passes |
| `partition`, `program` | which arms need which work of a traced step |
| `jax`, `jax_*` | JAX: a jaxpr, put under conditions |
| `tensorflow`, `tensorflow_*` | TensorFlow: a graph, put under conditions |
| `torch`, `torch_*` | PyTorch: eager, only the active weights require gradients |
"""

import keras

from keras_slsam.gradients.interface import Backend

backend: Backend

if keras.config.backend() == "jax":
    from keras_slsam.gradients.jax import JaxBackend

    backend = JaxBackend()
elif keras.config.backend() == "tensorflow":
    from keras_slsam.gradients.tensorflow import TensorFlowBackend

    backend = TensorFlowBackend()
elif keras.config.backend() == "torch":
    from keras_slsam.gradients.torch import TorchBackend

    backend = TorchBackend()
else:
    raise ImportError(
        "keras_slsam runs on the 'jax', 'tensorflow' and 'torch' backends. "
        f"Received: KERAS_BACKEND={keras.config.backend()!r}. Set the environment "
        "variable KERAS_BACKEND to one of them before keras is imported."
    )
