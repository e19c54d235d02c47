"""margin=auto: margins out of the base runs' spread over seeds, before any other run of the sweep starts.

The formula is `plan.margin.smallest`, rounded up; an accuracy margin is at least one example of the test set. The gaps
that are to be judged play no part. What was proposed once for a sweep stays: it is read back from its runs.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.plan.margin import ALPHA, ENOUGH, POWER, rounded, seeds_for, smallest, spent
from scaling_exps.records import RunDir

METRICS = ("test_accuracy", "test_loss")  # what a run is for


@dataclass(frozen=True)
class Proposal:
    """`specs` with their margins; `first`: base runs without which there are none yet; `lines`: what to tell."""

    specs: list[RunSpec]
    first: list[RunSpec]
    lines: list[str]


def proposed(specs: list[RunSpec], root: Path) -> Proposal:
    """Margins for every base recipe of the list.

    Raises:
        LaunchError: the list lacks the base batch, or names fewer than 3 seeds where fewer are finished.
    """
    bases = {s.run_id: s for s in specs if any(a.base_run_id == s.run_id for a in s.arms)}
    of_recipe: dict[str, list[RunSpec]] = {}
    for spec in specs:
        base = next((bases[a.base_run_id] for a in spec.arms if a.base_run_id in bases), None)
        if base is None:
            raise LaunchError(
                f"margin=auto: the base run of batch={spec.science.batch} seed={spec.science.seed} is not in the "
                f"list; add its batch, batch=[{spec.arms[0].base.batch},...]"
            )
        of_recipe.setdefault(_recipe(base), []).append(spec)
    there = [d for d in RunDir.under(root) if (d.result() or {}).get("status") == "finished"]
    planned: dict[str, RunSpec] = {}
    first: list[RunSpec] = []
    lines: list[str] = []
    for recipe, members in of_recipe.items():
        if settled := _settled(members, root):
            planned |= {s.run_id: replace(s, margin=settled) for s in members}
            lines.append(f"margins proposed earlier for this sweep stay: {_listed(settled)}")
            continue
        own = [s for s in members if s.run_id in bases]
        results = _results(recipe, there)
        if len(results) < ENOUGH:
            missing = [s for s in own if s.science.seed not in results]
            if len(results) + len(missing) < ENOUGH:
                raise LaunchError(
                    f"margin=auto needs base runs of {ENOUGH} seeds or more, and there are {len(results)} finished "
                    f"and {len(missing)} in the list: give seed=[0,1,2]"
                )
            first += missing
            lines.append(
                f"margin=auto: {len(missing)} base runs are trained first (batch {own[0].science.batch}); the "
                "margins follow from their spread, before any other run starts"
            )
            continue
        margin, told = _propose(list(results.values()), members, len({s.science.seed for s in members}))
        planned |= {s.run_id: replace(s, margin=margin) for s in members}
        lines += told
    return Proposal([planned.get(s.run_id, s) for s in specs], first, lines)


def _recipe(base: RunSpec) -> str:
    return repr(replace(base.science, seed=0))


def _settled(members: list[RunSpec], root: Path) -> dict[str, float]:
    """The margins that a run of the sweep, which has begun, carries."""
    for spec in members:
        run_dir = RunDir(root / spec.run_id)
        is_base = spec.run_id in {a.base_run_id for a in spec.arms}
        begun = not is_base and run_dir.exists and run_dir.state() != "waiting"
        if begun and (margin := run_dir.spec().margin):
            return margin
    return {}


def _results(recipe: str, there: list[RunDir]) -> dict[int, dict[str, float]]:
    """Seed -> metrics of the finished runs of a recipe, with the size of their test set."""
    found: dict[int, dict[str, float]] = {}
    for run_dir in there:
        try:
            spec = run_dir.spec()
        except PlanError:
            continue
        result = run_dir.result()
        if result and _recipe(spec) == recipe:
            found[spec.science.seed] = {**result["metrics"], "examples": result.get("test_examples") or math.inf}
    return found


def _propose(results: list[dict[str, float]], members: list[RunSpec], seeds: int) -> tuple[dict[str, float], list[str]]:
    """The margins, and how they came about; `seeds` are planned."""
    looks = members[0].looks
    n = max(ENOUGH, looks[-1] if looks else seeds)
    alpha = spent(looks, n) or ALPHA
    values = {m: [r[m] for r in results if math.isfinite(r.get(m, math.nan))] for m in METRICS}
    spread = {m: statistics.stdev(v) for m, v in values.items() if len(v) >= ENOUGH}
    least = {"test_accuracy": max(1 / r["examples"] for r in results)}
    told = {m for m, sd in spread.items() if sd > 0 or least.get(m, 0) > 0}
    margin, lines = {}, []
    for m in (m for m in METRICS if m in told):
        wanted = max(smallest(spread[m], n, len(told), alpha), least.get(m, 0.0))
        margin[m] = rounded(wanted)
        tighter = f"{margin[m] / 2:g} needs {seeds_for(spread[m], margin[m] / 2, len(told), alpha)} seeds"
        half = "it is one example of the test set" if margin[m] / 2 < least.get(m, 0.0) else tighter
        lines.append(f"  margin.{m}={margin[m]:g}  from sd {spread[m]:.3g} of {len(results)} base runs; {half}")
    lines.insert(
        0,
        f"margin=auto: the smallest margins that {n} seeds decide with power {POWER:g} where the true gap is 0, "
        f"m = s√2·(q(1 - α/K, n) + t(0.9, n - 1))/√n, rounded up (α = {alpha:g}, K = {len(told)}; docs/comparison.md)",
    )
    return margin, lines


def _listed(margin: dict[str, float]) -> str:
    return ", ".join(f"margin.{m}={v:g}" for m, v in margin.items())
