"""The laws of a scaling rule, as functions: the test-kit for rules of other packages.

    from scaling_exps.rules import laws
    def test_my_rule():
        laws.check(my_rule)

Each law raises AssertionError with the case that breaks it. They need neither pytest nor hypothesis.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, replace
from typing import get_args

from scaling_exps.rules.move import BetaMap, Hyper, Move, RuleError
from scaling_exps.rules.optimizers import OPTIMIZERS
from scaling_exps.rules.rule import Rule
from scaling_exps.rules.scale import scale


def identity(rule: Rule, base: Hyper, move: Move) -> None:
    """At kappa = 1 and delta = 1 nothing changes, to the bit in `scale` and to rounding in `apply`.

    Each law is called on a rule, a recipe and a move, and raises AssertionError where it is broken:

    >>> from scaling_exps.rules import RULES
    >>> rule, base, move = RULES["sqrt"], Hyper(1e-3, (0.9, 0.99), 1e-8, 0.0), Move(256, 1024)
    >>> identity(rule, base, move), inverse(rule, base, move), in_range(rule, base, move)
    (None, None, None)
    >>> composition(rule, base, move, kappa=2), groups_apart(rule, recipes(rule), move)
    (None, None)
    """
    still = replace(move, batch=move.base_batch, duration=1.0)
    assert rule.scale(base, still) == base, f"{rule.name}: kappa = 1 is not the identity on {base}"
    assert _close(rule.apply(base, still), base), f"{rule.name}: apply at kappa = 1 changes {base}"


def composition(rule: Rule, base: Hyper, move: Move, kappa: float, duration: float = 1.0) -> None:
    """kappa1 and then kappa2 is kappa1 * kappa2; where one of the two is refused there is nothing to compare."""
    onward = replace(move, base_batch=move.batch, batch=move.batch * kappa, duration=duration)
    at_once = replace(move, batch=onward.batch, duration=move.duration * duration)
    try:
        in_two, direct = rule.scale(rule.scale(base, move), onward), rule.scale(base, at_once)
    except RuleError:
        return
    assert _close(in_two, direct), f"{rule.name}: {move.kappa:g} then {kappa:g} gives {in_two}, at once {direct}"


def inverse(rule: Rule, base: Hyper, move: Move) -> None:
    """kappa and then 1 / kappa is where one started."""
    try:
        scaled = rule.scale(base, move)
    except RuleError:
        return
    back = rule.scale(scaled, replace(move, base_batch=move.batch, batch=move.base_batch, duration=1 / move.duration))
    assert _close(back, base), f"{rule.name}: to kappa = {move.kappa:g} and back gives {back}, not {base}"


def in_range(rule: Rule, base: Hyper, move: Move) -> None:
    """The result is legal, or the move is refused with RuleError; nothing is clipped on the way.

    A clip would show as two moves with one result, where the base has something to move.
    """
    try:
        scaled, further = rule.scale(base, move), rule.scale(base, replace(move, batch=move.batch * 1.01))
    except RuleError:
        return
    for old, new, more in zip(base.betas, scaled.betas, further.betas, strict=True):
        assert 0 <= new < 1, f"{rule.name}: beta {old} became {new}"
        assert new == old or new != more, f"{rule.name}: beta {old} is {new} at two batch sizes: was it clipped?"


def groups_apart(rule: Rule, bases: tuple[Hyper, ...], move: Move) -> None:
    """A parameter group is scaled by its own values, whatever the groups beside it."""

    def group(h: Hyper) -> dict[str, object]:
        held = {o.field for o in OPTIMIZERS.values() if o.family in rule.families}
        one = next((f for f in ("beta", "momentum") if f in held and len(h.betas) == 1), "betas")
        betas = {one: h.betas if one == "betas" else h.betas[0]}
        return {"params": [], "lr": h.lr, **betas, "eps": h.eps, "weight_decay": h.weight_decay, "tag": "kept"}

    try:
        expected = [rule.scale(b, move) for b in bases]
    except RuleError:
        return
    got = scale([group(b) for b in bases], rule=rule, **asdict(move))
    assert got == [group(h) for h in expected], f"{rule.name}: groups {bases} became {got}"


def check(rule: Rule) -> None:
    """Every law on a grid of recipes and moves; for a rule of your own call this in one test.

    Raises:
        AssertionError: the first law that is broken, with its case.

    >>> from scaling_exps.rules import RULES
    >>> check(RULES["sqrt"])
    """
    assert rule.name.isidentifier(), f"{rule.name!r} must be one word that can be typed after rule="
    missing = [f for f in ("because", "source", "conditions", "leaves_alone") if not getattr(rule, f).strip()]
    assert not missing, f"{rule.name}: say its {', '.join(missing)}"
    assert set(rule.formulas()) == {"lr", "betas", "eps", "weight_decay"}, f"{rule.name}: formulas() must name all four"
    for base, kappa, beta_map in itertools.product(recipes(rule), (0.25, 1.0, 2.0, 7.5, 64.0), get_args(BetaMap)):
        move = Move(96, 96 * kappa, 2.0 if rule.moves_duration else 1.0, 1000.0, beta_map)
        identity(rule, base, move)
        inverse(rule, base, move)
        in_range(rule, base, move)
        for second in (0.5, 3.0):
            composition(rule, base, move, second, 0.5 if rule.moves_duration else 1.0)
        groups_apart(rule, recipes(rule), move)


def recipes(rule: Rule) -> tuple[Hyper, ...]:
    """Recipes of the shapes that the rule's families have."""
    adam = Hyper(1e-3, (0.9, 0.999), 1e-8, 0.1), Hyper(0.02, (0.0, 0.99), 1e-6, 0.0)
    sgd = Hyper(0.1, (0.9,), 0.0, 5e-4), Hyper(1.0, (0.0,), 0.0, 0.0)
    return sgd if rule.families == ("sgd",) else adam


def _close(a: Hyper, b: Hyper) -> bool:
    """To a relative 1e-9; 1 - beta also to 1e-12, because beta itself is rounded to 1e-15 and kappa magnifies that."""
    betas = (math.isclose(1 - x, 1 - y, rel_tol=1e-9, abs_tol=1e-12) for x, y in zip(a.betas, b.betas, strict=True))
    return all(betas) and all(
        math.isclose(x, y, rel_tol=1e-9) for x, y in ((a.lr, b.lr), (a.eps, b.eps), (a.weight_decay, b.weight_decay))
    )
