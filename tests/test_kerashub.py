"""KerasHub tasks: raw strings and images, their `compile` defaults, LoRA."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_slsam

WORDS = "the film is good bad very not a".split()
TEXTS = ["the film is good", "the film is bad", "a very good film", "not a good film"]
LABELS = np.array([1, 0, 1, 0])
ON_TORCH = keras.config.backend() == "torch"


def text_classifier():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=vocabulary)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=10,
        dropout=0.1,
    )
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=10
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=preprocessor
    )


def image_classifier():
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    converter = keras_hub.layers.ResNetImageConverter(image_size=(16, 16))
    preprocessor = keras_hub.models.ResNetImageClassifierPreprocessor(converter)
    return keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=2, preprocessor=preprocessor
    )


def causal_lm():
    # A byte-pair tokenizer with one merge, so nearly all tokens are letters.
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "Ġ")})
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "th", *letters])}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["t h"])
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
        dropout=0.0,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=12
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=preprocessor)


def slsam(rate=0.01, **kwargs):
    return keras_slsam.SLSAM(
        keras.optimizers.Adam(rate), active_fraction=0.5, seed=0, **kwargs
    )


def arm_names(optimizer):
    return [[variable.path for variable in arm] for arm in optimizer.arms]


def test_text_classifier_on_raw_strings_and_its_weights_file(tmp_path):
    def compiled():
        task = keras_slsam.sharpness_aware(text_classifier())
        task.compile(optimizer=slsam(arms="block"))  # default loss and metrics
        return task

    task, loaded = compiled(), compiled()
    loss, _ = task.evaluate(TEXTS, LABELS, verbose=0)
    # Train for one epoch. KerasHub traces the tokenizer again in each epoch.
    task.fit(TEXTS * 72, np.tile(LABELS, 72), 8, verbose=0)
    after, accuracy = task.evaluate(TEXTS, LABELS, verbose=0)
    assert after < 0.5 * loss and accuracy == 1
    names = arm_names(task.optimizer)
    blocks = [{path.split("/")[0] for path in arm} for arm in names]
    assert all(len(block) == 1 for block in blocks)
    assert {"transformer_layer_0", "transformer_layer_1"} <= set().union(*blocks)
    assert task.predict(TEXTS, verbose=0).shape == (4, 2)

    task.save_weights(tmp_path / "run.weights.h5")
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "run.weights.h5")
    assert int(loaded.optimizer.iterations) == 36
    if ON_TORCH:  # others would trace one more step
        for each in (task, loaded):
            keras.utils.set_random_seed(0)
            each.train_on_batch(np.array(TEXTS), LABELS)
    pairs = zip(
        [*task.weights, *task.optimizer.variables],
        [*loaded.weights, *loaded.optimizer.variables],
        strict=True,
    )
    for one, other in pairs:
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (one, other)))


def test_image_classifier_on_raw_images():
    rng = np.random.default_rng(0)
    labels = np.arange(32) % 2
    images = rng.integers(0, 100, (32, 24, 24, 3)) + 120 * labels[:, None, None, None]
    task = keras_slsam.sharpness_aware(image_classifier())
    task.compile(optimizer=slsam(arms="layer"))
    frozen = [v for v in task.non_trainable_variables if "moving" in v.path]
    before = [ops.convert_to_numpy(v) for v in frozen]
    history = task.fit(images.astype("uint8"), labels, 8, epochs=2, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert before
    for old, variable in zip(before, frozen):
        assert (ops.convert_to_numpy(variable) != old).any()


@pytest.mark.parametrize("lora", [True, False] if ON_TORCH else [True])
def test_causal_lm_on_raw_strings(lora):
    task = causal_lm()
    if lora:
        task.backbone.enable_lora(2)
    task = keras_slsam.sharpness_aware(task)
    task.compile(optimizer=slsam(0.3 if lora else 0.03))
    task.optimizer.build(task.trainable_variables)
    frozen = [
        v for v in task.variables if v.path.endswith("kernel") and not v.trainable
    ]
    before = [ops.convert_to_numpy(v) for v in frozen]
    means = []  # of the losses up to each batch
    recorder = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: means.append(logs["loss"])
    )
    task.fit(TEXTS * 64, batch_size=8, callbacks=[recorder], verbose=0)
    losses = np.diff(means * np.arange(1, 33), prepend=0)
    # A frozen, untrained network learns little with its low-rank factors.
    assert losses[-1] < (0.99 if lora else 0.5) * losses[0]
    paths = [path for arm in arm_names(task.optimizer) for path in arm]
    assert sorted(paths) == sorted(v.path for v in task.trainable_variables)
    # Only trainable weights are arms: low-rank factors, and biases of the same layers.
    assert all("lora" in path or path.endswith("bias") for path in paths) == lora
    assert bool(frozen) == lora
    for old, variable in zip(before, frozen):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))
    if lora and ON_TORCH:  # Keras has compiled both models again
        assert task.generate("the", max_length=8).startswith("the")
