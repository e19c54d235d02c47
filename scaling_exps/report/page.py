"""Rows and charts -> one HTML file that needs no network: the verdicts, the charts, every run's recipe.

plotly.js is 4.8 MB and a page shall stay under 5 MB with its data, so it travels compressed, 1.5 MB, and the browser
unpacks it (DecompressionStream; every browser since 2023).
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib.util
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scaling_exps import __version__, rules
from scaling_exps.report.charts import GROUPS, NAMES, Chart, colours, dash
from scaling_exps.report.runs import Missing
from scaling_exps.report.verdict import ALPHA, Row, reading

_FORMATS = {"test_accuracy": "{:+.2%}", "weight_norm": "{:+.2f}", "perplexity": "{:+.3f}"}


def write(
    rows: list[Row],
    missing: list[Missing],
    charts: list[Chart],
    out: Path,
    refresh: int | None = None,
    late: bool = False,
) -> Path:
    """Write `out/index.html`.

    Args:
        rows, missing, charts: what the page shows.
        out: its folder; links to the runs' records are relative to it.
        refresh: seconds after which the page loads itself anew (while watching), or None.
        late: the margins were given with the report, not fixed before the runs; the page says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    parts = {
        "REFRESH": f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        "SUMMARY": _summary(rows, missing),
        "FILTERS": _filters(rows),
        "VERDICTS": _verdicts(rows),
        "MARGINS": _margins(rows, late),
        "READING": "".join(f"<p>{_e(line)}</p>" for line in reading(rows)),
        "CHARTS": _sections(charts),
        "RECIPES": _recipes(rows, out),
        "MISSING": _missing(missing, out),
        "ENVIRONMENT": _environment(rows),
        "VERSION": _e(__version__),
        "LEVEL": f"{1 - 2 * ALPHA:.0%}",
        "DATA": _json({"charts": [_figure(c) for c in charts], "colours": _palette(charts)}),
        "PLOTLY": _plotly(),
    }
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda m: parts[m[1]], template)
    path = out / "index.html"
    aside = out / f".index.html.{os.getpid()}"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def _plotly() -> str:
    found = importlib.util.find_spec("plotly")
    assert found is not None, "plotly is a dependency"
    assert found.submodule_search_locations
    raw = (Path(next(iter(found.submodule_search_locations))) / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _round(values: Iterable[float] | None) -> list[float | None] | None:
    return None if values is None else [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]


def _figure(chart: Chart) -> dict[str, Any]:
    traces = [
        {
            "arm": t.arm, "batch": t.batch, "dash": dash(t.arm), "points": t.points,
            "x": _round(t.x), "y": _round(t.y), "low": _round(t.low), "high": _round(t.high),
        }
        for t in chart.traces
    ]  # fmt: skip
    kept = {k: v for k, v in asdict(chart).items() if k not in ("traces", "band")}
    return kept | {"traces": traces, "band": _round(chart.band)}


def _palette(charts: list[Chart]) -> dict[str, tuple[str, str]]:
    traces = [t for c in charts for t in c.traces]
    return colours([t.arm for t in traces], [t.batch for t in traces if t.batch])


def _summary(rows: list[Row], missing: list[Missing]) -> str:
    runs = {r.spec.run_id for row in rows for r in row.runs}
    count = Counter(r.verdict for r in rows if r.role == "rule")
    said = ", ".join(f"{n} {verdict}" for verdict, n in count.items()) or "no arm of the rule"
    gone = f" {len(missing)} director{'y' if len(missing) == 1 else 'ies'} not in the comparison." if missing else ""
    return f"<p>{len(runs)} finished run{'s' * (len(runs) != 1)}. Arms of the rule: {_e(said)}.{gone}</p>"


def _filters(rows: list[Row]) -> str:
    """One group of check boxes for each of setting, rule and batch."""
    made = []
    for key, title, values in (
        ("setting", "Model", dict.fromkeys(r.setting for r in rows)),
        ("rule", "Rule", dict.fromkeys(r.rule for r in rows)),
        ("batch", "Batch", sorted({r.batch for r in rows})),
    ):
        boxes = "".join(
            f'<label><input type="checkbox" checked data-filter="{key}" value="{_e(v)}"> '
            + (f'<span class="swatch" data-arm="{_e(v)}"></span>' if key == "rule" else "")
            + f"{_e(v)}</label>"
            for v in values
        )
        made.append(f"<fieldset><legend>{title}</legend>{boxes}</fieldset>")
    return "".join(made)


def _attributes(row: Row) -> str:
    return f'data-setting="{_e(row.setting)}" data-rule="{_e(row.rule)}" data-batch="{row.batch}"'


def _why(power: str) -> str:
    """Of `no power: ...` the reason; of `told apart: a, b` how many were."""
    kind, _, names = power.partition(": ")
    if kind == "no power":
        return names
    count = len(names.split(", "))
    return f"{count} control{'s' * (count > 1)}"


def _head(metric: str) -> str:
    return NAMES[metric] if metric == "trajectory" else f"Δ {NAMES[metric]}"


def _number(metric: str, value: float) -> str:
    return "–" if not math.isfinite(value) else _FORMATS.get(metric, "{:+.4f}").format(value)


def _verdicts(rows: list[Row]) -> str:
    made = []
    shown = [m for m in NAMES if any(m in r.gaps for r in rows)]
    for setting in dict.fromkeys(r.setting for r in rows):
        mine = [r for r in rows if r.setting == setting]
        heads = "".join(f'<th scope="col">{_e(_head(m))}</th>' for m in shown)
        body = []
        for r in mine:
            if r.role == "base":
                cells = "".join(f'<td data-label="{_e(NAMES[m])}">{_level(m, r)}</td>' for m in shown)
            else:
                cells = "".join(f'<td data-label="{_e(_head(m))}">{_cell(r, m)}</td>' for m in shown)
            seeds = f'<div class="small">{r.seeds_needed} seeds would decide</div>' if r.seeds_needed else ""
            by = [NAMES[t.metric] for t in r.tests if t.verdict == "different"] if r.verdict == "different" else []
            seeds += f'<div class="small why">by {_e(", ".join(by))}</div>' if by else ""
            power = "no power" if r.power.startswith("no power") else "yes" if r.power else ""
            title = f'<div class="small why">{_e(_why(r.power))}</div>' if r.power else ""
            remarks = "".join(f'<div class="small why">{_e(x)}</div>' for x in r.remarks)
            body.append(
                f'<tr class="{r.role}" {_attributes(r)}><th scope="row"><span class="swatch" data-arm="{_e(r.rule)}">'
                f"</span>{_e(r.rule)}{' <span class=small>(control)</span>' if r.role == 'control' else ''}</th>"
                f'<td class="arm" data-label="batch">{r.batch}</td><td class="arm" data-label="κ">{r.kappa:g}</td>'
                f'<td class="arm" data-label="seeds">{len(r.seeds)}</td>'
                f'<td class="verdict-cell"><span class="verdict {r.verdict.replace(" ", "-")}">{_e(r.verdict)}</span>'
                f"{seeds}{remarks}</td>"
                f'<td data-label="power"><span class="{power.replace(" ", "-")}">{power}</span>{title}</td>{cells}</tr>'
            )
        made.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="Verdicts, {_e(setting)}" '
            f'data-setting="{_e(setting)}"><table class="verdicts"><caption>{_e(setting)}</caption><thead><tr>'
            f'<th scope="col">arm</th>'
            f'<th scope="col">batch</th><th scope="col">κ</th><th scope="col">n</th><th scope="col">verdict</th>'
            f'<th scope="col">power</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        )
    return "".join(made)


def _margins(rows: list[Row], late: bool) -> str:
    if not any(t.margin is not None for r in rows for t in r.tests):
        return "<b>No margin was fixed for these runs, so nothing is judged.</b>"
    if late:
        return "<b>The margins were given with this report, not fixed before the runs.</b>"
    return "The margins were fixed before the runs, with their experiment."


def _level(metric: str, row: Row) -> str:
    """The base's own value: what the differences below it are differences to."""
    if metric not in row.metrics:
        return ""
    form = _FORMATS.get(metric, "{:.4f}").replace("+", "")
    mean, sd = row.metrics[metric]
    return form.format(mean) + ("" if math.isnan(sd) else f" ± {form.format(sd)}")


def _cell(row: Row, metric: str) -> str:
    test = row.gaps.get(metric)
    if test is None or not test.n:
        return "–"
    text = f"{_number(metric, test.difference)}"
    if math.isfinite(test.low):
        text += f'<div class="small interval">[{_number(metric, test.low)}, {_number(metric, test.high)}]</div>'
    if test.margin is not None:
        margin = _number(metric, test.margin).lstrip("+")
        sign = {"equivalent": "within", "different": "beyond", "inconclusive": "around"}.get(test.verdict, "margin")
        more = f", {test.seeds_needed} seeds" if test.seeds_needed else ""
        text += f'<div class="small">{sign} ±{margin}{more}</div>'
    return text


def _sections(charts: list[Chart]) -> str:
    made = []
    for setting in dict.fromkeys(c.setting for c in charts):
        for group, title in GROUPS.items():
            here = [(i, c) for i, c in enumerate(charts) if (c.setting, c.group) == (setting, group)]
            if not here:
                continue
            boxes = "".join(
                f'<figure data-chart="{i}"{f" data-batch={c.batch}" if c.batch else ""}>'
                f"<figcaption>{_e(c.title)}{'' if c.title == c.y else f' · {_e(c.y)}'}</figcaption>"
                f'<div class="plot" role="img" aria-label="{_e(_spoken(c))}"></div></figure>'
                for i, c in here
            )
            pairs = " pairs" if group in ("curves", "paper") else ""
            made.append(
                f'<section class="charts{pairs}" data-setting="{_e(setting)}"><h3>{_e(title)}</h3>'
                f'<p class="small">{_e(setting)}</p><div class="grid">{boxes}</div></section>'
            )
    return "".join(made)


def _spoken(chart: Chart) -> str:
    """The chart in words, for a reader who does not see it: where each line ends."""
    ends = "; ".join(f"{t.arm} ends at {t.y[-1]:.4g}" for t in chart.traces if t.y)
    return f"{chart.title}: {chart.y} against {chart.x}. {ends}."


def _recipes(rows: list[Row], out: Path) -> str:
    made = []
    for row in rows:
        if not row.runs:
            continue
        spec = row.runs[0].spec
        arm = row.arm
        scaled = {"batch": spec.science.batch, **asdict(spec.science.hyper), "steps": spec.science.steps}
        rule = rules.RULES.get(arm.rule)
        formulas = rule.formulas() if rule and arm.kappa != 1 else {}
        if arm.kappa != 1:
            formulas |= {"batch": "κ·B", "steps": "steps/κ"}
        if spec.science.svag > 1:
            formulas = {"steps": f"× {spec.stretch}", "lr": f"SVAG ℓ = {spec.science.svag}"}
        lines = "".join(
            f'<tr><th scope="row">{k}</th><td>{_e(_value(arm.base.get(k)))}</td><td>→ {_e(_value(v))}</td>'
            f"<td>{_e(formulas.get(k, ''))}</td></tr>"
            for k, v in scaled.items()
        )
        runs = []
        for run in row.runs:
            link = quote(os.path.relpath(run.path, out))
            files = " · ".join(f'<a href="{link}/{f}">{f}</a>' for f in ("run.json", "records.jsonl", "result.json"))
            speed = run.result.get("samples_per_second")
            runs.append(
                f"<tr><td>{run.spec.science.seed}</td><td><code>{_e(run.spec.run_id)}</code></td>"
                f"<td>{_seconds(run.result.get('seconds'))}</td>"
                f"<td>{f'{speed:,.0f}/s' if isinstance(speed, int | float) else '–'}</td><td>{files}</td></tr>"
            )
        notes = "".join(f"<li>{_e(n)}</li>" for n in spec.notes)
        source = f" {_e(rule.source)}." if rule and row.role != "base" else ""
        made.append(
            f"<details {_attributes(row)}><summary>{_e(row.rule)}, batch {row.batch} "
            f'<span class="small">{_e(row.setting)}, {len(row.runs)} run{"s" * (len(row.runs) != 1)}</span></summary>'
            f'<p class="small">κ = {row.kappa:g}.{source}</p><div class="scroll"><table class="recipe"><thead><tr>'
            f'<th scope="col"></th><th scope="col">base</th><th scope="col">this run</th><th scope="col">formula</th>'
            f"</tr></thead><tbody>{lines}</tbody></table></div>{f'<ul class=small>{notes}</ul>' if notes else ''}"
            f'<div class="scroll"><table class="recipe"><thead><tr><th scope="col">seed</th><th scope="col">run</th>'
            f'<th scope="col">time</th><th scope="col">speed</th><th scope="col">records</th></tr></thead>'
            f"<tbody>{''.join(runs)}</tbody></table></div></details>"
        )
    return "".join(made)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_value(v) for v in value) + ")"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else "–"


