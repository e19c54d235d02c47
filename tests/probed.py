"""A training of one's own under NoiseProbes, on one process or several: python probed.py one|ddp|fsdp FILE."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from scaling_exps import NoiseProbe

PARTS, BATCH, WINDOW = 4, 32, 16


def main(kind: str, file: Path) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 11))
    model[1].bias.requires_grad_(False)
    net: nn.Module = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    if kind == "fsdp":
        for part in (model[1], model[4], model):
            fully_shard(part)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == large] for large in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3, betas=(0.5, 0.99)
    )
    how = {"batch": BATCH, "window": WINDOW}
    probes = [NoiseProbe(net, optimizer, method=m, **how) for m in ("free", "examples", "moments")]
    if kind != "fsdp":
        probes += [NoiseProbe(net, optimizer, metric=m, **how) for m in ("preconditioned", "sign")]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2 * WINDOW):
        tokens = torch.randint(11, (BATCH, 9), generator=generator).view(world, PARTS // world, -1, 9)[rank]
        for j, x in enumerate(tokens):
            last = j == len(tokens) - 1
            if kind == "fsdp":
                net.set_requires_gradient_sync(last)  # type: ignore[operator]
            with net.no_sync() if kind == "ddp" and not last else contextlib.nullcontext():  # type: ignore[operator]
                loss = nn.functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
                (loss / len(tokens)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for probe in probes:
        probe.detach()
    if rank == 0:
        file.write_text(json.dumps([probe.records for probe in probes]))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
