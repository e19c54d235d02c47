"""Directories of runs -> the table arm x batch and its figure. Reads records and nothing else.

A run is compared with the base run of its own seed: both saw the same examples in the same order, so
the seed's luck cancels in the difference.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling_exps import records
from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import read_json, read_records


class ReportError(ValueError):
    """There is nothing to report on; the message says where was looked."""


@dataclass(frozen=True)
class Run:
    spec: RunSpec
    metrics: dict[str, float]
    curve: tuple[np.ndarray, np.ndarray]  # samples, cumulative training loss x samples; both (n,)
    seconds: float


@dataclass(frozen=True)
class Row:
    """One arm at one batch size, over its seeds. Gaps are to the base run of the same seed."""

    setting: str
    rule: str
    batch: int
    kappa: float
    seeds: tuple[int, ...]
    metrics: dict[str, tuple[float, float]]  # name -> mean, standard deviation over seeds
    gaps: dict[str, tuple[float, float]]


METRICS = ("train_loss", "test_loss", "test_accuracy", "weight_norm")


def collect(dirs: list[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs under `dirs`, and a line for each that is not.

    Raises:
        ReportError: a folder is missing, or no run in any of them is finished.
    """
    runs, others = {}, []
    for root in dirs:
        if not root.is_dir():
            raise ReportError(f"no folder {str(root)!r}; give folders of runs (runs_dir, by default ./runs)")
        for run_dir in sorted(p.parent for p in [*root.glob("run.json"), *root.glob("*/run.json")]):
            try:
                spec = records.read_spec(run_dir)
            except PlanError as e:
                others.append(str(e))
                continue
            result, rows = read_json(run_dir / "result.json"), read_records(run_dir)
            train = [r for r in rows if r.get("kind") == "train"]
            if result is None or result.get("status") != "finished" or not train:
                reason = f": {result['reason']}" if result and "reason" in result else ""
                others.append(f"{run_dir.name} is {records.state(run_dir)}{reason}")
                continue
            samples = np.array([0, *(r["samples"] for r in train)])
            total = np.cumsum([0, *(r["loss"] * r["window"] for r in train)])
            runs[spec.run_id] = Run(spec, result["metrics"], (samples, total), result["seconds"])
    if not runs:
        where = ", ".join(map(str, dirs))
        raise ReportError(f"no finished run under {where}" + "".join(f"\n{o}" for o in others))
    return list(runs.values()), others


def trajectory(run: Run, base: Run, bins: int = 50) -> np.ndarray:
    """Mean training loss of `run` and of `base` in bins of equal samples; (2, bins).

    A bin is never finer than the coarser of the two records, and means are exact: differences of the cumulative loss.
    """
    bins = min(bins, len(run.curve[0]) - 1, len(base.curve[0]) - 1)
    end = min(run.curve[0][-1], base.curve[0][-1])
    edges = np.linspace(0, end, bins + 1)
    return np.stack([np.diff(np.interp(edges, *r.curve)) / np.diff(edges) for r in (run, base)])


def table(runs: list[Run]) -> list[Row]:
    """One row for each setting (model, data, optimizer), rule and batch; the base batch is `base`."""
    by_id = {r.spec.run_id: r for r in runs}
    groups: dict[tuple[str, str, int, float], list[tuple[Run, Run | None]]] = defaultdict(list)
    for run in runs:
        s = run.spec.science
        setting = f"{s.model['name']} on {s.dataset['name']}, {s.optimizer}"
        if s.svag > 1:
            setting += f", SVAG ℓ={s.svag}"
        arms = {("base" if a.kappa == 1 else a.rule, a.kappa, a.base_run_id) for a in run.spec.arms}
        for rule, kappa, base_id in sorted(arms):
            groups[setting, rule, s.batch, kappa].append((run, by_id.get(base_id)))
    rows = []
    for (setting, rule, batch, kappa), members in groups.items():
        gaps: dict[str, list[float]] = defaultdict(list)
        for run, base in members:
            if base is None or rule == "base":
                continue
            for name in METRICS:
                gaps[name].append(run.metrics[name] - base.metrics[name])
            both = trajectory(run, base)
            gaps["trajectory"].append(float(np.abs(both[0] - both[1]).mean()))
        values = {name: [run.metrics[name] for run, _ in members] for name in METRICS}
        rows.append(
            Row(
                setting,
                rule,
                batch,
                kappa,
                tuple(sorted(run.spec.science.seed for run, _ in members)),
                {k: _mean_sd(v) for k, v in values.items()},
                {k: _mean_sd(v) for k, v in gaps.items()},
            )
        )
    return sorted(rows, key=lambda r: (r.setting, r.rule != "base", r.batch, r.gaps.get("trajectory", (0,))[0]))


