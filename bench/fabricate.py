"""Finished runs without training, for the bench of the report and its tests."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from scaling_exps import config, plan
from scaling_exps.noise.validity import deviation
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir

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
    b_noise: float | None = None,
) -> list[RunSpec]:
    """Write finished runs under `root`: a base curve of the seed, moved by EFFECT and by noise of sd `spread`.

    With `b_noise`, 10 full noise records a run at that noise scale, of 10% error each; displacement shrinks by half of
    what they predict. `words` are overrides of the composed configuration. Returns the specs; fabricating the same
    words anew gives the same bytes.
    """
    (composed,) = config.compose([*words, "logger=none", f"measure.train_records={records}"])
    lists = {"batch": list(batches), "seed": list(seeds), "rule": list(rules)}
    specs = plan.plan([msgspec.structs.replace(composed, **lists)])
    for spec in specs:
        run_dir = RunDir(root / spec.run_id)
        run_dir.prepare(spec)
        arm, s = spec.arms[0], spec.science
        loss, accuracy, norm = (math.log(arm.kappa, 4) * v for v in EFFECT.get(arm.rule, (0.0, 0.0, 0.0)))
        shared = random.Random(f"seed {s.seed}")  # by the runs of a seed
        offset = shared.gauss(0, 0.05)
        noise = random.Random(f"{s.seed} {arm.rule} {arm.kappa}").gauss(0, spread)
        window, unit = max(1, arm.base.samples // records), s.draws * s.stretch
        lines = []
        for i in range(1, records + 1):
            x = i / records
            y = 2.3 * math.exp(-2 * x) + 0.3 + offset + shared.gauss(0, 0.02) + (loss + noise) * min(1, 4 * x)
            clock = {"step": max(1, round(x * s.steps)), "samples": i * window * unit, "t": i * window * 1e-6}
            lines.append({"kind": "train", **clock, "loss": y, "window": window * unit, "lr": s.hyper.lr})
            if i * 10 // records > (i - 1) * 10 // records:
                share = 0.1 + 0.8 * x + accuracy * x + shared.gauss(0, 0.005) + noise / 5
                evaluated = {"loss": y - 0.1, "accuracy": share, "weight_norm": 20 + norm * x}
                lines.append({"kind": "eval", **clock, **evaluated})
        for i in range(1, 11) if b_noise else ():
            at = {"step": i * s.steps // 10, "samples": s.samples(i * s.steps // 10), "t": 1e-6, "batch": s.batch}
            measured = {"trace": 1.0, "gradient_sq": (1 + shared.gauss(0, 0.1)) / b_noise, "enough": False}
            lines.append({"kind": "noise", "method": "full", **at, **measured})
        r = arm.base.batch / b_noise if b_noise else 0.0
        moved = 10 * (1 + offset) * (1 - (1 - deviation(r, arm.kappa)) / 2 + noise / 5)
        with run_dir.writer(0) as writer:
            for line in lines:
                writer.write(line)
        metrics = {
            "train_loss": y,
            "test_loss": y - 0.1,
            "test_accuracy": share,
            "weight_norm": 20 + norm + noise,
            "displacement": moved,
        }
        run_dir.write_result(
            {"status": "finished", "metrics": metrics, "seconds": 10 / arm.kappa,
             "samples_per_second": 1700 * arm.kappa, "versions": {"scalerun": "0", "torch": "0"}, "commit": "0" * 40,
             "device": "fabricated", "world_size": 1}
        )  # fmt: skip
    return specs
