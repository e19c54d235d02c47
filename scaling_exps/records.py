"""What was measured, on disk. wandb is a mirror of it.

A run's directory:

    run.json        the RunSpec; written once, before the run starts
    records.jsonl   one object a line: kind, step, samples, t, and the metrics
    checkpoint.pt   the newest state, and checkpoint.prev.pt the one before
    result.json     how it ended
    log.txt         what a worker printed, when it had no terminal
    jobs.jsonl      which jobs were submitted for it and which processes started on it: event, job, commit, time
    code.patch      what the code that ran had over its commit, where the tree was not clean
    lock            held while a process works on the run; says who
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scaling_exps.plan import PlanError, RunSpec


class BusyError(RuntimeError):
    """Another process works on this run; the message says which."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no file or no JSON object."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def read_spec(run_dir: Path) -> RunSpec:
    """The RunSpec in `run_dir`; PlanError where there is none that this version can read."""
    raw = read_json(run_dir / "run.json")
    if raw is None:
        raise PlanError(f"{run_dir}: no readable run.json")
    try:
        return RunSpec.from_json(raw)
    except PlanError as e:
        raise PlanError(f"{run_dir}: {e}") from e


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records; a line that was cut by a crash is left out."""
    records = []
    try:
        with open(run_dir / "records.jsonl", errors="replace") as f:
            for line in f:
                if line.endswith("\n"):
                    try:
                        records.append(json.loads(line))
                    except json.JSONDecodeError:
                        continue
    except FileNotFoundError:
        pass
    return records


def state(run_dir: Path) -> str:
    """`finished`, `failed`, `running`, `interrupted` (it will go on), `waiting` (never started)."""
    result = read_json(run_dir / "result.json")
    if result is not None:
        return str(result.get("status", "failed"))
    if holder(run_dir) is not None:
        return "running"
    return "interrupted" if (run_dir / "records.jsonl").exists() else "waiting"


def append_event(run_dir: Path, event: dict[str, Any]) -> None:
    """Add a line to jobs.jsonl: one write, so that lines of several processes do not mix."""
    line = json.dumps({**event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n"
    descriptor = os.open(run_dir / "jobs.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of jobs.jsonl; what was cut by a crash is left out."""
    events = []
    with suppress(FileNotFoundError):
        for line in (run_dir / "jobs.jsonl").read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                events.append(json.loads(line))
    return events


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run; BusyError if somebody does. The kernel lets go when the process dies, however it dies."""
    with open(run_dir / "lock", "a+") as f:
        for left in reversed(range(5)):  # `holder` takes it for an instant
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if left:
                    time.sleep(0.1)
                    continue
                f.seek(0)
                raise BusyError(f"{run_dir} is being run by {f.read().strip() or 'another process'}") from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        f.flush()
        yield


def holder(run_dir: Path) -> str | None:
    """Who holds the run's lock, or None."""
    try:
        with open(run_dir / "lock") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None


