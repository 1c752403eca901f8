"""The converted EfficientNet-lite0 equals PyTorch's, and can be fine-tuned."""

import pathlib
import sys

import keras
import numpy as np
import torch
from torch import nn

import keras_slsam

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import convert_efficientnet_lite0 as lite0

# Kernel, stride, expansion and output filters of each block (table 1 of the paper).
BLOCKS = [(3, 1, 1, 16)]
for count, kernel, stride, filters in [
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
]:
    BLOCKS += [(kernel, stride, 6, filters)] + [(kernel, 1, 6, filters)] * (count - 1)


class Same(nn.Conv2d):
    """A convolution that pads as in TensorFlow: more at the end."""

    def forward(self, x):
        height, width = x.shape[-2:]
        (kernel, _), (stride, _) = self.kernel_size, self.stride

        def padding(size):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            return total // 2, total - total // 2

        return super().forward(nn.functional.pad(x, padding(width) + padding(height)))


class Block(nn.Module):
    def __init__(self, inputs, kernel, stride, expansion, filters):
        super().__init__()
        width = inputs * expansion
        if expansion != 1:
            self._expand_conv = Same(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = Same(
            width, width, kernel, stride, groups=width, bias=False
        )
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = Same(width, filters, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(filters, eps=1e-3)
        self.adds = stride == 1 and inputs == filters

    def forward(self, x):
        y = x
        if hasattr(self, "_expand_conv"):
            y = nn.functional.relu6(self._bn0(self._expand_conv(y)))
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem = Same(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        widths = [32] + [filters for *_, filters in BLOCKS]
        self._blocks = nn.ModuleList(
            Block(inputs, *block) for inputs, block in zip(widths, BLOCKS)
        )
        self._conv_head = Same(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = nn.functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean(dim=(2, 3)))


def photographs(size=224):
    """Returns scikit-learn's two photographs, (2, size, size, 3)."""
    from sklearn.datasets import load_sample_images

    rows = np.linspace(0, 426, size).astype(int)
    images = load_sample_images().images
    return np.stack([image[rows][:, 106 + rows] for image in images])


def test_the_converted_network_equals_pytorch():
    weights = {name: torch.tensor(array) for name, array in lite0.read().items()}
    network = EfficientNetLite0().eval()
    network.load_state_dict(weights)
    # Only PyTorch has the full size, at which the photographs are recognised. It takes
    # long on the others.
    size = 224 if keras.config.backend() == "torch" else 64
    images = photographs(size)
    scaled = (torch.tensor(images).permute(0, 3, 1, 2).float() - 127.0) / 128.0
    with torch.no_grad():
        expected = network(scaled).numpy()
    model = lite0.convert(size)
    logits = model.predict(images, verbose=0)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    if size == 224:  # a palace or a temple, and a flower or a bee
        temple, flower = logits.argmax(axis=1)
        assert temple in {698, 832, 663, 668} and flower in {985, 308, 309}


def test_fine_tuning_from_the_converted_weights():
    keras.utils.set_random_seed(0)
    model = lite0.pretrained(num_classes=2, image_size=32)
    for layer in model.layers[: len(model.layers) // 2]:
        layer.trainable = False  # XLA compiles for half as long
    model = keras_slsam.sharpness_aware(model)
    optimizer = keras_slsam.SLSAM(
        keras.optimizers.AdamW(3e-3), active_fraction=0.3, seed=0
    )
    model.compile(optimizer=optimizer)
    crops = photographs().reshape(2, 7, 32, 7, 32, 3).swapaxes(2, 3)
    crops, labels = crops.reshape(-1, 32, 32, 3), np.repeat([0, 1], 49)
    history = model.fit(crops, labels, batch_size=14, epochs=3, verbose=0).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
