"""The paper's predictions, measured small: slopes of weak errors, and that the controls fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scaling_exps import rules
from scaling_exps.theory import checks, weak
from scaling_exps.theory.checks import TIMES
from scaling_exps.theory.oracles import Noise
from scaling_exps.theory.problem import reference
from scaling_exps.theory.result import Result, Row, fit

STEPS = [2.0**-k for k in range(3, 7)]


@pytest.mark.parametrize(
    ("algorithm", "budget"), [pytest.param("rmsprop", 3e7, marks=pytest.mark.slow), ("adam", 3e7), ("sgd", 1e6)]
)
def test_weak_order_1(algorithm, budget):
    """Slope 1 +- 0.15 for every function that rises above the noise, and all but one must rise.

    A gamma, an eps or an old v in the wrong place of the SDE or the optimizer leaves an error of order 0 or 1/2.
    """
    r = Result("weak_order", "", "eta2")
    p = reference(algorithm)
    for step in STEPS:
        m = weak.measure(p, p.discretise(step), TIMES, seed=0, budget=budget)
        r.add(m, algorithm, "gaussian", "paper", step)
    r.judge(algorithm, "gaussian", "paper", 1.0, 0.15)
    assert sum(f.passed is None for f in r.fits) <= 1
    assert not [f for f in r.fits if f.passed is False]


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_svag_converges_like_ell_to_the_minus_2(algorithm):
    """Through `rules.svag` and `rules.svag_weights`: sqrt(2 ell - 1) in the weights does not converge at all."""
    r = Result("svag", "", "ell")
    p = reference(algorithm)
    base = p.discretise(1 / 8)
    for ell in (1, 2, 4):
        r.add(
            weak.measure(p, base.svag(ell), TIMES, seed=0, budget=5e7),
            algorithm,
            "g",
            "svag",
            1 / 8,
            ell,
        )
    r.judge(algorithm, "g", "svag", -2.0, 0.25)
    assert sum(f.passed is None for f in r.fits) <= 1
    assert not [f for f in r.fits if f.passed is False]


def test_svag_without_beta_eps_or_its_weights_does_not_converge():
    p = reference("rmsprop")
    base = p.discretise(1 / 8)
    chain = base.svag(4)
    good = weak.measure(p, chain, TIMES, seed=0, budget=2e7)
    for bad in (
        replace(chain, hyper=replace(chain.hyper, betas=base.hyper.betas)),
        replace(chain, hyper=replace(chain.hyper, eps=base.hyper.eps)),
        replace(chain, weights=rules.svag_weights(4, "sgd")),
    ):
        m = weak.measure(p, bad, TIMES, seed=0, budget=5e6)
        assert max(b / g for (_, b, _), (_, g, _) in zip(m.worst(), good.worst(), strict=True)) > 5


def test_skewness_costs_half_an_order_unless_it_vanishes():
    slopes = {}
    for noise in (Noise("exponential"), Noise("gamma", skew=2 * np.sqrt(8.0))):
        p = checks._skewed(noise)
        errors = [weak.measure(p, p.discretise(s), TIMES, seed=0, budget=6e6).worst()[0] for s in STEPS]
        slopes[noise.law] = fit(STEPS, [e for _, e, _ in errors], [s for _, _, s in errors]).slope
    assert abs(slopes["exponential"] - 0.5) < 0.15
    assert abs(slopes["gamma"] - 1.0) < 0.15


def test_the_rule_keeps_the_law_and_others_do_not():
    r = checks.scaling_rule(seed=0, budget=1e7)
    assert r.passed
    controls = {"linear", "lr_only", "none", "sqrt_without_betas", "sqrt_without_eps", "linear_scaled"}
    assert {f.arm for f in r.fits if f.control} == controls


def test_noise_dominance_closed_form():
    """Displacement sqrt((1+r)/(1+kappa r)) to 0.5% and variance (1+r)/(1+kappa r) to 1.5%, whole intervals: fails if
    the rule's exponent is not 1/2 or v does not see the gradient."""
    assert checks.noise_dominance(seed=3, paths=1 << 15).passed


def test_decoupled_decay_wants_sqrt_kappa():
    """Decay per unit of data is lr lambda / kappa, so lr x sqrt(kappa) asks for lambda x sqrt(kappa)."""
    assert checks.decoupled_decay(seed=1, paths=1 << 12).passed


