"""Rows and runs -> charts as plain values, drawn by `figures` (files) and by `page` (browser) alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from scaling_exps.noise.validity import DOMINATED, steps_and_samples
from scaling_exps.report import pace, prediction, svag
from scaling_exps.report.judge import METRICS
from scaling_exps.report.runs import Run, trajectory
from scaling_exps.report.verdict import Row

GROUPS = {
    "curves": "Training and test curves against samples",
    "pace": "Time against batch: to the same loss",
    "final": "Final metrics against batch",
    "gap": "Gap to the base run",
    "hyper": "Hyperparameters against batch",
    "cost": "What scaling bought: throughput and time",
    "noise": "Gradient noise against signal",
    "svag": "SVAG: the same continuous time",
    "paper": "All batch sizes of a rule in one frame, as the paper draws them",
    "prediction": "Displacement: predicted and measured",
}
ACCURACY = "test accuracy"
NOISE, SIGNAL = "noise √(tr Σ / B)", "signal ‖∇f‖"
EQUAL = "as predicted"
CURVE, EVEN = "predicted by the noise", "equal samples"  # of `pace`, and its marks on the batch axis
STOP, HOLDS, HELD = "next doubling no longer pays", "predicted to hold up to", "measured to hold up to"
WINDOWS = 12  # of training, over each of which noise records are pooled
SPREAD = {"gap": "mean and 90% interval", "hyper": "", "cost": "mean and range", "noise": "pooled over seeds"}
SPREAD["pace"] = "mean ± sd of the ratios to the base run of each seed"
SPREAD["prediction"] = "95% interval of the prediction, 90% of the measurement"


@dataclass(frozen=True)
class Trace:
    """A line of an arm. `low`, `high`: its band, or the ends of its error bars where `points`."""

    arm: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    points: bool = False
    x_low: list[float] | None = None  # ends of the error bars along x
    x_high: list[float] | None = None
    batch: int | None = None
    width: float = 2.0


@dataclass(frozen=True)
class Chart:
    """`band` is (low, high) of what `band_name` says; `batch` is None where a chart shows several.

    `ticks`: places on the x axis and their labels, where these are few and fixed. `arrange` sets `setting` and `group`.
    """

    title: str
    x: str
    y: str
    traces: list[Trace]
    batch: int | None = None
    ticks: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    scatter: bool = False  # points stand alone, and x is a share too
    band: tuple[float, float] | None = None
    band_name: str = "counts as equal"
    setting: str = ""
    group: str = ""


Value = tuple[float, float, float]  # a point and the ends of its error bar


def arrange(rows: list[Row]) -> list[Chart]:
    """Every chart that the rows have data for, by setting and then in the order of GROUPS."""
    builders = (_curves, _pace, _final, _gap, _hyper, _cost, _noise, _svag, _paper)
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        if row.runs:
            by_setting.setdefault(row.setting, []).append(row)
    groups = [group for group in GROUPS if group != "prediction"]
    drawn = [
        replace(chart, setting=setting, group=group)
        for setting, members in by_setting.items()
        for group, build in zip(groups, builders, strict=True)
        for chart in build(members)
        if chart.traces
    ]
    return drawn + _prediction(rows)


def sections(drawn: list[Chart]) -> list[tuple[str, str, list[int]]]:
    """Setting, group, and the places in `drawn` of that group's charts."""
    groups = itertools.groupby(enumerate(drawn), key=lambda numbered: (numbered[1].setting, numbered[1].group))
    return [(*key, [i for i, _ in numbered]) for key, numbered in groups]


def _line(arm: str, batch: int, x: np.ndarray, y: np.ndarray) -> Trace:
    """`y` (points,), or its mean over seeds (seeds, points), ± standard deviation where there are two or more."""
    seeds = np.atleast_2d(y)
    mean = seeds.mean(0)
    if len(seeds) < 2:
        return Trace(arm, x.tolist(), mean.tolist(), batch=batch)
    sd = seeds.std(0, ddof=1)
    return Trace(arm, x.tolist(), mean.tolist(), (mean - sd).tolist(), (mean + sd).tolist(), batch=batch)


