"""Optimizers, and schedules as multipliers of sample time.

Dialects, said once:

    name            class                  betas            v in the step   bias correction   v at the start
    adam            torch.optim.Adam       (beta1, beta2)   new             yes               0
    adamw           torch.optim.AdamW      (beta1, beta2)   new             yes               0
    rmsprop         torch.optim.Adam       (0, beta)        new             yes               0
    paper_adam      PaperAdam              (beta1, beta2)   OLD             yes               0 (no step at k = 0)
    paper_rmsprop   PaperRMSprop           (beta,)          OLD             no                given, or g_0^2
    sgd             torch.optim.SGD        (momentum,)

eps stands outside the square root in all of them; decay is L2 inside the gradient except in adamw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from scaling_exps.plan import Schedule
from scaling_exps.rules import Hyper


class _Paper(torch.optim.Optimizer):
    """An optimizer of Malladi et al. 2022; coordinates are independent, so a leading axis of paths is fine."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if params and group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            if params:
                self._move(group, params, grads)
        return loss

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError


class PaperRMSprop(_Paper):
    """RMSprop of Malladi et al. 2022 (Def. 2.3):

        theta_{k+1} = theta_k - lr g_k / (sqrt(v_k) + eps),   v_{k+1} = beta v_k + (1 - beta) g_k^2

    Args:
        params: tensors of any shape.
        lr, beta, eps, weight_decay: >= 0; weight_decay is L2, added to the gradient.
        v0: the second moment at k = 0 (a number, for every coordinate); None takes g_0^2.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, beta: float, eps: float, weight_decay: float = 0.0, v0: Any = None
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps, "weight_decay": weight_decay, "v0": v0})

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            if not self.state[p]:
                self.state[p]["v"] = g * g if group["v0"] is None else torch.full_like(p, group["v0"])
        vs = [self.state[p]["v"] for p in params]
        denominator = torch._foreach_sqrt(vs)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, grads, denominator, -group["lr"])
        torch._foreach_mul_(vs, group["beta"])
        torch._foreach_addcmul_(vs, grads, grads, 1 - group["beta"])


class PaperAdam(_Paper):
    """Adam of Malladi et al. 2022 (Def. 2.4): NEW m over OLD v.

        m_{k+1} = beta1 m_k + (1 - beta1) g_k,   v_{k+1} = beta2 v_k + (1 - beta2) g_k^2
        theta_{k+1} = theta_k - lr [m_{k+1} / (1 - beta1^{k+1})] / (sqrt(v_k / (1 - beta2^k)) + eps)

    At k = 0 the denominator is 0/0: the moments move and the parameters do not. Arguments as in PaperRMSprop.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, ...], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "k": 0})

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        ms, vs = ([self.state[p][name] for p in params] for name in "mv")
        (beta1, beta2), k = group["betas"], group["k"]
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        if k > 0:
            denominator = torch._foreach_div(vs, 1 - beta2**k)
            torch._foreach_sqrt_(denominator)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(params, ms, denominator, -group["lr"] / (1 - beta1 ** (k + 1)))
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, grads, grads, 1 - beta2)
        group["k"] = k + 1


def build(name: str, params: Iterable[Tensor], hyper: Hyper) -> torch.optim.Optimizer:
    """The optimizer called `name` (see the table above) over `params` with exactly `hyper`."""
    params = [p for p in params if p.requires_grad]
    lr, betas, eps, decay = hyper.lr, hyper.betas, hyper.eps, hyper.weight_decay
    if name == "sgd":
        return torch.optim.SGD(params, lr, betas[0], weight_decay=decay, fused=True)
    if name == "paper_rmsprop":
        return PaperRMSprop(params, lr, betas[0], eps, decay)
    if name == "paper_adam":
        return PaperAdam(params, lr, betas, eps, decay)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(params, lr, (betas[0], betas[1]), eps, decay, fused=True)


@torch.no_grad()
def preconditioner(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """P = 1 / (√v̂ + ε) of the coming step, flat over the trained parameters; None if there is none (SGD; no v yet)."""
    parts = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                v = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
            elif "v" in state:
                k = group.get("k")  # PaperAdam corrects its v, PaperRMSprop does not
                v = state["v"] if k is None else state["v"] / (1 - group["betas"][1] ** k)
            else:
                return None
            parts.append((v.sqrt() + group["eps"]).reciprocal().flatten())
    return torch.cat(parts)


def multiplier(schedule: Schedule, samples: float) -> float:
    """The learning rate at `samples` >= 0 seen, as a share of its peak; a function of nothing else.

    A step asks at the middle of the samples it covers, so that the integral of the rate over the same samples agrees
    between batch sizes to second order.
    """
    if samples < schedule.warmup_samples:
        share = samples / schedule.warmup_samples
        if schedule.warmup == "geometric":
            return schedule.warmup_from ** (1 - share)
        return schedule.warmup_from + (1 - schedule.warmup_from) * share
    share = (samples - schedule.warmup_samples) / max(1.0, schedule.total_samples - schedule.warmup_samples)
    match schedule.decay:
        case "milestones":
            return float(schedule.gamma ** sum(samples >= m for m in schedule.milestones))
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        case "linear":
            return 1 - min(1.0, share)
        case "inverse_sqrt":
            return math.sqrt(schedule.warmup_samples / samples)
    return 1.0
