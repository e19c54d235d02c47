"""The rules through the plan: goal, beta map, noise scale, duration; what the plan says about them."""

from __future__ import annotations

import pytest

from scaling_exps import config, plan


def rows(*words: str) -> list[dict]:
    return [row for spec in plan.plan(config.compose(["dataset=digits", *words])) for row in plan.describe(spec)]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("optimizer=adam",), "sqrt"),
        (("optimizer=adamw",), "adamw_sde"),
        (("optimizer=sgd",), "linear"),
        (("optimizer=adam", "goal=best", "noise_scale=100"), "opt_sign"),
        (("optimizer=sgd", "goal=best", "noise_scale=100"), "opt_sgd"),
        (("optimizer=sgd", "goal=best", "rule=linear_momentum"), "linear_momentum"),  # a rule that is named wins
    ],
)
def test_goal_chooses_the_rule_and_the_plan_says_which_question_it_answers(words: tuple[str, ...], rule: str) -> None:
    (row,) = rows(*words, "batch=16")
    assert row["rule"] == rule
    goal = "best" if rule.startswith("opt_") else "match"
    assert any(f"answers goal={goal}" in n for n in row["notes"])


def test_numbers_arrive() -> None:
    (row,) = rows("optimizer=sgd", "goal=best", "noise_scale=12", "batch=16")  # base batch 4: (1 + 3) / (1 + 0.75)
    assert row["scaled"]["lr"] == pytest.approx(row["base"]["lr"] * 4 / 1.75)
    (row,) = rows("optimizer=adam", "beta_map=power", "batch=16")
    assert row["scaled"]["betas"] == pytest.approx([b**4 for b in row["base"]["betas"]])
    assert any("β^κ" in n for n in row["notes"])
    (row,) = rows("optimizer=adamw", "rule=completed", "duration=4", "batch=16")  # r = 1: the same, four times as long
    for key in ("lr", "betas", "eps", "weight_decay", "steps"):
        assert row["scaled"][key] == pytest.approx(row["base"][key])
    assert row["scaled"]["samples"] == pytest.approx(4 * row["base"]["samples"])
    (row,) = rows("optimizer=adam", "duration=2")
    assert any("not covered by rule sqrt" in n for n in row["notes"])
