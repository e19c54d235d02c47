"""A run from its directory to its end, and the workers that take such directories one after another."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from scaling_exps import data, models, records, validity
from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.train import provenance, ranks
from scaling_exps.train.trainer import Trainer, TrainError, build_net, crosses, marks

AGAIN = 75  # exit status of a worker that was stopped: its job is to be requeued
# Exit status of a rank whose run failed: srun reports the highest of all ranks, and those that it then ends have
# 128 + a signal. So a run that failed is told from one whose process was killed, which is worth another start.
FAILED = 200
LOOK = 1.0  # seconds between two looks of the ranks at each other: does one want to save, or to stop?
_signals: list[int] = []  # received; the handler does nothing else


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal asked for it: the state is saved, the run goes on when it is started again."""


def run(run_dir: Path) -> str:
    """Run what `run_dir/run.json` says, or go on with it, to its end, holding its lock. Every rank calls this.

    Returns:
        How it ended: `finished`, `failed` (the reason is in result.json), or `stopped` by a signal.

    Raises:
        records.BusyError: another process works on it.
    """
    spec = records.read_spec(run_dir)
    world, rank = ranks.world()
    with contextlib.ExitStack() as held:
        busy = None
        if rank == 0:
            try:
                held.enter_context(records.lock(run_dir))
            except records.BusyError as e:
                busy = e
        if ranks.maximum(busy is not None):  # all ranks know it, or the others wait for rank 0
            raise busy or records.BusyError(f"{run_dir} is being run by another process")
        previous = records.read_json(run_dir / "result.json")
        if previous is not None and previous["status"] == "finished":
            return "finished"
        if rank == 0:
            records.append_event(
                run_dir,
                {"event": "start", "job": provenance.job(), "host": platform.node(), **provenance.code(run_dir)},
            )
        try:
            _train(spec, run_dir)
        except Stopped:
            if rank == 0:
                print(
                    f"run {spec.run_id} saved and stopped by a signal; it goes on when it is started again", flush=True
                )
            return "stopped"
        except (TrainError, data.DataError, models.ModelError, OSError, torch.OutOfMemoryError, RuntimeError) as e:
            if world > 1 and ranks.lost(e):
                print(f"run {spec.run_id}: another process of it is gone ({e})", file=sys.stderr, flush=True)
                raise
            reason = f"{e}" if isinstance(e, TrainError | ValueError) else f"{type(e).__name__}: {e}"
            with contextlib.suppress(OSError):
                records.write_json(
                    run_dir / "result.json", {"status": "failed", "reason": reason, **provenance.environment()}
                )
            if not isinstance(e, TrainError | ValueError | OSError):
                traceback.print_exc()  # nobody foresaw it: whoever mends it needs the place
            print(f"run {spec.run_id} failed: {reason}", file=sys.stderr)
            if world > 1:
                raise SystemExit(FAILED) from e  # the others wait in a collective; the launcher ends them
            return "failed"
    return "finished"


def _train(spec: RunSpec, run_dir: Path) -> None:
    s = spec.science
    provenance.reset_peak_memory()
    trainer = Trainer(spec, run_dir)
    size = trainer.restore()
    if ranks.maximum(trainer.step) != -ranks.maximum(-trainer.step):
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
            if crosses(spec, k, s.measure.train_records):
                trainer.lap(started)
                record = trainer.train_record()
                if writer:
                    writer.write(record)
                    bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                started = time.monotonic()
            trainer.optimizer.zero_grad(set_to_none=True)
            bar.update(spec.samples(1))
            if s.measure.noise != "none" and crosses(spec, k, s.measure.noise_records):
                trainer.lap(started)
                for record in trainer.noise_records(marks(spec, k, s.measure.noise_records)):
                    if writer:
                        writer.write(record)
                started = time.monotonic()
            if crosses(spec, k, s.measure.evaluations):
                trainer.lap(started)
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
                    ranks.maximum(x) for x in (now - saved > 60 * place.checkpoint_minutes, len(_signals), pace)
                )
                if due or stop:
                    trainer.lap(started)
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
            "peak_memory_bytes": provenance.peak_memory(trainer.device),
            **provenance.environment(),
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


def _rate(trainer: Trainer) -> float:
    return trainer.spec.samples(trainer.step) / max(trainer.seconds, 1e-9)


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
                shape, why = tuple(x.shape[1:]), f"{type(e).__name__}: {e}".rstrip(".")
                raise models.ModelError(
                    f"model {s.model} cannot take inputs of shape {shape}: {why}. Choose a network, its "
                    "options (of timm's ViTs model.options={img_size:N}) or a data set that fit"
                ) from e
        wanted = (*y.shape, s.dataset["classes"]) if "classes" in s.dataset else (*y.shape, s.dataset["vocab"])
        if len(got) != len(wanted) or got[:-1] != wanted[:-1] or got[-1] < wanted[-1]:
            raise models.ModelError(f"model {s.model} returns {got} for one example; its logits must be {wanted}")


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C leave a note, which the ranks read at a step's boundary.

    A second Ctrl-C stops a single process at once. (torchrun passes on the one that its ranks have already had.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in _signals and ranks.world()[0] == 1:
            signal.default_int_handler(number, frame)
        _signals.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {n: signal.signal(n, note) for n in numbers}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def stop_requested() -> bool:
    """Whether a signal has asked this process to save and stop.

    Raises:
        KeyboardInterrupt: it was Ctrl-C; the run is saved.
    """
    if signal.SIGINT in _signals:
        raise KeyboardInterrupt
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
        world, rank = ranks.world()
        free = torch.tensor(0.0)
        if rank == 0:
            until = time.monotonic() + patience
            while (state := records.state(run_dir)) == "running" and time.monotonic() < until:
                time.sleep(0.2)
            # a requeued job is not a person who tries again: what failed before it was requeued stays failed
            again = () if provenance.job() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) else ("failed",)
            free.fill_(float(state in ("waiting", "interrupted", *again)))
            if patience and state == "running":
                print(f"{run_dir} is held by {records.holder(run_dir)}", file=sys.stderr)
                good = False
        if world > 1:
            free = free.to(ranks.device())
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
    status: list[int] = []
    atexit.register(_leave, status)
    try:
        with _handlers(), ranks.process_group():
            good = run_all(run_dirs, log=True, patience=60 if provenance.job() else 0)
            stopped = ranks.maximum(len(_signals)) > 0 and not good
            rank = ranks.world()[1]
    except BaseException as e:
        status.append(e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1)
        raise
    code = AGAIN if stopped else 0 if good else 1
    if stopped and provenance.job():  # rank 0 alone says so, last: srun ends the others as soon as one exits badly
        if rank:
            code = 0
        else:
            time.sleep(1)
    status.append(code)
    return code


def _leave(status: list[int]) -> None:
    """End the process here, before the interpreter shuts down: the last of the exit handlers, as the first registered.

    DistributedDataParallel keeps gloo's threads alive after its group is destroyed (seen with torch 2.14). One that
    lets go of a tensor while the interpreter shuts down aborts the process (pytorch/pytorch#190489), and a run that is
    finished would count as killed.
    """
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])