def _seconds(value: Any) -> str:
    return f"{value:,.1f} s" if isinstance(value, int | float) else "–"


def _missing(missing: list[Missing], out: Path) -> str:
    if not missing:
        return "<p>None: every run that was found is in the comparison.</p>"
    lines = "".join(
        f'<tr><td><a href="{quote(os.path.relpath(m.path, out))}">{_e(m.path.name)}</a></td><td>{_e(m.state)}</td>'
        f"<td>{_e(_described(m))}</td><td>{_e(m.reason)}</td></tr>"
        for m in missing
    )
    return (
        '<div class="scroll"><table class="recipe"><thead><tr><th scope="col">directory</th><th scope="col">state</th>'
        f'<th scope="col">run</th><th scope="col">reason</th></tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _described(gone: Missing) -> str:
    if gone.spec is None or not gone.spec.arms:
        return ""
    s = gone.spec.science
    return f"{s.model['name']}, {gone.spec.arms[0].rule}, batch {s.batch}, seed {s.seed}"


def _environment(rows: list[Row]) -> str:
    """What the runs ran on, each distinct environment once."""
    seen: Counter[str] = Counter()
    for run in {r.spec.run_id: r for row in rows for r in row.runs}.values():
        versions = run.result.get("versions")
        said = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "versions unknown"
        where = f"{run.result.get('device', 'unknown device')}, world size {run.result.get('world_size', '?')}"
        seen[f"{where}; {said}; commit {run.result.get('commit', 'unknown')}"] += 1
    return "<ul>" + "".join(f"<li>{n} runs: {_e(text)}</li>" for text, n in seen.items()) + "</ul>"
