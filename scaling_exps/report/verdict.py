"""Is the scaled run the base run? Two one-sided tests at a margin that was fixed beforehand. See docs/comparison.md.

    d_i     metric of the scaled run of seed i minus that of the base run of seed i   units of the metric
    n       pairs                                                                     >= 3 for a verdict
    m       mean of d_i;  s its standard deviation;  se = s / sqrt(n)
    delta   margin: the largest |gap| that still counts as the same run               units of the metric
    K       metrics with a margin

    equivalent    |m| + t(1 - alpha, n-1) se < delta        for every metric    (intersection-union: no correction)
    different     |m| - t(1 - alpha/K, n-1) se > delta      for some metric     (Bonferroni over the metrics)
    inconclusive  neither

With a true |gap| of delta or more, `equivalent` has probability <= alpha; with one of delta or less, `different` has.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats would take longer to import than the whole table

from scaling_exps.plan import Arm, RunSpec
from scaling_exps.report.runs import Collection, Missing, ReportError, Run, trajectory

ALPHA = 0.05
POWER = 0.8  # with which the number of seeds that is named would decide
ENOUGH = 3  # seeds; below, no verdict
MOST = 1000  # seeds that are thought about
METRICS = ("test_accuracy", "test_loss", "perplexity", "train_loss", "trajectory", "weight_norm")
VERDICTS = ("equivalent", "different", "inconclusive", "too few seeds", "no margin", "no result")


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
    seeds_needed: int | None  # None: decided, cannot be judged, or more than MOST

    __test__ = False  # not pytest's


@dataclass(frozen=True)
class Row:
    """One arm at one batch size, over its seeds; `rule` is `base` for the base runs."""

    setting: str
    rule: str
    batch: int
    kappa: float
    role: str  # base | rule (the one under test) | control
    seeds: tuple[int, ...]
    metrics: dict[str, tuple[float, float]]  # name -> mean, standard deviation over seeds
    tests: tuple[Test, ...]
    verdict: str
    seeds_needed: int | None
    remarks: tuple[str, ...]
    runs: tuple[Run, ...] = field(repr=False)
    bases: tuple[Run | None, ...] = field(repr=False)
    power: str = ""  # which controls lost at this batch, or why none could

    @property
    def gaps(self) -> dict[str, Test]:
        return {t.metric: t for t in self.tests}

    @property
    def arm(self) -> Arm:
        return next(a for a in self.runs[0].spec.arms if label(self.runs[0].spec, a) == self.rule)


@functools.cache
def _quantile(p: float, df: int) -> float:
    return float(stdtrit(df, p))


@functools.cache
def _quantiles(p: float) -> Any:
    return stdtrit(np.arange(ENOUGH, MOST + 1) - 1, p)


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
    n = len(d)
    if n == 0:
        return Test(metric, 0, math.nan, math.nan, math.nan, math.nan, margin, "no result", None)
    mean = math.fsum(d) / n
    if n == 1:
        verdict = "no margin" if margin is None else "too few seeds"
        return Test(metric, 1, mean, math.nan, math.nan, math.nan, margin, verdict, None)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in d) / (n - 1))
    se = sd / math.sqrt(n)
    reach = _quantile(1 - ALPHA, n - 1) * se
    needed = None
    if margin is None:
        verdict = "no margin"
    elif n < ENOUGH:
        verdict = "too few seeds"
    elif abs(mean) + reach < margin:
        verdict = "equivalent"
    elif abs(mean) - _quantile(1 - ALPHA / family, n - 1) * se > margin:
        verdict = "different"
    else:
        verdict = "inconclusive"
    if margin is not None and verdict in ("inconclusive", "too few seeds"):
        needed = seeds_needed(mean, sd, margin, family)
    return Test(metric, n, mean, sd, mean - reach, mean + reach, margin, verdict, needed)


def seeds_needed(gap: float, sd: float, margin: float, family: int = 1) -> int | None:
    """The fewest seeds with which the test decides with probability 0.8, were `gap` and `sd` the true ones.

    A shifted t distribution stands for the noncentral one. None: more than 1,000.

    >>> seeds_needed(0.0, 0.05, 0.05)
    11
    """
    n = np.arange(ENOUGH, MOST + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.maximum(sd / np.sqrt(n), 1e-300)
        if abs(gap) < margin:
            q = _quantiles(1 - ALPHA)
            chance = stdtr(n - 1, (margin - gap) / se - q) + stdtr(n - 1, (margin + gap) / se - q) - 1
        else:
            chance = stdtr(n - 1, (abs(gap) - margin) / se - _quantiles(1 - ALPHA / family))
    good = np.flatnonzero(chance >= POWER)
    return int(n[good[0]]) if len(good) else None


def conclude(tests: Iterable[Test], lost: int = 0) -> tuple[str, int | None]:
    """The verdict of an arm from those of its metrics, and how many seeds would decide it.

    Args:
        tests: of all metrics; those without a margin say nothing.
        lost: seeds of the arm that failed or gave no number. They are missing for a reason, and not at random: with
            one of them the arm is never `equivalent`.
    """
    judged = [t for t in tests if t.margin is not None]
    if not judged:
        return ("no margin" if any(t.n for t in tests) else "no result"), None
    verdicts = {t.verdict for t in judged}
    if "different" in verdicts:
        return "different", None
    if verdicts == {"equivalent"}:
        return ("inconclusive" if lost else "equivalent"), None
    if "no result" in verdicts and len(verdicts) == 1:
        return "no result", None
    if "too few seeds" in verdicts:
        return "too few seeds", None
    apart = [t.seeds_needed for t in judged if t.seeds_needed and t.margin and abs(t.difference) > t.margin]
    open_ = [t for t in judged if t.verdict != "equivalent"]
    needed = [t.seeds_needed for t in open_]
    if apart:
        return "inconclusive", min(apart)
    return "inconclusive", None if None in needed or not needed else max(n for n in needed if n)


def label(spec: RunSpec, arm: Arm) -> str:
    """What an arm is called: `base`, its rule, or its rule under SVAG."""
    if spec.run_id == arm.base_run_id:
        return "base"
    if spec.science.svag == 1:
        return arm.rule
    return (f"{arm.rule}, " if arm.kappa != 1 else "") + f"SVAG ℓ={spec.science.svag}"


def rule_under_test(spec: RunSpec) -> str:
    """The optimizer's own rule for goal=match (conf/optimizer); all others are its controls."""
    return {"adamw": "adamw_sde", "sgd": "linear"}.get(spec.science.optimizer, "sqrt")


