"""wandb: a mirror of records.jsonl, live while wandb can be reached, else replayed later by `scalerun sync`.

Line i of records.jsonl is the row of wandb's step i, with the training step and the clock as columns. So what wandb has
is known from its own count of rows, and a replay sends exactly the lines that it lacks, however often it is asked.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import RunDir

GROUPS = ("train", "eval", "noise", "event")


class MirrorError(ValueError):
    """Nothing can be uploaded; the message says why and what to do."""


class Mirror:
    """The run in wandb: same id, records as `train/loss`, `eval/accuracy`, ... over `samples`.

    Runs lie there as they are compared: the group is the experiment, the job type the arm; batch, rule, kappa, seed and
    the hyperparameters are columns, and the summary holds the gap to the base run where that is finished. Whatever goes
    wrong there is said once and never stops the run.

    Args:
        line: of records.jsonl, that is logged next.
    """

    def __init__(self, run_dir: RunDir, spec: RunSpec, line: int) -> None:
        self.run_dir, self.spec, self.line = run_dir, spec, line
        self.run: Any = None
        self.known = 0  # lines that wandb has

    def open(self) -> None:
        """Connect, and send the lines that wandb lacks; without a connection say so once."""
        try:
            self.run = _init(self.run_dir, self.spec)
            self.known = self.run.starting_step
            rows = self.run_dir.records().rows[: self.line]
            for line in range(self.known, len(rows)):
                self._send(line, rows[line])
        except Exception as e:
            self._lose(e)

    def log(self, record: dict[str, Any]) -> None:
        """Send the next line."""
        if self.run is not None and self.line >= self.known:
            try:
                self._send(self.line, record)
            except Exception as e:
                self._lose(e)
        self.line += 1

    def _send(self, line: int, record: dict[str, Any]) -> None:
        """One record is one row; two estimates of the noise at one step have groups of their own."""
        group = "/".join(str(record[k]) for k in ("kind", "method") if k in record)
        metrics = {f"{group}/{k}": v for k, v in record.items() if k not in ("kind", "step", "samples", "t", "method")}
        clock = {"samples": record["samples"], "t": record.get("t"), "trainer/step": record["step"]}
        self.run.log(clock | metrics, step=line)

    def summarise(self, metrics: dict[str, float]) -> None:
        """The final metrics, and their gaps to the base run of the same seed where that is finished beside this run."""
        if self.run is None:
            return
        base_id = self.spec.arms[0].base_run_id
        base = RunDir(self.run_dir.path.parent / base_id).result() or {} if base_id != self.spec.run_id else {}
        theirs = base.get("metrics") if base.get("status") == "finished" else None
        gaps = (
            {f"gap/{k}": v - theirs[k] for k, v in metrics.items() if k in theirs} if isinstance(theirs, dict) else {}
        )
        try:
            self.run.summary.update({f"final/{k}": v for k, v in metrics.items()} | gaps)
        except Exception as e:
            self._lose(e)

    def close(self, exit_code: int) -> None:
        if self.run is not None:
            try:
                self.run.finish(exit_code=exit_code)
            except Exception as e:
                self._lose(e)

    def _lose(self, error: Exception) -> None:
        self.run = None
        why = f"{type(error).__name__}: {error}"
        print(
            f"wandb is off for the rest of this run ({why}); `scalerun sync` uploads its records later", file=sys.stderr
        )


@contextlib.contextmanager
def live(run_dir: RunDir, spec: RunSpec, line: int) -> Iterator[Mirror]:
    """The mirror of a run that is trained now; where wandb is not asked for, or offline, it does nothing."""
    mirror = Mirror(run_dir, spec, line)
    if spec.logger == "wandb" and online():
        mirror.open()
    run_dir.append_event({"event": "mirror", "live": mirror.run is not None})
    try:
        yield mirror
    except BaseException:
        mirror.close(1)
        raise
    mirror.close(0)


def online() -> bool:
    """Whether runs are to be mirrored as they go: WANDB_MODE says so, or nothing and somebody is logged in."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    return logged_in() if mode in ("", "online", "shared") else False


