"""Is the scaled run the base run? Runs paired by seed -> rows with verdicts. See docs/comparison.md.

`judge` tests one metric; here is what is compared with what, and what an arm's verdict means. An arm that diverges on
every seed is `different`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from scaling_exps.noise.validity import Validity
from scaling_exps.plan import Arm, RunSpec
from scaling_exps.plan.margin import ALPHA, ENOUGH, spent
from scaling_exps.report import prediction, svag
from scaling_exps.report.judge import METRICS, Test, conclude, form, judge, mean_sd
from scaling_exps.report.runs import Collection, Missing, ReportError, Run, trajectory


@dataclass(frozen=True)
class Row:
    """One arm at one batch size, over its seeds; `rule` is `base` for the base runs."""

    setting: str
    rule: str
    batch: int
    kappa: float
    svag: int  # ℓ; 1: plain training
    role: str  # base | rule (under test) | control
    seeds: tuple[int, ...]
    metrics: dict[str, tuple[float, float]]  # name -> mean, standard deviation over seeds
    tests: tuple[Test, ...]
    verdict: str
    seeds_needed: int | None
    remarks: tuple[str, ...]
    runs: tuple[Run, ...] = field(repr=False)
    power: str = ""  # of an arm that is not different: which controls are, at its batch, or that none is
    key: str = ""  # what the arm is, whatever else lies beside it: of the setting, rule and batch
    looks: tuple[int, ...] = ()  # seeds at which it was declared to be judged; none: once, at the end
    predicted: Validity | None = None  # from the base runs' noise, of a rule under test
    measured: prediction.Change | None = None
    ramp: str = ""  # its stages; then `batch` and `kappa` are those of the one furthest from the base

    @property
    def gaps(self) -> dict[str, Test]:
        return {t.metric: t for t in self.tests}

    @property
    def powerless(self) -> bool:
        return self.power.startswith("no power")

    @property
    def shown(self) -> int:
        """Pairs of a row that shows a verdict; 0 where it shows none."""
        judged = self.verdict in ("equivalent", "different", "inconclusive")
        return max((t.n for t in self.tests if t.margin is not None), default=0) if judged else 0

    @property
    def colour(self) -> str:
        """What the verdict may look like: `equivalent` without power is no good news."""
        return "unproven" if self.verdict == "equivalent" and self.powerless else self.verdict.replace(" ", "-")

    @property
    def arm(self) -> Arm:
        return next(a for a in self.runs[0].spec.arms if label(self.runs[0].spec, a) == self.rule)


def label(spec: RunSpec, arm: Arm) -> str:
    """What an arm is called: `base`, or its rule; with SVAG's ℓ and the budget's δ where they are not 1."""
    if spec.run_id == arm.base_run_id:
        return "base"
    svag = "" if spec.science.svag == 1 else f"SVAG ℓ={spec.science.svag}"
    budget = "" if arm.duration == 1 else f"δ={arm.duration:g}"
    clip = "" if spec.science.stages[-1].clip == arm.base.clip else "clip=rule"
    return ", ".join(filter(None, ("" if svag and arm.kappa == 1 else arm.rule, svag, budget, clip, ramp(spec))))


def ramp(spec: RunSpec) -> str:
    """The stages of a run; empty where there is one. Of two ramps with the same batches the steps tell which it is."""
    return f"ramp {spec.science.batches} in {spec.science.steps:,} steps" if spec.science.ramp else ""


def _setting(spec: RunSpec, arm: Arm) -> str:
    """All that an arm shares with its base, as text: runs with the same are compared, others never."""
    science, base = msgspec.to_builtins(spec.science), msgspec.to_builtins(arm.base)
    for key in ("hyper", "svag", "batch", "micro_batch", "steps", "seed", "clip", "ema", "ramp"):
        science.pop(key, None)
    schedule, total = science["schedule"], science["schedule"].pop("total_samples")
    schedule["warmup_samples"] = round(schedule["warmup_samples"] / total, 9)
    schedule["milestones"] = [round(m / total, 9) for m in schedule["milestones"]]
    return json.dumps([science, base], sort_keys=True)


def _names(settings: Iterable[str]) -> dict[str, str]:
    """A readable name for each setting: model, data, optimizer, and what tells it from others of that name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for s in settings:
        science = json.loads(s)[0]
        groups[f"{science['model']['name']} on {science['dataset']['name']}, {science['optimizer']}"].append(s)
    names = {}
    for name, members in groups.items():
        flat = [_flat(json.loads(s)) for s in members]
        telling = [k for k in flat[0] if any(f.get(k) != flat[0][k] for f in flat)]
        for s, f in zip(members, flat, strict=True):
            extra = ", ".join(f"{k.split('.')[-1]} {f.get(k)}" for k in telling[:4])
            names[s] = name + (f" ({extra or f'variant {members.index(s) + 1}'})" if len(members) > 1 else "")
    twice = [n for n in names.values() if list(names.values()).count(n) > 1]
    return {s: f"{n} #{i}" if n in twice else n for i, (s, n) in enumerate(names.items())}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value and not (isinstance(value, list) and prefix.count(".")):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, sub in items for k, v in _flat(sub, f"{prefix}.{key}").items()}
    return {prefix: value}


