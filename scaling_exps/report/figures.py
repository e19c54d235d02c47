"""Charts -> PNG and PDF files, by matplotlib. One file for each setting and group of charts."""

from __future__ import annotations

import multiprocessing
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from scaling_exps.report.charts import GROUPS, Chart, colours, dash

_DASHES = {"solid": "-", "dot": ":", "dash": "--", "dashdot": "-.", "longdash": (0, (8, 3))}


def draw(charts: list[Chart], out: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Draw every group of charts into `out`, a process a core; returns the files, setting by setting."""
    import matplotlib
    import matplotlib.figure  # before the fork, once

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, setting in enumerate(dict.fromkeys(c.setting for c in charts)):
        for group in GROUPS:
            here = [c for c in charts if (c.setting, c.group) == (setting, group)]
            if here:
                stem = f"{group}-{number + 1}" if number else group
                jobs.append((here, setting, [out / f"{stem}.{f}" for f in formats]))
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1, 8)
    if workers < 2:
        files = [_figure(*job) for job in jobs]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            files = pool.starmap(_figure, jobs, chunksize=1)
    return [path for paths in files for path in paths]


def _figure(charts: list[Chart], setting: str, paths: list[Path]) -> list[Path]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    group = charts[0].group
    across = group in ("curves", "paper")  # a column for each batch or rule, loss and accuracy below each other
    columns = (len(charts) + 1) // 2 if across else min(len(charts), 3)
    rows = 2 if across and len(charts) > 1 else -(-len(charts) // columns)
    figure = Figure(figsize=(4.1 * columns, 3.0 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if across and rows == 2 else False)
    spots = [axes[i % 2][i // 2] for i in range(len(charts))] if across and rows == 2 else list(axes.flat)
    arms = [t.arm for c in charts for t in c.traces]
    palette = colours(arms, [t.batch for c in charts for t in c.traces if t.batch])
    handles: dict[str, Any] = {}
    for i_chart, (axis, chart) in enumerate(zip(spots, charts, strict=False)):
        for i, trace in enumerate(chart.traces):
            colour = palette[trace.arm][0]
            style = {"color": colour, "linestyle": _DASHES[dash(trace.arm)], "lw": 1.5}
            if group == "hyper":  # rules share values: a line under another shows at its sides
                style |= {"lw": 1.5 + 0.9 * (len(chart.traces) - 1 - i)}
            x = (
                [v * 1.025 ** (i - len(chart.traces) / 2) for v in trace.x]
                if trace.points and group != "hyper"
                else trace.x
            )
            (line,) = axis.plot(x, trace.y, marker="o" if trace.points else None, ms=4, **style)
            handles.setdefault(trace.arm, line)
            if trace.low is not None and trace.high is not None:
                if trace.points:
                    axis.vlines(x, trace.low, trace.high, color=colour, lw=1.2)
                else:
                    axis.fill_between(trace.x, trace.low, trace.high, color=colour, alpha=0.15, lw=0)
        if chart.band:
            patch = axis.axhspan(*chart.band, color="#888888", alpha=0.18, lw=0, zorder=0)
            handles.setdefault("counts as equal", patch)  # type: ignore[arg-type]
        axis.set(
            xlabel=chart.x,
            ylabel="" if chart.title == chart.y else chart.y,
            title="" if across and i_chart % 2 else chart.title,
        )
        axis.title.set_fontsize(10)
        if chart.log_x:
            axis.set_xscale("log")
            ticks = sorted({x for t in chart.traces for x in t.x})
            axis.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) < 8 else ticks[:: -(-len(ticks) // 7)]))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(FuncFormatter(_short))
        if chart.log_y:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(10, (1, 2, 5), numticks=8))
            axis.yaxis.set_major_formatter(FuncFormatter(_short))
            axis.yaxis.set_minor_locator(NullLocator())
        if chart.percent:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if group == "gap":
            axis.axhline(0, color="#888888", lw=0.8, zorder=0)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat:
        if axis not in spots[: len(charts)]:
            axis.set_visible(False)
    spread = {"gap": "mean and 90% interval", "hyper": "", "cost": "mean and range", "noise": "first seed"}
    note = spread.get(group, "mean ± sd over seeds")
    width = figure.get_figwidth()
    lines = [GROUPS[group], *textwrap.wrap(setting + (f"  ({note})" if note else ""), int(width * 13))]
    figure.suptitle("\n".join(lines), fontsize=10)  # about 13 letters an inch; 11 with the legend's
    fitting = int(width * 11 / (max(map(len, handles)) + 6))
    figure.legend(
        handles=list(handles.values()), labels=list(handles), loc="outside lower center",
        ncols=max(1, min(len(handles), fitting)), fontsize=9, frameon=False,
    )  # fmt: skip
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not once for each file
    for path in paths:
        figure.savefig(path, dpi=110)
    return paths


def _short(value: float, _: object = None) -> str:
    """17500 -> 17.5k: labels that do not run into each other."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
