"""Do two checkouts train the same numbers? Eight tiny runs with each; metrics, records and weights equal to the bit.

    python scripts/compare_checkouts.py OLD NEW --folder FOLDER [--old-words WORD ...] [--new-words WORD ...]
        [--ignore FIELD ...]

OLD and NEW are folders of code. Each plans and trains through its own command line, with its own conf/; words are for
keys that one of the two names differently. Runs are kept below FOLDER, and a run that has finished is not trained
again, so give another folder for other code. Exit code: 0 all equal, 1 some run differs, 2 some run did not finish.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

DATA = {  # what each kind of data trains: batch statistics, augmentation, label noise; dropout; accumulation in both
    "images": [
        "dataset=digits", "model=resnet8", "model.width=8", "model.norm=batch", "dataset.label_noise=0.2", "batch=64",
        "recipe.micro_batch=16", "recipe.epochs=null", "recipe.samples=1024", "recipe.eps=1e-3",
    ],
    "tokens": [
        "dataset=stdlib", "model=gpt", "dataset.context=32", "model.dropout=0.1", "batch=32", "recipe.samples=1024",
        "recipe.decay=milestones", "recipe.milestones_fraction=[0.5,0.8]",
    ],
}  # fmt: skip
MEASURE = ["measure.evaluations=4", "measure.train_records=16", "measure.noise=free", "measure.noise_records=4"]
CASES = {
    f"{optimizer}-{data}-{processes}": [
        f"optimizer={optimizer}", *words, *MEASURE, f"launch.devices={processes}", "seed=3", "logger=none",
    ]
    for optimizer in ("adam", "rmsprop")
    for data, words in DATA.items()
    for processes in (1, 2)
}  # fmt: skip


def train(checkout: Path, words: list[str], folder: Path) -> Path:
    """Train one run with the code of `checkout`; returns the run's own folder.

    Raises:
        RuntimeError: the run did not finish.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "scaling_exps.cli", *words, f"runs_dir={folder}"]
    ended = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    runs = [path.parent for path in folder.glob("*/result.json")]
    if ended.returncode or len(runs) != 1:
        raise RuntimeError(f"{folder}: {' '.join(command)} ended with {ended.returncode}\n{ended.stderr}")
    return runs[0]


def differences(old: Path, new: Path, ignored: list[str]) -> list[str]:
    """What differs between two finished runs, one a line; empty where they are equal to the bit."""
    metrics = (json.loads((run / "result.json").read_text())["metrics"] for run in (old, new))
    lines = [f"metric {change}" for change in _changes(*metrics, ignored)]
    rows, other_rows = _records(old), _records(new)
    if len(rows) != len(other_rows):
        lines.append(f"records: {len(rows)} -> {len(other_rows)}")
    for row, other_row in zip(rows, other_rows, strict=False):
        found = _changes(row, other_row, ignored)
        lines += [f"{row['kind']} record at step {row['step']}, {change}" for change in found]
    weights, other_weights = _weights(old), _weights(new)
    if list(weights) != list(other_weights):
        lines.append(f"weights: {', '.join(weights)} -> {', '.join(other_weights)}")
    for name in weights.keys() & other_weights.keys():
        a, b = weights[name], other_weights[name]
        if a.dtype != b.dtype or not torch.equal(a, b):
            lines.append(f"weight {name}")
    return lines


def _changes(old: dict[str, Any], new: dict[str, Any], ignored: list[str]) -> list[str]:
    """The entries that two objects do not share, NaN being equal to itself."""
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if name not in ignored and json.dumps(old.get(name, "absent")) != json.dumps(new.get(name, "absent"))
    ]


def _records(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "records.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["net"]
    return state


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--old-words", nargs="*", default=[], help="words that only OLD is given")
    parser.add_argument("--new-words", nargs="*", default=[], help="words that only NEW is given")
    parser.add_argument("--ignore", nargs="*", default=[], help="fields of records that only one of the two writes")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args(argv)
    sides = {"old": (options.old, options.old_words), "new": (options.new, options.new_words)}
    code = 0
    for case in options.cases:
        try:
            old, new = (
                train(checkout.resolve(), [*CASES[case], *words], (options.folder / side / case).resolve())
                for side, (checkout, words) in sides.items()
            )
        except RuntimeError as error:
            print(f"{case}: not finished: {error}", flush=True)
            code = 2
            continue
        lines = differences(old, new, options.ignore)
        verdict = "DIFFERENT" if lines else "equal"
        print(f"{case}: {verdict}  ({len(_records(old))} records, {len(_weights(old))} tensors)")
        print("".join(f"    {line}\n" for line in lines[:20]), end="", flush=True)
        code = max(code, int(bool(lines)))
    return code


if __name__ == "__main__":
    sys.exit(main())
