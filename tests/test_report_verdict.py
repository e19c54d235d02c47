"""The verdict: calibrated on simulated seeds, and what it refuses to say."""

from __future__ import annotations

import math
import random

import pytest

from scaling_exps.plan.margin import ALPHA, SKEW, rounded, smallest, spent
from scaling_exps.report.judge import conclude, judge, seeds_needed
from scripts import calibration


def shares(gap: float, n: int, metrics: int, repeats: int, sd: float = 0.5) -> dict[str, float]:
    """How often each verdict falls, margin 1, true gap `gap` in every metric. Fixed seed: the same numbers always."""
    rng = random.Random(f"{gap} {n} {metrics}")
    count: dict[str, int] = {}
    for _ in range(repeats):
        tests = [judge("m", [gap + rng.gauss(0, sd) for _ in range(n)], 1.0, metrics) for _ in range(metrics)]
        said = conclude(tests)[0]
        count[said] = count.get(said, 0) + 1
    return {k: v / repeats for k, v in count.items()}


# The true error rates are <= 5%; 3,000 repeats have a binomial standard error of 0.4%, so 6.5% is 3.8 of them above.
@pytest.mark.parametrize("metrics", [1, 4])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_false_verdicts_are_at_most_five_percent(n: int, metrics: int) -> None:
    """Fails if a two-sided quantile, the wrong degrees of freedom or sd for standard error were used, or if `different`
    were tested against zero instead of the margin, or without Bonferroni (4 metrics: 16%)."""
    repeats = 3000 if metrics == 1 else 1500
    limit = 0.05 + 3.8 * math.sqrt(0.05 * 0.95 / repeats)
    none, at, beyond = (shares(gap, n, metrics, repeats) for gap in (0.0, 1.0, 2.0))
    assert none.get("different", 0) <= limit
    assert at.get("different", 0) <= limit
    assert at.get("equivalent", 0) <= limit
    assert beyond.get("equivalent", 0) <= limit


def test_power() -> None:
    """With 10 seeds and a spread of half the margin, what is equal is found equal, and twice the margin is told apart.
    Fails if the test were so strict that it never decides. Expected > 0.99 each (docs/comparison.md)."""
    assert shares(0.0, 10, 1, 500)["equivalent"] > 0.97
    assert shares(2.0, 10, 1, 500)["different"] > 0.97


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.6])
def test_the_seeds_named_do_decide(gap: float) -> None:
    """The number promised has power 0.8. Simulated with that number: 800 repeats have se 1.4%; the shifted t that
    stands for the noncentral one is off by a few percent more. Fails if sd and se, or margin - gap and margin, were
    confused."""
    n = seeds_needed(gap, 0.5, 1.0)
    assert n is not None
    right = "equivalent" if gap < 1 else "different"
    assert 0.72 < shares(gap, n, 1, 800)[right] < 0.97  # n is whole: small ones overshoot


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_seeds_are_never_a_verdict(n: int) -> None:
    """Fails if the threshold moved: two equal differences have no spread and would be `equivalent` at once."""
    test = judge("train_loss", [0.0] * n, 0.1)
    assert test.verdict in ("too few seeds", "no result")
    assert conclude([test])[0] in ("too few seeds", "no result")


def test_three_equal_differences_are_enough() -> None:
    assert judge("train_loss", [0.0] * 3, 0.1).verdict == "equivalent"
    assert judge("train_loss", [-0.3] * 3, 0.1).verdict == "different"  # the sign does not matter


def test_not_a_number_is_left_out_and_rules_out_equivalent() -> None:
    """Fails if NaN poisoned the mean, or if a diverged seed were simply forgotten (survivors look equivalent)."""
    test = judge("train_loss", [0.01, math.nan, 0.0, -0.01], 0.1)
    assert (test.n, test.verdict) == (3, "equivalent")
    assert conclude([test])[0] == "equivalent"
    assert conclude([test], failed=1)[0] == "inconclusive"


def test_without_margin_nothing_is_judged() -> None:
    test = judge("train_loss", [0.01, 0.0, -0.01], None)
    assert test.verdict == "no margin" and math.isfinite(test.low)
    assert conclude([test]) == ("no margin", None)


def test_one_metric_apart_is_enough_and_all_must_be_within() -> None:
    """Fails if `conclude` took a majority."""
    near, far = judge("a", [0.0, 0.01, -0.01], 0.1, 2), judge("b", [2.0, 2.01, 1.99], 0.1, 2)
    unsure = judge("c", [0.0, 0.2, -0.2], 0.1, 2)
    assert conclude([near, near])[0] == "equivalent"
    assert conclude([near, far])[0] == "different"
    said, seeds = conclude([near, unsure])
    assert said == "inconclusive" and seeds == unsure.seeds_needed and seeds is not None


def test_the_interval_is_students_widened() -> None:
    """t(0.95, 2) = 2.919986 (tables). d = 1, 2, 3: mean 2, se = 1/sqrt(3). Fails with a normal quantile (1.645)."""
    test, wider = judge("m", [1.0, 2.0, 3.0], 10.0), 1 + SKEW / math.sqrt(3)
    assert test.high - test.difference == pytest.approx(wider * 2.919986 / math.sqrt(3), rel=1e-6)
    assert ALPHA == 0.05


# 1,000 studies at a true rate of 5% have a standard error of 0.69%; 7.6% is 3.8 of them above it.
LIMIT = 0.076


@pytest.mark.parametrize("name", [n for n in calibration.SHAPES if "2" not in n])
def test_false_verdicts_of_skewed_differences_and_declared_looks(name: str) -> None:
    """1,000 studies a case, by scripts/calibration.py. Fails with Student's quantile (9-10% at skewness 1), or if each
    look were tested at the whole 5%."""
    for looks in ((3,), (5,), (3, 6, 10)):
        assert max(calibration.rates(calibration.SHAPES[name], looks, 1000)) <= LIMIT, looks
    assert calibration.rates(calibration.SHAPES[name], (5,), 1000, sd=4.0)[1] <= LIMIT


def test_looks_that_are_not_declared_inflate() -> None:
    """What the report says of them; fails if the correction changed nothing."""
    draw = calibration.SHAPES["skewness 1 (gamma 4)"]
    open_, declared = (calibration.rates(draw, (3, 6, 10), 1000, declared=d)[0] for d in (False, True))
    assert 0.06 < open_ < 0.14 and declared < 0.06


def test_a_look_spends_its_share() -> None:
    looks = (3, 5, 10)
    assert sum(spent(looks, n) or 0 for n in looks) == pytest.approx(ALPHA)
    assert spent(looks, 2) is None and spent(looks, 7) == spent(looks, 5) and spent((), 4) == ALPHA


def test_a_proposed_margin_is_decided() -> None:
    """By the true spread, power 0.8 at gap 0 for a single metric: the formula's own promise, before rounding. Fails if
    √2 were left out, or sd and standard error confused."""
    rng = random.Random(5)
    margin = smallest(1.0, 5)
    said = [judge("m", [rng.gauss(0, math.sqrt(2)) for _ in range(5)], margin).verdict for _ in range(1000)]
    assert 0.75 < said.count("equivalent") / 1000 < 0.92
    assert [rounded(x) for x in (0.0011, 0.002, 0.0021, 0.7, 30)] == [0.002, 0.002, 0.005, 1.0, 50.0]
