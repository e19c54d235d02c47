"""`fit`: one run, from where it stands to its end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from scaling_exps import data, models
from scaling_exps.config import TokenDataset
from scaling_exps.noise import validity
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir, Writer
from scaling_exps.train import checkpoint, provenance, ranks
from scaling_exps.train.measure import crosses, evaluate, full_noise, marks, noise_records
from scaling_exps.train.trainer import Trainer, TrainError, build_net

CONSOLE = Console(stderr=True)
POLL = 1.0  # seconds between polls of the ranks: is a checkpoint due, did a signal come?


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal asked for it: the state is saved, the run goes on when it is started again."""


def fit(spec: RunSpec, run_dir: RunDir, signalled: Callable[[], bool]) -> dict[str, Any]:
    """Train the run to its end. Every rank calls this.

    Args:
        signalled: whether this process was asked to save and stop.

    Returns:
        Its result.json on rank 0; nothing on other ranks.

    Raises:
        Stopped: it was; the state is on the disk.
        TrainError: the run cannot go on. Whatever else data, network or disk raise comes through.
    """
    s, measure = spec.science, spec.measure
    kept = {max(1, round(s.steps_to(share * s.clock(s.steps)))) for share in spec.checkpoint.keep}
    switches = {stage.step for stage in s.ramp}
    kept |= switches if spec.placement.most else set()  # `RunDir.prepare` learns by them how far the run is
    provenance.reset_peak_memory()
    trainer = Trainer(spec)
    size = checkpoint.restore(trainer, run_dir)
    poll = _Poll(trainer, 60 * spec.checkpoint.minutes)
    with contextlib.ExitStack() as opened:
        recorder = _Recorder(trainer, run_dir, size, opened)
        if trainer.before != trainer.world:  # launch.elastic
            recorder.write(trainer.record("event", event="world size", before=trainer.before, after=trainer.world))
        while trainer.step < s.steps:
            trainer.train_step()
            k = trainer.step
            if k in switches or crosses(spec, k, measure.train_records):
                with trainer.paused():
                    recorder.write(trainer.train_record())
            if spec.noise != "none" and crosses(spec, k, measure.noise_records):
                with trainer.paused():
                    for row in noise_records(trainer, marks(spec, k, measure.noise_records)):
                        recorder.write(row)
            if crosses(spec, k, measure.evaluations):
                with trainer.paused():
                    recorder.write(evaluate(trainer))
            request = poll.request(signalled) if k < s.steps else "save"
            keep = k in kept
            if request or keep:
                with trainer.paused():
                    checkpoint.save(trainer, run_dir, recorder.writer, keep)
            if request == "stop":
                ranks.barrier()  # nobody leaves before the state is on the disk
                raise Stopped
        return recorder.summary()


class _Poll:
    """Asks at most once a second, and at the same step on every rank, whether to save or to stop."""

    def __init__(self, trainer: Trainer, interval: float) -> None:
        self.trainer, self.interval = trainer, interval
        self.saved = self.asked = time.monotonic()
        self.last, self.next = trainer.step, trainer.step + 1  # steps

    def request(self, signalled: Callable[[], bool]) -> str:
        """`save`, `stop`, or nothing."""
        k, now = self.trainer.step, time.monotonic()
        if k < self.next:
            return ""
        pace = (now - self.asked) / (k - self.last)  # seconds a step
        due, stop, pace = (ranks.maximum(x) for x in (now - self.saved > self.interval, signalled(), pace))
        # all ranks take the same numbers to the same next step; at most doubled, for a first step may be slow
        self.next = k + max(1, min(2 * (k - self.last), int(POLL / max(pace, 1e-9))))
        self.asked, self.last = now, k
        if due or stop:
            self.saved = now
        return "stop" if stop else "save" if due else ""