def logged_in() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False))


def sync(roots: list[Path], dry_run: bool = False) -> int:
    """Replay the records of the runs under `roots` that were made with logger=wandb; returns the exit code.

    Raises:
        MirrorError: no such folder, nothing to upload, or nobody is logged in.
    """
    todo = []
    for root in roots:
        if not root.is_dir():
            raise MirrorError(f"no folder {str(root)!r}; give folders of runs (runs_dir, by default ./runs)")
        for run_dir in [RunDir(root)] if RunDir(root).exists else RunDir.under(root):
            try:
                spec = run_dir.spec()
            except PlanError as e:
                print(f"scalerun: {e}", file=sys.stderr)
                continue
            mirrored = [e for e in run_dir.events() if e.get("event") == "mirror"]
            mirrored_live = run_dir.state() == "running" and bool(mirrored) and bool(mirrored[-1].get("live"))
            if spec.logger == "wandb" and not mirrored_live and run_dir.records().rows:
                todo.append((run_dir, spec))
    if not todo:
        raise MirrorError(f"nothing to upload under {', '.join(map(str, roots))}: no records of runs with logger=wandb")
    if dry_run:
        for run_dir, _ in todo:
            print(f"{run_dir}: {len(run_dir.records().rows)} records")
        return 0
    if not logged_in():
        raise MirrorError("nobody is logged in to wandb: `wandb login`, or set WANDB_API_KEY")
    good = True
    for run_dir, spec in todo:
        rows, result = run_dir.records().rows, run_dir.result() or {}
        mirror = Mirror(run_dir, spec, len(rows))
        mirror.open()
        if mirror.run is None:
            good = False
            continue
        if result.get("status") == "finished":
            mirror.summarise(result["metrics"])
        mirror.close(1 if result.get("status") == "failed" else 0)
        print(f"{run_dir}: {max(0, len(rows) - mirror.known)} of {len(rows)} records uploaded")
    return 0 if good else 1


def _init(run_dir: RunDir, spec: RunSpec) -> Any:
    """wandb's run of this id, made or resumed, with a run of its own whatever else this process mirrors."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    science, arm = spec.science, spec.arms[0]
    rule = "base" if arm.role == "base" else arm.rule
    job = rule if arm.role == "base" else f"{rule} x{arm.kappa:g}"
    job += f" svag {science.svag}" if science.svag > 1 else ""
    described = spec.to_json()
    columns = {
        "model": science.model.name,
        "dataset": science.dataset.name,
        "optimizer": science.optimizer,
        "batch": science.batch,
        "rule": rule,
        "kappa": arm.kappa,
        "svag": science.svag,
        "seed": science.seed,
        **{k: described["science"]["hyper"][k] for k in ("lr", "betas", "eps", "weight_decay")},
    }
    own = [spec.experiment, *(columns[k] for k in ("model", "dataset", "optimizer", "rule"))]
    tags = [*own, f"batch {science.batch}", f"seed {science.seed}", *spec.wandb.tags]
    run = wandb.init(
        id=spec.run_id,
        name=f"{science.model.name} {job} batch {science.batch} seed {science.seed}",
        project=spec.wandb.project or os.environ.get("WANDB_PROJECT", "scalerun"),
        entity=spec.wandb.entity,
        group=spec.experiment or f"{science.model.name}-{science.dataset.name}-{science.optimizer}",
        job_type=job,
        tags=list(dict.fromkeys(str(t)[:64] for t in tags if t)),
        config=columns | {k: described[k] for k in ("science", "arms", "placement", "notes", "margin")},
        dir=run_dir.path,
        resume="allow",
        reinit="create_new",  # else wandb hands out the run that a failed neighbour left open
        mode="online",
        settings=wandb.Settings(console="off", x_disable_stats=True, init_timeout=30, disable_git=True),
    )
    for group in GROUPS:
        run.define_metric(f"{group}/*", step_metric="samples")
    return run
