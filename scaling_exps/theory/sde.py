"""SDE simulators (paper, arXiv 2205.10287: Def. 4.1 and its Adam twin in section 4), and Euler-Maruyama for any SDE.

    RMSprop  dtheta = -P^-1 (grad f dt + sigma0 R dW),  du = c2 (diag Sigma - u) dt,  P = sigma0 sqrt(u) + eps0
    Adam     dtheta = -(sqrt(g2)/g1) P^-1 m dt,  dm = c1 (grad f - m) dt + sigma0 c1 R dW,  du as above,
             P = sigma0 sqrt(u) + eps0 sqrt(g2),  g_i = 1 - exp(-c_i t)
    SGD      dtheta = -grad f dt - sigma0 R dW

The Brownian path is a function of (seed, path, dyadic time): a smaller dt refines the same path.
Schemes: "euler" (weak order 1; strong order 1 where the noise is additive, 1/2 otherwise) and, where Sigma is
constant, "heun" (weak order 2). Increments: "normal", or "two_point" where only a weak error is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from scaling_exps.theory import kernels
from scaling_exps.theory.keyed import LANES, brownian, dyadic_level
from scaling_exps.theory.oracles import apply
from scaling_exps.theory.problem import ALGORITHMS, Problem

Array = np.ndarray


def simulate(
    problem: Problem,
    dt: float,
    times: Array,
    *,
    paths: int,
    seed: int,
    first: int = 0,
    scheme: str = "euler",
    increments: str = "normal",
) -> Array:
    """States (observations, 3 d, paths) = theta, m, u of the SDE at `times` after t0.

    Quadratic oracles take the fused loop, others the plain one (normal increments and Euler only).

    Args:
        dt: 1, 1/2, 1/4, ...
        times: increasing multiples of dt.
        paths, first: paths first .. first+paths-1; for the fused loop `first` is a multiple of 256.
        scheme: "euler" or "heun". increments: "normal" or "two_point".

    Raises:
        ValueError: a step that is not dyadic, times off its grid, a scheme that the oracle does not allow.
    """
    level = dyadic_level(dt)
    observe = np.array([problem.steps(dt, t) if t else 0 for t in times], np.int64)
    if scheme not in ("euler", "heun") or increments not in ("normal", "two_point"):
        raise ValueError(
            f"scheme={scheme!r}, increments={increments!r} were given; allowed: euler or heun, normal or two_point"
        )
    if not problem.quadratic:
        if scheme != "euler" or increments != "normal":
            raise ValueError(
                f"scheme={scheme!r} with {increments!r} increments was given for {type(problem.oracle).__name__}; "
                f"allowed for a general oracle: euler, normal; or use a Quadratic"
            )
        return _plain(problem, level, observe, paths, seed, first)
    if first % LANES:
        raise ValueError(f"first={first} was given; allowed: multiples of {LANES}; start at {first // LANES * LANES}")
    o, d = problem.oracle, problem.oracle.dim
    S = np.ascontiguousarray(o.root(np.zeros((1, d))))
    x0, m0, u0 = problem.start
    out = np.empty((len(observe), 3 * d, -(-paths // LANES) * LANES))
    parameters = kernels.Flow(
        algo=ALGORITHMS.index(problem.algorithm), H=np.ascontiguousarray(o.H), b=o.b, S=S,
        var=np.diag(S @ S.T).copy(), x0=x0, m0=m0, u0=u0, s0=problem.sigma0, e0=problem.eps0,
        c1=problem.c1, c2=problem.c2, t0=problem.t0,
    )  # fmt: skip
    kernels.sde(parameters, level, observe, seed, first // LANES, increments == "two_point", scheme == "heun", out)
    return out[:, :, :paths]


def _plain(problem: Problem, level: int, observe: Array, paths: int, seed: int, first: int) -> Array:
    o, dt = problem.oracle, 2.0**-level
    s0, e0, c1, c2 = problem.sigma0, problem.eps0, problem.c1, problem.c2
    x, m, u = (np.tile(a, (paths, 1)) for a in problem.start)
    out = []
    for k in range(int(observe[-1]) + 1):
        if k in observe:
            out.append(np.concatenate([x, m, u], 1).T)
        if k == observe[-1]:
            break
        t = problem.t0 + k * dt
        R, g = o.root(x), o.grad(x)
        noise = s0 * apply(R, brownian(seed, first, paths, R.shape[-1], level, k))
        var = (R * R).sum(-1)  # diag Sigma
        if problem.algorithm == "sgd":
            x = x - g * dt - noise
            continue
        if problem.algorithm == "rmsprop":
            x = x - (g * dt + noise) / (s0 * np.sqrt(u) + e0)
        else:
            g1, root2 = -math.expm1(-c1 * t), math.sqrt(-math.expm1(-c2 * t))
            x = x - root2 / g1 * m / (s0 * np.sqrt(u) + e0 * root2) * dt
            m = m + c1 * (g - m) * dt + c1 * noise
        u = u + c2 * (var - u) * dt
    return np.stack(out)


def euler_maruyama(
    drift: Callable[[float, Array], Array],
    diffusion: Callable[[float, Array], Array],
    x0: float,
    horizon: float,
    level: int,
    *,
    paths: int,
    seed: int,
) -> tuple[Array, Array]:
    """(X_T, W_T) of dX = drift(t, X) dt + diffusion(t, X) dW, coordinates independent: (paths,) each.

    The integrator by itself, for problems whose solution is a known function of W.
    """
    dt = 2.0**-level
    x, w = np.full(paths, float(x0)), np.zeros(paths)
    for k in range(round(horizon / dt)):
        dW = brownian(seed, 0, paths, 1, level, k)[:, 0]
        x = x + drift(k * dt, x) * dt + diffusion(k * dt, x) * dW
        w += dW
    return x, w
