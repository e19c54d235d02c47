"""Scaling rules: (base hyperparameters, a move) -> scaled hyperparameters. Floats only, no torch.

`rules.scale` is for people who keep their own trainer, `rules.laws` the test-kit for rules of other packages.
"""

from scaling_exps.rules.move import BetaMap, Clip, Evidence, Family, Goal, Hyper, Move, RuleError, spelled
from scaling_exps.rules.optimizers import OPTIMIZERS, Optimizer
from scaling_exps.rules.rule import CLIP_KEPT, QUESTIONS, Rule
from scaling_exps.rules.table import RULES, Powers, continuous_time, find, svag, svag_weights, third_party

__all__ = [
    "CLIP_KEPT", "OPTIMIZERS", "QUESTIONS", "RULES", "BetaMap", "Clip", "Evidence", "Family", "Goal", "Hyper", "Move",
    "Optimizer", "Powers", "Rule", "RuleError", "continuous_time", "find", "spelled", "svag", "svag_weights",
    "third_party",
]  # fmt: skip