def test_squares_of_micro_batches_keep_the_law_where_the_gradient_beats_the_noise():
    """v of micro-batch squares has the mean grad^2 + sigma^2 at every batch, so lr x kappa is equal progress on equal
    data; under sqrt v falls with the batch's noise alone. Fails with the square of the mean in v, or with eps moved."""
    r = checks.invariant_adam(seed=1, paths=1 << 11)
    assert r.passed
    assert {(f.noise, f.arm) for f in r.fits if f.control} == {("gradient dominates", "sqrt")}


@pytest.mark.parametrize(("errors", "passed"), [
    ([1.0, 2.0, 4.0, 8.0], True), ([1.0, 0.5, 0.02, 0.01], False), ([1.0, 0.25, 0.0625], False),
])  # fmt: skip
def test_a_control_fails_with_its_whole_interval_or_is_not_shown_to_fail(errors, passed):
    """The prediction is slope -2 +- 0.2. Slope 1 fails it; -2.46 [-3.47, -1.45] is not shown to (on the point estimate
    it was); -2.00 keeps it."""
    r = Result("x", "", "ell")
    r.rows = [Row("x", "a", "g", "wrong", 0.1, 2**k, 1, "f", e, 1e-3 * e) for k, e in enumerate(errors)]
    r.judge("a", "g", "wrong", -2.0, 0.2, control=True)
    assert r.fits[0].passed is passed


@pytest.mark.parametrize(("kept_se", "passed"), [(0.01, True), (0.2, False)])
def test_a_ratio_is_judged_on_its_lower_end(kept_se, passed):
    """0.5 over 0.016: the ratio is 31 either way, but with a denominator of 0.016 +- 0.2 it may be 1 (review: the ratio
    31.7 [0, 155] passed)."""
    r = Result("x", "", "kappa")
    for arm, error, se in (("wrong", 0.5, 0.03), ("sqrt", 0.016, kept_se)):
        r.rows.append(Row("x", "a", "g", arm, 0.1, 1, 16, "f", error, se))
    verdict = checks._ratio(r, "a", "g", "wrong", "sqrt", 16, 3.0)
    assert verdict.passed is passed
    assert verdict.slope > 30


def test_the_integrator_has_its_known_orders():
    r = checks.integrator(seed=1, paths=1 << 15)
    assert not [f for f in r.fits if f.passed is False]
    strong = {f.noise for f in r.fits if f.arm == "strong" and f.passed}
    assert strong == {"geometric", "additive"}
    assert {f.optimizer for f in r.fits if f.noise == "rmsprop" and f.passed} == {"euler", "heun"}


def test_on_the_same_brownian_path_the_general_measurement_agrees_with_the_exact_one():
    p = reference("rmsprop")
    a = weak.paired(p, 1 / 8, np.array([1.0]), paths=1 << 13, seed=0, refine=3)
    b = weak.measure(p, p.discretise(1 / 8), np.array([1.0, 2.0]), seed=0, budget=1e7)
    z = (a.delta[0] - b.delta[0]) / np.hypot(a.se[0], b.se[0])
    rises = a.se[0] < 0.5 * abs(b.delta[0])
    assert (abs(z) < 4.5).all()
    assert rises.sum() >= 5


def test_the_noise_wins_is_said():
    f = fit([1, 2, 4], [1.0, 0.1, 0.01], [0.5, 0.5, 0.5])
    assert not f.resolved
    r = Result("x", "", "eta2")
    r.judge("a", "b", "c", 1.0, 0.1, only=["nothing"])
    assert r.fits[0].passed is None
    assert not r.passed


def test_beyond_the_end_of_the_linear_map():
    """Fails if a beta were moved by another map than said, or if lr were not."""
    r = checks.beta1(seed=1, paths=1 << 9)
    assert len(r.fits) == 8 and all(f.passed for f in r.fits), [f for f in r.fits if not f.passed]


@pytest.mark.slow
def test_a_switch_keeps_the_law_where_the_state_moves():
    """Fails if v, the step count or m were not moved, or if seesaw's rate were divided by another power of kappa."""
    r = checks.ramp(seed=1, paths=1 << 9)
    rows = {(x.noise, x.optimizer, x.arm, x.kappa, x.function): x.error for x in r.rows}
    for (problem, name, arm, kappa, function), error in rows.items():
        if arm == "v left alone" and function == "variance":
            assert error > 0.15, (problem, name, kappa)
        elif arm != "v left alone":
            assert error < 0.015 * kappa**0.5, (problem, name, arm, kappa, function, error)
    assert {name for _, name, *_ in rows} == set(checks.SWITCHED)
