"""The rule's values, and the laws that every rule keeps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_exps.rules import RULES, Hyper, RuleError, continuous_time, find, svag, svag_weights

BASE = Hyper(1e-3, (0.999, 0.9999), 1e-8, 1e-4)
names = st.sampled_from(sorted(RULES))
kappas = st.floats(1 / 64, 64)


def close(a: Hyper, b: Hyper) -> bool:
    pairs = zip((a.lr, *a.betas, a.eps, a.weight_decay), (b.lr, *b.betas, b.eps, b.weight_decay), strict=True)
    return all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-13) for x, y in pairs)


# Definition 5.2 by hand at kappa = 4: (rule, lr, 1 - betas, eps)
BY_HAND = [
    ("sqrt", 2e-3, (4e-3, 4e-4), 5e-9),
    ("linear", 4e-3, (1e-3, 1e-4), 1e-8),
    ("lr_only", 2e-3, (1e-3, 1e-4), 1e-8),
    ("none", 1e-3, (1e-3, 1e-4), 1e-8),
    ("sqrt_without_betas", 2e-3, (1e-3, 1e-4), 5e-9),
    ("sqrt_without_eps", 2e-3, (4e-3, 4e-4), 1e-8),
    ("linear_scaled", 4e-3, (4e-3, 4e-4), 5e-9),
]


@pytest.mark.parametrize(("name", "lr", "one_minus_betas", "eps"), BY_HAND)
def test_values_by_hand(name: str, lr: float, one_minus_betas: tuple[float, float], eps: float) -> None:
    assert close(RULES[name].scale(BASE, 4), Hyper(lr, tuple(1 - x for x in one_minus_betas), eps, 1e-4))


@given(names)
def test_kappa_one_is_exactly_the_identity(name: str) -> None:
    assert RULES[name].scale(BASE, 1) == BASE


@given(names, st.floats(1 / 16, 16), st.floats(1 / 16, 16))
def test_rules_compose(name: str, first: float, second: float) -> None:
    rule = RULES[name]
    assert close(rule.scale(rule.scale(BASE, first), second), rule.scale(BASE, first * second))


@given(names, kappas)
def test_scaling_back_is_the_inverse(name: str, kappa: float) -> None:
    rule = RULES[name]
    assert close(rule.scale(rule.scale(BASE, kappa), 1 / kappa), BASE)


@given(kappas)
def test_sqrt_keeps_the_sdes_constants(kappa: float) -> None:
    """sigma0 = sigma eta, eps0 = eps eta, c_i = (1 - beta_i)/eta^2 (section 4), with sigma -> sigma/sqrt(kappa)."""
    new = RULES["sqrt"].scale(BASE, kappa)
    assert math.isclose(new.lr / math.sqrt(kappa), BASE.lr, rel_tol=1e-9)
    assert math.isclose(new.eps * new.lr, BASE.eps * BASE.lr, rel_tol=1e-9)
    for a, b in zip(new.betas, BASE.betas, strict=True):
        assert math.isclose((1 - a) / new.lr**2, (1 - b) / BASE.lr**2, rel_tol=1e-7)


def test_over_the_limit_is_refused_with_the_largest_batch() -> None:
    with pytest.raises(RuleError, match=r"kappa < 10 \(batch < 2560\), and kappa is 10"):
        RULES["sqrt"].scale(Hyper(1e-3, (0.9, 0.999), 1e-8, 0), 10, base_batch=256)
    RULES["sqrt"].scale(Hyper(1e-3, (0.9, 0.999), 1e-8, 0), 9.99)  # just below is fine


def test_beta_zero_stays_zero() -> None:
    """RMSprop as Adam with beta1 = 0: scaling 1 - 0 = 1 would give a negative beta."""
    assert RULES["sqrt"].scale(Hyper(1e-3, (0.0, 0.999), 1e-8, 0), 4).betas == (0.0, 0.996)


@pytest.mark.parametrize("kappa", [0, -1, math.nan, math.inf])
def test_impossible_kappa(kappa: float) -> None:
    with pytest.raises(RuleError, match="positive number"):
        RULES["none"].scale(BASE, kappa)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"betas": (1.0,)}, {"eps": -1.0}, {"weight_decay": math.nan}])
def test_impossible_hyperparameters(bad: dict[str, object]) -> None:
    with pytest.raises(RuleError):
        Hyper(**({"lr": 1e-3, "betas": (0.9,), "eps": 1e-8, "weight_decay": 0.0} | bad))  # type: ignore[arg-type]


def test_a_rule_knows_its_optimizers() -> None:
    with pytest.raises(RuleError, match=r"not for sgd.*allowed here: linear, lr_only, none"):
        find("sqrt", "sgd")
    with pytest.raises(RuleError, match="unknown rule 'sqr'"):
        find("sqr", "adaptive")


@pytest.mark.parametrize(("family", "stretch"), [("adaptive", 9), ("sgd", 3)])
def test_svag_is_the_rule_scaled_down(family: str, stretch: int) -> None:
    """Section 6: eta/l, (1-beta)/l^2, eps l, l^2 steps; SGD: eta/l, l steps. Weights: mean 1, covariance x stretch."""
    hyper, steps = svag(BASE, 3, family)  # type: ignore[arg-type]
    assert steps == stretch
    assert math.isclose(hyper.lr, BASE.lr / 3)
    if family == "adaptive":
        assert close(hyper, Hyper(BASE.lr / 3, (1 - 1e-3 / 9, 1 - 1e-4 / 9), 3e-8, 1e-4))
    weights = svag_weights(3, family)  # type: ignore[arg-type]
    assert math.isclose(sum(weights), 1) and math.isclose(sum(r * r for r in weights), stretch)
    t = continuous_time(BASE, 10, family)  # type: ignore[arg-type]
    assert math.isclose(continuous_time(hyper, 10 * stretch, family), t, rel_tol=1e-12)  # type: ignore[arg-type]


def test_svag_one_is_plain_training() -> None:
    assert svag(BASE, 1, "adaptive") == (BASE, 1)
    assert svag_weights(1, "adaptive") == (1.0,)
