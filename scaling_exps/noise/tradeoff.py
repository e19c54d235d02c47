"""Time against batch, from the base run's noise records: the critical batch, and up to where a larger one pays.

To the same loss a batch B takes S/S_min = 1 + B_noise/B steps and E/E_min = 1 + B/B_noise samples (McCandlish et al.
2018). A doubling from B saves B_noise / (2 (B + B_noise)) of the steps and adds B / (B + B_noise) to the samples: from
B = B_noise/2 on, where both are a third, it adds the larger share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_exps.noise import validity
from scaling_exps.plan import RunSpec

HOLDS = 0.05  # predicted deviation below which the rule should hold, as in `validity.sentence`
FAR = 2**20  # times the base batch: no larger one is looked at


class TradeoffError(ValueError):
    """There is nothing to draw, or nothing to draw it with."""


@dataclass(frozen=True)
class Tradeoff:
    """Of one recipe: B_noise with its 95% interval (the upper end may be infinite), and what follows."""

    spec: RunSpec
    source: str
    b_noise: float
    low: float
    high: float
    largest: int | None  # batch at which the rule is predicted to hold, in doublings of the base's; None: not told

    @property
    def base(self) -> int:
        return self.spec.arms[0].base.batch

    @property
    def pays_to(self) -> float:
        """The batch from which a doubling adds a larger share of samples than it saves of steps."""
        return self.b_noise / 2


def critical_batch(rows: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    """B_noise and its interval, of averages over all records of a run; None where even its lower end is not told.

    tr Σ and |∇f|² are averaged over the samples that each record stands for, significant or not, and divided last: a
    choice of the significant records would choose the large |∇f|².
    """
    noise = [r for r in rows if r.get("kind") == "noise"]
    full = [r for r in noise if r["method"] == "full"]
    needed = ("trace", "gradient_sq", "gradient_sq_low", "gradient_sq_high")
    before = total = trace = square = variance = 0.0
    for row in full or noise:
        share, before = row["samples"] - before, row["samples"]
        if any(key not in row for key in needed):
            continue
        total += share
        trace += share * row["trace"]
        square += share * row["gradient_sq"]
        variance += (share * (row["gradient_sq_high"] - row["gradient_sq_low"]) / 2) ** 2
    half = math.sqrt(variance)
    if not total or trace <= 0 or square + half <= 0:
        return None
    b, low = (trace / square if square > 0 else math.inf), trace / (square + half)
    return b, low, trace / (square - half) if square > half else math.inf


def of(specs: list[RunSpec], runs_dir: Path, given: str | None) -> list[Tradeoff]:
    """One for each recipe whose base run has noise records that tell its critical batch."""
    out: dict[str, Tradeoff | None] = {}
    for spec in specs:
        recipe = repr((spec.science.model, spec.science.dataset, spec.science.optimizer, spec.arms[0].base))
        if recipe in out:
            continue
        rows, source = validity.of_base(spec, specs, runs_dir, given)
        measured, base = critical_batch(rows), spec.arms[0].base.batch
        out[recipe] = None
        if measured is not None and math.isfinite(measured[0]):
            out[recipe] = Tradeoff(spec, source, *measured, _largest(rows, base))
    return [t for t in out.values() if t is not None]


def _largest(rows: list[dict[str, Any]], base: int) -> int | None:
    """The largest of base, 2 base, ... up to which the rule is predicted to hold."""
    held, batch = None, base
    while batch <= FAR * base:
        told = validity.assess(rows, batch, base)
        if told is None or abs(1 - told.deviation) >= HOLDS:
            return held
        held, batch = batch, 2 * batch
    return held


def paragraph(t: Tradeoff, batches: list[int]) -> str:
    """What a person needs of it, for the batches of a plan."""
    name = t.spec.science.model.name
    high = f"{t.high:,.0f}" if math.isfinite(t.high) else "beyond measure"
    said = [f"{name}: critical batch B_noise = {t.b_noise:,.0f} [{t.low:,.0f}, {high}], measured in {t.source}."]
    base_steps, base_samples = validity.steps_and_samples(t.base, t.b_noise)
    beside = []
    for batch in sorted({b for b in batches if b != t.base}):
        steps, samples = validity.steps_and_samples(batch, t.b_noise)
        beside.append(f"{batch:,} takes {steps / base_steps:.2g} of the steps and {samples / base_samples:.2f} of the "
                      "samples")  # fmt: skip
    if beside:
        said.append(f"To the same loss, beside batch {t.base:,}: {'; '.join(beside)} (McCandlish et al. 2018).")
    said.append(
        f"From {max(1.0, t.pays_to):,.0f} on a doubling adds a larger share of samples than it saves of steps."
        if t.pays_to > t.base
        else f"Already the base batch lies above B_noise/2 = {t.pays_to:,.0f}: a doubling adds a larger share of "
        "samples than it saves of steps."
    )
    if t.largest is None:
        said.append(f"At no batch above the base's is the rule predicted to hold within {HOLDS:.0%}.")
    else:
        said.append(f"The rule is predicted to hold (deviation under {HOLDS:.0%}) up to batch {t.largest:,}.")
    return " ".join(said)


def draw(tradeoffs: list[Tradeoff], batches: list[int], file: Path) -> None:
    """Steps and samples to the same loss, and the predicted deviation, against batch: a row a recipe.

    Raises:
        TradeoffError: no recipe has noise records, matplotlib is missing, or the file cannot be written.
    """
    if not tradeoffs:
        raise TradeoffError(
            "--figure: no base run of this plan has noise records that tell its critical batch; train it first, or "
            "give noise_from=DIR"
        )
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise TradeoffError("--figure needs matplotlib: pip install 'scalerun[figures]'") from e
    figure = Figure(figsize=(9.0, 3.8 * len(tradeoffs)), layout="constrained")
    for row, t in zip(figure.subplots(len(tradeoffs), 2, squeeze=False), tradeoffs, strict=True):
        _row(row[0], row[1], t, batches)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as e:  # ValueError: a format that matplotlib does not write
        raise TradeoffError(f"--figure {file}: {e}") from e


def _row(left: Any, right: Any, t: Tradeoff, batches: list[int]) -> None:
    end = max(*batches, 8 * t.b_noise, 4 * t.base)
    start = min(*batches, t.base)
    grid = [start * (end / start) ** (i / 100) for i in range(101)]
    one = validity.steps_and_samples(t.base, t.b_noise)
    for i, (label, colour) in enumerate((("steps", "tab:blue"), ("samples", "tab:orange"))):
        left.plot(grid, [validity.steps_and_samples(b, t.b_noise)[i] / one[i] for b in grid], color=colour, label=label)
        if math.isfinite(t.high):
            ends = [(validity.steps_and_samples(t.base, b), b) for b in (t.low, t.high)]
            low, high = ([validity.steps_and_samples(b, bn)[i] / at[i] for b in grid] for at, bn in ends)
            left.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    left.plot(grid, [t.base / b for b in grid], color="grey", ls=":", label="steps at equal samples (the rule's)")
    left.axvline(t.b_noise, color="black", lw=0.8, ls="--", label=f"B_noise = {t.b_noise:,.0f}")
    left.axvline(t.pays_to, color="tab:green", lw=0.8, ls="-.", label=f"a doubling stops to pay: {t.pays_to:,.0f}")
    left.set(yscale="log", ylabel=f"to the same loss, over batch {t.base}")
    r = t.base / t.b_noise
    right.plot(grid, [100 * abs(1 - validity.deviation(r, b / t.base)) for b in grid], color="tab:red",
               label="at a constant B_noise")  # fmt: skip
    right.axhline(100 * HOLDS, color="grey", lw=0.8, ls=":", label=f"{HOLDS:.0%}: the rule should hold below")
    if t.largest is not None:
        right.axvline(t.largest, color="tab:green", lw=0.8, ls="-.", label=f"holds up to {t.largest:,}, by the records")
    right.set(ylabel="predicted deviation, %", ylim=(0, None))
    for axis in (left, right):
        axis.set(xscale="log", xlabel="batch")
        axis.plot(batches, [0.0] * len(batches), "k|", transform=axis.get_xaxis_transform(), clip_on=False, ms=9)
        axis.legend(fontsize=8, frameon=False)
    s = t.spec.science
    left.set_title(
        f"{s.model.name} on {s.dataset.name}, {s.optimizer}; ticks: the plan's batches", fontsize=9, loc="left"
    )
