"""Time and memory of `scalerun status` and `scalerun report` over fabricated runs.

    python bench/report.py [RUNS RECORDS [SETTINGS]]      (2,000 runs x 200 records in 2 settings, and 10 runs)

Prints seconds (a process of its own, start-up included), the CPU seconds as a multiple of those that plain `json` takes
to read the same files, peak resident memory, size of the page. Other people's load moves the CPU seconds less.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fabricate import fabricate
from startup import timed

MEASURED = """
import resource, sys
from scaling_exps.cli import main
rc = main(sys.argv[1:])
print(max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)), file=sys.stderr)
raise SystemExit(rc)
"""
PLAIN = """
import json, os, sys
for run in os.scandir(sys.argv[1]):
    for name in ("run.json", "result.json"):
        json.load(open(os.path.join(run.path, name)))
    for line in open(os.path.join(run.path, "records.jsonl")):
        json.loads(line)
"""


def measure(root: Path, out: Path) -> None:
    runs, (_, _, plain) = len(list(root.iterdir())), timed(["-c", PLAIN, str(root)])
    for words in (["status", str(root)], ["report", str(root), "--out", str(out)]):
        done, seconds, busy = timed(["-c", MEASURED, *words], capture_output=True)
        print(
            f"{runs:>5} runs: {words[0]} {seconds:.2f} s ({busy:.2f} s of CPU, {busy / plain:.2f} of plain json), "
            f"{int(done.stderr.split()[-1]) / 1024:.0f} MB peak"
        )
    print(f"{' ' * 12}page {(out / 'index.html').stat().st_size / 1e6:.2f} MB, {len(list(out.glob('*.png')))} figures")


def main() -> None:
    runs, records, settings = (*map(int, sys.argv[1:]), *(2000, 200, 2)[len(sys.argv) - 1 :])
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
