"""What `ramp=` says -> stages: (samples at which it starts, batch, B_noise there or None). Floats only."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from scaling_exps.config import RAMPS, Config, TokenDataset
from scaling_exps.plan.spec import PlanError, Schedule

Stages = list[tuple[int, int, float | None]]


def stages(config: Config, largest: int, schedule: Schedule, limit: float) -> Stages:
    """The stages of a run, in order; neighbours of one batch are one stage.

    Args:
        largest: the batch that shares of a batch are of.
        schedule: of the run.
        limit: of the batch, for seesaw: the rule's and `ramp.largest`.

    Raises:
        PlanError: with every fault, one a line.
    """
    at, base, total = config.ramp.at, config.recipe.batch, schedule.total_samples
    if at == "auto":
        raise PlanError("ramp=auto is made of noise records, which `scalerun plan` and `scalerun` look up")
    if at == "seesaw":
        rows = [[0.0, float(base)], *seesaw(schedule, base, min(limit, base * 2.0 ** (config.ramp.stages - 1)))]
        per = 1.0
        if len(rows) == 1:
            raise PlanError(
                f"ramp=seesaw: with recipe.decay={schedule.decay} and batches up to {limit:,.0f} the schedule gives no "
                "second stage: it needs a rate that falls to a half, and room for twice the batch; name the stages, "
                f"{RAMPS}"
            )
    elif isinstance(at, dict):
        if len(at) != 1:
            raise PlanError(f"ramp={at}: give samples or tokens, one of them")
        unit, rows = next(iter(at.items()))
        if unit == "tokens" and not isinstance(config.dataset, TokenDataset):
            raise PlanError(f"ramp={{tokens: ...}}: dataset {config.dataset.name} has no tokens; give {{samples: ...}}")
        per = 1 / config.dataset.context if unit == "tokens" and isinstance(config.dataset, TokenDataset) else 1.0
    else:
        shares = [x for x in at or () if not isinstance(x, list)]
        if shares and len(shares) < len(at or ()):
            raise PlanError(f"ramp={at}: stages and shares of a batch are mixed; allowed: {RAMPS}")
        rows = [[i / len(shares), largest * _share(x)] for i, x in enumerate(shares)]
        rows, per = rows or [x for x in at or () if isinstance(x, list)], float(total)
    return _checked(rows, per, total)


def seesaw(schedule: Schedule, base: int, limit: float) -> list[list[float]]:
    """[samples, batch]: the batch doubles where the schedule, after its warm-up, has halved the rate.

    With noise all of a gradient, a run at (η/a, B) is by the square-root rule one at (√a·η/a = η/√a, a·B). (Seesaw,
    Meterez et al. 2025, 2510.14717, has the same rates and batches; betas, ε and v move here, too.)
    """
    out: list[list[float]] = []
    a = 2
    while a * base <= limit:
        low, high = schedule.warmup_samples, float(schedule.total_samples)
        if schedule.multiplier(high * (1 - 1e-9)) > 1 / a:
            break
        while high - low > 0.5:  # the multiplier falls
            middle = (low + high) / 2
            low, high = (low, middle) if schedule.multiplier(middle) <= 1 / a else (middle, high)
        out.append([high, float(a * base)])
        a *= 2
    return out


def _share(text: float | str) -> float:
    try:
        share = float(Fraction(str(text).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not 0 < share <= 1:
        raise PlanError(f"ramp: {text!r} is no share of the largest batch, such as 1/4; allowed: {RAMPS}")
    return share


def _checked(rows: list[list[float]], per: float, total: int) -> Stages:
    shown = ", ".join(f"[{', '.join(f'{x:g}' for x in row)}]" for row in rows)
    wrong = []
    if not rows or any(len(row) not in (2, 3) for row in rows):
        raise PlanError(f"ramp=[{shown}]: a stage is [start, batch], or [start, batch, B_noise]; allowed: {RAMPS}")
    starts = [row[0] * per for row in rows]
    if starts[0] != 0:
        wrong.append(f"ramp=[{shown}]: the first stage starts at {rows[0][0]:g}; it must start at 0")
    for one, other in itertools.pairwise(rows):
        if not one[0] < other[0]:
            wrong.append(
                f"ramp=[{shown}]: the stage at {other[0]:g} does not come after the one at {one[0]:g}; starts must rise"
            )
    if (last := max(starts)) >= total:
        wrong.append(
            f"ramp=[{shown}]: the stage at {max(r[0] for r in rows):g} starts at {last:,.0f} samples, and the schedule "
            f"ends at {total:,}; start it earlier. Starts are shares of the schedule; in samples: ramp={{samples: ...}}"
        )
    if bad := [row[1] for row in rows if row[1] != int(row[1]) or row[1] < 1]:
        wrong.append(f"ramp=[{shown}]: the batch {bad[0]:g} is no whole number of examples >= 1")
    if bad := [row[2] for row in rows if len(row) == 3 and not 0 < row[2] < math.inf]:
        wrong.append(f"ramp=[{shown}]: B_noise {bad[0]:g} must be > 0 examples")
    if wrong:
        raise PlanError("\n".join(wrong))
    out: Stages = []
    for row, start in zip(rows, starts, strict=True):
        if not out or out[-1][1] != row[1]:
            out.append((round(start), int(row[1]), row[2] if len(row) == 3 else None))
    return out
