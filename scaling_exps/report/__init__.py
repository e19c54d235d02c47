"""Directories of runs -> verdicts, tables, figures, one page. Reads records and nothing else.

A run is compared with the base run of its own seed: both saw the same examples in the same order, so the seed's luck
cancels in the difference. `runs` reads, `verdict` judges, `charts` arranges, `figures` and `page` draw, `tables`
prints, `dashboard` does the same in wandb.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

from scaling_exps.report import charts, tables
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
        form: table, json, csv, markdown or latex.
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
        collection = collect(dirs, known)
        missing = collection.missing
        unfinished = [m for m in missing if m.state in ("running", "interrupted", "waiting")]
        if not collection.runs and not (watch and (unfinished or not missing)):
            folders = ", ".join(map(str, dirs))
            raise ReportError("\n".join([f"no finished run under {folders}", *map(str, missing)]))
        rows = compare(collection, given)
        match form:
            case "json":
                print(tables.as_json(rows, missing))
            case "csv":
                print(tables.as_csv(rows))
            case "markdown":
                print(tables.as_markdown(rows))
            case "latex":
                print(tables.as_latex(rows))
            case _:
                make_folder(out)
                if watch and sys.stdout.isatty():
                    print("\033[2J\033[H", end="")
                more = watch if unfinished or not collection.runs else None
                _show(rows, missing, out, more, ("png", "pdf") if pdf else ("png",), bool(given))
        for absent in missing:
            print(f"not in the table: {absent}", file=sys.stderr)
        if not watch or (collection.runs and not unfinished):
            return 0
        sys.stdout.flush()
        time.sleep(watch)


def _show(
    rows: list[Row], missing: list[Missing], out: Path, refresh: float | None, formats: tuple[str, ...], late: bool
) -> None:
    from scaling_exps.report import figures, page

    tables.show(rows)
    if late:
        print("the margins were given with --margin, not fixed before the runs: read the verdicts accordingly")
    for line in reading(rows):
        print(line)
    drawn = charts.arrange(rows)
    print(f"page: {page.write(rows, missing, drawn, out, max(1, round(refresh)) if refresh else None, late)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures beside the page: to draw them as PNG or PDF, pip install 'scalerun[figures]'")
        return
    for file in figures.draw(drawn, out, formats):
        print(f"figure: {file}")


def _margins(words: list[str]) -> dict[str, float] | None:
    given: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            raise ReportError(f"--margin {word!r}: give METRIC=VALUE, for example train_loss=0.05") from None
    return given or None
