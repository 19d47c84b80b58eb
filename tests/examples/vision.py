"""Small convolutional networks and a vision transformer in torch, with random weights: what torchvision's models are made of.

Each function is a reference for `qcompile compile tests/examples/vision.py:resnet ...`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _settled(module: nn.Module, size: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The module with batch-norm statistics of random images, and an example."""
    torch.manual_seed(0)
    module.train()
    with torch.no_grad():
        for _ in range(4):
            module(torch.randn(8, 3, size, size))
    return module.eval(), (torch.randn(2, 3, size, size),)


def _norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A basic block of ResNet. He et al., "Deep Residual Learning for Image Recognition" (2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _norm_conv(inputs, outputs, 3, stride)
        self.second = _norm_conv(outputs, outputs, 3)
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else _norm_conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


class ResNet(nn.Module):
    """A stem with max pooling, then three stages of residual blocks."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(_norm_conv(3, widths[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages = [Residual(a, b, 1 if a == b else 2) for a, b in zip((widths[0], *widths), widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(image)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project. Sandler et al., "MobileNetV2" (2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = nn.Sequential(_norm_conv(inputs, inner, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(_norm_conv(inner, inner, 3, stride, groups=inner), nn.ReLU6())
        self.project = _norm_conv(inner, outputs, 1)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """Inverted residuals between two pointwise ends."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(_norm_conv(3, 16, 3, 2), nn.ReLU6())
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 1),
            InvertedResidual(16, 24, 2),
            InvertedResidual(24, 24, 1),
            InvertedResidual(24, 40, 2),
        )
        self.tail = nn.Sequential(_norm_conv(40, 80, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(80, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.tail(self.blocks(self.stem(image))))


def resnet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A small ResNet for images of 48 x 48."""
    return _settled(ResNet(), 48)


def mobilenet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A small MobileNetV2 for images of 48 x 48."""
    return _settled(MobileNet(), 48)
