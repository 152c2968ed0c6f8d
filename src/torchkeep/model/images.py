"""Image models: small ones to train from scratch, and two under torchvision's parameter names, for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .text import Block

Stem = Literal["large", "small"]

_RESNET_WIDTHS = (64, 128, 256, 512)
_MOBILENET_STAGES = (  # widening, channels, repeats, first stride
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
_MOBILENET_WIDTH = 1280
_SMALL_IMAGE = 96  # pixels, below which a patch is 4 instead of 16


class ConvNet(nn.Module):
    """A small convolutional net: stages of two 3×3 convolutions with batch norm, halved in size between stages.

    Shapes:  float (B, C, H, W) → logits (B, K)
    """

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int] = (32, 64, 128), dropout: float = 0.1):
        super().__init__()
        stages: list[nn.Module] = []
        channels = in_channels
        for i, width in enumerate(widths):
            if i:
                stages.append(nn.MaxPool2d(2, ceil_mode=True))
            stages += [*_convolution(channels, width), *_convolution(width, width)]
            channels = width
        self.features = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.features(image).mean((2, 3))
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def _convolution(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class ResNet18(nn.Module):
    """Four stages of two residual blocks. Its state dict has the names and shapes of torchvision's resnet18.

    ``stem="small"`` is for images of up to about 64 pixels: a 3×3 convolution of stride 1 in place of the 7×7 one of
    stride 2 and the max pool, so that an image keeps its size until the second stage (He et al., §4.2).

    Shapes:  float (B, C, H, W) → logits (B, K)
    Raises:  ModelError for an unknown stem
    Source:  He et al. 2015, "Deep residual learning for image recognition", table 1; weights drawn as in He et al.
             2015, "Delving deep into rectifiers", §2.2
    """

    def __init__(self, in_channels: int, num_classes: int, stem: Stem = "large"):
        super().__init__()
        if stem not in get_args(Stem):
            expected = " or ".join(repr(name) for name in get_args(Stem))
            raise ModelError("there is no such stem", where="model.args.stem", got=repr(stem), expected=expected)
        is_large = stem == "large"
        size, stride = (7, 2) if is_large else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, _RESNET_WIDTHS[0], size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(_RESNET_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if is_large else nn.Identity()
        self.layer1 = _stage(_RESNET_WIDTHS[0], _RESNET_WIDTHS[0], stride=1)
        self.layer2 = _stage(_RESNET_WIDTHS[0], _RESNET_WIDTHS[1], stride=2)
        self.layer3 = _stage(_RESNET_WIDTHS[1], _RESNET_WIDTHS[2], stride=2)
        self.layer4 = _stage(_RESNET_WIDTHS[2], _RESNET_WIDTHS[3], stride=2)
        self.fc = nn.Linear(_RESNET_WIDTHS[3], num_classes)
        _draw_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a way around them, projected by a 1×1 one where size or width change.

    Shapes:  float (B, C_in, H, W) → (B, C_out, H / stride, W / stride), rounded up
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = _projection(c_in, c_out, stride) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.downsample is None else self.downsample(x)
        through = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(through + around)
        return activated


def _projection(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


def _stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(c_in, c_out, stride), ResidualBlock(c_out, c_out, stride=1))


class MobileNetV2(nn.Module):
    """Inverted residuals: widened, convolved channel by channel, narrowed. Named as torchvision's mobilenet_v2.

    Shapes:  float (B, C, H, W) → logits (B, K)
    Source:  Sandler et al. 2018 (arXiv 1801.04381), table 2
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.2):
        super().__init__()
        channels = 32
        stages: list[nn.Module] = [_capped(in_channels, channels, 3, stride=2)]
        for widening, width, repeats, first_stride in _MOBILENET_STAGES:
            for i in range(repeats):
                stages.append(InvertedResidual(channels, width, first_stride if i == 0 else 1, widening))
                channels = width
        self.features = nn.Sequential(*stages, _capped(channels, _MOBILENET_WIDTH, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(_MOBILENET_WIDTH, num_classes))
        _draw_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(image).mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """Shapes:  float (B, C_in, H, W) → (B, C_out, H / stride, W / stride), rounded up"""

    def __init__(self, c_in: int, c_out: int, stride: int, widening: int):
        super().__init__()
        hidden = c_in * widening
        self.conv = nn.Sequential(
            *([_capped(c_in, hidden, 1)] if widening > 1 else []),
            _capped(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.has_way_around = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        through: Tensor = self.conv(x)
        return x + through if self.has_way_around else through


def _capped(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


class VisionTransformer(nn.Module):
    """A small pre-norm transformer over patches, with a learned position for each, and a mean over them at its end.

    ``patch`` is a patch's side in pixels; without it 16, or 4 for images below 96 pixels.

    Shapes:  float (B, C, S, S), S being ``image_size`` → logits (B, K)
    Raises:  ModelError where the image does not part into patches, or the width into heads
    Source:  Dosovitskiy et al. 2021 (arXiv 2010.11929); the mean in place of a class token: Beyer et al. 2022
             (arXiv 2205.01580)
    """

    def __init__(
        self, in_channels: int, num_classes: int, image_size: int, patch: int | None = None, width: int = 192,
        depth: int = 6, heads: int = 3, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        patch = patch or (4 if image_size < _SMALL_IMAGE else 16)
        if image_size % patch or width % heads:
            raise ModelError(
                f"this {'image' if image_size % patch else 'width'} does not part evenly", where="VisionTransformer",
                got=f"image_size {image_size}, patch {patch}, width {width}, heads {heads}",
                expected="a side that the patch divides, a width that the heads divide",
            )  # fmt: skip
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x_BTC = self.patches(image).flatten(2).transpose(1, 2)
        x_BTC = self.dropout(x_BTC + self.positions)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits: Tensor = self.head(self.norm(x_BTC).mean(1))
        return logits


def _draw_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
