"""Start-up and planning: medians of whole processes, beside the floor of an empty Python.

python bench/startup.py [--runs 7]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

SEEDS = ",".join(map(str, range(25)))
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import scaling_exps": ["-c", "import scaling_exps"],
    "scalerun --help": ["-m", "scaling_exps.cli", "--help"],
    "scalerun plan model=resnet50 batch=8192": ["-m", "scaling_exps.cli", "plan", "model=resnet50", "batch=8192"],
    "scalerun plan, 500 runs": [
        "-m", "scaling_exps.cli", "plan", "--json", "batch=[8,16,32,64,128]", "rule=[sqrt,none,linear,linear_scaled]",
        f"seed=[{SEEDS}]",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, words in COMMANDS.items():
            times = []
            for _ in range(options.runs + 1):
                start = time.perf_counter()
                subprocess.run([sys.executable, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                times.append(time.perf_counter() - start)
            print(
                json.dumps(
                    {
                        "command": name,
                        "median_s": round(statistics.median(times[1:]), 3),
                        "max_s": round(max(times[1:]), 3),
                    }
                )
            )


if __name__ == "__main__":
    main()
