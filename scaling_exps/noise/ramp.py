"""`ramp=auto`: at each point of training the largest batch for which the predicted deviation stays in the tolerance.

    √((1 + r)/(1 + κ r)) >= 1 - tolerance   ⇔   κ <= ((1 + r)/(1 - tolerance)² - 1)/r,   r = base batch / B_noise

with the upper end of r's 95% interval in each stretch of the base run, see `noise.validity`. Then the batch is made to
rise (what a later stretch does not allow, none before it gets), in multiples of the micro-batch, in few stages.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from scaling_exps import plan
from scaling_exps.config import Config
from scaling_exps.noise import validity
from scaling_exps.noise.validity import Stretch


class RampError(ValueError):
    """No ramp follows from the noise; the message says what to do."""


def resolve(configs: list[Config]) -> tuple[list[Config], list[str]]:
    """The commands with the stages in the place of `auto`, and what to say of them.

    Raises:
        RampError: no noise records, or none that allow a larger batch.
        PlanError: a base run cannot be planned, `noise_from` is no run of the recipe.
    """
    out, said = [], []
    for config in configs:
        if config.ramp.at == "auto":
            stages, source = _auto(config)
            typed = ",".join(f"[{','.join(f'{x:g}' for x in stage)}]" for stage in stages)
            said.append(f"ramp=auto, from {source}: ramp={{samples:[{typed}]}}")
            config = msgspec.structs.replace(config, ramp=msgspec.structs.replace(config.ramp, at={"samples": stages}))
        out.append(config)
    return out, list(dict.fromkeys(said))


def _auto(config: Config) -> tuple[list[list[float]], str]:
    bases = plan.base_runs([config])
    rows, source = validity.of_base(bases[0], bases, Path(config.runs_dir), config.noise_from)
    known = validity.signal(rows)
    if known is None:
        raise RampError(f"ramp=auto is made of noise records, and there are none: {source}. Or name the stages")
    recipe, devices = config.recipe, config.launch.devices
    limit, unit = plan.batch_limit(config), recipe.micro_batch * (1 if devices == "auto" else devices)
    found = stages(known[1], recipe.batch, unit, limit, config.ramp.tolerance, config.ramp.stages)
    if found[-1][1] == recipe.batch:
        raise RampError(
            f"ramp=auto: at no point of training is a batch above {recipe.batch} predicted to stay within "
            f"ramp.tolerance={config.ramp.tolerance:g} (from {source}); raise it, measure more "
            "(measure.noise_examples, base runs of more seeds), or name the stages"
        )
    return found, source


def stages(known: list[Stretch], base: int, unit: int, limit: float, tolerance: float, most: int) -> list[list[float]]:
    """[samples, batch] or [samples, batch, B_noise]: rising, at most `most` of them.

    Args:
        known: the stretches of the base run.
        base: its batch.
        unit: examples of a micro-batch on all devices: larger batches are multiples of it, smaller ones of `base`.
        limit: no batch above it.

    >>> stages([Stretch(0, 100, (0.01, 0.005, 0.02)), Stretch(100, 900, (0.001, 0.0005, 0.002))], 2, 4, 64, 0.05, 4)
    [[0, 4], [100, 56, 1000.0]]
    """
    batches: list[int] = []
    for x in known:
        r = x.ratio[2] * base
        kappa = ((1 + r) / (1 - tolerance) ** 2 - 1) / r if r > 0 else math.inf
        batch = int(min(base * kappa, limit, max(base, x.end - x.begin)))  # at least one step
        batches.append(max(base, batch // unit * unit if batch >= unit else batch // base * base))
    rising = [min(batches[i:]) for i in range(len(batches))]
    starts = [i for i in range(len(rising)) if i == 0 or rising[i] > rising[i - 1]]
    while len(starts) > most:  # give up the switch that saves the fewest steps
        ends = [*starts[1:], len(known)]

        def saved(j: int, ends: list[int] = ends) -> float:
            i = starts[j]
            span = known[ends[j] - 1].end - known[i].begin
            return span / rising[starts[j - 1]] - span / rising[i]

        starts.pop(min(range(1, len(starts)), key=saved))
    out: list[list[float]] = []
    for i in starts:
        inverse = known[i].ratio[0]
        out.append([known[i].begin, rising[i], *([float(f"{1 / inverse:.4g}")] if out and inverse > 0 else [])])
    return out
