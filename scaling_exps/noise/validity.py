"""From noise records to what the scaling rule will do: torch-free, for the plan, the run's summary and figures.

    κ r = batch / B_noise = |∇f|² / (tr Σ / batch)     signal over noise of a step at the target batch
    √((1 + r) / (1 + κ r))                             predicted change of the displacement after equal data

(paper, section 5: exact on a linear loss with RMSprop; elsewhere a guide, and somewhat pessimistic.) The rule holds
while κ r ≪ 1; here that is κ r < 0.1, where the prediction is off from 1 by less than 5%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import RunDir

DOMINATED = 0.1  # κ r below this is κ r ≪ 1


@dataclass(frozen=True)
class Validity:
    """What noise records say about training at one batch.

    dominated: share of the measured samples with κ r < 0.1; measured: share of all samples where that can be told;
    deviation: mean of √((1+r)/(1+κr)) over them, and at its worst; b_noise: smallest and largest, in examples.
    """

    dominated: float
    measured: float
    deviation: float
    worst: float
    b_noise: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "noise_dominated": self.dominated,
            "measured": self.measured,
            "deviation": self.deviation,
            "worst_deviation": self.worst,
            "b_noise": [b if math.isfinite(b) else None for b in self.b_noise],
        }


def deviation(r: float, kappa: float) -> float:
    """√((1+r)/(1+κr)): the displacement at κ times the batch over that at the base batch, after equal data.

    Args:
        r: signal over noise at the base batch, >= 0.
        kappa: > 0.

    >>> deviation(0.0, 16), round(deviation(0.01, 16), 4)
    (1.0, 0.9331)
    """
    return math.sqrt((1 + r) / (1 + kappa * r))


def steps_and_samples(batch: float, b_noise: float) -> tuple[float, float]:
    """S/S_min and E/E_min to the same loss: steps over those of an endless batch, samples over those of a small one.

    (McCandlish et al. 2018, section 2.4; their critical batch is B_noise.)

    >>> steps_and_samples(100, 100)
    (2.0, 2.0)
    """
    return 1 + b_noise / batch, 1 + batch / b_noise


def assess(rows: list[dict[str, Any]], batch: int, base_batch: int) -> Validity | None:
    """Validity of the rule from `base_batch` to `batch`, from the noise records of one run; None: not enough data.

    A record stands for the samples since the one before. Where |∇f|² is not told apart from 0, the record still counts
    as noise dominated if even the upper end of its interval is below the limit; otherwise it counts as not measured.
    """
    noise = [r for r in rows if r.get("kind") == "noise"]
    full = [r for r in noise if r["method"] == "full"]
    before = total = measured = dominated = deviations = 0.0
    worst, b_noise = 1.0, []
    for row in full or noise:
        share, before = row["samples"] - before, row["samples"]
        total += share
        scale = batch / row["batch"]
        if row["enough"]:
            kappa_r = row["kappa_r"] * scale
            b_noise.append(row["b_noise"])
        elif row.get("kappa_r_high", math.inf) * scale < DOMINATED:
            kappa_r = max(0.0, row["kappa_r"] * scale)
        else:
            continue
        d = deviation(kappa_r * base_batch / batch, batch / base_batch)
        measured += share
        dominated += share * (kappa_r < DOMINATED)
        deviations += share * d
        worst = max(worst, d, key=lambda x: abs(math.log(x)))
    if not measured:
        return None
    span = (min(b_noise), max(b_noise)) if b_noise else (math.inf, math.inf)
    return Validity(dominated / measured, measured / total, deviations / measured, worst, span)


def summary(rows: list[dict[str, Any]], batch: int) -> str:
    """The line of a run's summary, from its own records."""
    validity = assess(rows, batch, batch)
    if validity is None:
        return "noise: not enough data" if any(r.get("kind") == "noise" for r in rows) else ""
    known = "" if validity.measured > 0.995 else f", told over {validity.measured:.0%} of them"
    return f"noise dominated for {validity.dominated:.0%} of samples (|∇f|² < {DOMINATED:g} tr Σ/batch{known})"


