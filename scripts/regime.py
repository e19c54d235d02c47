"""Write docs/evidence/regime.md's table: how near each experiment is to the range in which the rule is derived.

    python scripts/regime.py [PAGE]          from the repository's folder

What is planned is what `scalerun plan` derives for these words, base run against the largest batch. What is measured
comes from the runs whose records are kept in docs/evidence/runs/; a dash stands for an experiment without.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
from pathlib import Path

from scaling_exps import config, plan
from scaling_exps.noise import validity
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir

PAGE = Path(__file__).resolve().parent.parent / "docs" / "evidence" / "regime.md"
MARKS = ("<!-- regime -->", "<!-- end of regime -->")
EXPERIMENTS = """
fig1 model=resnet50 optimizer=adam
fig1 model=resnet50 optimizer=rmsprop
fig1 model=vgg16 optimizer=adam precision=bfloat16
fig1 model=vgg16 optimizer=rmsprop
fig2
fig2_language
fig2_language model=gpt_small batch=[512,1024,2048,4096,8192]
fig1_small model=resnet8 optimizer=adam
fig1_small model=resnet8 optimizer=rmsprop
fig1_small model=resnet20 optimizer=adam
fig1_small model=vgg16 optimizer=adam
fig1_small model=vgg16 optimizer=rmsprop
fig1_eps_small model=resnet8 optimizer=rmsprop
epsilon_small batch=[2,32] rule=[sqrt,sqrt_without_eps,none] seed=[6,7,8,9,10,11]
fig2_small model=timm
fig2_small model=vit optimizer=adamw
fig2_small model=gpt
fig2_small model=roberta
beta1_small
fig1_mid optimizer=adam
fig1_mid optimizer=rmsprop
fig1_vgg_mid optimizer=rmsprop
fig1_noise_mid optimizer=adam
fig1_noise_mid optimizer=rmsprop
fig1_noise_mid optimizer=rmsprop recipe.lr=1.25e-4 seed=[10,11,12,13,14,15]
fig1_trained_mid optimizer=rmsprop
breaking_mid optimizer=adam
breaking_mid optimizer=rmsprop
fig1_eps_mid optimizer=adam
fig1_eps_mid optimizer=rmsprop
fig2_mid
fig2_trained_mid
fig2_roberta_trained_mid
fig2_vit_mid
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    page = parser.parse_args().page
    heads = "experiment | batch | κ | epochs | steps | t = kη² | 1 - β2 | v's memory | κr < 0.1 | at the end"
    with tempfile.TemporaryDirectory() as folder:
        for archive in (PAGE.parent / "runs").glob("*.tar.xz"):
            with tarfile.open(archive) as kept:
                kept.extractall(folder, filter="data")
        rows = [row(words, Path(folder)) for words in EXPERIMENTS.strip().splitlines()]
    lines = [f"| {heads} |", "|---" * 10 + "|", *rows]
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + rest.partition(MARKS[1])[2]]))


def row(words: str, kept: Path) -> str:
    specs = plan.plan(config.compose(f"experiment={words}".split()))
    (large, arm), (base, _) = (
        max(((s, a) for s in specs for a in s.arms if a.role == role), key=lambda pair: pair[1].kappa)
        for role in ("rule", "base")
    )
    a, b = base.science, large.science
    betas = a.hyper.betas, b.hyper.betas
    averages = [(1 - beta[-1], 1 / ((1 - beta[-1]) * s.steps)) for beta, s in zip(betas, (a, b), strict=True) if beta]
    cells = [
        words.partition(" batch=")[0],
        f"{a.batch:,} → {b.batch:,}",
        f"{arm.kappa:g}",
        f"{a.samples(a.steps) / a.dataset.train_size:.3g}" if a.dataset.train_size else "",
        f"{a.steps:,} → {b.steps:,}",
        f"{b.steps * b.hyper.lr**2:.3g}",
        " → ".join(f"{share:.3g}" for share, _ in averages),
        f"{averages[-1][1]:.1%}",
        *measured([s for s in specs if s.arms[0].role == "base"], b.batch, kept),
    ]
    return f"| {' | '.join(cells)} |"


def measured(bases: list[RunSpec], batch: int, kept: Path) -> list[str]:
    """Over the base runs that are kept: the share of the samples in which noise dominates at `batch`; how they end."""
    runs = [RunDir(kept / spec.run_id) for spec in bases if (kept / spec.run_id).is_dir()]
    if not runs:
        return ["–", "–"]
    assessed = validity.assess([r for run in runs for r in run.records().rows], batch, bases[0].science.batch)
    metrics = [(run.result() or {})["metrics"] for run in runs]
    name = next(m for m in ("test_accuracy", "test_loss") if m in metrics[0])
    mean = statistics.mean(m[name] for m in metrics)
    end = f"{mean:.1%}" if name == "test_accuracy" else f"{mean:.3f} nats"
    return ["–" if assessed is None else f"{assessed.dominated:.0%}", f"{end}, n = {len(runs)}"]


if __name__ == "__main__":
    main()
