"""A run's folder. `RunDir` is the only thing that knows its files, and it believes none of them.

    run.json               the RunSpec; written before the run starts
    records.jsonl          one object a line: kind, step, samples, t, and the metrics
    checkpoint.pt          the newest state, and checkpoint.prev.pt the one before
    checkpoint-STEP.pt     states that are kept (checkpoint.keep)
    result.json            how it ended
    log.txt                what a worker printed, when it had no terminal
    jobs.jsonl             jobs submitted for it and processes started on it: event, job, commit, time
    code.patch             what the code that ran had over its commit, where the tree was not clean
    metrics.csv, events.*  what logger=csv and logger=tensorboard make of the records
    lock                   held while a process works on the run; says who
    wandb.lock             held while a process mirrors it

Reading: what is no regular file, or cannot be parsed, counts as absent or damaged; nothing raises for it but `spec`.
Writing: whole files are written aside and renamed; symbolic links are not followed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

from scaling_exps.plan import Arm, PlanError, RunSpec
from scaling_exps.sources import CHECKPOINT

State = Literal["finished", "failed", "running", "interrupted", "waiting"]
RUNS = Path(os.environ.get("SCALERUN_RUNS", "runs"))  # where runs lie when nobody says otherwise
TAIL = 8192  # bytes of records or log that are read to see how far a run is


_NUMBERS = ("seconds", "samples_per_second", "peak_memory_bytes", "ended", "test_examples")  # of a result


class _Row(msgspec.Struct, tag_field="kind"):
    """What a record must hold to be one; most hold more."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    samples: Annotated[int, msgspec.Meta(ge=0)]


class _Train(_Row, tag="train"):
    samples: Annotated[int, msgspec.Meta(ge=1)]
    t: float
    loss: float
    window: int


class _Eval(_Row, tag="eval"):
    loss: float


class _Noise(_Row, tag="noise"):
    method: Literal["free", "full", "halves", "examples", "moments"]
    batch: Annotated[int, msgspec.Meta(ge=1)]
    enough: bool
    kappa_r: float | None = None
    b_noise: float | None = None

    def __post_init__(self) -> None:
        if self.enough and (self.kappa_r is None or self.b_noise is None):
            raise ValueError


class _Event(_Row, tag="event"):
    pass


class FindError(ValueError):
    """No run, or several, are meant by a word."""


class BusyError(RuntimeError):
    """Another process works on this run; the message says which."""


@dataclass(frozen=True)
class Records:
    """The readable records of a run, the line that each stands in (from 0), how many lines are none, and their CRC-32.

    A torn last line is not counted.
    """

    rows: list[dict[str, Any]]
    lines: list[int]
    damaged: int
    checksum: int


