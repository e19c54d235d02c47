"""Failure drills: break runs on purpose, and compare what is left with a sweep that nobody disturbed.

    python bench/drill.py [--kills 100] [--out drills.jsonl]
    python bench/drill.py --render drills.jsonl docs/reliability.md    the table of that page, from what was counted

Random kills go over sweeps of small runs (digits, ResNet-8 of width 4) in three places: in one process, in two
processes under torchrun, and in two tasks on two nodes under SLURM (left out where SLURM is not installed, or not
run by root). After each sweep every run must be finished, its weights and its records the same bits as those of the
undisturbed sweep in that place; of a record, only `seconds` (wall clock) is not compared.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scaling_exps.records import RunDir  # noqa: E402

SWEEP = [
    "batch=[64,128]", "base=none", "seed=[0,1,2]", "model.width=4", "recipe.micro_batch=32", "recipe.epochs=null",
    "logger=none", "recipe.statistics_samples=64", "checkpoint.minutes=0.001",
]  # fmt: skip
PLACES = {
    "one process": [],
    "two processes": ["launch.devices=2"],
    "SLURM, two nodes": [
        "launch=slurm", "launch.devices=2", "launch.devices_per_node=1", "launch.gpus=false", "launch.cpus_per_task=1",
        "launch.node_local=[]", "launch.requeues=1000", "launch.array_parallelism=2",
    ],
}  # fmt: skip
FAULTS = {"SIGKILL": 3, "SIGTERM": 1}  # and how often one is chosen
SLURM_FAULTS = {**FAULTS, "SIGUSR2": 1, "requeue": 1}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


def scalerun(place: str, runs: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "scaling_exps.cli", *SWEEP, *PLACES[place], f"runs_dir={runs}"]
    with open(f"{runs}.log", "ab") as log:
        return subprocess.Popen(argv, env=ENVIRONMENT, stdout=log, stderr=log)


def finished(runs: Path) -> bool:
    dirs = RunDir.under(runs)
    return len(dirs) == 6 and all(d.state() == "finished" for d in dirs)


def in_queue() -> list[bytes]:
    return subprocess.check_output(["squeue", "--noheader", "--array", "--me", "--format=%i"]).split()


def victims(runs: Path) -> list[int]:
    """Processes that train a run under `runs`: those that hold its lock, and their ranks."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if str(runs) not in " ".join(words) or "torch.distributed.run" in words or "srun" in words[0]:
                continue
            if "scaling_exps.train" in words or "scaling_exps.cli" in words or "submitit.core._submit" in words:
                pids.append(int(folder.name))
    return pids


def strike(fault: str, runs: Path, busy: list[RunDir], chance: random.Random) -> bool:
    """Do it to one process or job of the runs that are `busy`; False if there was none any more."""
    if fault == "requeue":
        jobs = [str(e["job"]) for d in busy for e in d.events()[-1:] if e.get("job")]
        return bool(jobs) and subprocess.run(["scontrol", "requeue", chance.choice(jobs)]).returncode == 0
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(chance.choice(victims(runs)), getattr(signal, fault))
        return True
    return False


def difference(run_dir: RunDir, reference: RunDir) -> str:
    """What differs between two runs of one id; empty if nothing does."""
    import torch
    from torch.utils._pytree import tree_flatten

    dirs = (run_dir, reference)
    rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in d.records().rows] for d in dirs]
    if rows[0] != rows[1]:
        return f"{run_dir}: records differ ({len(rows[0])} and {len(rows[1])})"
    if run_dir.records().damaged:
        return f"{run_dir}: a broken line in the records"
    states = [torch.load(d.newest, weights_only=True) for d in dirs]
    for part in ("step", "net", "optimizer"):
        (a, shape), (b, other) = (tree_flatten(state[part]) for state in states)
        pairs = zip(a, b, strict=False)
        if shape != other or not all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs):
            return f"{run_dir}: {part} differs"
    return ""


