"""What is measured, what is fitted to it, and what a check hands back: rows, verdicts, a table, a figure, JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True, eq=False)
class Measurement:
    """Signed errors at the observation times."""

    names: tuple[str, ...]  # of the nf test functions
    times: np.ndarray  # (T,)
    delta: np.ndarray  # (T, nf)
    se: np.ndarray  # (T, nf)
    paths: int

    def minus(self, other: Measurement) -> Measurement:
        """The difference of two measurements against the same reference: the gap between two runs."""
        return replace(self, delta=self.delta - other.delta, se=np.hypot(self.se, other.se))

    def worst(self) -> list[tuple[str, float, float]]:
        """(function, max over times of |error|, standard error there)."""
        k = np.abs(self.delta).argmax(0)
        columns = range(len(self.names))
        return [(self.names[j], float(abs(self.delta[k[j], j])), float(self.se[k[j], j])) for j in columns]


@dataclass(frozen=True)
class Fit:
    """log error = slope log x + constant, by weighted least squares; interval at 95%."""

    slope: float
    interval: tuple[float, float]
    points: int
    resolved: bool  # at least three points rose above the noise


def fit(x: ArrayLike, error: ArrayLike, se: ArrayLike, *, threshold: float = 4.0, floor: float = 0.02) -> Fit:
    """The order of an error: its slope on log-log axes over the points that rise above the noise.

    Args:
        threshold: points with error < threshold * se are left out ("the noise wins").
        floor: added to the relative errors, for the curvature that higher orders leave.
    """
    x, error, se = (np.asarray(a, float) for a in (x, error, se))
    keep = error > np.maximum(threshold * se, 1e-13)
    n = int(keep.sum())
    if n < 3:
        return Fit(math.nan, (math.nan, math.nan), n, False)
    a, b = np.log(x[keep]), np.log(error[keep])
    relative = np.hypot(se[keep] / error[keep], floor)
    line, cov = np.polyfit(a, b, 1, w=1 / relative, cov="unscaled")
    chi2 = float((((b - np.polyval(line, a)) / relative) ** 2).sum()) / (n - 2)
    half = 1.96 * math.sqrt(max(chi2, 1.0) * cov[0, 0])
    if chi2 < 1:  # few points: their scatter, by Student's t, where that is wider
        half = max(half, float(stats.t.ppf(0.975, n - 2)) * math.sqrt(chi2 * cov[0, 0]))
    slope = float(line[0])
    return Fit(slope, (slope - half, slope + half), n, True)


def ratio(a: float, se_a: float, b: float, se_b: float, z: float = 1.96) -> tuple[float, float]:
    """Fieller's interval for a/b >= 0: (a - r b)^2 <= z^2 (se_a^2 + r^2 se_b^2); open above where b may be 0.

    >>> ratio(1.0, 0.0, 0.5, 0.0)
    (2.0, 2.0)
    >>> ratio(1.0, 0.0, 0.1, 0.1)[1]
    inf
    """
    A, B, C = b * b - (z * se_b) ** 2, a * b, a * a - (z * se_a) ** 2
    root = math.sqrt(max(0.0, B * B - A * C))
    return max(0.0, C / (B + root)), (B + root) / A if A > 0 else math.inf


@dataclass(frozen=True)
class Row:
    """One measured error. `x` of a figure is eta2, ell or kappa; `arm` names the rule or the control."""

    check: str
    optimizer: str
    noise: str
    arm: str
    eta2: float
    ell: int
    kappa: float
    function: str
    error: float
    standard_error: float

    def json(self) -> dict[str, Any]:
        return {k: _number(v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class Verdict:
    """A measured quantity against the paper's prediction.

    `passed` is None where the noise won (fewer than three points above it). A control must fail the prediction, and
    `passed` says that it did: its whole interval lies outside the tolerance (of a ratio: above the bound).
    """

    check: str
    optimizer: str
    noise: str
    arm: str
    function: str
    quantity: str  # "slope in eta^2", "slope in ell", "ratio to sqrt" ...
    slope: float
    interval: tuple[float, float]
    expected: float
    tolerance: float
    passed: bool | None
    control: bool = False
    x: float | None = None  # where a quantity that is no slope stands on the axis of the figure

    def json(self) -> dict[str, Any]:
        out = {k: _number(v) for k, v in vars(self).items() if k != "passed"}
        return {**out, "interval": [_number(v) for v in self.interval], "pass": self.passed}


def _number(v: Any) -> Any:
    return None if isinstance(v, float) and not math.isfinite(v) else v


@dataclass
class Result:
    """A check's outcome."""

    check: str
    claim: str
    axis: str  # which column of Row is the x of the figure
    conditions: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    fits: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Every verdict that rose above the noise holds, and at least one did."""
        known = [f.passed for f in self.fits if f.passed is not None]
        return bool(known) and all(known)

    def add(
        self, m: Measurement, optimizer: str, noise: str, arm: str, eta2: float, ell: int = 1, kappa: float = 1
    ) -> None:
        self.rows += [Row(self.check, optimizer, noise, arm, eta2, ell, kappa, n, e, s) for n, e, s in m.worst()]

    def series(
        self, optimizer: str, noise: str, arm: str, function: str
    ) -> tuple[list[float], list[float], list[float]]:
        """(x, error, standard error) of one line of the figure."""
        key = (optimizer, noise, arm, function)
        rows = [r for r in self.rows if (r.optimizer, r.noise, r.arm, r.function) == key]
        return [getattr(r, self.axis) for r in rows], [r.error for r in rows], [r.standard_error for r in rows]

    def functions(self, optimizer: str, noise: str, arm: str) -> list[str]:
        rows = [r for r in self.rows if (r.optimizer, r.noise, r.arm) == (optimizer, noise, arm)]
        return list(dict.fromkeys(r.function for r in rows))

    def judge(
        self,
        optimizer: str,
        noise: str,
        arm: str,
        expected: float,
        tolerance: float,
        *,
        only: Iterable[str] | None = None,
        control: bool = False,
        shift: float = 0.0,
        skip_first: int = 0,
    ) -> None:
        """Fit the order of every function (or `only` some) against the axis and record the verdicts."""
        for function in only or self.functions(optimizer, noise, arm):
            x, error, se = (a[skip_first:] for a in self.series(optimizer, noise, arm, function))
            f = fit([a + shift for a in x], error, se)
            passed = abs(f.slope - expected) <= tolerance
            if control:
                passed = f.interval[1] < expected - tolerance or f.interval[0] > expected + tolerance
            name = {"eta2": "eta^2", "ell": "ell", "kappa": "kappa - 1" if shift else "kappa"}[self.axis]
            self.fits.append(
                Verdict(
                    self.check, optimizer, noise, arm, function, f"slope in {name}", f.slope, f.interval, expected,
                    tolerance, passed if f.resolved else None, control,
                )
            )  # fmt: skip

    def json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "claim": self.claim,
            "pass": self.passed,
            "seconds": round(self.seconds, 2),
            "conditions": self.conditions,
            "notes": self.notes,
        }


def show(results: Sequence[Result], console: Any) -> None:
    """Print each check's conditions, its verdicts as a table, and its notes."""
    from rich.table import Table

    for r in results:
        console.rule(f"[bold]{r.check}[/]  {r.claim}")
        for line in r.conditions:
            console.print("  " + line, highlight=False, markup=False)
        table = Table(box=None, pad_edge=False)
        for c in (
            "optimizer",
            "noise",
            "arm",
            "function",
            "quantity",
            "measured",
            "95% interval",
            "expected",
            "verdict",
        ):
            table.add_column(c, justify="right" if c in ("measured", "95% interval", "expected") else "left")
        for f in r.fits:
            bound = ">= " if f.quantity.startswith("ratio to") else ""
            pm = f" ± {f.tolerance:.2g}" if f.tolerance else ""
            verdict = "noise wins" if f.passed is None else "pass" if f.passed else "FAIL"
            if f.control:
                verdict = (
                    "fails, as it must" if f.passed else "noise wins" if f.passed is None else "FAIL: not shown to fail"
                )
            table.add_row(
                f.optimizer, f.noise, f.arm, f.function, f.quantity, f"{f.slope:.3f}",
                f"[{f.interval[0]:.3f}, {f.interval[1]:.3f}]".replace("[", r"\["),
                f"{bound}{f.expected:.4g}{pm}", verdict,
            )  # fmt: skip
        console.print(table)
        for note in r.notes:
            console.print("  note: " + note, highlight=False, markup=False)
        console.print(f"  {r.check}: {'pass' if r.passed else 'FAIL'} in {r.seconds:.1f} s", highlight=False)


