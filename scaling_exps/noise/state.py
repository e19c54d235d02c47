"""What a live optimizer's state tells of the gradient: its averages of g, and of g²."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scaling_exps.rules.move import RuleError
from scaling_exps.rules.optimizers import Optimizer, of


def preconditioners(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, P) of the coming step, in the optimizer's order, of those that have a second moment yet."""
    for group in optimizer.param_groups:
        row = of(optimizer, group)
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            names = [n for n in reversed(row.second_moments) if n in state]  # amsgrad's maximum before v
            if names:
                # PaperAdam counts in its group; PaperRMSprop and RMSprop do not correct their v
                k = group.get("k", state.get("step")) if row.field == "betas" else None
                v = state[names[0]] if k is None else state[names[0]] / (1 - group["betas"][1] ** k)
                yield p, (v.sqrt() + group["eps"]).reciprocal()


def no_moments(optimizer: torch.optim.Optimizer) -> str | None:
    try:
        rows = [(of(optimizer, g), g) for g in optimizer.param_groups]
    except RuleError as e:
        return str(e)
    if len({_beta(row, g) for row, g in rows}) > 1 or not 0 < _beta(*rows[0]) < 1:
        return f"{type(optimizer).__name__} keeps no average of the gradient, or several"
    if any(g.get("weight_decay") and not row.decoupled for row, g in rows):
        return "weight decay inside the gradient is in the optimizer's moment"
    return None


def _beta(row: Optimizer, group: dict[str, Any]) -> float:
    """β1 of a group, 0 where its optimizer keeps no average of the gradient."""
    if row.family == "sgd":
        return 0.0 if group.get("dampening") else float(group["momentum"])
    return float(group[row.field][0]) if set(row.moments) & {"exp_avg"} else 0.0


def block(optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Steps of a block of `moments`, and q, the sum of m's squared weights."""
    group = optimizer.param_groups[0]
    beta = _beta(of(optimizer, group), group)
    return round(2 / (1 - beta)), (1 - beta) / (1 + beta)


def first_moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, its m)."""
    for group in optimizer.param_groups:
        sgd = of(optimizer, group).family == "sgd"
        for p in group["params"]:
            m = optimizer.state.get(p, {}).get("momentum_buffer" if sgd else "exp_avg")
            if m is not None:
                yield p, m * (1 - group["momentum"]) if sgd else m
