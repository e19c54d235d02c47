"""The paper's predictions, measured small: slopes of weak errors, and that the controls fail."""

from __future__ import annotations

import numpy as np
import pytest

from scaling_exps import rules
from scaling_exps.theory import laws, orders, weak
from scaling_exps.theory.oracles import Noise
from scaling_exps.theory.result import Result

STEPS = [2.0**-k for k in range(3, 7)]


@pytest.mark.parametrize(("algorithm", "budget"), [("rmsprop", 3e7), ("adam", 3e7), ("sgd", 1e6)])
def test_weak_order_1(algorithm, budget):
    """Slope 1 +- 0.15 for every function that rises above the noise, and all but one must rise.

    A gamma, an eps or an old v in the wrong place of the SDE or the optimizer leaves an error of order 0 or 1/2.
    """
    r = Result("weak_order", "", "eta2")
    p = orders.reference(algorithm)
    for step in STEPS:
        m = weak.measure(p, weak.plain_run(p, step), orders.TIMES, seed=0, budget=budget)
        r.add(m, algorithm, "gaussian", "paper", step)
    r.judge(algorithm, "gaussian", "paper", 1.0, 0.15)
    assert sum(f.passed is None for f in r.fits) <= 1
    assert not [f for f in r.fits if f.passed is False]


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_svag_converges_like_ell_to_the_minus_2(algorithm):
    """Through `rules.svag` and `rules.svag_weights`: sqrt(2 ell - 1) in the weights does not converge at all."""
    r = Result("svag", "", "ell")
    p = orders.reference(algorithm)
    base = weak.plain_run(p, 1 / 8)
    for ell in (1, 2, 4):
        r.add(
            weak.measure(p, weak.svag_run(p, base, ell), orders.TIMES, seed=0, budget=5e7),
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
    p = orders.reference("rmsprop")
    base = weak.plain_run(p, 1 / 8)
    run = weak.svag_run(p, base, 4)
    good = weak.measure(p, run, orders.TIMES, seed=0, budget=2e7)
    hyper = run.hyper
    for bad in (
        weak.Run(
            rules.Hyper(hyper.lr, base.hyper.betas, hyper.eps, 0.0), run.sigma, run.unit, run.steps, 0, run.weights
        ),
        weak.Run(
            rules.Hyper(hyper.lr, hyper.betas, base.hyper.eps, 0.0), run.sigma, run.unit, run.steps, 0, run.weights
        ),
        weak.Run(hyper, run.sigma, run.unit, run.steps, 0, rules.svag_weights(4, "sgd")),
    ):
        m = weak.measure(p, bad, orders.TIMES, seed=0, budget=5e6)
        assert max(b / g for (_, b, _), (_, g, _) in zip(m.worst(), good.worst(), strict=True)) > 5


def test_skewness_costs_half_an_order_unless_it_vanishes():
    slopes = {}
    for noise in (Noise("exponential"), Noise("gamma", skew=2 * np.sqrt(8.0))):
        p = orders._skewed(noise)
        errors = [weak.measure(p, weak.plain_run(p, s), orders.TIMES, seed=0, budget=6e6).worst()[0] for s in STEPS]
        slopes[noise.kind] = weak.fit(STEPS, [e for _, e, _ in errors], [s for _, _, s in errors]).slope
    assert abs(slopes["exponential"] - 0.5) < 0.15
    assert abs(slopes["gamma"] - 1.0) < 0.15


def test_the_rule_keeps_the_law_and_others_do_not():
    r = laws.scaling_rule(seed=0, budget=1e7)
    assert r.passed
    controls = {"linear", "lr_only", "none", "sqrt_without_betas", "sqrt_without_eps", "linear_scaled"}
    assert {f.arm for f in r.fits if f.control} == controls


def test_noise_dominance_closed_form():
    assert laws.noise_dominance(seed=3, paths=1 << 15).passed


def test_decoupled_decay_wants_sqrt_kappa():
    assert laws.decoupled_decay(seed=1, paths=1 << 12).passed


def test_the_integrator_has_its_known_orders():
    r = orders.integrator(seed=1, paths=1 << 15)
    assert not [f for f in r.fits if f.passed is False]
    strong = {f.noise for f in r.fits if f.arm == "strong" and f.passed}
    assert strong == {"geometric", "additive"}
    assert {f.optimizer for f in r.fits if f.noise == "rmsprop" and f.passed} == {"euler", "heun"}


def test_on_the_same_brownian_path_the_general_measurement_agrees_with_the_exact_one():
    p = orders.reference("rmsprop")
    a = weak.paired(p, 1 / 8, np.array([1.0]), paths=1 << 13, seed=0, refine=3)
    b = weak.measure(p, weak.plain_run(p, 1 / 8), np.array([1.0, 2.0]), seed=0, budget=1e7)
    z = (a.delta[0] - b.delta[0]) / np.hypot(a.se[0], b.se[0])
    rises = a.se[0] < 0.5 * abs(b.delta[0])
    assert (abs(z) < 4.5).all()
    assert rises.sum() >= 5


def test_the_noise_wins_is_said():
    f = weak.fit([1, 2, 4], [1.0, 0.1, 0.01], [0.5, 0.5, 0.5])
    assert not f.resolved
    r = Result("x", "", "eta2")
    r.judge("a", "b", "c", 1.0, 0.1, only=["nothing"])
    assert r.fits[0].passed is None
    assert not r.passed