def _mean_sd(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def reading(rows: list[Row]) -> list[str]:
    """What the table says in words, for each setting at its largest batch that has controls."""
    lines = []
    for setting in dict.fromkeys(r.setting for r in rows):
        mine = [r for r in rows if r.setting == setting and r.gaps]
        for batch in sorted({r.batch for r in mine}):
            arms = {r.rule: r for r in mine if r.batch == batch}
            if "sqrt" not in arms or len(arms) < 2:
                continue
            own = arms["sqrt"].gaps["trajectory"][0]
            others = ", ".join(
                f"{name} {row.gaps['trajectory'][0] / max(own, 1e-12):.1f}x"
                for name, row in arms.items()
                if name not in ("sqrt", "linear_scaled")
            )
            text = f"{setting}, batch {batch}: sqrt stays within {own:.4f} of the base's train loss on average"
            lines.append(text + (f"; further off: {others}" if others else ""))
            if "linear_scaled" in arms:
                row = arms["linear_scaled"]
                loss, weights = row.gaps["train_loss"][0], row.gaps["weight_norm"][0]
                sqrt_loss, sqrt_weights = (arms["sqrt"].gaps[k][0] for k in ("train_loss", "weight_norm"))
                lines.append(
                    f"  linear_scaled (lr x κ with betas and eps scaled) isolates the exponent: trajectory gap "
                    f"{row.gaps['trajectory'][0]:.4f} against sqrt's {own:.4f}, final train loss {loss:+.4f} against "
                    f"{sqrt_loss:+.4f}, weight norm {weights:+.2f} against {sqrt_weights:+.2f}: "
                    + (
                        "it is another run, not this one at a larger batch"
                        if abs(weights) > 2 * abs(sqrt_weights)
                        else "here it is not told apart by its weights"
                    )
                )
    return lines


def draw(runs: list[Run], rows: list[Row], out: Path) -> list[Path]:
    """One PNG a setting: training loss against samples by arm (a panel a batch), and the gap by batch and rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    by_id = {r.spec.run_id: r for r in runs}
    files = []
    for number, setting in enumerate(dict.fromkeys(r.setting for r in rows)):
        mine = [r for r in rows if r.setting == setting]
        batches = sorted({r.batch for r in mine if r.rule != "base"})
        rules_here = list(dict.fromkeys(r.rule for r in sorted(mine, key=lambda r: r.rule) if r.rule != "base"))
        colour = {"base": "black", **{name: f"C{i}" for i, name in enumerate(rules_here)}}
        panels = max(1, len(batches)) + 1
        figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.9), constrained_layout=True)
        for axis, batch in zip(axes[:-1], batches or [0], strict=True):
            axis.set_title(f"batch {batch}" if batch else "base")
            for rule in ["base", *rules_here]:
                members = [
                    (r, by_id.get(a.base_run_id, r))
                    for r in runs
                    for a in r.spec.arms
                    if ("base" if a.kappa == 1 else a.rule) == rule
                    and (rule == "base" or r.spec.science.batch == batch)
                    and setting.startswith(f"{r.spec.science.model['name']} on {r.spec.science.dataset['name']}, ")
                ]
                if not members:
                    continue
                curves = np.stack([trajectory(r, b)[0] for r, b in members if trajectory(r, b).shape[1] > 1])
                x = np.linspace(0, members[0][0].curve[0][-1], curves.shape[1] + 1)
                middle, spread = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else 0 * curves[0]
                axis.plot((x[1:] + x[:-1]) / 2, middle, color=colour[rule], label=rule, lw=1.6)
                axis.fill_between(
                    (x[1:] + x[:-1]) / 2, middle - spread, middle + spread, color=colour[rule], alpha=0.15, lw=0
                )
            axis.set(xlabel="samples seen", ylabel="training loss")
            axis.legend(fontsize=8)
        last = axes[-1]
        for rule in rules_here:
            points = [(r.batch, *r.gaps["trajectory"]) for r in mine if r.rule == rule and r.gaps]
            if points:
                batch_axis, gap, spread = zip(*sorted(points), strict=True)
                last.errorbar(
                    batch_axis, gap, np.nan_to_num(spread), marker="o", capsize=3, color=colour[rule], label=rule
                )
        last.set(xscale="log", yscale="log", xlabel="batch", ylabel="mean |train loss - base's| at equal samples")
        last.set_xticks(batches, [str(b) for b in batches])
        last.minorticks_off()
        last.set_title("distance from the base run")
        if rules_here:
            last.legend(fontsize=8)
        figure.suptitle(f"{setting}  (mean ± sd over seeds)")
        path = out / f"loss{number or ''}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        files.append(path)
    return files


def main(dirs: list[Path], out: Path, as_json: bool) -> int:
    """Print the table (or JSON) and draw the figures into `out`."""
    runs, others = collect(dirs)
    rows = table(runs)
    if as_json:
        keys = ("setting", "rule", "batch", "kappa", "seeds", "metrics", "gaps")
        print(json.dumps({"rows": [{k: getattr(r, k) for k in keys} for r in rows], "not_finished": others}, indent=1))
        return 0
    _print(rows)
    for line in reading(rows):
        print(line)
    for line in others:
        print(f"not in the table: {line}", file=sys.stderr)
    for path in draw(runs, rows, out):
        print(f"figure: {path}")
    return 0


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    def cell(pair: tuple[float, float] | None, form: str) -> str:
        if pair is None:
            return ""
        mean, sd = pair
        return format(mean, form) + ("" if math.isnan(sd) else f" ± {format(abs(sd), form.replace('+', ''))}")

    console = Console(width=None if sys.stdout.isatty() else 150)
    for setting in dict.fromkeys(r.setting for r in rows):
        columns = (
            "batch",
            "κ",
            "rule",
            "n",
            "train loss",
            "test loss",
            "accuracy",
            "weight norm",
            "Δ train loss",
            "Δ accuracy",
            "trajectory gap",
        )
        grid = Table(*columns, title=setting)
        for r in rows:
            if r.setting != setting:
                continue
            values: list[Any] = [r.batch, f"{r.kappa:g}", r.rule, len(r.seeds)]
            values += [cell(r.metrics[m], f) for m, f in zip(METRICS, (".4f", ".4f", ".2%", ".2f"), strict=True)]
            values += [
                cell(r.gaps.get(m), f)
                for m, f in (("train_loss", "+.4f"), ("test_accuracy", "+.2%"), ("trajectory", ".4f"))
            ]
            grid.add_row(*map(str, values), style="bold" if r.rule == "base" else None)
        console.print(grid)
