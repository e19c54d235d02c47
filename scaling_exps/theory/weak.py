# mypy: disable-error-code="no-any-return"

"""Weak error |E g(x_k) - E g(X_t)| (paper, section 3) for a set of test functions g, with standard errors.

The SDE's side is exact on quadratics (`exact.sde_moments`). The discrete side is Monte Carlo, with the frozen
twin as control variate: it sees the same draws, its moments are known exactly, and it differs from the run
only by the fluctuation of v, so what is left to average has a standard deviation of order eta.

    functions   (T, nf): at T observation times, nf test functions
    delta, se   E g(x_k) - E g(X_t) (signed) and its standard error   (T, nf)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from scaling_exps.theory import discrete, exact, sde
from scaling_exps.theory.keyed import LANES
from scaling_exps.theory.problem import Chain, Problem
from scaling_exps.theory.result import Measurement

Array = np.ndarray
CHUNK = 1 << 15  # paths held at once
TARGET = 0.02  # standard error wanted, as a share of the error
BUDGET = 4e8  # coordinate-steps spent on one measurement at most


@dataclass(frozen=True, eq=False)
class Functions:
    """The test functions of a problem: first and second moments of theta, u and m; f; cos(sum theta)."""

    names: tuple[str, ...]
    first: tuple[int, ...]  # rows of (theta, m, u)
    pairs: tuple[tuple[int, int], ...]
    oracle: Any

    def __call__(self, states: Array) -> Array:
        """(3 d, N) -> (nf, N)."""
        d = self.oracle.dim
        x = states[:d]
        products = [states[i] * states[j] for i, j in self.pairs]
        return np.stack([*states[list(self.first)], *products, self.oracle.f(x.T), np.cos(x.sum(0))])

    def expectation(self, moments: exact.Moments) -> Array:
        """E g under the SDE, where (theta, m) is Gaussian and u deterministic: (nf,)."""
        d, p = self.oracle.dim, len(moments.mean)
        mu, C = np.zeros(3 * d), np.zeros((3 * d, 3 * d))
        mu[:p], C[:p, :p], mu[2 * d :] = moments.mean, moments.cov, moments.u
        second = C + np.outer(mu, mu)
        o = self.oracle
        f = 0.5 * np.sum(o.H * second[:d, :d]) + o.b @ mu[:d]
        cosine = math.cos(mu[:d].sum()) * math.exp(-0.5 * C[:d, :d].sum())
        return np.array([*mu[list(self.first)], *(second[i, j] for i, j in self.pairs), f, cosine])


def functions(problem: Problem) -> Functions:
    """The test functions for this optimizer (SGD has theta alone, RMSprop no m)."""
    d = problem.oracle.dim
    letters = {"rmsprop": "xu", "adam": "xmu", "sgd": "x"}[problem.algorithm]
    rows = {c: ["xmu".index(c) * d + i for i in range(d)] for c in letters}
    label = {"x": "theta", "m": "m", "u": "u"}
    first = [r for c in letters for r in rows[c]]
    names = [f"{label[c]}[{i}]" for c in letters for i in range(d)]
    pairs = [(r, r) for r in first]
    names += [f"{n}^2" for n in names]
    for c in letters:
        for i in range(d):
            for j in range(i + 1, d):
                if c != "u":
                    pairs.append((rows[c][i], rows[c][j]))
                    names.append(f"{label[c]}[{i}]{label[c]}[{j}]")
    if "m" in letters:
        for i in range(d):
            pairs.append((rows["x"][i], rows["m"][i]))
            names.append(f"theta[{i}]m[{i}]")
    return Functions((*names, "f", "cos(sum theta)"), tuple(first), tuple(pairs), problem.oracle)


def measure(
    problem: Problem,
    chain: Chain,
    times: Array,
    *,
    seed: int,
    budget: float = BUDGET,
    target: float = TARGET,
) -> Measurement:
    """Weak error of `chain` against the exact SDE of a quadratic `problem`.

    The run sizes itself: paths are added until every error stands `1/target` standard errors above zero, or
    `budget` coordinate-steps are spent; memory does not depend on either.

    Args:
        times: (T,) increasing times after t0, each a whole number of the chain's steps.
        target: wanted standard error / error.
    """
    g = functions(problem)
    fractions = np.asarray(times, float) / problem.horizon * chain.steps
    observe = np.round(fractions).astype(np.int64)
    if np.abs(fractions - observe).max() > 1e-6:
        raise ValueError(f"times {list(times)} were given for {chain.steps} steps; allowed: whole numbers of steps")
    twin = exact.frozen_twin(problem, chain, observe)
    reference = np.stack([g.expectation(m) for m in exact.sde_moments(problem, times)])  # (T, nf)
    controls = _Controls(problem)
    known = [controls.expectation(m) for m in twin.moments]
    sums = [_Sums(len(g.names) + len(k)) for k in known]
    d = problem.oracle.dim
    per_path = chain.steps * d * (len(chain.weights) + 1)
    done = 0
    while True:
        blocks = max(1, min(CHUNK, max(done, CHUNK // 4)) // LANES)
        states = discrete.run_fused(
            problem, chain, twin.factors, observe, blocks=blocks, first_block=done // LANES, seed=seed
        )
        for t, s in enumerate(sums):
            rows = np.concatenate(
                [g(states[t, : 3 * d]) - reference[t][:, None], controls(states[t, 3 * d :], known[t])]
            )
            s.add(rows)
        done += blocks * LANES
        delta, se = (np.stack(a) for a in zip(*(s.regress(len(g.names)) for s in sums), strict=True))
        result = Measurement(g.names, np.asarray(times, float), delta, se, done)
        if all(s <= target * e for _, e, s in result.worst()) or done * per_path >= budget:
            return result


class _Controls:
    """Functions of the frozen twin with known means: y, y y^T, u, and cos(sum theta) for Gaussian draws."""

    def __init__(self, problem: Problem) -> None:
        d = problem.oracle.dim
        self.d, self.p = d, 2 * d if problem.algorithm == "adam" else d
        self.cosine = problem.oracle.noise.law == "gaussian"
        self.with_u = problem.algorithm != "sgd"
        self.pairs = [(i, j) for i in range(self.p) for j in range(i, self.p)]

    def expectation(self, m: exact.Moments) -> Array:
        out = [*m.mean, *(m.cov[i, j] for i, j in self.pairs)]  # products of centred coordinates
        out += list(m.u) if self.with_u else []
        if self.cosine:
            out.append(math.cos(m.mean[: self.d].sum()) * math.exp(-0.5 * m.cov[: self.d, : self.d].sum()))
        return np.array(out)

    def __call__(self, states: Array, known: Array) -> Array:
        y = states[: self.p]
        c = y - known[: self.p, None]
        rows = [*y, *(c[i] * c[j] for i, j in self.pairs)]
        rows += list(states[2 * self.d :]) if self.with_u else []
        if self.cosine:
            rows.append(np.cos(states[: self.d].sum(0)))
        return np.stack(rows) - known[:, None]


class _Sums:
    """Running sums for regression on control variates: memory does not grow with paths."""

    def __init__(self, size: int) -> None:
        self.n, self.one, self.two = 0, np.zeros(size), np.zeros((size, size))

    def add(self, rows: Array) -> None:
        self.n += rows.shape[1]
        self.one += rows.sum(1)
        with threadpool_limits(1, "blas"):  # BLAS threads beside numba's fight for the cores: 30 times slower
            self.two += rows @ rows.T

    def regress(self, nf: int) -> tuple[Array, Array]:
        """(mean of the first nf rows, corrected by the others whose mean is 0; its standard error)."""
        mean = self.one / self.n
        C = self.two / self.n - np.outer(mean, mean)
        scale = np.sqrt(np.diag(C)).clip(1e-300)
        R = C / np.outer(scale, scale)
        beta = np.linalg.pinv(R[nf:, nf:], rcond=1e-10, hermitian=True) @ R[nf:, :nf]  # (nc, nf)
        delta = mean[:nf] - scale[:nf] * (beta.T @ (mean[nf:] / scale[nf:]))
        left = np.diag(R[:nf, :nf]) - np.einsum("cf,cf->f", beta, R[nf:, :nf])
        return delta, scale[:nf] * np.sqrt(left.clip(1e-24) / self.n)


def paired(
    problem: Problem, step: float, times: Array, *, paths: int, seed: int, refine: int = 4, chunk: int = 1 << 13
) -> Measurement:
    """Weak error on any oracle with Gaussian noise: optimizer and SDE on the same Brownian path.

    The SDE is integrated by Euler-Maruyama at step/2^refine and step/2^(refine+1), extrapolated to dt = 0.
    The difference along one path has a standard deviation of order eta, so few paths suffice.

    Args:
        step: 1, 1/2, 1/4, ...; times: whole numbers of it.
        paths: how many; seed: of the Brownian path.
    """
    chain = problem.discretise(step)
    observe = [problem.steps(step, float(t)) for t in times]
    d = problem.oracle.dim
    g = functions(problem)
    sums = [_Sums(len(g.names)) for _ in times]
    for first in range(0, paths, chunk):
        size = min(chunk, paths - first)
        draw = discrete.coupled_draw(problem, chain.sigma, step, seed, first, size)
        rows = discrete.run(problem, chain, observe, paths=size, seed=seed, first=first, draw=draw)
        fine = [
            sde.simulate(problem, step / 2**r, times, paths=size, seed=seed, first=first) for r in (refine, refine + 1)
        ]
        for t, s in enumerate(sums):
            s.add(g(rows[t, : 3 * d]) - 2 * g(fine[1][t]) + g(fine[0][t]))
    delta, se = (np.stack(a) for a in zip(*(s.regress(len(g.names)) for s in sums), strict=True))
    return Measurement(g.names, np.asarray(times, float), delta, se, paths)
