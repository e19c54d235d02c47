# mypy: disable-error-code="no-any-return"

"""The optimizers on an oracle, over many paths at once.

`run` drives the very classes that train networks (`optim.PaperRMSprop`, `optim.PaperAdam`, `torch.optim.SGD`).
`run_fused` does the same on a quadratic in one compiled loop, with the same draws, plus the frozen twin; tests
hold the two equal to rounding. A path's draws are functions of (seed, path, step), so runs are extended by
asking for further paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from scaling_exps import optim
from scaling_exps.theory import kernels
from scaling_exps.theory.keyed import LANES, LAWS, brownian, dyadic_level
from scaling_exps.theory.oracles import apply
from scaling_exps.theory.problem import ALGORITHMS, Chain, Problem

Array = np.ndarray
Draw = Callable[[Array, int], Array]


def run(
    problem: Problem,
    chain: Chain,
    observe: Sequence[int],
    *,
    paths: int,
    seed: int,
    first: int = 0,
    draw: Draw | None = None,
) -> Array:
    """States (observations, 3 d, paths) = theta, m, u of the real optimizer classes.

    Args:
        chain: from `Problem.discretise`, then perhaps through a rule or SVAG.
        observe: increasing step numbers, 0 .. chain.steps.
        paths, first: paths first .. first+paths-1.
        draw: (x, step) -> g, instead of the oracle's own draws (common random numbers with an SDE).
    """
    o, (x0, m0, u0) = problem.oracle, problem.start
    hyper, weights, v_scale = chain.hyper, chain.weights, chain.u_scale**2
    x = torch.tensor(np.tile(x0, (paths, 1))).requires_grad_()  # (N, d) float64
    full = [torch.tensor(np.tile(a, (paths, 1))) for a in (m0, v_scale * u0)]
    optimizer: torch.optim.Optimizer
    if problem.algorithm == "rmsprop":
        optimizer = optim.build("paper_rmsprop", [x], hyper)
        optimizer.state[x]["v"] = full[1]
    elif problem.algorithm == "adam":
        optimizer = optim.build("paper_adam", [x], hyper)
        optimizer.state[x].update(m=full[0], v=full[1])
        optimizer.param_groups[0]["k"] = chain.k0
    else:
        optimizer = optim.build("sgd", [x], hyper)
    out = []
    with one_torch_thread():
        for k in range(chain.steps + 1):
            if k in observe:
                m, v = (optimizer.state[x].get(name, full[i]) for i, name in enumerate("mv"))
                out.append(torch.cat([x.detach(), m, v / v_scale], 1).numpy().T.copy())
            if k == chain.steps:
                break
            at = x.detach().numpy()
            if draw is not None:
                g = draw(at, k)
            else:
                n = len(weights)
                g = sum(w * o.draw(at, chain.sigma, seed, first, k * n + j) for j, w in enumerate(weights))
            x.grad = torch.from_numpy(np.ascontiguousarray(g))
            optimizer.step()
    return np.stack(out)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small tensors, many steps: torch's threads beside numba's cost more than they give. Restored on exit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_fused(
    problem: Problem, chain: Chain, factors: Array, observe: Array, *, blocks: int, first_block: int, seed: int
) -> Array:
    """As `run`, on a quadratic, for blocks of LANES paths: (observations, 6 d, paths); the twin's states last.

    factors (steps, d): of `exact.frozen_twin`.
    """
    o, (x0, m0, u0) = problem.oracle, problem.start
    d, hyper = o.dim, chain.hyper
    out = np.empty((len(observe), 6 * d, blocks * LANES))
    parameters = kernels.Steps(
        algo=ALGORITHMS.index(problem.algorithm), H=np.ascontiguousarray(o.H), b=o.b,
        S=np.ascontiguousarray(o.root(np.zeros((1, d)))), x0=x0, m0=m0, v0=chain.u_scale**2 * u0,
        lr=hyper.lr, beta1=float(hyper.betas[0]), beta2=float(hyper.betas[-1]), eps=hyper.eps,
        sigma=chain.sigma, v_scale=chain.u_scale**2, k0=chain.k0, weights=np.array(chain.weights, float),
        law=LAWS.index(o.noise.law), shape=o.noise.shape(chain.sigma),
    )  # fmt: skip
    observe = np.asarray(observe, np.int64)
    kernels.discrete(parameters, np.ascontiguousarray(factors), observe, seed, first_block, out)
    return out


def coupled_draw(problem: Problem, sigma: float, step: float, seed: int, first: int, paths: int) -> Draw:
    """Gaussian draws made of the SDE's own Brownian path, for any oracle: g = grad f + sigma R dW / sqrt(step).

    `step` must be a power of two, 2^-level.
    """
    level = dyadic_level(step)

    def draw(x: Array, k: int) -> Array:
        R = problem.oracle.root(x)  # (d, r) or (N, d, r)
        dW = brownian(seed, first, paths, R.shape[-1], level, k) / step**0.5
        return np.asarray(problem.oracle.grad(x) + sigma * apply(R, dW))

    return draw
