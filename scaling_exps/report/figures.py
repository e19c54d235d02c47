"""Charts -> PNG and PDF files, by matplotlib (the extra `figures`). One file for each setting and group of charts."""

from __future__ import annotations

import multiprocessing
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_exps.report.charts import GROUPS, SPREAD, Chart, Style, sections, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES: dict[str, Any] = {"solid": "-", "dot": ":", "dash": "--", "dashdot": "-.", "longdash": (0, (8, 3))}


def draw(charts: list[Chart], out: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Draw every group of charts into `out`, a process a core; returns the files, setting by setting."""
    import matplotlib
    import matplotlib.figure  # before the fork, once

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    jobs, style, settings = [], styles(charts), list(dict.fromkeys(c.setting for c in charts))
    for setting, group, places in sections(charts):
        number = settings.index(setting)
        stem = f"{group}-{number + 1}" if number else group
        jobs.append(([charts[i] for i in places], style, [out / f"{stem}.{f}" for f in formats]))
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1, 8)
    if workers < 2:
        files = [_figure(*job) for job in jobs]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            files = pool.starmap(_figure, jobs, chunksize=1)
    return [path for paths in files for path in paths]


def _figure(charts: list[Chart], style: dict[str, Style], paths: list[Path]) -> list[Path]:
    from matplotlib.figure import Figure

    group = charts[0].group
    across = group in ("curves", "paper") and len(charts) > 1  # a column a batch or rule, loss above accuracy
    columns = (len(charts) + 1) // 2 if across else min(len(charts), 3)
    rows = 2 if across else -(-len(charts) // columns)
    figure = Figure(figsize=(4.1 * columns, 3.0 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if across else False)
    spots = list(axes.T.flat if across else axes.flat)
    handles: dict[str, Any] = {}
    for axis, chart in zip(spots, charts, strict=False):
        handles = _axis(axis, chart, style) | handles
    for axis in spots[1::2] if across else ():
        axis.set_title("")
    for axis in spots[len(charts) :]:
        axis.set_visible(False)
    note = SPREAD.get(group, "mean ± sd over seeds")
    width, setting = figure.get_figwidth(), charts[0].setting
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


def _axis(axis: Axes, chart: Chart, style: dict[str, Style]) -> dict[str, Any]:
    """Draw one chart; returns what goes into the legend."""
    from matplotlib import ticker

    handles: dict[str, Any] = {}
    for trace in chart.traces:
        colour, dash = style[trace.arm].light, _DASHES[style[trace.arm].dash]
        marker = "o" if trace.points else None
        (handles[trace.arm],) = axis.plot(
            trace.x, trace.y, marker=marker, ms=4, color=colour, lw=0.75 * trace.width,
            linestyle="none" if chart.scatter and trace.points else dash,
        )  # fmt: skip
        if trace.x_low is not None and trace.x_high is not None:
            axis.hlines(trace.y, trace.x_low, trace.x_high, color=colour, lw=1.2)
        if trace.low is not None and trace.high is not None:
            if trace.points:
                axis.vlines(trace.x, trace.low, trace.high, color=colour, lw=1.2)
            else:
                axis.fill_between(trace.x, trace.low, trace.high, color=colour, alpha=0.15, lw=0)
    if chart.band:
        handles[chart.band_name] = axis.axhspan(*chart.band, color="#888888", alpha=0.18, lw=0, zorder=0)
    axis.set(xlabel=chart.x, ylabel="" if chart.title == chart.y else chart.y)
    axis.set_title(chart.title, fontsize=10)
    axis.set_xscale("log" if chart.log_x else "linear")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    if chart.ticks:
        places, labels = zip(*chart.ticks, strict=True)
        axis.set_xticks(places, labels)
        if not chart.log_x:  # names of arms
            axis.set_xticks(places, labels, rotation=30, rotation_mode="anchor", ha="right", fontsize=8)
            axis.set_xlim(-0.5, len(places) - 0.5)
    else:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(_short))
    if chart.log_y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(10, (1, 2, 5), numticks=8))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(_short))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    if chart.percent:
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
        if chart.scatter:
            axis.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
    if chart.group == "gap":
        axis.axhline(0, color="#888888", lw=0.8, zorder=0)
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def _short(value: float, _: object = None) -> str:
    """17500 -> 17.5k: labels that do not run into each other."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
