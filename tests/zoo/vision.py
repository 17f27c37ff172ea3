"""Hand-written networks on images, as their papers give them, narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.specimen import Specimen

__all__ = ["SPECIMENS"]


def images(num_channels: int, size: int, batch_size: int = 4) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(batch_size, num_channels, size, size),)


class NatureCnn(nn.Module):
    """The network of Mnih et al. 2015: three convolutions, one hidden layer, a value per action."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 8, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(8, 16, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Any:
        return self.network(x / 255.0)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the sum with the identity comes before the second activation (He et al. 2016)."""

    expansion = 1

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inner, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide."""

    expansion = 4

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        outer = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inner, outer, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def shortcut(inner: int, outer: int, stride: int) -> nn.Module | None:
    """What brings a block's input to the shape of its output, where the shapes differ."""
    if stride == 1 and inner == outer:
        return None
    return nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))


class ResNet(nn.Module):
    """A stem, four stages of blocks, global pooling and a head."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.inner = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = [self.stage(block, width * 2**i, depth, 1 if i == 0 else 2) for i, depth in enumerate(depths)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inner, 10)

    def stage(self, block: Any, width: int, depth: int, stride: int) -> nn.Sequential:
        blocks = []
        for index in range(depth):
            blocks.append(block(self.inner, width, stride if index == 0 else 1))
            self.inner = width * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Any:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project without an activation (Sandler et al. 2018)."""

    def __init__(self, inner: int, outer: int, stride: int, expand: int, activation: type[nn.Module]) -> None:
        super().__init__()
        width = inner * expand
        self.use_residual = stride == 1 and inner == outer
        self.conv = nn.Sequential(
            conv_norm(inner, width, 1, activation=activation),
            conv_norm(width, width, 3, stride, groups=width, activation=activation),
            nn.Conv2d(width, outer, 1, bias=False),
            nn.BatchNorm2d(outer),
        )

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x) if self.use_residual else self.conv(x)


def conv_norm(
    inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, *, activation: type[nn.Module]
) -> nn.Sequential:
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outer), activation())


class MobileNet(nn.Module):
    """A stem, inverted residuals, a last 1x1 convolution and a head."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 8, 3, 2, activation=activation),
            InvertedResidual(8, 8, 1, 3, activation),
            InvertedResidual(8, 12, 2, 3, activation),
            InvertedResidual(12, 12, 1, 3, activation),
            conv_norm(12, 32, 1, activation=activation),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over channels last, Linear - GELU - Linear, layer scale (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return shortcut + (self.gamma * x).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, stride=4)
        self.blocks = nn.Sequential(ConvNextBlock(12), ConvNextBlock(12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class DoubleConv(nn.Sequential):
    """Twice a convolution, a norm and an activation."""

    def __init__(self, inner: int, outer: int) -> None:
        layers: list[nn.Module] = []
        for first, second in ((inner, outer), (outer, outer)):
            layers += [nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """Down, up by transposed convolutions, the two halves concatenated level by level (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(3, 8), DoubleConv(8, 16), DoubleConv(16, 24)
        self.pool = nn.MaxPool2d(2)
        self.up1, self.up2 = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.conv1, self.conv2 = DoubleConv(32, 16), DoubleConv(16, 8)
        self.outc = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        first = self.inc(x)
        second = self.down1(self.pool(first))
        x = self.up1(self.down2(self.pool(second)))
        x = self.up2(self.conv1(torch.cat([second, x], dim=1)))
        return self.outc(self.conv2(torch.cat([first, x], dim=1)))


class ConvAutoencoder(nn.Module):
    """Strided convolutions down, transposed ones with norm and activation up, a sigmoid-free last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Any:
        return self.decoder(self.encoder(x))


SPECIMENS = (
    Specimen("Nature CNN", "own", NatureCnn, lambda: (torch.rand(2, 4, 60, 60) * 255,)),
    Specimen("ResNet-18", "own", lambda: ResNet(BasicBlock, (2, 2, 2, 2), 6), images(3, 32)),
    Specimen("ResNet, bottlenecks", "own", lambda: ResNet(Bottleneck, (1, 1, 2, 1), 4), images(3, 32)),
    Specimen("MobileNet, ReLU6", "own", lambda: MobileNet(nn.ReLU6), images(3, 16)),
    Specimen("MobileNet, Hardswish", "own", lambda: MobileNet(nn.Hardswish), images(3, 16)),
    Specimen("ConvNeXt", "own", ConvNext, images(3, 16)),
    Specimen("U-Net", "own", UNet, images(3, 16, 2)),
    Specimen("convolutional autoencoder", "own", ConvAutoencoder, images(3, 16)),
)
