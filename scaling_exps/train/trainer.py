"""The state of one run on one rank: its step, its records, its checkpoints.

step k:   g = Σ_i w_i ∇L_i over the micro-batches of its draws   (plain: w_i = 1/n; SVAG: r1/n and r2/n)
          θ, moments <- optimizer(g, η · multiplier(middle of the step))
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling_exps import data, models, noise, optim, rules
from scaling_exps.plan import RunSpec
from scaling_exps.train import ranks

EVALUATION_BATCH = 250  # test images at once; no result depends on it


class TrainError(RuntimeError):
    """The run cannot go on; the message is the reason that `status` shows."""


def mean_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats over every target that is not hidden: (B, C), (B,) or (B, T, V), (B, T)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def build_net(spec: RunSpec) -> nn.Module:
    s = spec.science
    return models.build(s.model, s.dataset, s.seed, s.freeze_last)


def family(name: str) -> rules.Family:
    return "adaptive" if name == "adaptive" else "sgd"


def marks(spec: RunSpec, step: int, count: int) -> int:
    """How many of `count` marks have been passed after `step` steps.

    They are evenly spaced in samples and lie on steps of plain training: at the same t for every SVAG l.
    """
    return step // spec.stretch * count // (spec.science.steps // spec.stretch)


def crosses(spec: RunSpec, step: int, count: int) -> bool:
    """Whether this step ends at a mark."""
    return marks(spec, step, count) > marks(spec, step - 1, count)


class Trainer:
    """The state of one run on one rank."""

    def __init__(self, spec: RunSpec, run_dir: Path) -> None:
        self.spec, self.science, self.run_dir = spec, spec.science, run_dir
        s = self.science
        self.world, self.rank = ranks.world()
        if self.world != spec.placement.world_size:
            raise TrainError(f"run.json asks for {spec.placement.world_size} processes, and there are {self.world}")
        self.device = ranks.device()
        self.net = build_net(spec).to(self.device)
        net = torch.compile(self.net) if spec.placement.compile else self.net
        self.forward: nn.Module = (
            nn.parallel.DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True)
            if self.world > 1
            else net  # type: ignore[assignment]
        )
        with ranks.first():  # it converts raw data, where that is to be done; the others read what it made
            self.stream = data.stream(s.dataset, spec.dataset_path, s.seed, self.device)
        self.statistics = self.stream.sibling(0, "statistics")  # the same samples for every seed and batch size
        self.noise_stream = self.stream.sibling(s.seed, "noise")
        self.optimizer = optim.build(s.optimizer, self.net.parameters(), s.hyper)
        self.per_draw = s.batch // s.micro_batch // self.world  # micro-batches a draw on this rank
        self.weights = [r / self.per_draw for r in rules.svag_weights(s.svag, family(s.family))]
        weights = [w for w in self.weights for _ in range(self.per_draw)]  # of the micro-batches of a step
        self.free = (
            None if s.measure.noise == "none" else noise.Free(self.net.parameters(), weights, s.micro_batch, self.world)
        )
        self.step = 0
        self.seconds = 0.0  # spent training, evaluation and restarts excluded
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this rank, since the last record
        self.loss_count = 0
        self.first_bad = torch.full((), torch.inf, device=self.device)  # first step with a non-finite loss

    # ---- one step ----

    def train_step(self) -> None:
        """One optimizer step; on a CPU a non-finite loss raises before the update."""
        s, micro = self.science, self.science.micro_batch
        last = len(self.weights) * self.per_draw - 1
        loss_sum = torch.zeros((), device=self.device)
        for j in range(last + 1):
            start = self._start(self.step, j)
            x, y = self.stream.batch(start, start + micro)  # (m, C, H, W), (m,); of tokens (m, T), (m, T)
            if j < last or self.step + 1 < s.steps:
                then = self._start(self.step, j + 1) if j < last else self._start(self.step + 1, 0)
                self.stream.prefetch(then, then + micro)
            self._seed_dropout("dropout", start)
            with self._reduce(j == last):
                with self._autocast():
                    loss = mean_loss(self.forward(x), y)
                (loss * self.weights[j // self.per_draw]).backward()
            loss_sum += loss.detach()
            if self.free is not None:
                self.free.micro_batch(j)
        if self.free is not None:
            self.free.step()
        self.loss_sum += loss_sum
        self.loss_count += last + 1
        bad = torch.where(loss_sum.isfinite(), torch.inf, float(self.step))
        torch.minimum(self.first_bad, bad, out=self.first_bad)
        if self.device.type == "cpu":
            self.check_finite()
        share = optim.multiplier(s.schedule, self.spec.clock(self.step + 0.5))
        for group in self.optimizer.param_groups:
            group["lr"] = s.hyper.lr * share
        self.optimizer.step()
        self.step += 1

    def lap(self, started: float) -> None:
        """Count the time since `started` (time.monotonic) as training."""
        if self.device.type == "cuda":  # its steps are only queued; the wait belongs to them, not to what comes next
            torch.cuda.synchronize(self.device)
        self.seconds += time.monotonic() - started

    def _start(self, step: int, j: int) -> int:
        """Where micro-batch j of a step, counted over its draws on this rank, begins in the stream."""
        draw, i = divmod(j, self.per_draw)
        place = self.rank * self.per_draw + i
        return self.spec.samples(step) + draw * self.science.batch + place * self.science.micro_batch

    def check_finite(self) -> None:
        bad = float(self.first_bad)
        if bad != torch.inf:
            raise TrainError(
                f"the loss is not finite at step {bad:.0f} ({self.spec.samples(int(bad))} samples): the run stops"
                + ("; checkpoint.pt is the last good state" if (self.run_dir / "checkpoint.pt").exists() else "")
                + ". Lower the learning rate or lengthen the warm-up"
            )

    def _reduce(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are reduced over ranks once a step, with its last micro-batch."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not now:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def _seed_dropout(self, purpose: str, start: int) -> None:
        """What the network itself draws is a function of (seed, the micro-batch's place in the stream).

        Dropout knows only torch's generator of the device, so that one is set; nothing else draws from it.
        """
        where = (
            torch.default_generator if self.device.type == "cpu" else torch.cuda.default_generators[self.device.index]
        )
        where.manual_seed(data.key(self.science.seed, f"{purpose}/{start}"))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.science.precision == "bfloat16")

    # ---- records ----

    def _record(self, kind: str, **metrics: Any) -> dict[str, Any]:
        s = self.science
        t = rules.continuous_time(s.hyper, self.step, family(s.family))
        return {"kind": kind, "step": self.step, "samples": self.spec.samples(self.step), "t": t, **metrics}

    def train_record(self) -> dict[str, Any]:
        """Mean loss of the samples since the last record, over all ranks; what they were trained with."""
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        total = ranks.total(self.loss_sum)
        self.check_finite()
        loss = float(total) / (self.loss_count * self.world)
        window = self.loss_count * self.world * self.science.micro_batch
        self.loss_sum.zero_()
        self.loss_count = 0
        return self._record(
            "train",
            loss=loss,
            window=window,
            lr=self.optimizer.param_groups[0]["lr"],
            gradient_norm=float(nn.utils.get_total_norm(grads)),
            seconds=round(self.seconds, 3),
        )

    def noise_records(self, number: int) -> list[dict[str, Any]]:
        """Gradient noise: of the steps since the last record (free), and of examples of its own (full).

        Args:
            number: which of the run's measurements this is; its examples depend on it and the seed alone.
        """
        s, arm = self.science, self.spec.arms[0]
        out = []
        if self.free is not None and (self.free.able or s.measure.noise == "free"):
            found = self.free.estimate(ranks.total).record(s.batch, arm.kappa)
            out.append(self._record("noise", method="free", batch=s.batch, **found))
        if s.measure.noise == "full":
            out.append(self._record("noise", method="full", batch=s.batch, **self._full_noise(number)))
        return out

    def _full_noise(self, number: int) -> dict[str, Any]:
        """Estimates at the current weights, BN as in training; buffers, `.grad` and stream stay as they are."""
        s, unit, n = self.science, self.spec.noise_unit, self.science.measure.noise_examples
        stream, first = self.noise_stream, number * n
        named = {k: p for k, p in self.net.named_parameters() if p.requires_grad}
        losses: list[Tensor] = []
        buffers = [(b, b.clone()) for b in self.net.buffers()]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with self._autocast():
                return mean_loss(self.net(x), y)

        def loss_at(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            with self._autocast():
                return mean_loss(torch.func.functional_call(self.net, p, (x,)), y)

        def blocks(units: range) -> Iterator[Tensor]:
            if unit == 1 and not models.has_batch_norm(self.net):
                self._seed_dropout("noise", first + units.start)
                return noise.example_gradients(
                    loss_at, named, lambda a, b: stream.batch(first + a, first + b), units, losses
                )

            def batch(i: int) -> tuple[Tensor, Tensor]:
                self._seed_dropout("noise", first + i * unit)
                return stream.batch(first + i * unit, first + (i + 1) * unit)

            return noise.unit_gradients(loss, list(named.values()), batch, units, losses)

        if self.free is not None:
            self.free.listening = False
        scale = optim.preconditioner(self.optimizer)
        like = torch.cat([p.detach().flatten() for p in named.values()])
        found = noise.full(
            blocks, n // unit, unit, [None] if scale is None else [None, scale], like,
            world=self.world, rank=self.rank, reduce=ranks.total,
        )  # fmt: skip
        for buffer, before in buffers:
            buffer.copy_(before)
        if self.free is not None:
            self.free.listening = self.free.able
        total = ranks.total(
            torch.stack([v.double() for v in losses]).sum() if losses else torch.zeros_like(like[0]).double()
        )
        kappa = self.spec.arms[0].kappa
        out = found[0].record(s.batch, kappa)
        if scale is not None:
            out |= {
                f"preconditioned_{k}": v
                for k, v in found[1].record(s.batch, kappa).items()
                if k not in ("units", "examples")
            }
        return {**out, "train_loss": float(total) * unit / n, "weight_norm": float(like.norm())}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Test loss of the current weights, and accuracy (images) or perplexity and bits per byte (tokens).

        Each rank takes its share of the test set.
        """
        s = self.science
        if models.has_batch_norm(self.net):
            n = -(-s.measure.statistics_samples // s.micro_batch)  # micro-batches, over all ranks
            mine = range(self.rank, n, self.world)
            batches = (self.statistics.batch(i * s.micro_batch, (i + 1) * s.micro_batch)[0] for i in mine)
            with self._autocast():
                buffers = models.recompute_statistics(self.net, batches)
            for b in buffers:
                b.copy_(ranks.total(b.double() * len(mine)) / n)
        self.net.eval()
        tokens = s.dataset["kind"] == "tokens"
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, count
        size, at_once = self.stream.test_size, min(s.micro_batch, EVALUATION_BATCH) if tokens else EVALUATION_BATCH
        for start in range(self.rank * at_once, size, self.world * at_once):
            x, y = self.stream.test_batch(start, min(start + at_once, size))
            with self._autocast():
                logits = self.net(x)
            loss = mean_loss(logits.float(), y, reduction="sum")
            correct = 0 * loss if tokens else (logits.argmax(1) == y).sum()
            sums += torch.stack([loss, correct, (y >= 0).sum()]).double()
        self.net.train()
        total, correct, count = ranks.total(sums).tolist()
        loss = total / count
        weight_norm = float(nn.utils.get_total_norm([p.detach() for p in self.net.parameters()]))
        if not tokens:
            return self._record("eval", loss=loss, accuracy=correct / count, weight_norm=weight_norm)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "weight_norm": weight_norm}
        if isinstance(self.stream, data.TokenStream) and not s.dataset["mask"]:
            found["bits_per_byte"] = loss / math.log(2) / self.stream.bytes_per_token
        return self._record("eval", **found)

    # ---- checkpoints ----

    def save(self, records_size: int) -> None:
        """The whole state, written aside and renamed; the one before is kept as checkpoint.prev.pt."""
        loss_sum = ranks.total(self.loss_sum)  # float64 sums of float32 losses: exact, so any split of it is
        noise_rows = None if self.free is None else self.free.window(ranks.total)
        if self.rank:
            return
        state = {
            "run_id": self.spec.run_id,
            "data": self.stream.fingerprint,
            "step": self.step,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": loss_sum,
            "noise": noise_rows,
            "loss_count": self.loss_count,
            "records_size": records_size,
            "seconds": self.seconds,
        }
        path = self.run_dir / "checkpoint.pt"
        aside = self.run_dir / f".checkpoint.pt.{os.getpid()}"
        try:
            with open(aside, "wb") as f:
                try:
                    torch.save(state, f)
                except RuntimeError as e:
                    if isinstance(e.__context__, OSError):  # a full disk; torch tells it as a position in the archive
                        raise e.__context__ from None
                    raise
                f.flush()
                os.fsync(f.fileno())
            if path.exists():
                os.replace(path, self.run_dir / "checkpoint.prev.pt")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def restore(self) -> int:
        """Go on from the newest checkpoint that is whole; returns the size of its records (0: from the start)."""
        if self.rank == 0:  # what a killed process was writing
            for rest in (*self.run_dir.glob(".checkpoint.pt.*"), *self.run_dir.glob(".*.json.*")):
                rest.unlink(missing_ok=True)
        written = self.run_dir / "records.jsonl"
        available = written.stat().st_size if written.exists() else 0
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            state = load_checkpoint(self.run_dir / name, self.device)
            if state is None:
                continue
            if state["records_size"] > available:  # an older state, or the start, leads to the same records again
                print(f"{written} is shorter than {name} says; going further back", file=sys.stderr)
                continue
            if state["run_id"] != self.spec.run_id:
                raise TrainError(f"{self.run_dir / name} belongs to run {state['run_id']}")
            if state["data"] != self.stream.fingerprint:
                raise TrainError(
                    f"the data changed since {self.run_dir / name} was written (its tokens were {state['data']}, now "
                    f"{self.stream.fingerprint}): go on with the data it began with, or start anew in another runs_dir"
                )
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.loss_count = state["step"], state["seconds"], state["loss_count"]
            if self.rank == 0:  # the sum over ranks is what counts
                self.loss_sum.copy_(state["loss_sum"])
            if self.free is not None and state["noise"] is not None:
                self.free.rows = list(state["noise"].to(self.device))
            return int(state["records_size"])
        return 0


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None if it is absent, cut or altered (the archive's checksums tell).

    Raises:
        OSError, torch.OutOfMemoryError: it could not be read now; nothing is known about the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state
    except FileNotFoundError:
        return None
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # a damaged archive fails in many ways; each means: use the one before
        if isinstance(e, OSError) and e.errno != errno.EINVAL:  # (a wrong offset in the archive makes an EINVAL)
            raise
        print(f"{path} is damaged ({type(e).__name__}); using the one before", file=sys.stderr)
        return None
