"""Networks by name, and what their normalisation does with a batch.

BatchNorm sees exactly the micro-batch (ghost batch norm). Its evaluation statistics are no by-product of
training: they are recomputed on a fixed set of training samples before each evaluation, so they depend on
neither the batch size nor the world size.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scaling_exps.config import GPT, VGG16, Custom, Dataset, Model, ResNet, ResNet50, Roberta, Timm, TokenDataset
from scaling_exps.models import language, vision
from scaling_exps.models.vision import ModelError
from scaling_exps.sources import need

__all__ = ["ModelError", "build", "has_batch_norm", "load_weights", "recompute_statistics"]


def build(model: Model, dataset: Dataset, seed: int, freeze_last: bool = False) -> nn.Module:
    """The network for what `dataset` holds, its weights a function of `seed` alone.

    `freeze_last` draws the last linear layer anew from N(0, 0.01^2) and keeps it there (VGG of the authors' code).

    Raises:
        ModelError: an image size that the network cannot take, a factory that fails, no linear layer to freeze, or
            another normalisation than `model.norm` says.
    """
    with torch.random.fork_rng(devices=[]):  # torch's initialisers know only the global generator
        torch.manual_seed(seed)
        net = _network(model, dataset)
        if freeze_last:
            last = next((m for m in reversed([*net.modules()]) if isinstance(m, nn.Linear)), None)
            if last is None:
                raise ModelError(f"recipe.freeze_last=true: model {model.name} has no linear layer; use false")
            nn.init.normal_(last.weight, 0.0, 0.01)
            if last.bias is not None:
                nn.init.zeros_(last.bias)
            last.requires_grad_(False)
    if has_batch_norm(net) != model.normalises_over_batch:
        has = "normalises over the batch" if has_batch_norm(net) else "has no batch normalisation"
        raise ModelError(
            f"model.norm={model.norm}, but {model.name} {has}: the plan would treat the micro-batch wrongly. "
            f"Use model.norm={'batch' if has_batch_norm(net) else 'layer'}, or another network"
        )
    for layer in _batch_norms(net):
        layer.momentum = 0.0  # training leaves the evaluation statistics alone
    return net if isinstance(dataset, TokenDataset) else net.to(memory_format=torch.channels_last)


def load_weights(net: nn.Module, file: Path) -> None:
    """Give the network the weights of a file: safetensors, a state_dict that torch saved, or a checkpoint of ours.

    Of a checkpoint those that evaluations saw: the average, where the recipe has one.

    Raises:
        ModelError: the file holds none, or those of another network.
    """
    try:
        if file.suffix == ".safetensors":
            held = need("safetensors.torch", "recipe.start_from").load_file(file)
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
            held = {**held["net"], **held.get("average", {})} if isinstance(held.get("net"), dict) else held
        held = {name: torch.as_tensor(value) for name, value in held.items()}
    except Exception as e:  # a damaged archive, a pickle of other things: each fails in its own way
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise ModelError(f"recipe.start_from: {str(file)!r} holds no weights that can be read ({reason})") from e
    own = net.state_dict()
    there = {own[name].data_ptr() for name in held if name in own}  # a tied weight has two names and is saved once
    faults = {
        "not in the file": [n for n, v in own.items() if n not in held and v.data_ptr() not in there],
        "not in the network": [n for n in held if n not in own],
        "of another shape": [
            f"{n} {tuple(held[n].shape)} in the file, {tuple(v.shape)} in the network"
            for n, v in own.items()
            if n in held and held[n].shape != v.shape
        ],
    }
    if wrong := [f"{what}: {_first(names)}" for what, names in faults.items() if names]:
        raise ModelError(
            f"recipe.start_from: {str(file)!r} does not fit the network. {'; '.join(wrong)}. Choose the network and "
            "the data set that it was trained with"
        )
    net.load_state_dict(held, strict=False)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _network(model: Model, dataset: Dataset) -> nn.Module:
    if isinstance(dataset, TokenDataset):
        vocab = dataset.vocab + (dataset.mask > 0)  # one id more, for the mask
        if isinstance(model, GPT | Roberta):
            return language.network(model, vocab, dataset.context)
        return _from_factory(model, vocab=vocab, context=dataset.context)
    height, width, channels = dataset.shape
    shape, classes = (height, width, channels), dataset.classes
    match model:
        case ResNet():
            return vision.CifarResNet(model.depth, channels, classes, model.width, model.norm)
        case ResNet50():
            return vision.resnet50(shape, classes)
        case VGG16():
            return vision.vgg16(shape, classes, model.width, model.norm)
        case Timm():
            return vision.timm_network(shape, classes, model.name, model.options)
    return _from_factory(model, shape=shape, classes=classes)


def _from_factory(model: Model, **what: Any) -> nn.Module:
    """What the user's own function returns."""
    assert isinstance(model, Custom), "the plan refuses data that a network cannot read"
    module, _, function = (model.factory or "").partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    options = {**what, **model.options}
    found: Any = None
    try:
        found = importlib.import_module(module)
        found = getattr(found, function)
        net = found(**options)
    except Exception as e:  # whatever the user's code raises
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise ModelError(
            f"model.factory={model.factory}({given}) failed: {type(e).__name__}: {e}{_has(found, e)}"
        ) from e
    if not isinstance(net, nn.Module):
        raise ModelError(f"model.factory={model.factory} returned {type(net).__name__}, not a torch.nn.Module")
    return net


def _has(found: Any, error: Exception) -> str:
    """What one would look up next: the functions of a module that lacks the one asked for, what a factory takes."""
    if isinstance(found, ModuleType):
        own = [k for k, v in vars(found).items() if callable(v) and getattr(v, "__module__", "") == found.__name__]
        return f"; it has {', '.join(own) or 'no function'}"
    with contextlib.suppress(ValueError, TypeError):  # of what is written in C nothing is known
        if isinstance(error, TypeError) and found is not None:
            return f"; it takes {inspect.signature(found)}, of which model.options={{KEY:VALUE}} gives what is missing"
    return ""


def _batch_norms(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


def has_batch_norm(net: nn.Module) -> bool:
    return bool(_batch_norms(net))


@torch.no_grad()
def recompute_statistics(net: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Set BN's running statistics to the mean over `batches` of each batch's mean and (unbiased) variance.

    `batches` are images, each of the micro-batch's size, normalised as training does; not read where there is no BN.
    Returns the buffers, for the caller to average over ranks.
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
            norm.num_batches_tracked.zero_()  # reset: it depends on how batches were split over ranks
    return [b for n in norms for b in (n.running_mean, n.running_var) if b is not None]
