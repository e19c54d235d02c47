"""From noise records to what the scaling rule will do: torch-free, for the plan, the run's summary and figures.

    κ r = batch / B_noise = |∇f|² / (tr Σ / batch)     signal over noise of a step at the target batch
    √((1 + r) / (1 + κ r))                             predicted change of the displacement after equal data
    S / S_min = 1 + B_noise / B                        steps to the same loss at batch B (McCandlish et al. 2018)
    E / E_min = 1 + B / B_noise                        samples to it

(paper, section 5: exact on a linear loss with RMSprop; elsewhere it orders batches and its size is a guide: see
docs/comparison.md.) The rule holds while κ r ≪ 1; here that is κ r < 0.1, where the prediction is off from 1 by less
than 5%.

|∇f|² and tr Σ are summed over all records of a stretch of training, whatever each of them says alone, and the ratio is
of the sums: to keep only the records that are significant would be a selection on the outcome, which makes B_noise too
small. The intervals (95%) are of the jackknife over records; those of several stretches are combined by MOVER (Zou and
Donner 2008): the deviation falls in r, so that the ends of r's interval are the ends of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from scaling_exps.plan import Arm, Foreign, PlanError, RunSpec
from scaling_exps.plan.margin import quantile
from scaling_exps.records import RunDir, read_noise

METHODS = ("full", "free", "halves", "examples", "moments")  # of a record, the best first
DOMINATED = 0.1  # κ r below this is κ r ≪ 1
STRETCH = 5  # records of a stretch, or more
STRETCHES = 6  # of training, at most
TELLING = 0.5  # half width over value, up to which a point estimate of B_noise is given; beyond it only bounds are


@dataclass(frozen=True)
class Validity:
    """What noise records say about training at one batch.

    dominated: share of the samples in stretches with κ r < 0.1; measured: share where the interval of κ r lies on one
    side of 0.1; deviation: mean of √((1+r)/(1+κr)) over the samples, `low` and `high` its 95% interval, `worst` that of
    the worst stretch; b_noise: lower and upper bound (95%, infinite where |∇f|² is not told from 0), in examples;
    b_noise_point: the estimate between them, None where it is too uncertain to be one.
    """

    dominated: float
    measured: float
    deviation: float
    low: float
    high: float
    worst: float
    b_noise: tuple[float, float]
    b_noise_point: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "noise_dominated": self.dominated,
            "measured": self.measured,
            "deviation": self.deviation,
            "deviation_low": self.low,
            "deviation_high": self.high,
            "worst_deviation": self.worst,
            "b_noise": [b if math.isfinite(b) else None for b in self.b_noise],
            "b_noise_point": self.b_noise_point,
        }


def deviation(r: float, kappa: float) -> float:
    """√((1+r)/(1+κr)): the displacement at κ times the batch over that at the base batch, after equal data.

    Args:
        r: signal over noise at the base batch, >= 0.
        kappa: > 0.

    >>> deviation(0.0, 16), round(deviation(0.01, 16), 4), deviation(math.inf, 16)
    (1.0, 0.9331, 0.25)
    """
    return math.sqrt((1 + r) / (1 + kappa * r) if math.isfinite(r) else 1 / kappa)


def steps_and_samples(batch: float, b_noise: float) -> tuple[float, float]:
    """S/S_min and E/E_min: steps and samples to the same loss, over the least that any batch needs.

    Args:
        batch, b_noise: examples, > 0. At batch = B_noise, the critical batch, both are 2.

    >>> steps_and_samples(256, 1024)
    (5.0, 1.25)
    """
    return 1 + b_noise / batch, 1 + batch / b_noise


def assess(
    rows: list[dict[str, Any]], batch: int, base_batch: int, ramp: Sequence[tuple[float, int]] = ()
) -> Validity | None:
    """Validity of the rule from `base_batch` to `batch`, from noise records; None: they say nothing.

    Args:
        rows: records of one base run, or of several seeds of it together; those of the best method count.
        ramp: (samples, batch) of its stages, where the batch changes within the run.
    """
    known = signal(rows)
    if known is None:
        return None
    whole, stretches = known
    total = stretches[-1].end
    # of each stretch the batches in it, and their shares of it
    inside = [_batches(x, ramp or [(0.0, batch)]) for x in stretches]
    shares, spans = [(x.end - x.begin) / total for x in stretches], [x.ratio for x in stretches]
    at = [  # of each stretch: middle and two ends
        [math.fsum(w * _extended(x * base_batch, b / base_batch) for w, b in pieces) for x in span]
        for span, pieces in zip(spans, inside, strict=True)
    ]
    kappas = [b / base_batch for pieces in inside for _, b in pieces]
    least, *_, most = sorted((1.0, *(kappa**-0.5 for kappa in kappas), 1.0))  # that any r >= 0 gives
    middle = math.fsum(w * d[0] for w, d in zip(shares, at, strict=True))
    reach = [
        math.sqrt(math.fsum((w * (end(d) - d[0])) ** 2 for w, d in zip(shares, at, strict=True))) for end in (min, max)
    ]
    inverse, low, high = whole
    each = [(w * v, DOMINATED / b, x) for w, x, p in zip(shares, spans, inside, strict=True) for v, b in p]
    return Validity(
        dominated=math.fsum(w for w, limit, (x, _, _) in each if x < limit),
        measured=math.fsum(w for w, limit, (_, a, b) in each if b < limit or a > limit),
        deviation=min(max(middle, least), most),
        low=min(max(middle - reach[0], least), most),
        high=min(max(middle + reach[1], least), most),
        worst=max((min(max(d[0], least), most) for d in at), key=lambda d: abs(math.log(d))),
        b_noise=(1 / high if high > 0 else math.inf, 1 / low if low > 0 else math.inf),
        b_noise_point=1 / inverse if high - inverse <= TELLING * inverse else None,
    )


def along(spec: RunSpec, rows: list[dict[str, Any]]) -> Validity | None:
    """`assess` at the batch of a run, or at each of its stages, from the records of its base runs."""
    return assess(rows, spec.arms[0].batch, spec.arms[0].base.batch, _stages(spec))


def each_stage(spec: RunSpec, rows: list[dict[str, Any]]) -> list[float | None]:
    """The predicted change of the displacement within each stage of a run; None where no records lie."""
    known, stages, base = signal(rows), _stages(spec), spec.arms[0].base.batch
    assert known is not None
    out = []
    for i, (start, batch) in enumerate(stages):
        end = stages[i + 1][0] if i + 1 < len(stages) else math.inf
        spans = [(min(end, x.end) - max(start, x.begin), x.ratio[0]) for x in known[1]]
        total = math.fsum(w for w, _ in spans if w > 0)
        parts = (w * _extended(x * base, batch / base) for w, x in spans if w > 0)
        out.append(math.fsum(parts) / total if total else None)
    return out


def _stages(spec: RunSpec) -> list[tuple[float, int]]:
    return [(spec.science.clock(stage.step), stage.batch) for stage in spec.science.stages]


@dataclass(frozen=True)
class Stretch:
    """A stretch of training: from and to which sample, and |∇f|²/tr Σ there, 1/examples, with its 95% interval."""

    begin: float
    end: float
    ratio: tuple[float, float, float]


def signal(rows: list[dict[str, Any]]) -> tuple[tuple[float, float, float], list[Stretch]] | None:
    """|∇f|²/tr Σ over all noise records and in each stretch of training; None: they say nothing."""
    noise = [r for r in rows if r.get("kind") == "noise" and _finite(r, "gradient_sq") and _finite(r, "trace")]
    best = min((METHODS.index(r["method"]) for r in noise), default=0)
    noise = [r for r in noise if r["method"] == METHODS[best]]
    whole = _ratio(noise, skewed=True)
    if whole is None or not math.isfinite(whole[2]):
        return None
    before, out = 0.0, []
    for members in _stretches(noise):
        out.append(Stretch(before, float(members[-1]["samples"]), _ratio(members) or whole))
        before = out[-1].end
    return whole, out


def _batches(x: Stretch, ramp: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(share of the stretch, batch) of the stages that lie in it."""
    ends = [start for start, _ in ramp[1:]] + [math.inf]
    spans = [(min(end, x.end) - max(start, x.begin), b) for (start, b), end in zip(ramp, ends, strict=True)]
    return [(span / (x.end - x.begin), b) for span, b in spans if span > 0]


