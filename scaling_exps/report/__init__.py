"""Directories of runs -> verdicts, tables, figures, one page. Reads records and nothing else.

A run is compared with the base run of its own seed: both saw the same examples in the same order, so the seed's luck
cancels in the difference. `runs` reads, `verdict` judges, `charts` arranges, `figures` and `page` draw, `tables`
prints, `dashboard` does the same in wandb.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from scaling_exps.report import charts as _charts
from scaling_exps.report import tables
from scaling_exps.report.runs import Collection, Missing, ReportError, Run, collect, make_folder
from scaling_exps.report.verdict import Row, compare, judge, reading

__all__ = ["Collection", "Missing", "ReportError", "Row", "Run", "collect", "compare", "judge", "main", "reading"]


def main(
    dirs: list[Path],
    out: Path,
    form: str = "table",
    margins: list[str] | None = None,
    watch: float | None = None,
    pdf: bool = False,
) -> int:
    """Compare the runs under `dirs`: print the table, write the page and the figures into `out`.

    Args:
        dirs: folders of runs.
        out: folder of the page and the figures, which only `table` writes.
        form: table, json, csv or latex.
        margins: `METRIC=VALUE` words that take the place of the margins fixed before the runs.
        watch: seconds between looks while the sweep runs, or None.
        pdf: also draw each figure as PDF.

    Returns:
        0.

    Raises:
        ReportError: a folder is missing, no run is finished, a margin cannot be read, or `out` cannot be written.
    """
    given = _margins(margins or [])
    known: dict[Path, Run] = {}
    while True:
        found = collect(dirs, known)
        unfinished = [m for m in found.missing if m.state in ("running", "interrupted", "waiting")]
        if not found.runs and not (watch and (unfinished or not found.missing)):
            raise ReportError(_nothing(dirs, found))
        rows = compare(found, given)
        if form == "table":
            make_folder(out)
            if watch and sys.stdout.isatty():
                print("\033[2J\033[H", end="")
            more = bool(watch) and (bool(unfinished) or not found.runs)
            _show(rows, found, out, watch if more else None, pdf, bool(given))
        else:
            print({"json": tables.as_json, "csv": tables.as_csv, "latex": tables.as_latex}[form](rows, found.missing))
        if not watch or (found.runs and not unfinished):
            return 0
        sys.stdout.flush()
        time.sleep(watch)


def _show(rows: list[Row], found: Collection, out: Path, refresh: float | None, pdf: bool, given: bool) -> None:
    from scaling_exps.report import figures, page

    tables.show(rows)
    if given:
        print("the margins were given with --margin, not fixed before the runs: read the verdicts accordingly")
    for line in reading(rows):
        print(line)
    for gone in found.missing:
        print(f"not in the table: {gone}", file=sys.stderr)
    charts = _charts.charts(rows)
    path = page.write(rows, found.missing, charts, out, max(1, round(refresh)) if refresh else None, given)
    print(f"page: {path}")
    for file in figures.draw(charts, out, ("png", "pdf") if pdf else ("png",)):
        print(f"figure: {file}")


def _nothing(dirs: list[Path], found: Collection) -> str:
    where = ", ".join(map(str, dirs))
    return f"no finished run under {where}" + "".join(f"\n{gone}" for gone in found.missing)


def _margins(words: list[str]) -> dict[str, float] | None:
    given: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            raise ReportError(f"--margin {word!r}: give METRIC=VALUE, for example train_loss=0.05") from None
    return given or None
