"""Parameters, gradients and moments in parts over the ranks (FSDP2). What is whole passes through every function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def shard(net: nn.Module) -> None:
    """Cut the parameters of each block of a list or sequence of blocks, and of what is around them, over the ranks.

    A block is whole on a device only while it computes. Every rank must hold the same weights before.
    """
    blocks = [m for parent in net.modules() if isinstance(parent, nn.ModuleList | nn.Sequential) for m in parent]
    for block in reversed(blocks):  # from the inside out
        if any(True for _ in block.parameters()):
            fully_shard(block)
    fully_shard(net)


def part(x: Tensor) -> Tensor:
    """This rank's part of it, the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(state: Any) -> Any:
    """The same tree with every tensor whole, in the host's memory. Every rank calls this."""
    return tree_map(lambda x: x.full_tensor().cpu() if isinstance(x, DTensor) else x, state)


def like(x: Tensor, own: Tensor) -> Tensor:
    """`x`, whole and the same on every rank, cut as `own` is and on its device."""
    x = x.to(own.device)
    return distribute_tensor(x, own.device_mesh, own.placements, src_data_rank=None) if isinstance(own, DTensor) else x


def cut(state: dict[str, Any], net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A checkpoint's whole weights, averages and moments, cut as those of `net` and `optimizer` are."""
    own, named = net.state_dict(), dict(net.named_parameters())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {k: like(v, params[i]) if isinstance(v, Tensor) and v.shape == params[i].shape else v for k, v in s.items()}
        for i, s in state["optimizer"]["state"].items()
    }
    return {
        **state,
        "net": {k: like(v, own[k]) for k, v in state["net"].items()},
        "average": {k: like(v, named[k]) for k, v in state["average"].items()},
        "optimizer": {**state["optimizer"], "state": moments},
    }
