"""The rules that come with scalerun, and how one is found by its name."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from scaling_exps.rules.move import BetaMap, Family, Hyper, Move, RuleError
from scaling_exps.rules.rule import Rule

ENTRY_POINTS = "scalerun.rules"
_ALONE = {"lr": "η", "betas": "β", "eps": "ε", "weight_decay": "λ"}  # the formulas of what does not move


@dataclass(frozen=True, kw_only=True)
class Powers(Rule):
    """A row of exponents in the clock r = kappa, or r = kappa / delta where it moves the duration too:

        eta -> eta r^lr,  1 - beta -> r (1 - beta),  eps -> eps r^eps,  lambda -> lambda r^weight_decay

    so that identity, composition and inverse hold by construction.

    Args:
        beta1, beta2: whether the average of the gradient, and of its square, keeps its time in samples.
        half_lives: beta -> beta^r whatever the beta map.
        alone: a model average and a clipping threshold are left alone too.
    """

    lr: float = 0
    beta1: bool = False
    beta2: bool = False
    eps: float = 0
    weight_decay: float = 0
    half_lives: bool = False
    alone: bool = False

    def apply(self, base: Hyper, move: Move) -> Hyper:
        r = move.kappa / move.duration if self.moves_duration else move.kappa
        moved = (self.beta1, self.beta2)[-len(base.betas) :] if base.betas else ()
        if self.half_lives:
            move = replace(move, beta_map="power")
        return Hyper(
            lr=base.lr * r**self.lr,
            betas=tuple(move.beta(b, r, self.name) if m else b for b, m in zip(base.betas, moved, strict=True)),
            eps=base.eps * r**self.eps,
            weight_decay=base.weight_decay * r**self.weight_decay,
        )

    def ema(self, decay: float, kappa: float) -> float:
        return decay if self.alone else super().ema(decay, kappa)

    def clip(self, threshold: float, kappa: float) -> float:
        return threshold if self.alone else super().clip(threshold, kappa)

    def formulas(self, beta_map: BetaMap = "linear") -> dict[str, str]:
        """What happens to each hyperparameter, as text.

        >>> RULES["sqrt"].formulas()["betas"]
        '1 - κ·(1 - β)'
        >>> RULES["sqrt"].formulas("power")["betas"]
        'β^κ'
        """
        r = "(κ/δ)" if self.moves_duration else "κ"
        beta = f"β^{r}" if self.half_lives or beta_map == "power" else f"1 - {r}·(1 - β)"
        both = self.beta1 and self.beta2
        return {
            "lr": _power("η", self.lr, r),
            "betas": beta if both else f"β1, {beta.replace('β', 'β2')}" if self.beta2 else "β",
            "eps": _power("ε", self.eps, r),
            "weight_decay": _power("λ", self.weight_decay, r),
        }


def _power(symbol: str, a: float, r: str) -> str:
    known = {0: symbol, 1: f"{r}·{symbol}", 0.5: f"√{r}·{symbol}", -0.5: f"{symbol}/√{r}", -1: f"{symbol}/{r}"}
    return known.get(a, f"{r}^{a:g}·{symbol}")


class LinearMomentum(Rule):
    """SGD in torch's form, buf -> mu buf + g: the gain eta / (1 - mu) grows by kappa, its time in samples stays."""

    def apply(self, base: Hyper, move: Move) -> Hyper:
        betas = tuple(move.beta(b, move.kappa, self.name) for b in base.betas)
        gain = math.prod((1 - new) / (1 - old) for new, old in zip(betas, base.betas, strict=True))
        return replace(base, lr=base.lr * move.kappa * gain, betas=betas)

    def formulas(self, beta_map: BetaMap = "linear") -> dict[str, str]:
        gain = "κ·η·(1 - μ')/(1 - μ)"
        if beta_map == "power":
            return _ALONE | {"lr": gain, "betas": "μ' = μ^κ"}
        return _ALONE | {"lr": f"{gain} = κ²·η (κ·η where μ = 0)", "betas": "μ' = 1 - κ·(1 - μ)"}


class Timescale(Rule):
    """AdamW's averaging time tau = B / (eta lambda D) kept by the one knob lambda, eta as it is."""

    def apply(self, base: Hyper, move: Move) -> Hyper:
        return replace(base, weight_decay=base.weight_decay * move.kappa / move.duration)

    def formulas(self, beta_map: BetaMap = "linear") -> dict[str, str]:
        return _ALONE | {"weight_decay": "λ·κ/δ (any η': λ·κ·(η/η')/δ)"}


