"""Scaling rules: (base hyperparameters, kappa) -> scaled hyperparameters. Floats only.

Symbols (Malladi et al. 2022, Def. 5.2):

    kappa  new batch / base batch                 > 0, dimensionless
    eta    `lr`                                   per optimizer step
    beta_i `betas`                                decay per optimizer step, in [0, 1)
    eps    `eps`, added OUTSIDE the square root   units of the gradient
    lambda `weight_decay`                         see `decoupled` in the optimizer's config

Every rule here is a power law in kappa, so that identity at kappa = 1, composition
(kappa1 then kappa2 = kappa1 * kappa2) and inverse (1 / kappa) hold by construction:

    eta -> eta kappa^a,   1 - beta_i -> kappa^b (1 - beta_i),   eps -> eps kappa^c,   lambda -> lambda kappa^d
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["adaptive", "sgd"]


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
class Rule:
    """One row of exponents. `beta = 1` means 1-beta -> kappa (1-beta); 0 leaves betas alone."""

    name: str
    lr: float
    beta: float
    eps: float
    weight_decay: float
    families: tuple[Family, ...]
    source: str
    leaves_alone: str

    def scale(self, base: Hyper, kappa: float, *, base_batch: int | None = None) -> Hyper:
        """Return `base` moved to `kappa` times its batch size.

        Args:
            base: hyperparameters tuned at the base batch.
            kappa: new batch / base batch, > 0. At exactly 1 the result is `base` itself.
            base_batch: only to name the largest legal batch in an error.

        Raises:
            RuleError: kappa <= 0, or 1 - kappa (1 - beta) <= 0 for some beta > 0.

        >>> RULES["sqrt"].scale(Hyper(1e-3, (0.9, 0.99), 1e-8, 0.0), 4.0)
        Hyper(lr=0.002, betas=(0.6, 0.96), eps=5e-09, weight_decay=0.0)
        """
        if not (math.isfinite(kappa) and kappa > 0):
            raise RuleError(f"kappa={kappa} must be a positive number (new batch / base batch)")
        if kappa == 1:
            return base
        return replace(
            base,
            lr=base.lr * kappa**self.lr,
            betas=tuple(self._beta(b, kappa, base_batch) for b in base.betas),
            eps=base.eps * kappa**self.eps,
            weight_decay=base.weight_decay * kappa**self.weight_decay,
        )

    def _beta(self, beta: float, kappa: float, base_batch: int | None) -> float:
        if self.beta == 0 or beta == 0:  # beta = 0 means "no moving average": nothing to rescale
            return beta
        factor = kappa**self.beta
        new: float = round(1 - factor * (1 - beta), 15)
        if new <= 0:
            limit = (1 / (1 - beta)) ** (1 / self.beta)
            largest = "" if base_batch is None else f" (batch < {limit * base_batch:.6g})"
            raise RuleError(
                f"rule {self.name!r} maps beta={beta:g} to 1 - {factor:g}*(1 - {beta:g}) = {new:.4g}, which "
                f"must be > 0: it needs kappa < {limit:.6g}{largest}, and kappa is {kappa:g}. "
                f"Tune the base at a larger batch, use a beta nearer to 1, or a smaller batch"
            )
        return new

    def formulas(self) -> dict[str, str]:
        """What happens to each hyperparameter, as text.

        >>> RULES["sqrt"].formulas()["betas"]
        '1 - κ·(1 - β)'
        """
        return {
            "lr": _power("η", self.lr),
            "betas": "β" if self.beta == 0 else f"1 - {_power('(1 - β)', self.beta)}",
            "eps": _power("ε", self.eps),
            "weight_decay": _power("λ", self.weight_decay),
        }


def _power(symbol: str, a: float) -> str:
    return {0: symbol, 1: f"κ·{symbol}", 0.5: f"√κ·{symbol}", -0.5: f"{symbol}/√κ", -1: f"{symbol}/κ"}.get(
        a, f"κ^{a:g}·{symbol}"
    )


_ANY: tuple[Family, ...] = ("adaptive", "sgd")
_PAPER = "Malladi et al. 2022, Def. 5.2"
_L2 = "weight decay inside the gradient (L2), gradient clipping"
_ABLATION = "ablation of " + _PAPER

RULES: dict[str, Rule] = {
    r.name: r
    for r in (
        Rule("sqrt", 0.5, 1, -0.5, 0, ("adaptive",), _PAPER, _L2),
        Rule(
            "linear",
            1,
            0,
            0,
            0,
            _ANY,
            "Goyal et al. 2017 (for SGD); a control for adaptive methods",
            "betas, eps, " + _L2,
        ),
        Rule("lr_only", 0.5, 0, 0, 0, _ANY, "√κ on the learning rate alone; a control", "betas, eps, " + _L2),
        Rule("none", 0, 0, 0, 0, _ANY, "nothing scaled; the control arm", "everything"),
        Rule("sqrt_without_betas", 0.5, 0, -0.5, 0, ("adaptive",), _ABLATION, "betas, " + _L2),
        Rule("sqrt_without_eps", 0.5, 1, 0, 0, ("adaptive",), _ABLATION, "eps, " + _L2),
        Rule("linear_scaled", 1, 1, -0.5, 0, ("adaptive",), "control that isolates the exponent 1/2", _L2),
    )
}


def find(name: str, family: Family) -> Rule:
    """The rule called `name`, if it is meant for this family of optimizers; RuleError otherwise."""
    allowed = [r.name for r in RULES.values() if family in r.families]
    if name not in RULES:
        raise RuleError(f"unknown rule {name!r}; rules: {', '.join(RULES)}")
    if name not in allowed:
        raise RuleError(f"rule {name!r} is not for {family} optimizers; allowed here: {', '.join(allowed)}")
    return RULES[name]


def svag(base: Hyper, ell: int, family: Family) -> tuple[Hyper, int]:
    """SVAG's hyperparameters at `ell`, and by how much the number of steps grows (paper, section 6).

    It is the scaling rule at kappa = 1/ell^2 (adaptive; one step covers eta^2/ell^2 of time) or
    kappa = 1/ell (SGD; one step covers eta/ell). `ell = 1` is the identity.

    >>> svag(Hyper(1e-3, (0.9, 0.99), 1e-8, 0.0), 2, "adaptive")
    (Hyper(lr=0.0005, betas=(0.975, 0.9975), eps=2e-08, weight_decay=0.0), 4)
    """
    if ell < 1:
        raise RuleError(f"svag={ell} must be an integer >= 1 (1 is plain training)")
    stretch, rule = (ell**2, "sqrt") if family == "adaptive" else (ell, "linear")
    return RULES[rule].scale(base, 1 / stretch), stretch


def svag_weights(ell: int, family: Family) -> tuple[float, ...]:
    """Weights of the independent mini-batch gradients of one step: mean 1, covariance times the stretch.

    r = (1 ± √(2 s - 1)) / 2 with s = ell^2 (adaptive) or ell (SGD); at ell = 1 one gradient of weight 1.

    >>> sum(svag_weights(3, "adaptive"))
    1.0
    """
    if ell == 1:
        return (1.0,)
    root = math.sqrt(2 * (ell**2 if family == "adaptive" else ell) - 1)
    return (1 + root) / 2, (1 - root) / 2


def continuous_time(hyper: Hyper, step: int, family: Family) -> float:
    """t = k eta^2 for adaptive methods, k eta for SGD: the SDE's clock (paper, section 3)."""
    return step * hyper.lr ** (2 if family == "adaptive" else 1)
