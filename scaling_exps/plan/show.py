"""A plan for people and for machines."""

from __future__ import annotations

from typing import Any

import msgspec

from scaling_exps import rules
from scaling_exps.plan.spec import Arm, RunSpec


def describe(spec: RunSpec) -> list[dict[str, Any]]:
    """The contract of `scalerun plan --json`: one object for each arm of the run."""
    science = spec.science
    return [
        {
            "run_id": spec.run_id,
            "rule": arm.rule,
            "role": arm.role,
            "kappa": arm.kappa,
            "svag": science.svag,
            "seed": science.seed,
            "base": msgspec.to_builtins(arm.base),
            "scaled": msgspec.to_builtins(science.numbers()),
            "placement": {
                "world_size": spec.placement.world_size,
                "micro_batch": science.micro_batch,
                "accumulation": spec.placement.accumulation,
            },
            "notes": list(spec.notes),
        }
        for arm in spec.arms
    ]


def print_plan(specs: list[RunSpec]) -> None:
    """base -> scaled with the formula, for each arm and batch (seeds share a table); the batch arithmetic; notes."""
    tables: dict[str, list[tuple[RunSpec, Arm]]] = {}
    for spec in specs:
        for arm in spec.arms if spec.science.batch != spec.arms[0].base.batch else spec.arms[:1]:
            without_seed = repr(msgspec.structs.replace(spec.science, seed=0))
            tables.setdefault(without_seed + arm.rule, []).append((spec, arm))
    for members in tables.values():
        spec, arm = members[0]
        science, placement = spec.science, spec.placement
        scaled = science.numbers()
        print(
            f"\n{science.model.name} on {science.dataset.name}, {science.optimizer}: batch {arm.base.batch} -> "
            f"{science.batch}, κ = {arm.kappa:g}, rule {'(any)' if arm.kappa == 1 else arm.rule}"
            + (f", SVAG ℓ = {science.svag}" if science.svag > 1 else "")
        )
        delta = "δ·" if arm.duration != 1 else ""
        formulas = {
            **rules.find(arm.rule).formulas(),
            "steps": f"{delta}steps/κ",
            "warmup_steps": f"{delta}samples" if delta else "same samples",
            "samples": f"{delta}samples" if delta else "same",
        }
        if scaled.samples != round(arm.duration * arm.base.samples) and science.svag == 1:
            formulas["samples"] += ", to whole steps"
        for key in ("lr", "betas", "eps", "weight_decay", "steps", "warmup_steps", "samples"):
            formula = formulas[key] if arm.kappa != 1 or arm.duration != 1 else ""
            before, after = _show(getattr(arm.base, key)), _show(getattr(scaled, key))
            print(f"  {key:<13} {before:>20} -> {after:<26} {formula}".rstrip())
        print(
            f"  batch {science.batch} = micro-batch {science.micro_batch} × accumulation "
            f"{placement.accumulation // science.draws} × world size {placement.world_size}"
            + (f", {science.draws} draws a step" if science.draws > 1 else "")
        )
        for note in spec.notes:
            print(f"  note: {note}")
        print("  runs: " + ", ".join(f"{m.run_id} (seed {m.science.seed})" for m, _ in members))
    print(f"\n{len(specs)} run(s)")


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
