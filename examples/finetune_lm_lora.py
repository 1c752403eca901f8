"""Fine-tunes a small causal language model with LoRA and SL-SAM.

    python examples/finetune_lm_lora.py
    python examples/finetune_lm_lora.py --data lines.txt --like ing --rank 8

A GPT-2-like model whose tokens are bytes is first trained whole on the lines that
`--data` gives, one text a line; without it on the words and phrases of the lexicon in
the `vaderSentiment` package. Then all of it is frozen but low-rank factors, and the
biases beside them, in its attention, and these are fine-tuned on the lines that hold
`--like`: only what is trainable is an arm. Before and after, the model is tried on a
fifth of these lines that it has not seen, and it writes a few words.
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
    """Lines to train on; of those with `--like`, what to fine-tune and to test on."""
    if args.data is not None:
        lines = args.data.read_text("utf-8").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
    else:
        lines, _ = data.lexicon()
    (lines,) = data.shuffled(np.array(lines), seed=args.seed, limit=args.limit)
    lines = lines.tolist()
    alike = [line for line in lines if args.like in line]
    if len(alike) < 2 * args.batch_size:
        raise SystemExit(f"{len(alike)} lines with {args.like!r} are too few")
    cut = len(alike) // 5
    test = set(alike[:cut])
    return [line for line in lines if line not in test], alike[cut:], alike[:cut]


def make_model(args):
    # GPT-2 writes each byte as a letter, by a table that its tokenizer applies. 0 is
    # padding; one merge, of t and h, since the tokenizer does not do without.
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
    print(f"right about the next letter: {accuracy:.1%}. It writes {words}\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help="one text a line")
    parser.add_argument("--like", default="ly", help="fine-tune on lines with this")
    parser.add_argument("--save", default="words.lora.h5")
    parser.add_argument("--limit", type=int, default=4000, help="lines used")
    parser.add_argument("--length", type=int, default=20, help="tokens a line")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="of each part")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--active-fraction", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    lines, alike, test = load(args)
    model = make_model(args)
    print(f"{len(lines)} lines, all {model.count_params():,} weights")
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
    model.compile(optimizer=optimizer)  # the loss and metrics are the task's own
    model.fit(alike, batch_size=args.batch_size, epochs=3 * args.epochs, verbose=2)
    trained = sum(
        int(np.prod(variable.shape)) for variable in model.trainable_variables
    )
    print(f"{len(alike)} lines, {trained:,} weights in {len(optimizer.arms)} arms")
    show(model, test, args)

    print("The arms most likely to be drawn next:")
    probabilities = keras.ops.convert_to_numpy(optimizer.probabilities)
    for arm in np.argsort(-probabilities)[:5]:
        print(f"{probabilities[arm]:>6.0%}  {optimizer.arms[arm][0].path}")
    model.backbone.save_lora_weights(args.save)
    print(f"\nThe factors are in {args.save}")


if __name__ == "__main__":
    main()