def _loss(row: Row) -> Trace:
    edges, losses = trajectory(row.runs)
    return _line(row.rule, row.batch, (edges[1:] + edges[:-1]) / 2, losses)


def _evaluated(row: Row, metric: str) -> Trace | None:
    series = [r.evals[metric] for r in row.runs if metric in r.evals]
    if not series:
        return None
    n = min(len(x) for x, _ in series)
    x = np.mean([x[:n] for x, _ in series], axis=0)
    return _line(row.rule, row.batch, x, np.stack([y[:n] for _, y in series]))


def test_metric(rows: Iterable[Row]) -> str:
    """What is drawn of the test set: accuracy where there is one."""
    return "accuracy" if any("accuracy" in r.evals for row in rows for r in row.runs) else "loss"


def _pair(title: str, rows: list[Row], batch: int | None = None) -> list[Chart]:
    """Train loss and test metric over samples, a line a row."""
    metric = test_metric(rows)
    test = [t for r in rows if (t := _evaluated(r, metric))]
    both = ("train loss", [_loss(r) for r in rows]), (f"test {metric}", test)
    return [Chart(title, "samples seen", y, lines, batch, percent=y == ACCURACY) for y, lines in both]


def _curves(rows: list[Row]) -> list[Chart]:
    base, arms = [r for r in rows if r.role == "base"], [r for r in rows if r.role != "base" and r.svag == 1]
    return [
        chart
        for batch in sorted({r.batch for r in arms or base})
        for chart in _pair(f"batch {batch}", base + [r for r in arms if r.batch == batch], batch)
    ]


def _arms(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r.rule for r in rows if r.role != "base"))


def _against_batch(
    name: str, rows: list[Row], values: Iterable[Value | None], nested: bool = False, **style: Any
) -> Chart:
    """A point a row, of `values`; every arm starts from the base batch, where all rules are one run.

    Where the arms have one batch among them, a line would tell nothing: then the x axis names the arms.

    Args:
        nested: lines may lie on each other: each is thinner than the one before, also where the arms have one batch.
    """
    arms = [*dict.fromkeys(r.rule for r in rows if r.role == "base"), *_arms(rows)]
    batches = sorted({r.batch for r in rows})
    targets = sorted({r.batch for r in rows if r.role != "base"}) or batches
    by_name = len(batches) == 1 or (len(targets) == 1 and not nested)
    finite = [(r, v) for r, v in zip(rows, values, strict=True) if v and all(map(math.isfinite, v))]
    traces = []
    for i, arm in enumerate(arms):
        plain = all(r.svag == 1 for r in rows if r.rule == arm) and not by_name
        points = sorted((r.batch, v) for r, v in finite if r.rule == arm or (plain and r.role == "base"))
        if points:
            x = [float(i if by_name else batch) for batch, _ in points]
            y, low, high = (list(column) for column in zip(*(v for _, v in points), strict=True))
            width = 1.5 + 0.9 * (len(arms) - 1 - i) if nested else 2.0
            traces.append(Trace(arm, x, y, low, high, points=True, width=width))
    if not by_name:
        return Chart(name, "batch", name, traces, ticks=_batch_ticks(batches), log_x=True, **style)
    of_base = {r.rule: f"base ({r.batch})" for r in rows if r.role == "base" and r.batch != targets[0]}
    ticks = tuple((float(i), of_base.get(arm, arm)) for i, arm in enumerate(arms))
    return Chart(name, f"batch {targets[0]}", name, traces, ticks=ticks, **style)


