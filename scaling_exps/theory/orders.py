"""Checks of order: weak_order, svag, skewness, and the integrator by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scaling_exps import rules
from scaling_exps.theory import exact, sde, weak
from scaling_exps.theory.oracles import Noise, Quadratic, TwoWell, describe
from scaling_exps.theory.problem import Problem
from scaling_exps.theory.result import Result, Row

STEPS = tuple(2.0**-k for k in range(3, 8))  # eta^2 = 1/8 ... 1/128
TIMES = np.array([0.5, 1.0, 1.5, 2.0])  # the error is the largest over these


def reference(algorithm: str, noise: Noise | None = None) -> Problem:
    """The laboratory's quadratic: two coupled coordinates, correlated noise, u and eps off equilibrium."""
    oracle = Quadratic([[1.0, 0.3], [0.3, 0.6]], [[1.0, 0.4], [0.4, 0.8]], [0.1, -0.2], noise)
    if algorithm == "adam":
        return Problem(
            "adam",
            oracle,
            x0=np.array([1.0, 0.8]),
            m0=0.3,
            u0=np.array([0.5, 2.0]),
            eps0=0.3,
            c1=0.5,
            t0=0.5,
            horizon=2.0,
        )
    return Problem(algorithm, oracle, x0=np.array([1.0, -0.7]), u0=np.array([0.5, 1.5]), eps0=0.3, horizon=2.0)


def weak_order(seed: int = 0, budget: float = 1.5e8) -> Result:
    """max_t |E g(x_k) - E g(X_t)| falls like eta^2 (RMSprop, Adam) or eta (SGD)."""
    r = Result("weak_order", "error of E g is O(eta^2) (RMSprop, Adam), O(eta) (SGD)", "eta2")
    r.conditions = describe(reference("rmsprop").oracle)
    r.notes.append("for SGD the column eta2 holds eta, the time of one of its steps")
    for algorithm in ("rmsprop", "adam", "sgd"):
        p = reference(algorithm)
        paths = []
        for step in STEPS:
            m = weak.measure(p, weak.plain_run(p, step), TIMES, seed=seed, budget=budget)
            r.add(m, algorithm, "gaussian", "paper", step)
            paths.append(m.paths)
        r.judge(algorithm, "gaussian", "paper", 1.0, 0.15)
        r.notes.append(f"{algorithm}: sized itself to {', '.join(map(str, paths))} paths for the five steps")
    p = Problem("rmsprop", TwoWell(), x0=1.5, u0=0.5, eps0=0.3, sigma0=0.5)
    for step in STEPS[1:]:
        m = weak.paired(p, step, np.array([0.5, 1.0]), paths=1 << 12, seed=seed, refine=2)
        r.add(m, "rmsprop", "gaussian, two wells", "paper", step)
    r.judge("rmsprop", "gaussian, two wells", "paper", 1.0, 0.15)
    r.conditions += [f"two wells: {line}" for line in describe(p.oracle)]
    r.notes.append("two wells: optimizer and SDE on the same Brownian path, 4096 paths, dt extrapolated to 0")
    return r


def svag(seed: int = 0, budget: float = 3e8) -> Result:
    """SVAG's error falls like 1/ell^2 (1/ell for SGD); leaving beta or eps unscaled does not converge."""
    r = Result("svag", "SVAG converges like 1/ell^2 (SGD: 1/ell); with a wrong beta, eps or weight it does not", "ell")
    r.conditions = describe(reference("rmsprop").oracle)
    for algorithm in ("rmsprop", "adam", "sgd"):
        p = reference(algorithm)
        base = weak.plain_run(p, 1 / 8)
        for ell in (1, 2, 4, 8):
            run = weak.svag_run(p, base, ell)
            m = weak.measure(p, run, TIMES, seed=seed, budget=budget)
            r.add(m, algorithm, "gaussian", "svag", 1 / 8, ell)
            if ell > 4 or algorithm == "sgd":
                continue
            wrong = {
                "beta unscaled": replace(run, hyper=replace(run.hyper, betas=base.hyper.betas)),
                "eps unscaled": replace(run, hyper=replace(run.hyper, eps=base.hyper.eps)),
                "sqrt(2 ell - 1)": replace(run, weights=rules.svag_weights(ell, "sgd")),
            }
            for arm, bad in wrong.items():
                m = weak.measure(p, bad, TIMES, seed=seed, budget=budget / 20)
                r.add(m, algorithm, "gaussian", arm, 1 / 8, ell)
        r.judge(algorithm, "gaussian", "svag", -1.0 if algorithm == "sgd" else -2.0, 0.2)
        for arm in ("beta unscaled", "eps unscaled", "sqrt(2 ell - 1)") if algorithm != "sgd" else ():
            last = {n: r.series(algorithm, "gaussian", arm, n)[1][-1] for n in r.functions(algorithm, "gaussian", arm)}
            r.judge(algorithm, "gaussian", arm, -2.0, 0.2, only=[max(last, key=lambda n: last[n])], control=True)
    return r


def _skewed(noise: Noise) -> Problem:
    oracle = Quadratic([1.0, 0.6], noise=noise)
    return Problem("rmsprop", oracle, x0=np.array([0.5, 0.4]), u0=np.array([1.0, 0.8]), horizon=2.0)


