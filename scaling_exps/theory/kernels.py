# mypy: disable-error-code="no-untyped-def,no-any-return"

"""Fused loops over paths for quadratic oracles: f(x) = x.Hx/2 + b.x, noise z = S xi with S = Sigma^(1/2).

Coordinates are few and paths are many, so a kernel keeps LANES paths in cache, walks them through all steps,
and runs the blocks in parallel. Memory: the states asked for, and O(LANES) a thread; never O(steps x paths).
The classes that train networks remain the reference: tests hold `discrete` equal to them step for step.
What takes a parameter tuple is inlined: passing the tuple's arrays on costs 20%.

    X, M, U   theta, m, u = v / sigma^2          (d, LANES)
    rows of an output                            theta (d), m (d), u (d), then for `discrete` its frozen twin
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from scaling_exps.theory.keyed import (
    BROWNIAN,
    DRAW,
    HALF,
    LANES,
    TWO_POINT,
    block_keys,
    next_increment,
    noise,
    signs,
)

RMSPROP, ADAM, SGD = 0, 1, 2


class Flow(NamedTuple):
    """An SDE: the algorithm, the oracle (H, S (d, d), b and var = diag Sigma (d,)), the start (d,), its constants."""

    algo: int
    H: np.ndarray
    b: np.ndarray
    S: np.ndarray
    var: np.ndarray
    x0: np.ndarray
    m0: np.ndarray
    u0: np.ndarray
    s0: float
    e0: float
    c1: float
    c2: float
    t0: float


class Steps(NamedTuple):
    """An optimizer: as `Flow`, its hyperparameters, v_scale = v / u, and the draws of a step (see `keyed.noise`)."""

    algo: int
    H: np.ndarray
    b: np.ndarray
    S: np.ndarray
    x0: np.ndarray
    m0: np.ndarray
    v0: np.ndarray
    lr: float
    beta1: float
    beta2: float
    eps: float
    sigma: float
    v_scale: float
    k0: int
    weights: np.ndarray
    law: int
    shape: float


@njit(error_model="numpy", fastmath={"contract"})
def _linear(A, b, X, out):
    """out <- A X + b, all (d, LANES)."""
    d = A.shape[0]
    for i in range(d):
        for k in range(LANES):
            out[i, k] = b[i] + A[i, 0] * X[0, k]
        for j in range(1, d):
            if A[i, j] != 0.0:
                for k in range(LANES):
                    out[i, k] += A[i, j] * X[j, k]


@njit(inline="always", error_model="numpy", fastmath={"contract"})
def _drift(p, i, t, G, M, U, aX, aM, aU, bX):
    """Coordinate i of the SDEs (paper, Def. 4.1 and its Adam twin): drifts aX, aM, aU, and bX, the factor of (S dW) in
    theta (that of m is s0 c1)."""
    s0, e0, c1, c2, var = p.s0, p.e0, p.c1, p.c2, p.var[i]
    if p.algo == RMSPROP:
        for k in range(LANES):
            q = 1.0 / (s0 * math.sqrt(U[k]) + e0)
            aX[k] = -q * G[k]
            bX[k] = -q * s0
            aU[k] = c2 * (var - U[k])
    elif p.algo == ADAM:
        g1, root2 = -math.expm1(-c1 * t), math.sqrt(-math.expm1(-c2 * t))
        for k in range(LANES):
            aX[k] = -(root2 / g1) / (s0 * math.sqrt(U[k]) + e0 * root2) * M[k]
            bX[k] = 0.0
            aM[k] = c1 * (G[k] - M[k])
            aU[k] = c2 * (var - U[k])
    else:
        for k in range(LANES):
            aX[k] = -G[k]
            bX[k] = -s0


@njit(inline="always", error_model="numpy", fastmath={"contract"})
def _euler_rmsprop(p, i, dt, G, SW, X, U):
    """`_drift` and `_advance` of RMSprop in one loop: the case that is timed."""
    s0, e0, c2, var = p.s0, p.e0, p.c2, p.var[i]
    for k in range(LANES):
        X[k] -= (G[k] * dt + s0 * SW[k]) / (s0 * math.sqrt(U[k]) + e0)
        U[k] += c2 * dt * (var - U[k])


@njit(inline="always", error_model="numpy", fastmath={"contract"})
def _advance(p, dt, SW, aX, aM, aU, bX, X, M, U):
    sm = p.s0 * p.c1
    for k in range(LANES):
        X[k] += aX[k] * dt + bX[k] * SW[k]
    if p.algo != SGD:
        for k in range(LANES):
            U[k] += aU[k] * dt
    if p.algo == ADAM:
        for k in range(LANES):
            M[k] += aM[k] * dt + sm * SW[k]


@njit(error_model="numpy", fastmath={"contract"})
def _average(a, c):
    for k in range(LANES):
        a[k] = 0.5 * (a[k] + c[k])


@njit(parallel=True, cache=True, error_model="numpy", fastmath={"contract"})
def sde(p, level, observe, seed, first, two_point, heun, out):
    """Walk out.shape[2] paths (a multiple of LANES) of one SDE with dt = 2^-level; out (observations, 3 d, paths).

    two_point: increments +-sqrt(dt) (weak order as with normals, not refinable). heun: trapezoidal drift and
    diffusion coefficient, weak order 2 here because Sigma is constant, so the noise enters additively.
    """
    d, steps = p.b.shape[0], observe[-1]
    dt = 2.0**-level
    zero = np.zeros(d)
    for block in prange(out.shape[2] // LANES):
        keys = np.empty(HALF, np.uint64)
        block_keys(seed, TWO_POINT if two_point else BROWNIAN, first + block, keys)
        X, M, U = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES))
        Y, N, V = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES))
        G, W, SW, z = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES)), np.empty(LANES)
        aX, aM, aU, bX = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES))
        cX, cM, cU, eX = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES))
        right = np.empty((d, level + 1, LANES))
        for i in range(d):
            X[i], M[i], U[i] = p.x0[i], p.m0[i], p.u0[i]
        seen = 0
        for step in range(steps + 1):
            if seen < observe.shape[0] and observe[seen] == step:
                lanes = out[seen, :, block * LANES : (block + 1) * LANES]
                lanes[:d], lanes[d : 2 * d], lanes[2 * d :] = X, M, U
                seen += 1
            if step == steps:
                break
            for i in range(d):
                if two_point:
                    signs(keys, step * d + i, W[i])
                    for k in range(LANES):
                        W[i, k] *= math.sqrt(dt)
                else:
                    next_increment(keys, step, level, i, right[i], W[i], z)
            _linear(p.S, zero, W, SW)
            _linear(p.H, p.b, X, G)
            t = p.t0 + step * dt
            if p.algo == RMSPROP and not heun:
                for i in range(d):
                    _euler_rmsprop(p, i, dt, G[i], SW[i], X[i], U[i])
                continue
            for i in range(d):
                _drift(p, i, t, G[i], M[i], U[i], aX[i], aM[i], aU[i], bX[i])
            if heun:
                Y[:], N[:], V[:] = X, M, U
                for i in range(d):
                    _advance(p, dt, SW[i], aX[i], aM[i], aU[i], bX[i], Y[i], N[i], V[i])
                _linear(p.H, p.b, Y, G)
                for i in range(d):
                    _drift(p, i, t + dt, G[i], N[i], V[i], cX[i], cM[i], cU[i], eX[i])
                    _average(aX[i], cX[i])
                    _average(aM[i], cM[i])
                    _average(aU[i], cU[i])
                    _average(bX[i], eX[i])
            for i in range(d):
                _advance(p, dt, SW[i], aX[i], aM[i], aU[i], bX[i], X[i], M[i], U[i])


@njit(inline="always", error_model="numpy", fastmath={"contract"})
def _update(p, bias1, bias2, frozen, X, M, V, G):
    """One step of one coordinate (paper, Defs. 2.3 and 2.4). `frozen` < 0: the optimizer (OLD v, eps outside the root,
    NEW m); otherwise `frozen` stands for lr / (bias1 (sqrt(v / bias2) + eps)), and the step is linear."""
    algo, lr, beta1, beta2, eps = p.algo, p.lr, p.beta1, p.beta2, p.eps
    for k in range(LANES):
        if algo == ADAM:
            M[k] += (1.0 - beta1) * (G[k] - M[k])
        a = frozen
        if frozen < 0.0:
            a = lr
            if algo == RMSPROP:
                a = lr / (math.sqrt(V[k]) + eps)
            elif algo == ADAM:
                a = lr / (bias1 * (math.sqrt(V[k] / bias2) + eps))
        X[k] -= a * (M[k] if algo == ADAM else G[k])
        if algo != SGD:
            V[k] = beta2 * V[k] + (1.0 - beta2) * G[k] * G[k]


@njit(parallel=True, cache=True, error_model="numpy", fastmath={"contract"})
def discrete(p, frozen, observe, seed, first, out):
    """Walk out.shape[2] paths of one optimizer on g = H x + b + sigma sum_j weights_j S xi_j.

    frozen (steps, d): the step factors of the twin that sees the same draws but never its own v; its moments
    are known exactly, which makes it the control variate. out (observations, 6 d, paths), u = v / v_scale.
    """
    d, weights = p.b.shape[0], p.weights
    zero = np.zeros(d)
    steps = frozen.shape[0]
    for block in prange(out.shape[2] // LANES):
        keys = np.empty(HALF, np.uint64)
        block_keys(seed, DRAW, first + block, keys)
        X, M, V = np.empty((2, d, LANES)), np.empty((2, d, LANES)), np.empty((2, d, LANES))
        G, xi, z = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES))
        draw = np.empty(LANES)
        for twin in range(2):
            for i in range(d):
                X[twin, i], M[twin, i], V[twin, i] = p.x0[i], p.m0[i], p.v0[i]
        seen = 0
        for step in range(steps + 1):
            if seen < observe.shape[0] and observe[seen] == step:
                for twin in range(2):
                    lanes = out[seen, 3 * d * twin : 3 * d * (twin + 1), block * LANES : (block + 1) * LANES]
                    lanes[:d], lanes[d : 2 * d], lanes[2 * d :] = X[twin], M[twin], V[twin] / p.v_scale
                seen += 1
            if step == steps:
                break
            for i in range(d):
                for j in range(weights.shape[0]):
                    noise(p.law, p.shape, keys, ((step * weights.shape[0] + j) << 8) | i, draw)
                    for k in range(LANES):
                        xi[i, k] = p.sigma * weights[j] * draw[k] + (xi[i, k] if j else 0.0)
            _linear(p.S, zero, xi, z)
            bias1 = 1.0 - p.beta1 ** (p.k0 + step + 1)
            bias2 = 1.0 - p.beta2 ** (p.k0 + step)
            for twin in range(2):
                _linear(p.H, p.b, X[twin], G)
                for i in range(d):
                    for k in range(LANES):
                        G[i, k] += z[i, k]
                    f = frozen[step, i] if twin else -1.0
                    _update(p, bias1, bias2, f, X[twin, i], M[twin, i], V[twin, i], G[i])
