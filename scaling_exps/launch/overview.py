"""How the runs of a folder stand: their directories, joined with what SLURM says of their jobs."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from scaling_exps.launch import folders, queue
from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import PlanError
from scaling_exps.records import RunDir


def status(root: Path, strict: bool = False) -> list[dict[str, Any]]:
    """One row for each run under `root`: run_id, model, rule, batch, seed, state, samples, total, job, detail.

    State is one of finished, failed, running, queued, interrupted (it goes on when started again), waiting (never
    started), unreadable.

    Args:
        root: the folder of runs.
        strict: refuse to tell without SLURM. Otherwise, where it does not answer, the directories have to do.

    Raises:
        LaunchError: there is no such folder; strictly, also where SLURM does not answer.
    """
    jobs = {run_dir: queue.last_job(run_dir) for run_dir in folders.under(root)}
    in_queue: dict[str, queue.Entry] = {}
    ended: dict[str, str] = {}
    if any(jobs.values()):
        try:
            in_queue = queue.entries()
            ended_ids = [j.id for d, j in jobs.items() if j and j.id not in in_queue and d.state() != "finished"]
            ended = queue.ended(ended_ids)
        except LaunchError as e:
            if strict:
                raise
            print(f"scalerun: {e}: shown is what the directories say", file=sys.stderr)
    return [_row(run_dir, job, in_queue, ended) for run_dir, job in jobs.items()]


def _row(
    run_dir: RunDir, job: queue.Job | None, in_queue: dict[str, queue.Entry], ended: dict[str, str]
) -> dict[str, Any]:
    entry, end = (in_queue.get(job.id), ended.get(job.id)) if job else (None, None)
    try:
        spec = run_dir.spec()
    except PlanError as e:
        return {"run_id": run_dir.path.name, "state": "unreadable", "detail": str(e)}
    science, newest = spec.science, run_dir.newest_record() or {"samples": 0}
    state: str = run_dir.state()
    details = []
    done = state == "running" or (state == "finished" and not run_dir.lacks_noise(spec))
    if entry is not None and not done:  # a failed run is queued when it is tried again
        state = "queued" if entry.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING") else "running"
    if job is not None:
        times = job.starts if state == "queued" else job.starts - 1
        if times > 0:
            details.append(f"requeued {times} time{'s' if times > 1 else ''}")
    if state == "queued" and entry is not None and entry.reason not in ("", "None"):
        details.append(entry.reason)
    if state == "running":
        timed = [r for r in run_dir.records().rows if isinstance(r.get("seconds"), float) and r["seconds"] > 0]
        if timed and (rate := timed[-1]["samples"] / timed[-1]["seconds"]):
            left = (science.samples(science.steps) - newest["samples"]) / rate
            details += [f"{rate:,.0f} samples/s", f"{left / 60:.1f} min left"]
    elif state != "finished" and entry is None:
        if end and state != "failed":
            state = "failed" if end not in ("COMPLETED", "CANCELLED") else state
            details.append(f"SLURM: {end}")
        details.append(run_dir.reason())
    return {
        "run_id": spec.run_id,
        "model": science.model.name,
        "rule": "base" if spec.arms[0].role == "base" else "+".join(a.rule for a in spec.arms),
        "batch": science.batch,
        "seed": science.seed,
        "state": state,
        "samples": newest["samples"],
        "total": science.samples(science.steps),
        "job": job.id if job else None,
        "detail": ", ".join(filter(None, details)),
    }


def count(rows: list[dict[str, Any]]) -> str:
    """`3 finished, 2 running`."""
    return ", ".join(f"{n} {state}" for state, n in Counter(r["state"] for r in rows).items()) or "no runs"


def print_status(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("run", "model", "rule", "batch", "seed", "state", "samples", "")
    colours = {
        "finished": "green", "running": "cyan", "queued": "blue",
        "failed": "red", "unreadable": "red", "interrupted": "yellow",
    }  # fmt: skip
    for row in rows:
        share = f"{row['samples'] / row['total']:.0%}" if row.get("total") else ""
        cells = [str(row.get(k, "")) for k in ("run_id", "model", "rule", "batch", "seed", "state")]
        cells[5] = f"[{colours.get(row['state'], 'white')}]{row['state']}[/]"
        table.add_row(*cells, share, escape(row.get("detail", "")))
    Console().print(table, count(rows), sep="\n")