def _setting(spec: RunSpec, arm: Arm) -> str:
    """All that an arm shares with its base, as text: runs with the same are compared, others never."""
    science = asdict(spec.science)
    for key in ("hyper", "svag", "batch", "micro_batch", "steps", "seed"):
        del science[key]
    return json.dumps([science, {k: v for k, v in arm.base.items() if k not in ("warmup_steps",)}], sort_keys=True)


def _names(settings: Iterable[str]) -> dict[str, str]:
    """A readable name for each setting: model, data, optimizer, and what tells it from others of that name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for s in settings:
        science, _ = json.loads(s)
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


def compare(found: Collection, margins: dict[str, float] | None = None) -> list[Row]:
    """One row for each setting, arm and batch, judged; the base first, then by batch, the rule before its controls.

    Args:
        found: what `collect` read.
        margins: instead of those that the runs carry.

    Raises:
        ReportError: an unknown metric in `margins`.
    """
    for name, value in (margins or {}).items():
        if name not in METRICS or not (math.isfinite(value) and value > 0):
            raise ReportError(f"margin {name}={value}: it must be > 0, for one of {', '.join(METRICS)}")
    by_id = {r.spec.run_id: r for r in found.runs}
    cells: dict[tuple[str, str, int], list[tuple[Run, Arm]]] = defaultdict(list)
    lost: dict[tuple[str, str, int], list[Missing]] = defaultdict(list)
    absent: dict[tuple[str, str, int], Arm] = {}
    for run in found.runs:
        for cell, arm in _cells(run.spec).items():
            cells[cell].append((run, arm))
    for gone in found.missing:
        for cell, arm in _cells(gone.spec).items() if gone.spec else ():
            lost[cell].append(gone)
            absent[cell] = arm
    names = _names(dict.fromkeys(s for s, _, _ in [*cells, *lost]))
    expected: dict[str, set[int]] = defaultdict(set)
    for (setting, _, _), members in cells.items():
        expected[setting] |= {r.spec.science.seed for r, _ in members}
    rows = []
    for cell in dict.fromkeys([*cells, *lost]):
        setting, rule, batch = cell
        members, out = sorted(cells.get(cell, []), key=lambda m: m[0].spec.science.seed), lost.get(cell, [])
        here = {r.spec.science.seed for r, _ in members} | {g.spec.science.seed for g in out if g.spec}
        remarks = [f"seed {g.spec.science.seed} {g.state}" for g in out if g.spec]
        if away := sorted(expected[setting] - here):
            remarks.append(f"seed {', '.join(map(str, away))} not run")
        seeds = [r.spec.science.seed for r, _ in members]
        if len(set(seeds)) < len(seeds):
            remarks.append("a seed occurs twice (other micro-batch): the first of each is used")
            members = [m for i, m in enumerate(members) if seeds.index(seeds[i]) == i]
        rows.append(_row(names[setting], rule, batch, members, out, absent.get(cell), by_id, margins, remarks))
    order = {name: i for i, name in enumerate(names.values())}
    roles = {"base": 0, "rule": 1, "control": 2}
    rows.sort(key=lambda r: (order[r.setting], r.role != "base", r.batch, roles[r.role], r.rule))
    return [replace(row, power=_power(row, rows)) for row in rows]


def _cells(spec: RunSpec) -> dict[tuple[str, str, int], Arm]:
    return {(_setting(spec, arm), label(spec, arm), spec.science.batch): arm for arm in spec.arms}


def _row(
    setting: str,
    rule: str,
    batch: int,
    members: list[tuple[Run, Arm]],
    gone: list[Missing],
    absent: Arm | None,
    by_id: dict[str, Run],
    margins: dict[str, float] | None,
    remarks: list[str],
) -> Row:
    runs = tuple(r for r, _ in members)
    arm = members[0][1] if members else absent
    assert arm is not None
    spec = runs[0].spec if runs else next(g.spec for g in gone if g.spec)
    bases = tuple(by_id.get(a.base_run_id) for _, a in members)
    tested = arm.rule == rule_under_test(spec) or spec.science.svag != 1
    role = "base" if rule == "base" else "rule" if tested else "control"
    for run in runs:
        remarks += [f"seed {run.spec.science.seed}: {note}" for note in run.notes]
    values: dict[str, list[float]] = {m: [r.metrics[m] for r in runs if m in r.metrics] for m in METRICS}
    metrics = {m: _mean_sd(v) for m, v in values.items() if v}
    if rule == "base":
        return Row(
            setting, rule, batch, 1.0, role, _seeds(runs), metrics, (), "base" if runs else "no result", None,
            tuple(remarks), runs, bases,
        )  # fmt: skip
    pairs = [(r, b) for r, b in zip(runs, bases, strict=True) if b is not None]
    if alone := [r.spec.science.seed for r, b in zip(runs, bases, strict=True) if b is None]:
        remarks.append(f"seed {', '.join(map(str, alone))}: base run not found, not compared")
    allowed, disputed = _margin(runs, margins)
    if disputed:
        remarks.append("its runs were made with different margins: the smallest counts")
    differences = {m: [_gap(r, b, m) for r, b in pairs] for m in METRICS if m == "trajectory" or m in metrics}
    judged = [m for m in differences if m in allowed]
    tests = [judge(m, d, allowed.get(m), max(1, len(judged))) for m, d in differences.items()]
    tests += [judge(m, [], v) for m, v in allowed.items() if m not in differences]
    failed = sum(g.state == "failed" for g in gone)
    broken = max((len(pairs) - t.n for t in tests if t.margin is not None), default=0)
    verdict, needed = conclude(tests, failed + broken) if pairs else ("no result", None)
    if failed + broken and verdict != "different":
        remarks.append("a seed that failed or gave no number rules out `equivalent`")
    return Row(
        setting, rule, batch, arm.kappa, role, _seeds(runs), metrics, tuple(tests), verdict, needed,
        tuple(dict.fromkeys(remarks)), runs, bases,
    )  # fmt: skip


def _seeds(runs: tuple[Run, ...]) -> tuple[int, ...]:
    return tuple(r.spec.science.seed for r in runs)


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
            if isinstance(value, int | float) and math.isfinite(value) and value > 0:
                merged[name] = min(value, merged.get(name, math.inf))
    return merged, any(m != carried[0] for m in carried)


def _power(row: Row, rows: list[Row]) -> str:
    """Could an arm have lost here? A comparison in which no control does says nothing for the rule."""
    if row.role == "base":
        return ""
    controls = [r for r in rows if (r.setting, r.batch, r.role) == (row.setting, row.batch, "control")]
    losers = [r.rule for r in controls if r.verdict == "different"]
    if losers:
        return f"told apart: {', '.join(losers)}"
    return "no power: no control was told apart" if controls else "no power: no control was run"


def _mean_sd(values: list[float]) -> tuple[float, float]:
    v = [x for x in values if math.isfinite(x)]
    if not v:
        return math.nan, math.nan
    mean = math.fsum(v) / len(v)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in v) / (len(v) - 1)) if len(v) > 1 else math.nan


def reading(rows: list[Row]) -> list[str]:
    """What the table says in words, for each setting and batch that has the rule and a control."""
    lines = []
    for setting, batch in dict.fromkeys((r.setting, r.batch) for r in rows if r.role != "base"):
        here = [r for r in rows if (r.setting, r.batch) == (setting, batch) and r.role != "base"]
        mine = next((r for r in here if r.role == "rule" and "SVAG" not in r.rule), None)
        if mine is None or "trajectory" not in mine.gaps or not mine.gaps["trajectory"].n:
            continue
        own = mine.gaps["trajectory"].difference
        text = f"{setting}, batch {batch}: {mine.rule} is {mine.verdict}"
        text += f"; it stays within {own:.4f} of the base's train loss on average"
        others = [
            f"{r.rule} {r.gaps['trajectory'].difference / max(own, 1e-12):.1f}x"
            for r in here
            if r.role == "control" and r.rule != "linear_scaled" and r.gaps.get("trajectory")
        ]
        lines.append(text + (f", others, as multiples of that: {', '.join(others)}" if others else ""))
        if mine.power.startswith("no power"):
            lines.append(
                f"  {mine.power}: nothing here could have lost, so this speaks neither for the rule nor against"
            )
        control = next((r for r in here if r.rule == "linear_scaled" and "weight_norm" in r.gaps), None)
        if control is None or "weight_norm" not in mine.gaps:
            continue
        gap, ours = ({k: r.gaps[k].difference for k in r.gaps} for r in (control, mine))
        lines.append(
            f"  linear_scaled (lr x κ with betas and eps scaled) isolates the exponent: trajectory gap "
            f"{gap['trajectory']:.4f} against {mine.rule}'s {own:.4f}, final train loss {gap['train_loss']:+.4f} "
            f"against {ours['train_loss']:+.4f}, weight norm {gap['weight_norm']:+.2f} "
            f"against {ours['weight_norm']:+.2f}: "
            + (
                "it is another run, not this one at a larger batch"
                if abs(gap["weight_norm"]) > 2 * abs(ours["weight_norm"])
                else "here it is not told apart by its weights"
            )
        )
    return lines
