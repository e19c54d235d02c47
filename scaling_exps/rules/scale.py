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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Real
from typing import Any

from scaling_exps.rules.move import BetaMap, Hyper, Move, RuleError, spelled
from scaling_exps.rules.optimizers import OPTIMIZERS, Optimizer, of
from scaling_exps.rules.rule import Rule
from scaling_exps.rules.table import find

_BOTH = "betas=(beta1, beta2)"
OTHER_NAMES = {"learning_rate": "lr", "beta1": _BOTH, "beta2": _BOTH, "epsilon": "eps"}  # that people give to these
OTHER_NAMES |= dict.fromkeys(("wd", "decoupled_decay"), "weight_decay")


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
    scheduler: Any = None,
    **numbers: Any,
) -> Any:
    """Move hyperparameters that were tuned at `base_batch` to `batch`.

    Args:
        target: what to scale:
            nothing, with numbers by keyword (lr=1e-3, betas=(0.9, 0.999), ...) -> a dict of them;
            a dict with the same names -> a new dict, other keys as they were;
            a list of torch parameter groups -> a new list, each group by its own values, other fields as they were;
            a live optimizer, or accelerate's, Lightning's or DeepSpeed's wrapper of one -> the same object, changed
            in place, with its second moments and step counts.
        batch: global batch to go to, in examples: all devices and all accumulation.
        base_batch: the batch it was tuned at (a dict may hold it as "batch", which is then updated).
        rule: a name (see docs/rules.md) or a Rule. Only an optimizer object has a default: its class decides.
        duration: new budget / old budget, in samples.
        noise_scale: measured gradient-noise scale in examples: for the rules that need it, and for moving v.
        beta_map: "linear" (the paper's) or "power".
        scheduler: the torch scheduler of a live optimizer: the rates that it starts from (`base_lrs`) move too. What
            it counts in steps stays: build one anew whose length is a number of steps.

    Names that are scaled in a dict: lr, betas (or momentum for SGD), eps, weight_decay; ema (decay per step of a
    model average); epochs (with the budget); steps, warmup_steps, milestones (counts of optimizer steps, which become
    floats where kappa does not divide them).

    How far a live switch is from the run that goes on as it was: docs/rules.md. State and tensor-valued fields are
    written in place. A CUDA graph captured over the optimizer reads those anew; betas, eps and weight decay that are
    plain floats are constants in it: capture it again.

    Raises:
        RuleError: no base batch, another name of what is scaled (epsilon, beta1, ...), a field missing that the rule
            moves, a beta that does not survive, an optimizer that is not known, a scheduler that is not given or
            keeps rates of its own, a schedule in steps without its length. Nothing has been changed then.

    >>> scale(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, base_batch=256, batch=1024, rule="sqrt")
    {'lr': 0.002, 'betas': (0.6, 0.96), 'eps': 5e-09}
    >>> scale({"lr": 0.1, "momentum": 0.9, "batch": 256, "nesterov": True}, batch=512, rule="linear")
    {'lr': 0.2, 'momentum': 0.9, 'batch': 512, 'nesterov': True}
    """
    recipe = {**(target or {}), **numbers} if target is None or isinstance(target, Mapping) else None
    if recipe is None and numbers:
        raise RuleError(f"{', '.join(numbers)} given beside a {type(target).__name__}; give one or the other")
    own = recipe.get("batch") if recipe else None
    base: Any = own if base_batch is None else base_batch
    if own not in (None, base):
        raise RuleError(f"base_batch={base} and batch={own} in the recipe: which one is the base?")
    for name, value in (("base_batch", base), ("batch", batch)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
            raise RuleError(
                f"{name}={value!r}: give the global batch in examples, a number > 0 (all devices, accumulation); "
                "a recipe cannot be scaled without the batch size it was tuned at"
            )
    with spelled('beta_map="power"'):
        return _scaled(target, recipe, rule, Move(base, batch, duration, noise_scale, beta_map), scheduler)


def _scaled(target: Any, recipe: dict[str, Any] | None, rule: str | Rule | None, move: Move, scheduler: Any) -> Any:
    optimizer = None if recipe is not None else unwrapped(target)
    if hasattr(optimizer, "param_groups"):
        _live(optimizer, rule, move, scheduler)
        return target
    if scheduler is not None:
        raise RuleError("scheduler is given without its optimizer: scale(optimizer, scheduler=scheduler, ...)")
    if recipe is not None:
        return _recipe(recipe, rule, move)
    if not isinstance(target, list | tuple):
        raise RuleError(
            f"cannot scale a {type(target).__name__}; allowed: numbers by keyword, a dict, a list of parameter groups, "
            "a torch optimizer"
        )
    for i, group in enumerate(target):
        if not isinstance(group, Mapping) or "params" not in group:
            raise RuleError(f"group {i} is no torch parameter group: a dict of params, lr, ...")
    return [_by_fields(group, f"parameter group {i}", rule, move)[1] for i, group in enumerate(target)]


def _recipe(given: dict[str, Any], rule: str | Rule | None, move: Move) -> dict[str, Any]:
    for name in given:
        if name in OTHER_NAMES:  # carried along unscaled it would be a wrong recipe that looks right
            raise RuleError(f"{name}={given[name]!r}: write it as {OTHER_NAMES[name]}")
    if {"warmup_steps", "milestones"} & set(given) and not {"steps", "epochs"} & set(given):
        raise RuleError(
            "a schedule in steps (warmup_steps, milestones) without its length: give steps (of the whole run at the "
            "base batch) or epochs, so that it ends where the data ends"
        )
    chosen, out = _by_fields(given, "the recipe", rule, move)
    if "batch" in given:
        out["batch"] = move.batch
    if "ema" in given:
        if not 0 <= (decay := _number(given["ema"], "ema")) < 1:
            raise RuleError(f"ema={decay} must lie in [0, 1): the decay of a model average, a step")
        out["ema"] = chosen.ema(decay, move.kappa)
    for name in ("steps", "epochs", "warmup_steps", "milestones"):
        if (counts := given.get(name)) is not None:
            several, a_step = name == "milestones", 1 if name == "epochs" else move.kappa
            if several != isinstance(counts, list | tuple):
                raise RuleError(f"{name}={counts!r} must be {'a list of steps' if several else 'a number'}")
            new = [round(_number(n, name) * (move.duration / a_step), 9) for n in (counts if several else [counts])]
            whole = [int(x) if x == int(x) else x for x in new]
            out[name] = whole if several else whole[0]
    return out


def _by_fields(given: Mapping[str, Any], what: str, rule: str | Rule | None, move: Move) -> tuple[Rule, dict[str, Any]]:
    """(the rule, `given` scaled by it) where only its fields say what this is."""
    if rule is None:
        raise RuleError(
            "rule is not given, and without the optimizer's class there is no default: name one, such as "
            "rule='sqrt' (Adam, RMSprop), 'adamw_sde' (AdamW), 'linear' (SGD); docs/rules.md has them all"
        )
    l2 = given.get("decoupled_weight_decay") is False and bool(given.get("weight_decay"))
    rule = rule if isinstance(rule, Rule) else find(rule, l2=l2)
    names = sorted({o.field for o in OPTIMIZERS.values()} & set(given), key=lambda f: f == "momentum")
    field = names[0] if names else None
    if field not in (None, "momentum") and given.get("momentum"):
        raise RuleError(f"{what} has {field} and momentum; no rule covers both: give {field}, or momentum (SGD)")
    if field and not {o.family for o in OPTIMIZERS.values() if o.field == field} & set(rule.families):
        raise RuleError(f"{what} has {field}, and rule {rule.name!r} is for {', '.join(rule.families)} optimizers")
    return rule, {**given, **_fields(rule.scale(_hyper(given, field, what, rule, move), move), given, field)}


def _live(optimizer: Any, rule: str | Rule | None, move: Move, scheduler: Any) -> None:
    schedulers = _schedulers(optimizer, scheduler)
    plans: list[tuple[Hyper, Hyper]] = []
    for i, group in enumerate(optimizer.param_groups):
        row = of(optimizer, group)
        where = f"parameter group {i} of {type(optimizer).__name__}"
        if "alpha" in group and (group.get("momentum") or group.get("centered")):
            raise RuleError(f"{where} has momentum or centered=True: no rule covers that; use Adam or plain RMSprop")
        for state in filter(None, map(optimizer.state.get, group["params"])):
            if row.second_moments and not set(row.second_moments) & set(state):
                raise RuleError(
                    f"{where} keeps {', '.join(state)} and none of {', '.join(row.second_moments)}: it is another "
                    f"{row.name} than torch's; scale its param_groups with a rule named by you"
                )
        l2 = not row.decoupled and bool(group.get("weight_decay"))
        name = rule or row.match or row.best
        chosen = name if isinstance(name, Rule) else find(str(name), row.family, l2=l2)
        base = _hyper(group, row.field, where, chosen, move)
        plans.append((base, chosen.scale(base, move)))
    carry(optimizer, plans, move, chosen.carries)
    for s in schedulers:
        if hasattr(s, "base_lrs"):
            s.base_lrs = [lr * new.lr / base.lr for lr, (base, new) in zip(s.base_lrs, plans, strict=True)]
        s._last_lr = [float(group["lr"]) for group in optimizer.param_groups]


def carry(optimizer: Any, plans: Sequence[tuple[Hyper, Hyper]], move: Move, carries: bool = True) -> None:
    """Give each parameter group its new hyperparameters and move its state, in place; see the head of this module.

    Args:
        plans: of each group what it has, and what it gets.
        move: its batches, and the noise scale by which v is moved.
        carries: as the rule says; else v stays as it is.

    >>> group = {"params": ["p"], "lr": 0.001, "betas": (0.9, 0.99), "eps": 1e-8}
    >>> adam = type("Adam", (), {"param_groups": [group], "state": {}})()
    >>> base = Hyper(0.001, (0.9, 0.99), 1e-8, 0.0)
    >>> carry(adam, [(base, Hyper(0.002, (0.6, 0.96), 5e-9, 0.0))], Move(256, 1024))
    >>> group["lr"], group["betas"]
    (0.002, (0.6, 0.96))
    """
    ratio = 0.0 if move.noise_scale is None else 1 / move.noise_scale
    v_factor = (
        (1 / move.batch + ratio) / (1 / move.base_batch + ratio) if carries else 1.0
    )  # (1 + B_n/B) / (1 + B_n/B0)
    for group, (base, new) in zip(optimizer.param_groups, plans, strict=True):
        row = of(optimizer, group)
        for name, value in _fields(new, group, row.field).items():
            group[name] = _written(group[name], value)
        _carry(optimizer.state, row, group, base, new, v_factor, move.kappa)


def _carry(
    states: Any, row: Optimizer, group: dict[str, Any], base: Hyper, new: Hyper, v_factor: float, kappa: float
) -> None:
    steps = 1.0
    if row.second_moments:  # as much is forgotten after t times this many steps as after t at the old beta2
        steps = math.log(base.betas[-1]) / math.log(new.betas[-1]) if base.betas[-1] else 1 / kappa
    before = group.get("k", 0)  # PaperAdam counts once a group
    if "k" in group:
        group["k"] = before * steps
    for state in filter(None, map(states.get, group["params"])):
        for name in row.second_moments:
            if row.family == "adaptive" and state.get(name) is not None:
                state[name].mul_(v_factor)
        if "step" in state:
            before = float(state["step"])
            state["step"] = _written(state["step"], before * steps)
        if base.betas[0] != new.betas[0]:
            for name in row.moments if before > 0 else ():
                state[name].mul_((1 - new.betas[0] ** (before * steps)) / (1 - base.betas[0] ** before))
            if row.family == "sgd" and state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_((1 - base.betas[0]) / (1 - new.betas[0]))


def unwrapped(target: Any) -> Any:
    """The optimizer inside a wrapper of one, else `target`.

    >>> unwrapped("no wrapper")
    'no wrapper'
    """
    for name in ("optimizer", "_optimizer"):
        if hasattr(inner := getattr(target, name, None), "param_groups"):
            return unwrapped(inner)
    return target


def _schedulers(optimizer: Any, scheduler: Any) -> list[Any]:
    """The scheduler and those that it is composed of; refused where their base_lrs are not all that would move."""
    if scheduler is None:
        if any("initial_lr" in group for group in optimizer.param_groups):
            raise RuleError(
                "a learning-rate scheduler is attached (the groups carry initial_lr), and its next step would set the "
                "old rate: give it, scale(optimizer, scheduler=scheduler, ...)"
            )
        return []
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    kind = type(scheduler).__name__
    if unwrapped(scheduler) is not optimizer:
        raise RuleError(f"scheduler={kind} is not the scheduler of this {type(optimizer).__name__}: give its own")
    parts = [part for inner in getattr(scheduler, "_schedulers", ()) for part in _schedulers(optimizer, inner)]
    rates = {name: getattr(scheduler, name, 0) for name in ("eta_min", "min_lrs", "max_lrs")}
    rates |= {name: group.get(name, 0) for group in optimizer.param_groups for name in ("max_lr", "min_lr", "swa_lr")}
    if own := [name for name, x in rates.items() if any(x if isinstance(x, Sequence) else (x,))]:
        raise RuleError(f"{kind} keeps rates of its own ({', '.join(own)}): build it anew on the scaled optimizer")
    known, groups = len(getattr(scheduler, "base_lrs", optimizer.param_groups)), len(optimizer.param_groups)
    if known != groups:
        raise RuleError(f"{kind} knows {known} of {groups} parameter groups: build it anew on the scaled optimizer")
    if not parts and not hasattr(scheduler, "base_lrs"):
        raise RuleError(f"{kind} has no base_lrs to move: build it anew on the scaled optimizer")
    return [scheduler, *parts]


def _number(value: Any, name: str) -> float:
    """A float out of a number or a tensor of one element (torch lets lr be one)."""
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise RuleError(f"{name}={value!r} must be a number") from None


def _hyper(given: Mapping[str, Any], field: str | None, where: str, rule: Rule, move: Move) -> Hyper:
    """The numbers of `given`, 0 or () for what is missing; a RuleError where `rule` moves what is missing."""
    few = rule.families == ("sgd",)
    trial = Hyper(1.0, (1 - 1e-6,) if few else (1 - 1e-6, 1 - 1e-6), 1.0, 1.0)  # none of the betas can be refused
    moved = rule.scale(trial, replace(move, beta_map="power"))
    names = {"betas": field or ("momentum" if few else "betas")}
    needed = [names.get(k, k) for k, x in asdict(moved).items() if k == "lr" or x != getattr(trial, k)]
    if missing := [name for name in needed if given.get(name) is None]:
        raise RuleError(
            f"{where} has no {', '.join(missing)}, and rule {rule.name!r} moves {', '.join(needed)}: give them all"
        )
    betas = () if field is None else given[field]
    numbers = betas if isinstance(betas, tuple | list) else (betas,)
    if len(numbers) > 2:
        raise RuleError(f"{where} has {field}={betas!r}, and rules move two at most: Adam's")
    values = (
        _number(given.get("initial_lr", given["lr"]), "lr"),  # a scheduler's peak: lr itself may be 0 in its warm-up
        tuple(_number(b, field or "") for b in numbers),
        _number(given.get("eps", 0.0), "eps"),
        _number(given.get("weight_decay", 0.0), "weight_decay"),
    )
    try:
        return Hyper(*values)
    except RuleError as e:
        raise RuleError(f"{where}: {e}") from None


def _fields(hyper: Hyper, given: Mapping[str, Any], field: str | None) -> dict[str, Any]:
    """`hyper` in the names and types of `given`; only what is in it."""
    new = {name: getattr(hyper, name) for name in ("lr", "eps", "weight_decay") if name in given}
    if field is not None:
        old = given[field]
        new[field] = type(old)(hyper.betas) if isinstance(old, tuple | list) else hyper.betas[0]
    if "initial_lr" in given:  # what a learning-rate scheduler multiplies
        new |= {"initial_lr": hyper.lr, "lr": float(given["lr"]) * hyper.lr / float(given["initial_lr"])}
    return new


def _written(old: Any, value: Any) -> Any:
    """What takes the place of `old`: itself where it is a tensor, which a captured graph reads."""
    if isinstance(old, tuple | list):
        return type(old)(map(_written, old, value))
    return old.fill_(value) if hasattr(old, "fill_") else value