class Writer:
    """Appends records to a run, and mirrors them to wandb.

    Args:
        run_dir: the run's directory.
        spec: the run.
        size: bytes of records that belong to the checkpoint the run goes on from; the rest is cut off.
    """

    def __init__(self, run_dir: Path, spec: RunSpec, size: int) -> None:
        path = run_dir / "records.jsonl"
        if size > (path.stat().st_size if path.exists() else 0):
            raise OSError(f"{path} is shorter than its checkpoint says: records are missing; start the run anew")
        self.file = open(path, "a")  # noqa: SIM115 (closed by close)
        self.file.truncate(size)
        self.mirror = _Mirror(run_dir, spec) if spec.logger == "wandb" else None

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.mirror is not None:
            self.mirror.log(record)

    def sync(self) -> int:
        """Records up to here are on the disk; returns their size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self, summary: dict[str, Any]) -> None:
        self.file.close()
        if self.mirror is not None:
            self.mirror.close(summary)


class _Mirror:
    """The run in wandb: same id, records as `train/loss`, `eval/accuracy`, ... over `samples`.

    Runs lie there as they are compared: the group is the experiment, the job type the arm, `batch`, `rule`, `kappa` and
    `seed` are columns and tags, and the summary holds the gap to the base run where that is finished. A run that is
    resumed offline leaves a second file; what the first one holds is not written again. Whatever goes wrong there is
    said once and never stops the run.
    """

    def __init__(self, run_dir: Path, spec: RunSpec) -> None:
        self.run: Any = None
        self.run_dir, self.spec = run_dir, spec
        self.written = -1  # the last step that an earlier offline file has whole
        self.speed: float | None = None
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            described, science, arm = spec.to_json(), spec.science, spec.arms[0]
            base = spec.run_id == arm.base_run_id
            job = "base" if base else f"{arm.rule} x{arm.kappa:g}"
            job += f" svag {science.svag}" if science.svag > 1 else ""
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
            if mode == "offline":
                self.written = max((row["_step"] for row in read_mirror(run_dir)), default=-1)
            columns = {
                "model": science.model["name"],
                "dataset": science.dataset["name"],
                "optimizer": science.optimizer,
                "batch": science.batch,
                "rule": "base" if base else arm.rule,
                "kappa": arm.kappa,
                "svag": science.svag,
                "seed": science.seed,
                "lr": science.hyper.lr,
            }
            tags = [spec.experiment, *(columns[k] for k in ("model", "dataset", "optimizer", "rule"))]
            self.run = wandb.init(
                id=spec.run_id,
                name=f"{science.model['name']} {job} batch {science.batch} seed {science.seed}",
                project=os.environ.get("WANDB_PROJECT", "scalerun"),
                group=spec.experiment or f"{science.model['name']}-{science.dataset['name']}-{science.optimizer}",
                job_type=job,
                tags=list(dict.fromkeys([*(str(t)[:64] for t in tags if t), f"batch {science.batch}"])),
                config=columns | {k: described[k] for k in ("science", "arms", "placement", "notes", "margin")},
                dir=run_dir,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(console="off", x_disable_stats=True, init_timeout=30, disable_git=True),
            )
            for kind in ("train", "eval", "noise", "event"):
                self.run.define_metric(f"{kind}/*", step_metric="samples")
        except Exception as e:
            self._lost(e)

    def log(self, record: dict[str, Any]) -> None:
        if self.run is None:
            return
        if record["kind"] == "train" and record.get("seconds"):
            self.speed = record["samples"] / record["seconds"]
        if record["step"] <= self.written:
            return
        clock = {k: record[k] for k in ("samples", "t")}
        place = "/".join(
            str(record[k]) for k in ("kind", "method") if k in record
        )  # two estimates of noise at one step
        metrics = {f"{place}/{k}": v for k, v in record.items() if k not in ("kind", "step", "samples", "t", "method")}
        try:
            self.run.log(clock | metrics, step=record["step"])
        except Exception as e:
            self._lost(e)

    def close(self, summary: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            speed = {} if self.speed is None else {"samples_per_second": self.speed}
            self.run.summary.update(summary | speed | self._gaps(summary))
            self.run.finish()
        except Exception as e:
            self._lost(e)

    def _gaps(self, summary: dict[str, Any]) -> dict[str, float]:
        """`gap/...` of each `final/...` to the base run of the same seed, if that lies beside this run, finished."""
        base = read_json(self.run_dir.parent / self.spec.arms[0].base_run_id / "result.json") or {}
        if base.get("status") != "finished" or self.spec.run_id == self.spec.arms[0].base_run_id:
            return {}
        theirs = {f"final/{k}": v for k, v in base.get("metrics", {}).items()}
        return {k.replace("final/", "gap/", 1): v - theirs[k] for k, v in summary.items() if k in theirs}

    def _lost(self, error: Exception) -> None:
        self.run = None
        print(
            f"wandb is off for the rest of this run ({type(error).__name__}: {error}); records.jsonl has it all",
            file=sys.stderr,
        )


def read_mirror(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the offline wandb files under `run_dir`, oldest file first.

    The file is a LevelDB log: 7 bytes of head, then blocks of 32 KiB of fragments, each crc32 (4), length (2), type (1:
    1 whole, 2 first, 3 middle, 4 last) and data; a joined record is wandb's own `Record` message. A torn end is left
    out. (wandb's Python reader went with its release 0.31.)
    """
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    if not files:
        return []
    from wandb.proto import wandb_internal_pb2 as proto

    message: Any = proto.Record  # type: ignore[attr-defined]

    rows = []
    for file in files:
        raw, at, joined = file.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:  # the rest of a block that holds no head is padding
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
            if kind not in (1, 2, 3, 4) or at + 7 + length > len(raw):
                break
            joined = raw[at + 7 : at + 7 + length] if kind in (1, 2) else joined + raw[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record = message.FromString(joined)
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def logged_in() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False))
