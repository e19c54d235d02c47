"""The fork test's statistics, and `fork_test`, which makes it of a training loop of one's own.

Two limits are told. By tolerance: the batch at which the loss after equal samples is the tolerance worse than that of
kappa = 1. By steps: the batch that needs 20% more steps to that loss than kappa times fewer, so that after 20% more
samples (whole steps, rounded down) its loss is that of kappa = 1 before them. Each is where the mean difference of the
loss, linear in log2 kappa between branches, crosses its bound; its interval is where the two ends of the difference's
95% t-interval (paired, n = repeats) do. (20%: Zhang et al. 2024, 2410.21676, recalled.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from scaling_exps.rules import Hyper

MORE = 1.2  # times the samples, by which a branch may come later to the loss of kappa = 1


class ForkError(ValueError):
    """The run cannot be forked as asked; the message says what is needed."""


@dataclass(frozen=True)
class Difference:
    """Of a branch's loss from that of kappa = 1 at equal samples, in shares of it: mean and 95% t-interval."""

    mean: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        return "within" if self.high <= tolerance else "beyond" if self.low > tolerance else "undecided"


@dataclass(frozen=True)
class Branch:
    """One batch size: losses over repeats, at equal samples and after 20% more, and their differences."""

    kappa: float
    batch: int
    hyper: Hyper | None  # None: of a loop that is not scalerun's
    losses: tuple[float, ...]
    later_losses: tuple[float, ...]
    equal: Difference
    later: Difference


@dataclass(frozen=True)
class Limit:
    """A largest batch. `batch`, `high`: None where no branch is beyond, or surely beyond; `decided`: some is told."""

    batch: float | None
    low: float
    high: float | None
    decided: bool

    def text(self, top: int) -> str:
        if not self.decided:
            return "undecided"
        if self.batch is None and self.low >= top:
            return f"above {top:,}, the largest tried"
        value = f"above {top:,}" if self.batch is None else f"{self.batch:,.0f}"
        return f"{value} [{self.low:,.0f}, {f'above {top:,}' if self.high is None else f'{self.high:,.0f}'}]"


def tabled(losses: dict[float, list[tuple[float, float]]], base: int, hyper: dict[float, Hyper]) -> list[Branch]:
    """By kappa, from the losses of its repeats at equal samples and after 20% more."""
    reference, table = [now for now, _ in losses[1.0]], []
    for k, found in losses.items():
        now, later = zip(*found, strict=True)
        differences = (_difference(x, reference) for x in (now, later))
        table.append(Branch(k, round(k * base), hyper.get(k), now, later, *differences))
    return table


@dataclass(frozen=True)
class Tested:
    """What a fork of somebody's own loop says."""

    branches: tuple[Branch, ...]
    by_tolerance: Limit
    by_steps: Limit


def fork_test(
    make_state: Callable[[int, int], Any],
    step: Callable[[Any], object],
    loss: Callable[[Any], float],
    *,
    base_batch: int,
    batches: Sequence[int],
    samples: int,
    repeats: int = 4,
    tolerance: float = 0.02,
) -> Tested:
    """The fork test of a loop of one's own, with the statistics of `scalerun fork`.

    Args:
        make_state: (batch, repeat) -> the training at the fork: weights as they were, the optimizer moved to this batch
            (`scale`), on a data order of the repeat's own, the same for every batch.
        step: takes one optimizer step of that batch.
        loss: of the training distribution, on samples that no branch trains on.
        base_batch: of the training that is forked.
        batches: to be tried; the base's is added.
        samples: of a branch when it is compared, a multiple of every batch; a fifth more is trained.
        repeats: data orders, >= 2.
        tolerance: of the loss, a share of the base's.

    Raises:
        ForkError: too few repeats, a length that is no multiple of every batch.
    """
    if repeats < 2:
        raise ForkError(f"repeats={repeats} must be >= 2: an interval needs a spread")
    chosen = sorted({*batches, base_batch})
    if bad := [b for b in chosen if b < 1 or samples < 1 or samples % b]:
        raise ForkError(f"samples={samples} must be a multiple of every batch, and is none of {bad}")
    losses: dict[float, list[tuple[float, float]]] = {}
    for batch in chosen:
        for repeat in range(repeats):
            state, done, found = make_state(batch, repeat), 0, []
            for steps in (samples // batch, math.floor(MORE * samples / batch + 1e-9)):
                for _ in range(steps - done):
                    step(state)
                done = steps
                found.append(float(loss(state)))
            losses.setdefault(batch / base_batch, []).append((found[0], found[1]))
    table = tabled(losses, base_batch, {})
    return Tested(tuple(table), limit_of(table, "equal", tolerance), limit_of(table, "later", 0.0))


def _difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    mean_reference = math.fsum(reference) / len(reference)
    differences = [(x - y) / mean_reference for x, y in zip(losses, reference, strict=True)]
    if not any(differences):
        return Difference(0.0, 0.0, 0.0)
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return Difference(math.fsum(differences) / len(differences), float(interval.low), float(interval.high))


def limit_of(table: list[Branch], which: str, tolerance: float) -> Limit:
    (batch, crossed), (low, _), (high, sure) = (
        _crossing(table, which, end, tolerance) for end in ("mean", "high", "low")
    )
    decided = any(getattr(b, which).verdict(tolerance) != "undecided" for b in table if b.kappa > 1)
    return Limit(batch if crossed else None, low, high if sure else None, decided)


def _crossing(table: list[Branch], which: str, end: str, tolerance: float) -> tuple[float, bool]:
    """(batch, whether it crossed): where that end first exceeds the tolerance beyond kappa = 1; else the largest."""
    upward = [b for b in table if b.kappa >= 1]
    for near, far in itertools.pairwise(upward):
        a, z = (getattr(getattr(b, which), end) for b in (near, far))
        if z > tolerance:
            share = (tolerance - a) / (z - a) if z > a else 0.0
            return near.batch * (far.batch / near.batch) ** min(1.0, max(0.0, share)), True
    return float(upward[-1].batch), False
