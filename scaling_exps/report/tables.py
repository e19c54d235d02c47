"""Rows -> a coloured table, JSON, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from dataclasses import asdict
from typing import Any

from scaling_exps.report.charts import NAMES
from scaling_exps.report.runs import Missing
from scaling_exps.report.verdict import ALPHA, METRICS, Row, Test

_STYLE = {"equivalent": "green", "different": "red", "base": "bold"}
_SHORT = {"test_accuracy": "accuracy", "train_loss": "train loss", "test_loss": "test loss", "perplexity": "perplexity"}


def form(metric: str, value: float, sign: str = "+") -> str:
    if not math.isfinite(value):
        return "–"
    return format(value, sign + {"test_accuracy": ".2%", "weight_norm": ".2f", "perplexity": ".3f"}.get(metric, ".4f"))


def show(rows: list[Row]) -> None:
    """Print one table for each setting: level of the base, gaps of the arms with their intervals, verdicts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    for setting in dict.fromkeys(r.setting for r in rows):
        mine = [r for r in rows if r.setting == setting]
        shown = [m for m in METRICS if any(m in r.gaps or m in r.metrics for r in mine)]
        heads = ["|Δ train loss|" if m == "trajectory" else f"Δ {_SHORT.get(m, NAMES[m])}" for m in shown]
        grid = Table("batch", "κ", "arm", "n", "verdict", "power", *heads, title=setting, title_justify="left")
        for r in mine:
            style = _STYLE.get(r.verdict, "yellow")
            verdict = f"[{style}]{r.verdict}[/]" + (f", {r.seeds_needed} seeds would decide" if r.seeds_needed else "")
            power = "" if not r.power else "[yellow]no power[/]" if r.power.startswith("no power") else "yes"
            cells = [level(r, m) if r.role == "base" else gap(r.gaps.get(m)) for m in shown]
            arm = escape(r.rule) + (" (control)" if r.role == "control" else "")
            grid.add_row(str(r.batch), f"{r.kappa:g}", arm, str(len(r.seeds)), verdict, power, *cells)
        console.print(grid)
        margins = {t.metric: t.margin for r in mine for t in r.tests if t.margin is not None}
        said = ", ".join(f"{NAMES[m]} {form(m, v, '')}" for m, v in margins.items() if v is not None)
        print(f"  base row: mean ± sd; others: mean difference to the base of that seed [{1 - 2 * ALPHA:.0%} interval]")
        print(f"  margins: {said}" if said else "  no margin was fixed for these runs, so nothing is judged (--margin)")
        for r in mine:
            for remark in r.remarks:
                print(f"  {r.rule}, batch {r.batch}: {remark}")


def level(row: Row, metric: str) -> str:
    if metric not in row.metrics:
        return ""
    mean, sd = row.metrics[metric]
    return form(metric, mean, "") + ("" if math.isnan(sd) else f" ± {form(metric, sd, '')}")


def gap(test: Test | None) -> str:
    if test is None or not test.n:
        return "–"
    text = form(test.metric, test.difference)
    if math.isfinite(test.low):
        text += f"\n\\[{form(test.metric, test.low)}, {form(test.metric, test.high)}]"
    return text


