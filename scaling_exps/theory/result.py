"""What is measured, what is fitted to it, and what a check hands back: rows, verdicts, a table, a figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
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
        at = np.abs(self.delta).argmax(0), np.arange(len(self.names))
        return list(zip(self.names, np.abs(self.delta[at]).tolist(), self.se[at].tolist(), strict=True))


@dataclass(frozen=True)
class Fit:
    """log error = slope log x + constant, by weighted least squares; interval at 95%."""

    slope: float
    interval: tuple[float, float]
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
        return Fit(math.nan, (math.nan, math.nan), False)
    a, b = np.log(x[keep]), np.log(error[keep])
    relative = np.hypot(se[keep] / error[keep], floor)
    line, cov = np.polyfit(a, b, 1, w=1 / relative, cov="unscaled")
    chi2 = float((((b - np.polyval(line, a)) / relative) ** 2).sum()) / (n - 2)
    half = 1.96 * math.sqrt(max(chi2, 1.0) * cov[0, 0])
    if chi2 < 1:  # few points: their scatter, by Student's t, where that is wider
        half = max(half, float(stats.t.ppf(0.975, n - 2)) * math.sqrt(chi2 * cov[0, 0]))
    slope = float(line[0])
    return Fit(slope, (slope - half, slope + half), True)


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
    control: bool = False
    x: float | None = None  # where a quantity that is no slope stands on the axis of the figure
    passed: bool | None = None


FEW = 3  # lines of an arm in a panel; more are a band
_AXES = {"eta2": "time of one step", "ell": "ell", "kappa": "kappa"}
_OUTCOMES = {  # of (control, passed)
    (False, True): "pass",
    (False, False): "FAIL",
    (True, True): "fails, as it must",
    (True, False): "FAIL: not shown to fail",
}


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

    def series(self, optimizer: str, noise: str, arm: str) -> dict[str, np.ndarray]:
        """The lines of the figure: function -> (3, n) of x, error, standard error."""
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for r in self.rows:
            if (r.optimizer, r.noise, r.arm) == (optimizer, noise, arm):
                lines.setdefault(r.function, []).append((getattr(r, self.axis), r.error, r.standard_error))
        return {function: np.array(points, float).T for function, points in lines.items()}

    def judge(
        self, optimizer: str, noise: str, arm: str, expected: float, tolerance: float, *,
        only: Iterable[str] | None = None, control: bool = False, shift: float = 0.0, skip_first: int = 0,
    ) -> None:  # fmt: skip
        """Fit the order of every function (or `only` some) against the axis and record the verdicts."""
        lines = self.series(optimizer, noise, arm)
        name = {"eta2": "eta^2", "ell": "ell", "kappa": "kappa - 1" if shift else "kappa"}[self.axis]
        for function in only or lines:
            x, error, se = lines[function][:, skip_first:] if function in lines else np.empty((3, 0))
            f = fit(x + shift, error, se)
            if control:
                passed = f.interval[1] < expected - tolerance or f.interval[0] > expected + tolerance
            else:
                passed = abs(f.slope - expected) <= tolerance
            self.fits.append(
                Verdict(
                    self.check, optimizer, noise, arm, function, f"slope in {name}", f.slope, f.interval, expected,
                    tolerance, control, passed=passed if f.resolved else None,
                )
            )  # fmt: skip


def show(r: Result, console: Any) -> None:
    """Print a check's conditions, its verdicts as a table, and its notes."""
    from rich.markup import escape
    from rich.table import Table

    console.rule(f"[bold]{r.check}[/]  {r.claim}")
    for line in r.conditions:
        console.print("  " + line, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for c in ("optimizer", "noise", "arm", "function", "quantity", "measured", "95% interval", "expected", "verdict"):
        table.add_column(c, justify="right" if c in ("measured", "95% interval", "expected") else "left")
    for f in r.fits:
        bound = ">= " if f.quantity.startswith("ratio to") else ""
        pm = f" ± {f.tolerance:.2g}" if f.tolerance else ""
        table.add_row(
            f.optimizer, f.noise, f.arm, f.function, f.quantity, f"{f.slope:.3f}",
            escape(f"[{f.interval[0]:.3f}, {f.interval[1]:.3f}]"), f"{bound}{f.expected:.4g}{pm}",
            "noise wins" if f.passed is None else _OUTCOMES[f.control, f.passed],
        )  # fmt: skip
    console.print(table)
    for note in r.notes:
        console.print("  note: " + note, highlight=False, markup=False)
    console.print(f"  {r.check}: {'pass' if r.passed else 'FAIL'} in {r.seconds:.1f} s", highlight=False)


def draw(result: Result, path: Path) -> None:
    """The figure of a check as a PNG, 1000 pixels wide: what its verdicts judge, against its axis, log-log.

    Of every arm the functions that were judged: of a rule all, of a control one. More than three lie in a band, whose
    upper edge is the line. Where verdicts have an `x`, these are drawn as points beside their prediction (a line), a
    panel for what stands before the comma of their function.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    points = any(v.x is not None for v in result.fits)
    judged = [  # panel, entry of the legend, verdict
        ((v.optimizer, v.function.split(", ")[0]), v.function.split(", ")[1], v)
        if points
        else ((v.optimizer, v.noise), v.arm, v)
        for v in result.fits
        if not points or v.x is not None
    ]
    panels = list(dict.fromkeys(panel for panel, _, _ in judged))
    names = list(dict.fromkeys(name for _, name, _ in judged))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.6 + 2.8 * columns, 3.1 * rows + 1.2), dpi=140, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    entries: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=False):
        seen: set[float] = set()
        for name in dict.fromkeys(n for p, n, _ in judged if p == panel):
            i, functions = names.index(name), dict.fromkeys(v.function for p, n, v in judged if (p, n) == (panel, name))
            style = {"color": f"C{i}", "marker": "osD^vP*X"[i % 8], "ms": 4, "lw": 1}
            if points:
                line = [v for _, _, v in judged if v.function in functions]
                x, y = [v.x or math.nan for v in line], [v.slope for v in line]
                se = [(v.interval[1] - v.interval[0]) / 2 for v in line]
                ax.plot(x, [v.expected for v in line], color=f"C{i}", lw=1)
                entries[name] = ax.errorbar(x, y, se, color=f"C{i}", marker="o", ms=5, ls="")
                seen.update(x)
                continue
            series = [result.series(*panel, name)[function] for function in functions]
            seen.update(series[0][0])
            if len(series) > FEW:
                errors = np.array([y for _, y, _ in series])
                ax.fill_between(series[0][0], errors.min(0), errors.max(0), color=f"C{i}", alpha=0.2, lw=0)
                entries[f"{name} (largest; band: all)"] = ax.plot(series[0][0], errors.max(0), **style)[0]
                continue
            for x, y, se in series:
                entries[name] = ax.errorbar(x, y, se, **style)
        xs = [x for x in sorted(seen) if math.log2(x).is_integer()]  # others stand too close for words
        ax.set(xscale="log", yscale="log", xlabel=_AXES[result.axis])
        ax.set_xticks(xs, [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in xs])
        ax.set_title(", ".join(panel), fontsize=11)
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5) if _decades(ax) < 3 else (1,)))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        ax.grid(alpha=0.25)
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax in axes[: len(panels) : columns]:
        ax.set_ylabel("ratio to kappa = 1" if points else "error")
    figure.suptitle("\n".join(textwrap.wrap(f"{result.check}: {result.claim}", 15 + 30 * columns)), fontsize=11)
    several = any(v.function != judged[0][2].function for _, n, v in judged if n == judged[0][1])
    title = "points: measured, lines: closed form" if points else "error of test functions" if several else None
    figure.legend(
        entries.values(), entries.keys(), title=title, loc="outside lower center", ncols=2, fontsize=10,
        title_fontsize=10, frameon=False,
    )  # fmt: skip
    figure.savefig(path)


def _decades(axis: Any) -> float:
    low, high = axis.get_ylim()
    return math.log10(high / low)
