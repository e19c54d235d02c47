"""Scaling rules: (base hyperparameters, kappa) -> scaled hyperparameters. Floats only, no torch."""

from scaling_exps.rules.contract import (
    QUESTIONS,
    BetaMap,
    Evidence,
    Family,
    Goal,
    Hyper,
    Move,
    Rule,
    RuleError,
)
from scaling_exps.rules.table import (
    RULES,
    Powers,
    continuous_time,
    find,
    svag,
    svag_weights,
    third_party,
)

__all__ = [
    "QUESTIONS",
    "RULES",
    "BetaMap",
    "Evidence",
    "Family",
    "Goal",
    "Hyper",
    "Move",
    "Powers",
    "Rule",
    "RuleError",
    "continuous_time",
    "find",
    "svag",
    "svag_weights",
    "third_party",
]
