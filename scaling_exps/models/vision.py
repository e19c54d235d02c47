"""Networks for images, by name: (B, C, H, W) -> logits (B, classes)."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_FORM = 64  # pixels up to which ResNet-50 has its CIFAR form: a 3x3 stem and no max-pool


class ModelError(ValueError):
    """The network cannot be built as asked."""


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, outside)
        self.stride, self.grow = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.grow or self.stride > 1:  # option A of He et al.: subsample and pad channels, no parameters
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: depth 6n + 2, three stages of width w, 2w, 4w."""

    def __init__(self, depth: int, channels: int, classes: int, width: int, norm: str) -> None:
        super().__init__()
        blocks, inside = [], width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                outside = width * 2**stage
                blocks.append(_Block(inside, outside, 2 if stage and i == 0 else 1, norm))
                inside = outside
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = _norm(norm, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels // 4, channels)


def resnet50(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """timm's ResNet-50; for images of up to 64 pixels in CIFAR form."""
    import timm

    net = timm.create_model("resnet50", pretrained=False, num_classes=classes, in_chans=shape[2])
    if min(shape[:2]) > CIFAR_FORM:
        return net
    net.conv1 = nn.Conv2d(shape[2], 64, 3, 1, 1, bias=False)  # CIFAR form: an image of 32 pixels keeps its resolution
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def vgg16(shape: tuple[int, int, int], classes: int, width: int, norm: str) -> nn.Module:
    """torchvision's vgg16_bn features at `width` channels of the first layer (64), and one linear layer.

    norm: batch, or group: GroupNorm in groups of 4 channels in the place of each BatchNorm.

    Raises:
        ModelError: images below 32 pixels, or not of 3 channels.
    """
    if min(shape[:2]) < 32 or shape[2] != 3:
        raise ModelError(f"vgg16 takes 3 channels of at least 32 x 32 pixels (it halves them five times), not {shape}")
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers([c if isinstance(c, str) else c * width // 64 for c in cfgs["D"]], batch_norm=True)
    for i, m in enumerate(features):
        if isinstance(m, nn.BatchNorm2d):
            features[i] = _norm(norm, m.num_features)
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's VGG does
            m.bias = None  # BN subtracts it again: its gradient is pure rounding error, which Adam would amplify
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


def timm_network(shape: tuple[int, int, int], classes: int, name: str, options: dict[str, Any]) -> nn.Module:
    """Any network of timm, untrained."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ModelError(f"model.name={name!r} is no network of timm{hint} (timm.list_models() has all)")
    try:
        return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=shape[2], **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise ModelError(f"timm cannot make {name!r} with model.options={options}: {type(e).__name__}: {e}") from e
