"""The small convolutional network of the built-in job, for 8 x 8 grey digits: about 75,000 parameters."""

from __future__ import annotations

from torch import nn

MEAN, STD = 0.3, 0.37
"""Of the pixels of all digits, as shares of white, rounded."""


def digits_net(classes: int) -> nn.Sequential:
    """A network for images [N, 1, 8, 8] and answers [N, classes].

    `stem`, three `blocks` of 3 x 3 convolutions, the mean over positions, a linear `head`.

    Example:
        >>> import torch
        >>> digits_net(5)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 5])
    """
    net = nn.Sequential()
    net.add_module("stem", _convolution(1, 24))
    net.add_module(
        "blocks",
        nn.Sequential(
            _convolution(24, 48), nn.Sequential(nn.MaxPool2d(2), *_convolution(48, 48)), _convolution(48, 96)
        ),
    )
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("head", nn.Linear(96, classes))
    return net


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
