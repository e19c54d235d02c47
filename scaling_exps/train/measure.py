"""What is measured at the current weights: the test set, and the gradient noise. Training does not notice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scaling_exps import data, models
from scaling_exps.noise import estimators
from scaling_exps.noise.state import preconditioners
from scaling_exps.plan import RunSpec
from scaling_exps.train import ranks, shards
from scaling_exps.train.trainer import Trainer, build_net, mean_loss

EVALUATION_BATCH = 250  # test images at once; no result depends on it


def marks(spec: RunSpec, step: int, count: int) -> int:
    """How many of `count` marks have been passed after `step` steps.

    They are evenly spaced in samples and lie on steps of plain training: at the same t for every SVAG l.
    """
    s = spec.science
    return s.samples(step // s.stretch * s.stretch) * count // s.samples(s.steps)


def crosses(spec: RunSpec, step: int, count: int) -> bool:
    """Whether this step ends at a mark."""
    return marks(spec, step, count) > marks(spec, step - 1, count)


def evaluate(t: Trainer) -> dict[str, Any]:
    """Test loss in nats of the current weights, and accuracy (images) or perplexity and bits per byte (tokens).

    Each rank takes its share of the test set. Where the recipe averages the weights, it is of their average.
    """
    with torch.no_grad(), t.averaged():
        return _evaluate(t)


def _evaluate(t: Trainer) -> dict[str, Any]:
    s, net = t.science, t.net
    if models.has_batch_norm(net):
        statistics = t.stream.sibling(0, "statistics")  # the same samples for every seed and batch size
        n = -(-s.statistics_samples // s.micro_batch)  # micro-batches, over all ranks
        share = range(t.rank, n, t.world)
        batches = (statistics.batch(i * s.micro_batch, (i + 1) * s.micro_batch)[0] for i in share)
        with t.autocast():
            buffers = models.recompute_statistics(net, batches)
        for b in buffers:
            b.copy_(ranks.total(b.double() * len(share)) / n)
    net.eval()
    tokens = isinstance(t.stream, data.TokenStream)
    sums = torch.zeros(3, dtype=torch.float64, device=t.device)  # loss, correct, count
    size, at_once = t.stream.test_size, min(s.micro_batch, EVALUATION_BATCH) if tokens else EVALUATION_BATCH
    for begin in range(0, size, t.world * at_once):
        start = begin + t.rank * at_once
        idle = start >= size
        if idle and not t.sharded:  # else a forward pass needs every rank
            break
        start *= not idle
        x, y = t.stream.test_batch(start, min(start + at_once, size))
        with t.autocast():
            logits = net(x)
        if idle:
            break
        loss = mean_loss(logits.float(), y, reduction="sum")
        correct = 0 * loss if tokens else (logits.argmax(1) == y).sum()
        sums += torch.stack([loss, correct, (y >= 0).sum()]).double()
    net.train()
    if t.sharded:
        net.reshard()  # type: ignore[operator]  # what is around the blocks stays whole until a backward pass
    total, correct, count = ranks.total(sums).tolist()
    mean = total / count
    weight_norm = float(t.total_norm([p.detach() for p in net.parameters()]))
    moved = {"displacement": displacement(t)} if t.step == s.steps else {}
    if not isinstance(t.stream, data.TokenStream):
        return t.record("eval", loss=mean, accuracy=correct / count, weight_norm=weight_norm, **moved)
    metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "weight_norm": weight_norm} | moved
    if not t.stream.hidden:
        metrics["bits_per_byte"] = mean / math.log(2) / t.stream.bytes_per_token
    return t.record("eval", **metrics)


@torch.no_grad()
def displacement(t: Trainer) -> float:
    """|θ − θ_0|: how far training has come from the weights that the seed begins with, which are built anew."""
    begun, part = build_net(t.spec).parameters(), shards.part
    pairs = [(p, q) for p, q in zip(t.net.parameters(), begun, strict=True) if p.requires_grad]
    return float(t.total_norm([part(p).float() - part(shards.like(q, p)).float() for p, q in pairs]))


def noise_records(t: Trainer, number: int) -> list[dict[str, Any]]:
    """Gradient noise of the steps since the last record (free), and of examples of its own (full).

    The latter are a function of the seed and `number`, which of the run's measurements this is.
    """
    spec, rows = t.spec, []
    if t.free is not None and (t.free.able or spec.noise == "free"):
        estimate = t.free.estimate(ranks.total).record(t.stage.batch)
        rows.append(t.record("noise", method="free", batch=t.stage.batch, **estimate))
    if spec.noise == "full":
        rows.append(full_noise(t, number))
    return rows


def full_noise(t: Trainer, number: int) -> dict[str, Any]:
    """A full noise record at the current weights, BN as in training; buffers, `.grad` and stream stay as they are."""
    s, unit, n = t.science, t.spec.noise_unit, t.spec.noise_examples
    stream, first = t.stream.sibling(s.seed, "noise"), number * n
    named = {k: p for k, p in t.net.named_parameters() if p.requires_grad}
    losses: list[Tensor] = []
    buffers = [(b, b.clone()) for b in t.net.buffers()]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with t.autocast():
            return mean_loss(t.net(x), y)

    def loss_at(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with t.autocast():
            return mean_loss(torch.func.functional_call(t.net, p, (x,)), y)

    def blocks(units: range) -> Iterator[Tensor]:
        if unit == 1 and not models.has_batch_norm(t.net):
            t.seed_dropout("noise", first + units.start)
            return estimators.example_gradients(
                loss_at, named, lambda a, b: stream.batch(first + a, first + b), units, losses
            )

        def batch(i: int) -> tuple[Tensor, Tensor]:
            t.seed_dropout("noise", first + i * unit)
            return stream.batch(first + i * unit, first + (i + 1) * unit)

        return estimators.unit_gradients(loss, list(named.values()), batch, units, losses)

    scales = [p.flatten() for _, p in preconditioners(t.optimizer)]
    scale = torch.cat(scales) if len(scales) == len(named) else None
    template = torch.cat([p.detach().flatten() for p in named.values()])  # (P,)
    if t.free is not None:
        t.free.listening = False
    estimates = estimators.full(
        blocks, n // unit, unit, [None] if scale is None else [None, scale], template,
        world=t.world, rank=t.rank, reduce=ranks.total,
    )  # fmt: skip
    if t.free is not None:
        t.free.listening = t.free.able
    for buffer, before in buffers:
        buffer.copy_(before)
    own = torch.stack([v.double() for v in losses]).sum() if losses else torch.zeros_like(template[0]).double()
    fields = estimates[0].record(t.stage.batch)
    if scale is not None:
        preconditioned = estimates[1].record(t.stage.batch)
        fields |= {f"preconditioned_{k}": v for k, v in preconditioned.items() if k not in ("units", "examples")}
    train_loss, weight_norm = float(ranks.total(own)) * unit / n, float(template.norm())
    return t.record(
        "noise", method="full", batch=t.stage.batch, **fields, train_loss=train_loss, weight_norm=weight_norm
    )
