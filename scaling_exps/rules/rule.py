"""What a scaling rule is: (base hyperparameters, a move) -> scaled hyperparameters, with what is known about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import get_args

from scaling_exps.rules.move import BetaMap, Evidence, Family, Goal, Hyper, Move, RuleError

QUESTIONS: dict[Goal, str] = {
    "match": "which hyperparameters make this the same run as the base?",
    "best": "which hyperparameters are best at this batch size? (the runs will differ)",
    "control": "what happens if the scaling is left out or done wrongly?",
}

CLIP_KEPT = (
    "clipping is outside the rule. Where noise dominates, the gradient's norm goes as 1/√κ and the same clip rate "
    "needs {:.4g}"
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A scaling rule. A subclass writes `apply` and `formulas`; `scale` is what everybody calls.

    Another package's rule is an instance that its entry-point group `scalerun.rules` names; `laws.check` tests it.

    Args:
        name: what the user types after `rule=`.
        goals: the question it answers, by family of the optimizers that it is meant for; see QUESTIONS.
        evidence: settled, contested or experimental.
        because: what the evidence is; facts that were recalled and not read say so.
        source: where the formula is from.
        conditions: when it may be believed.
        leaves_alone: what it does not touch although a trainer may have it.
        decoupled: it moves a weight decay that lies outside the gradient, so L2 must not be given to it.
        moves_duration: it takes a change of the budget into account.
        carries: where the batch changes in mid-run, the second moment moves with it; False: as people leave it.

    Raises:
        RuleError: no goals, or one that does not exist.
    """

    name: str
    goals: Mapping[Family, Goal] = field(hash=False)  # kept read-only; a mapping has no hash
    evidence: Evidence = field(repr=False)
    because: str = field(repr=False)
    source: str = field(repr=False)
    conditions: str = field(repr=False)
    leaves_alone: str = field(repr=False)
    decoupled: bool = False
    moves_duration: bool = False
    carries: bool = True

    def __post_init__(self) -> None:
        if not self.goals or not set(self.goals) <= {*get_args(Family)} or not {*self.goals.values()} <= {*QUESTIONS}:
            raise RuleError(
                f"rule {self.name!r}: goals={dict(self.goals)} must map one or more of {', '.join(get_args(Family))} "
                f"to one of {', '.join(QUESTIONS)}"
            )
        object.__setattr__(self, "goals", MappingProxyType(dict(self.goals)))

    @property
    def families(self) -> tuple[Family, ...]:
        """Optimizers that it is meant for."""
        return tuple(self.goals)

    def answers(self, family: Family) -> str:
        """What it is for these optimizers, as one sentence for a plan or a report.

        Raises:
            KeyError: it is not meant for this family (`find` refuses it).

        >>> from scaling_exps.rules import RULES
        >>> RULES["linear"].answers("sgd")
        'rule linear (settled) answers goal=match: which hyperparameters make this the same run as the base?'
        >>> RULES["linear"].answers("adaptive")
        'rule linear is a control for adaptive optimizers: what happens if the scaling is left out or done wrongly?'
        """
        goal = self.goals[family]
        if goal == "control":
            return f"rule {self.name} is a control for {family} optimizers: {QUESTIONS[goal]}"
        return f"rule {self.name} ({self.evidence}) answers goal={goal}: {QUESTIONS[goal]}"

    def apply(self, base: Hyper, move: Move) -> Hyper:
        """`base` after `move`; must be `base` where kappa and duration are 1, and compose."""
        raise NotImplementedError

    def formulas(self, beta_map: BetaMap = "linear") -> dict[str, str]:
        """What happens to lr, betas, eps and weight_decay under this beta map, as text."""
        raise NotImplementedError

    def ema(self, decay: float, kappa: float) -> float:
        """Decay of a moving average of the model: rho -> rho^kappa keeps its half-life in samples.

        (Busbridge et al. 2023. Updated every n steps instead of every n0: exponent kappa n / n0.)
        """
        return float(decay**kappa)

    def clip(self, threshold: float, kappa: float) -> float:
        """Threshold on the gradient's norm: c/√κ clips the same share of steps where noise dominates, whose norm goes
        as 1/√κ. In high dimension that norm hardly varies, so that clipping is a factor on the gradient, the same one.
        """
        return threshold / math.sqrt(kappa)

    def scale(self, base: Hyper, move: Move) -> Hyper:
        """`base` after `move`; `base` itself where neither the batch nor the budget changes.

        Raises:
            RuleError: a beta that does not survive, a measurement that is missing.

        >>> from scaling_exps.rules import RULES
        >>> RULES["sqrt"].scale(Hyper(1e-3, (0.9, 0.99), 1e-8, 0.0), Move(256, 1024))
        Hyper(lr=0.002, betas=(0.6, 0.96), eps=5e-09, weight_decay=0.0)
        """
        return base if move.kappa == move.duration == 1 else self.apply(base, move)
