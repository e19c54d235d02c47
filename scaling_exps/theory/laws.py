"""Checks of the scaling rule: scaling_rule, noise_dominance, decoupled_decay. All go through `rules.RULES`."""

from __future__ import annotations

import math

import numpy as np
import torch

from scaling_exps import optim
from scaling_exps.rules import RULES, Hyper, Move
from scaling_exps.theory import discrete, exact, weak
from scaling_exps.theory.keyed import LANES, MAX_DIM, draws
from scaling_exps.theory.oracles import Linear, describe
from scaling_exps.theory.orders import TIMES, reference
from scaling_exps.theory.problem import Problem
from scaling_exps.theory.result import Result, Row, Verdict

BASE_STEP = 1 / 256
KAPPAS = (4, 8, 16, 32)
# the paper's rule and its controls; further rules answer other questions, or are these without weight decay
CONTROLLED = ("sqrt", "linear", "lr_only", "none", "sqrt_without_betas", "sqrt_without_eps", "linear_scaled")


def scaling_rule(seed: int = 0, budget: float = 1e8) -> Result:
    """The law of the trajectory at equal data, kappa against the base run, under each rule of `rules`."""
    r = Result("scaling_rule", "sqrt keeps the law (gap about (kappa-1) eta^2); the other rules do not", "kappa")
    r.conditions = describe(reference("rmsprop").oracle)
    for algorithm in ("rmsprop", "adam"):
        p = reference(algorithm)
        base = weak.plain_run(p, BASE_STEP)
        at_base = weak.measure(p, base, TIMES, seed=seed, budget=2 * budget)
        names = CONTROLLED
        for name in names:
            for kappa in KAPPAS:
                run = weak.scaled_run(p, base, RULES[name], kappa)
                share = 1.0 if name == "sqrt" else 0.05
                m = weak.measure(p, run, TIMES, seed=seed + 1, budget=budget * share)
                r.add(m.minus(at_base), algorithm, "gaussian", name, BASE_STEP, kappa=kappa)
        r.judge(algorithm, "gaussian", "sqrt", 1.0, 0.2, shift=-1.0)
        for name in names:
            if name != "sqrt":
                r.fits.append(_ratio(r, algorithm, name, "sqrt", max(KAPPAS), 3.0))
    r.notes.append(
        f"base eta^2 = {BASE_STEP:g}; the gap of each rule to the base run itself, largest over {len(TIMES)} times"
    )
    r.notes.append(
        "a control is judged on the function that it moves most; 'linear' is lr x kappa with betas and eps left alone"
    )
    return r


def _ratio(r: Result, optimizer: str, arm: str, against: str, kappa: float, least: float) -> Verdict:
    """error(arm)/error(against) at `kappa`, on the function where it is largest; a control, so >= `least` passes."""
    table = {(x.arm, x.function): x for x in r.rows if x.optimizer == optimizer and x.kappa == kappa and x.error > 0}
    functions = [f for a, f in table if a == arm and (against, f) in table]
    sure = [f for f in functions if table[against, f].error > 4 * table[against, f].standard_error] or functions
    best = max(sure, key=lambda f: table[arm, f].error / table[against, f].error)
    a, b = table[arm, best], table[against, best]
    ratio = a.error / b.error
    half = 1.96 * ratio * math.hypot(a.standard_error / a.error, b.standard_error / b.error)
    interval = (max(0.0, ratio - half), ratio + half)
    return Verdict(
        r.check, optimizer, a.noise, arm, best, f"ratio to {against} at kappa={kappa:g}", ratio, interval, least, 0.0,
        bool(ratio >= least), control=True,
    )  # fmt: skip


def noise_dominance(seed: int = 0, paths: int = 1 << 16) -> Result:
    """On a linear loss the rule's deviation is known: displacement x sqrt((1+r)/(1+kr)), variance x its square."""
    r = Result("noise_dominance", "linear loss: displacement times sqrt((1+r)/(1+kappa r)) after equal data", "kappa")
    ratios = np.array([0.001, 0.01, 0.1, 1.0, 10.0])  # r_i = (mean gradient)^2 / variance, at the base batch
    base = Hyper(1e-2, (1 - 1e-5,), 0.0, 0.0)
    steps, found = 1024, {}
    for kappa in (1, 4, 16, 64):
        oracle = Linear(np.sqrt(ratios))
        p = Problem("rmsprop", oracle, x0=0.0, u0=1 + kappa * ratios, eps0=0.0)
        if kappa == 1:
            r.conditions = describe(oracle)
        hyper = RULES["sqrt"].scale(base, Move(1, kappa))
        sigma, n = 1 / math.sqrt(kappa), steps // kappa
        end = np.array([n])
        twin = exact.frozen_twin(p, hyper, sigma, sigma, 1.0, n, 0, end)
        x = discrete.run_fused(
            p, hyper, sigma, twin.factors, end, blocks=paths // LANES, first_block=0, seed=seed + kappa
        )[0]
        d = len(ratios)
        x, y = x[:d], x[3 * d : 4 * d] - twin.moments[0].mean[:, None]
        slope = (x * y).mean(1) / (y * y).mean(1)
        rest = x - slope[:, None] * y  # the twin's known mean taken out
        found[kappa] = rest.mean(1), rest.std(1) / math.sqrt(paths), x.var(1)
    for kappa in (4, 16, 64):
        mean0, se0, var0 = found[1]
        mean, se, var = found[kappa]
        for i, ratio in enumerate(ratios):
            closed = math.sqrt((1 + ratio) / (1 + kappa * ratio))
            measured = mean[i] / mean0[i]
            error = measured * math.hypot(se[i] / mean[i], se0[i] / mean0[i])
            name = f"displacement, r={ratio:g}"
            _against(r, kappa, name, measured, error, closed, 0.02)
            measured = var[i] / var0[i]
            _against(r, kappa, f"variance, r={ratio:g}", measured, measured * 2 / math.sqrt(paths), closed**2, 0.04)
    r.notes.append("the rule is exact as long as kappa r << 1; beyond, large batches move less than the rule says")
    r.notes.append(f"{paths} paths, {steps} base steps, beta = {base.betas[0]:g}, eps = 0, v started at its mean")
    return r