def _extended(r: float, kappa: float) -> float:
    """`deviation`, and its tangent at 0 below: an r that came out negative then does not bend the mean of several."""
    return deviation(r, kappa) if r >= 0 else 1 + (1 - kappa) / 2 * r


def _finite(row: dict[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def _stretches(noise: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records in order, cut between marks into as many stretches as have STRETCH records each."""
    ordered = sorted(noise, key=lambda r: r["samples"])
    marks = [list(group) for _, group in itertools.groupby(ordered, key=lambda r: r["samples"])]
    count = max(1, min(STRETCHES, len(ordered) // STRETCH, len(marks)))
    edges = [len(marks) * i // count for i in range(count + 1)]
    return [list(itertools.chain(*marks[a:b])) for a, b in itertools.pairwise(edges)]


def _ratio(noise: list[dict[str, Any]], skewed: bool = False) -> tuple[float, float, float] | None:
    """|∇f|²/tr Σ of all records together, 1/examples, and its 95% interval; None where there is none.

    Of three records or more the interval is the jackknife's; of fewer it is that of the records themselves. `skewed`
    takes the report's wider quantile: tr Σ of heavy-tailed gradients is mostly too small, now and then far too large.
    """
    n = len(noise)
    signal, trace = ([r[key] for r in noise] for key in ("gradient_sq", "trace"))
    u, t = math.fsum(signal), math.fsum(trace)
    if not t > 0:
        return None
    if n >= 3:
        from scipy.special import stdtrit  # 0.4 s, which a plan without records does not pay

        left_out = [(u - a) / (t - b) if t > b else math.nan for a, b in zip(signal, trace, strict=True)]
        mean = math.fsum(left_out) / n
        se = math.sqrt(math.fsum((x - mean) ** 2 for x in left_out) * (n - 1) / n)
        reach = (quantile(0.975, n) if skewed else float(stdtrit(n - 1, 0.975))) * se
    else:
        reach = math.hypot(*(r.get("gradient_sq_high", math.inf) - r["gradient_sq"] for r in noise)) / t
    return (u / t, u / t - reach, u / t + reach) if math.isfinite(reach) else None


def summary(rows: list[dict[str, Any]], batch: int) -> str:
    """The line of a run's summary, from its own records."""
    validity = assess(rows, batch, batch)
    if validity is None:
        return "noise: not enough data" if any(r.get("kind") == "noise" for r in rows) else ""
    known = "" if validity.measured > 0.995 else f"; certain for {validity.measured:.0%} of them"
    return (
        f"noise dominated for {validity.dominated:.0%} of samples (|∇f|² < {DOMINATED:g} tr Σ/batch{known}), "
        f"{scale_text(validity)}"
    )


def scale_text(validity: Validity) -> str:
    """B_noise as it is printed: with its interval, or its bounds alone where they are too far apart for a number."""
    low, high = validity.b_noise
    if validity.b_noise_point is not None:
        return f"B_noise {validity.b_noise_point:,.0f} [{low:,.0f}, {high:,.0f}]"
    if not math.isfinite(low):
        return "B_noise beyond measure"
    return f"B_noise between {low:,.0f} and {high:,.0f}" if math.isfinite(high) else f"B_noise above {low:,.0f}"


def change_text(value: float, low: float, high: float) -> str:
    """A change of the displacement, as a share of the base's, with its interval where there is one.

    >>> change_text(0.826, 0.71, 0.9)
    '-17.4% [-29.0%, -10.0%]'
    """
    ends = "" if math.isnan(low) else f" [{low - 1:+.1%}, {high - 1:+.1%}]"
    return f"{value - 1:+.1%}{ends}"


def sentence(validity: Validity, batch: int, base_batch: int) -> str:
    """What to expect at `batch`, in plain words."""
    if batch == base_batch:
        return (
            f"this is the base batch; noise dominates it for {validity.dominated:.0%} of training "
            f"({scale_text(validity)})"
        )
    best, most = sorted(abs(1 - d) for d in (validity.low, validity.high))
    if best <= 0 < most and validity.low < 1 < validity.high:
        best = 0.0
    if most < 0.05 and validity.dominated >= 0.8:
        verdict = "the rule should hold"
    elif most < 0.2:
        verdict = "the rule should hold nearly: expect a visible lag where the gradient is no longer noise"
    elif best >= 0.2:
        verdict = "do not expect the rule to hold: for much of training the gradient is no longer noise at this batch"
    else:
        verdict = (
            "too uncertain to say whether the rule holds; more records (measure.noise_examples, "
            "measure.noise_records, base runs of more seeds) would tell"
        )
    return (
        f"κr < {DOMINATED:g} for {validity.dominated:.0%} of training, predicted change of the displacement "
        f"{change_text(validity.deviation, validity.low, validity.high)}, {validity.worst - 1:+.1%} at worst "
        f"({scale_text(validity)}): {verdict}. The prediction is ordinal: it orders batches, its size is a guide"
    )


def of_base(
    spec: RunSpec, siblings: list[RunSpec], runs_dir: Path, given: str | None
) -> tuple[list[dict[str, Any]], str]:
    """The noise records of the base runs of `spec`, all seeds together, and their source (or why there are none).

    Args:
        siblings: the runs of the same plan: the base runs of other seeds count, too.
        runs_dir: where runs lie.
        given: the run's directory, a folder of runs, or a NoiseProbe's noise.jsonl or the folder that has one; None:
            `runs_dir`.

    Raises:
        PlanError: `given` is no run, or one of another recipe, or has no noise record.
    """
    if given is not None and (other := probed(Path(given))):
        return other, f"{given}, of another trainer (whether it is this recipe is not checked)"
    recipe = _recipe(spec)
    if given is not None and RunDir(given).exists:
        candidates = [RunDir(given)]
    else:
        ids = dict.fromkeys(a.base_run_id for s in (spec, *siblings) if _recipe(s) == recipe for a in s.arms)
        candidates = [RunDir(Path(given or runs_dir) / base_id) for base_id in ids]
    rows: list[dict[str, Any]] = []
    sources = []
    for run_dir in candidates:
        if not run_dir.exists:
            continue
        try:
            base = run_dir.spec()
        except PlanError:
            if given is not None:
                raise
            continue
        if isinstance(base.science.model, Foreign):
            raise PlanError(f"noise_from={given}: {run_dir} is of another trainer; give the noise.jsonl that it wrote")
        has = {k: getattr(base.science, k) for k in (*_SHARED, "svag")} | msgspec.structs.asdict(base.science.numbers())
        if differing := [f"{k} {has[k]} instead of {v}" for k, v in recipe.items() if has[k] != v]:
            raise PlanError(f"noise_from={given}: {run_dir} is of another recipe: {'; '.join(differing)}")
        if found := [r for r in run_dir.records().rows if r["kind"] == "noise"]:
            rows += found
            sources.append(str(run_dir))
            batch = base.science.batch
    if rows and assess(rows, batch, batch) is not None:
        return rows, ", ".join(sources)
    if given is not None:
        raise PlanError(
            f"noise_from={given}: no base run with enough noise records lies there; give the directory of one, "
            "trained with measure.noise=full, or the noise.jsonl of a NoiseProbe"
        )
    return [], "no noise record of the base run: train it, or give noise_from=DIR"


def probed(path: Path) -> list[dict[str, Any]]:
    """The records of a NoiseProbe's noise.jsonl, or of the one in a folder; none where they say nothing yet."""
    rows = read_noise(path / "noise.jsonl" if path.is_dir() else path)
    return rows if rows and assess(rows, rows[-1]["batch"], rows[-1]["batch"]) is not None else []


def noise_scale(path: Path) -> float:
    """B_noise in examples, from a noise.jsonl (or its folder) or from the folder of a run.

    Raises:
        PlanError: no records, or so few that they tell bounds only.
    """
    rows = probed(path) or [r for r in RunDir(path).records().rows if r["kind"] == "noise"]
    known = assess(rows, rows[-1]["batch"], rows[-1]["batch"]) if rows else None
    if known is None:
        raise PlanError(
            f"{path} has no noise records that say anything: give a NoiseProbe's noise.jsonl or a run's folder"
        )
    if known.b_noise_point is None:
        raise PlanError(f"{path} tells no noise scale: {scale_text(known)}. Measure longer, or give --noise-scale")
    return known.b_noise_point


_SHARED = ("model", "dataset", "content", "optimizer", "precision", "freeze_last")


def _recipe(spec: RunSpec) -> dict[str, Any]:
    """What a run shares with its base run, apart from the seed."""
    shared = {k: getattr(spec.science, k) for k in _SHARED}
    return shared | {"svag": 1} | msgspec.structs.asdict(spec.arms[0].base)


def predicts(spec: RunSpec, arm: Arm) -> bool:
    """Whether the formula is that of this arm: a rule under test for adaptive optimizers, plain, at equal samples."""
    s = spec.science
    return arm.role == "rule" and s.family == "adaptive" and s.svag == 1 and arm.duration == 1


def describe(specs: list[RunSpec], runs_dir: Path, given: str | None) -> dict[str, dict[str, Any]]:
    """Run id -> the `validity` object of `plan --json`: numbers, `source`, and `text`."""
    of_recipe: dict[str, tuple[list[dict[str, Any]], str]] = {}
    described: dict[str, dict[str, Any]] = {}
    for spec in specs:
        recipe = repr(_recipe(spec))
        if recipe not in of_recipe:
            of_recipe[recipe] = of_base(spec, specs, runs_dir, given)
        rows, source = of_recipe[recipe]
        s, base, batch = spec.science, spec.arms[0].base.batch, spec.arms[0].batch
        validity = along(spec, rows)
        label = f"validity, {s.model.name} {s.optimizer} batch {base} -> {s.batches}"
        if rows and batch != base and not any(predicts(spec, arm) for arm in spec.arms):
            text = f"{label}: no prediction; the formula is that of the square-root rule for adaptive optimizers"
            row = {"source": source, "applies": False, "text": text}
        elif validity is not None:
            row = {**validity.to_json(), "source": source, "text": f"{label}: {sentence(validity, batch, base)}"}
            row |= {"stages": each_stage(spec, rows)} if s.ramp else {}
        elif rows:
            row = {
                "source": source,
                "text": f"{label}: not enough data at this batch (more measure.noise_examples would tell)",
            }
        else:
            row = {"source": None, "text": f"validity: {source}"}
        described[spec.run_id] = row
    return described