@dataclass(frozen=True, kw_only=True)
class Gain(Rule):
    """eta -> eta [h(B) / h(B0)]^exponent with h(B) = 1 / (1 + B_n / B), what a step is worth, B_n measured."""

    exponent: float

    def apply(self, base: Hyper, move: Move) -> Hyper:
        if move.noise_scale is None:
            raise RuleError(
                f"rule {self.name!r} needs noise_scale: it compares the batch sizes with the measured gradient-noise "
                "scale B_n = tr(covariance of one example's gradient) / |mean gradient|^2, in examples. "
                "Give noise_scale=N, or choose a rule that needs no measurement"
            )
        ratio = move.noise_scale / move.base_batch
        return replace(base, lr=base.lr * ((1 + ratio) / (1 + ratio / move.kappa)) ** self.exponent)

    def formulas(self, beta_map: BetaMap = "linear") -> dict[str, str]:
        gain = "(1 + B_n/B0)/(1 + B_n/B)"
        return _ALONE | {"lr": f"η·{gain}" if self.exponent == 1 else f"η·√[{gain}]"}


_SQRT = functools.partial(Powers, lr=0.5, beta1=True, beta2=True, eps=-0.5)
_PAPER = "Malladi et al. 2022, Def. 5.2"
_NOISE = (
    "Gradient noise dominates the mean gradient (κ·r ≪ 1, where r = |mean|²/variance of one base-batch gradient); "
    "small η; κ < 1/(1 - β) for every β under the linear map; equal samples; schedule and warm-up in samples; "
    "normalisation batch (BatchNorm) held fixed."
)
_L2 = "weight decay inside the gradient (L2), gradient clipping"

