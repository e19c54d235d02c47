"""Start-up and planning, beside the floors of an empty Python and of a bare Hydra.

    python bench/startup.py [--runs 9]

The commands take turns, so that a busy machine moves all of them together. `over_hydra` is the median of the ratios
within a turn to one composition of an empty config; `scalerun plan` may have 1.4 of it. `cpu_over_hydra` is the same
of CPU seconds, which other people's load moves less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCALERUN = ["-m", "scaling_exps.cli"]
SEEDS = ",".join(map(str, range(25)))
FLOOR = "import hydra; hydra.main(version_base='1.3', config_path={!r}, config_name='config')(lambda cfg: None)()"
HYDRA, PLAN = "bare Hydra start", "scalerun plan model=resnet50 batch=8192"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    HYDRA: ["-c", FLOOR],
    "import scaling_exps": ["-c", "import scaling_exps"],
    "scalerun --help": [*SCALERUN, "--help"],
    PLAN: [*SCALERUN, "plan", "model=resnet50", "batch=8192"],
    "scalerun plan, 500 runs": [
        *SCALERUN, "plan", "--json", "batch=[8,16,32,64,128]", "rule=[sqrt,none,linear,linear_scaled]",
        f"seed=[{SEEDS}]",
    ],
}  # fmt: skip


def timed(argv: list[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """A process that must succeed, its wall and its CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *argv], check=True, text=True, **options)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    times: dict[str, list[list[float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        (empty := Path(scratch, "empty")).mkdir()
        (empty / "config.yaml").touch()
        for turn in range(options.runs + 1):
            for name, words in COMMANDS.items():
                words = [w.format(str(empty)) if w == FLOOR else w for w in words]
                _, *once = timed(words, cwd=scratch, stdout=subprocess.DEVNULL)
                if turn:  # the first writes bytecode
                    times[name].append(once)
    for name, own in times.items():
        wall, cpu = ([t[i] / floor[i] for t, floor in zip(own, times[HYDRA], strict=True)] for i in (0, 1))
        row = {"command": name, "median_s": statistics.median(w for w, _ in own), "max_s": max(w for w, _ in own)}
        row |= {"over_hydra": statistics.median(wall), "cpu_over_hydra": statistics.median(cpu)}
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
