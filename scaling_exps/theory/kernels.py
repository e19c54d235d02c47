# mypy: disable-error-code="no-untyped-def,no-any-return"

"""Fused loops over paths for quadratic oracles: f(x) = x.Hx/2 + b.x, noise z = S xi with S = Sigma^(1/2).

Coordinates are few and paths are many, so a kernel keeps LANES paths in cache, walks them through all steps,
and runs the blocks in parallel. Memory: the states asked for, and O(LANES) a thread; never O(steps x paths).
The classes that train networks remain the reference: tests hold `discrete` equal to them step for step.

    state     theta, m, u of a block's paths (of an optimizer v = v_scale u in place of u)    (3, d, LANES)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from scaling_exps.theory import keyed
from scaling_exps.theory.keyed import LANES

RMSPROP, ADAM, SGD = 0, 1, 2


class Gradient(NamedTuple):
    """A quadratic oracle: H and S (d, d), b (d,)."""

    H: np.ndarray
    b: np.ndarray
    S: np.ndarray


class Flow(NamedTuple):
    """An SDE: the algorithm and the constants of `Problem`."""

    algo: int
    sigma0: float
    eps0: float
    c1: float
    c2: float
    t0: float


class Steps(NamedTuple):
    """An optimizer: the algorithm, its hyperparameters, v_scale = v / u, and the draws of a step (`keyed.noise`)."""

    algo: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    k0: int
    v_scale: float
    sigma: float
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


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def euler(p, t, dt, G, noise, var, state, out):
    """out <- the state (3, d, N) after one Euler-Maruyama step: paper, Def. 4.1, and its Adam twin.

    Args:
        p: a `Flow`. G, noise, var: grad f, R dW and diag Sigma at `state`, (d, N).
    """
    s0, scale, root2 = p.sigma0, 1.0, 1.0
    if p.algo == ADAM:
        root2 = math.sqrt(-math.expm1(-p.c2 * t))
        scale = root2 / -math.expm1(-p.c1 * t)
    for i in range(G.shape[0]):
        for k in range(G.shape[1]):
            x, m, u, dW = state[0, i, k], state[1, i, k], state[2, i, k], s0 * noise[i, k]
            q = 1.0 if p.algo == SGD else s0 * math.sqrt(u) + p.eps0 * root2
            out[0, i, k] = x - (scale * m * dt if p.algo == ADAM else G[i, k] * dt + dW) / q
            out[1, i, k] = m + p.c1 * ((G[i, k] - m) * dt + dW) if p.algo == ADAM else m
            out[2, i, k] = u + p.c2 * dt * (var[i, k] - u) if p.algo != SGD else u


@njit(parallel=True, cache=True, error_model="numpy", fastmath={"contract"})
def sde(p, g, start, level, observe, seed, first, two_point, heun, out):
    """Walk out.shape[2] paths (a multiple of LANES) of one SDE with dt = 2^-level; out (observations, 3 d, paths).

    two_point: increments +-sqrt(dt) (weak order as with normals, not refinable). heun: halfway between where a step
    begins and where two Euler steps on its dW lead; weak order 2, as Sigma is constant and the noise additive.
    """
    d, dt, zero = g.b.shape[0], 2.0**-level, np.zeros(g.b.shape[0])
    var = np.empty((d, LANES))
    var[:] = (g.S * g.S).sum(1).reshape(d, 1)
    for block in prange(out.shape[2] // LANES):
        keys = keyed.block_keys(seed, keyed.TWO_POINT if two_point else keyed.BROWNIAN, first + block)
        state, ahead, after = np.empty((3, d, LANES)), np.empty((3, d, LANES)), np.empty((3, d, LANES))
        G, W, SW, z = np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES)), np.empty(LANES)
        right = np.empty((d, level + 1, LANES))
        state[:] = start.reshape(3, d, 1)
        seen = 0
        for step in range(observe[-1] + 1):
            if observe[seen] == step:
                out[seen, :, block * LANES : (block + 1) * LANES] = state.reshape(3 * d, LANES)
                seen += 1
            if seen == observe.shape[0]:
                break
            for i in range(d):
                if two_point:
                    keyed.signs(keys, step * d + i, W[i])
                else:
                    keyed.increment(keys, step, level, i, keyed.branching(step, level), right[i], W[i], z)
            if two_point:
                W *= math.sqrt(dt)
            _linear(g.S, zero, W, SW)
            _linear(g.H, g.b, state[0], G)
            euler(p, p.t0 + step * dt, dt, G, SW, var, state, ahead)
            if heun:
                _linear(g.H, g.b, ahead[0], G)
                euler(p, p.t0 + (step + 1) * dt, dt, G, SW, var, ahead, after)
                ahead[:] = 0.5 * (state + after)
            state, ahead = ahead, state


@njit(parallel=True, cache=True, error_model="numpy", fastmath={"contract"})
def discrete(p, g, start, frozen, observe, seed, first, out):
    """Walk out.shape[2] paths of one optimizer on g = H x + b + sigma sum_j weights_j S xi_j (paper, Defs. 2.3, 2.4).

    frozen (steps, d): the step factors of the twin that sees the same draws but never its own v; its moments
    are known exactly, which makes it the control variate. out (observations, 6 d, paths), u = v / v_scale.
    """
    d, n, zero = g.b.shape[0], p.weights.shape[0], np.zeros(g.b.shape[0])
    for block in prange(out.shape[2] // LANES):
        keys = keyed.block_keys(seed, keyed.DRAW, first + block)
        state, G, xi, z = np.empty((2, 3, d, LANES)), np.empty((d, LANES)), np.empty((d, LANES)), np.empty((d, LANES))
        draw = np.empty(LANES)
        state[:] = start.reshape(3, d, 1)
        seen = 0
        for step in range(observe[-1] + 1):
            if observe[seen] == step:
                lanes = out[seen, :, block * LANES : (block + 1) * LANES]
                lanes[:] = state.reshape(6 * d, LANES)
                lanes[2 * d : 3 * d] /= p.v_scale
                lanes[5 * d :] /= p.v_scale
                seen += 1
            if seen == observe.shape[0]:
                break
            xi[:] = 0.0
            for i in range(d):
                for j in range(n):
                    keyed.noise(p.law, p.shape, keys, ((step * n + j) << 8) | i, draw)
                    xi[i] += p.sigma * p.weights[j] * draw
            _linear(g.S, zero, xi, z)
            bias1 = 1.0 - p.beta1 ** (p.k0 + step + 1) if p.algo == ADAM else 1.0
            bias2 = 1.0 - p.beta2 ** (p.k0 + step) if p.algo == ADAM else 1.0
            for twin in range(2):
                X, M, V = state[twin, 0], state[twin, 1], state[twin, 2]
                _linear(g.H, g.b, X, G)
                for i in range(d):
                    for k in range(LANES):
                        gradient = G[i, k] + z[i, k]
                        if p.algo == ADAM:
                            M[i, k] += (1.0 - p.beta1) * (gradient - M[i, k])
                        if twin:
                            a = frozen[step, i]
                        elif p.algo == SGD:
                            a = p.lr
                        else:  # the OLD v, eps outside the root, the NEW m
                            a = p.lr / (bias1 * (math.sqrt(V[i, k] / bias2) + p.eps))
                        X[i, k] -= a * (M[i, k] if p.algo == ADAM else gradient)
                        if p.algo != SGD:
                            V[i, k] = p.beta2 * V[i, k] + (1.0 - p.beta2) * gradient * gradient
