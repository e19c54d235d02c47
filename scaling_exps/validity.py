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

from scaling_exps import records
from scaling_exps.plan import PlanError, RunSpec

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


def assess(rows: list[dict[str, Any]], batch: int, base_batch: int) -> Validity | None:
    """Validity of the rule from `base_batch` to `batch`, from the noise records of one run; None: not enough data.

    A record stands for the samples since the one before. Where |∇f|² is not told apart from 0, the record still counts
    as noise dominated if even the upper end of its interval is below the limit; otherwise it counts as not measured.
    """
    noise = [r for r in rows if r.get("kind") == "noise"]
    full = [r for r in noise if r["method"] == "full"]
    before = total = told = dominated = deviations = 0.0
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
        told += share
        dominated += share * (kappa_r < DOMINATED)
        deviations += share * d
        worst = max(worst, d, key=lambda x: abs(math.log(x)))
    if not told:
        return None
    span = (min(b_noise), max(b_noise)) if b_noise else (math.inf, math.inf)
    return Validity(dominated / told, told / total, deviations / told, worst, span)


def summary(rows: list[dict[str, Any]], batch: int) -> str:
    """The line of a run's summary, from its own records."""
    found = assess(rows, batch, batch)
    if found is None:
        return "noise: not enough data" if any(r.get("kind") == "noise" for r in rows) else ""
    known = "" if found.measured > 0.995 else f", told over {found.measured:.0%} of them"
    return f"noise dominated for {found.dominated:.0%} of samples (|∇f|² < {DOMINATED:g} tr Σ/batch{known})"


def sentence(found: Validity, batch: int, base_batch: int) -> str:
    """What to expect at `batch`, in plain words."""
    off = abs(1 - found.deviation)
    span = f"B_noise {_count(found.b_noise[0])} to {_count(found.b_noise[1])}"
    if batch == base_batch:
        return f"this is the base batch; noise dominates it for {found.dominated:.0%} of training ({span})"
    if found.dominated >= 0.8 and off < 0.05:
        verdict = "the rule should hold"
    elif off < 0.2:
        verdict = "the rule should hold nearly: expect a visible lag where the gradient is no longer noise"
    else:
        verdict = "do not expect the rule to hold: for much of training the gradient is no longer noise at this batch"
    return (
        f"κr < {DOMINATED:g} for {found.dominated:.0%} of training, predicted deviation {off:.1%} on average and "
        f"{abs(1 - found.worst):.1%} at worst ({span}): {verdict}"
    )


def _count(b: float) -> str:
    return f"{b:,.0f}" if math.isfinite(b) else "beyond measure"


def of_base(spec: RunSpec, runs_dir: Path, given: str | None) -> tuple[list[dict[str, Any]], str]:
    """The noise records of the base run of `spec`, and where they are from (or why there are none).

    The base run is looked up by its run id, then as a run of the same recipe with other records or another seed.

    Args:
        runs_dir: where runs lie.
        given: the run's directory, or a folder of runs; None: `runs_dir`.

    Raises:
        PlanError: `given` is no run, or one of another recipe, or has no noise record.
    """
    if given is not None and (Path(given) / "run.json").exists():
        found, reasons = _search(spec, [Path(given)])
    else:
        folder = Path(given) if given is not None else runs_dir
        found, reasons = _search(spec, [folder / spec.arms[0].base_run_id])
        if found is None:
            found, reasons = _search_once(_recipe(spec), spec, folder)
    if found is not None:
        return found
    if given is None:
        return [], "no noise record of the base run: train it with measure.noise=full, or give noise=DIR"
    raise PlanError(f"noise={given}: " + (reasons[0] if reasons else "there is no run; give a run's directory"))


_FOUND: dict[tuple[str, str], Any] = {}  # a sweep looks through a folder once for each recipe


def _search_once(recipe: str, spec: RunSpec, folder: Path) -> Any:
    key = recipe, str(folder.resolve())
    if key not in _FOUND:
        _FOUND[key] = _search(spec, sorted(p.parent for p in folder.glob("*/run.json")))
    return _FOUND[key]


def _recipe(spec: RunSpec) -> str:
    s = spec.science
    return repr((s.model, s.dataset, s.optimizer, s.precision, s.freeze_last, s.schedule, spec.arms[0].base))


def _search(spec: RunSpec, run_dirs: list[Path]) -> tuple[tuple[list[dict[str, Any]], str] | None, list[str]]:
    """The first of `run_dirs` that is a base run with enough noise data, and why the others are not."""
    reasons = []
    for run_dir in run_dirs:
        if not (run_dir / "run.json").exists():
            continue
        try:
            other = records.read_spec(run_dir)
        except PlanError as e:
            reasons.append(str(e))
            continue
        if differs := _differences(spec, other):
            reasons.append(f"{run_dir} is of another recipe: {'; '.join(differs)}")
            continue
        rows = [r for r in records.read_records(run_dir) if r["kind"] == "noise"]
        if assess(rows, other.science.batch, other.science.batch) is not None:
            return (rows, str(run_dir)), reasons
        reasons.append(f"{run_dir} has no noise record with enough data: train it with measure.noise=full")
    return None, reasons


def _differences(spec: RunSpec, other: RunSpec) -> list[str]:
    """What keeps `other` from being the base of `spec`, its records and seed aside."""
    mine, base, s = spec.science, spec.arms[0].base, other.science
    want: dict[str, Any] = {k: getattr(mine, k) for k in ("model", "dataset", "optimizer", "precision", "freeze_last")}
    want |= {"batch": base["batch"], "svag": 1, "schedule": mine.schedule}
    have = {k: getattr(s, k) for k in want}
    for key in ("lr", "betas", "eps", "weight_decay"):
        value = getattr(s.hyper, key)
        want[key], have[key] = base[key], list(value) if key == "betas" else value
    if mine.model.get("norm") == "batch":
        want["micro_batch"], have["micro_batch"] = min(mine.micro_batch, base["batch"]), s.micro_batch
    return [f"{k} {have[k]} instead of {want[k]}" for k in want if have[k] != want[k]]


def lines(specs: list[RunSpec], runs_dir: Path, given: str | None) -> list[str]:
    """One line for each batch and recipe of the list."""
    return list(dict.fromkeys(describe(spec, runs_dir, given)["text"] for spec in specs))


def describe(spec: RunSpec, runs_dir: Path, given: str | None) -> dict[str, Any]:
    """The `validity` object of `plan --json`: numbers, `source`, and `text`."""
    batch, base = spec.science.batch, int(spec.arms[0].base["batch"])
    rows, source = of_base(spec, runs_dir, given)
    found = assess(rows, batch, base)
    what = f"validity, {spec.science.model['name']} {spec.science.optimizer} batch {base} -> {batch}"
    if found is None and rows:
        wanting = "not enough data at this batch (more measure.noise_examples would tell)"
        return {"source": source, "text": f"{what}: {wanting}"}
    if found is None:
        return {"source": None, "text": f"validity: {source}"}
    return {**found.to_json(), "source": source, "text": f"{what}: {sentence(found, batch, base)}"}
