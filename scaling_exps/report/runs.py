"""Directories of runs -> `Run` values, read through RunDir; what cannot be read is counted and said."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import RunDir, make_writable

LAST = 0.1  # share of training over which the final train loss is averaged
BINS = 50  # of a trajectory


class ReportError(ValueError):
    """There is nothing to report on, or it was asked for in a way that does not exist; the message says what is."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    `curve` is (clock, cumulative training loss) with the clock in samples of plain training, both (n,); `evals` maps a
    metric to (clock, value), `t` is the continuous time of one sample.
    """

    spec: RunSpec
    path: Path
    metrics: dict[str, float]
    curve: tuple[np.ndarray, np.ndarray]
    evals: dict[str, tuple[np.ndarray, np.ndarray]]
    noise: list[dict[str, Any]]
    result: dict[str, Any]
    t: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """A directory that is not in the comparison, and why. `spec` is None where there is no readable one."""

    path: Path
    state: str
    reason: str
    spec: RunSpec | None = None
    diverged: bool = False  # it failed because its loss was no number

    def __str__(self) -> str:
        return f"{self.path.name} is {self.state}" + (f": {self.reason}" if self.reason else "")


@dataclass
class Collection:
    runs: list[Run] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


@contextmanager
def folder(out: Path) -> Iterator[None]:
    """Make the folder that a report is written to; ReportError where it cannot be, or is gone in the middle."""
    try:
        make_writable(out)
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise ReportError(
            f"cannot write to the folder {out}: {e.strerror} ({e.filename}); choose another with --out"
        ) from e


def collect(roots: Iterable[Path], known: dict[Path, Run] | None = None) -> Collection:
    """Every run under `roots`: a run's own directory, or a folder of such.

    Args:
        roots: folders.
        known: finished runs that were read before, by directory; what is new is added (for watching).

    Raises:
        ReportError: a folder does not exist.
    """
    known = {} if known is None else known
    collection, first = Collection(), dict[str, Path]()
    folders: dict[Path, RunDir] = {}
    for root in roots:
        if not root.is_dir():
            raise ReportError(f"no folder {str(root)!r}; give folders of runs (runs_dir, by default ./runs)")
        for run_dir in [*([RunDir(root)] if RunDir(root).exists else []), *RunDir.under(root)]:
            folders.setdefault(run_dir.path.resolve(), run_dir)
    for path, run_dir in folders.items():
        run = known.get(path) or _read(run_dir)
        if isinstance(run, Run):
            known[path] = run
            used = first.setdefault(run.spec.run_id, run.path)
            if used != run.path:
                run = Missing(run.path, "a copy", f"the same run as {used}, which is the one used")
        collection.runs.append(run) if isinstance(run, Run) else collection.missing.append(run)
    return collection


def _read(run_dir: RunDir) -> Run | Missing:
    path = run_dir.path
    try:
        spec = run_dir.spec()
    except PlanError as e:
        return Missing(path, "no run of ours", str(e))
    state, result = run_dir.state(), run_dir.result()
    if result is None or state != "finished":
        reason = str(result.get("reason", "")) if result else _progress(run_dir, spec)
        return Missing(path, state, reason, spec, bool(result and result.get("diverged") is True))
    scale = spec.science.draws * spec.science.stretch  # samples of the stream for one sample of plain training
    train: list[tuple[float, float]] = []
    evals: dict[str, list[tuple[float, float]]] = defaultdict(list)
    noise, t = [], math.nan
    records = run_dir.records()
    for row in records.rows:
        clock = row["samples"] / scale
        if row["kind"] == "train":
            t = row["t"] / clock
            train.append((clock, row["loss"] * row["window"] / scale))
        elif row["kind"] == "noise":
            noise.append({**row, "clock": clock})
        elif row["kind"] == "eval":
            for name, value in row.items():
                if name not in ("step", "samples", "t") and isinstance(value, int | float):
                    evals[name].append((clock, float(value)))
    if not train:
        return Missing(path, "half-written", "it says finished, and has no train records", spec)
    clock, loss = np.array(sorted(train, key=lambda point: point[0]), dtype=float).T
    curve = np.append(0, clock), np.append(0, np.cumsum(loss))
    metrics = {k: float(v) for k, v in result["metrics"].items()} | {"train_loss": _last(curve)}
    notes = [f"{records.damaged} record(s) could not be read"] if records.damaged else []
    if not records.damaged and result.get("records_checksum", records.checksum) != records.checksum:
        notes = ["its records changed since it ended"]
    if bad := [k for k, v in metrics.items() if not math.isfinite(v)]:
        notes.append(f"not a number: {', '.join(bad)}")
    arrays = {k: tuple(np.array(points).T) for k, points in evals.items()}
    kept = {k: v for k, v in result.items() if k != "metrics"}
    return Run(spec, path, metrics, curve, arrays, noise, kept, t, tuple(notes))


def _progress(run_dir: RunDir, spec: RunSpec) -> str:
    """How far an unfinished run is, from the end of its records."""
    step = (run_dir.newest_record() or {}).get("step")
    return f"{step / spec.science.steps:.0%} of its steps" if isinstance(step, int) else "no record yet"


def _last(curve: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean training loss over the last tenth of the samples: one record alone is mostly noise."""
    x, total = curve
    start = x[-1] * (1 - LAST)
    return float((total[-1] - np.interp(start, x, total)) / (x[-1] - start))


def trajectory(runs: Iterable[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Mean training loss of each run in common bins of equal samples: edges (bins + 1,), losses (runs, bins).

    A bin is never finer than the coarsest record, and means are exact: differences of the cumulative loss.
    """
    curves = [r.curve for r in runs]
    bins = min(BINS, *(len(x) - 1 for x, _ in curves))
    edges = np.linspace(0, min(x[-1] for x, _ in curves), bins + 1)
    return edges, np.stack([np.diff(np.interp(edges, *c)) / np.diff(edges) for c in curves])
