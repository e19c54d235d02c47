"""Networks by name, and what their normalisation does with a batch.

BatchNorm sees exactly the micro-batch (ghost batch norm). Its evaluation statistics are no by-product of
training: they are recomputed on a fixed set of training samples before each evaluation, so they depend on
neither the batch size nor the world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class ModelError(ValueError):
    """The network cannot be built as asked."""


def build(model: dict[str, Any], shape: tuple[int, int, int], classes: int, seed: int, freeze_last: bool) -> nn.Module:
    """The network of the `model` group of the config, its weights a function of `seed` alone.

    Args:
        model: `name` and the options of that network.
        shape: height, width, channels of an image.
        classes: number of logits.
        seed: of the initial weights.
        freeze_last: keep the last linear layer at its N(0, 0.01^2) initial values (VGG of the authors' code).

    Raises:
        ModelError: unknown name or option, or an image size that the network cannot take.
    """
    options = dict(model)
    name = options.pop("name")
    if name not in NETWORKS:
        raise ModelError(f"unknown model {name!r}; allowed: {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):  # torch's initialisers know only the global generator
        torch.manual_seed(seed)
        net = NETWORKS[name](shape, classes, **options)
        if freeze_last:
            last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
            nn.init.normal_(last.weight, 0.0, 0.01)
            nn.init.zeros_(last.bias)
            last.requires_grad_(False)
    for norm in _batch_norms(net):
        norm.momentum = 0.0  # training leaves the evaluation statistics alone
    return net.to(memory_format=torch.channels_last)


def _batch_norms(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


def has_batch_norm(net: nn.Module) -> bool:
    return bool(_batch_norms(net))


@torch.no_grad()
def recompute_statistics(net: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Set BN's running statistics to the mean over `batches` of each batch's mean and (unbiased) variance.

    Args:
        net: any network; without BN nothing happens.
        batches: images, each of the micro-batch's size, normalised as training does.

    Returns:
        The buffers, for the caller to average over ranks.
    """
    norms = _batch_norms(net)
    if not norms:
        return []
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over what follows
    net.train()
    for images in batches:
        net(images)
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()  # it has served; left alone it would tell how the work was split
    return [b for n in norms for b in (n.running_mean, n.running_var) if b is not None]


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
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(max(1, channels // 4), channels)
    raise ModelError(f"model.norm={kind!r}; allowed: batch, group")


def _cifar_resnet(depth: int, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> nn.Module:
    if width < 1:
        raise ModelError(f"model.width={width} must be >= 1")
    if depth == 8 and norm == "group" and width % 4:
        raise ModelError(f"model.width={width} must be a multiple of 4 with GroupNorm (groups of 4 channels)")
    return CifarResNet(depth, shape[2], classes, width, norm)


def _resnet8(shape: tuple[int, int, int], classes: int, width: int, norm: str) -> nn.Module:
    return _cifar_resnet(8, shape, classes, width, norm)


def _resnet20(shape: tuple[int, int, int], classes: int, width: int, norm: str) -> nn.Module:
    return _cifar_resnet(20, shape, classes, width, norm)


def _resnet56(shape: tuple[int, int, int], classes: int, width: int, norm: str) -> nn.Module:
    return _cifar_resnet(56, shape, classes, width, norm)


def _resnet50(shape: tuple[int, int, int], classes: int, norm: str) -> nn.Module:
    _only_batch_norm("resnet50", norm)
    import timm

    net = timm.create_model("resnet50", pretrained=False, num_classes=classes, in_chans=shape[2])
    net.conv1 = nn.Conv2d(shape[2], 64, 3, 1, 1, bias=False)  # CIFAR form: an image of 32 pixels keeps its resolution
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def _vgg16(shape: tuple[int, int, int], classes: int, width: int, norm: str) -> nn.Module:
    _only_batch_norm("vgg16", norm)
    if width < 1:
        raise ModelError(f"model.width={width} must be >= 1 (channels of the first layer; VGG-16 has 64)")
    if min(shape[:2]) < 32 or shape[2] != 3:
        raise ModelError(f"vgg16 takes 3 channels of at least 32 x 32 pixels (it halves them five times), not {shape}")
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers([c if isinstance(c, str) else c * width // 64 for c in cfgs["D"]], batch_norm=True)
    for m in features:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's VGG does
            m.bias = None  # BN subtracts it again: its gradient is pure rounding error, which Adam would amplify
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


def _only_batch_norm(name: str, norm: str) -> None:
    if norm != "batch":
        raise ModelError(f"model.norm={norm!r}: {name} comes with batch normalisation only")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": _resnet8,
    "resnet20": _resnet20,
    "resnet56": _resnet56,
    "resnet50": _resnet50,
    "vgg16": _vgg16,
}
