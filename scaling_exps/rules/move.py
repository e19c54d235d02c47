"""What a rule takes and gives: hyperparameters, and the move from one batch size to another. Floats only.

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
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

# v of batch gradients in the step | v of micro-batch gradients | the gradient itself | its sign, or it orthogonalised
Family = Literal["adaptive", "invariant", "sgd", "sign"]
Goal = Literal["match", "best", "control"]
Evidence = Literal["settled", "contested", "experimental"]
BetaMap = Literal["linear", "power"]
Clip = Literal["keep", "rule"]  # of a threshold on the gradient's norm


class RuleError(ValueError):
    """The rule cannot be applied to this recipe at this batch size."""


@contextmanager
def spelled(power: str) -> Iterator[None]:
    """Refusals from inside call the power map as the caller's own command does.

    >>> with spelled("--beta-map power"):
    ...     raise RuleError("use beta_map=power")
    Traceback (most recent call last):
    scaling_exps.rules.move.RuleError: use --beta-map power
    """
    try:
        yield
    except RuleError as e:
        if (said := re.sub(r'(--beta-map |\bbeta_map=)"?power"?', power, str(e))) == str(e):
            raise
        raise RuleError(said) from None


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters a rule may move.

    `betas`: (beta1, beta2) of Adam, (0, beta) of RMSprop in Adam's form, (beta,) of the paper's RMSprop, (momentum,)
    of SGD.
    """

    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        bad = [] if 0 < self.lr < math.inf else [f"lr={self.lr} must be > 0"]
        if not all(0 <= b < 1 for b in self.betas):
            bad.append(f"betas={list(self.betas)} must lie in [0, 1)")
        bad += [f"{k}={x} must be >= 0" for k in ("eps", "weight_decay") if not 0 <= (x := getattr(self, k)) < math.inf]
        if bad:
            raise RuleError("; ".join(bad))


@dataclass(frozen=True)
class Move:
    """From the batch a recipe was tuned at to the batch it shall run at.

    Args:
        base_batch, batch: global batch before and after, in examples (all devices, all accumulation), > 0.
        duration: new budget / base budget in samples, > 0.
        noise_scale: measured B_n in examples, > 0; None where it was not measured.
        beta_map: "linear" is 1 - beta -> kappa (1 - beta), the paper's; "power" is beta -> beta^kappa, which keeps
            the half-life in samples exactly, agrees to first order and exists for every kappa.

    Raises:
        RuleError: a value outside its range.

    >>> Move(256, 1024).kappa
    4.0
    """

    base_batch: float
    batch: float
    duration: float = 1.0
    noise_scale: float | None = None
    beta_map: BetaMap = "linear"

    def __post_init__(self) -> None:
        positive = {
            "base_batch": self.base_batch,
            "batch": self.batch,
            "duration (new budget / base budget)": self.duration,
            "noise_scale": 1.0 if self.noise_scale is None else self.noise_scale,
        }
        if bad := [f"{name}={x} must be a positive number" for name, x in positive.items() if not 0 < x < math.inf]:
            raise RuleError("; ".join(bad))
        if self.beta_map not in get_args(BetaMap):
            raise RuleError(f"beta_map={self.beta_map!r}; allowed: {', '.join(get_args(BetaMap))}")

    @property
    def kappa(self) -> float:
        """New batch / base batch, > 0."""
        return self.batch / self.base_batch

    def beta(self, beta: float, clock: float, rule: str) -> float:
        """`beta` where one step lasts `clock` times as long; 0 ("no moving average") stays 0.

        `clock` must be proportional to kappa: the largest legal batch in the refusal is found that way.

        Raises:
            RuleError: linear map and clock >= 1 / (1 - beta); power map and a beta^clock that is 0 to a float.

        >>> Move(1, 4).beta(0.9, 4, "demo"), round(Move(1, 4, beta_map="power").beta(0.9, 4, "demo"), 4)
        (0.6, 0.6561)
        """
        if beta == 0 or clock == 1:
            return beta
        if self.beta_map == "power":
            new = float(beta**clock)
            if new < 1e-300:  # on its way to 0.0, which would mean "no moving average" from there on
                raise RuleError(f"rule {rule!r} maps beta={beta:g} to {beta:g}^{clock:g} = 0: use a smaller batch")
            return new
        new = round(1 - clock * (1 - beta), 15)
        if new <= 0:
            limit = self.kappa / clock / (1 - beta)
            batch = limit * self.base_batch
            raise RuleError(
                f"rule {rule!r} maps beta={beta:g} to 1 - {clock:g}*(1 - {beta:g}) = {new:.4g}, which must be > 0: "
                f"it needs kappa < {limit:.6g} (batch < {batch:.6g}), and kappa is {self.kappa:g}. "
                f"The largest legal batch is {math.ceil(round(batch, 9)) - 1}. Use beta_map=power "
                "(beta -> beta^kappa), tune the base at a larger batch, use a beta nearer to 1, or a smaller batch"
            )
        return new
