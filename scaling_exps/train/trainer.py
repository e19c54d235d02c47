"""The state of one run on one rank, and its step.

step k:   g = Σ_i w_i ∇L_i over the micro-batches of its draws   (plain: w_i = 1/n; SVAG: r1/n and r2/n)
          g <- g · min(1, c/|g|), where the recipe clips
          θ, moments <- optimizer(g, η · multiplier(middle of the step))
          θ̄ <- ρ θ̄ + (1 - ρ) θ, where it averages: what evaluations see
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling_exps import data, models, optim, rules, sources
from scaling_exps.noise import estimators
from scaling_exps.plan import RunSpec, Stage
from scaling_exps.rules.scale import carry
from scaling_exps.train import ranks


class TrainError(ValueError):
    """The run cannot go on; the message is the reason that `status` shows."""


class DivergedError(TrainError):
    """The loss or a gradient is not finite: the end of this recipe, which the report counts as a result."""


def mean_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats over every target that is not hidden: (B, C), (B,) or (B, T, V), (B, T)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def build_net(spec: RunSpec) -> nn.Module:
    s = spec.science
    net = models.build(s.model, s.dataset, s.seed, s.freeze_last)
    if spec.start_from is not None and s.start is not None:
        if sources.weights(spec.start_from) != s.start:
            raise TrainError(f"recipe.start_from={spec.start_from}: its content is not what the run was planned with")
        models.load_weights(net, sources.weights_file(spec.start_from))
    return net


class Trainer:
    """The state of one run on one rank.

    Raises:
        TrainError: the group has another number of processes than the run.
        data.DataError, models.ModelError: the data or the network cannot be had, or the data is not the plan's.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.science = spec, spec.science
        s = self.science
        self.world, self.rank = ranks.world()
        self.before = self.world  # the processes that wrote the checkpoint which it goes on from
        if self.world != spec.placement.world_size:
            raise TrainError(f"run.json asks for {spec.placement.world_size} processes, and {self.world} run")
        self.device = ranks.device()
        self.net = build_net(spec).to(self.device)
        if spec.placement.compile:  # kernels chosen by rule, not by timing: a resumed run must get the same ones
            os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        net = torch.compile(self.net) if spec.placement.compile else self.net
        self.forward: nn.Module = (
            nn.parallel.DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True)
            if self.world > 1
            else net  # type: ignore[assignment]
        )
        with ranks.first():  # rank 0 converts raw data, the others read what it wrote
            data.check_content(s.dataset, s.content, spec.dataset_path)
            self.stream = data.stream(s.dataset, spec.dataset_path, s.seed, self.device)
        self.optimizer = optim.build(s.optimizer, self.net.parameters(), s.hyper)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        named = self.net.named_parameters() if s.ema is not None else ()
        self.average = {name: p.detach().clone() for name, p in named if p.requires_grad}  # θ̄
        self.norm = torch.zeros((), device=self.device)  # of the newest step's gradient, where it is clipped
        self.free: estimators.Free | None = None
        self.step = 0
        self.enter(s.stages[0])
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this rank, since the last record
        self.loss_count = 0
        self.first_bad = torch.full((), torch.inf, device=self.device)  # first step that was not finite
        self._no_scaling = torch.ones((), device=self.device)
        self.seconds = 0.0  # spent training, evaluation and restarts excluded
        self._started = time.monotonic()

    def enter(self, stage: Stage) -> None:
        """Take the steps of this stage from now on; hyperparameters and state of the optimizer are as they are."""
        self.stage = stage
        self.per_draw = stage.batch // stage.micro_batch // self.world  # micro-batches a draw on this rank
        self.weights = [r / self.per_draw for r in rules.svag_weights(self.science.svag, self.science.family)]
        weights = [w for w in self.weights for _ in range(self.per_draw)]  # of the micro-batches of a step
        if self.free is not None:
            self.free.listening = False  # what it heard of another batch is not counted
        if self.spec.noise != "none":
            self.free = estimators.Free(self.parameters, weights, stage.micro_batch, self.world)

    def _switch(self, stage: Stage) -> None:
        """Go over to another batch: hyperparameters, moments and step count move as `scale` moves them."""
        before = self.stage
        move = rules.Move(before.batch, stage.batch, noise_scale=stage.noise_scale)
        carry(self.optimizer, [(before.hyper, stage.hyper)], move, stage.carries)
        self.enter(stage)

    def train_step(self) -> None:
        """One optimizer step.

        Raises:
            DivergedError: the loss or a gradient is not finite; on a GPU `check_finite` raises it later. In both cases
                the update is not made.
        """
        s = self.science
        if (stage := s.at(self.step)) != self.stage:
            self._switch(stage)
        self.optimizer.zero_grad()  # here and not after the step: records read its gradient
        last = len(self.weights) * self.per_draw - 1
        loss_sum = torch.zeros((), device=self.device)
        for j in range(last + 1):
            start, stop = self._slice(self.step, j)
            x, y = self.stream.batch(start, stop)  # (m, C, H, W), (m,); of tokens (m, T), (m, T)
            if j < last or self.step + 1 < s.steps:
                self.stream.prefetch(*(self._slice(self.step, j + 1) if j < last else self._slice(self.step + 1, 0)))
            self.seed_dropout("dropout", start)
            with self._reduce(j == last):
                with self.autocast():
                    loss = mean_loss(self.forward(x), y)
                (loss * self.weights[j // self.per_draw]).backward()
            loss_sum += loss.detach()
            if self.free is not None:
                self.free.micro_batch(j)
        if self.free is not None:
            self.free.step()
        self.loss_sum += loss_sum
        self.loss_count += last + 1
        if stage.clip is not None:
            self.norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._watch(loss_sum + self.norm)
        if stage.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, stage.clip, self.norm)
        share = s.schedule.multiplier(s.clock(self.step + 0.5))
        for group in self.optimizer.param_groups:
            group["lr"] = stage.hyper.lr * share
        self.optimizer.step()
        if stage.ema is not None:
            torch._foreach_lerp_([*self.average.values()], [p.detach() for p in self.parameters], 1 - stage.ema)
        self.step += 1

    def _watch(self, loss_sum: Tensor) -> None:
        """Note whether loss and gradients are finite, and keep the optimizer from a step where they are not.

        A fused optimizer on a GPU skips its update by `found_inf`, so the host never waits; elsewhere the host looks.
        """
        found_inf = torch.zeros((), device=self.device)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self._no_scaling)
        bad = found_inf.bool() | ~loss_sum.isfinite()
        torch.minimum(self.first_bad, torch.where(bad, float(self.step), torch.inf), out=self.first_bad)
        if self.device.type == "cuda" and self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (self.first_bad <= self.step).float()  # type: ignore[attr-defined]
        else:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise DivergedError if a step so far was not finite."""
        if (bad := float(self.first_bad)) != torch.inf:
            raise DivergedError(
                f"the loss or a gradient is not finite at step {bad:.0f} ({self.science.samples(int(bad))} samples): "
                "the run stops before that update. Lower the learning rate or lengthen the warm-up"
            )

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """In here the network has the averaged weights, where the recipe averages them."""
        if not self.average:
            yield
            return
        weights: list[Tensor] = [*self.parameters]
        own = [p.clone() for p in weights]
        torch._foreach_copy_(weights, [*self.average.values()])
        try:
            yield
        finally:
            torch._foreach_copy_(weights, own)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here is not counted as training."""
        if self.device.type == "cuda":  # its steps are only queued; the wait belongs to them
            torch.cuda.synchronize(self.device)
        self.seconds += time.monotonic() - self._started
        try:
            yield
        finally:
            self._started = time.monotonic()

    @property
    def rate(self) -> float:
        """Samples a second of training so far."""
        return self.science.samples(self.step) / max(self.seconds, 1e-9)

    def _slice(self, step: int, j: int) -> tuple[int, int]:
        """Where micro-batch j of a step, counted over its draws on this rank, begins and ends in the stream."""
        stage = self.science.at(step)
        per_draw = stage.batch // stage.micro_batch // self.world
        draw, i = divmod(j, per_draw)
        start = self.science.samples(step) + draw * stage.batch + (self.rank * per_draw + i) * stage.micro_batch
        return start, start + stage.micro_batch

    def _reduce(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are reduced over ranks once a step, with its last micro-batch."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not now:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def seed_dropout(self, purpose: str, start: int) -> None:
        """What the network itself draws is a function of (seed, the micro-batch's place in the stream).

        Dropout knows only torch's generator of the device, so that one is set; nothing else draws from it.
        """
        cpu = self.device.type == "cpu"
        generator = torch.default_generator if cpu else torch.cuda.default_generators[self.device.index]
        generator.manual_seed(data.key(self.science.seed, f"{purpose}/{start}"))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.science.precision == "bfloat16")

    def record(self, kind: str, **metrics: Any) -> dict[str, Any]:
        """A record of this moment; it raises as `check_finite` does."""
        self.check_finite()
        s = self.science
        t = sum(rules.continuous_time(stage.hyper, int(n), s.family) for stage, n in s.spent(self.step))
        return {"kind": kind, "step": self.step, "samples": s.samples(self.step), "t": t, **metrics}

    def train_record(self) -> dict[str, Any]:
        """Mean loss of the samples since the last record, over all ranks; what they were trained with."""
        count = self.loss_count * self.world
        norm = self.norm  # before it was clipped
        if self.science.clip is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        row = {
            "loss": float(ranks.total(self.loss_sum)) / count,
            "window": count * self.stage.micro_batch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": float(norm),
            "seconds": round(self.seconds, 3),
        }
        if self.science.ramp:
            row["batch"] = self.stage.batch
        self.loss_sum.zero_()
        self.loss_count = 0
        return self.record("train", **row)
