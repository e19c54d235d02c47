"""How often the report's verdicts are false, on simulated studies: the table of docs/comparison.md.

    python scripts/calibration.py [STUDIES]      (10,000)

A study is a sweep of one arm whose true gap is exactly its margin, so that `equivalent` and `different` are both false;
its seeds' differences have a spread of half the margin (and of 4 margins, where `different` is said most). With looks
it is judged at each until it is decided. And the power and the errors of proposed margins (margin=auto).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import numpy as np

from scaling_exps.plan.margin import ALPHA, rounded, smallest, spent
from scaling_exps.report.judge import decide

Draw = Callable[[np.random.Generator, int], np.ndarray]  # n differences of mean 0 and sd 1


def _standard(kind: Draw, mean: float, sd: float) -> Draw:
    return lambda rng, n: (kind(rng, n) - mean) / sd


SHAPES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "skewness 1 (gamma 4)": _standard(lambda rng, n: rng.gamma(4, size=n), 4, 2),
    "skewness -1": _standard(lambda rng, n: -rng.gamma(4, size=n), -4, 2),
    "of two skewed runs (exponential)": _standard(lambda rng, n: rng.laplace(size=n), 0, 2**0.5),
    "heavy tails (t, 5 d.f.)": _standard(lambda rng, n: rng.standard_t(5, n), 0, (5 / 3) ** 0.5),
    "skewness 2 (exponential)": _standard(lambda rng, n: rng.exponential(size=n), 1, 1),
    "skewness -2": _standard(lambda rng, n: -rng.exponential(size=n), -1, 1),
}  # fmt: skip
LOOKS = ((3,), (5,), (10,), (3, 6, 10), (5, 10))


def _decided(differences: np.ndarray, margin: float, alpha: float = ALPHA) -> str:
    n = len(differences)
    return decide(n, float(differences.mean()), float(differences.std(ddof=1)), margin, 1, alpha)


def study(draw: Draw, rng: np.random.Generator, looks: tuple[int, ...], sd: float, declared: bool = True) -> str:
    """The verdict of one study with margin 1 and true gap 1."""
    differences = 1 + sd * draw(rng, looks[-1])
    said = "inconclusive"
    for n in looks:
        alpha = spent(looks, n) if declared else ALPHA
        said = _decided(differences[:n], 1.0, alpha or ALPHA)
        if said in ("equivalent", "different"):
            break
    return said


def rates(
    draw: Draw, looks: tuple[int, ...], studies: int, sd: float = 0.5, declared: bool = True
) -> tuple[float, float]:
    """Shares of false `equivalent` and false `different`. Fixed seed: the same numbers always."""
    rng = np.random.default_rng([*looks, int(10 * sd)])
    count = Counter(study(draw, rng, looks, sd, declared) for _ in range(studies))
    return count["equivalent"] / studies, count["different"] / studies


def proposal(seeds: int, studies: int, family: int = 3) -> tuple[float, float]:
    """Of margin=auto with as many base seeds as are planned: power at gap 0, false `equivalent` at a gap of the margin.

    Base and scaled runs have a spread of 1 and share nothing of their seed; each of `family` metrics is independent.
    """
    rng = np.random.default_rng(seeds)
    right = false = 0
    for _ in range(studies):
        base = rng.standard_normal((family, seeds))
        margins = [rounded(smallest(float(b.std(ddof=1)), seeds, family)) for b in base]
        change = rng.standard_normal((family, seeds)) - base
        right += all(_decided(d, m) == "equivalent" for d, m in zip(change, margins, strict=True))
        false += _decided(change[0] + margins[0], margins[0]) == "equivalent"
    return right / studies, false / studies


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print(f"{studies:,} studies a cell: false equivalent / false different\n")
    heads = ["n = " + ", ".join(map(str, looks)) if len(looks) == 1 else f"looks {list(looks)}" for looks in LOOKS]
    print("| differences | " + " | ".join([*heads, "n = 5, sd of 4 margins", "[3, 6, 10] undeclared"]) + " |")
    print("|---" * (len(heads) + 3) + "|")
    for name, draw in SHAPES.items():
        cells = [rates(draw, looks, studies) for looks in LOOKS]
        cells += [rates(draw, (5,), studies, 4.0), rates(draw, (3, 6, 10), studies, declared=False)]
        print(f"| {name} | " + " | ".join(f"{100 * e:.1f}% / {100 * d:.1f}%" for e, d in cells) + " |", flush=True)
    print(
        "\n| margin=auto, seeds | all 3 metrics equivalent at gap 0 | false equivalent at the margin |\n|---|---|---|"
    )
    for seeds in (3, 5, 10):
        right, false = proposal(seeds, studies)
        print(f"| {seeds} | {100 * right:.0f}% | {100 * false:.1f}% |", flush=True)


if __name__ == "__main__":
    main()