_Member = tuple[Run | Missing, RunSpec, Arm]  # a run of a cell (one arm at one batch, over seeds), there or not


def compare(collection: Collection, margins: dict[str, float] | None = None) -> list[Row]:
    """One row for each setting, arm and batch, judged; the base first, then by batch, the rule before its controls.

    Args:
        collection: what `collect` read.
        margins: instead of those that the runs carry.

    Raises:
        ReportError: an unknown metric in `margins`.
    """
    for name, value in (margins or {}).items():
        if name not in METRICS or not 0 < value < (1 if name == "test_accuracy" else math.inf):
            raise ReportError(
                f"margin {name}={value}: it must be > 0, and below 1 for test_accuracy, for one of {', '.join(METRICS)}"
            )
    cells: dict[tuple[str, str, int], list[_Member]] = defaultdict(list)
    seeds: dict[str, set[int]] = defaultdict(set)  # finished in some arm of the setting
    entries: list[Run | Missing] = [*collection.runs, *collection.missing]
    for entry in entries:
        if (spec := entry.spec) is None:
            continue
        for (setting, rule), arm in {(_setting(spec, arm), label(spec, arm)): arm for arm in spec.arms}.items():
            cells[setting, rule, arm.batch].append((entry, spec, arm))
            if isinstance(entry, Run):
                seeds[setting].add(spec.science.seed)
    names = _names(dict.fromkeys(setting for setting, _, _ in cells))
    finished = {r.spec.run_id: r for r in collection.runs}
    failed = {m.spec.run_id for m in collection.missing if m.spec and m.state == "failed"}
    rows = [
        _row(names[setting], _key(setting, rule, batch), rule, cell, seeds[setting], finished, failed, margins)
        for (setting, rule, batch), cell in cells.items()
    ]
    order, roles = list(names.values()), ("base", "rule", "control")
    rows.sort(key=lambda r: (order.index(r.setting), r.role != "base", r.batch, roles.index(r.role), r.rule))
    return [replace(row, power=_power(row, rows)) for row in rows]


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _row(
    setting: str,
    key: str,
    rule: str,
    cell: list[_Member],
    expected: set[int],
    finished: dict[str, Run],
    failed: set[str],
    margins: dict[str, float] | None,
) -> Row:
    """The row of a cell.

    Args:
        expected: seeds that some arm of the setting has.
        finished, failed: all runs, by run id.
    """
    first: dict[int, tuple[Run, Arm]] = {}  # by seed
    for entry, spec, arm in cell:
        if isinstance(entry, Run):
            first.setdefault(spec.science.seed, (entry, arm))
    members = [first[seed] for seed in sorted(first)]
    runs = tuple(r for r, _ in members)
    absent = [(entry, spec.science.seed, arm) for entry, spec, arm in cell if isinstance(entry, Missing)]
    remarks = [f"seed {seed} {'diverged' if m.diverged else m.state}" for m, seed, _ in absent]
    if unplanned := sorted(expected - first.keys() - {seed for _, seed, _ in absent}):
        remarks.append(f"seed {', '.join(map(str, unplanned))} not run")
    if len(first) + len(absent) < len(cell):
        remarks.append("a seed occurs twice (other micro-batch): the first of each is used")
    remarks += [f"seed {run.spec.science.seed} ({run.path.name}): {note}" for run in runs for note in run.notes]
    values = {m: [r.metrics[m] for r in runs if m in r.metrics] for m in METRICS}
    metrics = {m: mean_sd(v) for m, v in values.items() if v}
    tests: list[Test] = []
    looks: tuple[int, ...] = ()
    expected_change, change = None, None
    verdict, needed = "base" if runs and rule == "base" else "no result", None
    if rule != "base":
        pairs = [(r, finished[a.base_run_id]) for r, a in members if a.base_run_id in finished]
        unpaired = [(r.spec.science.seed, a.base_run_id in failed) for r, a in members if a.base_run_id not in finished]
        remarks += [f"seed {seed}: base run {'failed' if bad else 'not found'}, not compared" for seed, bad in unpaired]
        planned = [spec for _, spec, _ in cell]  # of runs that are waiting, too
        allowed, disputed = _margin(planned, margins)
        if disputed:
            remarks.append("its runs were made with different margins: the smallest counts")
        differences = {m: [_gap(r, b, m) for r, b in pairs] for m in METRICS if m == "trajectory" or m in metrics}
        family = max(1, sum(m in allowed for m in differences))
        looks = max((spec.looks for spec in planned), key=lambda x: (len(x), x))
        if any(spec.looks != looks for spec in planned):
            remarks.append("its runs were made with different looks: the most of them count")
        alpha = spent(looks, len(pairs)) if allowed else ALPHA
        tests = [judge(m, d, allowed.get(m), family, alpha or ALPHA) for m, d in differences.items()]
        tests += [judge(m, [], v) for m, v in allowed.items() if m not in differences]
        if pairs:
            lost = sum(m.state == "failed" for m, _, _ in absent) + sum(bad for _, bad in unpaired)
            lost += max((len(pairs) - t.n for t in tests if t.margin is not None), default=0)
            verdict, needed = conclude(tests, lost)
            if alpha is None:
                tests = [replace(t, verdict="too few seeds") if t.margin is not None else t for t in tests]
                verdict, needed = "too few seeds", None
                remarks.append(f"the first look was declared at {looks[0]} seeds")
            if lost and verdict != "different":
                remarks.append("a seed that failed, whose base failed, or that gave no number rules out `equivalent`")
        elif not members and all(m.diverged for m, _, _ in absent):
            healthy = sum(a.base_run_id in finished for _, _, a in absent)
            verdict = "different" if healthy >= ENOUGH else "too few seeds"
            remarks = [f"diverged on every seed ({healthy}), where the base runs did not"] if healthy else remarks
        change = prediction.measured(pairs)
    spec, arm = cell[0][1], members[0][1] if members else absent[0][2]
    if rule != "base" and members:
        expected_change = prediction.predicted(spec, arm, [b for _, b in pairs])
    return Row(
        setting, rule, arm.batch, arm.kappa, spec.science.svag, arm.role, tuple(sorted(first)), metrics,
        tuple(tests), verdict, needed, tuple(dict.fromkeys(remarks)), runs,
        key=key, looks=looks, predicted=expected_change, measured=change, ramp=ramp(spec),
    )  # fmt: skip


