"""Checkpoints of a run: written aside and renamed, verified when they are read, gone back from when they are bad."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scaling_exps.records import RunDir, Writer
from scaling_exps.train import ranks, shards
from scaling_exps.train.trainer import Trainer, TrainError

LATE = 60.0  # seconds after which a file system shows what another node wrote


def save(t: Trainer, run_dir: RunDir, writer: Writer | None, keep: bool = False) -> None:
    """The whole state and how many records belong to it, on the disk. Every rank calls this; rank 0 has the writer.

    Args:
        keep: keep it beside the newest one, under its step.

    Raises:
        OSError: it cannot be written; the checkpoints before it stay.
    """
    loss_sum = ranks.total(t.loss_sum)  # float64 sums of float32 losses: exact, so any split of it is
    noise_rows = None if t.free is None else t.free.window(ranks.total)
    held = {"net": t.net.state_dict(), "optimizer": t.optimizer.state_dict(), "average": t.average}
    if t.sharded:
        held = shards.whole(held)
    t.check_finite()
    if writer is None:
        return
    writer.sync()
    state = {
        "run_id": t.spec.run_id,
        "data": t.stream.fingerprint,
        "step": t.step,
        "world": t.world,
        **held,
        "loss_sum": loss_sum,
        "noise": noise_rows,
        "loss_count": t.loss_count,
        "records_size": writer.size,
        "records_checksum": writer.checksum,
        "seconds": t.seconds,
    }
    aside = run_dir.path / f".checkpoint.pt.{os.getpid()}"
    aside.unlink(missing_ok=True)
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            try:
                torch.save(state, f)
            except RuntimeError as e:
                if isinstance(e.__context__, OSError):  # a full disk; torch says it as a position in the archive
                    raise e.__context__ from None
                raise
            f.flush()
            os.fsync(f.fileno())
        run_dir.publish(aside, t.step if keep else None)
    finally:
        aside.unlink(missing_ok=True)


def restore(t: Trainer, run_dir: RunDir) -> int:
    """Go on from the newest checkpoint that is whole and whose records are; bytes of its records (0: from the start).

    Raises:
        TrainError: the checkpoint is another run's, the data changed, or ranks read different checkpoints.
    """
    if t.rank == 0:
        run_dir.sweep()
    until = time.monotonic() + LATE
    while True:
        size = 0
        for path, state in whole(t, run_dir):
            if t.science.shares(state["step"]) % t.world:
                print(f"{path} is of a stage that {t.world} processes cannot share; trying another", file=sys.stderr)
                continue
            if run_dir.records_checksum(state["records_size"]) == state["records_checksum"]:
                put(t, state, path)
                size = int(state["records_size"])
                break
            print(f"the records are not those that {path} belongs to; going further back", file=sys.stderr)
        if ranks.maximum(t.step) == -ranks.maximum(-t.step):
            if (shares := t.science.shares(t.step)) % t.world:
                raise TrainError(
                    f"{t.world} processes cannot share the {shares} micro-batch(es) of step {t.step}, where the run "
                    "goes on: start it again with launch.elastic=true and fewer launch.devices"
                )
            return size
        if ranks.maximum(time.monotonic() > until):
            raise TrainError("ranks read different checkpoints: the run folder is not the same on every node")
        time.sleep(2)


def whole(t: Trainer, run_dir: RunDir) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run's checkpoints that can be read, newest first, the kept ones last; TrainError if one is another run's."""
    for path in (run_dir.newest, run_dir.previous, *reversed(run_dir.kept())):
        if (state := load(path, torch.device("cpu") if t.sharded else t.device)) is None:
            continue
        if state.get("run_id") != t.spec.run_id:
            raise TrainError(f"{path} belongs to run {state.get('run_id')}; remove it, or choose another runs_dir")
        if 0 <= state["step"] <= t.science.steps:
            yield path, state
        else:
            print(f"{path} says step {state['step']} of {t.science.steps}; going further back", file=sys.stderr)


def put(t: Trainer, state: dict[str, Any], path: Path) -> None:
    """Give the trainer the state that `load` read from `path`; TrainError if it was trained on other data."""
    if state["data"] != t.stream.fingerprint:
        raise TrainError(
            f"the data changed since {path} was written (its tokens were {state['data']}, now "
            f"{t.stream.fingerprint}): go on with the data it began with, or start anew in another runs_dir"
        )
    if t.sharded:
        state = shards.cut(state, t.net, t.optimizer)
    t.net.load_state_dict(state["net"])
    t.optimizer.load_state_dict(state["optimizer"])
    if t.average:
        t.average = state["average"]
    t.before = state.get("world", t.world)
    t.step, t.seconds, t.loss_count = state["step"], state["seconds"], state["loss_count"] * t.before // t.world
    if (stage := t.science.at(max(0, t.step - 1))) != t.stage:  # a switch belongs to the first step after it
        t.enter(stage)
    if t.rank == 0:  # the sum over ranks is what counts
        t.loss_sum.copy_(state["loss_sum"])
    if t.free is not None and state["noise"] is not None:
        t.free.rows = list(state["noise"].to(t.device))


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None if it is absent, cut or altered (the archive's checksums say).

    Raises:
        OSError, torch.OutOfMemoryError, MemoryError: it could not be read now; nothing is known about the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state if isinstance(state, dict) and isinstance(state.get("step"), int) else None
    except FileNotFoundError:
        return None
    except Exception as e:  # a damaged archive fails in many ways; each means: use the one before
        unread = isinstance(e, OSError) and e.errno != errno.EINVAL  # (a wrong offset in the archive makes an EINVAL)
        if unread or isinstance(e, torch.OutOfMemoryError | MemoryError):
            raise
        print(f"{path} is damaged ({type(e).__name__}); using the one before", file=sys.stderr)
        return None
