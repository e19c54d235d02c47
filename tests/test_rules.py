"""Rules: the laws by property, the numbers of the sources, optimizers, SVAG, refusals, the page, third parties."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_exps import rules
from scaling_exps.rules import (
    OPTIMIZERS,
    QUESTIONS,
    RULES,
    BetaMap,
    Family,
    Hyper,
    Move,
    Powers,
    Rule,
    RuleError,
    continuous_time,
    find,
    laws,
    optimizers,
    svag,
    svag_weights,
    table,
)
from scaling_exps.rules.document import START, markdown

ROOT = Path(__file__).parent.parent
EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
ADAM = Hyper(1e-3, (0.9, 0.999), 1e-8, 0.1)
SGD = Hyper(0.1, (0.9,), 0.0, 5e-4)
SLOW = Hyper(1e-3, (0.999, 0.9999), 1e-8, 1e-4)  # survives every kappa below

kappas = st.floats(1 / 64, 64)


def move(kappa: float, **others: float | str) -> Move:
    return Move(**{"base_batch": 1, "batch": kappa, **others})  # type: ignore[arg-type]


def approximately(h: Hyper, rel: float = 1e-9) -> Hyper:
    """`==` to it compares each number."""
    return pytest.approx((h.lr, *h.betas, h.eps, h.weight_decay), rel=rel)  # type: ignore[return-value]


def numbers(h: Hyper) -> tuple[float, ...]:
    return (h.lr, *h.betas, h.eps, h.weight_decay)


# --- the laws ---


@st.composite
def cases(draw: st.DrawFn, rule: Rule) -> tuple[Hyper, Move]:
    beta = st.one_of(st.just(0.0), st.floats(0.1, 0.9999))
    n = 1 if rule.families == ("sgd",) else draw(st.sampled_from([1, 2]))
    base = Hyper(
        draw(st.floats(1e-6, 10)),
        tuple(draw(beta) for _ in range(n)),
        draw(st.sampled_from([0.0, 1e-30, 1e-8, 1e-3])),
        draw(st.sampled_from([0.0, 1e-4, 0.1])),
    )
    duration = draw(st.floats(0.1, 10)) if rule.moves_duration else 1.0
    base_batch = draw(st.integers(1, 4096))
    noise_scale, beta_map = draw(st.floats(1, 1e6)), draw(st.sampled_from(get_args(rules.BetaMap)))
    return base, Move(base_batch, base_batch * draw(kappas), duration, noise_scale, beta_map)


@EVERY
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_laws(rule: Rule, data: st.DataObject) -> None:
    """On recipes and moves of every size. Fails for a clipped beta, a power that does not compose, a shared group."""
    base, onward = data.draw(cases(rule))
    other, _ = data.draw(cases(rule))
    laws.identity(rule, base, onward)
    laws.inverse(rule, base, onward)
    laws.in_range(rule, base, onward)
    laws.composition(
        rule, base, onward, data.draw(kappas), data.draw(st.floats(0.2, 5)) if rule.moves_duration else 1.0
    )
    laws.groups_apart(rule, (base, other), onward)


@given(st.floats(0.01, 0.99999), kappas, kappas)
@settings(max_examples=50, deadline=None)
def test_model_average_keeps_its_half_life(rho: float, k1: float, k2: float) -> None:
    for rule in RULES.values():
        assert rule.ema(rho, 1) == rho
        assert rule.ema(rule.ema(rho, k1), k2) == pytest.approx(rule.ema(rho, k1 * k2), rel=1e-9)
    assert RULES["sqrt"].ema(0.999, 8) == pytest.approx(0.999**8)
    assert RULES["none"].ema(0.999, 8) == 0.999


@given(kappas)
def test_sqrt_keeps_the_sdes_constants(kappa: float) -> None:
    """sigma0 = sigma eta, eps0 = eps eta, c_i = (1 - beta_i)/eta^2 (section 4), with sigma -> sigma/sqrt(kappa)."""
    new = RULES["sqrt"].scale(SLOW, move(kappa))
    assert math.isclose(new.lr / math.sqrt(kappa), SLOW.lr, rel_tol=1e-9)
    assert math.isclose(new.eps * new.lr, SLOW.eps * SLOW.lr, rel_tol=1e-9)
    for x, y in zip(new.betas, SLOW.betas, strict=True):
        assert math.isclose((1 - x) / new.lr**2, (1 - y) / SLOW.lr**2, rel_tol=1e-7)


# --- the numbers ---

# What the sources' formulas give, worked out by hand: (rule, base, kappa, extra, expected).
NUMBERS = [
    ("sqrt", ADAM, 4, {}, Hyper(2e-3, (0.6, 0.996), 5e-9, 0.1)),
    ("sqrt", ADAM, 4, {"beta_map": "power"}, Hyper(2e-3, (0.6561, 0.999**4), 5e-9, 0.1)),
    ("sqrt", Hyper(1e-3, (0.999,), 1e-8, 0), 100, {}, Hyper(1e-2, (0.9,), 1e-9, 0)),  # the paper's RMSprop
    ("sqrt", Hyper(1e-3, (0.0, 0.99), 1e-8, 0), 4, {}, Hyper(2e-3, (0.0, 0.96), 5e-9, 0)),  # beta1 = 0 is no average
    ("linear", SGD, 8, {}, Hyper(0.8, (0.9,), 0.0, 5e-4)),
    ("lr_only", ADAM, 4, {}, replace(ADAM, lr=2e-3)),
    ("none", ADAM, 4, {}, ADAM),
    ("sqrt_without_betas", ADAM, 4, {}, Hyper(2e-3, (0.9, 0.999), 5e-9, 0.1)),
    ("sqrt_without_beta1", ADAM, 4, {}, Hyper(2e-3, (0.9, 0.996), 5e-9, 0.1)),
    ("sqrt_without_eps", ADAM, 4, {}, Hyper(2e-3, (0.6, 0.996), 1e-8, 0.1)),
    ("linear_scaled", ADAM, 4, {}, Hyper(4e-3, (0.6, 0.996), 5e-9, 0.1)),
    ("linear_momentum", SGD, 4, {}, Hyper(1.6, (0.6,), 0.0, 5e-4)),  # kappa^2
    ("linear_momentum", replace(SGD, betas=(0.0,)), 4, {}, Hyper(0.4, (0.0,), 0.0, 5e-4)),  # plain SGD: linear
    ("invariant", ADAM, 4, {}, Hyper(4e-3, (0.6, 0.996), 1e-8, 0.1)),
    ("adamw_sde", ADAM, 4, {}, Hyper(2e-3, (0.6, 0.996), 5e-9, 0.2)),
    ("adamw_timescale", ADAM, 4, {"duration": 2.0}, replace(ADAM, weight_decay=0.2)),
    ("completed", ADAM, 4, {}, Hyper(2e-3, (0.6, 0.996), 5e-9, 0.2)),  # equals adamw_sde at the same budget
    ("completed", ADAM, 8, {"duration": 2.0}, Hyper(2e-3, (0.6, 0.996), 5e-9, 0.2)),  # r = 8/2
    ("completed", ADAM, 4, {"duration": 4.0}, ADAM),  # a budget that grows with the batch: nothing changes
    ("token_halflife", ADAM, 1 / 16, {}, replace(ADAM, betas=(0.9, 0.999 ** (1 / 16)))),
    ("opt_sgd", SGD, 4, {"noise_scale": 3}, replace(SGD, lr=0.1 * 4 / 1.75)),
    ("opt_sign", ADAM, 4, {"noise_scale": 3}, replace(ADAM, lr=1e-3 * math.sqrt(4 / 1.75))),
    ("lion", ADAM, 4, {}, Hyper(2e-3, (0.6, 0.996), 1e-8, 0.2)),
    ("muon", Hyper(0.02, (0.95,), 0, 0.1), 4, {}, Hyper(0.04, (0.95,), 0, 0.2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "base", "kappa", "extra", "expected"), NUMBERS)
def test_numbers(name: str, base: Hyper, kappa: float, extra: dict, expected: Hyper) -> None:
    got = RULES[name].scale(base, move(kappa, **extra))
    assert numbers(got) == approximately(expected, 1e-12)


def test_every_rule_has_a_number_and_says_what_it_is() -> None:
    assert set(RULES) == {case[0] for case in NUMBERS}
    for rule in RULES.values():
        laws.check(rule)
    for name in ("lion", "muon"):
        assert "EXPERIMENTAL" in RULES[name].because


def test_decay_per_sample_is_kept_by_the_rules_that_say_so() -> None:
    """eta * lambda / B, AdamW's forgetting per sample; with the budget D too for `completed`."""
    for name, duration in (("adamw_sde", 1), ("adamw_timescale", 1), ("adamw_timescale", 3), ("completed", 3)):
        h = RULES[name].scale(ADAM, move(5, duration=duration))
        assert h.lr * h.weight_decay * duration / 5 == pytest.approx(ADAM.lr * ADAM.weight_decay)


