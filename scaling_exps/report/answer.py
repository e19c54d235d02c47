"""The first line of a report: up to which batch it is the same run, under which rule, at which margin.

An arm counts as safe where it is equivalent, a control beside it was told apart (power), and every tested batch
between it and the base is equivalent, too. Between, no control need be told apart: the smaller κ, the less it strays.
Then the next batch is named and how it fared, and that nothing between was run.
"""

from __future__ import annotations

import itertools

from scaling_exps.report.judge import METRICS, form
from scaling_exps.report.verdict import Row

INFLATION = "the 5% of error become up to 10%"  # measured with two looks more: docs/comparison.md


def answer(rows: list[Row], looked: dict[str, set[int]] | None = None) -> list[str]:
    """A sentence for each setting and rule under test; then, where it was so, on looks that were not declared.

    Args:
        looked: of each arm (`Row.key`) the numbers of seeds at which a verdict was printed before.
    """
    lines: list[str] = []
    settings = list(dict.fromkeys(r.setting for r in rows))
    for setting in settings:
        members = [r for r in rows if r.setting == setting]
        tested = [r for r in members if r.role == "rule" and r.svag == 1]
        said = [
            _of_rule([r for r in tested if r.rule == rule], members)
            for rule in dict.fromkeys(r.rule for r in tested if not r.ramp)
        ]
        said += [_of_ramp(r) for r in tested if r.ramp]
        if not said and any(r.svag > 1 and r.runs for r in members):
            lines.append("No rule was under test here: how far SVAG's curves lie apart stands below the table.")
            continue
        if not said and any(r.role != "base" for r in members):
            said = ["No rule was under test here: " + _fates([r for r in members if r.role != "base"]) + "."]
        if not said:
            said = ["There is nothing to compare: only base runs have finished. Add batches, batch=[BASE,LARGER]."]
        if not any(t.margin is not None for r in members for t in r.tests) and any(r.tests for r in members):
            said = [_unjudged(members)]
        lines += [f"{setting}: {line}" if len(settings) > 1 else line for line in said]
        lines += _looks(members, looked or {})
    return lines


def _of_rule(arms: list[Row], members: list[Row]) -> str:
    """The sentence on one rule; `arms` are its rows, `members` all of the setting."""
    rule, base = arms[0].rule, next((r.arm.base.batch for r in arms if r.runs), None)
    upward = sorted((r for r in arms if r.kappa > 1), key=lambda r: r.batch)
    others = [r for r in arms if r not in upward]
    safe = largest_safe(upward)
    beyond = upward[upward.index(safe) + 1 :] if safe else upward
    if safe:
        margins, seeds = _margins(safe), safe.gaps[_leading(safe)].n
        parts = [f"Safe up to batch {safe.batch:,} (κ = {safe.kappa:g}) under {rule}, at {margins}, {seeds} seeds"]
        before = safe.batch
    else:
        known = f" {base:,}" if base else ""
        parts = [
            f"Not shown safe beyond the base batch{known} under {rule}"
            + (f", at {m}" if (m := _margins(arms[0])) else "")
        ]
        before = base or 0
    for i, row in enumerate(beyond):
        parts.append(f"{row.batch:,} {_fate(row)}")
        if i == 0 and before and row.batch > 2 * before:
            parts.append("nothing between was run")
    if safe and not beyond:
        parts.append("nothing larger was run")
    parts += [f"batch {row.batch:,} (κ = {row.kappa:g}) {_fate(row)}" for row in others]
    return "; ".join(parts) + "."


def _of_ramp(row: Row) -> str:
    """The sentence on a ramp under a rule: whether it is the same run, and how many steps it saves."""
    fate = "Safe" if row.verdict == "equivalent" and not row.powerless else "Not shown safe"
    parts = [f"{fate}: {row.rule}" + (f", at {m}" if (m := _margins(row)) else "")]
    if row.runs:
        steps, base = row.runs[0].spec.science.steps, row.arm.base.steps * row.arm.duration
        parts[0] += f", {row.gaps[_leading(row)].n} seeds" if row.gaps else ""
        parts.append(f"{abs(1 - steps / base):.0%} {'fewer' if steps < base else 'more'} than the base's {base:,.0f}")
    return "; ".join([*parts, *([] if fate == "Safe" else [f"it {_fate(row)}"])]) + "."


