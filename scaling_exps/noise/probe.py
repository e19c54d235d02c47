"""NoiseProbe: the gradient noise of anybody's training, out of the gradients that it makes anyway.

Every step has an unbiased pair: the mean squared norm of its n parts and the squared norm of their mean ĝ, both before
clipping; `estimators.two_batch` does the rest. What the parts are is the record's `method`:

    free      micro-batches of the accumulation and of all ranks     n >= 2 of them; exact
    halves    the same, of a batch that `split` cut                  exact; not the bits of the uncut batch
    examples  single examples, by `noise.examples`                   exact for the layers that are `covered`
    moments   m of the optimizer instead of ĝ, q = (1 - β1)/(1 + β1): E g² - E m², in blocks of 2/(1 - β1) steps, which
              hardly overlap. Biased by what the mean gradient changes within 1/(1 - β1) steps: |m|² falls short of
              |∇f|², so that B_noise comes out too large where the gradient turns, never too small

A loss that is divided by the number of micro-batches gives tr Σ and |∇f|² in the loss's unit; one that is not gives
both n² too large, and B_noise is the same. Parts of unequal weight (masked tokens) count as they are added up.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from scaling_exps.noise import validity
from scaling_exps.noise.estimators import Estimate, NoiseError, Value, two_batch
from scaling_exps.noise.examples import ExampleNorms
from scaling_exps.noise.metrics import METRICS, DualNoise
from scaling_exps.noise.state import block, first_moments, no_moments, preconditioners
from scaling_exps.records import read_noise, write_aside
from scaling_exps.rules.optimizers import of
from scaling_exps.rules.scale import unwrapped

METHODS = ("auto", "free", "examples", "moments")
EVERY = 8  # steps from one that measures single examples to the next: they cost a share of a backward pass
SMALL = 2**12  # numbers of a gradient that is kept (and so copied) until its backward pass ends; the norm of a larger
# one is taken at once, while it is in the cache
LOW = (torch.bfloat16, torch.float16)
COVERED = 0.5  # of the parameters: with fewer in layers that `examples` covers, `auto` takes the moments


class NoiseProbe:
    """Listens to a training loop from its construction to `detach`; the run keeps its bits.

    Args:
        model: the module that trains: plain, DistributedDataParallel, sharded by FSDP2's `fully_shard`, compiled.
        optimizer: the torch optimizer that steps, or a wrapper of one; its `step` ends a step of the probe.
        batch: examples of a step, over all devices and all accumulation.
        method: "auto" takes `free` where a step has several parts, else `examples` where most parameters are in layers
            it covers and nothing normalises over the batch, else `moments`.
        metric: what a record tells beside the Euclidean noise, under its name: see `noise.metrics`. Of micro-batches
            (`free`, `halves`), parameters that are whole on every rank, "sign" and "spectral" without a scaler.
        window: steps a record.
        file: a noise.jsonl that gets each record; `plan noise_from=` and `convert --noise-from` read it. Of one that is
            there, the records up to `step` are kept.
        step: optimizer steps done before, of a resumed training.
        scaler: torch's GradScaler, where there is one: without it, tr Σ and |∇f|² of `free` and `examples` are in its
            units; B_noise is right all the same.

    Where torch.distributed is initialized, every rank has a probe and they record together. Activation checkpointing
    must not be reentrant: a reentrant one looks like several backward passes. A backward pass that is no part of the
    step is left out while `listening` is False.

    Raises:
        NoiseError: a method that cannot be had here, tensor-parallel weights, no trained parameter, a number out of its
            range.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, *, batch: int, method: str = "auto", metric: str | None = None,
        window: int = 100, file: Path | str | None = None, step: int = 0, scaler: Any = None,
    ) -> None:  # fmt: skip
        for name, choice, allowed in (("method", method, METHODS), ("metric", metric or METRICS[0], METRICS)):
            if choice not in allowed:
                raise NoiseError(f"{name}={choice!r} must be one of {', '.join(allowed)}")
        for name, value, least in (("batch", batch, 1), ("window", window, 1), ("step", step, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise NoiseError(f"{name}={value!r} must be a whole number >= {least}")
        self._optimizer = unwrapped(optimizer)
        if not isinstance(model, nn.Module) or not isinstance(self._optimizer, torch.optim.Optimizer):
            given = f"{type(model).__name__}, {type(optimizer).__name__}"
            raise NoiseError(f"NoiseProbe({given}) takes an nn.Module and its torch optimizer")
        if file is not None and (Path(file).is_dir() or not Path(file).parent.is_dir()):
            raise NoiseError(f"file={str(file)!r} must be a file, as noise.jsonl, in a folder that is there")
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise NoiseError("the model has no parameter that requires a gradient")
        if not set(self.params) & {p for group in self._optimizer.param_groups for p in group["params"]}:
            raise NoiseError("the optimizer has none of the model's parameters")
        sharded: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._shards = {p: _shards(p, bool(sharded)) for p in self.params}
        self.why_not = {"examples": _no_examples(model), "moments": no_moments(self._optimizer)}
        if metric and (why := self._no_metric(metric, method, scaler)):
            raise NoiseError(f"metric={metric}: {why}")
        if why := self.why_not.get(method):
            raise NoiseError(f"method={method}: {why}")
        method = "free" if metric else method
        self.method, self.batch, self.window, self.step, self.scaler = method, batch, window, step, scaler
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.metric, self._scales = metric, dict[Any, Tensor]()  # P of this step
        self._dual = DualNoise(self.params, metric == "spectral", self.world) if metric in METRICS[1:] else None
        self.file, self.records = None if file is None else Path(file), list[dict[str, Any]]()
        if self.file is not None and step and self.file.exists():
            self.records = [r for r in read_noise(self.file) if r["step"] <= step]
        self.listening, self._halves = True, False
        self._begun, self._passes, self._usual = False, 0, 0  # passes of this step, and of the newest one that is done
        self._grads: list[Tensor] = []  # of this backward pass: small gradients, and the norms of large ones
        self._scaled: list[Tensor] = []  # the norms of P h
        # by method, (1,) or with `metric` (2,): parts of this step and Σ |h|²; |ĝ|²; of the steps both, (2, 1 or 2)
        self._sums: dict[str, tuple[int, Tensor | float]] = {}
        self._after: dict[str, Tensor] = {}
        self._rows: dict[str, list[tuple[int, Tensor]]] = {m: [] for m in METHODS[1:]}
        self._squares: list[Tensor] = []  # |g|² of the steps of a block of `moments`
        self._steps = 0  # seen
        self._examples: ExampleNorms | None = None
        self._hooks: dict[str, list[Any]] = {m: [] for m in METHODS}
        # behind the update, not before it: Lightning's last backward pass of a step is inside of `step`
        self._hooks["auto"] = [self._optimizer.register_step_post_hook(self._after_step)]  # of every method
        if method in ("auto", "free"):
            self._hear_parameters(sharded)
        if method in ("auto", "examples") and self.why_not["examples"] is None:
            self._examples = ExampleNorms(model, self._begin)
            self._hooks["examples"] = self._examples.handles

    def __enter__(self) -> NoiseProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: Any) -> NoiseProbe:
        return self  # the hooks of a copied model stay this probe's, which knows the layers of its own only

    def detach(self) -> None:
        """Take every hook away. What was measured stays."""
        for method in METHODS:
            self._unhook(method)

    def split(self, batch: Any, parts: int = 2) -> Iterator[Any]:
        """Cut a batch (a tensor; a tuple, list or dict of them) along its first dimension, for a backward pass each.

        Divide the loss of each by `parts`.

        Raises:
            NoiseError: the examples do not divide by `parts`.
        """
        self._halves = True
        first = batch
        while not isinstance(first, Tensor):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        n = len(first)
        if n < parts or n % parts:
            raise NoiseError(f"{n} examples do not make {parts} equal parts")
        for i in range(parts):
            yield _cut(batch, slice(n // parts * i, n // parts * (i + 1)))

    # ---- listening ----

    def _no_metric(self, metric: str, method: str, scaler: Any) -> str | None:
        if method not in ("auto", "free"):
            return f"method={method} has no parts whose gradients it could be of; take free, and split or accumulate"
        if any(isinstance(p, DTensor) for p in self.params):
            return "parameters are sharded, and their parts' gradients are not"
        if metric != METRICS[0]:
            return "a scaler's units change" if scaler is not None else None
        rows = [of(self._optimizer, group) for group in self._optimizer.param_groups]
        return None if all(r.second_moments for r in rows) else f"{type(self._optimizer).__name__} has no second moment"

    def _unhook(self, method: str) -> None:
        for handle in self._hooks[method]:
            handle.remove()
        self._hooks[method] = []

    def _hear_parameters(self, sharded: list[Any]) -> None:
        hooks, known = self._hooks["free"], set(self.params)
        hooks += [p.register_hook(partial(self._hear, p)) for p in self.params if not isinstance(p, DTensor)]

        def gathered(module: nn.Module, _: Any) -> None:  # its own parameters are whole now; FSDP keeps these tensors
            for p in module.parameters():
                if p.requires_grad and not isinstance(p, DTensor) and p not in known:
                    known.add(p)
                    hooks.append(p.register_hook(partial(self._hear, p)))

        hooks += [m.register_forward_pre_hook(gathered) for m in sharded]  # behind FSDP's own, which gathers

    def _hear(self, p: Tensor, grad: Tensor) -> None:
        if self.listening:
            self._begin()
            small = grad.numel() < SMALL and not grad.is_sparse
            self._grads.append(grad if small else _norm(grad))
            if self._dual:
                self._dual.hear(p, grad)
            elif self.metric:
                self._scales = self._scales or dict(preconditioners(self._optimizer))
                self._scaled.append(_norm(self._preconditioned(p, grad)))

    def _preconditioned(self, p: Tensor, grad: Any) -> Tensor:
        """P g; not a number before the first step."""
        return grad * self._scales.get(p, math.nan)

    def _begin(self) -> None:
        """In a backward pass: look at its end, behind what DDP and FSDP have queued to end their reduction."""
        if not self._begun:
            self._begun, queue = True, Variable._execution_engine.queue_callback
            queue(lambda: queue(self._pass))

    @property
    def _active(self) -> list[str]:
        return ["free", "examples"] if self.method == "auto" else [self.method]

    @torch.no_grad()
    def _pass(self) -> None:
        """After a backward pass: one part of the step, or as many as it had examples."""
        self._begun = False
        self._passes += 1
        for method in self._active:
            if method == "free":
                norms = [_square(heard) for heard in (self._grads, self._scaled) if heard]
                parts, norm, params = 1, torch.stack(norms) if norms else None, self.params
                self._grads.clear()
                self._scaled.clear()
            else:
                parts, norm = self._examples.take() if self._examples else (0, None)
                params = self._examples.params if self._examples else []
            n, total = self._sums.get(method, (0, 0.0))
            self._sums[method] = n + parts, math.nan if norm is None else norm + total
            grads = [p for p in params if p.grad is not None]
            if self._passes >= self._usual and grads:  # maybe the last of the step
                totals = [self._total(grads, [p.grad for p in grads])]
                if self.metric == METRICS[0]:
                    totals.append(self._total(grads, [self._preconditioned(p, p.grad) for p in grads]))
                self._after[method] = torch.stack(totals)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        for method, after in self._after.items():
            n, total = self._sums[method]
            along = self._dual.after_step(n) if self._dual else None
            if n * self.world > 1:
                scale = 1.0 if self.scaler is None else self.scaler.scale(torch.ones_like(after)) ** 2
                row = torch.stack([torch.as_tensor(n * total, device=after.device).expand_as(after), after]) / scale
                if along is not None:
                    row = torch.cat([row, along.to(row).expand(2, 1)], 1)
                self._rows[method].append((n, row))
        if self.method == "moments":
            grads = [p for p in self.params if p.grad is not None]
            self._squares.append(self._total(grads, [p.grad for p in grads]))
        elif self._passes:
            self._usual = self._passes
        self._sums, self._after, self._scales, self._passes = {}, {}, {}, 0
        self.step += 1
        self._steps += 1
        if self.method == "auto":
            self._choose()
        if self.method == "moments":
            self._moments()
        elif self.method == "examples":
            assert self._examples is not None
            self._examples.listening = self._steps % EVERY == 0
        if self._steps % self.window == 0:
            self.record()

    def _choose(self) -> None:
        """After the first step: it has several parts, or the examples of its only one are told apart, or not."""
        if self._usual * self.world > 1:
            self.method = "free"
        elif self.covered >= COVERED:
            self.method = "examples"
        elif self.why_not["moments"] is None:
            self.method = "moments"
        else:
            return
        for method in set(METHODS[1:]) - {self.method}:
            self._unhook(method)

    @property
    def covered(self) -> float:
        """Share of the trained parameters that the measurement is of."""
        if self.method in ("free", "moments"):
            return 1.0
        own = self._examples.params if self._examples else []
        return sum(p.numel() for p in own) / sum(p.numel() for p in self.params)

    def _total(self, params: list[Any], own: list[Any]) -> Tensor:
        """|x|² over all parameters, of which each has its own x; sharded ones so that the mean over ranks is right."""
        by_shards: dict[int, list[Tensor]] = {}
        for p, x in zip(params, own, strict=True):
            by_shards.setdefault(self._shards[p], []).append(x._local_tensor if isinstance(x, DTensor) else x)
        return torch.stack([n * _square(tensors) for n, tensors in by_shards.items()]).sum()

    def _moments(self) -> None:
        length, _ = block(self._optimizer)
        if len(self._squares) < length:
            return
        mean, self._squares = torch.stack(self._squares).mean(), []
        if self._steps > 2 * length:  # before, m remembers its start
            known = {p: m for p, m in first_moments(self._optimizer) if p in self._shards}
            m = self._total(list(known), list(known.values()))
            self._rows["moments"].append((1, torch.stack([mean, m]).unsqueeze(1)))

    # ---- what it says ----

    def estimate(self, metric: bool = False) -> Estimate:
        """Of the steps since the last record; every rank calls it. With no measured step its intervals are infinite.

        Args:
            metric: in the probe's metric, not the Euclidean one.
        """
        rows = self._rows.get(self.method, [])
        none = Value(math.nan, -math.inf, math.inf)
        nothing = Estimate(none, none, none, 0, 0)
        if not rows:
            return nothing
        parts = Counter(n for n, _ in rows).most_common(1)[0][0]  # a step of another number is cut short
        pairs = torch.stack([row for n, row in rows if n == parts]).double()  # (steps, 2, 1 or 2)
        if self.world > 1:
            dist.all_reduce(pairs)
        pairs = (pairs / self.world).cpu()
        own = pairs[:, :, -1 if metric and not self._dual else 0]
        own = own[own.isfinite().all(1)]  # a scaler's overflow, a P that is not there yet
        if not len(own):
            return nothing
        if self.method == "moments":
            length, q = block(self._optimizer)
            return two_batch(own, q, self.batch, length)
        chunks = parts * self.world
        unit = self.batch / chunks
        euclidean = two_batch(own, 1 / chunks, unit, chunks)
        if metric and self._dual:
            return self._dual.estimate(pairs[:, 1, 1], euclidean.trace, parts, unit) or nothing
        return euclidean

    def record(self) -> dict[str, Any]:
        """The record of the steps since the last one, appended to `records` and the file; every rank calls it."""
        row: dict[str, Any] = {
            "kind": "noise",
            "method": "halves" if self._halves and self.method == "free" else self.method,
        }
        row |= {"step": self.step, "samples": self.step * self.batch, "batch": self.batch, "covered": self.covered}
        row |= self.estimate().record(self.batch)
        if self.metric:
            own = self.estimate(metric=True).record(self.batch)
            row |= {f"{self.metric}_{k}": v for k, v in own.items() if k not in ("units", "examples")}
        if self._dual:
            self._dual.renew()
        for rows in self._rows.values():
            rows.clear()
        self.records.append(row)
        if self.file is not None and (self.world == 1 or dist.get_rank() == 0):
            write_aside(self.file, "".join(json.dumps(r) + "\n" for r in self.records))
        return row

    def validity(self, batch: int) -> validity.Validity | None:
        """What all records say of a move from this batch to another; None: nothing yet."""
        return validity.assess(self.records, batch, self.batch)

    def log(self, *batches: int) -> dict[str, float]:
        """For a tracker: noise/b_noise and its interval, noise/kappa_r, noise/deviation_BATCH; those there are.

        With a metric, what the last record tells of it too: noise/METRIC_b_noise and so on.
        """
        known = self.validity(self.batch)
        if known is None:
            return {}
        (low, high), point = known.b_noise, known.b_noise_point
        out = {"noise/b_noise": point, "noise/b_noise_low": low, "noise/b_noise_high": high}
        out["noise/kappa_r"] = self.batch / point if point else None
        for b in batches:
            v = self.validity(b)
            out |= {
                f"noise/deviation_{b}{end}": getattr(v, f"{end[1:]}" or "deviation") for end in ("", "_low", "_high")
            }
        if self.metric:
            out |= {f"noise/{k}": v for k, v in self.records[-1].items() if k.startswith(f"{self.metric}_b_noise")}
        return {k: v for k, v in out.items() if v is not None and math.isfinite(v)}

    def sentence(self, *batches: int) -> str:
        """The same for people."""
        known = self.validity(self.batch)
        if known is None:
            missing = [f"no {m}: {why}" for m, why in self.why_not.items() if why] if self.method == "auto" else []
            return "; ".join(["noise: not enough data yet", *missing])
        moves = [
            f"at {b:,} the displacement changes by {validity.change_text(v.deviation, v.low, v.high)}"
            for b in batches if (v := self.validity(b))
        ]  # fmt: skip
        return "; ".join([f"noise at batch {self.batch:,}: {validity.scale_text(known)}", *moves])


def _cut(batch: Any, rows: slice) -> Any:
    if isinstance(batch, dict):
        return {k: _cut(v, rows) for k, v in batch.items()}
    return type(batch)(_cut(v, rows) for v in batch) if isinstance(batch, tuple | list) else batch[rows]


def _norm(x: Tensor) -> Tensor:
    """|x| in float32 or better."""
    x = x.coalesce().values() if x.is_sparse else x
    return torch.linalg.vector_norm(x, dtype=torch.float32 if x.dtype in LOW else None)


def _square(tensors: list[Tensor]) -> Tensor:
    """|x|² of all together, in float32 or better."""
    tensors = [x.coalesce().values() if x.is_sparse else x for x in tensors]
    low = any(x.dtype in LOW for x in tensors)
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32 if low else None)).square().sum()


def _shards(p: Tensor, fsdp: bool) -> int:
    """Into how many parts FSDP cuts a parameter; NoiseError where something else cuts it."""
    if not isinstance(p, DTensor):
        return 1
    cut = [n for n, placement in zip(p.device_mesh.shape, p.placements, strict=True) if placement.is_shard()]
    if not fsdp or len(cut) != 1:
        raise NoiseError("a parameter is sharded otherwise than by FSDP2 alone (tensor parallel): this is not covered")
    return cut[0]


def _no_examples(model: nn.Module) -> str | None:
    modules = list(model.modules())
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
        return "the model is compiled, and hooks on its layers would break its graph"
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        return "the model normalises over the batch: its examples have no gradients of their own"
    return None
