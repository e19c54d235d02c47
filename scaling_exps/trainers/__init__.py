"""In other people's trainers: the rule applied at the start and checked (`ScaledBy`), callbacks of Hugging Face's
Trainer (`hf`) and of Lightning (`lightning`), and their runs as folders that the report judges (`foreign`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scaling_exps.noise.estimators import NoiseError
from scaling_exps.noise.probe import NoiseProbe
from scaling_exps.rules.move import BetaMap, RuleError
from scaling_exps.rules.optimizers import OPTIMIZERS, of
from scaling_exps.rules.scale import scale, unwrapped

FIELDS = ("lr", *sorted({o.field for o in OPTIMIZERS.values()}), "eps", "weight_decay")  # of a parameter group


@dataclass(frozen=True)
class ScaledBy:
    """A recipe that is tuned at one batch, to be run at the trainer's by a rule.

    Args:
        rule: a name of docs/rules.md.
        base: what was tuned: batch, lr, betas (or momentum), eps, weight_decay; steps, where the trainer counts in
        them. beta_map, noise_scale: as in `scale`.

    The trainer is given the base's numbers (and the larger batch); `apply` moves its live optimizer.
    """

    rule: str
    base: Mapping[str, Any]
    beta_map: BetaMap = "linear"
    noise_scale: float | None = field(default=None)

    def __post_init__(self) -> None:
        batch = self.base.get("batch") if isinstance(self.base, Mapping) else None
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise RuleError(f"base={self.base!r} must be a dict of what was tuned: batch (>= 1), lr, ...")

    def plan(self, batch: int) -> dict[str, Any]:
        """Of the move to `batch`: rule, kappa, and the recipe at both ends; RuleError where the rule refuses."""
        how: dict[str, Any] = {"rule": self.rule, "beta_map": self.beta_map, "noise_scale": self.noise_scale}
        scaled = scale(dict(self.base), batch=batch, **how)
        return {**how, "kappa": batch / self.base["batch"], "base": dict(self.base), "scaled": scaled}

    def apply(self, optimizer: Any, batch: int, *, scheduler: Any = None, steps: int | None = None) -> dict[str, Any]:
        """Bring the optimizer to what the plan says and check that it is there; one that already is stays as it is.

        Args:
            batch: global, of this trainer.
            scheduler: its torch scheduler, whose base rates move too.
            steps: that the trainer will take; where the base names its own, checked to less than a step.

        Returns:
            The plan.

        Raises:
            RuleError: the optimizer holds neither the base's numbers nor the plan's, or the steps are not the plan's.
                Nothing is changed then.
        """
        plan = self.plan(batch)
        wanted = plan["scaled"].get("steps")
        if wanted is not None and steps is not None and abs(wanted - steps) >= 1:  # κ need not divide the base's
            raise RuleError(f"the trainer takes {steps} steps, and the plan says {wanted:g} (κ = {plan['kappa']:g})")
        live = unwrapped(optimizer)
        if apart(live, plan["scaled"]):
            if wrong := apart(live, plan["base"]):
                raise RuleError(
                    f"the optimizer holds neither the base nor what rule {self.rule!r} makes of it: "
                    f"{'; '.join(wrong)}. "
                    "Give the trainer the base's numbers, or the base what the trainer has"
                )
            how = {k: plan[k] for k in ("rule", "beta_map", "noise_scale")}
            scale(optimizer, base_batch=self.base["batch"], batch=batch, scheduler=scheduler, **how)
            if wrong := apart(live, plan["scaled"]):
                raise RuleError(f"the optimizer does not hold what the plan says: {'; '.join(wrong)}")
        return plan


def apart(optimizer: Any, recipe: Mapping[str, Any]) -> list[str]:
    """In which fields the groups of an optimizer hold something else than `recipe`; a group may be free of decay."""
    wrong = []
    for i, group in enumerate(optimizer.param_groups):
        for name in FIELDS:
            if name not in group or name not in recipe:
                continue
            has = group.get("initial_lr", group["lr"]) if name == "lr" else group[name]
            mine, theirs = (
                [float(x) for x in (v if isinstance(v, tuple | list) else (v,))] for v in (has, recipe[name])
            )
            free = name == "weight_decay" and mine == [0.0]
            if not free and not (
                len(mine) == len(theirs)
                and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(mine, theirs, strict=True))
            ):
                wrong.append(f"group {i} has {name} {has}, not {recipe[name]}")
    return wrong


class Asked:
    """What both callbacks are asked for, checked at once and not when training has begun."""

    def __init__(self, batches: Sequence[int], scaled: ScaledBy | None, window: int | None, method: str) -> None:
        whole = isinstance(batches, Sequence) and all(isinstance(b, int) and b >= 1 for b in batches)
        if not whole or isinstance(batches, str):
            raise NoiseError(f"batches={batches!r} must be a list of whole numbers >= 1, as [1024]")
        if scaled is not None and not isinstance(scaled, ScaledBy):
            raise NoiseError(f"scaled={scaled!r} must be ScaledBy(rule, base={{...}})")
        self.batches, self.scaled, self.window, self.method = batches, scaled, window, method
        self.probe: NoiseProbe | None = None


def begin(trainer: str, batch: int, optimizer: Any, scaled: ScaledBy | None, **how: Any) -> dict[str, Any]:
    """What `scalerun import` is to know of a run that begins here, told to this process's wandb run if there is one.

    Args:
        batch: global.
        scaled: the rule that is applied to the optimizer now.
        how: `scheduler` and `steps` as in `apply`; the rest is kept as it is.
    """
    live = unwrapped(optimizer)
    try:
        name = of(live, live.param_groups[0]).name
    except RuleError:
        name = type(live).__name__
    scheduler, steps = how.pop("scheduler"), how.pop("steps")
    known = {"trainer": trainer, "batch": batch, "optimizer": name, **how}
    if scaled is not None:
        known |= scaled.apply(optimizer, batch, scheduler=scheduler, steps=steps)
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.config.update({"scalerun": known}, allow_val_change=True)
    return known