def largest_safe(arms: list[Row]) -> Row | None:
    """Of the arms of one rule: the last that is equivalent with power, all between it and the base being equivalent."""
    upward = sorted((r for r in arms if r.kappa > 1), key=lambda r: r.batch)
    held = list(itertools.takewhile(lambda r: r.verdict == "equivalent", upward))
    return next((r for r in reversed(held) if not r.powerless), None)


def _fate(row: Row) -> str:
    if row.verdict == "equivalent":
        if row.powerless:
            return (
                "is within the margins without power ("
                + row.power.removeprefix("no power: ")
                + "), which shows nothing"
            )
        return "is equivalent"
    if row.verdict == "different":
        return "is not"
    if row.verdict == "inconclusive":
        return "is undecided" + (f" ({row.seeds_needed} seeds would decide)" if row.seeds_needed else "")
    return f"has {row.verdict}" if row.verdict.startswith("no ") else f"has {row.verdict} ({len(row.seeds)})"


def _fates(rows: list[Row]) -> str:
    return ", ".join(f"{r.rule!r} at {r.batch:,} {_fate(r)}" for r in rows)


def _leading(row: Row) -> str:
    """The metric that stands for the arm: the first with a margin, or else the first that was measured."""
    judged = [t.metric for t in row.tests if t.margin is not None]
    measured = [t.metric for t in row.tests if t.n]
    return min(judged or measured, key=list(METRICS).index, default="")


def _margins(row: Row) -> str:
    judged = sorted((t for t in row.tests if t.margin is not None), key=lambda t: list(METRICS).index(t.metric))
    if not judged:
        return ""
    first, margin = judged[0], judged[0].margin or 0.0
    size = f"{100 * margin:g}%" if first.metric == "test_accuracy" else f"{margin:g}"
    more = f" and {len(judged) - 1} more margin{'s' * (len(judged) > 2)}" if len(judged) > 1 else ""
    name = "accuracy" if first.metric == "test_accuracy" else METRICS[first.metric]
    return f"±{size} {name}{more}"


def _unjudged(members: list[Row]) -> str:
    """What to add, and the arms by the size of their effect."""
    arms = [r for r in members if r.role != "base" and any(t.n for t in r.tests)]
    metric = min((t.metric for r in arms for t in r.tests if t.n), key=list(METRICS).index, default="train_loss")
    tests = [(r, t) for r in arms if (t := r.gaps.get(metric)) and t.n]
    ranked = sorted(tests, key=lambda pair: abs(pair[1].difference))
    effects = "; ".join(
        f"{r.rule} at {r.batch:,} {form(metric, t.difference)} [{form(metric, t.low)}, {form(metric, t.high)}]"
        for r, t in ranked
    )
    example = f"{metric}={'0.01' if metric == 'test_accuracy' else '0.05'}"
    return (
        f"No margin was fixed, so nothing is judged: add margin=auto or margin.{example} to the sweep before it starts "
        f"(or judge afterwards: scalerun report --margin {example}). Arms by their effect on {METRICS[metric]}, the "
        f"smallest first: {effects}."
    )


def _looks(members: list[Row], looked: dict[str, set[int]]) -> list[str]:
    """What looks that were not declared do to the error, of the arms of a setting together."""
    seen: set[int] = set()
    declared: tuple[int, ...] = ()
    for row in (r for r in members if r.role == "rule" and r.shown):  # a control's number of seeds is not at stake
        declared = row.looks or declared
        at = looked.get(row.key, set()) | {row.shown}
        seen |= at - set(row.looks) if row.looks else at if len(at) > 1 else set()
    if not seen:
        return []
    counts = ", ".join(map(str, sorted(seen)))
    if declared:
        which = ", ".join(map(str, declared))
        return [f"Looked at with {counts} seeds, and the looks that were declared are {which}: {INFLATION}."]
    return [
        f"Looked at with {counts} seeds, and no looks were declared: {INFLATION}. Declare them before a sweep, "
        f"looks=[{','.join(map(str, sorted(seen)))}], and each is tested at its share of the 5%."
    ]
