"""What is held fixed while the step shrinks: an oracle, an optimizer, the SDE's constants, a start, a horizon.

symbol      name        meaning (paper, arXiv 2205.10287, section 4)
sigma0      sigma0      sigma eta (adaptive), sigma sqrt(eta) (SGD)
eps0        eps0        eps eta
c_i         c1, c2      (1 - beta_i) / eta^2
eta_e       step        time of one optimizer step: eta^2 (adaptive), eta (SGD)
u           u0          v / sigma^2
t0          t0          Adam's start; the horizon is counted from it
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scaling_exps import rules
from scaling_exps.rules import Family, Hyper
from scaling_exps.theory.oracles import Noise, Quadratic, positive

Array = np.ndarray
ALGORITHMS = ("rmsprop", "adam", "sgd")


@dataclass(frozen=True)
class Chain:
    """The discrete side: hyperparameters and noise of every step of one optimizer, and how many steps it takes.

    Args:
        hyper: of the optimizer.
        sigma: noise scale of one draw, > 0.
        u_scale: the noise scale s of u = v / s^2: sigma, or sigma ell under SVAG.
        steps: that cover the horizon.
        family: whose rules apply.
        k0: Adam's step counter at the start.
        weights: of the independent draws of one step.
    """

    hyper: Hyper
    sigma: float
    u_scale: float
    steps: int
    family: Family = "adaptive"
    k0: int = 0
    weights: tuple[float, ...] = (1.0,)

    def scaled(self, rule: rules.Rule, kappa: float) -> Chain:
        """At kappa times the batch by a rule (sqrt: paper, Def. 5.2): sigma / sqrt(kappa), steps / kappa (equal data).

        Raises:
            ValueError: kappa does not divide the steps.
        """
        if self.steps % kappa or self.k0 % kappa:
            raise ValueError(f"kappa={kappa} was given for {self.steps} steps from {self.k0}; allowed: common divisors")
        hyper, sigma = rule.scale(self.hyper, rules.Move(1, kappa)), self.sigma / math.sqrt(kappa)
        return Chain(hyper, sigma, sigma, round(self.steps / kappa), self.family, round(self.k0 / kappa))

    def svag(self, ell: int) -> Chain:
        """SVAG at `ell` (section 6): two draws of the same sigma, their sum as noisy as sigma sqrt(stretch)."""
        hyper, stretch = rules.svag(self.hyper, ell, self.family)
        return replace(
            self, hyper=hyper, u_scale=self.sigma * math.sqrt(stretch), steps=self.steps * stretch,
            k0=self.k0 * stretch, weights=rules.svag_weights(ell, self.family),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """An optimizer on an oracle in continuous time.

    Args:
        algorithm: "rmsprop", "adam" (the paper's forms) or "sgd" (no momentum).
        oracle: see `oracles.Oracle`.
        x0, m0, u0: starts, (d,) or a number; u0 > 0, in units of the variance of z. m0 is Adam's alone.
        sigma0, eps0, c1, c2: the constants above; eps0 >= 0, the others > 0.
        t0: > 0 for Adam (1 - e^(-c t) vanishes at 0), 0 otherwise.
        horizon: continuous time after t0.

    Raises:
        ValueError: what was given, what is allowed, what to do.
    """

    algorithm: str
    oracle: Any
    x0: Array | float = 1.0
    m0: Array | float = 0.0
    u0: Array | float = 1.0
    sigma0: float = 1.0
    eps0: float = 0.1
    c1: float = 1.0
    c2: float = 0.5
    t0: float = 0.0
    horizon: float = 1.0
    start: Array = field(init=False, repr=False)  # (3, d): theta, m, u

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm {self.algorithm!r} is unknown; allowed: {', '.join(ALGORITHMS)}; choose one")
        for name in ("sigma0", "c1", "c2", "horizon"):
            positive(name, getattr(self, name))
        if not self.eps0 >= 0:
            raise ValueError(f"eps0={self.eps0} was given; allowed: >= 0; pass eps0=0 for no epsilon")
        start = np.array([np.broadcast_to(a, self.oracle.dim) for a in (self.x0, self.m0, self.u0)], float)
        u0 = start[2]
        if not (u0 > 0).all() and self.algorithm != "sgd":
            raise ValueError(
                f"u0={u0.tolist()} was given; allowed: > 0 in every coordinate (u = v/sigma^2 stands under a root "
                f"and in a denominator); start from the variance of the noise, u0=1.0"
            )
        if self.algorithm == "adam" and not self.t0 > 0:
            raise ValueError(
                f"t0={self.t0} was given for Adam; allowed: t0 > 0 (its SDE divides by 1 - exp(-c1 t), which is 0 "
                f"at t = 0); pass a few steps' time, for example t0=0.5"
            )
        if self.algorithm != "adam" and self.t0:
            raise ValueError(f"t0={self.t0} was given for {self.algorithm}; allowed: 0; only Adam needs a later start")
        object.__setattr__(self, "start", start)

    @property
    def quadratic(self) -> bool:
        """Whether exact moments and fused kernels apply."""
        return isinstance(self.oracle, Quadratic)

    def discretise(self, step: float) -> Chain:
        """The optimizer whose step covers `step` of time: eta^2 (eta for SGD), sigma = sigma0 / eta,
        eps = eps0 / eta, beta_i = 1 - c_i eta^2 (section 4, "constants held fixed").

        >>> from scaling_exps.theory.oracles import Quadratic
        >>> Problem("rmsprop", Quadratic([1.0])).discretise(1 / 16).hyper
        Hyper(lr=0.25, betas=(0.96875,), eps=0.4, weight_decay=0.0)

        Raises:
            ValueError: `step` at or above 1/(2 c2), or above 1/c1 (a beta would leave [0, 1)).
        """
        positive("step (eta^2)", step)
        if self.algorithm == "sgd":
            sigma = self.sigma0 / math.sqrt(step)
            return Chain(Hyper(step, (0.0,), 0.0, 0.0), sigma, sigma, self.steps(step), "sgd")
        limit = min(0.5 / self.c2, 1 / self.c1 if self.algorithm == "adam" else math.inf)
        if step >= limit:
            raise ValueError(
                f"eta^2={step:g} was given with c1={self.c1:g}, c2={self.c2:g}; allowed: eta^2 < {limit:g} "
                f"(the smaller of 1/(2 c2) and, for Adam, 1/c1); take smaller steps or smaller c"
            )
        eta, cs = math.sqrt(step), (self.c1, self.c2) if self.algorithm == "adam" else (self.c2,)
        hyper, sigma = Hyper(eta, tuple(1 - c * step for c in cs), self.eps0 / eta, 0.0), self.sigma0 / eta
        return Chain(hyper, sigma, sigma, self.steps(step), k0=self.steps(step, self.t0))

    def steps(self, step: float, time: float | None = None) -> int:
        """How many steps of `step` make `time` (the horizon): a whole number, or ValueError."""
        time = self.horizon if time is None else time
        n = time / step
        if abs(n - round(n)) > 1e-9 * max(1.0, n):
            raise ValueError(
                f"eta^2={step:g} was given for a time of {time:g}; allowed: a step that divides it; "
                f"nearest: {time / max(1, round(n)):g}"
            )
        return round(n)


def reference(algorithm: str, noise: Noise | None = None) -> Problem:
    """The laboratory's quadratic: two coupled coordinates, correlated noise, u and eps off equilibrium."""
    oracle = Quadratic([[1.0, 0.3], [0.3, 0.6]], [[1.0, 0.4], [0.4, 0.8]], [0.1, -0.2], noise)
    if algorithm == "adam":
        x0, u0 = np.array([1.0, 0.8]), np.array([0.5, 2.0])
        return Problem("adam", oracle, x0=x0, m0=0.3, u0=u0, eps0=0.3, c1=0.5, t0=0.5, horizon=2.0)
    return Problem(algorithm, oracle, x0=np.array([1.0, -0.7]), u0=np.array([0.5, 1.5]), eps0=0.3, horizon=2.0)