def _gap(run: Run, base: Run, metric: str) -> float:
    if metric == "trajectory":
        _, losses = trajectory((run, base))
        return float(np.abs(losses[0] - losses[1]).mean())
    return run.metrics.get(metric, math.nan) - base.metrics.get(metric, math.nan)


def _margin(specs: list[RunSpec], given: dict[str, float] | None) -> tuple[dict[str, float], bool]:
    """The margins that hold for an arm, and whether its runs disagree on them."""
    if given:
        return dict(given), False
    carried = [{k: v for k, v in spec.margin.items() if k in METRICS} for spec in specs]
    merged: dict[str, float] = {}
    for margin in carried:
        for name, value in margin.items():
            if math.isfinite(value) and value > 0:
                merged[name] = min(value, merged.get(name, math.inf))
    return merged, any(m != carried[0] for m in carried)


def _controls(row: Row, rows: list[Row]) -> list[Row]:
    beside = [r for r in rows if (r.setting, r.batch, r.role) == (row.setting, row.batch, "control")]
    return [r for r in beside if r.ramp == row.ramp]


def _power(row: Row, rows: list[Row]) -> str:
    """Whether any control was told apart; without one the comparison has no power."""
    if row.role == "base" or row.verdict == "different":
        return ""
    controls = _controls(row, rows)
    if losers := [repr(r.rule) for r in controls if r.verdict == "different"]:
        return f"told apart: {', '.join(losers)}"
    return "no power: no control was told apart" if controls else "no power: no control was run"


