"""How often NoiseProbe's 95% intervals hold the truth, and whether its methods agree: tables of docs/evidence/noise.md.

    python scripts/noise_coverage.py [REPEATS]      (500)

Gradients of known Σ and ∇f: one linear layer whose mean output is the loss, so that an example's gradient is the
example, of 40 dimensions and tr Σ = 1. A repeat is 24 steps of 16 examples (moments: of β1 = 0.5, so 6 blocks of 4
steps). Then a GPT and a ResNet whose weights stand still: all methods on the same steps.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch

from scaling_exps import NoiseProbe, config, plan
from scaling_exps.noise import probe as probes
from scaling_exps.noise.estimators import Estimate
from scaling_exps.train.trainer import Trainer

D, BATCH, STEPS = 40, 16, 24
B_NOISE = (4, 100, 10_000, 1_000_000)
KINDS = ("normal", "a tenth with 3 times the spread", "Student's, 3 d.f., each example as a whole")


def examples(n: int, b_noise: float, kind: str, generator: torch.Generator) -> torch.Tensor:
    """(n, D): mean of squared length 1 / b_noise, tr Σ = 1."""
    z = torch.randn(n, D, generator=generator) / math.sqrt(D)
    if kind.startswith("a tenth"):
        wide = torch.rand(n, 1, generator=generator) < 0.1
        z *= torch.where(wide, 3.0, 1.0) / math.sqrt(1.8)
    elif kind != "normal":
        z /= torch.randn(n, 3, generator=generator).square().sum(1, keepdim=True).sqrt()  # √χ²(3): E 1/χ² = 1
    return z + math.sqrt(1 / b_noise / D)


def estimates(b_noise: float, kind: str, repeats: int) -> Iterator[tuple[str, Estimate]]:
    """(method, estimate) of each repeat, out of real backward passes."""
    probes.EVERY = 1
    generator = torch.Generator().manual_seed(int(b_noise))
    model = torch.nn.Linear(D, 1, bias=False)
    for parts, methods in ((4, ("free",)), (2, ("halves",)), (1, ("examples", "moments"))):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-12, betas=(0.5, 0.9))
        watching = {
            m: NoiseProbe(model, optimizer, batch=BATCH, method="free" if m == "halves" else m, window=10**9)
            for m in methods
        }
        for step in range(repeats * STEPS + 8):
            for x in examples(BATCH, b_noise, kind, generator).chunk(parts):
                (model(x).mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 8:  # m's start, and what is covered
                for p in watching.values():
                    p.record()
            elif (step - 7) % STEPS == 0:
                for m, p in watching.items():
                    yield m, p.estimate()
                    p.record()
        for p in watching.values():
            p.detach()


def coverage(b_noise: float, kind: str, repeats: int) -> dict[str, list[float]]:
    """Method -> shares of repeats in which the intervals of tr Σ, |∇f|² and their ratio hold the truth."""
    truth = {"trace": 1.0, "gradient_sq": 1 / b_noise, "inverse": 1 / b_noise}
    inside: dict[str, list[list[bool]]] = defaultdict(list)
    for method, e in estimates(b_noise, kind, repeats):
        inside[method].append([getattr(e, k).low <= v <= getattr(e, k).high for k, v in truth.items()])
    return {m: torch.tensor(rows).float().mean(0).tolist() for m, rows in inside.items()}


def agreement(words: list[str], steps: int) -> dict[str, tuple[Estimate, float]]:
    """Method -> (estimate, share covered) at the weights that a seed begins with."""
    probes.EVERY = 1
    out = {}
    for micro, methods in ((8, ("free",)), (16, ("halves",)), (32, ("examples", "moments"))):
        fixed = ["recipe.batch=32", "batch=32", "recipe.lr=1e-12", "measure.noise=none", "logger=none"]
        composed = config.compose([*words, *fixed, f"recipe.micro_batch={micro}"])
        (spec,) = plan.plan(composed)
        t = Trainer(spec)
        watching = {
            m: NoiseProbe(t.net, t.optimizer, batch=32, method="free" if m == "halves" else m, window=10**9)
            for m in methods
        }
        for _ in range(steps):
            t.train_step()
        out |= {m: (p.estimate(), p.covered) for m, p in watching.items()}
    return out


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(f"{repeats} repeats a cell: shares in which the interval holds tr Σ / |∇f|² / their ratio\n")
    print("| gradients | method | " + " | ".join(f"B_noise {b:,}" for b in B_NOISE) + " |")
    print("|---" * (2 + len(B_NOISE)) + "|")
    for kind in KINDS:
        cells = [coverage(b, kind, repeats) for b in B_NOISE]
        for method in cells[0]:
            shares = (" / ".join(f"{100 * x:.1f}" for x in c[method]) for c in cells)
            print(f"| {kind} | {method} | " + " | ".join(shares) + " |", flush=True)
    print("\n| network | method | covers | tr Σ | ‖∇f‖² | B_noise |\n|---|---|---|---|---|---|")
    networks = {
        "GPT": ["model=gpt", "model.layers=2", "model.width=64", "recipe.samples=32768", "recipe.epochs=null"],
        "ResNet-8, GroupNorm": ["model.norm=group", "model.width=8", "recipe.samples=32768", "recipe.epochs=null"],
    }
    for name, words in networks.items():
        for method, (e, covered) in agreement(words, 2 * repeats // 5).items():
            spans = (f"{v.value:.4g} [{v.low:.4g}, {v.high:.4g}]" for v in (e.trace, e.gradient_sq))
            r = e.inverse
            b = f"{1 / r.value:.4g} [{1 / r.high:.4g}, {1 / r.low:.4g}]" if r.low > 0 else f"above {1 / r.high:.4g}"
            print(f"| {name} | {method} | {covered:.1%} | {' | '.join(spans)} | {b} |", flush=True)


if __name__ == "__main__":
    main()
