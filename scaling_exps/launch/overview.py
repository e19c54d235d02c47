"""How the runs of a folder stand: their directories, joined with what SLURM says of their jobs."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec.structs import astuple

from scaling_exps.launch import folders, queue
from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import NONE, PlanError, RunSpec, amount, print_lines, print_table
from scaling_exps.records import RunDir

COLOURS = {
    "finished": 32, "running": 36, "queued": 34, "failed": 31, "unreadable": 31, "interrupted": 33,
}  # fmt: skip
# The columns, as they stand; the number is the order in which a narrow window gives them up, the highest first.
_COLUMNS = {
    "run": 0, "experiment": 9, "model": 3, "dataset": 8, "optimizer": 7, "batch": 1, "κ": 10, "rule": 2, "svag": 5.5,
    "seed": 5, "state": 4, "done": 12, "metric": 6, "samples/s": 13, "left": 11,
}  # fmt: skip
_FAILED = ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL")  # of a preempted or timed-out job the run goes on: no failure
_EVALUATED = {"accuracy": "test_accuracy", "perplexity": "perplexity", "loss": "test_loss"}


def status(root: Path, strict: bool = False) -> list[dict[str, Any]]:
    """One row for each run under `root`, in the order of a plan: recipe by recipe, base runs, then by batch and rule.

    Its fields: run_id, experiment, model, dataset, optimizer, batch, kappa, rule, svag, seed, state, samples, total,
    metric and value (the newest), samples_per_second, seconds_left (of a running one), job, detail.

    State is one of finished, failed, running, queued, interrupted (it goes on when started again), waiting (never
    started), unreadable.

    Args:
        root: the folder of runs.
        strict: refuse to tell without SLURM. Otherwise, where it does not answer, the directories have to do.

    Raises:
        LaunchError: there is no such folder; strictly, also where SLURM does not answer.
    """
    return describe(folders.under(root), strict)


def describe(run_dirs: Iterable[RunDir], strict: bool = False) -> list[dict[str, Any]]:
    """The rows of `status`, of these runs."""
    jobs = {run_dir: queue.last_job(run_dir) for run_dir in run_dirs}
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
    rows = []
    for run_dir, job in jobs.items():
        try:
            spec = run_dir.spec()
        except PlanError as e:
            unreadable = {"run_id": run_dir.path.name, "state": "unreadable", "detail": str(e)}
            rows.append(((1,), unreadable))
        else:
            rows.append(((0, *_place(spec)), _row(run_dir, spec, job, in_queue, ended)))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _place(spec: RunSpec) -> tuple[Any, ...]:
    """Where a plan has the run."""
    s, arm = spec.science, spec.arms[0]
    recipe = spec.experiment or "", s.model.name, s.dataset.name, s.optimizer, repr((s.model, s.dataset))
    role = ("base", "rule", "control").index(arm.role)
    return *recipe, astuple(arm.base), role > 0, s.batch, role, arm.rule, s.svag, s.seed


def _row(
    run_dir: RunDir, spec: RunSpec, job: queue.Job | None, in_queue: dict[str, queue.Entry], ended: dict[str, str]
) -> dict[str, Any]:
    entry, end = (in_queue.get(job.id), ended.get(job.id)) if job else (None, None)
    science, newest, result = spec.science, list(run_dir.newest_records()), run_dir.result() or {}
    samples, total = newest[0]["samples"] if newest else 0, science.samples(science.steps)
    state: str = result["status"] if result else run_dir.state()
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
    if state not in ("finished", "running") and entry is None:
        if end and state != "failed":
            state = "failed" if end in _FAILED else state
            details.append(f"SLURM: {end}")
        details.append(run_dir.reason())
    metric, value = _metric(result.get("metrics") or {}, newest)
    timed = (r["samples"] / s for r in newest if isinstance(s := r.get("seconds"), float) and s > 0)
    rate = result.get("samples_per_second") or next(timed, None)
    return {
        "run_id": spec.run_id,
        "experiment": spec.experiment,
        "model": science.model.name,
        "dataset": science.dataset.name,
        "optimizer": science.optimizer,
        "batch": science.batch,
        "kappa": spec.arms[0].kappa,
        "rule": "base" if spec.arms[0].role == "base" else "+".join(a.rule for a in spec.arms),
        "svag": science.svag,
        "seed": science.seed,
        "state": state,
        "samples": samples,
        "total": total,
        "metric": metric,
        "value": value,
        "samples_per_second": rate,
        "seconds_left": (total - samples) / rate if rate and state == "running" else None,
        "job": job.id if job else None,
        "detail": ", ".join(filter(None, details)),
    }


def _metric(metrics: dict[str, float], newest: list[dict[str, Any]]) -> tuple[str | None, float | None]:
    """What people look at: of the result, else of the newest evaluation, else the train loss."""
    evaluated: dict[str, Any] = next((r for r in newest if r["kind"] == "eval"), {})
    trained: dict[str, Any] = next((r for r in newest if r["kind"] == "train"), {})
    known = {name: evaluated[k] for k, name in _EVALUATED.items() if k in evaluated} | metrics
    known |= {"train_loss": trained["loss"]} if trained else {}
    name = next((n for n in (*_EVALUATED.values(), "train_loss") if n in known), None)
    return name, known[name] if name else None


def title(spec: RunSpec) -> str:
    """A run in a line."""
    s, arm = spec.science, spec.arms[0]
    led = "base" if arm.role == "base" else f"rule {arm.rule}, κ = {arm.kappa:g}"
    return f"{s.model.name} on {s.dataset.name}, {s.optimizer}, batch {s.batches}, {led}, seed {s.seed}"


def count(rows: list[dict[str, Any]]) -> str:
    """`3 finished, 2 running`."""
    return ", ".join(f"{n} {state}" for state, n in Counter(r["state"] for r in rows).items()) or "no runs"


def print_status(rows: list[dict[str, Any]]) -> None:
    """A table, how many stand how, and the reasons of those that stand badly, each once."""
    ids = {r["run_id"] for r in rows}  # a copied folder has its run's
    length = next(n for n in itertools.count(8) if len({i[:n] for i in ids}) == len(ids))  # so many letters tell them
    shared = {r.get("metric") for r in rows} - {None}
    one = next(iter(shared)) if len(shared) == 1 else None
    cells, reasons = [], dict[str, list[str]]()
    for row in rows:
        run = row["run_id"] if row["state"] == "unreadable" else row["run_id"][:length]
        colour = COLOURS.get(row["state"], 0) if sys.stdout.isatty() and "NO_COLOR" not in os.environ else 0
        cells.append({"run": run, "state": f"\033[{colour}m{row['state']}\033[0m" if colour else row["state"]})
        if row.get("detail"):
            reasons.setdefault(f"{row['state']}: {row['detail']}", []).append(run)
        if "model" not in row:
            continue
        rate, left = row["samples_per_second"], row["seconds_left"]
        cells[-1] |= {k: str(row[k] or NONE) for k in ("experiment", "model", "dataset", "optimizer", "rule")}
        cells[-1] |= {"batch": f"{row['batch']:,}", "κ": f"{row['kappa']:g}", "seed": str(row["seed"])}
        cells[-1] |= {"svag": str(row["svag"]), "done": f"{row['samples'] / row['total']:.0%}"}
        cells[-1]["metric"] = _value(row["metric"], row["value"], named=one is None)
        cells[-1] |= {"samples/s": NONE if rate is None else f"{rate:,.0f}", "left": amount(left, "seconds")}
    alike = [k for k in ("experiment", "model", "dataset", "optimizer", "svag") if len({c.get(k) for c in cells}) < 2]
    idle = {
        "done": all(r["state"] == "finished" for r in rows),
        "left": all(c.get("left", NONE) == NONE for c in cells),
    }
    columns = {k: rank for k, rank in _COLUMNS.items() if k not in alike and not idle.get(k)}
    if one:  # its name is the column's
        columns = {one.replace("_", "\n") if k == "metric" else k: rank for k, rank in columns.items()}
        cells = [{one.replace("_", "\n") if k == "metric" else k: text for k, text in c.items()} for c in cells]
    print_table(cells, columns, shutil.get_terminal_size((80, 24)).columns)
    said = [
        f"{reason}  [{', '.join(r[:8])}{f', {len(r) - 8} more' if len(r) > 8 else ''}]" for reason, r in reasons.items()
    ]
    print_lines([count(rows), *said])


def _value(metric: str | None, value: float | None, named: bool) -> str:
    if metric is None or value is None:
        return NONE
    number = f"{value:.2%}" if metric == "test_accuracy" else f"{value:,.4g}"
    return f"{metric.replace('_', ' ')} {number}" if named else number