def test_gain_rules_have_the_limits_of_a_noise_scale() -> None:
    small = RULES["opt_sgd"].scale(SGD, Move(1, 4, noise_scale=1e9)).lr / SGD.lr
    large = RULES["opt_sgd"].scale(SGD, Move(1e9, 4e9, noise_scale=1)).lr / SGD.lr
    assert small == pytest.approx(4)  # far below the noise scale: linear
    assert large == pytest.approx(1)  # far above it: nothing to gain


@pytest.mark.parametrize("batch", [8, 64, 1024])
def test_opt_sgd_is_the_best_single_step_on_a_quadratic(batch: int) -> None:
    """E f(theta - lr g) at f = |theta|^2 / 2, g = theta + z / sqrt(B): minimised over lr on a fine grid. H = I, so
    the noise scale is tr Sigma / |G|^2 = 300 / 3."""
    theta, trace, base_batch = (1.0, -1.0, 1.0), 300.0, 16

    def best(b: int) -> float:
        signal = sum(x * x for x in theta)
        grid = [k / 20000 for k in range(1, 20000)]
        return min(grid, key=lambda lr: (1 - lr) ** 2 * signal / 2 + lr**2 * trace / b / 2)

    base = Hyper(best(base_batch), (0.0,), 0.0, 0.0)
    got = RULES["opt_sgd"].scale(base, Move(base_batch, batch, noise_scale=100))
    assert got.lr == pytest.approx(best(batch), rel=1e-3)


