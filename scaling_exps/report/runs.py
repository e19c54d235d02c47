"""Directories of runs -> `Run` values. Reads run.json, records.jsonl and result.json, and believes none of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scaling_exps import records
from scaling_exps.plan import Arm, RunSpec

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


def make_folder(out: Path) -> None:
    """Make the folder that a report is written to; ReportError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(13, "read-only", str(out))
    except OSError as e:
        raise ReportError(
            f"cannot write to the folder {out}: {e.strerror} ({e.filename}); choose another with --out"
        ) from e


def collect(dirs: Iterable[Path], known: dict[Path, Run] | None = None) -> Collection:
    """Every run under `dirs`: a run's own directory, or a folder of such.

    Args:
        dirs: folders.
        known: finished runs that were read before, by directory; what is new is added (for watching).

    Raises:
        ReportError: a folder does not exist.
    """
    known = {} if known is None else known
    found, seen = Collection(), set()
    for root in dirs:
        if not root.is_dir():
            raise ReportError(f"no folder {str(root)!r}; give folders of runs (runs_dir, by default ./runs)")
        for run_dir in sorted({p.parent for p in [*root.glob("run.json"), *root.glob("*/run.json")]}):
            if run_dir.resolve() in seen:
                continue
            seen.add(run_dir.resolve())
            run = known.get(run_dir) or _read(run_dir)
            if isinstance(run, Missing):
                found.missing.append(run)
            else:
                known[run_dir] = run
                found.runs.append(run)
    unique: dict[str, Run] = {}
    for run in found.runs:
        if run.spec.run_id in unique:
            where = unique[run.spec.run_id].path
            found.missing.append(Missing(run.path, "a copy", f"the same run as {where}, which is the one used", None))
        else:
            unique[run.spec.run_id] = run
    found.runs = list(unique.values())
    return found


def _read(run_dir: Path) -> Run | Missing:
    try:
        spec = records.read_spec(run_dir)
        _ = spec.science.model["name"], spec.science.dataset["name"], [_base(a) for a in spec.arms]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return Missing(run_dir, "no run of ours", str(e) or type(e).__name__)
    if not spec.arms:
        return Missing(run_dir, "no run of ours", "run.json names no arm", spec)
    state = records.state(run_dir)
    result = records.read_json(run_dir / "result.json")
    if result is None or result.get("status") != "finished":
        reason = str(result.get("reason", "")) if result else _progress(run_dir, spec)
        return Missing(run_dir, state, reason, spec)
    final = result.get("metrics")
    if not isinstance(final, dict):
        return Missing(run_dir, "half-written", "result.json has no metrics", spec)
    scale = spec.draws * spec.stretch  # samples of the stream for one sample of plain training
    train: list[tuple[float, float, float]] = []
    evals: dict[str, tuple[list[float], list[float]]] = {}
    noise, torn, t = [], 0, math.nan
    for row in records.read_records(run_dir):
        try:
            kind, clock = row["kind"], row["samples"] / scale
            if kind == "train":
                train.append((clock, row["loss"] * row["window"] / scale, row["window"] / scale))
                t = row["t"] / clock
            elif kind == "eval":
                for name, value in row.items():
                    if name not in ("kind", "step", "samples", "t") and isinstance(value, int | float):
                        xs, ys = evals.setdefault(name, ([], []))
                        xs.append(clock)
                        ys.append(value)
            elif kind == "noise":
                noise.append({**row, "clock": clock})
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            torn += 1
    if not train:
        return Missing(run_dir, "half-written", "it says finished, and has no train records", spec)
    clock, loss, _ = np.array(train).T
    order = np.argsort(clock, kind="stable")
    curve = np.append(0, clock[order]), np.append(0, np.cumsum(loss[order]))
    metrics = {k: float(v) for k, v in final.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    metrics["train_loss"] = _last(curve)
    notes = [f"{torn} record(s) could not be read"] if torn else []
    if bad := [k for k, v in metrics.items() if not math.isfinite(v)]:
        notes.append(f"not a number: {', '.join(bad)}")
    arrays = {k: (np.array(xs), np.array(ys, dtype=float)) for k, (xs, ys) in evals.items()}
    kept = {k: v for k, v in result.items() if k != "metrics"}
    return Run(spec, run_dir, metrics, curve, arrays, noise, kept, t, tuple(notes))


def _base(arm: Arm) -> tuple[Any, ...]:
    return arm.base["batch"], arm.base["lr"], tuple(arm.base["betas"]), arm.kappa + 0.0, arm.base_run_id


def _progress(run_dir: Path, spec: RunSpec) -> str:
    """How far an unfinished run is, from the end of its records."""
    try:
        with open(run_dir / "records.jsonl", "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - 4096))
            lines = f.read().decode(errors="replace").splitlines()
    except OSError:
        return "no record yet"
    for line in reversed(lines):
        try:
            return f"{json.loads(line)['step'] / spec.science.steps:.0%} of its steps"
        except (ValueError, KeyError, TypeError):
            continue
    return "no record yet"


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
