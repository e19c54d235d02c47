"""Exact moments where f is quadratic and Sigma constant (paper, section 4, last paragraph).

There u(t) is deterministic, so y = (theta, m) solves a linear SDE with time-dependent coefficients and stays
Gaussian: dy = (A(t) y + a(t)) dt + B(t) dW, hence

    mu' = A mu + a,     C' = A C + C A^T + B B^T

integrated by DOP853 to 1e-12. The same holds for the discrete twin with a frozen preconditioner, whose
recursions give the known means of the control variates.

    y      (theta) or (theta, m)          (p,), p = d or 2 d
    mu, C  mean and covariance of y       (p,), (p, p)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.integrate import solve_ivp

from scaling_exps.theory.problem import Chain, Problem

Array = np.ndarray


class Moments(NamedTuple):
    """Mean and covariance of y, and the (deterministic or mean) second-moment state u, at one time."""

    mean: Array  # (p,)
    cov: Array  # (p, p)
    u: Array  # (d,)

    def of_state(self) -> tuple[Array, Array]:
        """Mean (3 d,) and covariance (3 d, 3 d) of (theta, m, u)."""
        p, d = len(self.mean), len(self.u)
        mu, C = np.zeros(3 * d), np.zeros((3 * d, 3 * d))
        mu[:p], mu[2 * d :], C[:p, :p] = self.mean, self.u, self.cov
        return mu, C


def sde_moments(problem: Problem, times: Array) -> list[Moments]:
    """Mean and covariance of the SDE's solution at `times` after t0 (increasing): one Moments for each.

    Raises:
        ValueError: the oracle is not quadratic.
    """
    if not problem.quadratic:
        raise ValueError(
            f"exact moments were asked of {type(problem.oracle).__name__}; allowed: Quadratic and Linear oracles; "
            f"simulate the SDE instead (sde.simulate)"
        )
    (H, b, S), (x0, m0, u0) = problem.oracle.arrays, problem.start
    s0, e0, c1, c2 = problem.sigma0, problem.eps0, problem.c1, problem.c2
    d, adam = len(b), problem.algorithm == "adam"
    p = 2 * d if adam else d
    var = np.diag(problem.oracle.cov(np.zeros((1, d))))

    def u(t: float) -> Array:
        """The solution of du = c2 (diag Sigma - u) dt."""
        return np.asarray(var + (u0 - var) * math.exp(-c2 * (t - problem.t0)))

    def rate(t: float, flat: Array) -> Array:
        mu, C = flat[:p], flat[p:].reshape(p, p)
        root2 = math.sqrt(-math.expm1(-c2 * t)) if adam else 1.0
        P = np.ones((d, 1)) if problem.algorithm == "sgd" else (s0 * np.sqrt(u(t)) + e0 * root2)[:, None]
        if adam:
            A = np.block(
                [[np.zeros((d, d)), np.diag(root2 / math.expm1(-c1 * t) / P[:, 0])], [c1 * H, -c1 * np.eye(d)]]
            )
            a, B = np.concatenate([np.zeros(d), c1 * b]), np.vstack([np.zeros((d, d)), s0 * c1 * S])
        else:
            A, a, B = -H / P, -b / P[:, 0], s0 * S / P
        return np.concatenate([A @ mu + a, (A @ C + C @ A.T + B @ B.T).ravel()])

    y0 = np.concatenate([np.concatenate([x0, m0])[:p], np.zeros(p * p)])
    grid = problem.t0 + np.asarray(times, float)
    end = max(grid[-1], problem.t0 + 1e-12)
    solution = solve_ivp(rate, (problem.t0, end), y0, "DOP853", grid, rtol=1e-12, atol=1e-13)
    return [Moments(y[:p], y[p:].reshape(p, p), u(t)) for t, y in zip(grid, solution.y.T, strict=True)]


class Twin(NamedTuple):
    """The discrete run with its preconditioner frozen: step factors, and exact moments where observed."""

    factors: Array  # (steps, d): theta_i moves by -factor times m (Adam) or g
    moments: list[Moments]


def frozen_twin(problem: Problem, chain: Chain, observe: Array) -> Twin:
    """Freeze v_k at its mean without the gradient's share; then (theta, m) is linear in the draws.

    Args:
        chain: the run that is observed (a scaled or SVAG run has its own).
        observe: (n,) increasing step numbers, 0 .. chain.steps.
    """
    hyper, k0, v_scale = chain.hyper, chain.k0, chain.u_scale**2
    (H, b, S), (x0, m0, u0) = problem.oracle.arrays, problem.start
    d, adam, sgd = len(b), problem.algorithm == "adam", problem.algorithm == "sgd"
    beta1, beta2 = hyper.betas[0] if adam else 0.0, 1.0 if sgd else hyper.betas[-1]
    noise = chain.sigma**2 * sum(w * w for w in chain.weights) * (S @ S.T)
    v_known = v = v_scale * u0
    p, one = 2 * d if adam else d, np.eye(d)
    mu, C = np.concatenate([x0, m0])[:p], np.zeros((p, p))
    factors = np.empty((chain.steps, d))
    moments = []
    for k in range(chain.steps + 1):
        if k in observe:
            moments.append(Moments(mu, C, v / v_scale))
        if k == chain.steps:
            break
        bias1, bias2 = (1 - beta1 ** (k0 + k + 1), 1 - beta2 ** (k0 + k)) if adam else (1.0, 1.0)
        factors[k] = hyper.lr if sgd else hyper.lr / (bias1 * (np.sqrt(v_known / bias2) + hyper.eps))
        mean_g, x = H @ mu[:d] + b, np.diag(factors[k])
        second = np.diag(H @ C[:d, :d] @ H) + mean_g**2 + np.diag(noise)  # E g'^2
        if adam:
            to_m = np.hstack([(1 - beta1) * H, beta1 * one])
            A = np.vstack([np.eye(d, p) - x @ to_m, to_m])
            B = (1 - beta1) * np.vstack([-x, one])
            a = B @ b
        else:
            A, a, B = one - x @ H, -factors[k] * b, -x
        mu, C = A @ mu + a, A @ C @ A.T + B @ noise @ B.T
        v = beta2 * v + (1 - beta2) * second
        v_known = beta2 * v_known + (1 - beta2) * np.diag(noise)
    return Twin(factors, moments)
