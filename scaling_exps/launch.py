"""Starting RunSpecs, and telling how they stand. A job is a directory; what is finished is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling_exps import records
from scaling_exps.config import Config
from scaling_exps.plan import PlanError, RunSpec


class LaunchError(ValueError):
    """Nothing was started; the message says why."""


def launch(specs: list[RunSpec], config: Config) -> bool:
    """Bring every run of the list to its end, skipping those that are.

    Args:
        specs: the planned list, checked as a whole.
        config: its `launch` group and `runs_dir` say where and how; they are the same for the whole list.

    Returns:
        Whether all of them are finished.

    Raises:
        LaunchError, PlanError: the run folder cannot be used; nothing was started.
        data.DataError, models.ModelError: a data set or a network of the list cannot be had; nothing was started.
    """
    root = Path(config.runs_dir)
    todo = [spec for spec in specs if _known_state(root / spec.run_id) != "finished"]
    if todo:
        from scaling_exps import train

        train.preflight(todo)
    dirs = _write(specs, root)
    print(f"{len(specs)} run(s), {len(specs) - len(todo)} finished already, under {root}/", flush=True)
    todo_dirs = [dirs[spec.run_id] for spec in todo]
    if len(todo) == 1 and todo[0].placement.world_size == 1:
        train.run_all(todo_dirs, log=False)
    elif config.launch.parallel == 1 and all(s.placement.world_size == 1 for s in todo):
        for i, run_dir in enumerate(todo_dirs, 1):
            print(f"[{i}/{len(todo)}] ", end="", flush=True)
            train.run_all([run_dir], log=False)
    else:
        for world in sorted({s.placement.world_size for s in todo}):
            _workers([dirs[s.run_id] for s in todo if s.placement.world_size == world], world, config.launch.parallel)
    states = {d: records.state(d) for d in dirs.values()}
    for run_dir, state in states.items():
        if state != "finished":
            print(f"{state}: {run_dir}{_reason(run_dir)}", file=sys.stderr)
    good = all(state == "finished" for state in states.values())
    if not good:
        print("the same command again goes on with what is missing", file=sys.stderr)
    return good


def _known_state(run_dir: Path) -> str:
    """The state of a planned run; PlanError if its directory holds a run.json that this version cannot read."""
    if (run_dir / "run.json").exists():
        records.read_spec(run_dir)
    return records.state(run_dir)


def _write(specs: list[RunSpec], root: Path) -> dict[str, Path]:
    """Make every run's directory and its run.json; a known run gains the arms that it did not have."""
    dirs = {}
    try:
        for spec in specs:
            run_dir = root / spec.run_id
            run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (run_dir / "run.json").exists():
                known = records.read_spec(run_dir)
                arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
                started = (run_dir / "checkpoint.pt").exists()
                spec = replace(spec, arms=arms, placement=known.placement if started else spec.placement)
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


def _workers(run_dirs: list[Path], world: int, parallel: int) -> None:
    """`parallel` workers (each of `world` processes) share the list out by its locks; a bar counts finished runs."""
    from tqdm import tqdm

    module = ["-m", "scaling_exps.train", *map(str, run_dirs)]
    if world > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *module]
    count = min(parallel, len(run_dirs))
    threads = str(max(1, (os.cpu_count() or 1) // (count * world)))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    quiet = subprocess.DEVNULL if world > 1 else None  # torchrun's own report; ours is in log.txt and result.json
    workers = [subprocess.Popen([sys.executable, *module], env=environment, stderr=quiet) for _ in range(count)]
    try:
        with tqdm(total=len(run_dirs), unit="run", disable=None, desc=f"{count} side by side") as bar:
            while any(w.poll() is None for w in workers):
                time.sleep(0.2)
                bar.update(sum((d / "result.json").exists() for d in run_dirs) - bar.n)
            bar.update(sum((d / "result.json").exists() for d in run_dirs) - bar.n)
    except BaseException:
        for w in workers:
            w.terminate()
        for w in workers:
            w.wait()
        raise


def _reason(run_dir: Path) -> str:
    result = records.read_json(run_dir / "result.json") or {}
    if "reason" in result:
        return f": {result['reason']}"
    log = run_dir / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f": {lines[-1]}" if lines else ""


def status(root: Path) -> list[dict[str, Any]]:
    """One row for each run under `root`: run_id, model, rule, batch, seed, state, samples, total, detail.

    Raises:
        LaunchError: there is no such folder.
    """
    if not root.is_dir():
        raise LaunchError(f"no folder {str(root)!r}; runs lie under ./runs, runs_dir= or SCALERUN_RUNS")
    rows: list[dict[str, Any]] = []
    for run_dir in sorted(p.parent for p in root.glob("*/run.json")):
        try:
            spec = records.read_spec(run_dir)
        except PlanError as e:
            rows.append({"run_id": run_dir.name, "state": "unreadable", "detail": str(e)})
            continue
        rows_so_far = records.read_records(run_dir)
        newest = rows_so_far[-1] if rows_so_far else {"samples": 0}
        state = records.state(run_dir)
        detail = ""
        if state == "running":
            rate = _speed(rows_so_far)
            left = (spec.samples(spec.science.steps) - newest["samples"]) / rate if rate else None
            detail = f"{rate:,.0f} samples/s" + (f", {left / 60:.1f} min left" if left is not None else "")
        elif state != "finished":
            detail = _reason(run_dir).removeprefix(": ")
        rows.append(
            {
                "run_id": spec.run_id,
                "model": spec.science.model["name"],
                "rule": "base" if spec.arms[0].kappa == 1 else "+".join(a.rule for a in spec.arms),
                "batch": spec.science.batch,
                "seed": spec.science.seed,
                "state": state,
                "samples": newest["samples"],
                "total": spec.samples(spec.science.steps),
                "detail": detail,
            }
        )
    return rows


def _speed(rows: list[dict[str, Any]]) -> float:
    timed = [r for r in rows if "seconds" in r]
    return timed[-1]["samples"] / timed[-1]["seconds"] if timed and timed[-1]["seconds"] else 0.0


def print_status(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "model", "rule", "batch", "seed", "state", "samples", "")
    colours = {"finished": "green", "running": "cyan", "failed": "red", "unreadable": "red", "interrupted": "yellow"}
    for row in rows:
        share = f"{row['samples'] / row['total']:.0%}" if row.get("total") else ""
        cells = [str(row.get(k, "")) for k in ("run_id", "model", "rule", "batch", "seed", "state")]
        cells[5] = f"[{colours.get(row['state'], 'white')}]{row['state']}[/]"
        table.add_row(*cells, share, row.get("detail", ""))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{n} {state}" for state, n in Counter(r["state"] for r in rows).items()) or "no runs")
