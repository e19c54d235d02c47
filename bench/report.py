"""Time and memory of `scalerun report` over fabricated runs.

    python bench/report.py [RUNS RECORDS [SETTINGS]]      (1,000 runs x 1,000 records in 2 settings, and 10 runs)

Prints seconds (a process of its own, start-up included), peak resident memory, size of the page.
"""

from __future__ import annotations

import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scaling_exps import config, plan
from scaling_exps.plan import RunSpec

# What a rule does to the fabricated curve: (offset of the loss, offset of accuracy, of the weight norm), per log4 kappa
EFFECT = {"sqrt": (0.0, 0.0, 0.0), "none": (0.2, -0.05, -1.5), "linear": (0.15, -0.04, 4.0), "linear_scaled": (0, 0, 5)}


def fabricate(
    root: Path,
    words: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    batches: Sequence[int] = (4, 16, 64),
    rules: Sequence[str] = ("sqrt", "none"),
    records: int = 40,
    spread: float = 0.01,
) -> list[RunSpec]:
    """Write finished runs under `root`: a base curve of the seed, moved by EFFECT and by noise of sd `spread`.

    `words` are overrides of the composed configuration. Returns the specs; fabricating the same words anew gives the
    same bytes.
    """
    (composed,) = config.compose([*words, "logger=none", "measure.train_records=" + str(records)])
    composed = replace(composed, batch=list(batches), seed=list(seeds), rule=list(rules))
    specs = plan.plan([composed])
    for spec in specs:
        folder = root / spec.run_id
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(spec.to_json()))
        arm = spec.arms[0]
        share = math.log(arm.kappa, 4)
        loss, accuracy, norm = (share * v for v in EFFECT.get(arm.rule, (0.0, 0.0, 0.0)))
        draw = random.Random(f"{spec.science.seed} {arm.rule} {arm.kappa}")
        common = random.Random(f"seed {spec.science.seed}")  # what the runs of a seed share
        lines, total = [], 17240
        seed_loss, mine = common.gauss(0, 0.05), draw.gauss(0, spread)
        window, unit = max(1, total // records), spec.draws * spec.stretch
        for i in range(1, records + 1):
            x = i / records
            y = 2.3 * math.exp(-2 * x) + 0.3 + seed_loss + common.gauss(0, 0.02) + (loss + mine) * min(1, 4 * x)
            step, samples = max(1, round(i * spec.science.steps / records)), i * window * unit
            t = i * window * 1e-6
            lines.append(
                f'{{"kind": "train", "step": {step}, "samples": {samples}, "t": {t}, "loss": {y}, '
                f'"window": {window * unit}, "lr": {spec.science.hyper.lr}, "gradient_norm": 1.5, '
                f'"seconds": {i * 0.01}}}\n'
            )
            if i * 10 // records > (i - 1) * 10 // records:
                now = 0.1 + 0.8 * x + accuracy * x + common.gauss(0, 0.005) + mine / 5
                lines.append(
                    json.dumps(
                        {"kind": "eval", "step": step, "samples": samples, "t": t, "loss": y - 0.1,
                         "accuracy": now, "weight_norm": 20 + norm * x}
                    ) + "\n"
                )  # fmt: skip
        (folder / "records.jsonl").write_text("".join(lines))
        metrics = {"train_loss": y, "test_loss": y - 0.1, "test_accuracy": now, "weight_norm": 20 + norm + mine}
        result = {
            "status": "finished", "metrics": metrics, "seconds": 10 / arm.kappa, "samples_per_second": 1700 * arm.kappa,
            "versions": {"scalerun": "0", "torch": "0"}, "commit": "0" * 40, "device": "fabricated", "world_size": 1,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
    return specs


def measure(root: Path, out: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = (
        "import resource, sys; from scaling_exps.cli import main; rc = main(sys.argv[1:]); "
        "print(max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)), "
        "file=sys.stderr); raise SystemExit(rc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(root), "--out", str(out)], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{len(list(root.iterdir())):>5} runs: {seconds:.2f} s ({busy:.2f} s of CPU), "
        f"{int(done.stderr.split()[-1]) / 1024:.0f} MB peak, "
        f"page {(out / 'index.html').stat().st_size / 1e6:.2f} MB, {len(list(out.glob('*.png')))} figures"
    )


def main() -> None:
    runs, records, settings = (*map(int, sys.argv[1:]), *(1000, 1000, 2)[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as scratch:
        few = Path(scratch, "few")
        fabricate(few, ["experiment=demo"], seeds=(0, 1), batches=(4, 16, 64), records=100)
        measure(few, Path(scratch, "out-few"))
        many = Path(scratch, "many")
        seeds = max(1, round(runs / settings / 13))  # a base run and 12 others a seed
        for i in range(settings):
            fabricate(
                many, ["experiment=demo", f"recipe.lr={1e-3 * (1 + 0.3 * i):g}"], seeds=range(seeds),
                batches=(4, 16, 64, 128), rules=("sqrt", "none", "linear", "linear_scaled"), records=records,
            )  # fmt: skip
        measure(many, Path(scratch, "out-many"))


if __name__ == "__main__":
    main()
