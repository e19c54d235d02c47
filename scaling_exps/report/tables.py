"""Rows -> a coloured table, Markdown, LaTeX, JSON, CSV. The first three are forms of one grid."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from scaling_exps.plan.margin import ALPHA, spent
from scaling_exps.report import pace, prediction
from scaling_exps.report.judge import MEANING, METRICS, Test, form
from scaling_exps.report.runs import Missing
from scaling_exps.report.verdict import Row

_STYLE = {"equivalent": "green", "different": "red", "base": "bold"}  # by colour
DISPLACEMENT = "Δ |θ - θ₀| predicted"


@dataclass(frozen=True)
class Grid:
    """The comparison of one setting as text: heads and cells (a cell may have several parts), and what they mean."""

    setting: str
    heads: list[str]
    cells: list[list[tuple[str, ...]]]
    verdicts: list[tuple[str, str]]  # and their colours
    legend: list[str]
    judged: int  # columns, those of metrics with a margin the last of them


FIRST = ("batch", "κ", "arm", "n", "verdict")  # the columns before those of the metrics


def head(metric: str) -> str:
    """Of a column of differences."""
    return METRICS[metric] if metric == "trajectory" else f"Δ {METRICS[metric]}"


def level(row: Row, metric: str) -> str:
    """The row's own value: mean ± standard deviation over seeds."""
    if metric not in row.metrics:
        return ""
    mean, sd = row.metrics[metric]
    return form(metric, mean, "") + ("" if math.isnan(sd) else f" ± {form(metric, sd, '')}")


def gap(test: Test | None) -> tuple[str, ...]:
    """The difference to the base, and its interval where there is one."""
    if test is None or not test.n:
        return ("–",)
    interval = f"[{form(test.metric, test.low)}, {form(test.metric, test.high)}]"
    return form(test.metric, test.difference), *([interval] if math.isfinite(test.low) else [])


def verdict(row: Row) -> tuple[str, ...]:
    """The verdict and what has to stand beside it."""
    needed = [f"{row.seeds_needed} seeds would decide"] if row.seeds_needed else []
    return row.verdict, *needed, *(["no power"] if row.powerless else [])


def metrics(rows: list[Row]) -> list[str]:
    """Those that some row has, the ones with a margin first."""
    held = [m for m in METRICS if any(m in r.gaps or m in r.metrics for r in rows)]
    judged = {t.metric for r in rows for t in r.tests if t.margin is not None}
    return sorted(held, key=lambda m: m not in judged)


def grids(rows: list[Row]) -> Iterator[Grid]:
    """A grid for each setting."""
    for setting in dict.fromkeys(r.setting for r in rows):
        members = [r for r in rows if r.setting == setting]
        shown, displaced = metrics(members), any(r.predicted or r.measured for r in members)
        cells = [
            [
                (str(r.batch),), (f"{r.kappa:g}",), (r.rule, *(["(control)"] if r.role == "control" else [])),
                (str(len(r.seeds)),), verdict(r),
                *((level(r, m),) if r.role == "base" else gap(r.gaps.get(m)) for m in shown),
                *([_moved(r)] if displaced else []),
            ]
            for r in members
        ]  # fmt: skip
        margins = {t.metric: t.margin for r in members for t in r.tests if t.margin is not None}
        fixed = ", ".join(f"{METRICS[m]} {form(m, v, '')}" for m, v in margins.items())
        legend = [
            "base: mean ± sd; others: mean difference to the base of that seed "
            f"[{level_of_intervals(members)} interval]",
            MEANING,
            f"margins: {fixed}" if fixed else "no margin was fixed for these runs, so nothing is judged",
        ]
        if looks := next((r.looks for r in members if r.looks), ()):
            shares = ", ".join(f"{n} ({spent(looks, n) or 0:.3g})" for n in looks)
            legend.append(f"looks were declared at these numbers of seeds, with these shares of alpha: {shares}")
        legend += [f"{r.rule}, batch {r.batch}: {remark}" for r in members for remark in r.remarks]
        heads = [*FIRST, *map(head, shown), *([DISPLACEMENT] if displaced else [])]
        yield Grid(setting, heads, cells, [(r.verdict, r.colour) for r in members], legend, len(FIRST) + len(margins))


def _moved(row: Row) -> tuple[str, ...]:
    if row.role == "base":
        return ("",)
    expected, found = prediction.both(row)
    return expected, f"measured {found}"


def level_of_intervals(rows: list[Row]) -> str:
    """90%, or of several looks what each of them has."""
    levels = sorted({1 - 2 * t.alpha for r in rows for t in r.tests if t.n} or {1 - 2 * ALPHA})
    return " or ".join(f"{100 * level:.3g}%" for level in levels)


def _room() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere and nobody named a width."""
    from shutil import get_terminal_size

    return get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def say(lines: Iterable[str], indent: str = "") -> None:
    """Print lines, broken between words where there is a terminal's width to keep."""
    room = _room()
    for line in lines:
        inner = indent + " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(
            line.strip(), room or 10**9, initial_indent=inner, subsequent_indent=inner + "  ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        print("\n".join(wrapped))


def show(rows: list[Row]) -> None:
    """Print the grids, each with as many metrics as fit into the terminal's width; the displacement is told below."""
    from rich.console import Console

    console = Console(width=_room() or 170, highlight=False)
    for grid in grids(rows):
        widths = _widths(grid, console.width)
        console.print(_table(grid, widths))
        if left_out := [name for name in grid.heads[len(widths) :] if name != DISPLACEMENT]:
            say([f"too narrow for: {', '.join(left_out)} (all are in --csv, --markdown and the page)"], "  ")
        say(grid.legend, "  ")