def as_json(rows: list[Row], missing: list[Missing]) -> str:
    """Rows and what is not in them; a number that is none is null."""
    keys = ("setting", "rule", "batch", "kappa", "role", "seeds", "verdict", "seeds_needed", "power", "remarks")
    value = {
        "alpha": ALPHA,
        "rows": [
            {k: getattr(r, k) for k in keys}
            | {"metrics": {k: {"mean": m, "sd": s} for k, (m, s) in r.metrics.items()}}
            | {"gaps": {t.metric: {k: v for k, v in asdict(t).items() if k != "metric"} for t in r.tests}}
            | {"run_ids": [run.spec.run_id for run in r.runs]}
            for r in rows
        ],
        "not_finished": [
            {"run": m.path.name, "path": str(m.path), "state": m.state, "reason": m.reason} for m in missing
        ],
    }
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def as_csv(rows: list[Row], missing: list[Missing]) -> str:
    """One line for each arm, batch and metric; what is missing, at the end, by its directory."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(
        ("setting", "rule", "role", "batch", "kappa", "n", "metric", "mean", "sd", "difference", "low", "high",
         "margin", "metric_verdict", "verdict", "seeds_needed", "power")
    )  # fmt: skip
    for r in rows:
        for metric in [*r.metrics, *(t.metric for t in r.tests if t.metric not in r.metrics)] or [""]:
            mean, sd = r.metrics.get(metric, (math.nan, math.nan))
            t = r.gaps.get(metric)
            tested = (t.difference, t.low, t.high, t.margin, t.verdict) if t else (None,) * 5
            n = t.n if t else len(r.seeds)
            arm = (r.setting, r.rule, r.role, r.batch, r.kappa, n)
            line = (*arm, metric, mean, sd, *tested, r.verdict, r.seeds_needed, r.power)
            out.writerow(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in line])
    for m in missing:
        out.writerow(["", "", "missing", *[""] * 11, m.state, "", str(m)])
    return text.getvalue().rstrip("\n")


def as_latex(rows: list[Row], missing: list[Missing]) -> str:
    """A booktabs table for each setting, and a sentence to paste."""
    del missing
    made = []
    for setting in dict.fromkeys(r.setting for r in rows):
        mine = [r for r in rows if r.setting == setting]
        shown = [m for m in METRICS if any(t.metric == m and t.margin is not None for r in mine for t in r.tests)]
        shown = shown or [m for m in METRICS if any(m in r.gaps for r in mine)]
        head = " & ".join(["arm", "$B$", r"$\kappa$", "$n$", "verdict", *(_tex(NAMES[m], "Δ") for m in shown)])
        lines = []
        for r in mine:
            cells = [_tex_level(r, m) if r.role == "base" else _tex_gap(r.gaps.get(m)) for m in shown]
            lines.append(" & ".join([_tex(r.rule), str(r.batch), f"{r.kappa:g}", str(len(r.seeds)), r.verdict, *cells]))
        margins = {t.metric: t.margin for r in mine for t in r.tests if t.margin is not None}
        said = ", ".join(f"{_tex(NAMES[m])} {_tex(form(m, v, ''))}" for m, v in margins.items() if v is not None)
        made.append(
            f"% {setting}\n\\begin{{tabular}}{{lrrrl{'r' * len(shown)}}}\n\\toprule\n{head} \\\\\n\\midrule\n"
            + " \\\\\n".join(lines)
            + " \\\\\n\\bottomrule\n\\end{tabular}"
        )
        for r in mine:
            if r.role == "rule" and r.tests:
                made.append(
                    f"\\textsf{{{_tex(r.rule)}}} at $B={r.batch}$ ($\\kappa={r.kappa:g}$, $n={len(r.seeds)}$ seeds), "
                    f"against the base run: {r.verdict} (two one-sided paired $t$ tests, $\\alpha={ALPHA:g}$, "
                    f"margins: {said or 'none fixed'})."
                )
    return "\n".join(made)


def _tex(text: str, prefix: str = "") -> str:
    if prefix and not text.startswith("|"):
        text = f"{prefix} {text}"
    special = {
        "\\": r"\textbackslash ",
        "Δ": r"$\Delta$",
        "ℓ": r"$\ell$",
        "|": "$|$",
        **{c: "\\" + c for c in "_%&#{}$"},
    }
    return "".join(special.get(c, c) for c in text)


def _tex_level(row: Row, metric: str) -> str:
    if metric not in row.metrics:
        return ""
    mean, sd = row.metrics[metric]
    return _tex(form(metric, mean, "")) + ("" if math.isnan(sd) else f" $\\pm$ {_tex(form(metric, sd, ''))}")


def _tex_gap(test: Test | None) -> str:
    if test is None or not test.n:
        return "--"
    text = f"${_tex(form(test.metric, test.difference))}$"
    if math.isfinite(test.low):
        text += f" [${_tex(form(test.metric, test.low))}$, ${_tex(form(test.metric, test.high))}$]"
    return text