def sentence(validity: Validity, batch: int, base_batch: int) -> str:
    """What to expect at `batch`, in plain words."""
    off = abs(1 - validity.deviation)
    span = f"B_noise {_count(validity.b_noise[0])} to {_count(validity.b_noise[1])}"
    if batch == base_batch:
        return f"this is the base batch; noise dominates it for {validity.dominated:.0%} of training ({span})"
    if validity.dominated >= 0.8 and off < 0.05:
        verdict = "the rule should hold"
    elif off < 0.2:
        verdict = "the rule should hold nearly: expect a visible lag where the gradient is no longer noise"
    else:
        verdict = "do not expect the rule to hold: for much of training the gradient is no longer noise at this batch"
    return (
        f"κr < {DOMINATED:g} for {validity.dominated:.0%} of training, predicted deviation {off:.1%} on average and "
        f"{abs(1 - validity.worst):.1%} at worst ({span}): {verdict}"
    )


def _count(b: float) -> str:
    return f"{b:,.0f}" if math.isfinite(b) else "beyond measure"


def of_base(
    spec: RunSpec, siblings: list[RunSpec], runs_dir: Path, given: str | None
) -> tuple[list[dict[str, Any]], str]:
    """The noise records of the base run of `spec`, and where they are from (or why there are none).

    Args:
        siblings: the runs of the same plan: the base run of another seed will do.
        runs_dir: where runs lie.
        given: the run's directory, or a folder of runs; None: `runs_dir`.

    Raises:
        PlanError: `given` is no run, or one of another recipe, or has no noise record.
    """
    recipe = _recipe(spec)
    if given is not None and RunDir(given).exists:
        candidates = [RunDir(given)]
    else:
        ids = dict.fromkeys(a.base_run_id for s in (spec, *siblings) if _recipe(s) == recipe for a in s.arms)
        candidates = [RunDir(Path(given or runs_dir) / base_id) for base_id in ids]
    for run_dir in candidates:
        if not run_dir.exists:
            continue
        try:
            base = run_dir.spec()
        except PlanError:
            if given is not None:
                raise
            continue
        has = {k: getattr(base.science, k) for k in (*_SHARED, "svag")} | msgspec.structs.asdict(base.science.numbers())
        if differing := [f"{k} {has[k]} instead of {v}" for k, v in recipe.items() if has[k] != v]:
            raise PlanError(f"noise_from={given}: {run_dir} is of another recipe: {'; '.join(differing)}")
        rows = [r for r in run_dir.records().rows if r["kind"] == "noise"]
        if assess(rows, base.science.batch, base.science.batch) is not None:
            return rows, str(run_dir)
    if given is not None:
        raise PlanError(
            f"noise_from={given}: no base run with enough noise records lies there; give the directory of one, "
            "trained with measure.noise=full"
        )
    return [], "no noise record of the base run: train it, or give noise_from=DIR"


_SHARED = ("model", "dataset", "content", "optimizer", "precision", "freeze_last")


def _recipe(spec: RunSpec) -> dict[str, Any]:
    """What a run shares with its base run, apart from the seed."""
    shared = {k: getattr(spec.science, k) for k in _SHARED}
    return shared | {"svag": 1} | msgspec.structs.asdict(spec.arms[0].base)


def lines(specs: list[RunSpec], runs_dir: Path, given: str | None) -> list[str]:
    """One line for each batch and recipe of the list."""
    return list(dict.fromkeys(row["text"] for row in describe(specs, runs_dir, given).values()))


def describe(specs: list[RunSpec], runs_dir: Path, given: str | None) -> dict[str, dict[str, Any]]:
    """Run id -> the `validity` object of `plan --json`: numbers, `source`, and `text`."""
    of_recipe: dict[str, tuple[list[dict[str, Any]], str]] = {}
    described: dict[str, dict[str, Any]] = {}
    for spec in specs:
        recipe = repr(_recipe(spec))
        if recipe not in of_recipe:
            of_recipe[recipe] = of_base(spec, specs, runs_dir, given)
        rows, source = of_recipe[recipe]
        batch, base = spec.science.batch, spec.arms[0].base.batch
        validity = assess(rows, batch, base)
        label = f"validity, {spec.science.model.name} {spec.science.optimizer} batch {base} -> {batch}"
        if validity is not None:
            row = {**validity.to_json(), "source": source, "text": f"{label}: {sentence(validity, batch, base)}"}
        elif rows:
            row = {
                "source": source,
                "text": f"{label}: not enough data at this batch (more measure.noise_examples would tell)",
            }
        else:
            row = {"source": None, "text": f"validity: {source}"}
        described[spec.run_id] = row
    return described