def draw(result: Result, path: Path) -> None:
    """The figure of a check as a PNG, 1000 pixels wide: what its verdicts judge, against its axis, log-log.

    Of every arm the functions that were judged: of a rule all, of a control one. Verdicts that have an `x` are drawn
    as points beside their prediction (a line).
    """
    from matplotlib.figure import Figure

    points = [v for v in result.fits if v.x is not None]
    if points:
        panels = list(dict.fromkeys((v.optimizer, v.function.split(",")[0]) for v in points))
    else:
        panels = list(dict.fromkeys((v.optimizer, v.noise) for v in result.fits))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.6 + 2.8 * columns, 3.1 * rows + 1.2), dpi=140, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    entries: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=False):
        xs = _draw_points(ax, points, panel, entries) if points else _draw_errors(ax, result, *panel, entries)
        xs = [x for x in xs if math.log2(x).is_integer()]  # others stand too close for words
        ax.set(xscale="log", yscale="log", xlabel=_AXES[result.axis])
        ax.set_xticks(xs, [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in xs])
        ax.set_title(", ".join(panel), fontsize=11)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.25)
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax in axes[: len(panels) : columns]:
        ax.set_ylabel("ratio to kappa = 1" if points else "error")
    figure.suptitle("\n".join(textwrap.wrap(f"{result.check}: {result.claim}", 15 + 30 * columns)), fontsize=11)
    title = "points: measured, lines: closed form" if points else "one line a test function"
    figure.legend(
        entries.values(), entries.keys(), title=title, loc="outside lower center", ncols=2, fontsize=10,
        title_fontsize=10, frameon=False,
    )  # fmt: skip
    figure.savefig(path)