def test_refusal_names_the_largest_legal_batch_and_it_is_legal() -> None:
    with pytest.raises(RuleError, match="The largest legal batch is 2559") as e:
        RULES["sqrt"].scale(ADAM, Move(256, 4096))
    assert "beta_map=power" in str(e.value)
    RULES["sqrt"].scale(ADAM, Move(256, 2559))
    with pytest.raises(RuleError):
        RULES["sqrt"].scale(ADAM, Move(256, 2560))
    RULES["sqrt"].scale(ADAM, Move(256, 4096, beta_map="power"))
    with pytest.raises(RuleError, match=r"kappa < 20 \(batch < 5120\), and kappa is 32"):  # the clock is kappa / delta
        RULES["completed"].scale(ADAM, Move(256, 32 * 256, duration=2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RULES["opt_sgd"].scale(SGD, move(2)), "needs noise_scale"),
        (lambda: RULES["sqrt"].scale(ADAM, move(1e5, beta_map="power")), "smaller batch"),  # 0.9^100000 is 0 to a float
        *[(lambda x=x: Move(1, x), f"^batch={x} must be a positive number") for x in (0, -1, math.nan, math.inf)],
        (lambda: Move(0, 2), "base_batch=0 must be a positive number"),
        (lambda: Move(1, 2, duration=-1), "duration"),
        (lambda: Move(1, 2, noise_scale=0), "noise_scale"),
        (lambda: Move(1, 2, beta_map="log"), "linear, power"),
        (lambda: Hyper(0.0, (0.9,), 1e-8, 0.0), "lr=0.0"),
        (lambda: Hyper(1e-3, (1.0,), 1e-8, 0.0), r"betas=\[1.0\]"),
        (lambda: Hyper(1e-3, (0.9,), -1.0, 0.0), "eps=-1.0"),
        (lambda: Hyper(1e-3, (0.9,), 1e-8, math.nan), "weight_decay=nan"),
        (lambda: svag(ADAM, 0, "adaptive"), "svag=0"),
        (lambda: Powers(name="r", **FIELDS | {"goals": {}}), "goals={}"),
        (lambda: Powers(name="r", **FIELDS | {"goals": {"adam": "match"}}), "adaptive, invariant, sgd, sign"),
        (lambda: Powers(name="r", **FIELDS | {"goals": {"sgd": "fast"}}), "match, best, control"),
        (lambda: OPTIMIZERS["muon"].default("match"), "goal=match for muon"),
        (lambda: optimizers.of(3.0, {}), "unknown optimizer class float; allowed: Adam, AdamW"),
        (lambda: find("sqroot", "adaptive"), "unknown rule"),
        (lambda: find("sqrt", "sgd"), r"not for sgd.*allowed here: linear, lr_only, none, linear_momentum"),
        (lambda: find("adamw_sde", "adaptive", l2=True), "inside the gradient"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        call()


# --- goals and optimizers ---


def test_a_rule_answers_by_family() -> None:
    """Fails if `linear` were called settled for Adam, where it is a control."""
    linear = RULES["linear"]
    assert dict(linear.goals) == {"sgd": "match", "adaptive": "control", "invariant": "control", "sign": "control"}
    assert linear.answers("sgd") == f"rule linear (settled) answers goal=match: {QUESTIONS['match']}"
    for family in ("adaptive", "invariant", "sign"):
        assert linear.answers(family) == f"rule linear is a control for {family} optimizers: {QUESTIONS['control']}"
    assert RULES["completed"].goals["adaptive"] == "best"  # with another budget it is another run


@EVERY
def test_a_rule_is_a_value(rule: Rule) -> None:
    """It can be a key and cannot be changed. Fails if `goals` were the caller's dict."""
    assert {rule: 1}[replace(rule)] == 1
    goals: dict = {"sgd": "best", "adaptive": "control"}
    other = replace(rule, goals=goals)
    goals["sign"] = "best"
    assert other.families == ("sgd", "adaptive") and other != rule
    with pytest.raises(TypeError):
        rule.goals["sgd"] = "best"  # type: ignore[index]


@pytest.mark.parametrize("o", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_default_rules_answer_the_goal_they_stand_for(o: rules.Optimizer) -> None:
    """Fails for a default that answers another goal, is of another family, or scales L2 as if it were decoupled."""
    for goal, name in (("match", o.match), ("best", o.best)):
        if name is not None:
            assert find(name, o.family, l2=not o.decoupled).goals[o.family] == goal
            assert o.default(goal) == name  # type: ignore[arg-type]


def test_the_table_of_optimizers() -> None:
    trainable = [o.name for o in OPTIMIZERS.values() if o.trainable]
    assert trainable == ["adam", "adamw", "rmsprop", "invariant_adam", "paper_adam", "paper_rmsprop", "sgd"]
    assert {o.family for o in OPTIMIZERS.values()} == {*get_args(Family)}
    classes = [c for o in OPTIMIZERS.values() for c in o.classes]
    assert len(classes) == len(set(classes))  # else one class would have two rows
    assert OPTIMIZERS["rmsprop"].betas == (None, "beta2")


# --- SVAG ---


@pytest.mark.parametrize(("family", "stretch"), [("adaptive", 9), ("sgd", 3)])
def test_svag_is_the_rule_scaled_down(family: str, stretch: int) -> None:
    """Section 6: eta/l, (1-beta)/l^2, eps l, l^2 steps; SGD: eta/l, l steps. Weights: mean 1, covariance x stretch."""
    hyper, steps = svag(SLOW, 3, family)  # type: ignore[arg-type]
    assert steps == stretch
    assert math.isclose(hyper.lr, SLOW.lr / 3)
    if family == "adaptive":
        assert numbers(hyper) == approximately(Hyper(SLOW.lr / 3, (1 - 1e-3 / 9, 1 - 1e-4 / 9), 3e-8, 1e-4))
    weights = svag_weights(3, family)  # type: ignore[arg-type]
    assert math.isclose(sum(weights), 1) and math.isclose(sum(r * r for r in weights), stretch)
    t = continuous_time(SLOW, 10, family)  # type: ignore[arg-type]
    assert math.isclose(continuous_time(hyper, 10 * stretch, family), t, rel_tol=1e-12)  # type: ignore[arg-type]


def test_svag_one_is_plain_training() -> None:
    assert svag(SLOW, 1, "adaptive") == (SLOW, 1)
    assert svag_weights(1, "adaptive") == (1.0,)


# --- the page and the doctests ---


def test_page_is_up_to_date() -> None:
    head, _, tables = (ROOT / "docs" / "rules.md").read_text().partition(START)
    assert tables == markdown(list(RULES.values())), "run: python -m scaling_exps.rules.document"
    assert all(f"* `goal={goal}`: {QUESTIONS[goal]}\n" in head for goal in ("match", "best"))


def test_page_s_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = (ROOT / "docs" / "rules.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)
    assert capsys.readouterr().out == "{'lr': 0.002, 'betas': (0.6, 0.96), 'eps': 5e-09}\n"
    assert scope["optimizer"].param_groups[0]["lr"] == pytest.approx(2e-3)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(rules.__path__)])
def test_doctests(name: str) -> None:
    """Of every module, and every function that others call is in one. Fails for a public function without."""
    module = importlib.import_module(f"scaling_exps.rules.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    own = [f for k, f in vars(module).items() if k[0] != "_" and getattr(f, "__module__", "") == module.__name__]
    public = [f for f in own if not isinstance(f, type) and callable(f)]
    calls = "".join(e.source for test in doctest.DocTestFinder().find(module) for e in test.examples)
    assert [f.__name__ for f in public if f"{f.__name__}(" not in calls] == []


# --- third parties ---

FIELDS = {
    "goals": {"adaptive": "match"}, "evidence": "experimental", "because": "a test", "source": "a test",
    "conditions": "none", "leaves_alone": "all else",
}  # fmt: skip


class Wrong(Rule):
    """Breaks a law, by the name of the law."""

    def apply(self, base: Hyper, move: Move) -> Hyper:
        k = move.kappa
        betas = tuple(max(0.5, b - 0.001 * (k - 1)) if self.name == "clips" else b for b in base.betas)
        factor = {"no_identity": 1.01 * k, "no_composition": 1 + math.log(k) ** 2 / 9, "clips": 1.0}[self.name]
        return replace(base, lr=base.lr * factor, betas=betas)

    def formulas(self, beta_map: BetaMap = "linear") -> dict[str, str]:
        return dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "?")


@pytest.mark.parametrize("name", ["no_identity", "no_composition", "clips"])
def test_the_kit_catches_a_wrong_rule(name: str) -> None:
    with pytest.raises(AssertionError, match=name):
        laws.check(Wrong(name=name, **FIELDS))


@dataclass
class _Entry:
    name: str
    loaded: object
    value: str = "package:thing"

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*entries: _Entry) -> None:
        table.third_party.cache_clear()
        monkeypatch.setattr(
            "importlib.metadata.entry_points", lambda group: entries if group == "scalerun.rules" else ()
        )

    mine = Powers(name="cube_root", lr=1 / 3, **FIELDS)
    install(_Entry("a", mine))
    assert find("cube_root", "adaptive") is mine
    laws.check(mine)
    assert mine.formulas()["lr"] == "κ^0.333333·η"
    for entry, message in [
        (_Entry("a", ImportError("no such")), "cannot be loaded: ImportError"),
        (_Entry("a", object()), "must be an instance"),
        (_Entry("a", Powers(name="sqrt", **FIELDS)), "is taken"),
    ]:
        install(entry)
        with pytest.raises(RuleError, match=message):
            find("cube_root", "adaptive")
    table.third_party.cache_clear()


def test_import_costs_nothing() -> None:
    """`import scaling_exps` loads itself and `typing`; the first scaled number no torch, Hydra, numpy either."""
    code = (
        "import sys, typing, __future__; before = set(sys.modules); import scaling_exps;"
        "print(*set(sys.modules) - before);"
        "scaling_exps.scale(lr=1e-3, base_batch=1, batch=2, rule='lr_only'); import scaling_exps.rules.laws;"
        "print(*({'torch', 'hydra', 'omegaconf', 'numpy', 'yaml', 'msgspec'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "scaling_exps\n\n"
