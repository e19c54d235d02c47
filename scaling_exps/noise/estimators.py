"""Gradient noise: tr Σ and |∇f|² with intervals, from the gradients of disjoint units of examples.

Symbols (paper, section 7):

    g_i       gradient of the mean loss of unit i: `unit` examples, one up to a micro-batch (with BN: its batch)
    T         tr Cov(g_i) = tr Σ / unit                 squared gradient
    U         |∇f|², de-biased: the raw |ḡ|² is T/n too large
    tr Σ      trace of the covariance of ONE example's gradient, unit · T
    r         |∇f|² / (tr Σ / B): signal over noise of a step at batch B, dimensionless
    B_noise   tr Σ / |∇f|² examples: the batch at which r = 1
    P         diagonal of Adam's preconditioner, 1/(√v̂ + ε); the preconditioned form is of P g instead of g

Full estimator, n gradients at one θ:     U = (|Σ g_i|² − Σ|g_i|²) / (n(n−1)),   T = Σ|g_i|²/n − U
Free estimator, a step ĝ = Σ w_i g_i with q = Σ w_i² and Σ w_i = 1 (plain: q = 1/n; SVAG: larger):
    E|g_i|² = U + T,   E|ĝ|² = U + q T   ⇒   T = (|g|² − |ĝ|²)/(1−q),   U = (|ĝ|² − q|g|²)/(1−q)
Both are unbiased; ratios are of averages, never averages of ratios. Units are drawn without replacement, so from
N training images |∇f|² is that of the distribution they stand for: smaller than the training set's by tr Σ/N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUPS = 16  # of the grouped jackknife: bounds the memory of the full estimator to 16 gradients
BLOCK_BYTES = 64 * 2**20  # of per-example gradients held at once
SINGULAR = 0.05  # |1 − q| below this: |g|² and |ĝ|² tell the same, T and U cannot be separated


class NoiseError(ValueError):
    """The estimate is not defined for what was given."""


@dataclass(frozen=True)
class Value:
    """An estimate and its 95% interval; the interval is infinite where there is too little to say."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """Noise and signal over one measurement.

    trace: tr Σ of one example; gradient_sq: de-biased |∇f|²; inverse: |∇f|²/tr Σ = 1/B_noise (1/examples).
    """

    trace: Value
    gradient_sq: Value
    inverse: Value
    units: int  # gradients (full) or steps (free) that it rests on
    examples: int

    @property
    def enough(self) -> bool:
        """Whether B_noise can be told, and not only bounded: |∇f|²/tr Σ to within half of itself.

        One that is only just told from 0 is among the largest that chance makes, and its B_noise among the smallest.
        """
        i = self.inverse
        return self.trace.low > 0 and i.low > i.value / 2 > 0

    def record(self, batch: int) -> dict[str, Any]:
        """The fields of a `noise` record; what means nothing is left out.

        Args:
            batch: of the run, so that `kappa_r` = batch / B_noise. (What that is at the base batch is no part of a
                measurement: a run may be reached from several.)
        """
        i = self.inverse
        kappa_r = Value(i.value * batch, i.low * batch, i.high * batch)
        out: dict[str, Any] = {"units": self.units, "examples": self.examples, "enough": self.enough}
        named = {"trace": self.trace, "gradient_sq": self.gradient_sq, "kappa_r": kappa_r}
        bounds = (1 / end if end > 0 and self.trace.low > 0 else math.inf for end in (i.high, i.low))
        b_noise = Value(1 / i.value if self.enough else math.nan, *bounds)
        named["b_noise"] = b_noise  # its bounds always, itself where it is more than a bound
        for name, v in named.items():
            out |= {name: v.value, f"{name}_low": v.low, f"{name}_high": v.high}
        return {k: v for k, v in out.items() if math.isfinite(v)}


def _three(u: Tensor, t: Tensor, unit: float) -> Tensor:
    """(..., 3): tr Σ, |∇f|², |∇f|²/tr Σ."""
    return torch.stack([t * unit, u, u / (t * unit)], -1)


def _jackknife(whole: Tensor, left_out: Tensor, units: int, examples: int) -> Estimate:
    """From `_three` of everything, (3,), and with each of K groups left out, (K, 3)."""
    from scipy.special import stdtrit

    k, spread = len(left_out), torch.full((3,), math.inf)
    if k >= 3:
        spread = ((left_out - left_out.mean(0)).square().sum(0) * (k - 1) / k).sqrt() * float(stdtrit(k - 1, 0.975))
    trace, gradient_sq, inverse = (
        Value(v, v - s, v + s)
        if math.isfinite(v) and math.isfinite(s)
        else Value(v if k < 3 else math.nan, -math.inf, math.inf)
        for v, s in zip(whole.tolist(), spread.tolist(), strict=True)
    )
    return Estimate(trace, gradient_sq, inverse, units, examples)


def full(
    blocks: Callable[[range], Iterable[Tensor]],
    units: int,
    unit: int,
    scales: list[Tensor | None],
    template: Tensor,
    *,
    world: int = 1,
    rank: int = 0,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Estimate]:
    """Estimates from `units` gradients at one θ, one estimate for each of `scales`.

    Args:
        blocks: for a range of unit numbers, their gradients as matrices (m, P) in order.
        units: how many, over all ranks; >= 2.
        unit: examples in each.
        scales: preconditioners P, flat (P,); None is the identity.
        template: of the flat gradient, (P,) on its device; a rank may have no gradient of its own.
        world, rank: groups of units are shared out over ranks.
        reduce: sums a tensor over ranks.

    Raises:
        NoiseError: fewer than two units: a covariance needs two.
    """
    if units < 2:
        raise NoiseError(f"n={units} gradients: a covariance needs at least 2")
    k = min(GROUPS, units)
    edges = [g * units // k for g in range(k + 1)]
    own_groups = range(rank, k, world)
    sums: dict[int, Tensor] = {}
    squares, lengths = torch.zeros(2, len(scales), k, dtype=torch.float64)  # Σ|P g_i|² of group g, |P(S − S_g)|²
    for g in own_groups:
        for matrix in blocks(range(edges[g], edges[g + 1])):
            total = matrix.sum(0)
            sums[g] = sums[g].add_(total) if g in sums else total
            for s, scale in enumerate(scales):
                squares[s, g] += _length(matrix, scale)
    everything = reduce(torch.stack(list(sums.values())).sum(0) if sums else torch.zeros_like(template))  # (P,)
    for g in own_groups:
        rest = everything - sums.pop(g)
        for s, scale in enumerate(scales):
            lengths[s, g] = _length(rest, scale)
    squares, lengths = reduce(torch.stack([squares, lengths]).to(template.device)).cpu()
    counts = torch.tensor([edges[g + 1] - edges[g] for g in range(k)], dtype=torch.float64)

    def statistics(n: Tensor, q: Tensor, length: Tensor) -> Tensor:
        u = (length - q) / (n * (n - 1))
        return _three(u, q / n - u, unit)

    out = []
    for s, scale in enumerate(scales):
        q, length = squares[s].sum(), torch.tensor(_length(everything, scale), dtype=torch.float64)
        at = statistics(torch.tensor(units, dtype=torch.float64), q, length)
        left_out = statistics(units - counts, q - squares[s], lengths[s])
        out.append(_jackknife(at, left_out, units, units * unit))
    return out


def _length(x: Tensor, scale: Tensor | None) -> float:
    """|P x|²."""
    return float(torch.linalg.vector_norm(x if scale is None else x * scale)) ** 2


def unit_gradients(
    loss: Callable[[Tensor, Tensor], Tensor],
    params: Sequence[Tensor],
    batch: Callable[[int], tuple[Tensor, Tensor]],
    units: range,
    losses: list[Tensor],
) -> Iterator[Tensor]:
    """Gradient of the mean loss of each unit, by one backward pass each: (1, P) a unit.

    Args:
        loss: (inputs, targets) -> mean loss, as training computes it.
        params: what to differentiate by; their `.grad` is not touched.
        batch: unit number -> inputs, targets.
        losses: each unit's loss is appended.
    """
    for i in units:
        value = loss(*batch(i))
        losses.append(value.detach())
        yield torch.cat([g.flatten() for g in torch.autograd.grad(value, params)]).unsqueeze(0)


def example_gradients(
    loss: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor],
    params: Mapping[str, Tensor],
    batch: Callable[[int, int], tuple[Tensor, Tensor]],
    examples: range,
    losses: list[Tensor],
) -> Iterator[Tensor]:
    """Gradient of each single example, in blocks (m, P) by vmap: for networks that do not normalise over a batch.

    Args:
        loss: (parameters by name, images (1, C, H, W), labels (1,)) -> loss.
        batch: first, last + 1 -> images, labels.
        losses: the losses are appended, one tensor a block.
    """
    from torch.func import grad_and_value, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = sum(p.numel() for p in params.values())
    most = max(1, min(32, BLOCK_BYTES // (4 * size)))
    each = vmap(grad_and_value(lambda p, x, y: loss(p, x[None], y[None])), in_dims=(None, 0, 0), randomness="different")
    held = {k: p.detach() for k, p in params.items()}
    for start in range(examples.start, examples.stop, most):
        with sdpa_kernel(SDPBackend.MATH):  # vmap takes the fused kernels example by example, and warns of it
            grads, values = each(held, *batch(start, min(start + most, examples.stop)))
        losses.extend(values.detach())
        yield torch.cat([grads[k].flatten(1) for k in held], 1)


class Free:
    """Squared norms of the gradients that training steps have anyway, before and after they are added up.

    A hook on each parameter sees the gradient of one micro-batch before it is accumulated. Nothing leaves the device
    until `estimate`. With one micro-batch a step there is nothing to compare: it is not `able`, and places no hook.

    Args:
        params: the trained parameters.
        weights: w_i of the micro-batches of one step on one rank, as the loop applies them (they sum to 1 there).
        unit: examples of a micro-batch.
        world: ranks; a step's gradient is their mean.
    """

    def __init__(self, params: Iterable[Tensor], weights: list[float], unit: int, world: int) -> None:
        self.params = [p for p in params if p.requires_grad]
        self.weights, self.unit, self.world = weights, unit, world
        self.chunks, self.q = len(weights) * world, sum((w / world) ** 2 for w in weights) * world
        self.able = self.chunks > 1 and abs(1 - self.q) > SINGULAR
        self.rows: list[Tensor] = []  # (2,) a step: mean |g_i|² of this rank, |ĝ|²
        self.listening = self.able
        self._grads: list[Tensor] = []
        self._local = torch.zeros(())
        if self.able:
            for p in self.params:
                p.register_hook(self._hear)

    def _hear(self, grad: Tensor) -> None:
        if self.listening:
            self._grads.append(grad)

    def micro_batch(self, j: int) -> None:
        """After the backward pass of the rank's j-th micro-batch of a step."""
        if not self.able:
            return
        norm = _square(self._grads) / (self.weights[j] ** 2 * len(self.weights))
        self._grads.clear()
        self._local = self._local + norm if j else norm

    def step(self) -> None:
        """After the last micro-batch, when `.grad` is the step's gradient, before the update."""
        if self.able:
            after = _square([p.grad for p in self.params if p.grad is not None])
            self.rows.append(torch.stack([self._local, after]))

    def window(self, reduce: Callable[[Tensor], Tensor]) -> Tensor | None:
        """(steps, 2) since the last estimate, averaged over ranks by `reduce`, a sum; None when there is nothing."""
        return reduce(torch.stack(self.rows).double()) / self.world if self.rows else None

    def estimate(self, reduce: Callable[[Tensor], Tensor]) -> Estimate:
        """Averages over the steps since the last call, jackknifed over steps; too few have infinite intervals."""
        rows = self.window(reduce)
        self.rows.clear()
        if rows is None:
            nothing = Value(math.nan, -math.inf, math.inf)
            return Estimate(nothing, nothing, nothing, 0, 0)
        return two_batch(rows.cpu(), self.q, self.unit, self.chunks)


def two_batch(rows: Tensor, q: float, unit: float, chunks: int) -> Estimate:
    """The free estimator from (steps, 2) pairs (mean |g_i|², |ĝ|²); see the module's head.

    Args:
        q: Σ w_i² over the `chunks` gradients of a step, not 1.
        unit: examples of each.
    """
    n = len(rows)

    def statistics(means: Tensor) -> Tensor:  # (..., 2)
        before, after = means[..., 0], means[..., 1]
        return _three((after - q * before) / (1 - q), (before - after) / (1 - q), unit)

    total = rows.sum(0)
    left_out = statistics((total - rows) / (n - 1)) if n > 2 else torch.empty(0, 3)
    return _jackknife(statistics(total / n), left_out, n, round(n * unit * chunks))


def _square(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
