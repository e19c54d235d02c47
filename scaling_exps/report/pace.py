"""Time against batch, measured: steps, samples and time to the same loss, beside what the base runs' noise predicts.

The loss is a training loss, a mean over a tenth of training, and the lowest that every run of the base and of the rules
under test reached. Where a run reached it is interpolated in its records, and divided by where the base run of its own
seed did: both saw the same examples. Time is that of training, at the run's mean speed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scaling_exps.noise import tradeoff
from scaling_exps.report.answer import largest_safe
from scaling_exps.report.judge import mean_sd
from scaling_exps.report.runs import LAST, Run
from scaling_exps.report.verdict import Row

PAYS = 4 / 3  # times the samples: a doubling that takes more adds a larger share of them than it saves of the steps


@dataclass(frozen=True)
class Point:
    """An arm over its base: mean and standard deviation, over n seeds, of samples, steps and time to the loss."""

    rule: str
    batch: int
    n: int
    samples: tuple[float, float]
    steps: tuple[float, float]
    time: tuple[float, float]


@dataclass(frozen=True)
class Pace:
    """Of one setting. `held`: of each rule under test the batch up to which it was shown to hold (the base's: none)."""

    setting: str
    base: int
    loss: float
    points: tuple[Point, ...]
    predicted: tradeoff.Tradeoff | None
    held: dict[str, int]


def of(rows: list[Row]) -> Pace | str:
    """The rows of one setting; or why there is nothing to tell."""
    base = next((r for r in rows if r.role == "base" and r.runs), None)
    arms = [r for r in rows if r.role == "rule" and r.svag == 1 and r.runs and not r.ramp]
    if base is None or not any(r.batch != base.batch for r in arms):
        batches = sorted({r.batch for r in rows if r.runs})
        return f"no rule under test has finished beside its base run (batch {', '.join(f'{b:,}' for b in batches)})"
    first = {run.spec.science.seed: run for run in base.runs}
    pairs = [(row, [(run, first[s]) for run in row.runs if (s := run.spec.science.seed) in first]) for row in arms]
    used = {run.spec.run_id: run for _, both in pairs for pair in both for run in pair}
    if not used:
        return "no arm has a seed of its base run"
    window = LAST * min(run.curve[0][-1] for run in used.values())
    falls = {run_id: _fall(run, window) for run_id, run in used.items()}
    loss = max(float(y.min()) for _, y in falls.values())
    at = {run_id: _crossing(*fall, loss) for run_id, fall in falls.items()}
    points = []
    for row, both in pairs:
        ratios = [at[run.spec.run_id] / at[b.spec.run_id] for run, b in both]
        kappa = row.batch / base.batch
        time = [x * _seconds(run) / _seconds(b) for x, (run, b) in zip(ratios, both, strict=True)]
        if ratios:
            steps = [x / kappa for x in ratios]
            points.append(Point(row.rule, row.batch, len(both), mean_sd(ratios), mean_sd(steps), mean_sd(time)))
    noise = [record for run in base.runs for record in run.noise]
    source = f"{len(base.runs)} base run{'s' * (len(base.runs) > 1)}"
    held = {r.rule: safe.batch if (safe := largest_safe([a for a in arms if a.rule == r.rule])) else base.batch
            for r in arms}  # fmt: skip
    predicted = tradeoff.told(arms[0].runs[0].spec, noise, source)
    return Pace(base.setting, base.batch, loss, tuple(sorted(points, key=lambda p: p.batch)), predicted, held)


def _fall(run: Run, window: float) -> tuple[np.ndarray, np.ndarray]:
    """(samples, mean training loss over the window around there), at every record that has a whole window behind it."""
    x, total = run.curve
    ends = x[x >= window * (1 - 1e-9)]
    return ends - window / 2, (np.interp(ends, x, total) - np.interp(ends - window, x, total)) / window


def _crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Where y first comes down to the level, linear between points."""
    i = int(np.argmax(y <= level))
    return float(x[i] if i == 0 else x[i] - (x[i] - x[i - 1]) * (level - y[i]) / (y[i - 1] - y[i]))


def _seconds(run: Run) -> float:
    """Of training on a sample; nan where the run does not say."""
    seconds, clock = run.result.get("seconds"), float(run.curve[0][-1])
    return seconds / clock if isinstance(seconds, int | float) and seconds > 0 else math.nan


def paragraphs(rows: list[Row]) -> list[str]:
    """One for each setting, named where there are several."""
    settings = by_setting(rows)
    return [(f"{members[0].setting}: " if len(settings) > 1 else "") + paragraph(members) for members in settings]


def paragraph(rows: list[Row]) -> str:
    """What was measured, what the noise predicts, and up to where the rule holds by either; rows of one setting."""
    pace, head = of(rows), "time against batch"
    if isinstance(pace, str):
        return f"{head}: {pace}"
    several = len(pace.held) > 1
    told = [
        f"{p.batch:,}{f' under {p.rule}' * several} takes {_text(p.steps)} × the steps, {_text(p.samples)} × the "
        f"samples" + (f", {_text(p.time)} × the time" if math.isfinite(p.time[0]) else "")
        for p in pace.points
    ]
    said = [
        f"{head}: to a training loss of {pace.loss:.4g}, which every arm under test reached, beside batch "
        f"{pace.base:,}: {'; '.join(told)}{' (mean ± sd over seeds)' * (max(p.n for p in pace.points) > 1)}.",
        *(_pays(pace, rule, several) for rule in pace.held),
    ]
    batches = [p.batch for p in pace.points]
    said.append(
        tradeoff.paragraph(pace.predicted, batches)
        if pace.predicted
        else "The base runs have no noise record that tells a critical batch, so nothing is predicted."
    )
    judged = any(t.margin is not None for r in rows for t in r.tests)
    said.append(
        " ".join(
            f"{rule} was shown to hold up to batch {batch:,}." if batch > pace.base
            else f"{rule} was shown to hold at no larger batch than {pace.base:,}."
            for rule, batch in pace.held.items()
        ) if judged else "Where it holds was not judged: no margin was fixed."
    )  # fmt: skip
    return " ".join(said)


def _text(value: tuple[float, float]) -> str:
    mean, sd = value
    return f"{mean:#.3g}" + (f" ± {sd:.1g}" if math.isfinite(sd) else "")


def _pays(pace: Pace, rule: str, named: bool) -> str:
    """From which batch on a measured doubling no longer paid."""
    under = f"Under {rule}, measured:" if named else "Measured:"
    before, samples = pace.base, 1.0
    for p in (p for p in pace.points if p.rule == rule and p.batch > pace.base):
        each = (p.samples[0] / samples) ** (1 / math.log2(p.batch / before))
        if each > PAYS:
            return (
                f"{under} from batch {before:,} to {p.batch:,} a doubling no longer pays ({each - 1:+.0%} samples, "
                f"{each / 2 - 1:+.0%} steps)."
            )
        before, samples = p.batch, p.samples[0]
    return f"{under} every doubling up to batch {before:,} pays."


def as_json(rows: list[Row]) -> dict[str, Any]:
    """The same as numbers, of one setting."""
    pace = of(rows)
    value: dict[str, Any] = {"setting": rows[0].setting, "text": paragraph(rows)}
    if isinstance(pace, str):
        return value
    t = pace.predicted
    return value | {
        "base_batch": pace.base,
        "loss": pace.loss,
        "points": [
            {k: {"mean": v[0], "sd": v[1]} if isinstance(v, tuple) else v for k, v in asdict(p).items()}
            for p in pace.points
        ],
        "b_noise": t and t.b_noise,
        "b_noise_interval": t and t.at_base.b_noise,
        "doubling_pays_below": t and t.b_noise and t.b_noise / 2,
        "predicted_to_hold": t and t.largest,
        "measured_to_hold": pace.held,
    }


def by_setting(rows: list[Row]) -> list[list[Row]]:
    return [[r for r in rows if r.setting == s] for s in dict.fromkeys(r.setting for r in rows)]
