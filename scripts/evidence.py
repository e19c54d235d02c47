"""Write docs/evidence/experiments.md and the summary in README.md from the runs of the laptop experiments.

    python scripts/evidence.py RUNS

RUNS holds a folder of runs for each experiment, named after it (`scalerun experiment=NAME runs_dir=RUNS/NAME`). Every
number comes from `scalerun report`'s own comparison of these folders. Text outside the marks `<!-- evidence: begin -->`
and `<!-- evidence: end -->` is kept: what people wrote stays, what was measured is replaced.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from scaling_exps import report
from scaling_exps.report import charts, figures, tables
from scaling_exps.report.verdict import METRICS, Row, Test

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- evidence: begin -->", "<!-- evidence: end -->")
CLAIMS = {  # of the paper, by the name that an experiment begins with; see the head of its file
    "fig1_ablations": "Fig. 1, ablations: leaving out a part of the rule is worse (recalled, not read)",
    "fig1_eps": "Fig. 1 with ε = 1e-30: ε plays no part at 1e-8",
    "fig1": "Fig. 1: CIFAR-10, test accuracy at B = 256 and 8,192 within 3%",
    "fig2_imagenet": "Fig. 2: ImageNet, test accuracy across B within 1.5%",
    "fig2_gpt": "Fig. 2: GPT on WikiText-103, final perplexities within 0.5",
    "fig2_roberta": "Fig. 2: RoBERTa on Wikipedia + BookCorpus, final perplexities within 0.5",
    "epsilon": "the rule's ε/√κ is needed where ε matters",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with a folder of runs for each experiment")
    options = parser.parse_args()
    known = [p.stem for p in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]
    order = [n for prefix in CLAIMS for n in known if n.startswith(prefix)]
    names = [n for n in dict.fromkeys(order) if (options.runs / n).is_dir()]
    names.sort(key=lambda n: (not n.startswith("fig1"), not n.startswith("fig2"), n))
    sections, summary = [], ["| claim of the paper | what was run here | result | verdict |", "|---|---|---|---|"]
    for name in names:
        found = report.collect([options.runs / name])
        rows = report.compare(found)
        sections.append(_section(name, rows, [str(m) for m in found.missing]))
        summary += _summary(name, rows)
    _replace(ROOT / "docs" / "evidence" / "experiments.md", "\n\n".join(sections))
    _replace(ROOT / "README.md", "\n".join(summary))
    print(f"{len(names)} experiments: {', '.join(names)}")


def _head(name: str) -> tuple[str, str]:
    """What an experiment's file says that it is, and its command."""
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ") and not line.startswith("# @")]
    command = next(line for line in lines if line.startswith("Command:")).split("Cost:")[0][len("Command:") :].strip()
    title = " ".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("Command:"))])
    return title, command


def _section(name: str, rows: list[Row], missing: list[str]) -> str:
    title, command = _head(name)
    runs = [run for row in rows for run in row.runs]
    results = [run.result for run in {run.path: run for run in runs}.values()]
    commits = sorted({str(r.get("commit"))[:7] for r in results})
    versions = results[0]["versions"]
    shown = [m for m in METRICS if any(m in r.gaps for r in rows)]
    lines = [
        f"## {name}",
        "",
        title,
        "",
        f"`{command}`: {len(results)} runs, {sum(r['seconds'] for r in results) / 60:.0f} minutes of training in all, "
        f"one thread each; Python {versions['python']}, torch {versions['torch']}, commit {', '.join(commits)}.",
        "",
        "| batch | κ | arm | n | verdict | " + " | ".join(_named(m) for m in shown) + " |",
        "|---" * (5 + len(shown)) + "|",
    ]
    for r in rows:
        cells = [tables.level(r, m) if r.role == "base" else _gap(r.gaps.get(m)) for m in shown]
        needed = f", {r.seeds_needed} seeds would decide" if r.seeds_needed else ""
        arm = f"{r.rule} (control)" if r.role == "control" else r.rule
        lines.append(
            f"| {r.batch} | {r.kappa:g} | {arm} | {len(r.seeds)} | {r.verdict}{needed} | " + " | ".join(cells) + " |"
        )
    margins = {t.metric: t.margin for r in rows for t in r.tests if t.margin is not None}
    told = ", ".join(f"{charts.NAMES[m]} {tables.form(m, v, '')}" for m, v in margins.items() if v is not None)
    lines += [
        "",
        f"Base: mean ± sd over seeds; others: mean paired difference [90% interval]. Margin: {told or 'none'}.",
    ]
    lines += ["", *(f"* {line.strip()}" for line in report.reading(rows))]
    lines += _noise(rows)
    lines += [f"* not in the table: {gone}" for gone in missing]
    with tempfile.TemporaryDirectory() as folder:
        drawn = figures.draw([c for c in charts.charts(rows) if c.group == "curves"], Path(folder))
        for i, file in enumerate(drawn):
            target = f"{name}{f'-{i + 1}' if i else ''}.png"
            shutil.copy(file, ROOT / "docs" / "evidence" / target)
            lines += ["", f"![curves of {name}]({target})"]
    return "\n".join(lines)


def _gap(test: Test | None) -> str:
    """As in the printed table, on one line and without its markup."""
    return tables.gap(test).replace("\n", " ").replace("\\[", "[")


def _noise(rows: list[Row]) -> list[str]:
    """Whether the rule's condition held: signal over noise of the runs under test, by their own free records."""
    lines = []
    for r in rows:
        halves: tuple[list[float], list[float]] = ([], [])
        for run in r.runs if r.role == "rule" else ():
            last = run.curve[0][-1]
            for row in run.noise:
                if row.get("method") == "free" and "kappa_r" in row:
                    halves[int(row["clock"] > last / 2)].append(row["kappa_r"])
        if all(halves):
            first, second = (f"{statistics.median(h):.2f}" for h in halves)
            lines.append(
                f"* {r.rule} at batch {r.batch}: signal over noise κr, which the theory wants well below 1, measured "
                f"on the runs themselves: median {first} in the first half of training, {second} in the second"
            )
    return lines


def _named(metric: str) -> str:
    name = charts.NAMES[metric].replace("|", "\\|")
    return name if name.startswith("\\|") else f"Δ {name}"


def _summary(name: str, rows: list[Row]) -> list[str]:
    """A line for each batch at which the rule was tested."""
    claim = next(text for prefix, text in CLAIMS.items() if name.startswith(prefix))
    lines = []
    for r in rows:
        if r.role != "rule":
            continue
        judged = [t for t in r.tests if t.margin is not None]
        told = "; ".join(
            f"{charts.NAMES[t.metric]} {_gap(t)}, margin {tables.form(t.metric, t.margin or 0, '')}" for t in judged
        )
        lost = [c.rule for c in rows if c.role == "control" and c.batch == r.batch and c.verdict == "different"]
        lines.append(
            f"| {claim} | [`{name}`](docs/evidence/experiments.md#{name}): {r.setting}, {r.rule}, κ = {r.kappa:g}, "
            f"{len(r.seeds)} seeds | {told} | **{r.verdict}**; of the controls different: {', '.join(lost) or 'none'} |"
        )
    return lines


def _replace(page: Path, text: str) -> None:
    before, _, rest = page.read_text().partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{page} lacks the marks {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
