"""Rows and charts -> one HTML file that needs no network: the verdicts, the charts, every run's recipe.

plotly.js is 4.8 MB and a page shall stay under 5 MB with its data, so it travels compressed, 1.5 MB, and the browser
unpacks it (DecompressionStream; every browser since 2023). The HTML is in page.html.j2; Jinja2 escapes every value.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from scaling_exps import __version__, rules
from scaling_exps.report import pace, prediction, tables
from scaling_exps.report.answer import answer
from scaling_exps.report.charts import GROUPS, Chart, sections, styles
from scaling_exps.report.judge import MEANING, METRICS, form
from scaling_exps.report.runs import Missing
from scaling_exps.report.verdict import Row, reading


def write(
    rows: list[Row],
    missing: list[Missing],
    charts: list[Chart],
    out: Path,
    refresh: int | None = None,
    late: bool = False,
    first: list[str] | None = None,
) -> Path:
    """Write `out/index.html`, with relative links to the runs' records; returns its path.

    Args:
        refresh: seconds after which the page loads itself anew (while watching), or None.
        late: the margins were given with the report, not fixed before the runs; the page says so.
        first: the answer; None: that of the rows alone.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "value": _value, "link": lambda path: quote(os.path.relpath(path, out)),
    }  # fmt: skip
    settings = list(dict.fromkeys(r.setting for r in rows))
    page = environment.get_template("page.html.j2").render(
        rows=rows,
        missing=missing,
        refresh=refresh,
        settings=settings,
        run_count=len({run.spec.run_id for row in rows for run in row.runs}),
        verdicts=Counter(
            "equivalent without power" if r.colour == "unproven" else r.verdict for r in rows if r.role == "rule"
        ),
        filters=[
            ("setting", "Model", settings),
            ("rule", "Rule", list(dict.fromkeys(r.rule for r in rows))),
            ("batch", "Batch", sorted({r.batch for r in rows})),
        ],
        metrics=[m for m in tables.metrics(rows) if any(m in r.gaps for r in rows)],
        names=METRICS,
        form=form,
        head=tables.head,
        level=tables.level,
        gap=tables.gap,
        notes=_notes,
        meaning=MEANING,
        judged=any(t.margin is not None for r in rows for t in r.tests),
        late=late,
        level_of_intervals=tables.level_of_intervals(rows),
        answer=answer(rows) if first is None else first,
        displaced=any(r.predicted or r.measured for r in rows),
        displacement=tables.DISPLACEMENT,
        both=prediction.both,
        reading=[*reading(rows), *pace.paragraphs(rows)],
        sections=[
            (setting, group, GROUPS[group], [(i, charts[i]) for i in places])
            for setting, group, places in sections(charts)
        ],
        recipes=[(r, *_recipe(r)) for r in rows if r.runs],
        environments=_environments(rows),
        version=__version__,
        data={
            "charts": [_plain(c) for c in charts],
            "styles": {arm: asdict(style) for arm, style in styles(charts).items()},
        },
        plotly=_plotly(),
    )
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".index.html.{os.getpid()}"
    aside.write_text(page, encoding="utf-8")
    return aside.replace(out / "index.html")


def _plotly() -> str:
    package = importlib.util.find_spec("plotly")
    assert package is not None and package.submodule_search_locations, "plotly is a dependency"
    raw = Path(package.submodule_search_locations[0], "package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def _round(values: Iterable[float] | None) -> list[float | None] | None:
    return None if values is None else [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]


def _plain(chart: Chart) -> dict[str, Any]:
    """The chart as JSON holds it: five digits, null for what is no number."""
    value = asdict(chart)
    value["band"] = _round(chart.band)
    for trace in value["traces"]:
        trace |= {k: _round(trace[k]) for k in ("x", "y", "low", "high", "x_low", "x_high")}
    return value


def _notes(row: Row) -> list[str]:
    """What stands small under a verdict."""
    apart = ", ".join(t.metric.replace("_", " ") for t in row.tests if t.verdict == "different")
    needed = [f"{row.seeds_needed} seeds would decide"] if row.seeds_needed else []
    return [note for note in (f"by {apart}" if apart else "", *needed, row.power, *row.remarks) if note]


def _recipe(row: Row) -> tuple[str, list[tuple[str, Any, Any, str]]]:
    """The rule's source, and of each number: name, at the base, in this run, formula."""
    s, arm = row.runs[0].spec.science, row.arm
    executed = {"batch": s.batch, **asdict(s.hyper), "steps": s.steps}
    try:
        rule = rules.find(arm.rule)
    except rules.RuleError:  # of a package that is not here
        rule = None
    formulas = rule.formulas(arm.beta_map) if rule and arm.kappa != 1 else {}
    if arm.kappa != 1:
        formulas |= {"batch": "κ·B", "steps": "steps/κ"}
    if s.svag > 1:
        formulas = {"steps": f"× {s.stretch}", "lr": f"SVAG ℓ = {s.svag}"}
    source = rule.source if rule and row.role != "base" else ""
    return source, [(k, getattr(arm.base, k), v, formulas.get(k, "")) for k, v in executed.items()]


def _value(value: Any, form: str = ".6g") -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_value(v) for v in value) + ")"
    return f"{value:,}" if isinstance(value, int) else format(value, form) if isinstance(value, float) else "–"


def _environments(rows: list[Row]) -> Counter[str]:
    """What the runs ran on, and how many runs each."""
    counts: Counter[str] = Counter()
    for run in {r.spec.run_id: r for row in rows for r in row.runs}.values():
        versions = run.result.get("versions")
        listed = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "no versions"
        machine = f"{run.result.get('device', 'unknown device')}, world size {run.result.get('world_size', '?')}"
        counts[f"{machine}; {listed}; commit {run.result.get('commit', 'unknown')}"] += 1
    return counts
