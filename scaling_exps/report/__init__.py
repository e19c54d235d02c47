"""Directories of runs -> verdicts, tables, figures, one page. Reads records and nothing else.

A run is compared with the base run of its own seed: both saw the same examples in the same order, so the seed's luck
cancels in the difference. `runs` reads, `verdict` judges, `pace` tells time against batch, `charts` arranges,
`figures` and `page` draw, `tables` prints, `dashboard` does the same in wandb.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from contextlib import suppress
from pathlib import Path

from scaling_exps.records import RUNS, append_look, looks
from scaling_exps.report import charts, pace, tables
from scaling_exps.report.answer import answer
from scaling_exps.report.judge import judge
from scaling_exps.report.runs import Collection, Missing, ReportError, Run, collect, folder
from scaling_exps.report.verdict import Row, compare, reading
from scaling_exps.words import Parser

__all__ = [
    "Collection",
    "Missing",
    "ReportError",
    "Row",
    "Run",
    "answer",
    "collect",
    "compare",
    "judge",
    "main",
    "reading",
]

FORMS = {"csv": tables.as_csv, "markdown": tables.as_markdown, "latex": tables.as_latex}  # and json


def main(words: list[str]) -> int:
    """`scalerun report WORDS`: print the comparison; as the table, write the page and the figures too.

    Raises:
        ReportError: a folder is missing, no run is finished, a word cannot be read, or the page cannot be written.
    """
    parser = Parser(prog="scalerun report")
    parser.add_argument("dirs", nargs="*", type=Path, default=[RUNS], help="folders of runs (default: runs)")
    forms = parser.add_mutually_exclusive_group()
    for name in ("json", *FORMS):
        forms.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"print it as {name}")
    parser.add_argument("--out", default="report", type=Path, help="folder of page and figures (default: report)")
    parser.add_argument("--pdf", action="store_true", help="draw the figures as PDF too")
    parser.add_argument(
        "--margin", action="append", default=[], metavar="METRIC=VALUE", help="instead of those fixed beforehand"
    )
    parser.add_argument("--watch", nargs="?", type=float, const=10, metavar="SECONDS", help="until the sweep ends")
    options = parser.parse_args(words)
    if options.watch is not None and not options.watch > 0:
        raise ReportError(f"--watch {options.watch:g}: give seconds > 0")
    margins = dict(map(_margin, options.margin)) or None
    known: dict[Path, Run] = {}
    while True:
        collection = collect(options.dirs, known)
        unfinished = [m for m in collection.missing if m.state in ("running", "interrupted", "waiting")]
        if not collection.runs and not (options.watch and (unfinished or not collection.missing)):
            where = ", ".join(map(str, options.dirs))
            raise ReportError("\n".join([f"no finished run under {where}", *map(str, collection.missing)]))
        more = bool(options.watch) and (bool(unfinished) or not collection.runs)
        rows = compare(collection, margins)
        first = answer(rows, _looked(rows))
        if options.form == "json":
            print(tables.as_json(rows, collection.missing, first))
        elif options.form:
            print(FORMS[options.form](rows, first))
        else:
            with folder(options.out):
                if options.watch and sys.stdout.isatty():
                    print("\033[2J\033[H", end="")
                tables.say([*first, ""])
                tables.show(rows)
                if margins:
                    tables.say(["the margins were given with --margin, not fixed before the runs: read accordingly"])
                tables.say([*reading(rows), *pace.paragraphs(rows)])
                _draw(rows, collection.missing, options, more, first)
        for absent in collection.missing:
            print(f"not in the table: {absent}", file=sys.stderr)
        if not more:
            return 0
        sys.stdout.flush()
        time.sleep(options.watch)


def _draw(rows: list[Row], missing: list[Missing], options: argparse.Namespace, more: bool, first: list[str]) -> None:
    from scaling_exps.report import figures, page

    drawn, refresh = charts.arrange(rows), max(1, round(options.watch)) if more else None
    print(f"page: {page.write(rows, missing, drawn, options.out, refresh, bool(options.margin), first)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures beside the page: to have them as PNG or PDF, pip install 'scalerun[figures]'")
        return
    for file in figures.draw(drawn, options.out, ("png", "pdf") if options.pdf else ("png",)):
        print(f"figure: {file}")


def _looked(rows: list[Row]) -> dict[str, set[int]]:
    """At how many seeds verdicts of each arm were shown before; what is shown now is noted beside its runs."""
    before: dict[str, set[int]] = {}
    for root in {run.path.parent for row in rows for run in row.runs}:
        for look in looks(root):
            if isinstance(look.get("arm"), str) and isinstance(look.get("seeds"), int):
                before.setdefault(look["arm"], set()).add(look["seeds"])
    for row in rows:
        if row.shown and row.role != "base" and row.shown not in before.get(row.key, set()):
            for root in {run.path.parent for run in row.runs}:
                with suppress(OSError):  # a folder that cannot be written: the report is shown all the same
                    append_look(root, {"arm": row.key, "rule": row.rule, "batch": row.batch, "seeds": row.shown})
    return before


def _margin(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ReportError(f"--margin {word!r}: give METRIC=VALUE, for example train_loss=0.05") from None
