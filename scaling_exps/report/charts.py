"""Rows and runs -> charts as plain values, drawn by `figures` (files) and by `page` (browser) alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_exps.report.runs import Run, trajectory
from scaling_exps.report.verdict import Row

GROUPS = {
    "curves": "Training and test curves against samples",
    "final": "Final metrics against batch",
    "gap": "Gap to the base run against batch",
    "hyper": "Hyperparameters against batch",
    "cost": "What scaling bought: throughput and time",
    "noise": "Gradient noise against signal",
    "svag": "SVAG: the same continuous time",
    "paper": "All batch sizes of a rule in one frame, as the paper draws them",
}
NAMES = {
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "perplexity": "test perplexity",
    "train_loss": "train loss, last tenth",
    "trajectory": "|Δ train loss|, mean over training",
    "weight_norm": "weight norm",
}


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


@dataclass(frozen=True)
class Chart:
    """`band` is what counts as equal, (low, high); `batch` is None where the x axis is the batch."""

    group: str
    setting: str
    title: str
    x: str
    y: str
    traces: tuple[Trace, ...]
    batch: int | None = None
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    band: tuple[float, float] | None = None


def charts(rows: list[Row]) -> list[Chart]:
    """Every chart that the rows have data for, by setting and then in the order of GROUPS."""
    made: list[Chart] = []
    for setting in dict.fromkeys(r.setting for r in rows):
        mine = [r for r in rows if r.setting == setting and r.runs]
        for group, build in _BUILD.items():
            made += [c for c in build(setting, mine) if c.traces and group == c.group]
    return made


def _band(values: np.ndarray) -> tuple[list[float], list[float] | None, list[float] | None]:
    """Mean over seeds (axis 0), and mean ± standard deviation where there are two or more."""
    mean = values.mean(0)
    if len(values) < 2:
        return mean.tolist(), None, None
    sd = values.std(0, ddof=1)
    return mean.tolist(), (mean - sd).tolist(), (mean + sd).tolist()


def _loss(rows: Iterable[Row]) -> list[Trace]:
    traces = []
    for row in rows:
        edges, losses = trajectory(row.runs)
        traces.append(Trace(row.rule, ((edges[1:] + edges[:-1]) / 2).tolist(), *_band(losses), batch=row.batch))
    return traces


def _evals(rows: Iterable[Row], metric: str) -> list[Trace]:
    traces = []
    for row in rows:
        series = [r.evals[metric] for r in row.runs if metric in r.evals]
        if not series:
            continue
        n = min(len(x) for x, _ in series)
        x = np.mean([x[:n] for x, _ in series], axis=0)
        traces.append(Trace(row.rule, x.tolist(), *_band(np.stack([y[:n] for _, y in series])), batch=row.batch))
    return traces


def _test_metric(rows: Iterable[Row]) -> str:
    return "accuracy" if any("accuracy" in r.evals for row in rows for r in row.runs) else "loss"


def _curves(setting: str, rows: list[Row]) -> list[Chart]:
    base = [r for r in rows if r.role == "base"]
    made = []
    metric = _test_metric(rows)
    for batch in sorted({r.batch for r in rows if r.role != "base"}) or [r.batch for r in base]:
        here = base + [r for r in rows if r.batch == batch and r.role != "base" and "SVAG" not in r.rule]
        x = "samples seen"
        made.append(Chart("curves", setting, f"batch {batch}", x, "train loss", tuple(_loss(here)), batch))
        test = tuple(_evals(here, metric))
        share = metric == "accuracy"
        made.append(Chart("curves", setting, f"batch {batch}", x, f"test {metric}", test, batch, percent=share))
    return made


def _arms(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r.rule for r in rows if r.role != "base"))


def _against_batch(rows: list[Row], value: Callable[[Row], tuple[float, float, float] | None]) -> list[Trace]:
    """A point a row; every arm starts from the base batch, where all rules are one run."""
    traces = []
    for arm in [*dict.fromkeys(r.rule for r in rows if r.role == "base"), *_arms(rows)]:
        mine = [r for r in rows if r.rule == arm or (r.role == "base" and "SVAG" not in arm)]
        points = [(r.batch, v) for r in mine if (v := value(r)) and all(map(math.isfinite, v))]
        if points:
            xs, vs = zip(*sorted(points), strict=True)
            mean, low, high = (list(v) for v in zip(*vs, strict=True))
            traces.append(Trace(arm, list(xs), mean, low, high, points=True))
    return traces


def _final(setting: str, rows: list[Row]) -> list[Chart]:
    made = []
    for metric in ("test_accuracy", "test_loss", "perplexity", "train_loss", "weight_norm"):
        if not any(metric in r.metrics for r in rows):
            continue

        def value(row: Row, metric: str = metric) -> tuple[float, float, float] | None:
            if metric not in row.metrics:
                return None
            mean, sd = row.metrics[metric]
            return mean, mean - (0 if math.isnan(sd) else sd), mean + (0 if math.isnan(sd) else sd)

        base = next((r.metrics[metric][0] for r in rows if r.role == "base" and metric in r.metrics), None)
        margin = _smallest_margin(rows, metric)
        band = (base - margin, base + margin) if base is not None and margin else None
        traces = tuple(_against_batch(rows, value))
        made.append(
            Chart("final", setting, NAMES[metric], "batch", NAMES[metric], traces, None, log_x=True,
                  percent=metric == "test_accuracy", band=band)
        )  # fmt: skip
    return made


def _smallest_margin(rows: list[Row], metric: str) -> float | None:
    return min((t.margin for r in rows for t in r.tests if t.metric == metric and t.margin), default=None)


def _gap(setting: str, rows: list[Row]) -> list[Chart]:
    made = []
    for metric, name in NAMES.items():

        def value(row: Row, metric: str = metric) -> tuple[float, float, float] | None:
            test = row.gaps.get(metric)
            if test is None or not test.n:
                return None
            low, high = (test.difference if math.isnan(v) else v for v in (test.low, test.high))
            return test.difference, low, high

        margin = _smallest_margin(rows, metric)
        band = None if margin is None else (0.0 if metric == "trajectory" else -margin, margin)
        y = name if metric == "trajectory" else f"Δ {name}"
        traces = tuple(_against_batch([r for r in rows if r.role != "base"], value))
        share = metric == "test_accuracy"
        made.append(Chart("gap", setting, y, "batch", y, traces, log_x=True, percent=share, band=band))
    return made


def _hyper(setting: str, rows: list[Row]) -> list[Chart]:
    def read(name: str, index: int = 0) -> Callable[[Row], tuple[float, float, float] | None]:
        def value(row: Row) -> tuple[float, float, float] | None:
            raw = getattr(row.runs[0].spec.science.hyper, name)
            if name == "betas":
                raw = 1 - raw[index] if index < len(raw) and raw[index] > 0 else 0
            return (raw, raw, raw) if raw > 0 else None

        return value

    betas = max((len(r.runs[0].spec.science.hyper.betas) for r in rows), default=0)
    wanted = [("learning rate η", read("lr")), ("ε", read("eps")), ("weight decay λ", read("weight_decay"))]
    wanted[1:1] = [(f"1 - β{'₁₂'[i]}" if betas > 1 else "1 - β", read("betas", i)) for i in range(betas)]
    return [
        Chart("hyper", setting, name, "batch", name, tuple(_against_batch(rows, v)), None, log_x=True, log_y=True)
        for name, v in wanted
    ]


def _cost(setting: str, rows: list[Row]) -> list[Chart]:
    def read(key: str) -> Callable[[Row], tuple[float, float, float] | None]:
        def value(row: Row) -> tuple[float, float, float] | None:
            got = [
                v for r in row.runs if isinstance(v := r.result.get(key), int | float) and math.isfinite(v) and v > 0
            ]
            return (sum(got) / len(got), min(got), max(got)) if got else None

        return value

    wanted = (("samples_per_second", "throughput, samples/s"), ("seconds", "time of a run, s"))
    return [
        Chart(
            "cost", setting, name, "batch", name, tuple(_against_batch(rows, read(key))), None, log_x=True, log_y=True
        )
        for key, name in wanted
    ]


def _noise(setting: str, rows: list[Row]) -> list[Chart]:
    """tr Σ / B against ‖∇f‖² over training, and their ratio κ r = B ‖∇f‖² / tr Σ: the rule needs it well below 1.

    Of the base and the rule under test, a line for each batch, the first seed that was measured.
    """

    def series(run: Run, pick: Callable[[float, float, int], float]) -> tuple[list[float], list[float]]:
        xs, ys = [], []
        methods = {row.get("method") for row in run.noise}
        chosen = "full" if "full" in methods else next(iter(methods), None)  # the free estimate where that is all
        for row in run.noise:
            trace, signal = row.get("trace", 0), row.get("gradient_sq", 0)
            if row.get("method") == chosen and _positive(trace) and _positive(signal):
                xs.append(row["clock"])
                ys.append(pick(trace, signal, run.spec.science.batch))
        return xs, ys

    made = []
    for title, pick in (
        ("noise tr Σ / B", lambda trace, signal, batch: trace / batch),
        ("signal ‖∇f‖²", lambda trace, signal, batch: signal),
        ("κ r = B ‖∇f‖² / tr Σ", lambda trace, signal, batch: batch * signal / trace),
    ):
        traces = []
        for row in sorted((r for r in rows if r.role != "control" and "SVAG" not in r.rule), key=lambda r: r.batch):
            xs, ys = series(row.runs[0], pick)
            if xs:
                traces.append(Trace(f"batch {row.batch}", xs, ys, batch=row.batch))
        made.append(Chart("noise", setting, title, "samples seen", title, tuple(traces), log_y=True))
    return made


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _svag(setting: str, rows: list[Row]) -> list[Chart]:
    here = [r for r in rows if r.role == "base" or "SVAG" in r.rule]
    if len(here) == sum(r.role == "base" for r in here):
        return []
    scale = {id(r): r.runs[0].t for r in here}
    metric = _test_metric(here)
    made = []
    for name, traces in (("train loss", _loss(here)), (f"test {metric}", _evals(here, metric))):
        moved = tuple(
            Trace(t.arm, [x * scale[id(r)] for x in t.x], t.y, t.low, t.high, batch=t.batch)
            for t, r in zip(traces, here, strict=False)
            if math.isfinite(scale[id(r)])
        )
        made.append(Chart("svag", setting, name, "continuous time t", name, moved, percent="accuracy" in name))
    return made


def _paper(setting: str, rows: list[Row]) -> list[Chart]:
    """A frame for each rule, a line for each batch size: where a rule holds, the lines lie on each other."""
    base = [r for r in rows if r.role == "base"]
    metric = _test_metric(rows)
    made = []
    for arm in [a for a in _arms(rows) if "SVAG" not in a]:
        here = sorted(base + [r for r in rows if r.rule == arm], key=lambda r: r.batch)
        for name, traces in ((f"test {metric}", _evals(here, metric)), ("train loss", _loss(here))):
            lines = tuple(Trace(f"batch {t.batch}", t.x, t.y, t.low, t.high, batch=t.batch) for t in traces)
            made.append(Chart("paper", setting, arm, "samples seen", name, lines, percent="accuracy" in name))
    return made


_BUILD: dict[str, Callable[[str, list[Row]], list[Chart]]] = {
    "curves": _curves, "final": _final, "gap": _gap, "hyper": _hyper, "cost": _cost, "noise": _noise, "svag": _svag,
    "paper": _paper,
}  # fmt: skip

# Colours that the colour-blind tell apart, with 3:1 contrast or more on white and on the dark page; (light, dark).
_COLOURS = {
    "base": ("#1a1a1a", "#f2f2f2"),
    "sqrt": ("#0068a8", "#5ab8f0"),
    "none": ("#c8500a", "#ff8f4d"),
    "linear": ("#967000", "#e8c24a"),
    "linear_scaled": ("#00805c", "#3fd6a6"),
    "lr_only": ("#b0408c", "#f09ad2"),
    "sqrt_without_betas": ("#6a4fc0", "#b3a0ff"),
    "sqrt_without_eps": ("#7a4a2a", "#d9a67c"),
}
_MORE = (("#5a6b00", "#c3d94a"), ("#00748a", "#5fd4e8"), ("#a01030", "#ff8098"), ("#555555", "#bbbbbb"))
_SEQUENCE = ("#440154", "#414487", "#2a788e", "#1a8a5a", "#5d8f1a", "#9a7b00", "#b5541c", "#a01050")
_SEQUENCE_DARK = ("#c79bff", "#8fa8ff", "#5fc8e0", "#4fd9a0", "#a8dd58", "#f0d24a", "#ff9c66", "#ff7fb0")


def colours(arms: Iterable[str], batches: Iterable[int]) -> dict[str, tuple[str, str]]:
    """arm -> (on light, on dark). Arms called `batch N` take a sequence in the order of their size."""
    found, more = {}, 0
    places = {b: i for i, b in enumerate(sorted(set(batches)))}
    last = max(1, len(places) - 1)
    for arm in dict.fromkeys(arms):
        if arm.startswith("batch ") and arm[6:].isdigit() and int(arm[6:]) in places:
            i = round(places[int(arm[6:])] / last * (len(_SEQUENCE) - 1))
            found[arm] = _SEQUENCE[i], _SEQUENCE_DARK[i]
        elif arm in _COLOURS:
            found[arm] = _COLOURS[arm]
        else:
            found[arm] = _MORE[more % len(_MORE)]
            more += 1
    return found


def dash(arm: str) -> str:
    """Colour is never the only sign: base and sqrt are solid, the others differ in dash as well."""
    fixed = {"none": "dot", "linear": "dash", "linear_scaled": "dashdot", "lr_only": "longdash"}
    if "SVAG" in arm:
        return {"2": "dash", "4": "dot"}.get(arm.rpartition("=")[2], "dashdot")
    return fixed.get(arm, "solid")
