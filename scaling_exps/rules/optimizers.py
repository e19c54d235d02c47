"""The one table of optimizers: what each is to a rule, what a recipe calls its numbers, where torch keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from scaling_exps.rules.move import Family, RuleError


@dataclass(frozen=True)
class Optimizer:
    """One kind of optimizer.

    Args:
        name: what the user types after `optimizer=`, where it is trainable.
        what: what it is, in a few words.
        family: what kind of step it takes.
        betas: the recipe's names of `Hyper.betas`, in order; None stands for 0.0, "no moving average".
        match, best: its default rule by goal; None where no rule is known.
        decoupled: weight decay shrinks the weights by lr * decay a step, outside the gradient (the recipe's
            `decoupled_decay`); else it is L2, inside the gradient (`l2`).
        classes: class names of live optimizers of this kind.
        field: the key of a parameter group that holds the betas.
        moments: state names of averages of the gradient that start at 0 and are corrected for it.
        second_moments: state names of averages of its square, and of their maximum.
        trainable: scalerun trains with it; the others serve `scaling_exps.scale`.
    """

    name: str
    what: str
    family: Family
    betas: tuple[str | None, ...]
    match: str | None
    best: str | None
    classes: tuple[str, ...]
    decoupled: bool = False
    field: str = "betas"
    moments: tuple[str, ...] = ()
    second_moments: tuple[str, ...] = ()
    trainable: bool = True

    def default(self, goal: Literal["match", "best"]) -> str:
        """The rule that answers `goal` for this optimizer, where the user names none.

        Raises:
            RuleError: none is known.

        >>> OPTIMIZERS["adamw"].default("match"), OPTIMIZERS["sgd"].default("best")
        ('adamw_sde', 'opt_sgd')
        """
        rule = self.match if goal == "match" else self.best
        if rule is None:
            raise RuleError(f"no rule is known that answers goal={goal} for {self.name}; name one with rule=")
        return rule


_BETAS = ("beta1", "beta2")
_V = ("exp_avg_sq", "max_exp_avg_sq")
_ADAM = Optimizer(
    "adam", "torch's Adam; decay in the gradient", "adaptive", _BETAS, "sqrt", "opt_sign", ("Adam",),
    moments=("exp_avg",), second_moments=_V,
)  # fmt: skip
_RMSPROP = replace(_ADAM, betas=("beta2",), moments=())
_LION = Optimizer(
    "lion", "Chen et al. 2023", "sign", _BETAS, "lion", "opt_sign", ("Lion",), decoupled=True, trainable=False
)
OPTIMIZERS: dict[str, Optimizer] = {
    o.name: o
    for o in (
        _ADAM,
        replace(
            _ADAM,
            name="adamw",
            what="torch's AdamW; decay outside the gradient",
            match="adamw_sde",
            classes=("AdamW",),
            decoupled=True,
        ),
        replace(  # trained as Adam: a live one is an Adam
            _ADAM,
            name="rmsprop",
            what="RMSprop whose v is corrected for its start: torch's Adam with β1 = 0",
            betas=(None, "beta2"),
            classes=(),
        ),
        replace(
            _ADAM,
            name="invariant_adam",
            what="Adam whose v averages the squares of micro-batch gradients (Wang & Aitchison 2024)",
            family="invariant",
            match="invariant",
            best=None,
            decoupled=True,
            classes=("InvariantAdam",),
            second_moments=("exp_avg_sq",),
        ),
        replace(
            _ADAM,
            name="paper_adam",
            what="the paper's Adam (Def. 2.4): the v of the step before",
            classes=("PaperAdam",),
            moments=("m",),
            second_moments=("v",),
        ),
        replace(
            _RMSPROP,
            name="paper_rmsprop",
            what="the paper's RMSprop (Def. 2.3): the v of the step before, not corrected",
            classes=("PaperRMSprop",),
            field="beta",
            second_moments=("v",),
        ),
        Optimizer("sgd", "torch's SGD", "sgd", ("momentum",), "linear", "opt_sgd", ("SGD",), field="momentum"),
        replace(
            _RMSPROP,
            name="torch_rmsprop",
            what="torch's RMSprop",
            classes=("RMSprop",),
            field="alpha",
            second_moments=("square_avg",),
            trainable=False,
        ),
        _LION,
        replace(
            _LION,
            name="muon",
            what="torch's Muon",
            betas=("momentum",),
            match=None,
            best="muon",
            classes=("Muon",),
            field="momentum",
        ),
    )
}


def of(optimizer: object, group: Mapping[str, Any]) -> Optimizer:
    """The row of a live optimizer, by its class or the first it inherits from that has one.

    `group` is one of its parameter groups: torch's Adam with `decoupled_weight_decay=True` is AdamW. So is
    bitsandbytes' Adam, whose decay is never in the gradient.

    Raises:
        RuleError: no such class in the table, or a Muon that is AdamW for some parameters.

    >>> of(type("Adam", (), {})(), {}).name, of(type("Adam", (), {})(), {"decoupled_weight_decay": True}).name
    ('adam', 'adamw')
    """
    rows = {name: row for row in OPTIMIZERS.values() for name in row.classes}
    known = next((c for c in type(optimizer).__mro__ if c.__name__ in rows), None)
    if known is None:
        raise RuleError(
            f"unknown optimizer class {type(optimizer).__name__}; allowed: {', '.join(rows)} and what inherits from "
            "them. For another, scale its param_groups with a rule named by you; its state is then yours to move"
        )
    row = rows[known.__name__]
    if row.name == "adam" and known.__module__.startswith("bitsandbytes"):
        return OPTIMIZERS["adamw"]
    if row.name == "muon" and "betas" in group:
        raise RuleError(
            f"this is another Muon than torch's ({known.__module__}): it hands parameters to AdamW, which moves "
            "differently, and one learning rate serves both"
        )
    if row.name in ("adam", "adamw") and "decoupled_weight_decay" in group:
        return OPTIMIZERS["adamw" if group["decoupled_weight_decay"] else "adam"]
    return row
