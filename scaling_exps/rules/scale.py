"""`from scaling_exps import scale`: the rules for people who keep their own trainer. Imports no torch.

What moves in a live optimizer besides its hyperparameters, when the batch changes at step t (B0 -> B, kappa = B/B0):

    second moment    v -> v (1 + B_n/B) / (1 + B_n/B0)       v is |grad f|^2 + variance/B; v/kappa if noise dominates
    step count       t -> t ln(beta2) / ln(beta2')           so that beta2^t, the share of its start still in v, stays
    first moment     m -> m (1 - beta1'^t') / (1 - beta1^t)  so that the corrected m stays; 1 once m has warmed up
    momentum buffer  b -> b (1 - mu) / (1 - mu')             torch's SGD sums gradients: b is about grad f / (1 - mu)

The step count is one number for both moments. v is the slow one, so it gets the exact count; what that leaves
wrong in m's correction (the linear beta map does not keep half-lives exactly) is folded into m.
Derived here; without it v is stale for about 1 / (1 - beta2') steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling_exps.rules import BetaMap, Family, Hyper, Rule, RuleError, find


@dataclass(frozen=True)
class Kind:
    """What an optimizer class is to a rule: where its betas and its second moments are."""

    family: Family
    default: str  # the rule for goal=match
    decoupled: bool
    betas: str  # the field that holds them
    second_moments: tuple[str, ...] = ()
    sums: bool = False  # its momentum buffer is a sum of gradients, not an average


_BETA_FIELDS: dict[str, tuple[Family, ...]] = {
    "betas": ("adaptive", "sign"),
    "beta": ("adaptive",),
    "alpha": ("adaptive",),
    "momentum": ("sgd", "sign"),
}
_ADAM = ("exp_avg_sq", "max_exp_avg_sq", "v")
KINDS = {  # by class name, the class itself or one that it inherits from
    "AdamW": Kind("adaptive", "adamw_sde", True, "betas", _ADAM),
    "Adam": Kind("adaptive", "sqrt", False, "betas", _ADAM),
    "PaperAdam": Kind("adaptive", "sqrt", False, "betas", _ADAM),
    "PaperRMSprop": Kind("adaptive", "sqrt", False, "beta", ("v",)),
    "RMSprop": Kind("adaptive", "sqrt", False, "alpha", ("square_avg",)),
    "SGD": Kind("sgd", "linear", False, "momentum", sums=True),
    "Lion": Kind("sign", "lion", True, "betas"),
    "Muon": Kind("sign", "muon", True, "momentum"),
}


def scale(
    target: Any = None,
    /,
    *,
    batch: float,
    base_batch: float | None = None,
    rule: str | Rule | None = None,
    duration: float = 1.0,
    noise_scale: float | None = None,
    beta_map: BetaMap = "linear",
    **numbers: Any,
) -> Any:
    """Move hyperparameters that were tuned at `base_batch` to `batch`.

    Args:
        target: what to scale:
            nothing, with numbers by keyword (lr=1e-3, betas=(0.9, 0.999), ...) -> a dict of them;
            a dict with the same names -> a new dict, other keys as they were;
            a list of torch parameter groups -> a new list, each group by its own values, other fields as they were;
            a live optimizer -> the same object, changed in place, with its second moments and step counts.
        batch: global batch to go to, in examples: all devices and all accumulation.
        base_batch: the batch it was tuned at (a dict may hold it as "batch", which is then updated).
        rule: a name (see docs/rules.md) or a Rule. Only an optimizer object has a default: its class decides.
        duration: new budget / old budget, in samples.
        noise_scale: measured gradient-noise scale in examples: for the rules that need it, and for moving v.
        beta_map: "linear" (the paper's) or "power".

    Names that are scaled in a dict: lr, betas (or momentum for SGD), eps, weight_decay; ema (decay per step of a
    model average); steps, warmup_steps, milestones (counts of optimizer steps, which become floats where kappa does
    not divide them). A learning-rate scheduler that counts steps cannot be reached through an optimizer: build it anew.

    Raises:
        RuleError: no base batch, another name of what is scaled (epsilon, beta1, ...), a beta that does not survive,
            an optimizer that is not known, fields that are missing, a schedule in steps without its length. Nothing
            has been changed then.

    >>> scale(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, base_batch=256, batch=1024, rule="sqrt")
    {'lr': 0.002, 'betas': (0.6, 0.96), 'eps': 5e-09}
    >>> scale({"lr": 0.1, "momentum": 0.9, "batch": 256, "nesterov": True}, batch=512, rule="linear")
    {'lr': 0.2, 'momentum': 0.9, 'batch': 512, 'nesterov': True}
    """
    to = _Job(batch, base_batch, rule, duration, noise_scale, beta_map)
    if target is None or isinstance(target, Mapping):
        return to.mapping({**(target or {}), **numbers})
    if numbers:
        raise RuleError(f"{', '.join(numbers)} given beside a {type(target).__name__}; give one or the other")
    if isinstance(target, list | tuple):
        return to.groups(list(target))
    if hasattr(target, "param_groups"):
        to.optimizer(target)
        return target
    raise RuleError(
        f"cannot scale a {type(target).__name__}; allowed: numbers by keyword, a dict, a list of parameter groups, "
        "a torch optimizer"
    )


OTHER_NAMES = {  # that people give to what is scaled
    "learning_rate": "lr",
    "beta1": "betas=(beta1, beta2)",
    "beta2": "betas=(beta1, beta2)",
    "epsilon": "eps",
    "wd": "weight_decay",
}


@dataclass(frozen=True)
class _Job:
    batch: float
    base_batch: float | None
    rule: str | Rule | None
    duration: float
    noise_scale: float | None
    beta_map: BetaMap

    def move(self, rule: Rule, base: Hyper, base_batch: float) -> Hyper:
        return rule.scale(
            base,
            self.batch / base_batch,
            base_batch=base_batch,
            duration=self.duration,
            noise_scale=self.noise_scale,
            beta_map=self.beta_map,
        )

    def start(self, given: Any = None) -> float:
        """The base batch, from the argument or the recipe."""
        if self.base_batch is not None and given is not None and self.base_batch != given:
            raise RuleError(f"base_batch={self.base_batch} and batch={given} in the recipe: which one is the base?")
        base = self.base_batch if self.base_batch is not None else given
        for name, value in (("base_batch", base), ("batch", self.batch)):
            if not _is_number(value) or not 0 < value < math.inf:
                raise RuleError(
                    f"{name}={value!r}: give the global batch in examples, a number > 0 (all devices, accumulation); "
                    "a recipe cannot be scaled without the batch size it was tuned at"
                )
        return float(base)  # type: ignore[arg-type]

    def by_fields(self, given: Mapping[str, Any], what: str, l2: bool = False) -> tuple[Rule, str | None]:
        """(the rule, the field of the betas) where no optimizer class says what this is."""
        if self.rule is None:
            raise RuleError(
                "rule is not given, and without the optimizer's class there is no default: name one, such as "
                "rule='sqrt' (Adam, RMSprop), 'adamw_sde' (AdamW), 'linear' (SGD); docs/rules.md has them all"
            )
        rule = self.rule if isinstance(self.rule, Rule) else find(self.rule, l2=l2)
        field = next((f for f in _BETA_FIELDS if f in given), None)
        if field not in (None, "momentum") and given.get("momentum"):
            raise RuleError(f"{what} has {field} and momentum; no rule covers both: give {field}, or momentum (SGD)")
        fits = _BETA_FIELDS.get(field or "", rule.families)
        if not set(fits) & set(rule.families):
            raise RuleError(f"{what} has {field}, and rule {rule.name!r} is for {', '.join(rule.families)} optimizers")
        return rule, field

    def mapping(self, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in OTHER_NAMES:  # carried along unscaled it would be a wrong recipe that looks right
                raise RuleError(f"{name}={given[name]!r}: write it as {OTHER_NAMES[name]}")
        base_batch = self.start(given.get("batch"))
        kappa = self.batch / base_batch
        rule, field = self.by_fields(given, "the recipe")
        base = _hyper({"weight_decay": 0.0, "eps": 0.0, **given}, field, "the recipe", ("lr",))
        out = {**given, **_fields(self.move(rule, base, base_batch), given, field)}
        if "batch" in given:
            out["batch"] = self.batch
        if "ema" in given:
            out["ema"] = rule.ema(_number(given["ema"], "ema"), kappa)
        return {**out, **_clock(given, self.duration / kappa)}

    def groups(self, groups: list[Any]) -> list[dict[str, Any]]:
        base_batch = self.start()
        out = []
        for i, group in enumerate(groups):
            where = f"parameter group {i}"
            if not isinstance(group, Mapping) or "params" not in group:
                raise RuleError(f"{where} is no torch parameter group: a dict of params, lr and the optimizer's fields")
            l2 = group.get("decoupled_weight_decay") is False and bool(group.get("weight_decay"))
            rule, field = self.by_fields(group, where, l2)
            needed = ("lr", field or "betas", "weight_decay", *(("eps",) if rule.families == ("adaptive",) else ()))
            base = _hyper(group, field, where, needed)
            out.append({**group, **_fields(self.move(rule, base, base_batch), group, field)})
        return out

    def optimizer(self, optimizer: Any) -> None:
        base_batch = self.start()
        kappa = self.batch / base_batch
        names = [c.__name__ for c in type(optimizer).__mro__]
        kind = next((KINDS[n] for n in names if n in KINDS), None)
        if kind is None:
            raise RuleError(
                f"unknown optimizer class {names[0]}; allowed: {', '.join(KINDS)} and what inherits from them. "
                "For another, scale its param_groups with a rule named by you; its state is then yours to move"
            )
        plans = []
        for i, group in enumerate(optimizer.param_groups):
            where = f"parameter group {i} of {names[0]}"
            if "alpha" in group and (group.get("momentum") or group.get("centered")):
                raise RuleError(
                    f"{where} has momentum or centered=True: no rule covers that; use Adam or plain RMSprop"
                )
            l2 = not group.get("decoupled_weight_decay", kind.decoupled) and bool(group.get("weight_decay"))
            default = KINDS["AdamW"].default if group.get("decoupled_weight_decay") else kind.default
            rule = self.rule if isinstance(self.rule, Rule) else find(self.rule or default, kind.family, l2=l2)
            needed = ("lr", kind.betas, "weight_decay", *(("eps",) if kind.family == "adaptive" else ()))
            base = _hyper(group, kind.betas, where, needed)
            new = self.move(rule, base, base_batch)
            plans.append((group, base, new, _fields(new, group, kind.betas)))
        ratio = 0.0 if self.noise_scale is None else 1 / self.noise_scale
        v_factor = (1 / self.batch + ratio) / (1 / base_batch + ratio)  # (1 + B_n/B) / (1 + B_n/B0)
        for group, base, new, fields in plans:
            _write(group, fields)
            steps = _step_factor(base.betas[-1], new.betas[-1], kappa) if kind.second_moments else 1.0
            if "k" in group:  # PaperAdam counts once a group
                before, group["k"] = group["k"], group["k"] * steps
            for p in group["params"]:
                state = optimizer.state.get(p)
                if not state:
                    continue
                for name in kind.second_moments:
                    if state.get(name) is not None:
                        state[name].mul_(v_factor)
                if "step" in state:
                    before = float(state["step"])
                    state["step"] = state["step"] * steps
                if len(base.betas) == 2 and kind.second_moments and base.betas[0] != new.betas[0]:
                    m = state["exp_avg"] if "exp_avg" in state else state["m"]
                    m.mul_(_mass(new.betas[0], before * steps) / _mass(base.betas[0], before))
                if kind.sums and state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].mul_((1 - base.betas[0]) / (1 - new.betas[0]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, name: str) -> float:
    """A float out of a number or a tensor of one element (torch lets lr be one)."""
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise RuleError(f"{name}={value!r} must be a number") from None


def _hyper(given: Mapping[str, Any], field: str | None, where: str, needed: tuple[str, ...]) -> Hyper:
    if missing := [f for f in needed if given.get(f) is None]:
        raise RuleError(f"{where} has no {', '.join(missing)}; it needs {', '.join(needed)}: add what is missing")
    betas = () if field is None else given[field]
    return Hyper(
        _number(given["lr"], "lr"),
        tuple(_number(b, field or "") for b in (betas if isinstance(betas, tuple | list) else (betas,))),
        _number(given.get("eps", 0.0), "eps"),
        _number(given["weight_decay"], "weight_decay"),
    )


def _fields(hyper: Hyper, given: Mapping[str, Any], field: str | None) -> dict[str, Any]:
    """`hyper` in the names and types of `given`; only what is there."""
    new = {name: getattr(hyper, name) for name in ("lr", "eps", "weight_decay") if name in given}
    if field is not None:
        old = given[field]
        new[field] = type(old)(hyper.betas) if isinstance(old, tuple | list) else hyper.betas[0]
    if "initial_lr" in given:  # what a learning-rate scheduler multiplies
        new["initial_lr"] = _number(given["initial_lr"], "initial_lr") * hyper.lr / float(given["lr"])
    return new


def _write(group: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if hasattr(group[name], "fill_"):  # a tensor learning rate stays the tensor that a captured graph reads
            group[name].fill_(value)
        else:
            group[name] = value


def _step_factor(old: float, new: float, kappa: float) -> float:
    """ln(old) / ln(new): after t times this many steps at `new` as much is forgotten as after t at `old`."""
    if old == new or not 0 < old < 1:
        return 1.0 if old == new and old > 0 else 1 / kappa
    return math.log(old) / math.log(new)


def _mass(beta: float, steps: float) -> float:
    return 1 - beta**steps if steps > 0 else 1.0


def _clock(given: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Counts of steps, times `factor`; whole where they come out whole."""
    if ("warmup_steps" in given or "milestones" in given) and not {"steps", "epochs"} & set(given):
        raise RuleError(
            "a schedule in steps (warmup_steps, milestones) without its length: give steps (of the whole run at the "
            "base batch) or epochs, so that it ends where the data ends"
        )

    def times(value: Any, name: str) -> int | float:
        x = round(_number(value, name) * factor, 9)
        return int(x) if x == int(x) else x

    new: dict[str, Any] = {k: times(given[k], k) for k in ("steps", "warmup_steps") if given.get(k) is not None}
    if given.get("milestones") is not None:
        new["milestones"] = [times(m, "milestones") for m in given["milestones"]]
    return new
