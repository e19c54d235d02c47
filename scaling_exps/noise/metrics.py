"""Gradient noise in the metric of the optimizer's step, beside the Euclidean one: NoiseProbe(metric=...).

    preconditioned  of P g, P = 1/(√v̂ + ε) of the coming step; unbiased as the Euclidean one is
    sign            experimental: (Σ_i σ_i)² / ‖∇f‖₁², σ_i the spread of entry i of one example's gradient
    spectral        experimental, for Muon: (Σ_W tr √C_W)² / (Σ_W ‖∇_W f‖_*)², C_W = E (G - ∇)(G - ∇)ᵀ of one example's
                    gradient G of a matrix W, on its shorter side; other parameters do not count

The last two take the dual norms of the steps (Naganuma et al. 2026, 2602.03001; definitions from their published code).
No norm of a mean has an unbiased estimate: ‖ĝ‖ is too large, so that of one step B_noise is at most π/2 batches where
noise leads, whatever it is. Here ‖∇f‖ of a window lies between two ends, each with its 95% margin:

    mean_t <D, ĝ_t> ≤ ‖∇f‖ ≤ ‖mean_t ĝ_t‖ in expectation,   D the dual direction (signs, U Vᵀ) of the window before
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_exps.noise.estimators import Estimate, Value

METRICS = ("preconditioned", "sign", "spectral")


class DualNoise:
    """Sums over a window's steps, four tensors a parameter, and what they say about the noise in a dual norm.

    Args:
        params: whole ones; each rank's are the same.
        spectral: of the nuclear norm over matrices, else the 1-norm.
        world: ranks, whose mean is the step's gradient.
    """

    def __init__(self, params: Iterable[Tensor], spectral: bool, world: int) -> None:
        self._spectral, self._world = spectral, world
        params = [p for p in params if p.ndim > 1 or not spectral]
        self._step = {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params}
        self._mean = {p: torch.zeros_like(x) for p, x in self._step.items()}
        self._spread = {p: torch.zeros_like(self._square(x)) for p, x in self._step.items()}
        self._direction: dict[Tensor, Tensor] = {}

    def hear(self, p: Tensor, h: Tensor) -> None:
        """One part of a step's gradient, a share of its sum."""
        if p in self._step:
            self._step[p] += h
            self._spread[p] += self._square(h.to(self._step[p].dtype))

    def after_step(self, parts: int) -> Tensor:
        """<D, ĝ> of a step of so many parts on this rank; 0 in the first window."""
        along = torch.zeros(())
        for p, g in self._step.items():
            self._spread[p] -= self._square(g) / parts
            self._mean[p] += g
            if self._direction:
                along = along + (self._direction[p] * g).sum()
            g.zero_()
        return along

    def estimate(self, along: Tensor, trace: Value, parts: int, unit: float) -> Estimate | None:
        """Over the window; None in the first one.

        Args:
            along: <D, ĝ> of its steps, (steps,), averaged over ranks.
            trace: the Euclidean tr Σ, whose relative interval serves for the squared norm of the spreads.
            parts: of a step, on a rank.
            unit: examples of each.
        """
        n = len(along)
        if not self._direction or n < 3 or parts < 2 or not trace.low > 0:
            return None
        from scipy.special import stdtrit

        spread = sum(self._root(self._over_ranks(s)) for s in self._spread.values())
        noise = unit * parts**2 / (parts - 1) / n * float(spread) ** 2
        upper = float(sum(self._norm(self._over_ranks(m)) for m in self._mean.values())) / n
        margin = float(stdtrit(n - 1, 0.975) * along.std() / math.sqrt(n))
        lower = min(float(along.mean()), upper)
        low, high, middle = max(0.0, lower - margin), upper + margin, max(0.0, lower + upper) / 2
        t = Value(noise, noise * trace.low / trace.value, noise * trace.high / trace.value)
        u = Value(middle**2, low**2, high**2)
        return Estimate(t, u, Value(u.value / t.value, u.low / t.high, u.high / t.low), n, round(n * unit * parts))

    def renew(self) -> None:
        """Begin a window, with the direction of the one that ends."""
        self._direction = {p: self._dual(self._over_ranks(m)) for p, m in self._mean.items()}
        for sums in (*self._mean.values(), *self._spread.values()):
            sums.zero_()

    def _over_ranks(self, x: Tensor) -> Tensor:
        x = x / self._world
        if self._world > 1:
            dist.all_reduce(x)
        return x

    def _square(self, g: Tensor) -> Tensor:
        if not self._spectral:
            return g * g
        m = g.flatten(1)
        return m @ m.mT if len(m) <= m.shape[1] else m.mT @ m

    def _root(self, square: Tensor) -> Tensor:
        """Σ σ or tr √C; rounding below 0 is cut off."""
        return (torch.linalg.eigvalsh(square) if self._spectral else square).clamp(min=0).sqrt().sum()

    def _norm(self, g: Tensor) -> Tensor:
        return torch.linalg.svdvals(g.flatten(1)).sum() if self._spectral else g.abs().sum()

    def _dual(self, g: Tensor) -> Tensor:
        """D with <D, g> = ‖g‖ and <D, x> ≤ ‖x‖ for every x."""
        if not self._spectral:
            return g.sign()
        u, _, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
        return (u @ vh).view_as(g)
