"""What the base runs' noise predicts of an arm, beside what was measured: the displacement |θ_T − θ_0| over the base's.

The prediction is that of the square-root rule (`noise.validity`), so it stands beside rules under test alone; what
was measured stands beside every arm whose runs, and their base runs, recorded their displacement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling_exps.noise import validity
from scaling_exps.plan import Arm, RunSpec
from scaling_exps.plan.margin import ALPHA, quantile
from scaling_exps.report.judge import mean_sd
from scaling_exps.report.runs import Run

if TYPE_CHECKING:
    from scaling_exps.report.verdict import Row

FEW = 5  # arms; below, no rank correlation is told


@dataclass(frozen=True)
class Change:
    """Displacement of an arm over its base's: mean over n seeds, and its 90% interval (nan for one seed)."""

    value: float
    low: float
    high: float
    n: int


def predicted(spec: RunSpec, arm: Arm, bases: Iterable[Run]) -> validity.Validity | None:
    """From the noise records of all base runs together; None: they say nothing, or the arm is not the formula's."""
    if not validity.predicts(spec, arm):
        return None
    return validity.along(spec, [row for run in bases for row in run.noise])


def measured(pairs: Iterable[tuple[Run, Run]]) -> Change | None:
    """From pairs of (arm, base) of one seed."""
    ends = [(a.metrics.get("displacement", math.nan), b.metrics.get("displacement", math.nan)) for a, b in pairs]
    ratios = [a / b for a, b in ends if b > 0 and math.isfinite(a)]
    if not ratios:
        return None
    n, (mean, sd) = len(ratios), mean_sd(ratios)
    reach = quantile(1 - ALPHA, n) * sd / math.sqrt(n)
    return Change(mean, mean - reach, mean + reach, n)


def both(row: Row) -> tuple[str, ...]:
    """Predicted and measured change of the displacement, as text; what is not known is a dash."""
    p, m = row.predicted, row.measured
    return (
        validity.change_text(p.deviation, p.low, p.high) if p else "–",
        validity.change_text(m.value, m.low, m.high) if m else "–",
    )


def sentence(row: Row) -> str:
    """The row's two numbers in words; empty where there is none."""
    if row.predicted is None and row.measured is None:
        return ""
    expected, found = both(row)
    told = (
        f"predicted {expected} from the noise (95%, ordinal)" if row.predicted else "no prediction (no noise records)"
    )
    return f"displacement against the base's: {told}, measured {found if row.measured else 'not (older runs)'}"


def compared(rows: Iterable[Row]) -> list[Row]:
    """The arms that have both, of which the calibration is made."""
    return [r for r in rows if r.predicted and r.measured and r.kappa != 1]


def calibration(rows: list[Row]) -> list[str]:
    """One line on how far the prediction can be trusted, over all arms that have both numbers."""
    arms = [(r.predicted, r.measured) for r in compared(rows)]
    if not arms:
        return []
    x, y = [1 - p.deviation for p, _ in arms if p], [1 - m.value for _, m in arms if m]
    inside = sum(p.low <= m.high and m.low <= p.high for p, m in arms if p and m)
    many = len({r.setting for r in compared(rows)})
    head = f"prediction of the displacement over {len(arms)} arm(s) of {many} setting(s): "
    head += f"the intervals meet in {inside}"
    if total := math.fsum(abs(v) for v in x):
        head += f", measured shrinkage is {math.fsum(y) / total:.2f} of the predicted"
    if len(arms) < FEW:
        return [f"{head}; {FEW} arms or more tell a rank correlation. Until then it is ordinal: it orders batches"]
    rho = spearman(x, y)
    z, se = math.atanh(max(-0.999999, min(0.999999, rho))), math.sqrt(1.06 / (len(arms) - 3))
    low, high = math.tanh(z - 1.96 * se), math.tanh(z + 1.96 * se)
    if low <= 0:
        words = "it is not shown to order arms"
    elif inside >= 0.8 * len(arms):
        words = "it orders arms, and its size fits most of them"
    else:
        words = "ordinal: it orders arms, and its size is not to be trusted"
    return [f"{head}, rank correlation {rho:.2f} [{low:.2f}, {high:.2f}] (Spearman, 95%): {words}"]


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation, ties at their mean rank.

    >>> spearman([1, 2, 3], [2, 4, 9]), spearman([1, 2, 3], [3, 2, 1])
    (1.0, -1.0)
    """
    a, b = _ranks(x), _ranks(y)
    middle = (len(x) + 1) / 2
    cross = math.fsum((i - middle) * (j - middle) for i, j in zip(a, b, strict=True))
    spread = math.fsum((i - middle) ** 2 for i in a) * math.fsum((j - middle) ** 2 for j in b)
    return cross / math.sqrt(spread) if spread else 0.0


def _ranks(values: list[float]) -> list[float]:
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
