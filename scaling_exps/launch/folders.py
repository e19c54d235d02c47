"""Which runs have work left, and their folders, made before the first one starts."""

from __future__ import annotations

from pathlib import Path

from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir


class LaunchError(ValueError):
    """Nothing was started; the message says why."""


def unfinished(specs: list[RunSpec], root: Path) -> list[RunSpec]:
    """The runs that have work left: training, or noise that is to be measured.

    Raises:
        PlanError: a run's folder holds a run.json that this version cannot read.
    """
    todo = []
    for spec in specs:
        run_dir = RunDir(root / spec.run_id)
        if run_dir.exists:
            run_dir.spec()
        if run_dir.state() != "finished" or run_dir.lacks_noise(spec):
            todo.append(spec)
    return todo


def prepare(specs: list[RunSpec], root: Path) -> dict[RunDir, RunSpec]:
    """Make every run's folder and run.json; what each run.json then says (a begun run keeps its own).

    Raises:
        LaunchError: the folder cannot be written.
    """
    prepared = {}
    try:
        for spec in specs:
            run_dir = RunDir(root / spec.run_id)
            prepared[run_dir] = run_dir.prepare(spec)
    except OSError as e:
        raise LaunchError(
            f"cannot write runs under {root}: {e.strerror} ({e.filename}); choose another with runs_dir="
        ) from e
    return prepared
