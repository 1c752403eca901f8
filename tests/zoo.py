"""Small models of all kinds, with data. They are the same on all backends."""

import keras
import numpy as np
from keras import layers
from keras import ops

BATCH, LENGTH, WIDTH, VOCABULARY, CLASSES = 6, 5, 8, 11, 3
# For references: a few eager steps cost less than a trace on TensorFlow, not on JAX.
EAGER = {"run_eagerly": keras.config.backend() == "tensorflow"}


class Subclassed(keras.Model):
    """A model whose layers are made in the constructor, some of them in a list."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(WIDTH, activation="relu") for _ in range(2)]
        self.head = layers.Dense(CLASSES)

    def call(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Unreached(keras.Model):
    """A model with a weight that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(CLASSES)
        self.unused = layers.Dense(4)
        self.unused.build((None, WIDTH))

    def call(self, x):
        return self.dense(x)


class Penalised(layers.Layer):
    """Adds a loss in `call`."""

    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


def _features():
    return np.random.default_rng(1).normal(size=(BATCH, WIDTH)).astype("float32")


def _tokens():
    return np.random.default_rng(2).integers(1, VOCABULARY, (BATCH, LENGTH))


def _images():
    rng = np.random.default_rng(3)
    return rng.normal(size=(BATCH, 8, 8, 3)).astype("float32")


def labels():
    return np.random.default_rng(4).integers(0, CLASSES, BATCH)


def dense():
    inputs = keras.Input((WIDTH,))
    x = layers.Dense(WIDTH, activation="tanh", kernel_regularizer="l2")(inputs)
    x = Penalised()(x)
    x = layers.Dense(WIDTH, activation="relu", use_bias=False)(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), _features()


def convolution():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(4, 3, strides=2, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), _images()


def _recurrent(layer):
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    x = layer(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), _tokens()


def lstm():
    return _recurrent(layers.LSTM(WIDTH))


def gru():
    return _recurrent(layers.Bidirectional(layers.GRU(4)))


def attention():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x)
    x = layers.LayerNormalization()(x + layers.Dropout(0.1)(attended))
    x = x + layers.Dense(WIDTH, activation="gelu")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), _tokens()


def shared():
    inputs = keras.Input((WIDTH,))
    twice = layers.Dense(WIDTH, activation="tanh")
    x = twice(layers.Dense(WIDTH)(twice(inputs)))
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), _features()


def tied():
    inputs = keras.Input((LENGTH,), dtype="int32")
    embedding = layers.Embedding(VOCABULARY, WIDTH)
    x = layers.Dense(WIDTH, activation="tanh")(embedding(inputs))
    x = ops.mean(x, axis=1)
    scores = layers.Lambda(
        lambda x: ops.matmul(x, ops.transpose(embedding.embeddings))[:, :CLASSES]
    )
    scores.embedding = embedding
    return keras.Model(inputs, scores(x)), _tokens()


def nested():
    inputs = keras.Input((WIDTH,))
    inner = keras.Sequential([layers.Dense(WIDTH, activation="relu"), layers.Dense(4)])
    x = inner(layers.Dense(WIDTH)(inputs))
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), _features()


def subclassed():
    return Subclassed(), _features()


def two_inputs_and_outputs():
    first, second = keras.Input((WIDTH,)), keras.Input((WIDTH,), name="second")
    x = layers.Dense(WIDTH, activation="tanh")(first)
    x = layers.Concatenate()([x, layers.Dense(4)(second)])
    outputs = {"a": layers.Dense(CLASSES, name="a")(x), "b": layers.Dense(CLASSES)(x)}
    model = keras.Model([first, second], outputs)
    return model, [_features(), _features()[::-1].copy()]


def frozen():
    model, x = dense()
    model.layers[3].trainable = False
    return model, x


def unreached():
    return Unreached(), _features()


MODELS = {
    function.__name__: function
    for function in (
        dense,
        convolution,
        lstm,
        gru,
        attention,
        shared,
        tied,
        nested,
        subclassed,
        two_inputs_and_outputs,
        frozen,
        unreached,
    )
}


def targets(name):
    """Returns the labels for the model `name`, in the structure of its outputs."""
    if name == "two_inputs_and_outputs":
        return {"a": labels(), "b": labels()[::-1].copy()}
    return labels()


def build(name):
    """Returns the built model, with the same weights on every backend, and its data."""
    keras.utils.set_random_seed(0)
    model, x = MODELS[name]()
    model(x)
    rng = np.random.default_rng(5)
    for variable in model.trainable_variables:
        scale = 1.0 / np.sqrt(max(variable.shape[0], 1))
        value = scale * rng.normal(size=variable.shape)
        if "gamma" in variable.path:
            value = 1.0 + 0.1 * value
        variable.assign(value.astype("float32"))
    return model, x, targets(name)


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def loss_of(function, variables):
    """Wraps a function of the weights in the form that the passes take."""

    def loss_fn(weights, differentiate=lambda loss: None):
        loss = function(weights)
        differentiate(loss)
        return loss, ()

    loss_fn.variables, loss_fn.state = variables, []
    return loss_fn
