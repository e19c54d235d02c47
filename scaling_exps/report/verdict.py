"""Is the scaled run the base run? Two one-sided tests at a margin that was fixed beforehand. See docs/comparison.md.

    d_i     metric of the scaled run of seed i minus that of the base run of seed i   units of the metric
    n       pairs                                                                     >= 3 for a verdict
    m       mean of d_i;  s its standard deviation;  se = s / sqrt(n)
    delta   margin: the largest |gap| that still counts as the same run               units of the metric
    K       metrics with a margin

    equivalent    |m| + t(1 - alpha, n-1) se < delta        for every metric    (intersection-union: no correction)
    different     |m| - t(1 - alpha/K, n-1) se > delta      for some metric     (Bonferroni over the metrics)
    inconclusive  neither

For normal d: with a true |gap| of delta or more, `equivalent` has probability <= alpha; with one of delta or less,
`different` has, up to 2 alpha where se passes about 2 delta. An arm that diverges on every seed is `different`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats would take longer to import than the whole table

from scaling_exps.plan import Arm, RunSpec
from scaling_exps.report.runs import Collection, Missing, ReportError, Run, trajectory

ALPHA = 0.05
POWER = 0.8  # with which the number of seeds that is named would decide
ENOUGH = 3  # seeds; below, no verdict
MAX_SEEDS = 1000  # search limit
METRICS = {  # in the order of the tables, and what they are called; `MEANING` says more
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "perplexity": "test perplexity",
    "train_loss": "final train loss",
    "trajectory": "|Δ train loss|",
    "weight_norm": "weight norm",
}
MEANING = (
    "final train loss: mean over the last tenth of the samples; |Δ train loss|: mean over training, at equal samples"
)
_DIGITS = {"test_accuracy": ".2%", "weight_norm": ".2f", "perplexity": ".3f"}


def form(metric: str, value: float, sign: str = "+") -> str:
    """A value of a metric, or a difference of two, as it is printed everywhere."""
    return format(value, sign + _DIGITS.get(metric, ".4f")) if math.isfinite(value) else "–"


@dataclass(frozen=True)
class Test:
    """One metric of one arm against the base. The interval has level 1 - 2 alpha (90%)."""

    metric: str
    n: int
    difference: float
    sd: float
    low: float
    high: float
    margin: float | None
    verdict: str
    seeds_needed: int | None  # None: decided, cannot be judged, or more than MAX_SEEDS

    __test__ = False  # not pytest's


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

    @property
    def gaps(self) -> dict[str, Test]:
        return {t.metric: t for t in self.tests}

    @property
    def powerless(self) -> bool:
        return self.power.startswith("no power")

    @property
    def arm(self) -> Arm:
        return next(a for a in self.runs[0].spec.arms if label(self.runs[0].spec, a) == self.rule)


def judge(metric: str, differences: Iterable[float], margin: float | None, family: int = 1) -> Test:
    """Test paired differences against a margin.

    Args:
        metric: its name, for the record.
        differences: one for each seed, in the metric's unit; those that are not finite are left out.
        margin: > 0 in the same unit, or None: then there is an interval and no verdict.
        family: K, the number of metrics that are judged together.

    >>> judge("train_loss", [0.01, -0.01, 0.0, 0.01], 0.05).verdict
    'equivalent'
    >>> judge("train_loss", [0.21, 0.19, 0.2, 0.21], 0.05).verdict
    'different'
    >>> judge("train_loss", [0.01, -0.01], 0.05).verdict
    'too few seeds'
    """
    d = [x for x in differences if math.isfinite(x)]
    n, (mean, sd) = len(d), _mean_sd(d)
    se = sd / math.sqrt(max(n, 1))
    reach = float(stdtrit(n - 1, 1 - ALPHA)) * se
    verdict = "inconclusive"
    if n == 0:
        verdict = "no result"
    elif margin is None:
        verdict = "no margin"
    elif n < ENOUGH:
        verdict = "too few seeds"
    elif abs(mean) + reach < margin:
        verdict = "equivalent"
    elif abs(mean) - float(stdtrit(n - 1, 1 - ALPHA / family)) * se > margin:
        verdict = "different"
    more = margin is not None and n > 1 and verdict in ("inconclusive", "too few seeds")
    needed = seeds_needed(mean, sd, margin, family) if more and margin else None
    return Test(metric, n, mean, sd, mean - reach, mean + reach, margin, verdict, needed)


def seeds_needed(gap: float, sd: float, margin: float, family: int = 1) -> int | None:
    """The fewest seeds with which the test decides with probability 0.8, were `gap` and `sd` the true ones.

    A shifted t distribution stands for the noncentral one. None: more than 1,000.

    >>> seeds_needed(0.0, 0.05, 0.05)
    11
    """
    n = np.arange(ENOUGH, MAX_SEEDS + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.maximum(sd / np.sqrt(n), 1e-300)
        if abs(gap) < margin:
            q = stdtrit(n - 1, 1 - ALPHA)
            chance = stdtr(n - 1, (margin - gap) / se - q) + stdtr(n - 1, (margin + gap) / se - q) - 1
        else:
            chance = stdtr(n - 1, (abs(gap) - margin) / se - stdtrit(n - 1, 1 - ALPHA / family))
    good = np.flatnonzero(chance >= POWER)
    return int(n[good[0]]) if len(good) else None


def conclude(tests: Iterable[Test], failed: int = 0) -> tuple[str, int | None]:
    """The verdict of an arm from those of its metrics, and how many seeds would decide it.

    Args:
        tests: of all metrics; those without a margin say nothing.
        failed: seeds of the arm that failed or gave no number. They are missing for a reason, and not at random: with
            one of them the arm is never `equivalent`.
    """
    judged = [t for t in tests if t.margin is not None]
    if not judged:
        return ("no margin" if any(t.n for t in tests) else "no result"), None
    verdicts = {t.verdict for t in judged}
    for decisive in ("different", "too few seeds"):
        if decisive in verdicts:
            return decisive, None
    if verdicts == {"no result"}:
        return "no result", None
    if verdicts == {"equivalent"}:
        return ("inconclusive" if failed else "equivalent"), None
    if apart := [t.seeds_needed for t in judged if t.seeds_needed and t.margin and abs(t.difference) > t.margin]:
        return "inconclusive", min(apart)
    needed = [t.seeds_needed for t in judged if t.verdict != "equivalent"]
    return "inconclusive", None if None in needed else max(n for n in needed if n)


def label(spec: RunSpec, arm: Arm) -> str:
    """What an arm is called: `base`, or its rule; with SVAG's ℓ and the budget's δ where they are not 1."""
    if spec.run_id == arm.base_run_id:
        return "base"
    svag = "" if spec.science.svag == 1 else f"SVAG ℓ={spec.science.svag}"
    budget = "" if arm.duration == 1 else f"δ={arm.duration:g}"
    return ", ".join(filter(None, ("" if svag and arm.kappa == 1 else arm.rule, svag, budget)))


def _setting(spec: RunSpec, arm: Arm) -> str:
    """All that an arm shares with its base, as text: runs with the same are compared, others never."""
    science, base = msgspec.to_builtins(spec.science), msgspec.to_builtins(arm.base)
    for key in ("hyper", "svag", "batch", "micro_batch", "steps", "seed"):
        del science[key]
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
        if name not in METRICS or not (math.isfinite(value) and value > 0):
            raise ReportError(f"margin {name}={value}: it must be > 0, for one of {', '.join(METRICS)}")
    cells: dict[tuple[str, str, int], list[_Member]] = defaultdict(list)
    seeds: dict[str, set[int]] = defaultdict(set)  # finished in some arm of the setting
    entries: list[Run | Missing] = [*collection.runs, *collection.missing]
    for entry in entries:
        if (spec := entry.spec) is None:
            continue
        for (setting, rule), arm in {(_setting(spec, arm), label(spec, arm)): arm for arm in spec.arms}.items():
            cells[setting, rule, spec.science.batch].append((entry, spec, arm))
            if isinstance(entry, Run):
                seeds[setting].add(spec.science.seed)
    names = _names(dict.fromkeys(setting for setting, _, _ in cells))
    finished = {r.spec.run_id: r for r in collection.runs}
    failed = {m.spec.run_id for m in collection.missing if m.spec and m.state == "failed"}
    rows = [
        _row(names[setting], rule, cell, seeds[setting], finished, failed, margins)
        for (setting, rule, _), cell in cells.items()
    ]
    order, roles = list(names.values()), ("base", "rule", "control")
    rows.sort(key=lambda r: (order.index(r.setting), r.role != "base", r.batch, roles.index(r.role), r.rule))
    return [replace(row, power=_power(row, rows)) for row in rows]


def _row(
    setting: str,
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
    remarks += [f"seed {run.spec.science.seed}: {note}" for run in runs for note in run.notes]
    values = {m: [r.metrics[m] for r in runs if m in r.metrics] for m in METRICS}
    metrics = {m: _mean_sd(v) for m, v in values.items() if v}
    tests: list[Test] = []
    verdict, needed = "base" if runs and rule == "base" else "no result", None
    if rule != "base":
        pairs = [(r, finished[a.base_run_id]) for r, a in members if a.base_run_id in finished]
        unpaired = [(r.spec.science.seed, a.base_run_id in failed) for r, a in members if a.base_run_id not in finished]
        remarks += [f"seed {seed}: base run {'failed' if bad else 'not found'}, not compared" for seed, bad in unpaired]
        allowed, disputed = _margin(runs, margins)
        if disputed:
            remarks.append("its runs were made with different margins: the smallest counts")
        differences = {m: [_gap(r, b, m) for r, b in pairs] for m in METRICS if m == "trajectory" or m in metrics}
        family = max(1, sum(m in allowed for m in differences))
        tests = [judge(m, d, allowed.get(m), family) for m, d in differences.items()]
        tests += [judge(m, [], v) for m, v in allowed.items() if m not in differences]
        if pairs:
            lost = sum(m.state == "failed" for m, _, _ in absent) + sum(bad for _, bad in unpaired)
            lost += max((len(pairs) - t.n for t in tests if t.margin is not None), default=0)
            verdict, needed = conclude(tests, lost)
            if lost and verdict != "different":
                remarks.append("a seed that failed, whose base failed, or that gave no number rules out `equivalent`")
        elif not members and all(m.diverged for m, _, _ in absent):
            healthy = sum(a.base_run_id in finished for _, _, a in absent)
            verdict = "different" if healthy >= ENOUGH else "too few seeds"
            remarks = [f"diverged on every seed ({healthy}), where the base runs did not"] if healthy else remarks
    spec, arm = cell[0][1], members[0][1] if members else absent[0][2]
    return Row(
        setting, rule, spec.science.batch, arm.kappa, spec.science.svag, arm.role, tuple(sorted(first)), metrics,
        tuple(tests), verdict, needed, tuple(dict.fromkeys(remarks)), runs,
    )  # fmt: skip


def _gap(run: Run, base: Run, metric: str) -> float:
    if metric == "trajectory":
        _, losses = trajectory((run, base))
        return float(np.abs(losses[0] - losses[1]).mean())
    return run.metrics.get(metric, math.nan) - base.metrics.get(metric, math.nan)


def _margin(runs: tuple[Run, ...], given: dict[str, float] | None) -> tuple[dict[str, float], bool]:
    """The margins that hold for an arm, and whether its runs disagree on them."""
    if given:
        return dict(given), False
    carried = [{k: v for k, v in r.spec.margin.items() if k in METRICS} for r in runs]
    merged: dict[str, float] = {}
    for margin in carried:
        for name, value in margin.items():
            if math.isfinite(value) and value > 0:
                merged[name] = min(value, merged.get(name, math.inf))
    return merged, any(m != carried[0] for m in carried)


def _controls(row: Row, rows: list[Row]) -> list[Row]:
    return [r for r in rows if (r.setting, r.batch, r.role) == (row.setting, row.batch, "control")]


def _power(row: Row, rows: list[Row]) -> str:
    """Whether any control was told apart; without one the comparison has no power."""
    if row.role == "base" or row.verdict == "different":
        return ""
    controls = _controls(row, rows)
    if losers := [repr(r.rule) for r in controls if r.verdict == "different"]:
        return f"told apart: {', '.join(losers)}"
    return "no power: no control was told apart" if controls else "no power: no control was run"


def _mean_sd(values: list[float]) -> tuple[float, float]:
    v = [x for x in values if math.isfinite(x)]
    if not v:
        return math.nan, math.nan
    mean = math.fsum(v) / len(v)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in v) / (len(v) - 1)) if len(v) > 1 else math.nan


def reading(rows: list[Row]) -> list[str]:
    """What the table says in words, of each rule under test at each batch, and of the controls beside it.

    Controls stand in quotes: one of them is called `none`.
    """
    lines = []
    for row in (r for r in rows if r.role == "rule" and r.svag == 1):
        text = f"{row.setting}, batch {row.batch}: {row.rule} is {_because(row)}"
        if (test := row.gaps.get("trajectory")) and test.n:
            text += f"; its train loss is {form('trajectory', test.difference, '')} from the base's on average"
        if controls := _controls(row, rows):
            text += f". Controls: {'; '.join(f'{r.rule!r} {_because(r)}' for r in controls)}"
        lines.append(text)
        if row.powerless and row.verdict == "equivalent":
            lines.append(
                f"  {row.power}: nothing lost that could have, so this speaks neither for {row.rule} nor against"
            )
    return lines


def _because(row: Row) -> str:
    """The verdict; of one that is different, the metrics that say so, with their differences."""
    if row.verdict != "different":
        return row.verdict
    apart = [t for t in row.tests if t.verdict == "different"]
    numbers = ", ".join(f"{METRICS[t.metric]} {form(t.metric, t.difference)}" for t in apart)
    return f"different ({numbers or 'diverged on every seed'})"
