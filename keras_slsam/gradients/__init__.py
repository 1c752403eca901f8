"""Sparse gradients: the only code that uses a framework's API.

The rest of the package uses `backend` from here, and `keras.ops`.

| module | idea |
| --- | --- |
| `interface` | the base class of `backend`, with a subclass per framework |
| `passes` | the two passes of a step |
| `generators` | random generators outside of Keras, rewound for the second pass |
| `partition`, `program` | which arms need which work of a traced step |
| `jax`, `jax_*` | JAX: a jaxpr under conditions |
| `tensorflow`, `tensorflow_*` | TensorFlow: a graph under conditions |
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
