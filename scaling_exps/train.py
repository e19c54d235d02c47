"""The one training loop: RUN_DIR in, records and result out. One process a device.

step k:   g = Σ_i w_i ∇L_i over the micro-batches of its draws   (plain: w_i = 1/n; SVAG: r1/n and r2/n)
          θ, moments <- optimizer(g, η · multiplier(middle of the step))
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from scaling_exps import data, models, noise, optim, records, rules, validity
from scaling_exps.plan import PlanError, RunSpec

EVALUATION_BATCH = 250  # test images at once; no result depends on it


class TrainError(RuntimeError):
    """The run cannot go on; the message is the reason that `status` shows."""


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal asked for it: the state is saved, the run goes on when it is started again."""


AGAIN = 75  # exit status of a worker that was stopped: its job is to be requeued
# Exit status of a rank whose run failed: srun reports the highest of all ranks, and those that it then ends have
# 128 + a signal. So a run that failed is told from one whose process was killed, which is worth another start.
FAILED = 200
LOOK = 1.0  # seconds between two looks of the ranks at each other: does one want to save, or to stop?
_signals: list[int] = []  # received; the handler does nothing else


def mean_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats over every target that is not hidden: (B, C), (B,) or (B, T, V), (B, T)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


class Trainer:
    """The state of one run on one rank."""

    def __init__(self, spec: RunSpec, run_dir: Path) -> None:
        self.spec, self.science, self.run_dir = spec, spec.science, run_dir
        s = self.science
        self.world, self.rank = _world()
        if self.world != spec.placement.world_size:
            raise TrainError(f"run.json asks for {spec.placement.world_size} processes, and there are {self.world}")
        self.device = _device()
        self.net = build_net(spec).to(self.device)
        net = torch.compile(self.net) if spec.placement.compile else self.net
        self.forward: nn.Module = (
            nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
            if self.world > 1
            else net  # type: ignore[assignment]
        )
        self.stream = data.stream(s.dataset, spec.dataset_path, s.seed, self.device)
        self.statistics = self.stream.sibling(0, "statistics")  # the same samples for every seed and batch size
        self.noise_stream = self.stream.sibling(s.seed, "noise")
        self.optimizer = optim.build(s.optimizer, self.net.parameters(), s.hyper)
        self.per_draw = s.batch // s.micro_batch // self.world  # micro-batches a draw on this rank
        self.weights = [r / self.per_draw for r in rules.svag_weights(s.svag, _family(s.family))]
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

    def _start(self, step: int, j: int) -> int:
        """Where micro-batch j of a step, counted over its draws on this rank, begins in the stream."""
        draw, i = divmod(j, self.per_draw)
        place = self.rank * self.per_draw + i
        return self.spec.samples(step) + draw * self.science.batch + place * self.science.micro_batch

    def check_finite(self) -> None:
        bad = float(self.first_bad)
        if bad != torch.inf:
            raise TrainError(
                f"the loss is not finite at step {bad:.0f} ({self.spec.samples(int(bad))} samples): the run stops; "
                "checkpoint.pt is the last good state. Lower the learning rate or lengthen the warm-up"
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
        t = rules.continuous_time(s.hyper, self.step, _family(s.family))
        return {"kind": kind, "step": self.step, "samples": self.spec.samples(self.step), "t": t, **metrics}

    def train_record(self) -> dict[str, Any]:
        """Mean loss of the samples since the last record, over all ranks; what they were trained with."""
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        total = _sum_over_ranks(self.loss_sum)
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
            found = self.free.estimate(_sum_over_ranks).record(s.batch, arm.kappa)
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
            world=self.world, rank=self.rank, reduce=_sum_over_ranks,
        )  # fmt: skip
        for buffer, before in buffers:
            buffer.copy_(before)
        if self.free is not None:
            self.free.listening = self.free.able
        total = _sum_over_ranks(
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
                b.copy_(_sum_over_ranks(b.double() * len(mine)) / n)
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
        total, correct, count = _sum_over_ranks(sums).tolist()
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
        loss_sum = _sum_over_ranks(self.loss_sum)  # float64 sums of float32 losses: exact, so any split of it is
        noise_rows = None if self.free is None else self.free.window(_sum_over_ranks)
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
                torch.save(state, f)
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
            state = _load_checkpoint(self.run_dir / name, self.device)
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


def _load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None if it is absent, cut or altered (the archive's checksums tell)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state
    except FileNotFoundError:
        return None
    except Exception as e:  # a damaged archive fails in many ways; each means: use the one before
        print(f"{path} is damaged ({type(e).__name__}); using the one before", file=sys.stderr)
        return None


# ---- a run ----


def run(run_dir: Path) -> str:
    """Run what `run_dir/run.json` says, or go on with it, to its end. Every rank calls this.

    Returns:
        How it ended: `finished`, `failed` (the reason is in result.json), or `stopped` by a signal.

    Raises:
        records.BusyError: another process works on it.
    """
    spec = records.read_spec(run_dir)
    world, rank = _world()
    with records.lock(run_dir) if rank == 0 else contextlib.nullcontext():
        previous = records.read_json(run_dir / "result.json")
        if previous is not None and previous["status"] == "finished":
            return "finished"
        if world > 1:
            dist.barrier()
        if rank == 0:
            records.append_event(run_dir, {"event": "start", "job": _job(), "host": platform.node(), **_code(run_dir)})
        try:
            _train(spec, run_dir)
        except Stopped:
            if rank == 0:
                print(
                    f"run {spec.run_id} saved and stopped by a signal; it goes on when it is started again", flush=True
                )
            return "stopped"
        except (TrainError, data.DataError, models.ModelError, OSError, torch.OutOfMemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and world > 1 and not isinstance(e, TrainError):
                raise  # most likely another rank died: its own message counts
            reason = f"{e}" if isinstance(e, TrainError | ValueError) else f"{type(e).__name__}: {e}"
            with contextlib.suppress(OSError):
                records.write_json(run_dir / "result.json", {"status": "failed", "reason": reason, **_environment()})
            if not isinstance(e, TrainError | ValueError | OSError):
                traceback.print_exc()  # nobody foresaw it: whoever mends it needs the place
            print(f"run {spec.run_id} failed: {reason}", file=sys.stderr)
            if world > 1:
                raise SystemExit(FAILED) from e  # the others wait in a collective; the launcher ends them
            return "failed"
    return "finished"


def _train(spec: RunSpec, run_dir: Path) -> None:
    s = spec.science
    _reset_peak_memory()
    trainer = Trainer(spec, run_dir)
    size = trainer.restore()
    if _max_over_ranks(trainer.step) != -_max_over_ranks(-trainer.step):
        raise TrainError("ranks read different checkpoints: the run folder is not the same on every node")
    rank0 = trainer.rank == 0
    (run_dir / "result.json").unlink(missing_ok=True)
    writer = records.Writer(run_dir, spec, size) if rank0 else None
    place = spec.placement
    if rank0:
        arm = spec.arms[0]
        print(
            f"{s.model['name']} on {s.dataset['name']}, {s.optimizer}, rule {arm.rule} at κ = {arm.kappa:g}, "
            f"seed {s.seed}  [{run_dir}]\n"
            f"batch {s.batch} = micro-batch {s.micro_batch} × accumulation {place.accumulation // spec.draws}"
            f" × world size {place.world_size};  lr {s.hyper.lr:.4g}, betas {[round(b, 6) for b in s.hyper.betas]},"
            f" eps {s.hyper.eps:.3g};  {s.steps} steps" + (f", from step {trainer.step}" if trainer.step else "")
        )
    saved = looked = time.monotonic()
    looked_at, look_at = trainer.step, trainer.step + 1  # steps
    with tqdm(
        total=spec.samples(s.steps), initial=spec.samples(trainer.step), unit="samples", unit_scale=True,
        disable=None if rank0 else True, dynamic_ncols=True, leave=False,
    ) as bar:  # fmt: skip
        started = time.monotonic()
        while trainer.step < s.steps:
            trainer.train_step()
            k = trainer.step
            if _crosses(spec, k, s.measure.train_records):
                trainer.seconds += time.monotonic() - started
                record = trainer.train_record()
                if writer:
                    writer.write(record)
                    bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                started = time.monotonic()
            trainer.optimizer.zero_grad(set_to_none=True)
            bar.update(spec.samples(1))
            if s.measure.noise != "none" and _crosses(spec, k, s.measure.noise_records):
                trainer.seconds += time.monotonic() - started
                for record in trainer.noise_records(_marks(spec, k, s.measure.noise_records)):
                    if writer:
                        writer.write(record)
                started = time.monotonic()
            if _crosses(spec, k, s.measure.evaluations):
                trainer.seconds += time.monotonic() - started
                record = trainer.evaluate()
                if writer:
                    writer.write(record)
                    if bar.disable:
                        print(
                            f"{record['samples']:>12,} samples  test loss {record['loss']:.4f}  "
                            f"{_quality(record)}  {_rate(trainer):,.0f} samples/s", flush=True,
                        )  # fmt: skip
                started = time.monotonic()
            if k >= look_at and k < s.steps:
                now = time.monotonic()
                pace = (now - looked) / (k - looked_at)  # seconds a step
                due, stop, pace = (
                    _max_over_ranks(x) for x in (now - saved > 60 * place.checkpoint_minutes, len(_signals), pace)
                )
                if due or stop:
                    trainer.seconds += time.monotonic() - started
                    trainer.check_finite()
                    trainer.save(writer.sync() if writer else 0)
                    saved = started = time.monotonic()
                if stop:
                    if writer:
                        writer.close({})
                    if trainer.world > 1:
                        dist.barrier()  # nobody leaves before the state is on the disk
                    raise Stopped
                # every rank takes the same numbers to the same next look; at most doubled: a first step may be slow
                look_at = k + max(1, min(2 * (k - looked_at), int(LOOK / max(pace, 1e-9))))
                looked, looked_at = now, k
    trainer.check_finite()
    trainer.save(writer.sync() if writer else 0)
    if writer:
        rows = records.read_records(run_dir)
        metrics, test = final_metrics(rows), next(r for r in reversed(rows) if r["kind"] == "eval")
        told = validity.summary(rows, s.batch)
        found = validity.assess(rows, s.batch, s.batch)
        result = {
            "status": "finished",
            "metrics": metrics,
            **({} if found is None else {"noise_dominated": found.dominated, "noise_measured": found.measured}),
            "seconds": round(trainer.seconds, 3),
            "samples_per_second": round(_rate(trainer), 2),
            "peak_memory_bytes": _peak_memory(trainer.device),
            **_environment(),
        }
        writer.close({f"final/{k}": v for k, v in metrics.items()})
        records.write_json(run_dir / "result.json", result)
        print(
            f"finished: train loss {metrics['train_loss']:.4f}, test loss {metrics['test_loss']:.4f}, "
            f"{_quality(test)} after {spec.samples(s.steps):,} samples; {_rate(trainer):,.0f} samples/s, "
            f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB" + (f"\n{told}" if told else ""),
            flush=True,
        )


def final_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The last record of each kind, under the names of result.json."""
    train = next(r for r in reversed(rows) if r["kind"] == "train")
    test = next(r for r in reversed(rows) if r["kind"] == "eval")
    names = {"loss": "test_loss", "accuracy": "test_accuracy"}
    kept = ("loss", "accuracy", "perplexity", "bits_per_byte", "weight_norm")
    return {"train_loss": train["loss"], **{names.get(k, k): test[k] for k in kept if k in test}}


def _quality(record: dict[str, Any]) -> str:
    """What people look at, of an eval record."""
    if "accuracy" in record:
        return f"accuracy {record['accuracy']:.2%}"
    bits = f", {record['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in record else ""
    return f"perplexity {record['perplexity']:,.2f}{bits}"


def _marks(spec: RunSpec, step: int, count: int) -> int:
    """How many of `count` marks have been passed after `step` steps.

    They are evenly spaced in samples and lie on steps of plain training: at the same t for every SVAG l.
    """
    return step // spec.stretch * count // (spec.science.steps // spec.stretch)


def _crosses(spec: RunSpec, step: int, count: int) -> bool:
    """Whether this step ends at a mark."""
    return _marks(spec, step, count) > _marks(spec, step - 1, count)


def _rate(trainer: Trainer) -> float:
    return trainer.spec.samples(trainer.step) / max(trainer.seconds, 1e-9)


def build_net(spec: RunSpec) -> nn.Module:
    s = spec.science
    return models.build(s.model, s.dataset, s.seed, s.freeze_last)


def preflight(specs: list[RunSpec]) -> None:
    """Load every data set and build every network of the list once: what cannot work is known before the first run.

    Raises:
        data.DataError, models.ModelError: with what was given and what is allowed.
    """
    seen = set()
    for spec in specs:
        s = spec.science
        key = repr((s.model, s.dataset, spec.dataset_path, s.freeze_last))
        if key in seen:
            continue
        seen.add(key)
        x, y = data.stream(s.dataset, spec.dataset_path, s.seed, torch.device("cpu")).test_batch(0, 1)
        with torch.no_grad(), torch.device("cpu"):
            net = build_net(spec).eval()
            try:
                got = tuple(net(x).shape)
            except Exception as e:  # whatever a network of the user's own raises
                shape, why = tuple(x.shape[1:]), f"{type(e).__name__}: {e}"
                raise models.ModelError(
                    f"model {s.model} cannot take inputs of shape {shape}: {why}. Choose a network, its "
                    "options (of timm's ViTs model.options={img_size:N}) or a data set that fit"
                ) from e
        wanted = (*y.shape, s.dataset["classes"]) if "classes" in s.dataset else (*y.shape, s.dataset["vocab"])
        if len(got) != len(wanted) or got[:-1] != wanted[:-1] or got[-1] < wanted[-1]:
            raise models.ModelError(f"model {s.model} returns {got} for one example; its logits must be {wanted}")


# ---- ranks and devices ----


def _family(name: str) -> rules.Family:
    return "adaptive" if name == "adaptive" else "sgd"


def _world() -> tuple[int, int]:
    """(world size, rank)."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def _device() -> torch.device:
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local % torch.cuda.device_count())  # SLURM may show each task its GPU only
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _sum_over_ranks(x: Tensor) -> Tensor:
    """A new tensor: the sum of every rank's `x`."""
    x = x.clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def _max_over_ranks(x: float) -> float:
    if not dist.is_initialized():
        return float(x)
    tensor = torch.tensor(float(x), dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux: the high-water mark of resident memory starts anew
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, else this process's resident high-water mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except OSError:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _environment() -> dict[str, Any]:
    packages = ("scalerun", "torch", "torchvision", "timm", "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": versions,
        **_code(None),
        "device": name,
        "threads": torch.get_num_threads(),
        "world_size": _world()[0],
    }


@functools.cache
def _tree() -> tuple[str | None, str]:
    """The commit of the code that runs (`-dirty` where the tree is not clean), and the patch of the difference."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).resolve().parent), *words], capture_output=True, text=True
            )
        except FileNotFoundError:
            return ""
        return done.stdout if done.returncode == 0 else ""

    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip() or None
    return commit, git("diff", "HEAD", "--", ".") if commit and commit.endswith("-dirty") else ""


def _code(run_dir: Path | None) -> dict[str, Any]:
    """What ran, for the record; with `run_dir`, the patch of a tree that is not clean is left there."""
    commit, patch = _tree()
    if not patch:
        return {"commit": commit}
    if run_dir is not None:
        with open(os.open(run_dir / "code.patch", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(patch)
    return {"commit": commit, "patch": "code.patch"}


def _job() -> str | None:
    """The SLURM job that this process belongs to, as squeue names it; None outside of one."""
    e = os.environ
    if "SLURM_STEP_ID" not in e:
        return None
    array = e.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{e['SLURM_ARRAY_TASK_ID']}" if array else e.get("SLURM_JOB_ID")


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What torch.distributed wants to know, out of a SLURM step's environment; None for a step of one task, or none.

    The address is the first host of the step; the port follows from job, step and restart, so that jobs which share
    a node do not meet.

    >>> e = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    ...      "SLURM_STEP_NODELIST": "gpu[07-08,11],cpu1", "SLURM_JOB_ID": "41"}
    >>> slurm_rank(e)["MASTER_ADDR"], slurm_rank(e)["RANK"], slurm_rank(e)["MASTER_PORT"]
    ('gpu07', '3', '20287')
    """
    if "SLURM_STEP_ID" not in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    host = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", environment["SLURM_STEP_NODELIST"])
    assert host is not None
    salt = 7 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_RESTART_COUNT", 0))
    return {
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": "".join(part or "" for part in host.groups()),
        "MASTER_PORT": str(20000 + (salt + int(environment["SLURM_STEP_ID"])) % 12000),
    }


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the group that torchrun's or srun's environment describes; nothing to do for a single process."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(slurm_rank(os.environ) or {})
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield
        return
    device = _device()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.index is not None else None
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGUSR2 leave a note, which the ranks read at a step's boundary."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {n: signal.signal(n, lambda number, _: _signals.append(number)) for n in numbers}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def stop_requested() -> bool:
    """Whether a signal has asked this process to save and stop."""
    return bool(_signals)


def run_all(run_dirs: list[Path], log: bool, patience: float = 0) -> bool:
    """Run each directory that is neither finished nor held by somebody else.

    Several workers may be given one list: the locks share it out. With `log`, a run's output goes to its log.txt.

    Args:
        patience: seconds to wait for a run that is held. A requeued job may start while its last process still dies.

    Returns:
        Whether every run that was done here finished.
    """
    with _handlers():
        return _run_all(run_dirs, log, patience)


def _run_all(run_dirs: list[Path], log: bool, patience: float) -> bool:
    good = True
    for run_dir in run_dirs:
        world, rank = _world()
        free = torch.tensor(0.0)
        if rank == 0:
            until = time.monotonic() + patience
            while (state := records.state(run_dir)) == "running" and time.monotonic() < until:
                time.sleep(0.2)
            # a requeued job is not a person who tries again: what failed before it was requeued stays failed
            again = () if _job() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) else ("failed",)
            free.fill_(float(state in ("waiting", "interrupted", *again)))
            if patience and state == "running":
                print(f"{run_dir} is held by {records.holder(run_dir)}", file=sys.stderr)
                good = False
        if world > 1:
            free = free.to(_device())
            dist.broadcast(free, 0)
        if not free:
            continue
        with _output_to(run_dir / "log.txt") if log and rank == 0 else contextlib.nullcontext():
            try:
                how = run(run_dir)
                good &= how == "finished"
                if how == "stopped":
                    break
            except records.BusyError:
                continue
            except PlanError as e:
                print(e, file=sys.stderr)
                good = False
    return good


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    with open(path, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        yield


def work(run_dirs: list[Path], earlier: list[int] | None = None) -> int:
    """A worker: join the group, run the directories, and tell by the exit status how it went.

    Args:
        earlier: signals that came before this module was there.

    Returns:
        0: done. 1: a run failed. AGAIN: stopped by a signal; start it again.
    """
    _signals.extend(earlier or [])
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with _handlers():
        with process_group():
            good = run_all(run_dirs, log=True, patience=60 if _job() else 0)
            stopped = _max_over_ranks(len(_signals)) > 0 and not good
            rank = _world()[1]
        if stopped and _job():  # only rank 0 says so, last: srun ends the others as soon as one of them exits badly
            if rank:
                return 0
            time.sleep(1)
    return AGAIN if stopped else 0 if good else 1


if __name__ == "__main__":  # a worker: python -m scaling_exps.train RUN_DIR ...
    raise SystemExit(work([Path(a) for a in sys.argv[1:]]))