def kill_sweeps(place: str, kills: int, folder: Path, chance: random.Random, until: float) -> dict[str, Any]:
    """Sweeps in `place` until `kills` kills have hit a run in the middle, or `until` (time.monotonic) has come."""
    reference = folder / "undisturbed"
    scalerun(place, reference).wait()
    end = time.monotonic() + 300
    while not finished(reference):
        if time.monotonic() > end:
            raise SystemExit(f"the undisturbed sweep did not finish: {Path(f'{reference}.log').read_text()}")
        time.sleep(0.5)
    counts: collections.Counter[str] = collections.Counter()
    slurm = place.startswith("SLURM")
    faults, runs_done, wrong, restarts, sweep = SLURM_FAULTS if slurm else FAULTS, 0, [], 0, 0
    while sum(counts.values()) < kills and time.monotonic() < until:
        sweep += 1
        runs = folder / f"sweep{sweep}"
        launcher, end, next_at = scalerun(place, runs), time.monotonic() + 600, None
        while not finished(runs):
            if time.monotonic() > end:
                wrong.append(f"sweep {sweep} did not end in 600 s")
                break
            busy = [d for d in RunDir.under(runs) if d.holder()]
            if busy and sum(counts.values()) < kills and time.monotonic() < until:
                if next_at is None:  # a moment of the run that begins now
                    next_at = time.monotonic() + chance.uniform(0.0, 1.5)
                elif time.monotonic() >= next_at:
                    fault = chance.choices(list(faults), list(faults.values()))[0]
                    counts[fault] += strike(fault, runs, busy, chance)
                    next_at = None
            if launcher.poll() is not None and not finished(runs) and not (slurm and in_queue()):
                launcher, restarts = scalerun(place, runs), restarts + 1  # it is through, and something is missing
            time.sleep(0.2 if slurm else 0.05)
        launcher.wait()
        for run_dir in RunDir.under(runs):
            runs_done += 1
            if unequal := difference(run_dir, RunDir(reference / run_dir.path.name)):
                wrong.append(unequal)
        wrong += [f"left behind: {p}" for p in runs.rglob(".checkpoint*")]
        print(f"{place}, sweep {sweep}: {dict(counts)}, {restarts} restarts, wrong: {wrong or 'nothing'}", flush=True)
        shutil.rmtree(runs)
    return {"place": place, "counts": counts, "sweeps": sweep, "runs": runs_done, "restarts": restarts, "wrong": wrong}


@contextlib.contextmanager
def cluster() -> Iterator[bool]:
    """A SLURM cluster of two nodes; False where there cannot be one."""
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        yield False
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = f"{folder}/slurm"
        environment = {**os.environ, "PORT": "28817", "CPUS": "4"}
        subprocess.run([ROOT / "tests/slurm/up.sh", directory], check=True, env=environment)
        os.environ["SLURM_CONF"] = ENVIRONMENT["SLURM_CONF"] = f"{directory}/slurm.conf"
        try:
            yield True
        finally:
            subprocess.run([ROOT / "tests/slurm/down.sh", directory], check=False)


def render(counted: Path, page: Path) -> None:
    """Put the counts of the JSON lines `counted` between the marks of `page`."""
    rows = [json.loads(line) for line in counted.read_text().splitlines()]
    kinds = sorted({kind for row in rows for kind in row["counts"]})
    table = [["place", *kinds, "kills", "runs", "launched again by hand", "wrong"], ["---"] * (len(kinds) + 5)]
    for row in rows:
        counts = [row["counts"].get(kind, 0) for kind in kinds]
        wrong = "; ".join(row["wrong"]) or 0
        table.append([row["place"], *counts, sum(counts), row["runs"], row["restarts"], wrong])
    sums = [sum(column) for column in list(zip(*table[2:], strict=True))[1:-1]]
    table.append(["all", *sums, sum(len(row["wrong"]) for row in rows)])
    lines = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in table).replace(" --- ", "---")
    begin, end = "<!-- counted -->", "<!-- end -->"
    text = page.read_text()
    page.write_text(f"{text.split(begin)[0]}{begin}\n{lines}\n{end}{text.split(end)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12800, help="of each run (default: 12800)")
    parser.add_argument("--kills", type=int, default=100, help="in all places together (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", nargs="*", default=list(PLACES), choices=list(PLACES))
    parser.add_argument("--minutes", type=float, default=30, help="stop striking after so long (default: 30)")
    parser.add_argument("--out", type=Path, help="a JSON lines file that gains one line a place")
    parser.add_argument("--render", type=Path, nargs=2, metavar=("LINES", "PAGE"), help="make the table of PAGE")
    options = parser.parse_args()
    if options.render:
        render(*options.render)
        return 0
    SWEEP.append(f"recipe.samples={options.samples}")
    chance, until, good = random.Random(options.seed), time.monotonic() + 60 * options.minutes, True
    for i, place in enumerate(options.places):
        share = options.kills // len(options.places) + (i < options.kills % len(options.places))
        machine = cluster() if place.startswith("SLURM") else contextlib.nullcontext(True)
        with tempfile.TemporaryDirectory() as folder, machine as usable:
            if not usable:
                print(f"{place}: left out (SLURM is not installed, or this is not root)")
                continue
            row = kill_sweeps(place, share, Path(folder), chance, until)
        good &= not row["wrong"]
        if options.out:
            with open(options.out, "a") as f:
                f.write(json.dumps(row) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