def _batch_ticks(batches: list[int]) -> tuple[tuple[float, str], ...]:
    return tuple((float(b), str(b)) for b in batches[:: -(-len(batches) // 8)])


def _pace(rows: list[Row]) -> list[Chart]:
    """Samples, steps, time to the same loss over the base's, and up to where a doubling pays and the rule holds."""
    told = pace.of(rows)
    if isinstance(told, str):
        return []
    t, batches = told.predicted, sorted({told.base, *(p.batch for p in told.points)})
    marks: dict[str, float | None] = {HELD: max(told.held.values())}
    if t is not None:
        marks = {STOP: t.b_noise and t.b_noise / 2, HOLDS: t.largest} | marks
    far = 16 * batches[-1]  # a mark beyond is in the paragraph alone, as is one that no larger batch reaches
    shown = {name: float(b) for name, b in marks.items() if b and told.base < b <= far}
    start, end = min(batches[0], *shown.values(), math.inf), max(batches[-1], *shown.values(), 0.0)
    grid = np.geomspace(start, end, 60)
    ticks = _batch_ticks(batches)
    for b in shown.values():
        if all(max(b / x, x / b) > 1.4 for x, _ in ticks):
            ticks += ((b, f"{b:,.0f}"),)
    drawn = []
    for i, what in enumerate(("samples", "steps", "time")):
        traces: list[Trace] = []
        if t is not None and t.b_noise is not None and what != "time":
            traces.append(_predicted_pace(t.base, t.b_noise, t.at_base.b_noise, grid, 1 - i))
        if what == "steps":
            traces.append(Trace(EVEN, grid.tolist(), (told.base / grid).tolist(), width=1.2))
        for rule in told.held:
            at = [(float(told.base), (1.0, 0.0))]
            at += [(float(p.batch), getattr(p, what)) for p in told.points if p.rule == rule and p.batch != told.base]
            at = sorted((b, (m, 0.0 if math.isnan(sd) else sd)) for b, (m, sd) in at if math.isfinite(m))
            x, y = [b for b, _ in at], [m for _, (m, _) in at]
            low, high = ([max(m + sign * sd, m / 10) for _, (m, sd) in at] for sign in (-1, 1))
            traces.append(Trace(rule, x, y, low, high, points=True))
        values = [v for trace in traces for v in (*trace.y, *(trace.low or ()), *(trace.high or ()))]
        traces += [Trace(name, [b, b], [min(values), max(values)], width=1.5) for name, b in shown.items()]
        title = f"{what} to train loss {told.loss:.3g}, × batch {told.base}'s"
        log_y = what != "samples"
        drawn.append(Chart(title, "batch", title, traces, ticks=ticks, log_x=True, log_y=log_y))
    return drawn


def _predicted_pace(base: int, b_noise: float, ends: tuple[float, float], grid: np.ndarray, which: int) -> Trace:
    """McCandlish's curve over its value at the base batch, and the band of B_noise's interval."""

    def curve(scale: float) -> list[float]:
        at_base = steps_and_samples(base, scale)[which]
        return [steps_and_samples(b, scale)[which] / at_base for b in grid.tolist()]

    if not all(map(math.isfinite, ends)):
        return Trace(CURVE, grid.tolist(), curve(b_noise))
    low, high = curve(ends[0]), curve(ends[1])
    both = list(zip(low, high, strict=True))
    return Trace(CURVE, grid.tolist(), curve(b_noise), [min(p) for p in both], [max(p) for p in both])


def _smallest_margin(rows: list[Row], metric: str) -> float | None:
    return min((t.margin for r in rows for t in r.tests if t.metric == metric and t.margin), default=None)


def _error_bar(middle: float, low: float, high: float) -> Value:
    """Without a spread, as of one seed, the point alone."""
    return middle, middle if math.isnan(low) else low, middle if math.isnan(high) else high


def _final(rows: list[Row]) -> list[Chart]:
    drawn = []
    for metric, name in METRICS.items():
        spread = [r.metrics.get(metric) for r in rows]
        values = [s and _error_bar(s[0], s[0] - s[1], s[0] + s[1]) for s in spread]
        base = next((s[0] for r, s in zip(rows, spread, strict=True) if s and r.role == "base"), None)
        margin = _smallest_margin(rows, metric)
        band = (base - margin, base + margin) if base is not None and margin else None
        drawn.append(_against_batch(name, rows, values, percent=metric == "test_accuracy", band=band))
    return drawn


def _gap(rows: list[Row]) -> list[Chart]:
    arms, drawn = [r for r in rows if r.role != "base"], []
    for metric, name in METRICS.items() if arms else ():
        tests = [r.gaps.get(metric) for r in arms]
        values = [_error_bar(t.difference, t.low, t.high) if t and t.n else None for t in tests]
        margin, absolute = _smallest_margin(rows, metric), metric == "trajectory"
        band = None if margin is None else (0.0 if absolute else -margin, margin)
        title = name if absolute else f"Δ {name}"
        drawn.append(_against_batch(title, arms, values, percent=metric == "test_accuracy", band=band))
    return [*drawn, _displacement(arms)] if arms else []


def _displacement(arms: list[Row]) -> Chart:
    """How much farther or less far from the start an arm ends than its base run, beside what the noise predicts.

    Where a prediction at several batches can be drawn, without the controls: they end so far off that the axis would
    hide the comparison.
    """
    foretold = sorted(
        (float(r.batch), p.deviation - 1, p.low - 1, p.high - 1) for r in arms if (p := r.predicted) is not None
    )
    rules = [r for r in arms if r.role != "control"]
    rows = rules if foretold and len({r.batch for r in rules}) > 1 else arms
    changes = [_error_bar(m.value - 1, m.low - 1, m.high - 1) if (m := r.measured) is not None else None for r in rows]
    chart = _against_batch("change of |θ - θ₀|", rows, changes, percent=True)
    if not chart.traces or not chart.log_x or not foretold:
        return chart
    x, y, low, high = (list(column) for column in zip(*foretold, strict=True))
    return replace(chart, traces=[Trace(CURVE, x, y, low, high), *chart.traces])


def _hyper(rows: list[Row]) -> list[Chart]:
    executed = [r.runs[0].spec.science.hyper for r in rows]
    betas = max(len(h.betas) for h in executed)
    named = {"learning rate η": [h.lr for h in executed]}
    for i in range(betas):
        of_all = [h.betas[i] if i < len(h.betas) else 0.0 for h in executed]
        named[f"1 - β{'₁₂'[i]}" if betas > 1 else "1 - β"] = [1 - beta if beta > 0 else 0.0 for beta in of_all]
    named |= {"ε": [h.eps for h in executed], "weight decay λ": [h.weight_decay for h in executed]}
    return [
        _against_batch(name, rows, [(v, v, v) if v > 0 else None for v in values], nested=True, log_y=True)
        for name, values in named.items()
    ]


def _cost(rows: list[Row]) -> list[Chart]:
    drawn = []
    for key, name in (("samples_per_second", "throughput, samples/s"), ("seconds", "time of a run, s")):
        measured = [[float(v) for r in row.runs if _positive(v := r.result.get(key))] for row in rows]
        values = [(sum(m) / len(m), min(m), max(m)) if m else None for m in measured]
        drawn.append(_against_batch(name, rows, values, log_y=True))
    return drawn


def _positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _pooled(runs: Iterable[Run]) -> np.ndarray:
    """(windows, 3): samples, tr Σ, ‖∇f‖², means over the records of all runs in each of WINDOWS windows of training.

    Ratios are of these means: the ratio of one record is noisy, and leaving out records whose ‖∇f‖² came out below 0
    would be a selection on the outcome. Full measurements count where there are any, else the free estimate.
    """
    noise = [row for run in runs for row in run.noise]
    full = [row for row in noise if row.get("method") == "full"]
    points = [(row["clock"], row.get("trace"), row.get("gradient_sq")) for row in full or noise]
    points = [p for p in points if all(isinstance(v, int | float) and math.isfinite(v) for v in p)]
    if not points:
        return np.empty((0, 3))
    table = np.array(sorted(points), dtype=float)
    marks, mark = np.unique(table[:, 0], return_inverse=True)
    windows = np.array_split(np.arange(len(marks)), min(WINDOWS, len(marks)))
    return np.stack([table[np.isin(mark, window)].mean(0) for window in windows])


def _noise(rows: list[Row]) -> list[Chart]:
    """Of the base and the rules under test: a step's signal and noise (paper, Fig. 4, 5), B_noise, κ r.

    κ r = B ‖∇f‖² / tr Σ; the rule needs it well below 1.
    """
    members = sorted((r for r in rows if r.role != "control" and r.svag == 1 and not r.ramp), key=lambda r: r.batch)
    several = len(_arms(members)) > 1
    steps, scales, ratios, dominated = [], [], [], list[Value | None]()
    for row in members:
        x, trace, signal = _pooled(row.runs).T
        share = float(np.mean(row.batch * signal < DOMINATED * trace)) if len(x) else math.nan
        dominated.append((share, share, share))
        up = (signal > 0) & (trace > 0)
        if not up.any():
            continue
        x, trace, signal = x[up], trace[up], signal[up]
        ratio = row.batch * signal / trace
        lines = [
            _line(NOISE, row.batch, x, np.sqrt(trace / row.batch)),
            _line(SIGNAL, row.batch, x, np.sqrt(signal)),
        ]
        title = f"{row.rule}, batch {row.batch}"
        steps.append(Chart(f"{title}: a step", "samples seen", "", lines, row.batch, log_y=True))
        name = title if several else f"batch {row.batch}"
        scales.append(_line(name, row.batch, x, row.batch / ratio))
        ratios.append(_line(name, row.batch, x, ratio))
    lowest = min((min(t.y) for t in ratios), default=DOMINATED)
    limits, share_title = (min(lowest, DOMINATED) / 1.5, DOMINATED), f"share of training with κ r < {DOMINATED:g}"
    titles = ("B_noise, examples", scales, None), ("κ r = B ‖∇f‖² / tr Σ", ratios, limits)
    return [
        *steps,
        *(
            Chart(name, "samples seen", name, traces, log_y=True, band=band, band_name="noise dominates")
            for name, traces, band in titles
        ),
        *([_against_batch(share_title, members, dominated, percent=True)] if members else []),
    ]


def _svag(rows: list[Row]) -> list[Chart]:
    """The test functions of Fig. 3 over t, a line an ℓ."""
    functions = {name: [(c.row, c.t, c.values) for c in found] for name, found in svag.curves(rows).items()}
    pooled = [(row, _pooled(row.runs)) for row, *_ in functions.get("train loss", [])]
    for column, name in ((1, "tr Σ"), (2, "‖∇f‖²")) if pooled else ():
        functions[name] = [(row, row.runs[0].t * p[:, 0], p[:, column]) for row, p in pooled if len(p)]
    drawn = []
    for name, found in functions.items():
        traces = [_line(row.rule, row.batch, t, values) for row, t, values in found]
        drawn.append(Chart(name, "continuous time t", name, traces, percent=name == ACCURACY))
    return drawn


def _paper(rows: list[Row]) -> list[Chart]:
    """A frame for each rule, a line for each batch size: where a rule holds, the lines lie on each other."""
    drawn = []
    for arm in _arms([r for r in rows if r.svag == 1]):
        members = sorted((r for r in rows if r.role == "base" or r.rule == arm), key=lambda r: r.batch)
        for chart in _pair(arm, members):
            drawn.append(replace(chart, traces=[replace(t, arm=f"batch {t.batch}") for t in chart.traces]))
    return drawn


def _prediction(rows: list[Row]) -> list[Chart]:
    """The calibration: a point for every arm of every setting that has both, and the line where they are equal."""
    members = prediction.compared(rows)
    traces = []
    for arm in dict.fromkeys(r.rule for r in members):
        pairs = [(r.predicted, r.measured) for r in members if r.rule == arm]
        x = [(p.deviation - 1, p.low - 1, p.high - 1) for p, _ in pairs if p]
        y = [_error_bar(m.value - 1, m.low - 1, m.high - 1) for _, m in pairs if m]
        (at, left, right), (up, low, high) = (map(list, zip(*v, strict=True)) for v in (x, y))
        traces.append(Trace(arm, at, up, low, high, points=True, x_low=left, x_high=right))
    if not traces:
        return []
    ends = [v for t in traces for part in (t.x, t.y, t.low, t.high, t.x_low, t.x_high) for v in part or ()]
    line = [min(0.0, *ends), max(0.0, *ends)]
    settings = list(dict.fromkeys(r.setting for r in members))
    return [
        Chart(
            "change of |θ - θ₀| against the base", "predicted", "measured",
            [Trace(EQUAL, line, line, width=1.2), *traces], percent=True, scatter=True,
            setting=settings[0] if len(settings) == 1 else f"{len(settings)} settings", group="prediction",
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How an arm is drawn: its colour on a light and on a dark page, and its dash (plotly's words)."""

    light: str
    dark: str
    dash: str = "solid"


# Colours that the colour-blind tell apart, with 3:1 contrast or more on white and on the dark page. Colour is never
# the only sign: arms differ in dash as well.
_STYLES = {
    "base": Style("#1a1a1a", "#f2f2f2"),
    "sqrt": Style("#0068a8", "#5ab8f0"),
    "none": Style("#c8500a", "#ff8f4d", "dot"),
    "linear": Style("#967000", "#e8c24a", "dash"),
    "linear_scaled": Style("#00805c", "#3fd6a6", "dashdot"),
    "lr_only": Style("#b0408c", "#f09ad2", "longdash"),
    "sqrt_without_betas": Style("#6a4fc0", "#b3a0ff", "dot"),
    "sqrt_without_eps": Style("#7a4a2a", "#d9a67c", "dash"),
    NOISE: Style("#c8500a", "#ff8f4d", "dot"),
    SIGNAL: Style("#0068a8", "#5ab8f0"),
    EQUAL: Style("#555555", "#bbbbbb", "dash"),
    EVEN: Style("#555555", "#bbbbbb", "dot"),
    CURVE: Style("#c8500a", "#ff8f4d", "dash"),
    STOP: Style("#967000", "#e8c24a", "dashdot"),
    HOLDS: Style("#c8500a", "#ff8f4d", "longdash"),
    HELD: Style("#0068a8", "#5ab8f0", "longdash"),
}
_MORE = (
    Style("#00748a", "#5fd4e8"), Style("#a01030", "#ff8098", "dash"), Style("#5a6b00", "#c3d94a", "dot"),
    Style("#555555", "#bbbbbb", "dashdot"),
)  # fmt: skip
_BATCHES = tuple(
    map(
        Style,
        ("#440154", "#414487", "#2a788e", "#1a8a5a", "#5d8f1a", "#9a7b00", "#b5541c", "#a01050"),
        ("#c79bff", "#8fa8ff", "#5fc8e0", "#4fd9a0", "#a8dd58", "#f0d24a", "#ff9c66", "#ff7fb0"),
    )
)


def styles(drawn: Iterable[Chart]) -> dict[str, Style]:
    """arm -> its style. Arms that are a batch take a sequence of colours in the order of their size."""
    traces = [t for c in drawn for t in c.traces]
    order = {b: i for i, b in enumerate(sorted({t.batch for t in traces if t.batch}))}
    chosen: dict[str, Style] = {}
    unnamed = itertools.cycle(_MORE)
    for t in traces:
        if t.arm not in chosen and t.batch and t.arm == f"batch {t.batch}":
            chosen[t.arm] = _BATCHES[round(order[t.batch] / max(1, len(order) - 1) * (len(_BATCHES) - 1))]
        elif t.arm not in chosen:
            chosen[t.arm] = _STYLES.get(t.arm) or next(unnamed)
    return chosen
