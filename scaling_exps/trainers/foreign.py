"""`scalerun import`: runs of other trainers -> run folders, which `report`, `show` and `diff` read like any other.

What is read: Hugging Face's trainer_state.json (of the run, or of its newest checkpoint), a Lightning CSV log
(metrics.csv and hparams.yaml), wandb's offline folder (run-ID.wandb), and a CSV of a wandb history. From them: losses
and accuracies at their steps, and the plan that `ScaledBy` left there. What nothing says is taken from the command, or
named in the run's notes as unknown; a run is paired with the base run of its seed, whichever of them is imported first.
"""

from __future__ import annotations

import csv
import json
import math
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from scaling_exps import config, plan, rules
from scaling_exps.plan import Arm, Foreign, ForeignData, Placement, RunSpec, Schedule, Science
from scaling_exps.records import RUNS, RunDir, make_writable, read_noise
from scaling_exps.rules import OPTIMIZERS, Goal, Hyper
from scaling_exps.words import Parser

NAMES = {  # of what a history calls its columns
    "train": re.compile(r"(train(ing)?[/_.])?loss(_(step|epoch))?"),
    "loss": re.compile(r"(eval|val|valid|validation|test)[/_.]loss(_epoch)?"),
    "accuracy": re.compile(r"(eval|val|valid|validation|test)[/_.]acc(uracy)?(_epoch)?"),
    "lr": re.compile(r"(train[/_.])?(learning_rate|lr)(-\w+)?"),
}
UNPAIRED = "not imported"  # run id of a base that is not there yet
STEP = re.compile(r"_step|step|(trainer|train)[/_.]global_step|global_step")
LIGHTNING = re.compile(r"trainer[/_.]global_step")  # which counts from 0, in wandb's log as in its CSV's `step`


class ImportRunError(ValueError):
    """A run of another trainer that cannot be read, or lacks what a comparison needs."""


@dataclass
class History:
    """What a trainer left: its rows, each with its step, the plan of `ScaledBy` if any, noise records if any."""

    rows: list[tuple[int, dict[str, float]]]
    known: dict[str, Any] = field(default_factory=dict)
    noise: list[dict[str, Any]] = field(default_factory=list)


def read(path: Path) -> History:
    """The history in a file or folder of one of the known forms.

    Raises:
        ImportRunError: it is none of them, or cannot be parsed.
    """
    readers = {"trainer_state.json": _hugging_face, "metrics.csv": _csv, "*.wandb": _wandb, "*.csv": _csv}
    for pattern, reader in readers.items():
        found = (
            [path] if path.is_file() and path.match(pattern) else sorted(path.glob(pattern)) if path.is_dir() else []
        )
        if not found and pattern == "trainer_state.json":
            found = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        if found:
            try:
                history = reader(found[-1])
            except ImportRunError:  # it says what is wrong already
                raise
            except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
                raise ImportRunError(f"{found[-1]} cannot be read: {type(e).__name__}: {e}") from e
            for folder in (found[-1].parent, found[-1].parent.parent):
                history.noise = history.noise or read_noise(folder / "noise.jsonl")
            return history
    raise ImportRunError(
        f"{path}: no run of another trainer; allowed: a folder or file of trainer_state.json (Hugging Face), "
        "metrics.csv (Lightning), run-ID.wandb (wandb offline), or a CSV of a history with a column of steps"
    )


def _hugging_face(path: Path) -> History:
    log = json.loads(path.read_text())["log_history"]
    known = [row["scalerun"] for row in log if "scalerun" in row]
    for row in log:
        if "train_runtime" in row:  # the closing row, whose loss is the mean over the whole run
            row.pop("train_loss", None)
    return History([(int(r["step"]), _numbers(r)) for r in log], known[-1] if known else {})


def _csv(path: Path) -> History:
    with path.open(newline="") as f:
        table = list(csv.DictReader(f))
    names = [n for n in (table[0] if table else {}) if STEP.fullmatch(n)]
    names.sort(key=lambda n: n == "_step")  # wandb's own counts calls of log; the trainer's, where it is there, steps
    if not names:
        raise ImportRunError(f"{path} has no column of steps (step, _step, trainer/global_step)")
    history = History([(int(float(r[names[0]])), _numbers(r)) for r in table if r[names[0]]])
    if (beside := path.with_name("hparams.yaml")).exists():
        from omegaconf import OmegaConf

        held = OmegaConf.to_container(OmegaConf.load(beside))
        history.known = held.get("scalerun", {}) if isinstance(held, dict) else {}
    if names[0] == "step" or LIGHTNING.fullmatch(names[0]):
        history.rows = [(step + 1, row) for step, row in history.rows]
    return history


