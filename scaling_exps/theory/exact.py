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
from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp

from scaling_exps.theory.problem import Chain, Problem

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of y, and the (deterministic or mean) second-moment state u, at one time."""

    mean: Array  # (p,)
    cov: Array  # (p, p)
    u: Array  # (d,)


def u_at(problem: Problem, t: float) -> Array:
    """u(t), the solution of du = c2 (diag Sigma - u) dt from u0 at t0: (d,)."""
    var = np.diag(problem.oracle.cov(np.zeros((1, problem.oracle.dim))))
    return np.asarray(var + (problem.start[2] - var) * math.exp(-problem.c2 * (t - problem.t0)))


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
    o, d = problem.oracle, problem.oracle.dim
    s0, e0, c1, c2 = problem.sigma0, problem.eps0, problem.c1, problem.c2
    adam = problem.algorithm == "adam"
    p = 2 * d if adam else d
    S = o.root(np.zeros((1, d)))

    def coefficients(t: float) -> tuple[Array, Array, Array]:
        """A(t) (p, p), a(t) (p,), B(t) (p, d)."""
        A, a, B = np.zeros((p, p)), np.zeros(p), np.zeros((p, d))
        if problem.algorithm == "sgd":
            return -o.H, -o.b, s0 * S
        root_u = np.sqrt(u_at(problem, t))
        if not adam:
            P = s0 * root_u + e0
            return -o.H / P[:, None], -o.b / P, s0 * S / P[:, None]
        g1, g2 = -math.expm1(-c1 * t), -math.expm1(-c2 * t)
        P = s0 * root_u + e0 * math.sqrt(g2)
        A[:d, d:] = -np.diag(math.sqrt(g2) / g1 / P)
        A[d:, :d], A[d:, d:] = c1 * o.H, -c1 * np.eye(d)
        a[d:] = c1 * o.b
        B[d:] = s0 * c1 * S
        return A, a, B

    def rate(t: float, flat: Array) -> Array:
        A, a, B = coefficients(t)
        mu, C = flat[:p], flat[p:].reshape(p, p)
        return np.concatenate([A @ mu + a, (A @ C + C @ A.T + B @ B.T).ravel()])

    y0 = np.concatenate([np.concatenate(problem.start[:2])[:p], np.zeros(p * p)])
    grid = problem.t0 + np.asarray(times, float)
    end = max(grid[-1], problem.t0 + 1e-12)
    solution = solve_ivp(rate, (problem.t0, end), y0, "DOP853", grid, rtol=1e-12, atol=1e-13)
    return [
        Moments(flat[:p], flat[p:].reshape(p, p), u_at(problem, t)) for t, flat in zip(grid, solution.y.T, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Twin:
    """The discrete run with its preconditioner frozen: step factors, and exact moments where observed."""

    factors: Array  # (steps, d): theta_i moves by -factor times m (Adam) or g
    moments: list[Moments]


def frozen_twin(problem: Problem, chain: Chain, observe: Array) -> Twin:
    """Freeze v_k at its mean without the gradient's share; then (theta, m) is linear in the draws.

    Args:
        chain: the run that is observed (a scaled or SVAG run has its own).
        observe: (n,) increasing step numbers, 0 .. chain.steps.
    """
    hyper, steps, k0, u_scale = chain.hyper, chain.steps, chain.k0, chain.u_scale
    o, d = problem.oracle, problem.oracle.dim
    x0, m0, u0 = problem.start
    adam, sgd = problem.algorithm == "adam", problem.algorithm == "sgd"
    beta1 = hyper.betas[0] if adam else 0.0
    beta2 = hyper.betas[-1] if not sgd else 1.0
    S = o.root(np.zeros((1, d)))
    noise = chain.sigma**2 * sum(w * w for w in chain.weights) * (S @ S.T)
    v_known = v = u_scale**2 * u0
    p = 2 * d if adam else d
    mu, C = np.concatenate([x0, m0])[:p], np.zeros((p, p))
    factors = np.empty((steps, d))
    moments = []
    for k in range(steps + 1):
        if k in observe:
            moments.append(Moments(mu, C, v / u_scale**2))
        if k == steps:
            break
        if sgd:
            factors[k] = hyper.lr
        elif adam:
            bias1, bias2 = 1 - beta1 ** (k0 + k + 1), 1 - beta2 ** (k0 + k)
            factors[k] = hyper.lr / (bias1 * (np.sqrt(v_known / bias2) + hyper.eps))
        else:
            factors[k] = hyper.lr / (np.sqrt(v_known) + hyper.eps)
        mean_g, x = o.H @ mu[:d] + o.b, np.diag(factors[k])
        second = np.diag(o.H @ C[:d, :d] @ o.H) + mean_g**2 + np.diag(noise)  # E g'^2
        if adam:
            A = np.zeros((p, p))
            A[d:, :d], A[d:, d:] = (1 - beta1) * o.H, beta1 * np.eye(d)
            A[:d, :d], A[:d, d:] = np.eye(d) - x @ A[d:, :d], -x @ A[d:, d:]
            a = np.concatenate([-factors[k] * (1 - beta1) * o.b, (1 - beta1) * o.b])
            B = np.vstack([-x * (1 - beta1), (1 - beta1) * np.eye(d)])
        else:
            A, a, B = np.eye(d) - x @ o.H, -factors[k] * o.b, -x
        mu, C = A @ mu + a, A @ C @ A.T + B @ noise @ B.T
        v = beta2 * v + (1 - beta2) * second
        v_known = beta2 * v_known + (1 - beta2) * np.diag(noise)
    return Twin(factors, moments)
