"""Gradient noise: `estimators` with intervals, and its `validity`: what it predicts for the rule at another batch."""
