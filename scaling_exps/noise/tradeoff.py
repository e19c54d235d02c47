"""Time against batch, from the base run's noise records: the critical batch, and up to where a larger one pays.

To the same loss a batch B takes S/S_min = 1 + B_noise/B steps and E/E_min = 1 + B/B_noise samples (McCandlish et al.
2018). A doubling from B saves B_noise / (2 (B + B_noise)) of the steps and adds B / (B + B_noise) to the samples: from
B = B_noise/2 on, where both are a third, it adds the larger share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_exps.noise import validity
from scaling_exps.plan import RunSpec

HOLDS = 0.05  # whole interval of the predicted change below it, and ...
MOSTLY = 0.8  # ... noise dominates for so much of training: the rule should hold, as in `validity.sentence`
FAR = 2**20  # times the base batch: no larger one is looked at


class TradeoffError(ValueError):
    """There is nothing to draw with, or nowhere to draw to."""


class NothingToDrawError(TradeoffError):
    """No noise record tells a critical batch, which is nobody's mistake: the plan is of use without its figure."""


@dataclass(frozen=True)
class Tradeoff:
    """Of one recipe: what the noise records of its base run say, and what follows.

    b_noise: None where they give bounds alone; largest: the batch, in doublings of the base's, up to which the rule is
    predicted to hold, the base batch where no larger one is; None where nothing is predicted (no adaptive optimizer).
    """

    spec: RunSpec
    source: str
    rows: list[dict[str, Any]]
    at_base: validity.Validity
    b_noise: float | None
    largest: int | None

    @property
    def base(self) -> int:
        return self.spec.arms[0].base.batch


def of(specs: list[RunSpec], runs_dir: Path, given: str | None) -> list[Tradeoff]:
    """One for each recipe whose base run has noise records that say something."""
    out: dict[str, Tradeoff | None] = {}
    for spec in specs:
        recipe = _recipe(spec)
        if recipe in out:
            continue
        out[recipe] = told(spec, *validity.of_base(spec, specs, runs_dir, given))
    return [t for t in out.values() if t is not None]


def _recipe(spec: RunSpec) -> str:
    return repr((spec.science.model, spec.science.dataset, spec.science.optimizer, spec.arms[0].base))


def _same(t: Tradeoff, spec: RunSpec) -> bool:
    return _recipe(t.spec) == _recipe(spec)


def told(spec: RunSpec, rows: list[dict[str, Any]], source: str) -> Tradeoff | None:
    """From the noise records of a recipe's base runs; `spec` is one of its runs. None: they say nothing."""
    base = spec.arms[0].base.batch
    at_base = validity.assess(rows, base, base)
    if at_base is None:
        return None
    largest = _largest(rows, base) if spec.science.family == "adaptive" else None
    return Tradeoff(spec, source, rows, at_base, at_base.b_noise_point, largest)


def _largest(rows: list[dict[str, Any]], base: int) -> int:
    held = base
    while held < FAR * base:
        told = validity.assess(rows, 2 * held, base)
        if told is None or told.dominated < MOSTLY or max(abs(1 - told.low), abs(1 - told.high)) >= HOLDS:
            break
        held *= 2
    return held


def paragraph(t: Tradeoff, batches: list[int]) -> str:
    """What a person needs of it, for the batches of a plan."""
    said = [f"{t.spec.science.model.name}: {validity.scale_text(t.at_base)}, the critical batch, from {t.source}."]
    if t.b_noise is None:
        said.append("That is too uncertain for steps and samples to the same loss: more noise records would tell.")
    else:
        base_steps, base_samples = validity.steps_and_samples(t.base, t.b_noise)
        beside = []
        for batch in sorted({b for b in batches if b != t.base}):
            steps, samples = validity.steps_and_samples(batch, t.b_noise)
            beside.append(
                f"{batch:,} takes {steps / base_steps:.2g} × the steps, {samples / base_samples:.2f} × the samples"
            )
        if beside:
            said.append(f"To the same loss, beside batch {t.base:,}: {'; '.join(beside)} (McCandlish et al. 2018).")
        pays = f"{t.b_noise / 2:,.0f}"
        said.append(
            f"From batch {pays} on the next doubling no longer pays: it adds a larger share of samples than it saves "
            "of steps" + (", and the base batch lies above." if t.b_noise / 2 < t.base else ".")
        )
    if t.largest is None:
        return " ".join(said)
    said.append(
        f"The rule is predicted to hold up to batch {t.largest:,}, with a change of the displacement under {HOLDS:.0%}."
        if t.largest > t.base
        else f"At no larger batch is the rule predicted to hold within {HOLDS:.0%}."
    )
    return " ".join(said)


