"""One metric of one arm, judged: two one-sided tests at a margin that was fixed beforehand. See docs/comparison.md.

d_i     metric of the scaled run of seed i minus that of the base run of seed i   units of the metric
n       pairs                                                                     >= 3 for a verdict
m       mean of d_i;  s its standard deviation;  se = s / sqrt(n)
delta   margin: the largest |gap| that still counts as the same run               units of the metric
K       metrics with a margin
q(p)    quantile of `plan.margin`: Student's, wider by n for skewed differences
alpha   5%, or what the look at this n may spend of it

equivalent    |m| + q(1 - alpha) se < delta        for every metric    (intersection-union: no correction)
different     |m| - q(1 - alpha/K) se > delta      for some metric     (Bonferroni over the metrics)
inconclusive  neither
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats would take longer to import than the whole table

from scaling_exps.plan.margin import ALPHA, ENOUGH, POWER, SKEW, quantile

MAX_SEEDS = 1000  # search limit
_SEEDS = np.arange(ENOUGH, MAX_SEEDS + 1)
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
    """One metric of one arm against the base. The interval has level 1 - 2 alpha: 90%, more at one of several looks."""

    metric: str
    n: int
    difference: float
    sd: float
    low: float
    high: float
    margin: float | None
    verdict: str
    seeds_needed: int | None  # None: decided, cannot be judged, or more than MAX_SEEDS
    alpha: float = ALPHA

    __test__ = False  # not pytest's


def judge(
    metric: str, differences: Iterable[float], margin: float | None, family: int = 1, alpha: float = ALPHA
) -> Test:
    """Test paired differences against a margin.

    Args:
        metric: its name, for the record.
        differences: one for each seed, in the metric's unit; those that are not finite are left out.
        margin: > 0 in the same unit, or None: then there is an interval and no verdict.
        family: K, the number of metrics that are judged together.
        alpha: of this look.

    >>> judge("train_loss", [0.01, -0.01, 0.0, 0.01], 0.05).verdict
    'equivalent'
    >>> judge("train_loss", [0.21, 0.19, 0.2, 0.21], 0.05).verdict
    'different'
    >>> judge("train_loss", [0.01, -0.01], 0.05).verdict
    'too few seeds'
    """
    d = [x for x in differences if math.isfinite(x)]
    n, (mean, sd) = len(d), mean_sd(d)
    verdict = decide(n, mean, sd, margin, family, alpha)
    reach = quantile(1 - alpha, n) * sd / math.sqrt(max(n, 1))
    more = margin is not None and n > 1 and verdict in ("inconclusive", "too few seeds")
    needed = seeds_needed(mean, sd, margin, family, alpha) if more and margin else None
    return Test(metric, n, mean, sd, mean - reach, mean + reach, margin, verdict, needed, alpha)


def decide(n: int, mean: float, sd: float, margin: float | None, family: int = 1, alpha: float = ALPHA) -> str:
    """The verdict on n differences of this mean and standard deviation; see the module's head."""
    se = sd / math.sqrt(max(n, 1))
    if n == 0:
        return "no result"
    if margin is None:
        return "no margin"
    if n < ENOUGH:
        return "too few seeds"
    if abs(mean) + quantile(1 - alpha, n) * se < margin:
        return "equivalent"
    return "different" if abs(mean) - quantile(1 - alpha / family, n) * se > margin else "inconclusive"


def seeds_needed(gap: float, sd: float, margin: float, family: int = 1, alpha: float = ALPHA) -> int | None:
    """The fewest seeds with which the test decides with probability 0.8, were `gap` and `sd` the true ones.

    A shifted t distribution stands for the noncentral one. None: more than 1,000.

    >>> seeds_needed(0.0, 0.05, 0.05)
    14
    """
    n = _SEEDS
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.maximum(sd / np.sqrt(n), 1e-300)
        if abs(gap) < margin:
            q = _quantiles(1 - alpha)
            chance = stdtr(n - 1, (margin - gap) / se - q) + stdtr(n - 1, (margin + gap) / se - q) - 1
        else:
            chance = stdtr(n - 1, (abs(gap) - margin) / se - _quantiles(1 - alpha / family))
    good = np.flatnonzero(chance >= POWER)
    return int(n[good[0]]) if len(good) else None


@cache
def _quantiles(p: float) -> np.ndarray:
    """`quantile` at every number of seeds that is searched."""
    return np.asarray((1 + SKEW / np.sqrt(_SEEDS)) * stdtrit(_SEEDS - 1, p))


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


def mean_sd(values: list[float]) -> tuple[float, float]:
    v = [x for x in values if math.isfinite(x)]
    if not v:
        return math.nan, math.nan
    mean = math.fsum(v) / len(v)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in v) / (len(v) - 1)) if len(v) > 1 else math.nan