def _widths(grid: Grid, room: int) -> list[int]:
    """Of as many columns as fit, no interval broken; of the judged ones as many as fit without a cut word."""
    least, whole, most = [], [], []
    for i, name in enumerate(grid.heads):
        if name == DISPLACEMENT:
            break
        parts = [line for cells in grid.cells for part in cells[i] for line in _lines(part)]
        words = [word for part in parts for word in part.split()] if i >= len(FIRST) else parts
        named = max(map(len, name.split()))
        least.append(max(named, *map(len, words)))
        whole.append(max(named, *map(len, parts)))
        most.append(max(len(name), *map(len, parts)))

    def fitting(widths: list[int]) -> int:
        return sum(t + 3 * (i + 1) + 1 <= room for i, t in enumerate(itertools.accumulate(widths)))

    count = max(len(FIRST), fitting(whole), min(grid.judged, fitting(least)))
    widths, spare = least[:count], room - sum(least[:count]) - 3 * count - 1
    for wanted in (whole, most):
        for i in range(count):
            more = max(0, min(spare, wanted[i] - widths[i]))
            widths[i] += more
            spare -= more
    return widths


def _lines(part: str) -> list[str]:
    return part.replace(" seeds would", " seeds\nwould").split("\n")


def _table(grid: Grid, widths: list[int]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=grid.setting, title_justify="left")
    for i, (name, width) in enumerate(zip(grid.heads, widths, strict=False)):
        table.add_column(name, no_wrap=i < len(FIRST), width=width)
    for (verdict_, colour), line in zip(grid.verdicts, grid.cells, strict=True):
        cells = ["\n".join(escape(text) for part in cell for text in _lines(part)) for cell in line[: len(widths)]]
        style = _STYLE.get(colour, "yellow")
        cells[4] = cells[4].replace(verdict_, f"[{style}]{verdict_}[/]", 1)
        table.add_row(*cells)
    return table


def as_markdown(rows: list[Row], first: list[str] | None = None) -> str:
    """A table for each setting, with its legend, after the answer."""
    blocks = [f"**{line}**" for line in first or []]
    for grid in grids(rows):
        lines = [grid.heads, ["---"] * len(grid.heads)]
        lines += [[(" " if i != 4 else ", ").join(cell) for i, cell in enumerate(line)] for line in grid.cells]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        blocks.append("\n".join([f"**{grid.setting}**", "", *table, "", *(f"* {line}" for line in grid.legend)]))
    return "\n\n".join(blocks)


def as_latex(rows: list[Row], first: list[str] | None = None) -> str:
    """A booktabs table for each setting, after the answer as a comment."""
    special = {"\\": r"\textbackslash{}", "Δ": r"$\Delta$", "κ": r"$\kappa$", "ℓ": r"$\ell$", "±": r"$\pm$", "–": "--"}
    special |= {"|": "$|$", "-": "$-$", "[": "{[}"} | {c: "\\" + c for c in "_%&#{}$"}

    def line(cells: list[str]) -> str:
        return " & ".join("".join(special.get(c, c) for c in cell) for cell in cells) + r" \\"

    blocks = [f"% {line}" for line in first or []]
    for grid in grids(rows):
        body = [line([" ".join(cell) for cell in cells]) for cells in grid.cells]
        blocks.append(
            "\n".join(
                [f"% {grid.setting}", *(f"% {note}" for note in grid.legend),
                 rf"\begin{{tabular}}{{rrlrl{'r' * (len(grid.heads) - len(FIRST))}}}", r"\toprule", line(grid.heads),
                 r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
            )
        )  # fmt: skip
    return "\n\n".join(blocks)


def as_json(rows: list[Row], missing: list[Missing], first: list[str] | None = None) -> str:
    """Rows and what is not in them; a number that is none is null."""
    keys = (
        "setting",
        "rule",
        "batch",
        "kappa",
        "role",
        "seeds",
        "verdict",
        "seeds_needed",
        "power",
        "remarks",
        "looks",
    )
    value = {
        "answer": first or [],
        "alpha": ALPHA,
        "calibration": prediction.calibration(rows),
        "time_against_batch": [pace.as_json(members) for members in pace.by_setting(rows)],
        "rows": [
            {k: getattr(r, k) for k in keys}
            | {"metrics": {k: {"mean": m, "sd": s} for k, (m, s) in r.metrics.items()}}
            | {"gaps": {t.metric: {k: v for k, v in asdict(t).items() if k != "metric"} for t in r.tests}}
            | {"displacement": {"predicted": r.predicted and r.predicted.to_json(), "measured": r.measured}}
            | {"run_ids": [run.spec.run_id for run in r.runs]}
            for r in rows
        ],
        "not_finished": [
            {"run": m.path.name, "path": str(m.path), "state": m.state, "reason": m.reason} for m in missing
        ],
    }
    finite = msgspec.json.decode(msgspec.json.encode(value))  # which writes NaN and infinity as null
    return json.dumps(finite, indent=1, allow_nan=False)


def as_csv(rows: list[Row], first: list[str] | None = None) -> str:
    """One line for each arm, batch and metric."""
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
    return text.getvalue().rstrip("\n")