_AXES = {"eta2": "time of one step", "ell": "ell", "kappa": "kappa"}


def _draw_errors(ax: Any, result: Result, optimizer: str, noise: str, entries: dict[str, Any]) -> list[float]:
    arms = list(dict.fromkeys(v.arm for v in result.fits))
    lines = dict.fromkeys((v.arm, v.function) for v in result.fits if (v.optimizer, v.noise) == (optimizer, noise))
    seen: list[float] = []
    for arm, function in lines:
        x, error, se = result.series(optimizer, noise, arm, function)
        i = arms.index(arm)
        entries[arm] = ax.errorbar(x, error, se, color=f"C{i}", marker="osD^vP*X"[i % 8], ms=4, lw=1)
        seen += x
    return sorted(set(seen))


def _draw_points(ax: Any, verdicts: list[Verdict], panel: tuple[str, str], entries: dict[str, Any]) -> list[float]:
    chosen = [v for v in verdicts if (v.optimizer, v.function.split(",")[0]) == panel]
    for i, name in enumerate(dict.fromkeys(v.function.split(", ")[1] for v in chosen)):
        line = [v for v in chosen if v.function.endswith(", " + name)]
        x = [v.x for v in line]
        ax.plot(x, [v.expected for v in line], color=f"C{i}", lw=1)
        half = [(v.interval[1] - v.interval[0]) / 2 for v in line]
        entries[name] = ax.errorbar(x, [v.slope for v in line], half, color=f"C{i}", marker="o", ms=5, ls="")
    return sorted({v.x for v in chosen if v.x is not None})
