# mypy: disable-error-code="no-any-return"

"""Weak error |E g(x_k) - E g(X_t)| (paper, section 3) for a set of test functions g, with standard errors.

The SDE's side is exact on quadratics (`exact.sde_moments`). The discrete side is Monte Carlo, with the frozen
twin as control variate: it sees the same draws, its moments are known exactly, and it differs from the run
only by the fluctuation of v, so what is left to average has a standard deviation of order eta.

    functions   (T, nf): at T observation times, nf test functions
    delta, se   E g(x_k) - E g(X_t) (signed) and its standard error   (T, nf)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from scaling_exps.theory import discrete, exact, sde
from scaling_exps.theory.keyed import LANES, brownian, dyadic_level
from scaling_exps.theory.oracles import apply
from scaling_exps.theory.problem import Chain, Problem
from scaling_exps.theory.result import Measurement

Array = np.ndarray
CHUNK = 1 << 15  # paths held at once
TARGET = 0.02  # standard error wanted, as a share of the error
BUDGET = 4e8  # coordinate-steps spent on one measurement at most


@dataclass(frozen=True, eq=False)
class Functions:
    """Functions of a state whose means are known where it is Gaussian: coordinates, products, f and cos(sum theta)."""

    oracle: Any
    rows: Sequence[int]  # of (theta, m, u)
    pairs: Sequence[tuple[int, int]]
    names: tuple[str, ...] = ()
    loss: bool = True
    cosine: bool = True

    def __call__(self, states: Array, centre: Array | None = None) -> Array:
        """(3 d, N) -> (nf, N); `centre` (3 d,) is taken off the factors of products."""
        x = states[: self.oracle.dim]
        c = states if centre is None else states - centre[:, None]
        values = [*states[list(self.rows)], *(c[i] * c[j] for i, j in self.pairs)]
        values += [self.oracle.f(x.T)] if self.loss else []
        return np.stack([*values, np.cos(x.sum(0))] if self.cosine else values)

    def expectation(self, moments: exact.Moments, centred: bool = False) -> Array:
        """E g (nf,), where (theta, m) is Gaussian and u deterministic."""
        o, d, (mu, C) = self.oracle, self.oracle.dim, moments.of_state()
        second = C + np.outer(mu, mu)
        values = [*mu[list(self.rows)], *((C if centred else second)[i, j] for i, j in self.pairs)]
        values += [0.5 * np.sum(o.H * second[:d, :d]) + o.b @ mu[:d]] if self.loss else []
        cosine = math.cos(mu[:d].sum()) * math.exp(-0.5 * C[:d, :d].sum())
        return np.array([*values, cosine] if self.cosine else values)


def functions(problem: Problem) -> Functions:
    """The test functions: first and second moments of theta, u (not SGD) and m (Adam); f; cos(sum theta)."""
    d = problem.oracle.dim
    kinds = {"rmsprop": {"theta": 0, "u": 2}, "adam": {"theta": 0, "m": 1, "u": 2}, "sgd": {"theta": 0}}
    first = {f"{name}[{i}]": k * d + i for name, k in kinds[problem.algorithm].items() for i in range(d)}
    products = {f"{n}^2": (r, r) for n, r in first.items()}
    two = [(a + b, (r, q)) for (a, r), (b, q) in itertools.combinations(first.items(), 2) if q < 2 * d]  # no u
    products |= {n: (r, q) for n, (r, q) in two if r // d == q // d}
    products |= {n: (r, q) for n, (r, q) in two if q - r == d}  # theta[i] m[i]
    names = (*first, *products, "f", "cos(sum theta)")
    return Functions(problem.oracle, tuple(first.values()), tuple(products.values()), names)


def _controls(problem: Problem) -> Functions:
    """Functions of the frozen twin: y, products of y, u, and cos(sum theta) for Gaussian draws."""
    d = problem.oracle.dim
    y = range(2 * d if problem.algorithm == "adam" else d)
    rows = (*y, *(range(2 * d, 3 * d) if problem.algorithm != "sgd" else ()))
    pairs = tuple(itertools.combinations_with_replacement(y, 2))
    return Functions(problem.oracle, rows, pairs, loss=False, cosine=problem.oracle.noise.law == "gaussian")


def measure(
    problem: Problem, chain: Chain, times: Array, *, seed: int, budget: float = BUDGET, target: float = TARGET
) -> Measurement:
    """Weak error of `chain` against the exact SDE of a quadratic `problem`.

    The run sizes itself: paths are added until every error stands `1/target` standard errors above zero, or
    `budget` coordinate-steps are spent; memory does not depend on either.

    Args:
        times: (T,) increasing times after t0, each a whole number of the chain's steps.
        target: wanted standard error / error.
    """
    fractions = np.asarray(times, float) / problem.horizon * chain.steps
    observe = np.round(fractions).astype(np.int64)
    if np.abs(fractions - observe).max() > 1e-6:
        raise ValueError(f"times {list(times)} were given for {chain.steps} steps; allowed: whole numbers of steps")
    g, controls, d = functions(problem), _controls(problem), problem.oracle.dim
    twin = exact.frozen_twin(problem, chain, observe)
    wanted = [g.expectation(m)[:, None] for m in exact.sde_moments(problem, times)]
    known = [controls.expectation(m, centred=True)[:, None] for m in twin.moments]
    sums = [_Sums(len(g.names)) for _ in times]
    per_path = chain.steps * d * (len(chain.weights) + 1)
    done = 0
    while True:
        blocks = max(1, min(CHUNK, max(done, CHUNK // 4)) // LANES)
        states = discrete.run_fused(
            problem, chain, twin.factors, observe, blocks=blocks, first_block=done // LANES, seed=seed
        )
        for t, (own, s) in enumerate(zip(states, sums, strict=True)):
            centre = twin.moments[t].of_state()[0]
            s.add(g(own[: 3 * d]) - wanted[t], controls(own[3 * d :], centre) - known[t])
        done += blocks * LANES
        result = _measurement(g, times, sums)
        if all(s <= target * e for _, e, s in result.worst()) or done * per_path >= budget:
            return result


class _Sums:
    """Running sums for regression on control variates: memory does not grow with paths."""

    def __init__(self, nf: int) -> None:
        self.nf, self.n, self.one, self.two = nf, 0, np.zeros(()), np.zeros(())

    def add(self, *parts: Array) -> None:
        """Rows of the nf functions, then of the controls, whose mean is 0: (_, N)."""
        rows = np.concatenate(parts)
        self.n += rows.shape[1]
        self.one = self.one + rows.sum(1)
        with threadpool_limits(1, "blas"):  # BLAS threads beside numba's fight for the cores: 30 times slower
            self.two = self.two + rows @ rows.T

    def regress(self) -> tuple[Array, Array]:
        """(mean of the functions, corrected by the controls; its standard error)."""
        nf, mean = self.nf, self.one / self.n
        C = self.two / self.n - np.outer(mean, mean)
        scale = np.sqrt(np.diag(C)).clip(1e-300)
        R = C / np.outer(scale, scale)
        beta = np.linalg.pinv(R[nf:, nf:], rcond=1e-10, hermitian=True) @ R[nf:, :nf]  # (nc, nf)
        delta = mean[:nf] - scale[:nf] * (beta.T @ (mean[nf:] / scale[nf:]))
        left = np.diag(R[:nf, :nf]) - np.einsum("cf,cf->f", beta, R[nf:, :nf])
        return delta, scale[:nf] * np.sqrt(left.clip(1e-24) / self.n)


def _measurement(g: Functions, times: Array, sums: list[_Sums]) -> Measurement:
    delta, se = (np.stack(a) for a in zip(*(s.regress() for s in sums), strict=True))
    return Measurement(g.names, np.asarray(times, float), delta, se, sums[0].n)


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
    chain, g, level = problem.discretise(step), functions(problem), dyadic_level(step)
    observe = [problem.steps(step, float(t)) for t in times]
    sums = [_Sums(len(g.names)) for _ in times]
    for first in range(0, paths, chunk):
        size = min(chunk, paths - first)

        def draw(x: Array, k: int, first: int = first, size: int = size) -> Array:
            R = problem.oracle.root(x)  # (d, r) or (N, d, r)
            dW = brownian(seed, first, size, R.shape[-1], level, k)
            return problem.oracle.grad(x) + chain.sigma * apply(R, dW / step**0.5)

        rows = discrete.run(problem, chain, observe, paths=size, seed=seed, first=first, draw=draw)
        coarse, fine = (
            sde.simulate(problem, step / 2**r, times, paths=size, seed=seed, first=first) for r in (refine, refine + 1)
        )
        for s, own, a, b in zip(sums, rows, coarse, fine, strict=True):
            s.add(g(own) - 2 * g(b) + g(a))
    return _measurement(g, times, sums)
