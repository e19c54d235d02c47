"""Rows and runs -> charts as plain values, drawn by `figures` (files) and by `page` (browser) alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from scaling_exps.noise.validity import DOMINATED
from scaling_exps.report.runs import Run, trajectory
from scaling_exps.report.verdict import METRICS, Row

GROUPS = {
    "curves": "Training and test curves against samples",
    "final": "Final metrics against batch",
    "gap": "Gap to the base run",
    "hyper": "Hyperparameters against batch",
    "cost": "What scaling bought: throughput and time",
    "noise": "Gradient noise against signal",
    "svag": "SVAG: the same continuous time",
    "paper": "All batch sizes of a rule in one frame, as the paper draws them",
}
ACCURACY = "test accuracy"
NOISE, SIGNAL = "noise √(tr Σ / B)", "signal ‖∇f‖"
WINDOWS = 12  # of training, over each of which noise records are pooled
SPREAD = {"gap": "mean and 90% interval", "hyper": "", "cost": "mean and range", "noise": "pooled over seeds"}


@dataclass(frozen=True)
class Trace:
    """A line of an arm. `low`, `high`: its band, or the ends of its error bars where `points`."""

    arm: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    points: bool = False
    batch: int | None = None
    width: float = 2.0


@dataclass(frozen=True)
class Chart:
    """`band` is (low, high) of what `band_name` says; `batch` is None where a chart shows several.

    `ticks`: places on the x axis and their labels, where these are few and fixed.
    """

    group: str
    setting: str
    title: str
    x: str
    y: str
    traces: tuple[Trace, ...]
    batch: int | None = None
    ticks: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    band: tuple[float, float] | None = None
    band_name: str = "counts as equal"


Value = tuple[float, float, float]  # a point and the ends of its error bar


def arrange(rows: list[Row]) -> list[Chart]:
    """Every chart that the rows have data for, by setting and then in the order of GROUPS."""
    builders = (_curves, _final, _gap, _hyper, _cost, _noise, _svag, _paper)
    drawn = []
    for setting in dict.fromkeys(r.setting for r in rows):
        members = [r for r in rows if r.setting == setting and r.runs]
        drawn += [c for build in builders for c in build(setting, members) if c.traces]
    return drawn


def _line(arm: str, batch: int, x: np.ndarray, seeds: np.ndarray) -> Trace:
    """Mean over `seeds` (seeds, points), and mean ± standard deviation where there are two or more."""
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


def _test_metric(rows: Iterable[Row]) -> str:
    return "accuracy" if any("accuracy" in r.evals for row in rows for r in row.runs) else "loss"


def _pair(rows: list[Row], metric: str) -> list[tuple[str, list[Trace]]]:
    """Train loss and test metric over samples, a line a row."""
    test = [t for r in rows if (t := _evaluated(r, metric))]
    return [("train loss", [_loss(r) for r in rows]), (f"test {metric}", test)]


def _curves(setting: str, rows: list[Row]) -> list[Chart]:
    base, metric = [r for r in rows if r.role == "base"], _test_metric(rows)
    arms = [r for r in rows if r.role != "base" and r.svag == 1]
    return [
        Chart("curves", setting, f"batch {batch}", "samples seen", name, tuple(traces), batch, percent=name == ACCURACY)
        for batch in sorted({r.batch for r in arms} or {r.batch for r in base})
        for name, traces in _pair(base + [r for r in arms if r.batch == batch], metric)
    ]


def _arms(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r.rule for r in rows if r.role != "base"))


def _against_batch(
    group: str, setting: str, name: str, rows: list[Row], value: Callable[[Row], Value | None], **style: Any
) -> Chart:
    """A point a row; every arm starts from the base batch, where all rules are one run.

    Error bars at one batch are set side by side within a tenth of the way to the next batch. Where all rows have one
    batch there is no such way: then the x axis names the arms.
    """
    arms = [*dict.fromkeys(r.rule for r in rows if r.role == "base"), *_arms(rows)]
    batches = sorted({r.batch for r in rows})
    one_batch = len(batches) == 1
    nearest = min((b / a for a, b in itertools.pairwise(batches)), default=1.0)
    traces = []
    for i, arm in enumerate(arms):
        aside = 1.0 if group == "hyper" else nearest ** (0.1 * ((i + 0.5) / len(arms) - 0.5))
        members = [r for r in rows if r.rule == arm]
        members += [r for r in rows if r.role == "base" != arm and members[0].svag == 1]
        points = sorted((r.batch, v) for r in members if (v := value(r)) and all(map(math.isfinite, v)))
        if points:
            x = [float(i) if one_batch else batch * aside for batch, _ in points]
            y, low, high = (list(column) for column in zip(*(v for _, v in points), strict=True))
            width = 1.5 + 0.9 * (len(arms) - 1 - i) if group == "hyper" else 2.0  # one line under another shows
            traces.append(Trace(arm, x, y, low, high, points=True, width=width))
    ticks = enumerate(arms) if one_batch else ((b, str(b)) for b in batches[:: -(-len(batches) // 8)])
    x_name = f"batch {batches[0]}" if one_batch else "batch"
    return Chart(
        group, setting, name, x_name, name, tuple(traces), None, tuple((float(x), label) for x, label in ticks),
        log_x=not one_batch, **style,
    )  # fmt: skip


def _final(setting: str, rows: list[Row]) -> list[Chart]:
    drawn = []
    for metric in (m for m in METRICS if any(m in r.metrics for r in rows)):

        def value(row: Row, metric: str = metric) -> Value | None:
            mean, sd = row.metrics.get(metric, (math.nan, math.nan))
            reach = 0 if math.isnan(sd) else sd
            return mean, mean - reach, mean + reach

        base = next((r.metrics[metric][0] for r in rows if r.role == "base" and metric in r.metrics), None)
        margin = _smallest_margin(rows, metric)
        band = (base - margin, base + margin) if base is not None and margin else None
        share = metric == "test_accuracy"
        drawn.append(_against_batch("final", setting, METRICS[metric], rows, value, percent=share, band=band))
    return drawn


def _smallest_margin(rows: list[Row], metric: str) -> float | None:
    return min((t.margin for r in rows for t in r.tests if t.metric == metric and t.margin), default=None)


def _gap(setting: str, rows: list[Row]) -> list[Chart]:
    arms, drawn = [r for r in rows if r.role != "base"], []
    for metric, name in METRICS.items() if arms else ():

        def value(row: Row, metric: str = metric) -> Value | None:
            test = row.gaps.get(metric)
            if test is None or not test.n:
                return None
            low, high = (test.difference if math.isnan(v) else v for v in (test.low, test.high))
            return test.difference, low, high

        margin, absolute = _smallest_margin(rows, metric), metric == "trajectory"
        band = None if margin is None else (0.0 if absolute else -margin, margin)
        title, share = name if absolute else f"Δ {name}", metric == "test_accuracy"
        drawn.append(_against_batch("gap", setting, title, arms, value, percent=share, band=band))
    return drawn


def _hyper(setting: str, rows: list[Row]) -> list[Chart]:
    def executed(name: str, index: int = 0) -> Callable[[Row], Value | None]:
        def value(row: Row) -> Value | None:
            raw = getattr(row.runs[0].spec.science.hyper, name)
            if name == "betas":
                raw = 1 - raw[index] if index < len(raw) and raw[index] > 0 else 0
            return (raw, raw, raw) if raw > 0 else None

        return value

    betas = max((len(r.runs[0].spec.science.hyper.betas) for r in rows), default=0)
    names = [(f"1 - β{'₁₂'[i]}" if betas > 1 else "1 - β", executed("betas", i)) for i in range(betas)]
    names = [("learning rate η", executed("lr")), *names, ("ε", executed("eps"))]
    names.append(("weight decay λ", executed("weight_decay")))
    return [_against_batch("hyper", setting, name, rows, value, log_y=True) for name, value in names if rows]


def _cost(setting: str, rows: list[Row]) -> list[Chart]:
    def measured(key: str) -> Callable[[Row], Value | None]:
        def value(row: Row) -> Value | None:
            values = [float(v) for r in row.runs if _positive(v := r.result.get(key))]
            return (sum(values) / len(values), min(values), max(values)) if values else None

        return value

    names = (("samples_per_second", "throughput, samples/s"), ("seconds", "time of a run, s"))
    return [_against_batch("cost", setting, name, rows, measured(key), log_y=True) for key, name in names if rows]


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


def _noise(setting: str, rows: list[Row]) -> list[Chart]:
    """Of the base and the rules under test: a step's signal and noise (paper, Fig. 4, 5), B_noise, κ r.

    κ r = B ‖∇f‖² / tr Σ; the rule needs it well below 1.
    """
    members = sorted((r for r in rows if r.role != "control" and r.svag == 1), key=lambda r: r.batch)
    pooled = [(r, table) for r in members if len(table := _pooled(r.runs))]
    drawn, scale, ratio = [], [], []
    dominated: dict[int, float] = {}
    for row, table in pooled:
        x, trace, signal = table.T
        dominated[id(row)] = float(np.mean(row.batch * signal < DOMINATED * trace))
        up = (signal > 0) & (trace > 0)
        if not up.any():
            continue
        lines = (
            Trace(NOISE, x[up].tolist(), np.sqrt(trace[up] / row.batch).tolist(), batch=row.batch),
            Trace(SIGNAL, x[up].tolist(), np.sqrt(signal[up]).tolist(), batch=row.batch),
        )
        drawn.append(
            Chart(
                "noise",
                setting,
                f"{row.rule}, batch {row.batch}: a step",
                "samples seen",
                "",
                lines,
                row.batch,
                log_y=True,
            )
        )
        ratios = row.batch * signal[up] / trace[up]
        name = f"batch {row.batch}" if len(_arms(members)) < 2 else f"{row.rule}, batch {row.batch}"
        scale.append(Trace(name, x[up].tolist(), (row.batch / ratios).tolist(), batch=row.batch))
        ratio.append(Trace(name, x[up].tolist(), ratios.tolist(), batch=row.batch))
    lowest = min((min(t.y) for t in ratio), default=DOMINATED)
    for title, traces, band in (
        ("B_noise, examples", scale, None),
        ("κ r = B ‖∇f‖² / tr Σ", ratio, (min(lowest, DOMINATED) / 1.5, DOMINATED)),
    ):
        drawn.append(
            Chart("noise", setting, title, "samples seen", title, tuple(traces), log_y=True, band=band,
                  band_name="noise dominates")
        )  # fmt: skip
    if pooled:
        title = f"share of training with κ r < {DOMINATED:g}"
        share = lambda row: (v, v, v) if (v := dominated.get(id(row))) is not None else None  # noqa: E731
        drawn.append(_against_batch("noise", setting, title, members, share, percent=True))
    return drawn


def _svag(setting: str, rows: list[Row]) -> list[Chart]:
    """The test functions of Fig. 3 over t, a line an ℓ."""
    members = [r for r in rows if r.role == "base" or r.svag > 1]
    members = [r for r in members if math.isfinite(r.runs[0].t)] if any(r.svag > 1 for r in members) else []

    def pooled(column: int) -> Callable[[Row], Trace | None]:
        def line(row: Row) -> Trace | None:
            table = _pooled(row.runs)
            y = table[:, column]
            return Trace(row.rule, table[:, 0].tolist(), y.tolist(), batch=row.batch) if len(table) else None

        return line

    functions: dict[str, Callable[[Row], Trace | None]] = {"train loss": _loss}
    for metric, name in (("loss", "test loss"), ("accuracy", ACCURACY), ("weight_norm", "weight norm")):
        functions[name] = lambda row, metric=metric: _evaluated(row, metric)  # type: ignore[misc]
    functions |= {"tr Σ": pooled(1), "‖∇f‖²": pooled(2)}
    drawn = []
    for name, line in functions.items():
        pairs = [(r, t) for r in members if (t := line(r))]
        traces = tuple(replace(t, x=[x * r.runs[0].t for x in t.x]) for r, t in pairs)
        drawn.append(Chart("svag", setting, name, "continuous time t", name, traces, percent=name == ACCURACY))
    return drawn


def _paper(setting: str, rows: list[Row]) -> list[Chart]:
    """A frame for each rule, a line for each batch size: where a rule holds, the lines lie on each other."""
    drawn, metric = [], _test_metric(rows)
    for arm in _arms([r for r in rows if r.svag == 1]):
        members = sorted((r for r in rows if r.role == "base" or r.rule == arm), key=lambda r: r.batch)
        for name, traces in _pair(members, metric):
            lines = tuple(replace(t, arm=f"batch {t.batch}") for t in traces)
            drawn.append(Chart("paper", setting, arm, "samples seen", name, lines, percent=name == ACCURACY))
    return drawn


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
    unnamed = 0
    for t in traces:
        if t.arm in chosen:
            continue
        if t.batch and t.arm == f"batch {t.batch}":
            chosen[t.arm] = _BATCHES[round(order[t.batch] / max(1, len(order) - 1) * (len(_BATCHES) - 1))]
        elif t.arm in _STYLES:
            chosen[t.arm] = _STYLES[t.arm]
        else:
            chosen[t.arm] = _MORE[unnamed % len(_MORE)]
            unnamed += 1
    return chosen
