"""Networks by name, and what their normalisation does with a batch.

BatchNorm sees exactly the micro-batch (ghost batch norm). Its evaluation statistics are no by-product of
training: they are recomputed on a fixed set of training samples before each evaluation, so they depend on
neither the batch size nor the world size.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scaling_exps.models import language, vision
from scaling_exps.models.contract import ModelError

__all__ = ["ModelError", "build", "has_batch_norm", "recompute_statistics"]

NORMS = ("batch", "group", "layer", "none")  # what model.norm may say


def build(model: dict[str, Any], dataset: dict[str, Any], seed: int, freeze_last: bool = False) -> nn.Module:
    """The network of the `model` group of the config, its weights a function of `seed` alone.

    Args:
        model: `name` and the options of that network; or `library: timm`; or `factory: package.module:function`.
        dataset: the `dataset` group: what the network reads and predicts.
        seed: of the initial weights.
        freeze_last: keep the last linear layer at its N(0, 0.01^2) initial values (VGG of the authors' code).

    Raises:
        ModelError: unknown name or option, a data set or image size that the network cannot take, a factory that
            fails, or another normalisation than `model.norm` says.
    """
    with torch.random.fork_rng(devices=[]):  # torch's initialisers know only the global generator
        torch.manual_seed(seed)
        net = _network(model, dataset)
        if freeze_last:
            last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
            nn.init.normal_(last.weight, 0.0, 0.01)
            nn.init.zeros_(last.bias)
            last.requires_grad_(False)
    norm = model.get("norm")
    if norm not in NORMS:
        raise ModelError(f"model.norm={norm!r}; allowed: {', '.join(NORMS)}")
    if has_batch_norm(net) != (norm == "batch"):
        has = "normalises over the batch" if has_batch_norm(net) else "has no batch normalisation"
        raise ModelError(
            f"model.norm={norm}, but {model['name']} {has}: the plan would treat the micro-batch wrongly. "
            f"Use model.norm={'batch' if has_batch_norm(net) else 'layer'}, or another network"
        )
    for layer in _batch_norms(net):
        layer.momentum = 0.0  # training leaves the evaluation statistics alone
    return net.to(memory_format=torch.channels_last) if "shape" in dataset else net


def _network(model: dict[str, Any], dataset: dict[str, Any]) -> nn.Module:
    options = dict(model)
    name = options.pop("name")
    images = dataset["kind"] != "tokens"
    shape, classes = tuple(dataset.get("shape", ())), dataset.get("classes", 0)
    vocab = 0 if images else dataset["vocab"] + (dataset["mask"] > 0)  # one id more, for the mask
    if "factory" in options:
        what = {"shape": shape, "classes": classes} if images else {"vocab": vocab, "context": dataset["context"]}
        return _made(options["factory"], {**what, **options["options"]})
    if name in language.NETWORKS and not images:
        options.pop("norm")
        return language.network(name, vocab, {**options, "context": options["context"] or dataset["context"]})
    if name in language.NETWORKS or not images:
        kind, other = ("images", "tokens") if images else ("tokens", "images")
        raise ModelError(
            f"model {name!r} reads {other}, and dataset {dataset['name']!r} has {kind}; networks that read {kind}: "
            + ", ".join(vision.NETWORKS if images else language.NETWORKS)
        )
    if options.get("library") == "timm":
        return vision.timm_network(shape, classes, name, options["options"])
    if name not in vision.NETWORKS:
        raise ModelError(f"unknown model {name!r}; allowed: {', '.join([*vision.NETWORKS, *language.NETWORKS])}")
    return vision.NETWORKS[name](shape, classes, **options)


def _made(factory: str, options: dict[str, Any]) -> nn.Module:
    """What the user's own function returns."""
    module, _, function = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not module or not function:
        raise ModelError(f"model.factory={factory!r}; give package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        call: Callable[..., Any] = getattr(importlib.import_module(module), function)
        net = call(**options)
    except Exception as e:  # whatever the user's code raises
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise ModelError(f"model.factory={factory}({given}) failed: {type(e).__name__}: {e}") from e
    if not isinstance(net, nn.Module):
        raise ModelError(f"model.factory={factory} returned {type(net).__name__}, not a torch.nn.Module")
    return net


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
