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
from scaling_exps.rules import Hyper
from scaling_exps.theory import kernels
from scaling_exps.theory.keyed import KINDS, LANES, brownian
from scaling_exps.theory.problem import ALGORITHMS, Problem

Array = np.ndarray
Draw = Callable[[Array, int], Array]


def start_step(problem: Problem, step: float) -> int:
    """k0: the step counter of a run that starts at t0 (0 except for Adam)."""
    return problem.steps(step, problem.t0) if problem.t0 else 0


def run(
    problem: Problem,
    hyper: Hyper,
    sigma: float,
    steps: int,
    observe: Sequence[int],
    *,
    paths: int,
    seed: int,
    first: int = 0,
    k0: int = 0,
    weights: tuple[float, ...] = (1.0,),
    unit: float | None = None,
    draw: Draw | None = None,
) -> Array:
    """States (observations, 3 d, paths) = theta, m, u = v/unit^2 of the real optimizer classes.

    Args:
        hyper, sigma: from `Problem.discretise`, then perhaps through a rule.
        observe: increasing step numbers, 0 .. steps.
        paths, first: paths first .. first+paths-1.
        k0: Adam's step counter at the start, `start_step`.
        weights: of the independent draws of one step (`rules.svag_weights`).
        unit: noise scale of u, and of the start v = unit^2 u0; sigma if left out (sigma ell under SVAG).
        draw: (x, step) -> g, instead of the oracle's own draws (common random numbers with an SDE).
    """
    o, (x0, m0, u0) = problem.oracle, problem.start
    unit = sigma if unit is None else unit
    x = torch.tensor(np.tile(x0, (paths, 1))).requires_grad_()  # (N, d) float64
    full = [torch.tensor(np.tile(a, (paths, 1))) for a in (m0, unit**2 * u0)]
    optimizer: torch.optim.Optimizer
    if problem.algorithm == "rmsprop":
        optimizer = optim.build("paper_rmsprop", [x], hyper)
        optimizer.state[x]["v"] = full[1]
    elif problem.algorithm == "adam":
        optimizer = optim.build("paper_adam", [x], hyper)
        optimizer.state[x].update(m=full[0], v=full[1])
        optimizer.param_groups[0]["k"] = k0
    else:
        optimizer = optim.build("sgd", [x], hyper)
    out = []
    with one_torch_thread():
        for k in range(steps + 1):
            if k in observe:
                m, v = (optimizer.state[x].get(name, full[i]) for i, name in enumerate("mv"))
                out.append(torch.cat([x.detach(), m, v / unit**2], 1).numpy().T.copy())
            if k == steps:
                break
            at = x.detach().numpy()
            if draw is not None:
                g = draw(at, k)
            else:
                n = len(weights)
                g = sum(w * o.draw(at, sigma, seed, first, k * n + j) for j, w in enumerate(weights))
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
    problem: Problem,
    hyper: Hyper,
    sigma: float,
    factors: Array,
    observe: Array,
    *,
    blocks: int,
    first_block: int,
    seed: int,
    k0: int = 0,
    weights: tuple[float, ...] = (1.0,),
    unit: float | None = None,
) -> Array:
    """As `run`, on a quadratic, for blocks of LANES paths: (observations, 6 d, paths); the twin's states last."""
    o, (x0, m0, u0) = problem.oracle, problem.start
    unit = sigma if unit is None else unit
    d = o.dim
    out = np.empty((len(observe), 6 * d, blocks * LANES))
    kernels.discrete(
        ALGORITHMS.index(problem.algorithm),
        np.ascontiguousarray(o.H),
        o.b,
        np.ascontiguousarray(o.root(np.zeros((1, d)))),
        x0,
        m0,
        unit**2 * u0,
        hyper.lr,
        float(hyper.betas[0]),
        float(hyper.betas[-1]),
        hyper.eps,
        sigma,
        unit,
        k0,
        np.array(weights, float),
        KINDS.index(o.noise.kind),
        o.noise.shape(sigma),
        np.ascontiguousarray(factors),
        np.asarray(observe, np.int64),
        seed,
        first_block,
        out,
    )
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


def apply(R: Array, w: Array) -> Array:
    """R w for every path: R (d, r) or (N, d, r), w (N, r) -> (N, d)."""
    return w @ R.T if R.ndim == 2 else np.einsum("ndr,nr->nd", R, w)


def dyadic_level(step: float) -> int:
    """L with step = 2^-L, 0 <= L; ValueError otherwise."""
    level = round(-np.log2(step)) if step > 0 else -1
    if level < 0 or 2.0**-level != step:
        raise ValueError(f"step={step} was given; allowed: 1, 1/2, 1/4, ... (the Brownian tree is dyadic); nearest one")
    return level
