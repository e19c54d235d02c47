"""How sure n seeds make one: the quantile of the report's tests, what each look may spend, the margin to propose.

    q(p, n) = t(p, n-1) (1 + 1/√n)

t(p, n-1) is Student's quantile, right for normal differences. The factor keeps the error at 5% for differences of a
skewness up to 1 (without it 9% at n = 3 to 10); measured rates, those beyond included, are in docs/comparison.md.
"""

from __future__ import annotations

import math
from functools import cache

ALPHA = 0.05
POWER = 0.8  # with which a named number of seeds, or a proposed margin, decides
ENOUGH = 3  # seeds; below, no verdict
SKEW = 1.0
MOST = 1000  # seeds that a search goes to


@cache
def quantile(p: float, n: int) -> float:
    """q(p, n) above; nan for n < 2.

    >>> round(quantile(0.95, 3), 3), round(quantile(0.95, 10), 3), round(quantile(0.95, 1000), 3)
    (4.606, 2.413, 1.698)
    """
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, p)) * (1 + SKEW / math.sqrt(n)) if n > 1 else math.nan


def spent(looks: tuple[int, ...], n: int) -> float | None:
    """The share of ALPHA that the look at n seeds may spend; None before the first look.

    Alpha is spent linearly in n, each look tested at its own increment: the errors of the looks add up to ALPHA at
    most, whatever the dependence between them. Without declared looks there is one, at the end.

    >>> spent((), 5), spent((5, 10), 5), spent((5, 10), 10), spent((5, 10), 3)
    (0.05, 0.025, 0.025, None)
    """
    if not looks:
        return ALPHA
    reached = [k for k in looks if k <= n]
    return ALPHA * (reached[-1] - (reached[-2] if len(reached) > 1 else 0)) / looks[-1] if reached else None


def smallest(sd: float, n: int, family: int = 1, alpha: float = ALPHA) -> float:
    """The smallest margin that n seeds decide with power 0.8 where the true gap is 0.

        m = s√2 · (q(1 - α/K, n) + t(0.9, n-1)) / √n

    Args:
        sd: s, of the base runs over seeds; a difference of two runs has s√2, and less where the seed is shared.
        n: seeds that are planned.
        family: K, the metrics with a margin.

    >>> round(smallest(0.002, 5, 2), 5)
    0.00702
    """
    from scipy.special import stdtrit

    return sd * math.sqrt(2 / n) * (quantile(1 - alpha / family, n) + float(stdtrit(n - 1, 0.5 + POWER / 2)))


def seeds_for(sd: float, margin: float, family: int = 1, alpha: float = ALPHA) -> int:
    """The fewest seeds, from 3, that decide such a margin with power 0.8; see `smallest`.

    >>> seeds_for(0.002, 0.00702, 2), seeds_for(0.002, 0.00351, 2)
    (6, 12)
    """
    n = ENOUGH
    while smallest(sd, n, family, alpha) > margin and n < MOST:
        n += 1
    return n


def rounded(margin: float) -> float:
    """Up to 1, 2 or 5 times a power of ten.

    >>> rounded(0.00682), rounded(0.2), rounded(0.021)
    (0.01, 0.2, 0.05)
    """
    power = 10.0 ** math.floor(math.log10(margin))
    step = next(k for k in (1, 2, 5, 10) if k * power >= margin * (1 - 1e-9))
    return float(f"{step * power:.12g}")