class RunDir:
    """The folder of one run; it need not exist."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.newest = self.path / CHECKPOINT
        self.previous = self.path / "checkpoint.prev.pt"
        self.log = self.path / "log.txt"
        self._records = self.path / "records.jsonl"

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunDir) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @staticmethod
    def under(root: Path) -> list[RunDir]:
        """The run folders in `root`, by name: every folder that holds a run.json of whatever kind."""
        try:
            with os.scandir(root) as entries:
                names = sorted(e.name for e in entries if os.path.lexists(os.path.join(e.path, "run.json")))
        except OSError:
            return []
        return [RunDir(root / name) for name in names]

    # ---- what is to be run ----

    @property
    def exists(self) -> bool:
        """Whether somebody wrote a run.json here."""
        return os.path.lexists(self.path / "run.json")

    def spec(self) -> RunSpec:
        """The RunSpec; PlanError where run.json is missing, or not one that this version can read."""
        raw = _object(self.path / "run.json")
        if raw is None:
            raise PlanError(f"{self}: no readable run.json; plan it anew in another runs_dir, or remove the folder")
        try:
            return RunSpec.from_json(raw)
        except PlanError as e:
            raise PlanError(f"{self}: {e}") from e

    def prepare(self, spec: RunSpec, elastic: bool = False) -> RunSpec:
        """Make the folder (mode 0700) and its run.json; a known run gains arms, and keeps what it began with.

        `elastic`: a begun run takes the placement of `spec` (a ramp that of the stage it stands in), else it keeps its
        own. Returns what run.json then says.

        Raises:
            PlanError: a run.json lies here that this version cannot read.
            OSError: the folder cannot be written.
        """
        make_writable(self.path, 0o700)
        known = self.spec() if self.exists else None
        if known is not None:
            arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
            margin = (known.margin or spec.margin) if self.begun else spec.margin  # it is fixed before the run
            if self.state() == "finished":
                measure, had = spec.measure, known.measure
                full = measure.noise == "full" and known.noise != "full"  # it is measured from kept checkpoints
                measure = replace(measure, evaluations=had.evaluations, train_records=had.train_records)
                whole = replace(known.placement, shard=False)  # full noise is not to be had of cut weights
                spec = replace(known, measure=measure, placement=whole) if full else replace(known, measure=had)
            elif self.begun:
                spec = spec.from_step(self._reached()) if elastic else replace(spec, placement=known.placement)
                spec = replace(spec, measure=known.measure)
            looks = known.looks if self.begun else spec.looks
            spec = replace(spec, arms=arms, margin=margin, looks=looks)
        if spec != known:
            write_json(self.path / "run.json", spec.to_json())
        return spec

    def put_arms(self, arms: tuple[Arm, ...]) -> None:
        """Other arms for a run that lies here: it may be imported before its base."""
        spec = self.spec()
        if arms != spec.arms:
            write_json(self.path / "run.json", replace(spec, arms=arms).to_json())

    # ---- how it stands ----

    @property
    def begun(self) -> bool:
        """Whether a checkpoint lies here."""
        return self.newest.exists() or self.previous.exists()

    def result(self) -> dict[str, Any] | None:
        """result.json of a run that has ended: `status` is failed, or finished with `metrics`, numbers by name.

        None: it has not ended, or the file says neither.
        """
        value = _object(self.path / "result.json") or {}
        value = {k: v for k, v in value.items() if k not in _NUMBERS or (type(v) in (int, float) and _fits(v))}
        status, metrics = value.get("status"), value.get("metrics")
        numbers = isinstance(metrics, dict) and all(type(v) in (int, float) and _fits(v) for v in metrics.values())
        return value if status == "failed" or (status == "finished" and numbers) else None

    def write_result(self, value: dict[str, Any]) -> None:
        """How the run ended, with the time."""
        write_json(self.path / "result.json", {**value, "ended": time.time()})

    def clear_result(self) -> None:
        (self.path / "result.json").unlink(missing_ok=True)

    def state(self) -> State:
        """`interrupted`: it goes on when it is started again; `waiting`: it was never started."""
        result = self.result()
        if result is not None:
            return "finished" if result["status"] == "finished" else "failed"
        if self.holder() is not None:
            return "running"
        return "interrupted" if self._records.exists() else "waiting"

    def lacks_noise(self, spec: RunSpec) -> bool:
        """Whether full noise records were asked for and the run has none."""
        if spec.measure.noise != "full":
            return False
        return not any(r["kind"] == "noise" and r.get("method") == "full" for r in self.records().rows)

    def reason(self) -> str:
        """Why a run is not finished: its result's reason, else who holds it, else the last line of its log."""
        result = self.result() or {}
        if "reason" in result:
            return str(result["reason"])
        if who := self.holder():
            return f"held by {who}"
        lines = [line.split("\r")[-1].strip() for line in _read(self.log, TAIL).decode(errors="replace").split("\n")]
        return next((line for line in reversed(lines) if line), "")

    def newest_record(self) -> dict[str, Any] | None:
        """The last readable record."""
        return next(self.newest_records(), None)

    def newest_records(self) -> Iterator[dict[str, Any]]:
        """Readable records, the last first, as far as the end of the file holds them."""
        raw = _read(self._records, TAIL)
        lines = raw[raw.find(b"\n") + 1 if len(raw) == TAIL else 0 :]
        if (whole := _whole(lines[: lines.rfind(b"\n") + 1])) is not None:
            return iter(whole[::-1])
        return filter(None, map(_record, reversed(lines.split(b"\n"))))

    # ---- records ----

    def records(self) -> Records:
        """All records; a line that was cut by a crash is left out."""
        raw = _read(self._records)
        lines = raw.split(b"\n")
        if (whole := _whole(raw[: len(raw) - len(lines[-1])])) is not None:
            return Records(whole, list(range(len(whole))), 0, zlib.crc32(raw))
        rows = {i: row for i, line in enumerate(lines[:-1]) if (row := _record(line)) is not None}
        return Records(list(rows.values()), list(rows), len(lines) - 1 - len(rows), zlib.crc32(raw))

    def records_checksum(self, size: int) -> int | None:
        """CRC-32 of the first `size` bytes of records; None where there are fewer."""
        raw = _read(self._records)
        return zlib.crc32(raw[:size]) if len(raw) >= size else None

    @contextmanager
    def writer(self, size: int = -1) -> Iterator[Writer]:
        """Append to the first `size` bytes of records (-1: to all), the rest is cut off; OSError if fewer are there."""
        with os.fdopen(_open(self._records, os.O_RDWR | os.O_CREAT), "r+b") as f:
            kept = f.read(size)
            if len(kept) < size:
                raise OSError(
                    f"{self._records} is shorter than its checkpoint says: records are missing; start the run anew"
                )
            f.truncate(len(kept))
            yield Writer(f, kept)

    # ---- events ----

    def append_event(self, event: dict[str, Any]) -> None:
        """Add a line to jobs.jsonl: one write, so that lines of several processes do not mix."""
        _append(self.path / "jobs.jsonl", event)

    def events(self) -> list[dict[str, Any]]:
        """The lines of jobs.jsonl; what cannot be read is left out."""
        return [e for e in map(_parse, _read(self.path / "jobs.jsonl").splitlines()) if isinstance(e, dict)]

    def write_text(self, name: str, text: str) -> None:
        """A file for people and other programs, which nothing here reads; a reader sees the old one or the new one."""
        write_aside(self.path / name, text)

    def append_text(self, name: str, text: str) -> None:
        """More of such a file."""
        with os.fdopen(_open(self.path / name, os.O_WRONLY | os.O_APPEND), "w") as f:
            f.write(text)

    def write_patch(self, patch: str) -> None:
        with os.fdopen(_open(self.path / "code.patch", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as f:
            f.write(patch)

    def open_log(self) -> IO[str]:
        """log.txt, to append to."""
        return os.fdopen(_open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a")

    # ---- checkpoints ----

    def kept(self) -> list[Path]:
        """Checkpoints that are kept, by step."""
        named = (re.fullmatch(r"checkpoint-(\d+)\.pt", path.name) for path in self.path.glob("checkpoint-*.pt"))
        return [self.path / name[0] for name in sorted(filter(None, named), key=lambda name: int(name[1]))]

    def _reached(self) -> int:
        """A step that the run need not go back before: that of its last kept checkpoint."""
        return max((int(path.stem.partition("-")[2]) for path in self.kept()), default=0)

    def publish(self, aside: Path, keep: int | None = None) -> None:
        """Make `aside` the newest checkpoint, and the newest the one before. `keep`: its step, to stay under, too."""
        if keep is not None:  # first: after a kill in between, the run comes to this step again
            path = self.path / f"checkpoint-{keep}.pt"
            path.unlink(missing_ok=True)
            os.link(aside, path)
        if self.newest.exists():
            os.replace(self.newest, self.previous)
        os.replace(aside, self.newest)

    def sweep(self) -> None:
        """Remove what killed processes were writing."""
        for pattern in (".checkpoint.pt.*", ".result.json.*"):  # (.run.json.* may be a launcher's, at this moment)
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)

    # ---- the lock ----

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Hold the run: its `lock` to work on it, `wandb.lock` to mirror it. The kernel lets go when the process dies.

        Raises:
            BusyError: another process holds it.
            OSError: the folder cannot be written, or its file system has no locks.
        """
        with os.fdopen(_open(self.path / name, os.O_RDWR | os.O_CREAT), "r+") as f:
            for attempts_left in reversed(range(5)):  # retry: `holder` holds a shared lock briefly
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not attempts_left:
                        who = f.read().strip() or "another process"
                        raise BusyError(f"{self} is being run by {who}") from None
                    time.sleep(0.1)
                except OSError as e:
                    raise OSError(
                        e.errno,
                        f"the file system of {self} has no file locks (flock: {e.strerror}), so two processes could "
                        "train one run; mount it with locks (Lustre: -o flock), or choose another runs_dir",
                    ) from e
            f.truncate(0)
            f.seek(0)
            f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            f.flush()
            yield

    def holder(self) -> str | None:
        """Who holds the run's lock, or None."""
        with suppress(OSError), open(_open(self.path / "lock", os.O_RDONLY), errors="replace") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f.read(200).strip() or "another process"
        return None


class Writer:
    """Appends records, and knows size and checksum of all that the file holds: a checkpoint keeps both."""

    def __init__(self, file: IO[bytes], kept: bytes) -> None:
        self.file, self.size, self.checksum = file, len(kept), zlib.crc32(kept)

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        self.size += len(line)
        self.checksum = zlib.crc32(line, self.checksum)

    def sync(self) -> None:
        """Put the records up to here on the disk."""
        os.fsync(self.file.fileno())


def find(word: str) -> RunDir:
    """The run that a person means: its folder, or the beginning of its id below RUNS, at most one folder deeper.

    Raises:
        FindError: none is meant, or several.
    """
    if RunDir(word).exists:
        return RunDir(word)
    patterns = (f"{word}*/run.json", f"*/{word}*/run.json") if re.fullmatch("[0-9a-f]+", word) else ()
    found = [path.parent for pattern in patterns for path in sorted(RUNS.glob(pattern))]
    if len(found) == 1:
        return RunDir(found[0])
    several = f"means {len(found)} runs: {', '.join(map(str, found[:8]))}; give more of the id, or the folder"
    none = f"is no run: give a run's folder, or the beginning of a run id below {RUNS}/ (scalerun status lists them)"
    raise FindError(f"{word!r} {several if found else none}")


def looks(root: Path) -> list[dict[str, Any]]:
    """The lines of looks.jsonl beside the runs under `root`: what a report showed of which arm at how many seeds."""
    return [line for line in map(_parse, _read(root / "looks.jsonl").splitlines()) if isinstance(line, dict)]


def append_look(root: Path, look: dict[str, Any]) -> None:
    """Add a line to looks.jsonl: one write, so that lines of several processes do not mix."""
    _append(root / "looks.jsonl", look)


def _append(path: Path, value: dict[str, Any]) -> None:
    line = json.dumps({**value, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n"
    with open(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as f:
        f.write(line.encode())


def read_noise(path: Path) -> list[dict[str, Any]]:
    """The noise records of a file of records: a run's, or the noise.jsonl of a NoiseProbe."""
    return [r for r in map(_record, _read(path).splitlines()) if r is not None and r["kind"] == "noise"]


def make_writable(folder: Path, mode: int = 0o777) -> None:
    """Make the folder where it is not; OSError where it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True, mode=mode)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "read-only", str(folder))


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_aside(path, json.dumps(value, indent=1))


def write_aside(path: Path, text: str) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    with os.fdopen(_open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def _open(path: Path, flags: int) -> int:
    """A descriptor of a regular file (mode 0600), else OSError; writing follows no link, a fifo does not block."""
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return descriptor


def _read(path: Path, last: int | None = None) -> bytes:
    """The content of a regular file, or its last bytes; empty where there is none."""
    try:
        with open(_open(path, os.O_RDONLY), "rb") as f:
            if last is not None:
                f.seek(max(0, os.fstat(f.fileno()).st_size - last))
            return f.read()
    except OSError:
        return b""


def _parse(text: bytes | str) -> Any:
    """The JSON value, or None."""
    with suppress(ValueError, RecursionError):
        return msgspec.json.decode(text)
    with suppress(ValueError, RecursionError):
        value = json.loads(text)  # Python's own form of NaN and infinity
        msgspec.json.encode(value)  # what cannot be written (half a surrogate pair) cannot be shown either
        return value
    return None


def _object(path: Path) -> dict[str, Any] | None:
    value = _parse(_read(path))
    return value if isinstance(value, dict) else None


_Fitting = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # see `_fits`
_VALUES = msgspec.json.Decoder(dict[str, _Fitting | float | str | bool | list[Any] | dict[str, Any] | None])
_KINDS = msgspec.json.Decoder(_Train | _Eval | _Noise | _Event)


def _whole(raw: bytes) -> list[dict[str, Any]] | None:
    """All lines, read at once; None where one has to be looked at: `_record` says which are records."""
    with suppress(ValueError, RecursionError):
        if len(_KINDS.decode_lines(raw)) == raw.count(b"\n"):
            return _VALUES.decode_lines(raw)
    return None


def _record(line: bytes | str) -> dict[str, Any] | None:
    """A line of records.jsonl, if it is one."""
    value = _parse(line)
    try:
        msgspec.convert(value, _Train | _Eval | _Noise | _Event)
    except (msgspec.ValidationError, RecursionError):
        return None
    assert isinstance(value, dict)
    return value if all(map(_fits, value.values())) else None


def _fits(value: Any) -> bool:
    """Whether it is no whole number that a float cannot hold: JSON has no bound, arithmetic does."""
    return not isinstance(value, int) or abs(value) < 2**63
