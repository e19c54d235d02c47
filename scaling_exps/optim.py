"""Optimizers.

Dialects, said once:

    name            class                  betas            v in the step   bias correction   v at the start
    adam            torch.optim.Adam       (beta1, beta2)   new             yes               0
    adamw           torch.optim.AdamW      (beta1, beta2)   new             yes               0
    rmsprop         torch.optim.Adam       (0, beta)        new             yes               0
    paper_adam      PaperAdam              (beta1, beta2)   OLD             yes               0 (no step at k = 0)
    paper_rmsprop   PaperRMSprop           (beta,)          OLD             no                given, or g_0^2
    invariant_adam  InvariantAdam          (beta1, beta2)   new             yes               0
    sgd             torch.optim.SGD        (momentum,)

eps stands outside the square root in all of them; decay is L2 inside the gradient except in adamw and
invariant_adam.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from scaling_exps.rules import Hyper


class _Ours(torch.optim.Optimizer):
    """An optimizer that torch does not have; coordinates are independent, so a leading axis of paths is fine."""

    decoupled = False  # weight decay: outside the gradient, before the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if params and group["weight_decay"] and self.decoupled:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            elif params and group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            if params:
                self._move(group, params, grads)
        return loss

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError


class PaperRMSprop(_Ours):
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


class PaperAdam(_Ours):
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


class InvariantAdam(_Ours):
    """Adam whose v averages the squares of micro-batch gradients (Wang and Aitchison 2024, arXiv 2402.18824):

        m <- beta1 m + (1 - beta1) mean_j g_j,   v <- beta2 v + (1 - beta2) mean_j g_j^2
        theta <- (1 - lr weight_decay) theta - lr m^ / (sqrt(v^) + eps),   m^, v^ corrected for their start at 0

    A hook on each parameter hears the gradient of every backward pass since `zero_grad`. Each must come from a loss
    divided by their number, as for gradient accumulation. Ranks are averaged over. With one micro-batch a step in one
    process it is AdamW, and takes its arguments.
    """

    decoupled = True

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, ...], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._heard: dict[Tensor, tuple[Tensor, int]] = {}  # sum of squares, and of how many
        for group in self.param_groups:
            for p in group["params"]:
                p.register_hook(functools.partial(self._hear, p))

    def _hear(self, p: Tensor, grad: Tensor) -> None:
        squares, count = self._heard.get(p, (0.0, 0))
        self._heard[p] = grad.square() + squares, count + 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._heard.clear()

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        # each gradient came times 1/n, so the mean of n squares is n times their sum
        squares = [total * count for total, count in (self._heard.pop(p) for p in params)]
        if torch.distributed.is_initialized():
            together = torch.cat([s.flatten() for s in squares])
            torch.distributed.all_reduce(together)
            parts = together.div_(torch.distributed.get_world_size()).split([s.numel() for s in squares])
            squares = [part.view_as(s) for part, s in zip(parts, squares, strict=True)]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        ms, vs = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), k = group["betas"], self.state[params[0]]["step"]
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        torch._foreach_lerp_(vs, squares, 1 - beta2)
        denominator = torch._foreach_div(vs, 1 - beta2**k)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, ms, denominator, -group["lr"] / (1 - beta1**k))


def build(name: str, params: Iterable[Tensor], hyper: Hyper) -> torch.optim.Optimizer:
    """The optimizer called `name` (see the table above) over `params` with exactly `hyper`."""
    params = [p for p in params if p.requires_grad]
    lr, betas, eps, decay = hyper.lr, hyper.betas, hyper.eps, hyper.weight_decay
    if name == "sgd":
        return torch.optim.SGD(params, lr, betas[0], weight_decay=decay, fused=True)
    if name == "paper_rmsprop":
        return PaperRMSprop(params, lr, betas[0], eps, decay)
    if name in ("paper_adam", "invariant_adam"):
        return (PaperAdam if name == "paper_adam" else InvariantAdam)(params, lr, betas, eps, decay)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(params, lr, (betas[0], betas[1]), eps, decay, fused=True)