def draw(tradeoffs: list[Tradeoff], batches: list[int], file: Path, specs: Sequence[RunSpec] = ()) -> None:
    """Steps and samples to the same loss, and the predicted deviation, against batch: a row a recipe, then one a ramp.

    Raises:
        NothingToDrawError: no recipe has noise records.
        TradeoffError: matplotlib is missing, or the file cannot be written.
    """
    told = [(t, t.b_noise) for t in tradeoffs if t.b_noise is not None]
    ramps = {(t.source, s.science.batches): (t, s) for t in tradeoffs for s in specs if s.science.ramp and _same(t, s)}
    if not told and not ramps:
        raise NothingToDrawError(
            "no figure: no base run of this plan has noise records that tell its critical batch; train it first, or "
            "give noise_from=DIR"
        )
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise TradeoffError("--figure needs matplotlib: pip install 'scalerun[figures]'") from e
    figure = Figure(figsize=(9.0, 3.8 * (len(told) + len(ramps))), layout="constrained")
    rows = list(figure.subplots(len(told) + len(ramps), 2, squeeze=False))
    for axes, (t, b_noise) in zip(rows, told, strict=False):
        _row(axes[0], axes[1], t, b_noise, batches)
    for axes, (t, spec) in zip(rows[len(told) :], ramps.values(), strict=True):
        _ramp(axes[0], axes[1], t, spec)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as e:  # ValueError: a format that matplotlib does not write
        raise TradeoffError(f"--figure {file}: {e}") from e


def _row(left: Any, right: Any, t: Tradeoff, b_noise: float, batches: list[int]) -> None:
    end = max(*batches, 8 * b_noise, 4 * t.base)
    start = min(*batches, t.base)
    grid = [start * (end / start) ** (i / 100) for i in range(101)]
    one = validity.steps_and_samples(t.base, b_noise)
    for i, (label, colour) in enumerate((("steps", "tab:blue"), ("samples", "tab:orange"))):
        left.plot(grid, [validity.steps_and_samples(b, b_noise)[i] / one[i] for b in grid], color=colour, label=label)
        if all(map(math.isfinite, t.at_base.b_noise)):
            ends = [(validity.steps_and_samples(t.base, b), b) for b in t.at_base.b_noise]
            low, high = ([validity.steps_and_samples(b, bn)[i] / at[i] for b in grid] for at, bn in ends)
            left.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    left.plot(grid, [t.base / b for b in grid], color="grey", ls=":", label="steps at equal samples (the rule's)")
    left.axvline(b_noise, color="black", lw=0.8, ls="--", label=f"B_noise = {b_noise:,.0f}")
    left.axvline(
        b_noise / 2, color="tab:green", lw=0.8, ls="-.", label=f"the next doubling no longer pays: {b_noise / 2:,.0f}"
    )
    left.set(yscale="log", ylabel=f"to the same loss, over batch {t.base}")
    right.set_visible(t.largest is not None)
    doublings = [t.base * 2**i for i in range(int(math.log2(end / t.base)) + 1)]
    told = [(b, v) for b in doublings if (v := validity.assess(t.rows, b, t.base)) is not None]
    right.plot([b for b, _ in told], [100 * (v.deviation - 1) for _, v in told], color="tab:red", marker=".", ms=4)
    low, high = ([100 * (getattr(v, side) - 1) for _, v in told] for side in ("low", "high"))
    right.fill_between([b for b, _ in told], low, high, color="tab:red", alpha=0.15, linewidth=0)
    right.axhline(-100 * HOLDS, color="grey", lw=0.8, ls=":", label=f"-{HOLDS:.0%}: the rule should hold above")
    if t.largest is not None and t.largest > t.base:
        right.axvline(t.largest, color="tab:green", lw=0.8, ls="-.", label=f"holds up to {t.largest:,}, by the records")
    right.set(ylabel="predicted change of the displacement, %")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="batch", xlim=(start, end))
        axis.plot(batches, [0.0] * len(batches), "k|", transform=axis.get_xaxis_transform(), clip_on=False, ms=9)
        axis.legend(fontsize=8, frameon=False)
    s = t.spec.science
    left.set_title(
        f"{s.model.name} on {s.dataset.name}, {s.optimizer}; ticks: the plan's batches", fontsize=9, loc="left"
    )


def _ramp(left: Any, right: Any, t: Tradeoff, spec: RunSpec) -> None:
    """B_noise and the stages against samples; what each stage is predicted to change."""
    known, s = validity.signal(t.rows), spec.science
    assert known is not None
    for i, x in enumerate(known[1]):
        low, high = (1 / end if end > 0 else math.nan for end in (x.ratio[2], x.ratio[1]))
        middle, label = [1 / x.ratio[0] if x.ratio[0] > 0 else math.nan] * 2, "B_noise of the base, 95%"
        left.plot([x.begin, x.end], middle, color="black", label="" if i else label)
        left.fill_between([x.begin, x.end], [low] * 2, [high] * 2, color="black", alpha=0.15, linewidth=0)
    starts = [s.clock(stage.step) for stage in s.stages]
    ends = [*starts[1:], s.clock(s.steps)]
    for start, end, stage, change in zip(starts, ends, s.stages, validity.each_stage(spec, t.rows), strict=True):
        left.plot([start, end], [stage.batch] * 2, color="tab:blue", lw=2, label="" if start else "batch")
        right.plot([start, end], [math.nan if change is None else 100 * (change - 1)] * 2, color="tab:red", lw=2)
    left.set(yscale="log", ylabel="examples", xlabel="samples")
    left.legend(fontsize=8, frameon=False)
    right.axhline(0, color="grey", lw=0.8, ls=":")
    right.set(xlabel="samples", ylabel="predicted change of the displacement, %")
    left.set_title(f"ramp {s.batches}: {s.steps:,} steps", fontsize=9, loc="left")
