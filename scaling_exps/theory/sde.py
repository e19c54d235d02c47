"""SDE simulators (paper, arXiv 2205.10287: Def. 4.1 and its Adam twin in section 4), and Euler-Maruyama for any SDE.

    RMSprop  dtheta = -P^-1 (grad f dt + sigma0 R dW),  du = c2 (diag Sigma - u) dt,  P = sigma0 sqrt(u) + eps0
    Adam     dtheta = -(sqrt(g2)/g1) P^-1 m dt,  dm = c1 (grad f - m) dt + sigma0 c1 R dW,  du as above,
             P = sigma0 sqrt(u) + eps0 sqrt(g2),  g_i = 1 - exp(-c_i t)
    SGD      dtheta = -grad f dt - sigma0 R dW

A smaller dt refines the same Brownian path (`keyed`).
Schemes: "euler" (weak order 1; strong order 1 where the noise is additive, 1/2 otherwise) and, where Sigma is
constant, "heun" (weak order 2). Increments: "normal", or "two_point" where only a weak error is wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scaling_exps.theory import kernels
from scaling_exps.theory.keyed import LANES, brownian, dyadic_level
from scaling_exps.theory.oracles import apply
from scaling_exps.theory.problem import ALGORITHMS, Problem

Array = np.ndarray


def simulate(
    problem: Problem, dt: float, times: Array, *, paths: int, seed: int, first: int = 0, scheme: str = "euler",
    increments: str = "normal",
) -> Array:  # fmt: skip
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
    observe = np.array([problem.steps(dt, t) for t in times], np.int64)
    if scheme not in ("euler", "heun") or increments not in ("normal", "two_point"):
        raise ValueError(
            f"scheme={scheme!r}, increments={increments!r} were given; allowed: euler or heun, normal or two_point"
        )
    d, start = problem.oracle.dim, problem.start
    flow = kernels.Flow(
        ALGORITHMS.index(problem.algorithm), problem.sigma0, problem.eps0, problem.c1, problem.c2, problem.t0
    )
    if problem.quadratic:
        if first % LANES:
            raise ValueError(
                f"first={first} was given; allowed: multiples of {LANES}; start at {first // LANES * LANES}"
            )
        out = np.empty((len(observe), 3 * d, -(-paths // LANES) * LANES))
        heun, two_point = scheme == "heun", increments == "two_point"
        kernels.sde(flow, problem.oracle.arrays, start, level, observe, seed, first // LANES, two_point, heun, out)
        return out[:, :, :paths]
    if scheme != "euler" or increments != "normal":
        raise ValueError(
            f"scheme={scheme!r} with {increments!r} increments was given for {type(problem.oracle).__name__}; "
            f"allowed for a general oracle: euler, normal; or use a Quadratic"
        )
    state = np.repeat(start[:, :, None], paths, axis=2)  # (3, d, N)
    ahead, seen = np.empty_like(state), []
    for k in range(observe[-1] + 1):
        if k in observe:
            seen.append(state.reshape(3 * d, paths).copy())
        if k == observe[-1]:
            break
        x = state[0].T
        R = problem.oracle.root(x)  # (d, r) or (N, d, r)
        noise = apply(R, brownian(seed, first, paths, R.shape[-1], level, k))
        var = np.broadcast_to((R * R).sum(-1), (paths, d))
        kernels.euler(flow, problem.t0 + k * dt, dt, problem.oracle.grad(x).T, noise.T, var.T, state, ahead)
        state, ahead = ahead, state
    return np.stack(seen)


def euler_maruyama(
    drift: Callable[[float, Array], Array], diffusion: Callable[[float, Array], Array], x0: float, horizon: float,
    level: int, *, paths: int, seed: int,
) -> tuple[Array, Array]:  # fmt: skip
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
