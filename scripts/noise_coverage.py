"""How often NoiseProbe's 95% intervals hold the truth, and whether its methods agree: tables of docs/evidence/noise.md.

    python scripts/noise_coverage.py known 500
    python scripts/noise_coverage.py networks 200

Known: gradients of known Σ and ∇f, of 40 dimensions and tr Σ = 1; a repeat is 24 steps of 16 examples (moments: of
β1 = 0.5, so 6 blocks of 4 steps). Networks: a GPT on the embedded text and a ResNet on CIFAR-10, their weights standing
still and in training: all methods on the same steps.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch

from scaling_exps import NoiseProbe, config, plan
from scaling_exps.noise import probe as probes
from scaling_exps.noise.estimators import Estimate, two_batch
from scaling_exps.train.trainer import Trainer

D, BATCH, STEPS, WARM = 40, 16, 24, 8  # WARM steps are before the first, in which moments forget their start
B_NOISE = (4, 100, 10_000, 1_000_000)
KINDS = ("normal", "a tenth with 3 times the spread", "Student's, 3 d.f., each example as a whole")


def examples(shape: tuple[int, ...], b_noise: float, kind: str, generator: torch.Generator) -> torch.Tensor:
    """(*shape, D): mean of squared length 1 / b_noise, tr Σ = 1."""
    z = torch.randn(*shape, D, generator=generator) / math.sqrt(D)
    if kind.startswith("a tenth"):
        wide = torch.rand(*shape, 1, generator=generator) < 0.1
        z *= torch.where(wide, 3.0, 1.0) / math.sqrt(1.8)
    elif kind != "normal":
        z /= torch.randn(*shape, 3, generator=generator).square().sum(-1, keepdim=True).sqrt()  # √χ²(3): E 1/χ² = 1
    return z + math.sqrt(1 / b_noise / D)


def estimates(b_noise: float, kind: str, repeats: int) -> Iterator[tuple[str, Estimate]]:
    """(method, estimate) of each repeat, from the squared norms that the probe would take; no backward passes."""
    generator = torch.Generator().manual_seed(int(b_noise))
    for method, parts in (("free", 4), ("halves", 2), ("examples", BATCH), ("moments", 1)):
        x = examples((repeats, STEPS + WARM, BATCH), b_noise, kind, generator)
        mean = x.mean(2)
        if method == "moments":  # β1 = 0.5, as Adam's m; a block is 4 steps, and q = (1 - β1) / (1 + β1)
            m = mean[:, 0]
            ms = torch.stack([m := (m + g) / 2 for g in mean.unbind(1)], 1)
            blocks = mean[:, WARM:].square().sum(2).unflatten(1, (-1, 4)).mean(2)
            pairs, q, length = torch.stack([blocks, ms[:, WARM + 3 :: 4].square().sum(2)], 2), 1 / 3, 4
        else:
            each = x[:, WARM:].unflatten(2, (parts, -1)).mean(3).square().sum(3).mean(2)
            pairs, q, length = torch.stack([each, mean[:, WARM:].square().sum(2)], 2), 1 / parts, parts
        unit = BATCH if method == "moments" else BATCH / parts
        for rows in pairs.double():
            yield method, two_batch(rows, q, unit, length)


def coverage(b_noise: float, kind: str, repeats: int) -> dict[str, list[float]]:
    """Method -> shares of repeats in which the intervals of tr Σ, |∇f|² and their ratio hold the truth."""
    truth = {"trace": 1.0, "gradient_sq": 1 / b_noise, "inverse": 1 / b_noise}
    inside: dict[str, list[list[bool]]] = defaultdict(list)
    for method, e in estimates(b_noise, kind, repeats):
        inside[method].append([getattr(e, k).low <= v <= getattr(e, k).high for k, v in truth.items()])
    return {m: torch.tensor(rows).float().mean(0).tolist() for m, rows in inside.items()}


def agreement(words: list[str], steps: int) -> dict[str, tuple[Estimate, float]]:
    """Method -> (estimate, share covered) over the first steps of one run, cut into parts in three ways."""
    out = {}
    for micro, methods in ((8, ("free",)), (16, ("halves",)), (32, ("examples", "moments"))):
        fixed = ["recipe.batch=32", "batch=32", "recipe.decay=constant", "logger=none"]
        fixed += ["recipe.warmup_fraction=0", "recipe.beta1=0.9", "recipe.beta2=0.99"]
        composed = config.compose([*words, *fixed, "measure.noise=none", f"recipe.micro_batch={micro}"])
        (spec,) = plan.plan(composed)
        t = Trainer(spec)
        watching = {
            m: NoiseProbe(t.net, t.optimizer, batch=32, method="free" if m == "halves" else m, window=10**9)
            for m in methods
        }
        for _ in range(steps):
            t.train_step()
            t.optimizer.zero_grad(set_to_none=True)
        out |= {m: (p.estimate(), p.covered) for m, p in watching.items()}
    return out


def known(repeats: int) -> None:
    print(f"{repeats} repeats a cell: shares in which the interval holds tr Σ / |∇f|² / their ratio\n")
    print("| gradients | method | " + " | ".join(f"B_noise {b:,}" for b in B_NOISE) + " |")
    print("|---" * (2 + len(B_NOISE)) + "|")
    for kind in KINDS:
        cells = [coverage(b, kind, repeats) for b in B_NOISE]
        for method in cells[0]:
            shares = (" / ".join(f"{100 * x:.1f}" for x in c[method]) for c in cells)
            print(f"| {kind} | {method} | " + " | ".join(shares) + " |", flush=True)


def networks(steps: int) -> None:
    probes.EVERY = 1
    small = ["recipe.samples=65536", "recipe.epochs=null"]
    each = {
        "GPT": ["model=gpt", *small],
        "ResNet-8, GroupNorm": ["dataset=cifar10", "model.norm=group", "model.width=8", *small],
    }
    print(f"{steps} steps of 32\n\n| network | weights | method | covers | tr Σ | ‖∇f‖² | B_noise |")
    print("|---" * 7 + "|")
    for name, words in each.items():
        for weights, rate in (("stand still", ["recipe.lr=1e-12"]), ("in training", [])):
            for method, (e, covered) in agreement([*words, *rate], steps).items():
                spans = (f"{v.value:.4g} [{v.low:.4g}, {v.high:.4g}]" for v in (e.trace, e.gradient_sq))
                r = e.inverse
                b = f"above {1 / r.high:.4g}" if r.high > 0 else "none: |∇f|² < 0"
                b = f"{1 / r.value:.4g} [{1 / r.high:.4g}, {1 / r.low:.4g}]" if r.low > 0 else b
                print(f"| {name} | {weights} | {method} | {covered:.1%} | {' | '.join(spans)} | {b} |", flush=True)


if __name__ == "__main__":
    what, count = sys.argv[1], int(sys.argv[2])
    {"known": known, "networks": networks}[what](count)
