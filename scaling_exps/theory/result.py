"""What a check hands back, and how it is shown: rows, fits, a table, a figure, one JSON object."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_exps.theory.weak import Measurement
from scaling_exps.theory.weak import fit as fit_order


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

    `passed` is None where the noise won (fewer than three points above it). For a control, which must fail
    the prediction, `passed` says that it did fail.
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
            f = fit_order([a + shift for a in x], error, se)
            inside = abs(f.slope - expected) <= tolerance
            passed = None if not f.resolved else bool(inside) is not control
            name = {"eta2": "eta^2", "ell": "ell", "kappa": "kappa - 1" if shift else "kappa"}[self.axis]
            self.fits.append(
                Verdict(
                    self.check, optimizer, noise, arm, function, f"slope in {name}", f.slope, f.interval, expected,
                    tolerance, passed, control,
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
                verdict = "fails, as it must" if f.passed else "noise wins" if f.passed is None else "FAIL: it holds"
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
    """The figure of a check: error against the axis on log-log scales, one panel an optimizer and noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r.optimizer, r.noise) for r in result.rows))
    arms = list(dict.fromkeys(r.arm for r in result.rows))
    single = len(arms) == 1
    fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained")
    for ax, (optimizer, noise) in zip(axes[0], panels, strict=True):
        for i, arm in enumerate(arms):
            for j, function in enumerate(result.functions(optimizer, noise, arm)):
                x, e, s = result.series(optimizer, noise, arm, function)
                color = f"C{(j if single else i) % 10}"
                label = function if single else arm if j == 0 else None
                ax.errorbar(x, e, s, color=color, label=label, lw=0.9, ms=3, marker="o" if i < 10 else "s", alpha=0.8)
        ax.set(xscale="log", yscale="log", xlabel=result.axis, title=f"{optimizer}, {noise}")
        ax.legend(fontsize=6, ncols=2)
    axes[0][0].set_ylabel("error")
    fig.suptitle(f"{result.check}: {result.claim}", fontsize=8)
    fig.savefig(path, dpi=90)
    plt.close(fig)