class _Recorder:
    """Rank 0's records: to the file and the terminal, which `opened` closes. Other ranks write nothing."""

    writer: Writer | None = None

    def __init__(self, trainer: Trainer, run_dir: RunDir, size: int, opened: contextlib.ExitStack) -> None:
        self.trainer, self.run_dir = trainer, run_dir
        if trainer.rank == 0:
            self._announce()
            self.writer = opened.enter_context(run_dir.writer(size))
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            hidden = not sys.stderr.isatty()
            bar = Progress(*columns, transient=True, auto_refresh=False, disable=hidden, console=CONSOLE)
            self.bar = opened.enter_context(bar)
            self.task = bar.add_task("", total=trainer.science.steps)

    def write(self, row: dict[str, Any]) -> None:
        """Write a record of this moment."""
        if self.writer is None:
            return
        self.writer.write(row)
        if row["kind"] == "train":
            self.bar.update(self.task, completed=row["step"], description=f"loss {row['loss']:.4f}", refresh=True)
        elif row["kind"] == "eval" and self.bar.disable:
            print(
                f"{row['samples']:>12,} samples  test loss {row['loss']:.4f}  {_quality(row)}  "
                f"{self.trainer.rate:,.0f} samples/s",
                flush=True,
            )

    def _announce(self) -> None:
        t, s, placement = self.trainer, self.trainer.science, self.trainer.spec.placement
        arm, stage = t.spec.arms[0], s.at(t.step)
        print(
            f"{s.model.name} on {s.dataset.name}, {s.optimizer}, rule {arm.rule} at κ = {arm.kappa:g}, "
            f"seed {s.seed}  [{self.run_dir}]\n"
            + (f"ramp {s.batches}: " if s.ramp else "")
            + f"batch {stage.batch} = micro-batch {stage.micro_batch} × accumulation "
            f"{stage.batch // stage.micro_batch // placement.world_size} × world size {placement.world_size};  "
            f"lr {stage.hyper.lr:.4g}, betas {[round(b, 6) for b in stage.hyper.betas]}, eps {stage.hyper.eps:.3g};  "
            f"{s.steps} steps" + (f", from step {t.step}" if t.step else "")
        )

    def summary(self) -> dict[str, Any]:
        """result.json of the finished run; nothing on other ranks."""
        if self.writer is None:
            return {}
        t, s = self.trainer, self.trainer.science
        rows = self.run_dir.records().rows
        train, test = (next(r for r in reversed(rows) if r["kind"] == kind) for kind in ("train", "eval"))
        named = {"test_loss": "loss", "test_accuracy": "accuracy"} | {
            k: k for k in ("perplexity", "bits_per_byte", "weight_norm", "displacement")
        }
        memory = provenance.peak_memory(t.device)
        print(
            f"finished: train loss {train['loss']:.4f}, test loss {test['loss']:.4f}, {_quality(test)} after "
            f"{s.samples(s.steps):,} samples; {t.rate:,.0f} samples/s, {memory / 2**20:,.0f} MiB"
        )
        if noise_line := validity.summary(rows, s.batch):
            print(noise_line)
        sys.stdout.flush()
        return {
            "status": "finished",
            "metrics": {"train_loss": train["loss"], **{name: test[k] for name, k in named.items() if k in test}},
            **_noise_fields(rows, s.batch),
            "test_examples": t.stream.test_size,
            "seconds": round(t.seconds, 3),
            "samples_per_second": round(t.rate, 2),
            "peak_memory_bytes": memory,
            "records_checksum": self.writer.checksum,
            **provenance.environment(),
        }


def measure_kept(spec: RunSpec, run_dir: RunDir) -> dict[str, Any]:
    """Full noise records of a finished run, from its kept checkpoints and its newest. Every rank calls this.

    Returns:
        Its new result.json on rank 0; nothing on other ranks.

    Raises:
        TrainError: no checkpoint is whole.
    """
    trainer = Trainer(spec)
    kept = run_dir.kept()
    rows: dict[int, dict[str, Any]] = {}  # by step
    for path, state in checkpoint.whole(trainer, run_dir):
        if state["step"] not in rows and (not rows or path in kept):  # the one before is of no chosen step
            checkpoint.put(trainer, state, path)
            rows[trainer.step] = full_noise(trainer, marks(spec, trainer.step, spec.measure.noise_records))
    if not rows:
        raise TrainError(
            f"{run_dir} has no whole checkpoint to measure the noise at; train with checkpoint.keep=[0.1,1]"
        )
    if trainer.rank:
        return {}
    with run_dir.writer() as writer:
        for step in sorted(rows):
            writer.write(rows[step])
        writer.sync()
    print(f"gradient noise of {run_dir} measured at {len(rows)} checkpoint(s)", flush=True)
    noise = _noise_fields(run_dir.records().rows, spec.science.batch)
    return {**(run_dir.result() or {}), **noise, "records_checksum": writer.checksum}


def _noise_fields(rows: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """What result.json says of the noise: over which share of the samples it dominates, of how many that is known."""
    assessed = validity.assess(rows, batch, batch)
    return {} if assessed is None else {"noise_dominated": assessed.dominated, "noise_measured": assessed.measured}


def _quality(record: dict[str, Any]) -> str:
    """What people look at, of an eval record."""
    if "accuracy" in record:
        return f"accuracy {record['accuracy']:.2%}"
    bits = f", {record['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in record else ""
    return f"perplexity {record['perplexity']:,.2f}{bits}"


def preflight(specs: list[RunSpec]) -> None:
    """Load every data set and build every network of the list once: what cannot work is known before the first run.

    Raises:
        data.DataError, models.ModelError: with what was given and what is allowed.
    """
    for spec in {
        repr((x.model, x.dataset, s.dataset_path, x.freeze_last, x.start)): s
        for s, x in ((s, s.science) for s in specs)
    }.values():
        s = spec.science
        x, y = data.stream(s.dataset, spec.dataset_path, s.seed, torch.device("cpu")).test_batch(0, 1)
        with torch.no_grad(), torch.device("cpu"):
            net = build_net(spec).eval()
            try:
                logits = tuple(net(x).shape)
            except Exception as e:  # whatever a network of the user's own raises
                shape, why = tuple(x.shape[1:]), f"{type(e).__name__}: {e}".rstrip(".")
                raise models.ModelError(
                    f"model {s.model.name} cannot take inputs of shape {shape}: {why}. Choose a network, its "
                    "options (of timm's ViTs model.options={img_size:N}) or a data set that fit"
                ) from e
        wanted = (*y.shape, s.dataset.vocab if isinstance(s.dataset, TokenDataset) else s.dataset.classes)
        if len(logits) != len(wanted) or logits[:-1] != wanted[:-1] or logits[-1] < wanted[-1]:
            raise models.ModelError(
                f"model {s.model.name} returns {logits} for one example; its logits must be {wanted}"
            )
