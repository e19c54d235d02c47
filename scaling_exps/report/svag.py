"""SVAG's curves over continuous time (paper, Fig. 3): how far is each ℓ from the next, and how far are seeds?"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scaling_exps.report.runs import trajectory

if TYPE_CHECKING:
    from scaling_exps.report.verdict import Row

EVALUATED = {"loss": "test loss", "accuracy": "test accuracy", "weight_norm": "weight norm"}


@dataclass(frozen=True)
class Curve:
    """A test function of the runs at one ℓ: `t` (points,), `values` (seeds, points) of the runs of `seeds`."""

    row: Row
    seeds: list[int]
    t: np.ndarray
    values: np.ndarray


def curves(rows: list[Row]) -> dict[str, list[Curve]]:
    """The base runs, as ℓ = 1, and the runs at each other ℓ, of one setting; none where nothing ran with ℓ > 1."""
    if all(r.svag == 1 for r in rows):
        return {}
    members = [r for r in rows if r.runs and (r.role == "base" or r.svag > 1) and math.isfinite(r.runs[0].t)]
    found: dict[str, list[Curve]] = {"train loss": []}
    for row in members:
        of_a_sample = row.runs[0].t
        edges, losses = trajectory(row.runs)
        seeds = [r.spec.science.seed for r in row.runs]
        found["train loss"].append(Curve(row, seeds, of_a_sample * (edges[1:] + edges[:-1]) / 2, losses))
        for metric, name in EVALUATED.items():
            if series := {r.spec.science.seed: r.evals[metric] for r in row.runs if metric in r.evals}:
                n = min(len(x) for x, _ in series.values())
                t = of_a_sample * np.mean([x[:n] for x, _ in series.values()], axis=0)
                values = np.stack([y[:n] for _, y in series.values()])
                found.setdefault(name, []).append(Curve(row, list(series), t, values))
    return found


def sentences(rows: list[Row]) -> list[str]:
    """Of each test function: how far apart the mean curves of consecutive ℓ are, and what chance alone makes of that.

    The distance is the mean over t of |mean over seeds of the difference|. Runs of a seed share their initial weights,
    so that differences are paired; chance is what their spread over seeds would give if the two means were equal.
    """
    lines = []
    for setting in dict.fromkeys(r.setting for r in rows):
        for name, found in curves([r for r in rows if r.setting == setting]).items():
            found = sorted((c for c in found if c.row.kappa == 1), key=lambda c: c.row.svag)
            if len(found) < 2 or len(set.intersection(*(set(c.seeds) for c in found))) < 2:
                continue
            steps = [_step(a, b) for a, b in itertools.pairwise(found)]
            spread = float(np.mean(found[0].values.std(0, ddof=1)))
            told = ", ".join(
                f"{a.row.svag} → {b.row.svag} {distance:.3g} (chance {chance:.2g})"
                for (a, b), (distance, chance) in zip(itertools.pairwise(found), steps, strict=True)
            )
            inside = max(distance for distance, _ in steps) <= spread
            lines.append(
                f"{setting}, SVAG, {name}: ℓ {told}; seeds spread by {spread:.3g}: the curves "
                f"{'overlay within' if inside else 'are further apart than'} that"
            )
    return lines


def _step(a: Curve, b: Curve) -> tuple[float, float]:
    """Mean over t of |mean difference|, and what is expected of it where only chance differs."""
    seeds = [s for s in a.seeds if s in b.seeds]
    t = a.t[a.t <= max(b.t[-1], a.t[0])]
    later = np.stack([np.interp(t, b.t, b.values[b.seeds.index(s)]) for s in seeds])
    difference = later - np.stack([a.values[a.seeds.index(s)][: len(t)] for s in seeds])
    chance = difference.std(0, ddof=1) / math.sqrt(len(seeds)) * math.sqrt(2 / math.pi)
    return float(np.abs(difference.mean(0)).mean()), float(chance.mean())
