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

import functools
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


@functools.cache
def _quantile(p: float, df: int) -> float:
    return float(stdtrit(df, p))


@functools.cache
def _quantiles(p: float) -> Any:
    return stdtrit(np.arange(ENOUGH, MAX_SEEDS + 1) - 1, p)


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
    n = np.arange(ENOUGH, MAX_SEEDS + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.maximum(sd / np.sqrt(n), 1e-300)
        if abs(gap) < margin:
            q = _quantiles(1 - ALPHA)
            chance = stdtr(n - 1, (margin - gap) / se - q) + stdtr(n - 1, (margin + gap) / se - q) - 1
        else:
            chance = stdtr(n - 1, (abs(gap) - margin) / se - _quantiles(1 - ALPHA / family))
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
    if "different" in verdicts:
        return "different", None
    if verdicts == {"equivalent"}:
        return ("inconclusive" if failed else "equivalent"), None
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
    """What an arm is called: `base`, or its rule; with SVAG's ℓ and the budget's δ where they are not 1."""
    if spec.run_id == arm.base_run_id:
        return "base"
    plain = spec.science.svag == 1
    parts = [arm.rule] if plain or arm.kappa != 1 else []
    parts += [] if plain else [f"SVAG ℓ={spec.science.svag}"]
    return ", ".join([*parts, *([f"δ={arm.duration:g}"] if arm.duration != 1 else [])])


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


@dataclass
class _Cell:
    """The runs of one arm at one batch, over seeds, and those of them that are missing."""

    runs: list[tuple[Run, Arm]] = field(default_factory=list)
    missing: list[tuple[Missing, RunSpec, Arm]] = field(default_factory=list)

    @property
    def any(self) -> tuple[RunSpec, Arm]:
        return (self.runs[0][0].spec, self.runs[0][1]) if self.runs else self.missing[0][1:]


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
    cells: dict[tuple[str, str, int], _Cell] = defaultdict(_Cell)
    for run in collection.runs:
        for key, arm in _keys(run.spec).items():
            cells[key].runs.append((run, arm))
    for absent in collection.missing:
        spec = absent.spec
        for key, arm in _keys(spec).items() if spec else ():
            assert spec is not None
            cells[key].missing.append((absent, spec, arm))
    names = _names(dict.fromkeys(setting for setting, _, _ in cells))
    seeds: dict[str, set[int]] = defaultdict(set)
    for (setting, _, _), cell in cells.items():
        seeds[setting] |= {r.spec.science.seed for r, _ in cell.runs}
    rows = []
    for (setting, rule, _), cell in cells.items():
        cell.runs.sort(key=lambda pair: pair[0].spec.science.seed)
        rows.append(_row(names[setting], rule, cell, collection, margins, seeds[setting]))
    order = {name: i for i, name in enumerate(names.values())}
    roles = {"base": 0, "rule": 1, "control": 2}
    rows.sort(key=lambda r: (order[r.setting], r.role != "base", r.batch, roles[r.role], r.rule))
    return [replace(row, power=_power(row, rows)) for row in rows]


def _keys(spec: RunSpec) -> dict[tuple[str, str, int], Arm]:
    return {(_setting(spec, arm), label(spec, arm), spec.science.batch): arm for arm in spec.arms}


def _row(
    setting: str,
    rule: str,
    cell: _Cell,
    collection: Collection,
    margins: dict[str, float] | None,
    expected: set[int],
) -> Row:
    spec, arm = cell.any
    remarks = [f"seed {s.science.seed} {'diverged' if m.diverged else m.state}" for m, s, _ in cell.missing]
    if unplanned := sorted(expected - {r.spec.science.seed for r, _ in cell.runs} - _seeds(cell.missing)):
        remarks.append(f"seed {', '.join(map(str, unplanned))} not run")
    first = {r.spec.science.seed: (r, a) for r, a in reversed(cell.runs)}  # the first of each
    if len(first) < len(cell.runs):
        remarks.append("a seed occurs twice (other micro-batch): the first of each is used")
    members = [first[seed] for seed in sorted(first)]
    runs = tuple(r for r, _ in members)
    remarks += [f"seed {run.spec.science.seed}: {note}" for run in runs for note in run.notes]
    values = {m: [r.metrics[m] for r in runs if m in r.metrics] for m in METRICS}
    row = Row(
        setting, rule, spec.science.batch, arm.kappa, spec.science.svag, arm.role, tuple(sorted(first)),
        {m: _mean_sd(v) for m, v in values.items() if v}, (), "base" if runs else "no result", None, (), runs,
    )  # fmt: skip
    if rule == "base":
        return replace(row, remarks=tuple(remarks))

    finished = {r.spec.run_id: r for r in collection.runs}
    failed_ids = {m.spec.run_id for m in collection.missing if m.spec and m.state == "failed"}
    pairs = [(r, finished[a.base_run_id]) for r, a in members if a.base_run_id in finished]
    unpaired = {r.spec.science.seed: a.base_run_id in failed_ids for r, a in members if a.base_run_id not in finished}
    remarks += [
        f"seed {seed}: base run {'failed' if bad else 'not found'}, not compared" for seed, bad in unpaired.items()
    ]
    allowed, disputed = _margin(runs, margins)
    if disputed:
        remarks.append("its runs were made with different margins: the smallest counts")
    differences = {m: [_gap(r, b, m) for r, b in pairs] for m in METRICS if m == "trajectory" or m in row.metrics}
    judged = [m for m in differences if m in allowed]
    tests = [judge(m, d, allowed.get(m), max(1, len(judged))) for m, d in differences.items()]
    tests += [judge(m, [], v) for m, v in allowed.items() if m not in differences]
    verdict, needed = "no result", None
    if pairs:
        failed = sum(m.state == "failed" for m, _, _ in cell.missing) + sum(unpaired.values())
        failed += max((len(pairs) - t.n for t in tests if t.margin is not None), default=0)
        verdict, needed = conclude(tests, failed)
        if failed and verdict != "different":
            remarks.append("a seed that failed, whose base failed, or that gave no number rules out `equivalent`")
    elif not members and all(m.diverged for m, _, _ in cell.missing):
        healthy = sum(a.base_run_id in finished for _, _, a in cell.missing)
        verdict = "different" if healthy >= ENOUGH else "too few seeds"
        remarks = [f"diverged on every seed ({healthy}), where the base runs did not"] if healthy else remarks
    return replace(row, tests=tuple(tests), verdict=verdict, seeds_needed=needed, remarks=tuple(dict.fromkeys(remarks)))


def _seeds(missing: list[tuple[Missing, RunSpec, Arm]]) -> set[int]:
    return {s.science.seed for _, s, _ in missing}


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
    """Whether any control was told apart; without one the comparison has no power."""
    if row.role == "base" or row.verdict == "different":
        return ""
    controls = [r for r in rows if (r.setting, r.batch, r.role) == (row.setting, row.batch, "control")]
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
        test = row.gaps.get("trajectory")
        text = f"{row.setting}, batch {row.batch}: {row.rule} is {_because(row)}"
        if test and test.n:
            text += f"; its train loss is {form('trajectory', test.difference, '')} from the base's on average"
        controls = [r for r in rows if (r.setting, r.batch, r.role) == (row.setting, row.batch, "control")]
        if controls:
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
