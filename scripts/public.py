"""Write docs/evidence/public.md: what others tuned and measured, held up against the rules of this project.

    python scripts/public.py [PAGE]

The facts are the tables of docs/evidence/public/, copied from the sources that the page names. All else is computed.
"""

from __future__ import annotations

import argparse
import csv
import math
from itertools import groupby
from pathlib import Path

import numpy as np
from scipy.optimize import curve_fit

from scaling_exps import scale

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence"
# What its compliance checker says of the learning rate (compliance_checker/training_*/closed_*.yaml, same commit).
MANDATED = {
    "deepseekv3_671b": "lr ∝ √B, clip fixed",
    "qwen35_397b_grpo": "lr ∝ √B, clip ∝ 1/√B",
    "llama31_405b": "lr ∝ B, clip fixed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, default=DOCS / "public.md")
    page = parser.parse_args().page
    text = page.read_text()
    for name, lines in (("mlperf", mlperf()), ("marin", marin())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = "\n".join([before + begin, *lines, end + rest.partition(end)[2]])
    page.write_text(text)


def table(name: str) -> list[dict[str, str]]:
    with open(DOCS / "public" / f"{name}.csv") as f:
        return list(csv.DictReader(f))


def mlperf() -> list[str]:
    heads = "benchmark | optimizer | batch | lr is | exponent of lr | lr over the rule's | E last / first | B_crit"
    lines = [_row(heads, "in the noise-dominated range"), _row(*["---"] * 9)]
    for name, group in groupby(table("mlperf"), lambda r: r["benchmark"]):
        points = list(group)
        batch, lr, needed = (np.array([float(p[k]) for p in points]) for k in ("batch", "lr", "to_converge"))
        spread = np.array([max(float(p["sd"]), 1e-3 * float(p["to_converge"])) for p in points])
        kappa = batch[-1] / batch[0]
        slope = float(np.polyfit(np.log(batch), np.log(lr), 1)[0])
        ends = math.log(lr[-1] / lr[0]) / math.log(kappa)
        adaptive = points[0]["optimizer"] != "sgd"
        rule = math.sqrt(kappa) if adaptive else kappa
        critical, low, high = critical_batch(batch, needed, spread)
        where = "within" if batch[-1] < 0.1 * low else "beyond" if batch[-1] > 0.1 * high else "undecided"
        first = "beyond" if batch[0] > 0.1 * high else "within" if batch[0] < 0.1 * low else "undecided"
        bound = f"{critical:,.0f} [{low:,.0f}, {high:,.0f}]" if math.isfinite(high) else "not determined"
        ranges = f"{batch[0]:,.0f} → {batch[-1]:,.0f} (κ = {kappa:.3g})"
        exponents, over = f"{ends:.2f} / {slope:.2f}", f"{lr[-1] / lr[0] / rule:.2f}"
        rise = f"{needed[-1] / needed[0]:.2f}"
        free = MANDATED.get(name, "free")
        lines.append(
            _row(name, points[0]["optimizer"], ranges, free, exponents, over, rise, bound, f"{first}, {where}")
        )
    return lines


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def critical_batch(batch: np.ndarray, needed: np.ndarray, spread: np.ndarray) -> tuple[float, float, float]:
    """B of E = E_min (1 + B/B_crit) (McCandlish et al. 2018, eq. 2.11) with its 95% interval, by weighted fit of logs.

    The interval is of log B_crit, from the scatter about the curve: a benchmark's points were tuned one by one.
    """

    def curve(b: np.ndarray, minimum: float, log_critical: float) -> np.ndarray:
        return np.asarray(minimum + np.log1p(b / np.exp(log_critical)))

    start = (np.log(needed[0]), np.log(batch[-1]))
    if len(batch) < 4:  # two numbers from three points leave no interval
        return math.nan, 0, math.inf
    (_, middle), covariance = curve_fit(curve, batch, np.log(needed), start, sigma=spread / needed)
    half = 1.96 * math.sqrt(covariance[1, 1])
    return float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(min(middle + half, 700)))


def marin() -> list[str]:
    heads = "width", "batch", "best β2 of 5", "the rule says", "nearest cell of the grid: cost", "β2 left alone: cost"
    lines = [_row(*heads), _row(*["---"] * 6)]
    for width, group in groupby(table("marin_beta2"), lambda r: r["width"]):
        rows = {
            b: {float(r["beta2"]): float(r["bpb"]) for r in g} for b, g in groupby(group, lambda r: int(r["batch"]))
        }
        base = min(rows)
        tuned = min(rows[base], key=rows[base].__getitem__)
        for batch, losses in rows.items():
            best = min(losses, key=losses.__getitem__)
            said = scale(lr=1.0, betas=(0.0, tuned), eps=1e-8, base_batch=base, batch=batch, rule="sqrt")["betas"][1]
            _, near = min((abs(math.log((1 - b) / (1 - said))), b) for b in losses)
            costs = f"{near}: {losses[near] - losses[best]:+.4f}", f"{losses[tuned] - losses[best]:+.4f}"
            lines.append(_row(width, batch, best, f"{said:.4g}", *costs))
    return lines


if __name__ == "__main__":
    main()