def _wandb(path: Path) -> History:
    from wandb.proto import wandb_internal_pb2

    rows, config = list[tuple[int, dict[str, float]]](), dict[str, Any]()
    for data in _log(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        for update in [*record.config.update, *record.run.config.update]:
            *outer, last = update.nested_key or [update.key]
            at = config
            for key in outer:
                at = at.setdefault(key, {})
            at[last] = json.loads(update.value_json)
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        name = next((n for n in items if STEP.fullmatch(n) and n != "_step"), "_step")
        if name in items:
            rows.append((int(items[name]) + bool(LIGHTNING.fullmatch(name)), _numbers(items)))
    return History(rows, config.get("scalerun", {}))


def _log(raw: bytes) -> Iterator[bytes]:
    """The records of wandb's file: LevelDB's log format behind a head of 7 bytes. A torn end is left out."""
    block, at, parts = 32_768, 7, b""
    while at + 7 <= len(raw):
        if (left := block - at % block) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from(
            "<IHB", raw, at
        )  # 1: a whole record, 2: its first part, 3: more, 4: its last
        piece = raw[at + 7 : at + 7 + size]
        at += 7 + size
        parts = piece if kind in (1, 2) else parts + piece
        if kind in (1, 4) and len(piece) == size:
            yield parts


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row; text of a CSV counts as one where it is."""
    out = {}
    for name, value in row.items():
        try:
            out[name] = float(value)
        except (TypeError, ValueError):
            continue
    return {k: v for k, v in out.items() if math.isfinite(v)}


def _columns(history: History, kind: str) -> list[tuple[int, float]]:
    """(step, value) of what the history calls by a name of this kind; a mean over an epoch only where nothing else."""
    found = [(s, n, v) for s, row in history.rows for n, v in row.items() if s > 0 and NAMES[kind].fullmatch(n)]
    finer = [x for x in found if not x[1].endswith("_epoch")]
    return [(s, v) for s, _, v in finer or found]


def spec_of(path: Path, history: History, name: str, given: dict[str, Any]) -> RunSpec:
    """The RunSpec of kind foreign, without its base: an arm that says what the plan says.

    Args:
        given: batch, seed, base_batch, rule, optimizer, where the command names them.

    Raises:
        ImportRunError: no batch is known, no train loss was logged, the run tells otherwise than the command, or what
            the rule is meant to do depends on an optimizer that nobody tells.
    """
    told = {**history.known, "base_batch": history.known.get("base", {}).get("batch")}
    known = {**told, **{k: v for k, v in given.items() if v is not None}}
    for key, value in given.items():
        if None not in (value, told.get(key)) and value != told[key]:
            option = "--" + key.replace("_", "-")
            raise ImportRunError(
                f"{path}: {option} {value} contradicts what its trainer recorded there, {told[key]}; leave {option} "
                "out, or give it to the runs that lack it in an import of their own"
            )
    for key, option in (("batch", "--batch"), ("base_batch", "--base-batch")):
        if given[key] is not None and given[key] < 1:
            raise ImportRunError(f"{option} {given[key]}: a batch is at least 1 example")
    if not isinstance(known.get("batch"), int) or known["batch"] < 1:
        raise ImportRunError(f"{path}: the global batch is not told: give --batch N (over devices and accumulation)")
    train = _columns(history, "train")
    scaled = known.get("scaled", {})
    lr = scaled.get("lr", max((v for _, v in _columns(history, "lr")), default=None))
    seen = ", ".join(sorted({n for _, row in history.rows for n in row})) or "nothing"
    if not train:
        raise ImportRunError(f"{path}: no train loss among {seen}; it is to be called loss or train_loss")
    if not lr:
        raise ImportRunError(f"{path}: no learning rate among {seen}; log it, or add a column lr")
    batch, steps, hyper = known["batch"], max(s for s, _ in history.rows), _hyper({"lr": lr, **scaled})
    seed = known.get("seed")
    there = {"optimizer": "optimizer" in known, "betas": hyper.betas, "eps": "eps" in scaled, "seed": seed is not None}
    unknown = [name for name, has in there.items() if not has]
    rule = known.get("rule") or "none"
    (default,) = plan.plan(config.compose(["logger=none"]))
    science = Science(
        model=cast(Any, Foreign(name=name)), dataset=cast(Any, ForeignData(name="another trainer's data")), content="",
        optimizer=str(known.get("optimizer", "unknown optimizer")),
        hyper=hyper, svag=1, batch=batch, micro_batch=batch, steps=steps, precision="unknown",
        freeze_last=False, statistics_samples=0, seed=int(seed or 0),
        schedule=Schedule(total_samples=steps * batch, warmup_samples=0.0, warmup="unknown", warmup_from=0.0,
                          decay="unknown", milestones=(), gamma=1.0),
    )  # fmt: skip
    notes = (f"foreign: imported from {path}", f"unknown: {', '.join([*unknown, 'data', 'schedule', 'precision'])}")
    base_batch = known.get("base_batch") or batch
    kappa = batch / base_batch
    if kappa != 1 and not there["optimizer"] and len(set(rules.find(rule).goals.values())) > 1:
        raise ImportRunError(
            f"{path}: nobody tells the optimizer, and the rule {rule} is a rule for some and a control for others: "
            f"give --optimizer {{{', '.join(OPTIMIZERS)}}}"
        )
    goal: Goal = "match" if kappa == 1 else _goal(rule, science)
    role: plan.Role = "base" if kappa == 1 else "control" if goal == "control" else "rule"
    base = science if role == "base" else replace(
        science, batch=base_batch, hyper=_hyper({"lr": lr, **(known.get("base") or scaled)}), steps=round(steps * kappa)
    )  # fmt: skip
    arm = Arm(rule=rule, goal=goal, role=role, kappa=kappa, duration=1.0, base=base.numbers(),
              base_run_id=plan.run_id(science) if role == "base" else UNPAIRED)  # fmt: skip
    return replace(default, science=science, arms=(arm,), notes=notes, margin={}, looks=(),
                   placement=Placement(world_size=1, accumulation=1, compile=False))  # fmt: skip


def _goal(rule: str, science: Science) -> Goal:
    """The question that the rule answers for the run's optimizer; RuleError where it is not meant for it."""
    row = OPTIMIZERS.get(science.optimizer)
    goals = rules.find(rule, row.family if row else None).goals
    return goals.get(science.family, next(iter(goals.values())))  # of an unknown optimizer: one that the rule is for


def _hyper(recipe: dict[str, Any]) -> Hyper:
    """The numbers of a recipe of `ScaledBy`; 0 or none where it says nothing."""
    betas = next((recipe[o.field] for o in OPTIMIZERS.values() if o.field in recipe), ())
    betas = tuple(betas) if isinstance(betas, list | tuple) else (betas,)
    return Hyper(float(recipe["lr"]), betas, float(recipe.get("eps", 0.0)), float(recipe.get("weight_decay", 0.0)))


def pair(root: Path, new: set[str]) -> None:
    """Give the imported runs under `root` their base runs, where those are there by now.

    Args:
        new: run ids of this import; of several base runs that would do, one of these is taken.
    """
    specs: dict[RunDir, RunSpec] = {}
    for run_dir in RunDir.under(root):
        with suppress(plan.PlanError):
            specs[run_dir] = run_dir.spec()
    bases = [s for s in specs.values() if any(a.role == "base" for a in s.arms)]
    bases.sort(key=lambda s: s.run_id not in new)
    for run_dir, spec in specs.items():
        if isinstance(spec.science.model, Foreign):
            paired = dict.fromkeys(_paired(arm, spec, bases) for arm in spec.arms)  # a second import adds its arm
            run_dir.put_arms(tuple(paired))


def _paired(arm: Arm, spec: RunSpec, bases: list[RunSpec]) -> Arm:
    """`arm` with the base run of its name, seed and base batch, where it lacks one and there is one."""
    if arm.role == "base" or arm.base_run_id not in (UNPAIRED, spec.run_id):  # its own: so said an older import
        return arm
    s = spec.science
    wanted = (s.model, s.seed, round(s.batch / arm.kappa))
    base = next((b for b in bases if (b.science.model, b.science.seed, b.science.batch) == wanted), None)
    return replace(arm, base=base.science.numbers(), base_run_id=base.run_id) if base else arm


def write(run_dir: RunDir, spec: RunSpec, history: History) -> None:
    """run.json, records.jsonl and result.json of a finished run."""
    s, rows = spec.science, list[tuple[int, dict[str, Any]]]()

    def row(kind: str, step: int, **metrics: Any) -> None:
        t = rules.continuous_time(s.hyper, step, s.family)
        rows.append((step, {"kind": kind, "step": step, "samples": s.samples(step), "t": t, **metrics}))

    before = 0
    for step, loss in _columns(history, "train"):
        if step > before:
            row("train", step, loss=loss, window=s.samples(step) - s.samples(before))
            before = step
    accuracy = dict(_columns(history, "accuracy"))
    for step, loss in dict(_columns(history, "loss")).items():
        row("eval", step, loss=loss, **({"accuracy": accuracy[step]} if step in accuracy else {}))
    rows += [(r["step"], r) for r in history.noise]
    rows.sort(key=lambda x: x[0])
    run_dir.prepare(spec)
    with run_dir.writer(0) as writer:
        for _, record in rows:
            writer.write(record)
    tests = [r for _, r in rows if r["kind"] == "eval"]
    last = {f"test_{k}": tests[-1][k] for k in ("loss", "accuracy") if tests and k in tests[-1]}
    trained = [r["loss"] for _, r in rows if r["kind"] == "train"]
    run_dir.write_result({"status": "finished", "metrics": {"train_loss": trained[-1], **last}, "imported": True})


def main(words: list[str]) -> int:
    """`scalerun import WORDS`: all of the runs, or none."""
    parser = Parser(
        prog="scalerun import",
        description="Runs of other trainers as run folders that `scalerun report` judges.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="path", help="trainer_state.json, metrics.csv, *.wandb, "
                        "or the folder of one; of one sweep")  # fmt: skip
    parser.add_argument("--name", help="what the network is called in tables (default: its trainer); one a comparison")
    parser.add_argument("--batch", type=int, help="global batch of these runs, where they do not tell it")
    parser.add_argument("--base-batch", type=int, help="batch that they were scaled from, where they do not tell it")
    parser.add_argument("--rule", help="by which rule, where they do not tell it")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="that they took, where they do not tell it")
    parser.add_argument("--seed", type=int, help="of these runs, where they do not tell it (default 0)")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of runs (default: runs)")
    options = parser.parse_args(words)
    given = {k: getattr(options, k) for k in ("batch", "base_batch", "rule", "optimizer", "seed")}
    found = []
    for path in options.paths:
        history = read(path)
        name = options.name or str(history.known.get("trainer", "another trainer"))
        found.append((path, history, spec_of(path, history, name, given)))
    specs = [spec for _, _, spec in found]
    twice = [s.run_id for s in specs if [t.run_id for t in specs].count(s.run_id) > 1]
    if twice:
        same = ", ".join(str(path) for (path, _, _), s in zip(found, specs, strict=True) if s.run_id == twice[0])
        raise ImportRunError(
            f"{same} would be one run: they differ in nothing that is known; import each with its --seed, or one "
            "of them if they record the same seed"
        )
    make_writable(options.out)
    folders = [RunDir(options.out / spec.run_id) for spec in specs]
    for run_dir, (_, history, spec) in zip(folders, found, strict=True):
        write(run_dir, spec, history)
    pair(options.out, {spec.run_id for spec in specs})
    for run_dir, (path, _, spec) in zip(folders, found, strict=True):
        s, lacks = spec.science, any(a.base_run_id == UNPAIRED for a in run_dir.spec().arms)
        base = f", base run of batch {spec.arms[0].base.batch} not imported yet" if lacks else ""
        print(f"{path} -> {run_dir}: batch {s.batch}, seed {s.seed}{base}, {spec.notes[1]}")
    print(f"scalerun report {options.out}")
    return 0
