"""A plan for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from scaling_exps import rules
from scaling_exps.plan.spec import Arm, RunSpec, summary


def describe(spec: RunSpec) -> list[dict[str, Any]]:
    """The contract of `scalerun plan --json`: one object for each arm of the run."""
    s = spec.science
    return [
        {
            "run_id": spec.run_id,
            "rule": arm.rule,
            "kappa": arm.kappa,
            "svag": s.svag,
            "seed": s.seed,
            "base": arm.base,
            "scaled": summary(s, s.hyper, spec.stretch),
            "placement": {
                "world_size": spec.placement.world_size,
                "micro_batch": s.micro_batch,
                "accumulation": spec.placement.accumulation,
            },
            "notes": list(spec.notes),
        }
        for arm in spec.arms
    ]


def print_plan(specs: list[RunSpec]) -> None:
    """base -> scaled with the formula, for each arm and batch (seeds share a table); the batch arithmetic; notes."""
    groups: dict[str, list[tuple[RunSpec, Arm]]] = {}
    for spec in specs:
        for arm in spec.arms if spec.science.batch != arm_batch(spec.arms[0]) else spec.arms[:1]:
            twin = asdict(replace(spec.science, seed=0))
            groups.setdefault(json.dumps([twin, arm.rule], sort_keys=True), []).append((spec, arm))
    for members in groups.values():
        spec, arm = members[0]
        s, p = spec.science, spec.placement
        rule = rules.find(arm.rule)
        base, scaled = arm.base, summary(s, s.hyper, spec.stretch)
        print(
            f"\n{s.model['name']} on {s.dataset['name']}, {s.optimizer}: "
            f"batch {base['batch']} -> {s.batch}, κ = {arm.kappa:g}, rule {'(any)' if arm.kappa == 1 else arm.rule}"
            + (f", SVAG ℓ = {s.svag}" if s.svag > 1 else "")
        )
        longer = "" if s.svag > 1 or abs(scaled["samples"] / base["samples"] - 1) < 0.5 / s.steps else "δ·"
        formulas = {
            **rule.formulas(),
            "steps": f"{longer}steps/κ",
            "warmup_steps": "same samples" if not longer else "δ·samples",
            "samples": "δ·samples" if longer else "same",
        }
        for key in ("lr", "betas", "eps", "weight_decay", "steps", "warmup_steps", "samples"):
            then = formulas[key] if arm.kappa != 1 else ""
            print(f"  {key:<13} {_show(base[key]):>20} -> {_show(scaled[key]):<26} {then}".rstrip())
        print(
            f"  batch {s.batch} = micro-batch {s.micro_batch} × accumulation {p.accumulation // spec.draws} "
            f"× world size {p.world_size}" + (f", {spec.draws} draws a step" if spec.draws > 1 else "")
        )
        for note in spec.notes:
            print(f"  note: {note}")
        print("  runs: " + ", ".join(f"{m.run_id} (seed {m.science.seed})" for m, _ in members))
    print(f"\n{len(specs)} run(s)")


def arm_batch(arm: Arm) -> int:
    return int(arm.base["batch"])


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