def skewness(seed: int = 0, budget: float = 3e7) -> Result:
    """Fixed skewness costs half an order; skewness K/sigma, or SVAG, gives it back."""
    r = Result("skewness", "fixed skewness breaks order 1; K/sigma keeps it, SVAG restores it", "eta2")
    means = ("theta[0]", "theta[1]")
    vanishing = Noise("gamma", skew=2 * np.sqrt(8.0))  # skewness 2 at eta^2 = 1/8, sigma = sqrt(8)
    for noise, expected in ((Noise("exponential"), 0.5), (vanishing, 1.0)):
        p = _skewed(noise)
        r.conditions += [f"{noise.kind}: {line}" for line in describe(p.oracle)]
        for step in STEPS if noise.kind == "exponential" else STEPS[:4]:
            m = weak.measure(p, weak.plain_run(p, step), TIMES, seed=seed, budget=budget)
            r.add(m, "rmsprop", noise.kind, "paper", step)
        if noise.kind == "exponential":
            r.judge("rmsprop", noise.kind, "paper", 1.0, 0.15, only=means, control=True)
        r.judge("rmsprop", noise.kind, "paper", expected, 0.15, only=means)
    p = _skewed(Noise("exponential"))
    base = weak.plain_run(p, 1 / 8)
    by_ell = Result("skewness", r.claim, "ell")
    for ell in (1, 2, 3, 4, 6):
        m = weak.measure(p, weak.svag_run(p, base, ell), TIMES, seed=seed, budget=budget)
        by_ell.add(m, "rmsprop", "exponential", "svag", 1 / 8 / ell**2, ell)
    by_ell.judge("rmsprop", "exponential", "svag", -2.0, 0.2, only=means, skip_first=1)
    r.rows += by_ell.rows
    r.fits += by_ell.fits
    r.notes.append("SVAG multiplies skewness by (3 ell^2 - 1)/(2 ell^3): its order shows from ell = 2 on")
    r.notes.append("in the figure SVAG stands at eta^2 / ell^2, the time of one of its steps")
    return r


def integrator(seed: int = 0, paths: int = 1 << 16) -> Result:
    """The SDE integrator alone, on problems with known solutions."""
    r = Result("integrator", "Euler-Maruyama: strong 1/2 (1 if additive), weak 1; Heun, additive noise: weak 2", "eta2")
    r.notes.append("the column eta2 holds dt")
    few = paths // 4
    for level in range(4, 9):  # dX = -X/2 dt + X dW, X = exp(-t + W): multiplicative noise, E X = e^(-t/2)
        x, w = sde.euler_maruyama(lambda t, x: -0.5 * x, lambda t, x: x, 1.0, 1.0, level, paths=few, seed=seed)
        gap = x - np.exp(w - 1.0)  # the exact solution on the same path: a perfect control variate
        _record(r, "euler", "geometric", "strong", level, np.abs(gap))
        # dX = -X dt + X/2 dW, X = exp(-9t/8 + W/2): less noise, so that the weak error rises above it
        x, w = sde.euler_maruyama(lambda t, x: -x, lambda t, x: 0.5 * x, 1.0, 1.0, level, paths=few, seed=seed)
        _record(r, "euler", "geometric", "weak", level, x - np.exp(-1.125 + 0.5 * w))
        # dX = (2X/(1+t) + (1+t)^2/2) dt + (1+t)^2/2 dW, X = (1+t)^2 (X_0 + (W+t)/2): additive noise
        x, w = sde.euler_maruyama(
            lambda t, x: 2 * x / (1 + t) + (1 + t) ** 2 / 2,
            lambda t, x: np.full_like(x, (1 + t) ** 2 / 2),
            1.0,
            1.0,
            level,
            paths=few,
            seed=seed,
        )
        _record(r, "euler", "additive", "strong", level, np.abs(x - 4 * (1 + (w + 1) / 2)))
    r.judge("euler", "geometric", "strong", 0.5, 0.1)
    r.judge("euler", "geometric", "weak", 1.0, 0.15)
    r.judge("euler", "additive", "strong", 1.0, 0.1)
    for algorithm in ("rmsprop", "adam"):
        p = reference(algorithm)
        g = weak.functions(p)
        truth = g.expectation(exact.sde_moments(p, np.array([1.0]))[0])
        fine = g(sde.simulate(p, 2.0**-10, np.array([1.0]), paths=paths, seed=seed, scheme="heun")[0])
        for scheme, expected in (("euler", 1.0), ("heun", 2.0)):
            for level in range(2, 7):
                x = g(sde.simulate(p, 2.0**-level, np.array([1.0]), paths=paths, seed=seed, scheme=scheme)[0])
                for name in ("theta[0]", "theta[0]^2", "f"):
                    j = g.names.index(name)
                    slope = np.cov(x[j], fine[j])[0, 1] / np.var(fine[j])
                    _record(r, scheme, algorithm, name, level, x[j] - slope * (fine[j] - truth[j]) - truth[j])
            for name in ("theta[0]", "theta[0]^2", "f"):
                r.judge(scheme, algorithm, name, expected, 0.25)
    return r


def _record(r: Result, optimizer: str, noise: str, arm: str, level: int, samples: np.ndarray) -> None:
    error, se = abs(float(samples.mean())), float(samples.std() / np.sqrt(len(samples)))
    r.rows.append(Row(r.check, optimizer, noise, arm, 2.0**-level, 1, 1, arm, error, se))
