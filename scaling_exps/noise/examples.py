"""Σ_e |h_e|²: squared norms of single examples' gradients, out of the backward pass that training makes anyway.

A layer with input x and output gradient e gives example b the weight gradient Σ_t e_t x_tᵀ over its positions t
(tokens, pixels, windows of a convolution). Its squared norm needs no gradient of its own (Goodfellow 2015, 1510.01799):

    |Σ_t e_t x_tᵀ|² = Σ_{t,t'} (e_t · e_t') (x_t · x_t')

or the gradient itself where that is cheaper. Exact for nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d and
Conv2d, LayerNorm, GroupNorm and RMSNorm of any make, with their biases; and for an Embedding and a Linear that share
one weight. Everything else is not covered: parameters outside such layers, a layer that is called twice in a pass,
whose input's first dimension is no example (position embeddings), a Linear whose output is changed in place, other
shared or sparse weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling_exps.noise.estimators import BLOCK_BYTES


def _outer(x: Tensor, e: Tensor) -> Tensor:
    """Σ_b |Σ_t e_bt x_btᵀ|² of (B, T, i) and (B, T, o), a block of examples at a time."""
    (_, t, i), o = x.shape, e.shape[2]
    ghost = t * (i + o) <= i * o
    size = max(1, BLOCK_BYTES // (4 * (2 * t * t if ghost else i * o)))
    total = x.new_zeros(())
    for a, b in zip(x.split(size), e.split(size), strict=True):
        if ghost:
            total += (a @ a.mT).mul_(b @ b.mT).sum()
        else:
            total += (b.mT @ a).square_().sum()
    return total


def _positions(x: Tensor) -> Tensor:
    """(B, ..., d) -> (B, T, d) in float32."""
    return x.reshape(len(x), -1, x.shape[-1]).float()


def _summed(x: Tensor, kept: int) -> Tensor:
    """Σ_b |Σ_t x_bt|²: over all dimensions but the first and the last `kept`."""
    inner = tuple(range(1, x.ndim - kept))
    return (x.sum(inner) if inner else x).square().sum()


def _linear(module: Any, x: Tensor, e: Tensor) -> dict[str, Tensor]:
    x, e = _positions(x), _positions(e)
    return {"weight": _outer(x, e), "bias": _summed(e, 1)}


def _embedding(module: Any, x: Tensor, e: Tensor) -> dict[str, Tensor]:
    index, e = x.reshape(len(x), -1), _positions(e)
    same = index.unsqueeze(1) == index.unsqueeze(2)  # (B, T, T)
    return {"weight": (e @ e.mT).mul_(same).sum()}


def _convolution(module: Any, x: Tensor, e: Tensor) -> dict[str, Tensor]:
    x, e = x.float(), e.float()
    bias = e.flatten(2).sum(2).square().sum()
    window, padding, stride, dilation = module.kernel_size, module.padding, module.stride, module.dilation
    if x.ndim == 3:  # of one dimension: an image of height 1
        x, e = x.unsqueeze(2), e.unsqueeze(2)
        window, padding, stride, dilation = (1, *window), (0, *padding), (1, *stride), (1, *dilation)
    g = module.groups
    columns = F.unfold(x, window, dilation, padding, stride)  # (B, i k k, T)
    columns, e = columns.reshape(len(x) * g, -1, columns.shape[2]), e.reshape(len(x) * g, e.shape[1] // g, -1)
    return {"weight": _outer(columns.mT, e.mT), "bias": bias}


def _normalised(module: Any, x: Tensor, e: Tensor) -> dict[str, Tensor]:
    x, e = x.float(), e.float()
    if isinstance(module, nn.GroupNorm):
        x, e = F.group_norm(x, module.num_groups, eps=module.eps).movedim(1, -1), e.movedim(1, -1)
        return {"weight": _summed(x * e, 1), "bias": _summed(e, 1)}
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, shape, eps=module.eps)
    else:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        x = F.rms_norm(x, shape, eps=eps)
    return {"weight": _summed(x * e, len(shape)), "bias": _summed(e, len(shape))}


def _kind(module: nn.Module) -> Callable[[Any, Tensor, Tensor], dict[str, Tensor]] | None:
    """How a layer's norms are had; None: it is not covered."""
    m: Any = module
    if getattr(m, "weight", None) is None:
        return None
    if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D":
        return _linear
    if isinstance(m, nn.Embedding):
        return None if m.scale_grad_by_freq or m.sparse or m.max_norm is not None else _embedding
    if isinstance(m, nn.Conv1d | nn.Conv2d):
        return None if isinstance(m.padding, str) or m.padding_mode != "zeros" else _convolution
    if isinstance(m, nn.LayerNorm | nn.GroupNorm) or type(m).__name__.endswith("RMSNorm"):
        return _normalised
    return None


