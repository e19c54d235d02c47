"""Write docs/evidence/claims.md, a summary and a section an experiment, from the records that are kept beside it.

    python scripts/evidence.py               write the page and its figures
    python scripts/evidence.py RUNS NAME     first keep the finished runs of a folder, as docs/evidence/runs/NAME.tar.xz

Tables, readings and figures are those of `scalerun report`; a section begins with the head of the experiment's file.
Text outside the marks `<!-- evidence: begin -->` and `<!-- evidence: end -->` is kept: what people wrote stays, what
was measured is replaced.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from scaling_exps import report
from scaling_exps.config import CONF
from scaling_exps.report import charts, figures, prediction, svag, tables
from scaling_exps.report.judge import METRICS
from scaling_exps.report.verdict import Row

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence"
SHOWN = ("curves", "noise", "svag")  # and the gaps, where there are several batches to draw them against
MARKS = ("<!-- evidence: begin -->", "<!-- evidence: end -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of runs to keep")
    parser.add_argument("name", nargs="?", help="what their section is called")
    o = parser.parse_args()
    if o.runs:
        pack(o.runs, DOCS / "runs" / f"{o.name}.tar.xz")
    everything: list[Row] = []
    sections, summary = [], ["| experiment | what was run here | result | verdict |", "|---|---|---|---|"]
    for archive in sorted((DOCS / "runs").glob("*.tar.xz")):
        name = archive.name.removesuffix(".tar.xz")
        with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as kept:
            kept.extractall(folder, filter="data")
            collection = report.collect([Path(folder)])
        rows = report.compare(collection)
        head = _head(rows)
        sections.append(_section(name, head, rows, collection.missing))
        summary += _summary(name, re.split(r"(?<! al)(?<!Fig)(?<!\.)\. ", head)[0].rstrip("."), rows)
        everything += [replace(r, setting=f"{name}, {r.setting}") for r in rows]
    _replace(DOCS / "claims.md", "\n\n".join(["\n".join(summary), *_over_all(everything), *sections]))
    print(f"{len(sections)} sections")


def pack(runs: Path, archive: Path) -> None:
    """Keep of each finished run what a report reads; the same runs make the same bytes."""
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as kept:
        for result in sorted(runs.glob("*/result.json")):
            for name in ("run.json", "records.jsonl", "result.json"):
                content = (result.parent / name).read_bytes()
                if name == "run.json":  # where data lay on the machine that ran is nobody's business
                    content = json.dumps(json.loads(content) | {"dataset_path": None}, indent=1).encode()
                entry = tarfile.TarInfo(f"{result.parent.name}/{name}")
                entry.size = len(content)
                kept.addfile(entry, io.BytesIO(content))


def _head(rows: list[Row]) -> str:
    """What the file of the experiment says that it is: its comment, up to the command."""
    names = dict.fromkeys(run.spec.experiment for row in rows for run in row.runs if run.spec.experiment)
    texts = []
    for name in names:
        comment = [x[2:] for x in (CONF / "experiment" / f"{name}.yaml").read_text().splitlines() if x[:2] == "# "]
        texts.append(" ".join(x for x in comment if not x.startswith("@")).partition("Command:")[0].strip())
    return " ".join(texts)


def _section(name: str, head: str, rows: list[Row], missing: list[report.Missing]) -> str:
    results = [run.result for run in {run.path: run for row in rows for run in row.runs}.values()]
    commits = ", ".join(sorted({r["commit"][:7] if r.get("commit") else "not recorded" for r in results}))
    made_with = (r.get("versions") or {} for r in results)
    versions = "; ".join(sorted({f"Python {v.get('python')}, torch {v.get('torch')}" for v in made_with}))
    minutes = sum(r["seconds"] for r in results) / 60
    lines = [f"## {name}", head]
    devices = ", ".join(sorted({r["device"] for r in results}))
    lines += [f"{len(results)} runs, {minutes:.0f} minutes of training; {devices}; {versions}; commit {commits}."]
    lines += [tables.as_markdown(rows), "\n".join(f"* {x.strip()}" for x in report.reading(rows))]
    lines += [f"* not in the table: {m}" for m in missing]
    lines += _figures(name, [c for c in charts.arrange(rows) if c.group in SHOWN or (c.group == "gap" and c.log_x)])
    return "\n\n".join(line for line in lines if line)


def _over_all(rows: list[Row]) -> list[str]:
    """How well the noise predicts the displacement, over the arms of all experiments."""
    if not (said := prediction.calibration(rows)):
        return []
    drawn = _figures("all", [c for c in charts.arrange(rows) if c.group == "prediction"])
    return ["## What the noise predicts", *(f"{line}." for line in said), *drawn]


def _figures(name: str, shown: list[charts.Chart]) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        files = figures.draw(shown, Path(scratch))
        for file in files:
            (DOCS / f"{name}-{file.name}").write_bytes(file.read_bytes())
    return [f"![{file.stem} of {name}]({name}-{file.name})" for file in files]


def _summary(name: str, claim: str, rows: list[Row]) -> list[str]:
    """A line for each batch at which a rule was tested, and for each setting at which SVAG was."""
    lines: list[str] = []
    for setting in dict.fromkeys(r.setting for r in rows if r.svag > 1):
        arms = [r for r in rows if r.setting == setting]
        said = [s.partition(", SVAG, ")[2] for s in svag.sentences(arms)]
        apart = [s.partition(":")[0] for s in said if "overlay" not in s]
        ells = ", ".join(str(r.svag) for r in arms)
        what = f"[{name}](#{name}): {setting}, SVAG ℓ = {ells}, n = {len(arms[0].seeds)}"
        told = "" if lines else claim
        close = "**overlay** within the spread over seeds" if said else "too few seeds"
        verdict = f"**apart** in {', '.join(apart)}" if apart else close
        lines.append(f"| {told} | {what} | {'; '.join(s.partition('; seeds')[0] for s in said)} | {verdict} |")
    for r in (r for r in rows if r.role == "rule" and r.svag == 1):
        judged = [t for t in r.tests if t.margin is not None]
        gaps = "; ".join(f"{METRICS[t.metric]} {' '.join(tables.gap(t))}" for t in judged)
        what = f"[{name}](#{name}): {r.setting}, {r.rule}, κ = {r.kappa:g}, n = {len(r.seeds)}"
        beside = [c for c in rows if (c.setting, c.batch, c.ramp, c.role) == (r.setting, r.batch, r.ramp, "control")]
        apart = ", ".join(f"`{c.rule}`" for c in beside if c.verdict == "different") or "no one"
        controls = f"of the controls different: {apart}" if beside else "no control was run"
        gaps = gaps.replace("|", "\\|")
        told = "" if lines else claim  # once an experiment
        lines.append(f"| {told} | {what} | {gaps} | **{r.verdict}**; {controls} |")
    return lines


def _replace(page: Path, text: str) -> None:
    before, _, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise SystemExit(f"{page} lacks the marks {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