RULES: dict[str, Rule] = {
    r.name: r
    for r in (
        _SQRT(
            name="sqrt",
            goals={"adaptive": "match", "invariant": "control"},
            evidence="settled",
            because="Theorem (order-1 weak approximation by one SDE) and experiments in the paper. With ε inside the "
            "square root its factor is 1/κ instead.",
            source=_PAPER,
            conditions=_NOISE,
            leaves_alone=_L2,
        ),
        Powers(
            name="linear",
            goals={"sgd": "match", "adaptive": "control", "invariant": "control", "sign": "control"},
            evidence="settled",
            because="For SGD: widely reproduced. For adaptive and sign methods it is a control: on a noisy quadratic "
            "Adam's variance is wrong by a factor of 2.2 to 2.4 at κ = 4.",
            source="Goyal et al. 2017 (for SGD; a secondary reading); a control for adaptive methods",
            conditions="SGD; B ≪ B_n; small η; gradual warm-up; momentum time short against the motion, η·h/(1 - μ)² "
            "≪ 1, else `linear_momentum`.",
            leaves_alone="betas, momentum, eps, " + _L2,
            lr=1,
            carries=False,
        ),
        Powers(
            name="lr_only",
            goals={"adaptive": "control", "invariant": "control", "sgd": "control", "sign": "control"},
            evidence="experimental",
            because="Common practice for Adam; on a noisy quadratic with AdamW the variance is wrong by -11% at κ = 4 "
            "and -69% at κ = 16.",
            source="√κ on the learning rate alone; a control",
            conditions="None under which it is exact.",
            leaves_alone="betas, eps, " + _L2,
            lr=0.5,
            carries=False,
        ),
        Powers(
            name="none",
            goals={"adaptive": "control", "invariant": "control", "sgd": "control", "sign": "control"},
            evidence="settled",
            because="It is what one gets by changing the batch size alone.",
            source="nothing scaled; the control arm",
            conditions="None.",
            leaves_alone="everything",
            alone=True,
            carries=False,
        ),
        Powers(
            name="sqrt_without_betas",
            goals={"adaptive": "control"},
            evidence="experimental",
            because="Shows what scaling the betas is worth.",
            source="ablation of " + _PAPER,
            conditions="None under which it is exact.",
            leaves_alone="betas, " + _L2,
            lr=0.5,
            eps=-0.5,
        ),
        _SQRT(
            name="sqrt_without_beta1",
            goals={"adaptive": "control"},
            evidence="experimental",
            because="Shows what scaling β1 is worth, which the linear map forbids from κ = 10 on where β1 = 0.9.",
            source="ablation of " + _PAPER,
            conditions="Nothing moves much within the base's 1/(1 - β1) steps.",
            leaves_alone="beta1, " + _L2,
            beta1=False,
        ),
        _SQRT(
            name="sqrt_without_eps",
            goals={"adaptive": "control"},
            evidence="experimental",
            because="Shows what scaling ε is worth: nothing where ε is far below the noise.",
            source="ablation of " + _PAPER,
            conditions="ε ≪ √v.",
            leaves_alone="eps, " + _L2,
            eps=0,
        ),
        _SQRT(
            name="linear_scaled",
            goals={"adaptive": "control"},
            evidence="experimental",
            because="Everything as in `sqrt` but κ instead of √κ on η: on a noisy quadratic the variance is wrong by a "
            "factor of 2.4 to 3.6 at κ = 4.",
            source="control that isolates the exponent 1/2",
            conditions="None under which it is exact.",
            leaves_alone=_L2,
            lr=1,
        ),
        LinearMomentum(
            name="linear_momentum",
            goals={"sgd": "match"},
            evidence="experimental",
            because="Derived, and checked on a noisy quadratic: trajectory error at κ = 8 is 0.012 instead of 0.89 "
            "(underdamped), 0.004 instead of 0.045 (overdamped). Smith's noise scale η·N/(B(1 - μ)), which it keeps, "
            "was recalled, not read.",
            source="derived here: linear rule with the momentum's time in samples kept (torch form, dampening fixed)",
            conditions="As `linear`; needed where η·h/(1 - μ)² is not small; κ < 1/(1 - μ) under the linear map.",
            leaves_alone="eps, " + _L2,
        ),
        Powers(
            name="invariant",
            goals={"invariant": "match"},
            evidence="experimental",
            because="v does not shrink with the batch's noise, so κ small steps add up to a large one at any noise. "
            "On a noisy quadratic the mean stays within 1% at κ = 4 and 3% at κ = 16; `sqrt` is off by more than "
            "three times as much (`scalerun theory invariant_adam`).",
            source="Wang & Aitchison 2024 (2402.18824), read second-hand; derived here",
            conditions="Micro-batch held fixed; small η; κ < 1/(1 - β) for each β under the linear map; equal samples. "
            "Decay decoupled: η·λ a step grows by κ with η.",
            leaves_alone="eps, weight decay, gradient clipping",
            decoupled=True,
            lr=1,
            beta1=True,
            beta2=True,
        ),
        _SQRT(
            name="adamw_sde",
            goals={"adaptive": "match"},
            evidence="contested",
            because="Checked on a noisy quadratic: variance 4.4% off at κ = 16, against 45% with λ fixed. Published "
            "code does it so (read); the other school leaves η alone and moves λ by κ (`adamw_timescale`). Both keep "
            "η·λ per sample.",
            source="code of Complete(d)P, √κ on learning rate and weight decay (read); Busbridge et al., App. C.2 as "
            "cited by third-party code (not read)",
            conditions=_NOISE + " Decay decoupled as PyTorch applies it, η·λ a step (independent of η it needs κ·λ).",
            leaves_alone="gradient clipping",
            decoupled=True,
            weight_decay=0.5,
        ),
        Timescale(
            name="adamw_timescale",
            goals={"adaptive": "best", "sign": "best"},
            evidence="contested",
            because="Consistent in several summaries and in one public trainer's code (read); on a noisy quadratic it "
            "does not give the same run (variance -83% at κ = 4 with β2^κ).",
            source="Wang & Aitchison 2024 (2405.13698) and Power Lines (2505.13738), both read second-hand",
            conditions="Decoupled decay, η·λ a step. Composes with any choice of η' by λ' = λ·κ·(η/η')/δ; with √κ and "
            "δ = 1 that is `adamw_sde`.",
            leaves_alone="lr, betas, eps, gradient clipping",
            decoupled=True,
            moves_duration=True,
        ),
        _SQRT(
            name="completed",
            goals={"adaptive": "best"},
            evidence="contested",
            because="Read in the authors' code, not in the paper. At δ = 1 it is `adamw_sde`, the run of the base, "
            "else another: its noise σ0 = σ·η becomes σ0/√δ. On how η goes with the budget published exponents "
            "differ in sign.",
            source="Mlodozeniec et al. 2025 (2512.22382), through its code",
            conditions="As `adamw_sde`, with the clock r = κ/δ: a budget that grows with the batch changes nothing.",
            leaves_alone="gradient clipping",
            decoupled=True,
            moves_duration=True,
            weight_decay=0.5,
        ),
        Powers(
            name="token_halflife",
            goals={"adaptive": "best"},
            evidence="contested",
            because="Reported for language models; their code was read. Whether β1 should move is disputed: `sqrt` "
            "moves it. The learning rate stays here; about κ^0.16 was reported over a factor of 1024.",
            source="Marek et al. 2025 (2507.07101) and its code",
            conditions="Language-model pre-training at small batches, far below the critical batch size.",
            leaves_alone="lr, beta1, eps, weight decay, gradient clipping",
            beta2=True,
            half_lives=True,
        ),
        Gain(
            name="opt_sgd",
            goals={"sgd": "best"},
            evidence="contested",
            because="One-step greedy optimum on a quadratic; equals AdaScale's gain with B_n/B0 = σ²/G². As a guide to "
            "the critical batch size the noise scale is disputed.",
            source="McCandlish et al. 2018 (1812.06162), derivation read second-hand; AdaScale in two public codes",
            conditions="SGD; B_n measured near here in training (it grows as training goes on).",
            leaves_alone="momentum, weight decay, gradient clipping",
            exponent=1,
        ),
        Gain(
            name="opt_sign",
            goals={"adaptive": "best", "sign": "best"},
            evidence="experimental",
            because="Mean-field argument with a curvature proportional to |g|; equals the square root of AdaScale's "
            "gain. √κ at small batches, saturating at large ones.",
            source="Su, kexue.fm 11280 and 11285 (a machine translation was read); AdamScale in a public code",
            conditions="Sign-like updates (Adam, Lion, Muon); B_n measured near here in training.",
            leaves_alone="betas, eps, weight decay, gradient clipping",
            exponent=0.5,
        ),
        _SQRT(
            name="lion",
            goals={"sign": "match"},
            evidence="experimental",
            because="EXPERIMENTAL: no published batch-size rule for Lion was found. The argument is that of SignSGD "
            "under dominating noise, derived here and checked by nobody on networks.",
            source="derived here",
            conditions=_NOISE,
            leaves_alone="gradient clipping",
            decoupled=True,
            eps=0,
            weight_decay=0.5,
        ),
        Powers(
            name="muon",
            goals={"sign": "best"},
            evidence="contested",
            because="EXPERIMENTAL and CONTESTED: for √κ a public trainer (which says it was not studied carefully) and "
            "a noise-variance argument; a saturating law, `opt_sign`, by another author; sweeps of a third against "
            "√κ. How the momentum should move is not published.",
            source="public trainer's code and blog posts (read)",
            conditions="Batch well below the critical one.",
            leaves_alone="momentum, gradient clipping, the parameters that Muon hands to AdamW",
            decoupled=True,
            lr=0.5,
            weight_decay=0.5,
        ),
    )
}