def _against(r: Result, kappa: float, name: str, measured: float, se: float, closed: float, tolerance: float) -> None:
    r.rows.append(
        Row(r.check, "rmsprop", "gaussian", "sqrt", 0.0, 1, kappa, name, abs(measured / closed - 1), se / closed)
    )
    interval = (measured - 1.96 * se, measured + 1.96 * se)
    tolerance *= closed
    quantity = f"ratio kappa={kappa:g} : 1"
    ok = abs(measured - closed) <= tolerance + 2 * se
    r.fits.append(
        Verdict(r.check, "rmsprop", "gaussian", "sqrt", name, quantity, measured, interval, closed, tolerance, bool(ok))
    )


def decoupled_decay(seed: int = 0, paths: int = 1 << 12) -> Result:
    """AdamW (the class that trains networks) under sqrt, with lambda fixed, x sqrt(kappa), x kappa."""
    r = Result("decoupled_decay", "AdamW under sqrt keeps its law with lambda x sqrt(kappa)", "kappa")
    base, steps, sigma = Hyper(5e-3, (0.99, 0.999), 1e-8, 0.1), 2048, 10.0
    oracle = Linear(np.zeros(1))
    r.conditions = describe(oracle)
    marks = np.arange(1, 9) / 8
    truth = _adamw(base, sigma, steps, marks, paths, seed)
    exponents = {"lambda fixed": 0.0, "lambda x sqrt(kappa)": 0.5, "lambda x kappa": 1.0}
    for kappa in (4, 16):
        for arm, exponent in exponents.items():
            hyper = RULES["sqrt"].scale(base, Move(1, kappa))
            hyper = Hyper(hyper.lr, hyper.betas, hyper.eps, base.weight_decay * kappa**exponent)
            x = _adamw(hyper, sigma / math.sqrt(kappa), steps // kappa, marks, paths, seed + kappa)
            gap = np.abs(x.mean(1) - truth.mean(1))
            se = math.sqrt((x[-1].var() + truth[-1].var()) / paths)
            r.rows.append(Row(r.check, "adamw", "gaussian", arm, 0.0, 1, kappa, "mean of theta", float(gap.max()), se))
            change = float(x[-1].var() / truth[-1].var() - 1)
            r.rows.append(
                Row(r.check, "adamw", "gaussian", arm, 0.0, 1, kappa, "variance, relative", abs(change), 2 / paths**0.5)
            )
    for kappa in (4, 16):
        error = {x.arm: x for x in r.rows if x.kappa == kappa and x.function == "mean of theta"}
        kept = error["lambda x sqrt(kappa)"]
        limit, half = 0.01 if kappa == 4 else 0.03, 1.96 * kept.standard_error
        r.fits.append(
            Verdict(
                r.check, "adamw", "gaussian", kept.arm, kept.function, f"gap at kappa={kappa}", kept.error,
                (max(0.0, kept.error - half), kept.error + half), 0.0, limit, bool(kept.error <= limit),
            )
        )  # fmt: skip
        for arm in ("lambda fixed", "lambda x kappa"):
            r.fits.append(_ratio(r, "adamw", arm, kept.arm, kappa, 3.0))
    r.notes.append("f(theta) = theta^2/2, theta_0 = 1, noise 10 at the base batch, base lr 0.005, betas 0.99 and 0.999")
    r.notes.append(f"{paths} paths, {steps} base steps; the mean's gap is the largest over 8 times of equal data")
    return r


def _adamw(hyper: Hyper, sigma: float, steps: int, marks: np.ndarray, paths: int, seed: int) -> np.ndarray:
    """theta at the fractions `marks` of the run: (marks, paths)."""
    x = torch.ones(paths, dtype=torch.float64, requires_grad=True)
    optimizer = optim.build("adamw", [x], hyper)
    observe, out = set(np.round(marks * steps).astype(int).tolist()), []
    with discrete.one_torch_thread():
        for k in range(steps):
            if k % MAX_DIM == 0:  # a block of steps at once, as the coordinates of one draw
                noise = torch.from_numpy(draws("gaussian", 0.0, seed, 0, paths, min(MAX_DIM, steps - k), k).T.copy())
            x.grad = x.detach() + sigma * noise[k % MAX_DIM]
            optimizer.step()
            if k + 1 in observe:
                out.append(x.detach().numpy().copy())
    return np.stack(out)