class ExampleNorms:
    """Hooks on the layers of a model that hear their input and their output's gradient.

    Args:
        model: its parameters keep their gradients and bits; hooks only read.
        begin: called whenever one hears something in a backward pass.

    `params` are the covered ones; `take` gives what the last backward pass told.
    """

    def __init__(self, model: nn.Module, begin: Callable[[], None]) -> None:
        self.listening, self._begin = True, begin
        owners: dict[nn.Parameter, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(p, []).append(module)
        self._layers: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for m in filter(_kind, model.modules()):
            own = {name: p for name, p in m.named_parameters(recurse=False) if p.requires_grad}
            self._layers[m] = {
                name: p for name, p in own.items() if name in ("weight", "bias") and _alone(owners[p])
            }  # fmt: skip
        self.params = list(dict.fromkeys(p for own in self._layers.values() for p in own.values()))
        self._shared = {p for p in self.params if len(owners[p]) == 2}
        self._heard: list[tuple[nn.Parameter, int, Tensor]] = []  # of a backward pass: parameter, examples, Σ_e |h_e|²
        self._held: dict[nn.Parameter, tuple[bool, Tensor, Tensor]] = {}  # of a shared weight: the first of two
        self.handles = [
            m.register_forward_hook(self._forward, with_kwargs=True) for m, own in self._layers.items() if own
        ]

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.listening and module in self._layers and isinstance(output, Tensor) and output.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            output.register_hook(partial(self._backward, module, x.detach()))

    @torch.no_grad()
    def _backward(self, module: nn.Module, x: Tensor, e: Tensor) -> None:
        if not self.listening or not (mine := self._layers[module]):
            return
        self._begin()
        kind = _kind(module)
        assert kind is not None
        embeds = isinstance(module, nn.Embedding)
        examples = len(x) if (x.ndim > 1 or embeds) and len(e) == len(x) else 0
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            e = e * x.ne(module.padding_idx).unsqueeze(-1)
        norms = kind(module, x, e) if examples else {}
        for name, p in mine.items():
            self._heard.append((p, examples, norms[name] if examples else x.new_zeros(())))
            if p in self._shared and p not in self._held:
                self._held[p] = embeds, x, e
            elif p in self._shared:
                before, *other = self._held.pop(p)
                (index, f), (h, g) = ((x, e), other) if embeds else (other, (x, e))
                if before != embeds and examples and len(index) == len(h):
                    self._heard.append((p, examples, _cross(h, g, index, f)))

    def take(self) -> tuple[int, Tensor | None]:
        """(examples, Σ_e |h_e|² over `params`) of the last backward pass; what turned out uncovered leaves `params`.

        The sum is None where that happened: what was heard before was of other parameters.
        """
        heard, self._heard = self._heard, []
        odd, self._held = set(self._held), {}
        if not heard:
            return 0, None
        examples = Counter(n for _, n, _ in heard).most_common(1)[0][0]
        calls = Counter(p for p, _, _ in heard)
        wrong = odd | {p for p, n, _ in heard if n != examples}
        wrong |= {p for p in self.params if calls[p] != (3 if p in self._shared else 1)}
        if wrong or not examples:
            self.params = [p for p in self.params if p not in wrong and examples]
            kept = set(self.params)
            self._layers = {m: {k: p for k, p in own.items() if p in kept} for m, own in self._layers.items()}
            return examples, None
        return examples, torch.stack([norm for _, _, norm in heard]).sum()


def _alone(owners: list[nn.Module]) -> bool:
    """Whether a parameter belongs to one layer, or to an Embedding and a Linear."""
    return len(owners) == 1 or (len(owners) == 2 and {type(m) for m in owners} == {nn.Linear, nn.Embedding})


def _cross(x: Tensor, e: Tensor, index: Tensor, f: Tensor) -> Tensor:
    """2 Σ_b <Σ_t e_t x_tᵀ, Σ_s 1[index_s] f_sᵀ>: of one weight in a Linear and in an Embedding."""
    x, e, f, index = _positions(x), _positions(e), _positions(f), index.reshape(len(x), 1, -1)
    return 2 * (e.gather(2, index.expand(-1, e.shape[1], -1)) * (x @ f.mT)).sum()
