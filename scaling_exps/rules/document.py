"""`python -m scaling_exps.rules.document` writes the second half of docs/rules.md, out of the rules themselves."""

from __future__ import annotations

from pathlib import Path

from scaling_exps.rules.move import Goal, Hyper, Move, RuleError
from scaling_exps.rules.optimizers import OPTIMIZERS
from scaling_exps.rules.rule import QUESTIONS, Rule
from scaling_exps.rules.table import RULES

START = "<!-- From here on written by `python -m scaling_exps.rules.document`; a test keeps it so. -->\n\n"
_IN_NUMBERS = """
The same in numbers, κ = 4 (B0 = 256, B_n = 1024) from η = 0.001, β = (0.9, 0.999), ε = 1e-8, λ = 0.1;
SGD from η = 0.1, μ = 0.9, λ = 0.0005:

| rule | η' | β' or μ' | ε' | λ' |
|---|---|---|---|---|"""


def markdown(rules: list[Rule]) -> str:
    """The table of optimizers and their default rules; the tables and sections of these rules.

    >>> "For adaptive, invariant, sign optimizers it answers `control`" in markdown([RULES["linear"]])
    True
    """
    out = ["| optimizer | what it is | family | `goal=match` | `goal=best` |\n|---|---|---|---|---|"]
    for o in OPTIMIZERS.values():
        name = f"`{o.name}`" if o.trainable else f"{o.name}, for `scale` and `convert` alone"
        chosen = [f"`{rule}`" if rule else "none known" for rule in (o.match, o.best)]
        out.append(f"| {' | '.join((name, o.what, o.family, *chosen))} |")
    out += ["", "A rule whose name begins with `opt_` needs a measured B_n: `noise_scale=`.\n"]
    out += ["| rule | η' | β' | ε' | λ' | answers | evidence |\n|---|---|---|---|---|---|---|"]
    for r in rules:
        f = r.formulas()
        goals = "; ".join(f"{goal} ({families})" for goal, families in _goals(r).items())
        cells = (f"[{r.name}](#{r.name})", f["lr"], f["betas"], f["eps"], f["weight_decay"], goals, r.evidence)
        out.append(f"| {' | '.join(cells)} |")
    out += [_IN_NUMBERS, *map(_example, rules), ""]
    for r in rules:
        answers = "\n".join(f"For {f} optimizers it answers `{g}`: {QUESTIONS[g]}\n" for g, f in _goals(r).items())
        out.append(
            f"## {r.name}\n\n{answers}\n* Evidence: **{r.evidence}**. {r.because}\n* Conditions: {r.conditions}\n"
            f"* Leaves alone: {r.leaves_alone}.\n* Source: {r.source}.\n"
        )
    return "\n".join(out).rstrip() + "\n"


def _goals(rule: Rule) -> dict[Goal, str]:
    """The families for which it answers each of its questions, by question."""
    return {g: ", ".join(f for f in rule.families if rule.goals[f] == g) for g in dict.fromkeys(rule.goals.values())}


def _example(rule: Rule) -> str:
    base = Hyper(0.1, (0.9,), 0.0, 5e-4) if rule.families == ("sgd",) else Hyper(1e-3, (0.9, 0.999), 1e-8, 0.1)
    try:
        h = rule.scale(base, Move(256, 1024, noise_scale=1024))
    except RuleError as e:
        return f"| {rule.name} | refused: {e} | | | |"
    betas = ", ".join(f"{b:.6g}" for b in h.betas)
    return f"| {rule.name} | {h.lr:.4g} | {betas} | {h.eps:.3g} | {h.weight_decay:.4g} |"


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "rules.md"
    page.write_text(page.read_text().partition(START)[0] + START + markdown(list(RULES.values())))