def reading(rows: list[Row]) -> list[str]:
    """What the table says in words, of each rule under test at each batch, and of the controls beside it.

    Controls stand in quotes: one of them is called `none`.
    """
    lines = []
    for row in (r for r in rows if r.role == "rule" and r.svag == 1):
        text = f"{row.setting}, batch {row.batch}: {row.rule} is {_because(row)}"
        if (test := row.gaps.get("trajectory")) and test.n:
            text += f"; its train loss is {form('trajectory', test.difference, '')} from the base's on average"
            text += _first_and_last(row, rows)
        if controls := _controls(row, rows):
            text += f". Controls: {'; '.join(f'{r.rule!r} {_because(r)}' for r in controls)}"
        lines.append(text)
        if said := prediction.sentence(row):
            lines.append(f"  {said}")
        if row.powerless and row.verdict == "equivalent":
            lines.append(
                f"  {row.power}: nothing lost that could have, so this speaks neither for {row.rule} nor against"
            )
    return [*lines, *svag.sentences(rows), *prediction.calibration(rows)]


def _first_and_last(row: Row, rows: list[Row]) -> str:
    """Whether the gap arose early: mean difference of the train loss over the first and the last tenth of samples."""
    base = {run.spec.science.seed: run for r in rows if (r.setting, r.role) == (row.setting, "base") for run in r.runs}
    tenths = []
    for run in (r for r in row.runs if r.spec.science.seed in base):
        _, losses = trajectory((run, base[run.spec.science.seed]))
        k = math.ceil(losses.shape[1] / 10)
        tenths.append([np.mean(losses[0, part] - losses[1, part]) for part in (slice(k), slice(-k, None))])
    if not tenths:
        return ""
    first, last = np.mean(tenths, axis=0)
    return f" ({form('train_loss', first)} in the first tenth, {form('train_loss', last)} in the last)"


def _because(row: Row) -> str:
    """The verdict; of one that is different, the metrics that say so, with their differences."""
    if row.verdict != "different":
        return {"no margin": "not judged (no margin)"}.get(row.verdict, row.verdict)
    apart = [t for t in row.tests if t.verdict == "different"]
    numbers = ", ".join(f"{METRICS[t.metric]} {form(t.metric, t.difference)}" for t in apart)
    return f"different ({numbers or 'diverged on every seed'})"
