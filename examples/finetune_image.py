"""Fine-tunes a pretrained EfficientNet-lite0 on images.

    pip install keras-slsam[examples] torch
    python examples/finetune_image.py
    python examples/finetune_image.py --data cifar.npz --image-size 64 --epochs 2

`--data` takes an `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`. The
images have the shape (n, height, width, 3) and are uint8. Without `--data` the script
uses scikit-learn's digits. `convert_efficientnet_lite0.py` converts the pretrained
weights; `--preset` takes a preset that it wrote. The statistics of BatchNorm are
updated once per step, in the pass at the unperturbed weights.
"""

import argparse
import pathlib

import choose_backend  # noqa: F401, before Keras
import convert_efficientnet_lite0 as lite0
import data
import keras
import keras_hub

import keras_slsam


def make_model(num_classes, args):
    if args.preset is not None:
        return keras_hub.models.EfficientNetImageClassifier.from_preset(
            args.preset, num_classes=num_classes
        )
    return lite0.pretrained(num_classes, args.image_size)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, metavar="FILE.npz")
    parser.add_argument("--preset", help="folder of a converted model")
    parser.add_argument("--save", default="classifier.weights.h5")
    parser.add_argument("--limit", type=int, help="images to train on")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--active-fraction", type=float, default=0.3)
    parser.add_argument(
        "--arms", choices=("variable", "layer", "block"), default="block"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    train, test = data.load_images(args.data)
    model = make_model(int(train[1].max()) + 1, args)
    train = data.shuffled(*train, seed=args.seed, limit=args.limit)
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.AdamW(args.learning_rate),
        active_fraction=args.active_fraction,
        sampler="proportional",
        arms=args.arms,
        seed=args.seed,
    )
    model.compile(optimizer=optimizer)  # KerasHub sets the loss and metrics
    model.fit(
        *train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=test,
    )
    model.save_weights(args.save)
    print(f"\n{len(optimizer.arms)} arms. The weights are in {args.save}")


if __name__ == "__main__":
    main()
