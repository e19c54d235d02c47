"""Run directories as launching sees them: made once, private to the user, told apart by their state."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from scaling_exps import records
from scaling_exps.plan import RunSpec


class LaunchError(ValueError):
    """Nothing was started; the message says why."""


def known_state(run_dir: Path) -> str:
    """The state of a planned run; PlanError if its directory holds a run.json that this version cannot read."""
    if (run_dir / "run.json").exists():
        records.read_spec(run_dir)
    return records.state(run_dir)


def write(specs: list[RunSpec], root: Path) -> dict[str, Path]:
    """Make every run's directory (mode 0700) and its run.json; a known run gains the arms that it did not have.

    Raises:
        LaunchError: the folder cannot be written.
    """
    dirs = {}
    try:
        for spec in specs:
            run_dir = root / spec.run_id
            run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(run_dir, os.W_OK | os.X_OK):
                raise PermissionError(13, "read-only", str(run_dir))
            if (run_dir / "run.json").exists():
                known = records.read_spec(run_dir)
                arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
                started = any((run_dir / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt"))
                if started:  # a margin is fixed before the run: a later one does not replace it
                    spec = replace(spec, placement=known.placement, margin=known.margin or spec.margin)
                if records.state(run_dir) == "finished":  # it says what was run
                    spec = replace(known, margin=known.margin or spec.margin)
                spec = replace(spec, arms=arms)
                if spec == known:
                    dirs[spec.run_id] = run_dir
                    continue
            records.write_json(run_dir / "run.json", spec.to_json())
            dirs[spec.run_id] = run_dir
    except OSError as e:
        raise LaunchError(
            f"cannot write runs under {root}: {e.strerror} ({e.filename}); choose another with runs_dir="
        ) from e
    return dirs


def reason(run_dir: Path) -> str:
    """Why a run is not finished: its result's reason, else who holds it, else the last line of its log."""
    result = records.read_json(run_dir / "result.json") or {}
    if "reason" in result:
        return str(result["reason"])
    if who := records.holder(run_dir):
        return f"held by {who}"
    log = run_dir / "log.txt"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    lines = [line.split("\r")[-1].strip() for line in lines]
    return next((line for line in reversed(lines) if line), "")
