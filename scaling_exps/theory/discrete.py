# mypy: disable-error-code="no-any-return"

"""The optimizers on an oracle, over many paths at once.

`run` drives the very classes that train networks (`optim.PaperRMSprop`, `optim.PaperAdam`, `torch.optim.SGD`).
`run_fused` does the same on a quadratic in one compiled loop, with the same draws, plus the frozen twin; tests
hold the two equal to rounding. A path's draws are functions of (seed, path, step), so runs are extended by
asking for further paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from scaling_exps import optim
from scaling_exps.theory import kernels
from scaling_exps.theory.keyed import LANES, LAWS
from scaling_exps.theory.problem import ALGORITHMS, Chain, Problem

Array = np.ndarray
Draw = Callable[[Array, int], Array]


def run(
    problem: Problem, chain: Chain, observe: Sequence[int], *, paths: int, seed: int, first: int = 0,
    draw: Draw | None = None,
) -> Array:  # fmt: skip
    """States (observations, 3 d, paths) = theta, m, u of the real optimizer classes.

    Args:
        chain: from `Problem.discretise`, then perhaps through a rule or SVAG.
        observe: increasing step numbers, 0 .. chain.steps.
        paths, first: paths first .. first+paths-1.
        draw: (x, step) -> g, instead of the oracle's own draws (common random numbers with an SDE).
    """
    o, weights, v_scale = problem.oracle, chain.weights, chain.u_scale**2
    x, m, u = (torch.tensor(np.tile(a, (paths, 1))) for a in problem.start)  # (N, d) float64
    x.requires_grad_()
    name = {"rmsprop": "paper_rmsprop", "adam": "paper_adam", "sgd": "sgd"}[problem.algorithm]
    optimizer = optim.build(name, [x], chain.hyper)
    state = optimizer.state[x]
    state |= {"m": m, "v": v_scale * u}  # each class takes what it knows
    if problem.algorithm == "adam":
        optimizer.param_groups[0]["k"] = chain.k0
    out = []
    with threadpool_limits(1, "openmp"):  # small tensors, many steps: torch's threads cost more than they give
        for k in range(chain.steps + 1):
            if k in observe:
                out.append(torch.cat([x.detach(), state["m"], state["v"] / v_scale], 1).numpy().T.copy())
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


def run_fused(
    problem: Problem, chain: Chain, factors: Array, observe: Array, *, blocks: int, first_block: int, seed: int
) -> Array:
    """As `run`, on a quadratic, for blocks of LANES paths: (observations, 6 d, paths); the twin's states last.

    factors (steps, d): of `exact.frozen_twin`.
    """
    o, hyper = problem.oracle, chain.hyper
    out = np.empty((len(observe), 6 * o.dim, blocks * LANES))
    steps = kernels.Steps(
        algo=ALGORITHMS.index(problem.algorithm), lr=hyper.lr, beta1=hyper.betas[0], beta2=hyper.betas[-1],
        eps=hyper.eps, k0=chain.k0, v_scale=chain.u_scale**2, sigma=chain.sigma, weights=np.array(chain.weights),
        law=LAWS.index(o.noise.law), shape=o.noise.shape(chain.sigma),
    )  # fmt: skip
    start = problem.start * [[1.0], [1.0], [steps.v_scale]]
    kernels.discrete(steps, o.arrays, start, factors, np.asarray(observe), seed, first_block, out)
    return out
