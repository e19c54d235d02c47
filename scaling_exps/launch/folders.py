"""Which runs have work left, and their folders, made before the first one starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import RunDir


class LaunchError(ValueError):
    """Nothing was started; the message says why."""


def under(root: Path) -> list[RunDir]:
    """The run folders in `root`; LaunchError where there is no such folder."""
    if not root.is_dir():
        raise LaunchError(f"no folder {str(root)!r}; runs lie under ./runs, runs_dir= or SCALERUN_RUNS")
    return RunDir.under(root)


def unfinished(specs: list[RunSpec], root: Path) -> list[RunSpec]:
    """The runs that have training left, or noise to be measured; PlanError names each run.json that cannot be read."""
    todo, faults = [], []
    for spec in specs:
        run_dir = RunDir(root / spec.run_id)
        try:
            if run_dir.exists:
                run_dir.spec()
        except PlanError as e:
            faults.append(str(e))
        if run_dir.state() != "finished" or run_dir.lacks_noise(spec):
            todo.append(spec)
    if faults:
        raise PlanError("\n".join(faults))
    return todo


def prepare(
    specs: list[RunSpec], root: Path, elastic: Callable[[RunDir], bool] = lambda _: False
) -> dict[RunDir, RunSpec]:
    """Make every run's folder and run.json; what each run.json then says.

    `elastic`: whether a begun run may go on with another number of processes. LaunchError: `root` cannot be written.
    """
    try:
        run_dirs = {RunDir(root / spec.run_id): spec for spec in specs}
        return {run_dir: run_dir.prepare(spec, elastic(run_dir)) for run_dir, spec in run_dirs.items()}
    except OSError as e:
        raise LaunchError(
            f"cannot write runs under {root}: {e.strerror} ({e.filename}); choose another with runs_dir="
        ) from e