@functools.cache
def third_party() -> dict[str, Rule]:
    """Rules of other packages: instances of `Rule` under the entry-point group `scalerun.rules`.

    Raises:
        RuleError: an entry that cannot be loaded, is no rule, or takes a name that is taken.

    >>> "sqrt" in third_party()  # scalerun's own are in RULES
    False
    """
    from importlib.metadata import entry_points  # 20 ms that only an unknown name pays

    loaded: dict[str, Rule] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        where = f"entry point {entry.name!r} = {entry.value} of group {ENTRY_POINTS}"
        try:
            rule = entry.load()
        except Exception as e:
            raise RuleError(f"{where} cannot be loaded: {type(e).__name__}: {e}") from e
        if not isinstance(rule, Rule):
            raise RuleError(f"{where} is a {type(rule).__name__}; it must be an instance of scaling_exps.rules.Rule")
        if rule.name in RULES or rule.name in loaded:
            raise RuleError(f"{where}: the name {rule.name!r} is taken; give the rule another name")
        loaded[rule.name] = rule
    return loaded


def find(name: str, family: Family | None = None, *, l2: bool = False) -> Rule:
    """The rule called `name`, if it is meant for this family of optimizers (None: whichever).

    `l2`: the recipe has a weight decay inside the gradient, so it is part of the loss, which no rule may change.

    Raises:
        RuleError: no such rule, or one for other optimizers; the message lists those allowed.

    >>> find("linear", "sgd").formulas()["lr"]
    'κ·η'
    """
    known = RULES if name in RULES else {**RULES, **third_party()}
    if name not in known:
        raise RuleError(f"unknown rule {name!r}; rules: {', '.join(known)}")
    rule = known[name]
    fits = [r for r in known.values() if family is None or family in r.families]
    if rule not in fits:
        allowed = ", ".join(r.name for r in fits)
        raise RuleError(f"rule {name!r} is not for {family} optimizers; allowed here: {allowed}")
    if l2 and rule.decoupled:
        raise RuleError(
            f"rule {name!r} scales a decoupled weight decay, and this one lies inside the gradient (L2), where it is "
            f"part of the loss; allowed here: {', '.join(r.name for r in fits if not r.decoupled)}"
        )
    return rule


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
    return RULES[rule].scale(base, Move(base_batch=stretch, batch=1)), stretch


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
    """t = k eta^2 for adaptive methods, k eta for SGD: the SDE's clock (paper, section 3).

    >>> continuous_time(Hyper(0.5, (0.9,), 0.0, 0.0), 8, "sgd")
    4.0
    """
    return step * hyper.lr ** (2 if family == "adaptive" else 1)
