"""The residual networks for CIFAR-10 of He et al. 2015 (arXiv:1512.03385, section 4.2): 20 to 110 layers, or any 6n + 2.

It must not know of recipes, of training, or of files of weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lehr.errors import ModelError

DEPTHS = (20, 32, 44, 56, 110)
"""The depths in table 6 of the paper."""
SIDE = 32
"""Pixels of an image's side."""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the pixels of CIFAR-10's 50,000 training images in red, green and blue, as shares of 255, rounded. The paper
subtracts a mean for each pixel and divides by nothing.
"""


class _Block(nn.Module):
    """Two 3 x 3 convolutions and what they are added to (figure 2 of the paper; equation 1)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Where the block halves the image, the shortcut takes every second pixel and the new channels are zeros,
        half of them before the old ones and half behind: option A, which has no parameters.
        """
        inner = functional.relu(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        if self.more or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            before = self.more // 2
            x = functional.pad(x, (0, 0, 0, 0, before, self.more - before))
        return functional.relu(inner + x)


class _CifarResnet(nn.Module):
    """`conv1`, three rows of blocks `layer1` to `layer3`, the mean over positions, `linear`."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _row(blocks, 16, 16, 1)
        self.layer2 = _row(blocks, 16, 32, 2)
        self.layer3 = _row(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        answer: torch.Tensor = self.linear(x.mean((2, 3)))
        return answer


def cifar_resnet(depth: int, classes: int = 10) -> nn.Module:
    """The network of `depth` layers with weights, for images [N, 3, 32, 32] and answers [N, classes].

    A 3 x 3 convolution; three rows of n blocks of two 3 x 3 convolutions with 16, 32 and 64 channels on 32, 16
    and 8 pixels a side; the mean over positions and a linear layer. Shortcuts have no parameters (option A). Other
    sizes of images are taken as well.

    Weights begin normal with mean 0 and variance 2 / (inputs of a unit), biases at 0: equation 10 of He et al.
    2015b (arXiv:1502.01852), which section 4.2 of the paper adopts. Names are those of the published checkpoints
    of akamaster/pytorch_resnet_cifar10.

    Args:
        depth: 6n + 2 with n of at least 1: 8, 14, 20, ..., 110, ...
        classes: how many numbers it answers with.

    Raises:
        ModelError: for another depth.

    Example:
        >>> net = cifar_resnet(20)
        >>> round(sum(p.numel() for p in net.parameters()) / 1e6, 2)
        0.27
    """
    if depth < 8 or depth % 6 != 2:
        near = max(8, (depth - 2 + 3) // 6 * 6 + 2)
        raise ModelError(
            f"cifar_resnet: {depth} layers; expected 6n + 2, such as 20 or 110; the nearest is {near}"
        )
    net = _CifarResnet((depth - 2) // 6, classes)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(net.linear.bias)
    return net


def _row(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = _Block(inputs, outputs, stride)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))
