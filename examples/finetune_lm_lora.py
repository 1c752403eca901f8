"""Fine-tunes a small causal language model with LoRA and SL-SAM.

    python examples/finetune_lm_lora.py
    python examples/finetune_lm_lora.py --data lines.txt --like ing --rank 8

The model is a small GPT-2 whose tokens are bytes. First all of its weights are trained
on the lines of `--data`, one text per line. Without `--data`, the texts are the words
and phrases of the lexicon in the `vaderSentiment` package.

Then all weights are frozen except the low-rank factors in its attention and the biases
of the same layers. These are fine-tuned on the lines that contain `--like`. Only
trainable weights form arms, the groups of weights that SL-SAM switches on or off.
Before and after, the script tests the model on a fifth of these lines, which it has not
seen, and lets it write a few words.
"""

import argparse
import pathlib

import choose_backend  # noqa: F401, before Keras
import data
import keras
import keras_hub
import numpy as np

import keras_slsam


def load(args):
    """Returns lines to train on, and lines with `--like` to fine-tune and test on."""
    if args.data is not None:
        lines = args.data.read_text("utf-8").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
    else:
        lines, _ = data.lexicon()
    (lines,) = data.shuffled(np.array(lines), seed=args.seed, limit=args.limit)
    lines = lines.tolist()
    alike = [line for line in lines if args.like in line]
    if len(alike) < 2 * args.batch_size:
        raise SystemExit(f"Only {len(alike)} lines contain {args.like!r}: too few")
    cut = len(alike) // 5
    test = set(alike[:cut])
    return [line for line in lines if line not in test], alike[cut:], alike[:cut]


def make_model(args):
    # GPT-2's tokenizer maps each byte to a letter with this table. Token 0 is padding.
    # The tokenizer needs at least one merge, here of t and h.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain]
    letters += [chr(256 + i) for i in range(256 - len(plain))]
    tokens = ["<|padding|>", "<|endoftext|>", "th", *letters]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)}, merges=["t h"]
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(tokens),
        num_layers=args.layers,
        num_heads=4,
        hidden_dim=args.width,
        intermediate_dim=4 * args.width,
        max_sequence_length=args.length,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=args.length
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def show(model, test, args):
    _, accuracy = model.evaluate(test, batch_size=args.batch_size, verbose=0)
    words = ", ".join(model.generate(list("abcde")))
    print(f"accuracy of the next letter: {accuracy:.1%}. Generated: {words}\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help="file with one text per line")
    parser.add_argument("--like", default="ly", help="fine-tune on lines with this")
    parser.add_argument("--save", default="words.lora.h5")
    parser.add_argument("--limit", type=int, default=4000, help="lines used")
    parser.add_argument("--length", type=int, default=20, help="tokens per line")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--epochs",
        type=int,
        default=3,
        help="of the first part; the second takes three times as many",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--active-fraction", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    lines, alike, test = load(args)
    model = make_model(args)
    print(f"Training all {model.count_params():,} weights on {len(lines)} lines")
    model.compile(optimizer=keras.optimizers.AdamW(3e-3))
    model.fit(lines, batch_size=args.batch_size, epochs=args.epochs, verbose=2)
    show(model, test, args)

    model.backbone.enable_lora(args.rank)
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.AdamW(args.learning_rate),
        active_fraction=args.active_fraction,
        sampler="proportional",
        seed=args.seed,
    )
    model.compile(optimizer=optimizer)  # KerasHub sets the loss and metrics
    model.fit(alike, batch_size=args.batch_size, epochs=3 * args.epochs, verbose=2)
    trained = sum(
        int(np.prod(variable.shape)) for variable in model.trainable_variables
    )
    print(
        f"Fine-tuned {trained:,} weights in {len(optimizer.arms)} arms on {len(alike)} "
        "lines"
    )
    show(model, test, args)

    print("Arms with the highest probability in the next draw:")
    probabilities = keras.ops.convert_to_numpy(optimizer.probabilities)
    for arm in np.argsort(-probabilities)[:5]:
        print(f"{probabilities[arm]:>6.0%}  {optimizer.arms[arm][0].path}")
    model.backbone.save_lora_weights(args.save)
    print(f"\nThe low-rank factors are in {args.save}")


if __name__ == "__main__":
    main()
