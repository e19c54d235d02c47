"""Figures 3, 4 and 5, drawn as the paper draws them, from folders of runs; with the numbers behind them.

    python scripts/noise_figures.py fig3 RUNS --out DIR    curves at every l over t = k (η/l)²
    python scripts/noise_figures.py fig4 RUNS --out DIR    |∇f|, √(tr Σ/B) through training (fig5 alike)

Prints one line of JSON for each curve; an unfinished run is named, and drawn as far as it has come.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from scaling_exps import records, validity
from scaling_exps.plan import RunSpec

Run = tuple[RunSpec, list[dict[str, Any]]]
TESTS = ("train_loss", "test_loss", "accuracy", "weight_norm", "trace", "gradient_sq")
LABELS = ("train loss", "test loss", "test accuracy", "‖θ‖", "tr Σ", "‖∇f‖²")


def measured(root: Path) -> list[Run]:
    """The runs under `root` that have a full noise record."""
    runs = []
    for path in sorted(root.glob("**/run.json")):
        spec, rows = records.read_spec(path.parent), records.read_records(path.parent)
        if records.state(path.parent) != "finished":
            share = rows[-1]["step"] / spec.science.steps if rows else 0
            print(
                f"unfinished: {path.parent.name} (l={spec.science.svag}, batch={spec.science.batch}) is at {share:.0%}"
            )
        if any(r["kind"] == "noise" and r["method"] == "full" for r in rows):
            runs.append((spec, rows))
    if not runs:
        raise SystemExit(f"no run with a full noise record under {root}: train with measure.noise=full")
    return runs


def test_functions(rows: list[dict[str, Any]]) -> np.ndarray:
    """(marks, 1 + 6): t and the test functions at each full measurement, with the evaluation at the same step."""
    evaluations = {r["step"]: r for r in rows if r["kind"] == "eval"}
    out = []
    for r in rows:
        if r["kind"] == "noise" and r["method"] == "full" and r["step"] in evaluations:
            e = evaluations[r["step"]]
            values = {**r, "test_loss": e["loss"], "accuracy": e["accuracy"]}
            out.append([r["t"], *(values[name] for name in TESTS)])
    return np.array(out)


def fig3(runs: list[Run], out: Path) -> Path:
    """A panel a test function, a curve an l: mean over seeds, and the seeds themselves where there are several."""
    curves: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for spec, rows in runs:
        curves[spec.science.svag][spec.science.seed] = test_functions(rows)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), constrained_layout=True)
    base = curves.get(1, {})
    for ell in sorted(curves):
        colour = f"C{sorted(curves).index(ell)}"
        marks = min(len(one) for one in curves[ell].values())
        if not marks:
            continue
        mean = np.mean([one[:marks] for one in curves[ell].values()], 0)
        for i, (axis, label) in enumerate(zip(axes.flat, LABELS, strict=True)):
            axis.plot(mean[:, 0], mean[:, 1 + i], color=colour, marker="o", ms=3, label=f"ℓ = {ell}")
            if len(curves[ell]) > 1:
                for one in curves[ell].values():
                    axis.plot(one[:, 0], one[:, 1 + i], color=colour, lw=0.6, alpha=0.4)
            axis.set(xlabel="t = k (η/ℓ)²", title=label)
        shared = sorted(set(curves[ell]) & set(base))
        if ell > 1 and shared:
            marks = min(len(c[s]) for s in shared for c in (curves[ell], base))
            gaps = np.stack([curves[ell][s][:marks] - base[s][:marks] for s in shared])[:, :, 1:]
            scale = np.abs(np.stack([base[s][:marks] for s in shared])[:, :, 1:]).mean((0, 1))
            seeds = np.stack([base[s][:marks] for s in sorted(base)])[:, :, 1:]
            spread = np.abs(seeds[0] - seeds[1]).mean(0) if len(seeds) > 1 else np.full(len(TESTS), math.nan)
            for i, name in enumerate(TESTS):
                gap, between = float(np.abs(gaps[:, :, i]).mean()), float(spread[i])
                line = {
                    "l": ell,
                    "test_function": name,
                    "seeds": shared,
                    "marks": marks,
                    "mean_abs_gap_to_l1": round(gap, 5),
                }
                line |= {"relative": round(gap / float(scale[i]), 4)}
                line |= {"mean_abs_gap_between_seeds_of_l1": None if math.isnan(between) else round(between, 5)}
                print(json.dumps(line))
    axes.flat[0].legend()
    s = runs[0][0].science
    figure.suptitle(f"SVAG, {s.model['name']} on {s.dataset['name']}, {s.optimizer}, batch {s.batch}")
    path = out / f"fig3_svag_{s.optimizer}_{s.model['name']}.png"
    figure.savefig(path, dpi=130)
    return path


def noise(runs: list[Run], out: Path, figure_name: str) -> Path:
    """A panel a batch: signal |∇f| (de-biased) and noise √(tr Σ/B) of a step over samples, one style an ε."""
    batches = sorted({spec.science.batch for spec, _ in runs})
    figure, axes = plt.subplots(
        1, len(batches), figsize=(4.2 * len(batches), 3.8), sharey=True, constrained_layout=True
    )
    base_eps = {spec.arms[0].base["eps"] for spec, _ in runs}
    for spec, rows in sorted(runs, key=lambda run: -run[0].arms[0].base["eps"]):
        s, eps = spec.science, spec.arms[0].base["eps"]
        full = [r for r in rows if r["kind"] == "noise" and r["method"] == "full"]
        x = [r["samples"] for r in full]
        signal = [math.sqrt(r["gradient_sq"]) if r["gradient_sq"] > 0 else math.nan for r in full]
        high = [math.sqrt(max(0.0, r["gradient_sq_high"])) for r in full]
        low = [math.sqrt(max(0.0, r["gradient_sq_low"])) for r in full]
        scale = [math.sqrt(r["trace"] / s.batch) for r in full]
        axis = axes.flat[batches.index(s.batch)] if len(batches) > 1 else axes
        style = "-" if eps == max(base_eps) else "--"
        axis.plot(x, scale, "C1" + style, label=f"noise √(tr Σ/B), ε = {eps:g}")
        axis.plot(x, signal, "C0" + style, marker=".", label=f"signal ‖∇f‖, ε = {eps:g}")
        if style == "-":
            axis.fill_between(x, low, high, color="C0", alpha=0.15, lw=0)
        axis.set(title=f"batch {s.batch}", xlabel="samples seen", yscale="log")
        found = validity.assess(rows, s.batch, s.batch)
        line: dict[str, Any] = {"batch": s.batch, "eps": eps, "seed": s.seed, "records": len(full)}
        line["noise_over_signal"] = [
            round(a / b, 2) if b == b else None for a, b in ((scale[0], signal[0]), (scale[-1], signal[-1]))
        ]
        ratios = [a / b for a, b in zip(scale, signal, strict=True) if b == b]
        line |= {"records_with_signal_above_0": len(ratios)}
        line |= {"median_noise_over_signal": round(statistics.median(ratios), 2) if ratios else None}
        line |= {"dominated": None if found is None else round(found.dominated, 3)}
        line |= {"measured": None if found is None else round(found.measured, 3)}
        free = [r for r in rows if r["kind"] == "noise" and r["method"] == "free" and r["enough"]]
        line |= {"free_records_with_enough": len(free)}
        print(json.dumps(line))
    (axes.flat[0] if len(batches) > 1 else axes).legend(fontsize=7)
    s = runs[0][0].science
    figure.suptitle(f"{s.model['name']} ({s.model.get('norm')} norm) on {s.dataset['name']}, {s.optimizer}")
    path = out / f"{figure_name}_noise_{s.optimizer}_{s.model['name']}_{s.model.get('norm')}.png"
    figure.savefig(path, dpi=130)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["fig3", "fig4", "fig5"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("report"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = measured(options.runs)
    path = fig3(runs, options.out) if options.figure == "fig3" else noise(runs, options.out, options.figure)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
