"""What a scaling rule is: (base hyperparameters, a move) -> scaled hyperparameters. Floats only.

Symbols (Malladi et al. 2022, Def. 5.2, where not said otherwise):

    kappa  new batch / base batch                 > 0, dimensionless
    delta  new budget / base budget, in samples   > 0, dimensionless
    eta    `lr`                                   per optimizer step
    beta_i `betas`                                decay per optimizer step, in [0, 1)
    eps    `eps`, added OUTSIDE the square root   units of the gradient
    lambda `weight_decay`                         shrinks by eta * lambda a step where it is decoupled
    B_n    `noise_scale`, tr(Sigma) / |grad f|^2  examples (McCandlish et al. 2018)
    rho    decay of a moving average of the model per step, in [0, 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Family = Literal["adaptive", "sgd", "sign"]  # v in the step | gradient in the step | sign or orthogonalised step
Goal = Literal["match", "best", "control"]
Evidence = Literal["settled", "contested", "experimental"]
BetaMap = Literal["linear", "power"]

QUESTIONS: dict[Goal, str] = {
    "match": "which hyperparameters make this the same run as the base?",
    "best": "which hyperparameters are best at this batch size? (the runs will differ)",
    "control": "what happens if the scaling is left out or done wrongly?",
}


class RuleError(ValueError):
    """The rule cannot be applied to this recipe at this batch size."""


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters a rule may move.

    `betas`: `(beta1, beta2)` in torch's Adam form (RMSprop is `(0, beta)`), `(beta,)` for the
    paper's RMSprop, `(momentum,)` for SGD.
    """

    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        bad = []
        if not (math.isfinite(self.lr) and self.lr > 0):
            bad.append(f"lr={self.lr} must be > 0")
        if not all(0 <= b < 1 for b in self.betas):
            bad.append(f"betas={list(self.betas)} must lie in [0, 1)")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            bad.append(f"eps={self.eps} must be >= 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            bad.append(f"weight_decay={self.weight_decay} must be >= 0")
        if bad:
            raise RuleError("; ".join(bad))


@dataclass(frozen=True)
class Move:
    """From the base to where the recipe shall run.

    Args:
        kappa: new batch / base batch, > 0.
        base_batch: examples; names the largest legal batch in a refusal, and is what `noise_scale` is compared to.
        duration: new budget / base budget in samples, > 0.
        noise_scale: measured B_n in examples, > 0; None where it was not measured.
        beta_map: "linear" is 1 - beta -> kappa (1 - beta), the paper's; "power" is beta -> beta^kappa, which keeps
            the half-life in samples exactly, agrees to first order and exists for every kappa.

    Raises:
        RuleError: a value outside its range.
    """

    kappa: float
    base_batch: float | None = None
    duration: float = 1.0
    noise_scale: float | None = None
    beta_map: BetaMap = "linear"

    def __post_init__(self) -> None:
        positive = {
            "kappa (new batch / base batch)": self.kappa,
            "duration (new budget / base budget)": self.duration,
            "base_batch": 1.0 if self.base_batch is None else self.base_batch,
            "noise_scale": 1.0 if self.noise_scale is None else self.noise_scale,
        }
        if bad := [f"{name}={x} must be a positive number" for name, x in positive.items() if not 0 < x < math.inf]:
            raise RuleError("; ".join(bad))
        if self.beta_map not in get_args(BetaMap):
            raise RuleError(f"beta_map={self.beta_map!r}; allowed: {', '.join(get_args(BetaMap))}")

    def beta(self, beta: float, clock: float, rule: str, beta_map: BetaMap | None = None) -> float:
        """`beta` where one step lasts `clock` times as long; 0 ("no moving average") stays 0.

        `clock` must be proportional to kappa: the largest legal kappa in the refusal is found that way.

        Raises:
            RuleError: linear map and clock >= 1 / (1 - beta).

        >>> Move(4).beta(0.9, 4, "demo"), round(Move(4, beta_map="power").beta(0.9, 4, "demo"), 4)
        (0.6, 0.6561)
        """
        if beta == 0 or clock == 1:
            return beta
        if (beta_map or self.beta_map) == "power":
            new = float(beta**clock)
            if new < 1e-300:  # on its way to 0.0, which would mean "no moving average" from there on
                raise RuleError(f"rule {rule!r} maps beta={beta:g} to {beta:g}^{clock:g} = 0: use a smaller batch")
            return new
        new = round(1 - clock * (1 - beta), 15)
        if new <= 0:
            limit = self.kappa / clock / (1 - beta)
            largest = hint = ""
            if self.base_batch is not None:
                batch = math.ceil(round(limit * self.base_batch, 9)) - 1
                largest = f" (batch < {limit * self.base_batch:.6g})"
                hint = f"The largest legal batch is {batch}. "
            raise RuleError(
                f"rule {rule!r} maps beta={beta:g} to 1 - {clock:g}*(1 - {beta:g}) = {new:.4g}, which "
                f"must be > 0: it needs kappa < {limit:.6g}{largest}, and kappa is {self.kappa:g}. "
                f"{hint}Use beta_map=power (beta -> beta^kappa), tune the base at a larger batch, "
                f"use a beta nearer to 1, or a smaller batch"
            )
        return new

    def gain(self, rule: str) -> float:
        """h(B) / h(B0) with h(B) = 1 / (1 + B_n / B): what one step is worth, against the base's.

        Raises:
            RuleError: `noise_scale` or `base_batch` not given.

        >>> Move(4, base_batch=100, noise_scale=300).gain("demo")  # (1 + 3) / (1 + 0.75)
        2.2857142857142856
        """
        if self.noise_scale is None or self.base_batch is None:
            missing = "noise_scale" if self.noise_scale is None else "base_batch"
            raise RuleError(
                f"rule {rule!r} needs {missing}: it compares the batch sizes with the measured gradient-noise scale "
                "B_n = tr(covariance of one example's gradient) / |mean gradient|^2, in examples. "
                f"Give {missing}=N, or choose a rule that needs no measurement"
            )
        ratio = self.noise_scale / self.base_batch
        return (1 + ratio) / (1 + ratio / self.kappa)

    def then(self, kappa: float, duration: float = 1.0) -> tuple[Move, Move]:
        """(the move that goes on from here, both in one): what the law of composition compares."""
        here = None if self.base_batch is None else self.base_batch * self.kappa
        common = {"noise_scale": self.noise_scale, "beta_map": self.beta_map}
        return (
            Move(kappa, here, duration, **common),  # type: ignore[arg-type]
            Move(self.kappa * kappa, self.base_batch, self.duration * duration, **common),  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A scaling rule. A subclass writes `apply` and `formulas`; `scale` is what everybody calls.

    To add one from another package: subclass, make an instance, and name it in the entry-point group
    `scalerun.rules`; `scaling_exps.rules.laws.check(instance)` tests the laws that hold for every rule.

    Args:
        name: what the user types after `rule=`.
        families: optimizers it is meant for.
        goal: the question it answers, see QUESTIONS.
        evidence: settled, contested or experimental.
        because: what the evidence is; facts that were recalled and not read say so.
        source: where the formula is from.
        conditions: when it may be believed.
        leaves_alone: what it does not touch although a trainer may have it.
        decoupled: it moves a weight decay that lies outside the gradient, so L2 must not be given to it.
        moves_duration: it takes a change of the budget into account.
    """

    name: str
    families: tuple[Family, ...]
    goal: Goal
    evidence: Evidence = field(repr=False)
    because: str = field(repr=False)
    source: str = field(repr=False)
    conditions: str = field(repr=False)
    leaves_alone: str = field(repr=False)
    decoupled: bool = False
    moves_duration: bool = False

    def apply(self, base: Hyper, move: Move) -> Hyper:
        """`base` after `move`; must be `base` where kappa and duration are 1, and compose."""
        raise NotImplementedError

    def formulas(self) -> dict[str, str]:
        """What happens to lr, betas, eps and weight_decay, as text."""
        raise NotImplementedError

    def ema(self, decay: float, kappa: float) -> float:
        """Decay of a moving average of the model: rho -> rho^kappa keeps its half-life in samples.

        (Busbridge et al. 2023. Updated every n steps instead of every n0: exponent kappa n / n0.)
        """
        return float(decay**kappa)

    def scale(
        self,
        base: Hyper,
        kappa: float,
        *,
        base_batch: float | None = None,
        duration: float = 1.0,
        noise_scale: float | None = None,
        beta_map: BetaMap = "linear",
    ) -> Hyper:
        """Return `base` moved to `kappa` times its batch size; arguments as in `Move`.

        At kappa = 1 and duration = 1 the result is `base` itself.

        Raises:
            RuleError: an argument out of range, a beta that does not survive, a measurement that is missing.

        >>> from scaling_exps.rules import RULES
        >>> RULES["sqrt"].scale(Hyper(1e-3, (0.9, 0.99), 1e-8, 0.0), 4.0)
        Hyper(lr=0.002, betas=(0.6, 0.96), eps=5e-09, weight_decay=0.0)
        """
        move = Move(kappa, base_batch, duration, noise_scale, beta_map)
        return base if kappa == 1 and duration == 1 else self.apply(base, move)
