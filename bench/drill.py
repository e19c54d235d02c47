"""Failure drills: break runs on purpose, and compare what is left with a sweep that nobody disturbed.

    python bench/drill.py [--kills 100] [--ramp] [--out drills.jsonl]  --ramp: of runs whose batch changes four times
    python bench/drill.py --faults 1000 --out faults.jsonl             the campaign; the same command goes on with it
    python bench/drill.py --render drills.jsonl docs/reliability.md    a table of that page, from what was counted

Random kills go over sweeps of small runs (digits, ResNet-8 of width 4) in three places: in one process, in two
processes under torchrun, and in two tasks on two nodes under SLURM (left out where SLURM is not installed, or not
run by root). After each sweep every run must be finished, its weights and its records the same bits as those of the
undisturbed sweep in that place; of a record, only `seconds` (wall clock) is not compared.

The campaign is of single faults of many kinds, each with a run of its own of 20 or 40 steps: case i of a seed is always
the same fault of the same run at the same share of its time. Its processes are forked from one that has torch. A case
is wrong if the run differs from the undisturbed one, if it does not end in HANG seconds, or if a process is left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from scaling_exps import config, plan  # noqa: E402
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
        launcher, end, next_at = scalerun(place, runs), time.monotonic() + 3600, None
        while not finished(runs):
            if time.monotonic() > end:
                wrong.append(f"sweep {sweep} did not end in an hour")
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


# ---- the campaign ----

HANG = 900.0  # seconds in which a struck run must have ended
ORPHAN = 30.0  # seconds in which its processes must have gone
NEWEST, PREVIOUS, RECORDS = "checkpoint.pt", "checkpoint.prev.pt", "records.jsonl"
SHORT = [
    *SWEEP[3:8], "recipe.samples=2560", "recipe.batch=64", "measure.evaluations=2", "measure.noise_records=2",
    "checkpoint.minutes=1e-9",
]  # fmt: skip


def _flip(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]


def _cut(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randrange(len(raw))]


SIGNALS = ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGSTOP"]
DAMAGE: dict[str, tuple[list[str], Callable[[bytes, random.Random], bytes]]] = {  # done to a run that was killed
    "checkpoint cut": ([NEWEST], _cut),
    "a bit flipped in the checkpoint": ([NEWEST], _flip),
    "checkpoint empty": ([NEWEST], lambda raw, chance: b""),
    "both checkpoints cut": ([NEWEST, PREVIOUS], _cut),
    "records cut": ([RECORDS], _cut),
    "a bit flipped in the records": ([RECORDS], _flip),
    "zeros behind the records": ([RECORDS], lambda raw, chance: raw + bytes(512)),
    "half a save left": ([".checkpoint.pt.1"], lambda raw, chance: chance.randbytes(999)),
    "lock overwritten": (["lock"], lambda raw, chance: chance.randbytes(99)),
    "result from nowhere": (["result.json"], lambda raw, chance: b'{"status": "failed", "reason": "?"}'),
}
LIMITS = {  # of its process, once; and from what to what
    "files end at a size": ("RLIMIT_FSIZE", 200, 60_000),
    "few open files": ("RLIMIT_NOFILE", 8, 40),
    "little memory": ("RLIMIT_AS", 1 << 20, 300 << 20),  # more than it has at its start
}
TWICE = "two processes begin it at once"
JOB_FAULTS = {  # what SLURM is told
    "requeue": ["scontrol requeue JOB"],
    "SIGUSR2 to the job": ["scancel --signal=USR2 JOB"],
    "job cancelled": ["scancel JOB"],
    "node lost": [f"scontrol update nodename=n1 state={s} reason=drill" for s in ("down", "resume")],
}
KINDS = {
    "one process": [*SIGNALS, *DAMAGE, *LIMITS, TWICE],
    "two processes": [*SIGNALS, *DAMAGE],
    "SLURM, two nodes": [*JOB_FAULTS, *JOB_FAULTS, "SIGKILL", "SIGTERM", "SIGSTOP", *list(DAMAGE)[::3]],
}
SHARES = dict(zip(KINDS, (3, 2, 1), strict=True))  # of the cases


def _limited(name: str, most: int, folder: str) -> None:
    """A worker under a limit of its process."""
    import resource

    from scaling_exps.train.worker import work

    if name == "RLIMIT_AS":
        most += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = getattr(resource, name)
    resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
    raise SystemExit(work([Path(folder)]))


def inside(folder: Path) -> dict[int, str]:
    """The processes that work in `folder`, and their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                found[int(process.name)] = (process / "cmdline").read_text(errors="replace")
    return found


def case(number: int, seed: int, folder: Path, place: str) -> dict[str, Any]:
    """One run, struck up to four times, and what came of it."""
    import forked
    from support import worker

    chance, slurm, begun = random.Random(f"{seed} {number}"), place.startswith("SLURM"), time.monotonic()
    world = chance.choice([1, 2]) if slurm else 1 + (place == "two processes")
    words = [*SHORT, f"batch={chance.choice([64, 128])}", f"seed={chance.randrange(3)}"]
    wanted, hit = chance.choices(KINDS[place], k=4), collections.Counter[str]()
    (spec,) = plan.plan(config.compose([*words, f"launch.devices={world}"]))
    reference = RunDir(folder / f"undisturbed-{world}" / spec.run_id)
    run_dir = RunDir(folder / f"case{number}" / spec.run_id)
    home, workers = run_dir.path.parent, list[Any]()

    if reference.state() != "finished":
        reference.prepare(spec)
        forked.start(worker(reference, world), env=ENVIRONMENT).join(HANG)
        if reference.state() != "finished":
            raise SystemExit(f"the undisturbed run failed: {reference.reason()}")
    usual = (reference.result() or {})["seconds"] + 0.3  # it loads and saves, too

    def start(kind: str) -> None:
        program = worker(run_dir, world)
        if slurm:
            options = [w for w in PLACES[place] if not w.startswith("launch.devices=")]
            program = ["-m", "scaling_exps.cli", *words, *options, f"launch.devices={world}", "runs_dir=."]
        elif kind in LIMITS:
            name, *ends = LIMITS[kind]
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.drill import _limited; "
            program = ["-c", f"{code}_limited({name!r}, {chance.randrange(*ends)}, {str(run_dir)!r})"]
        run_dir.prepare(spec)
        log = str(home / "log")
        workers[:] = [forked.start(program, home, ENVIRONMENT, log, log) for _ in range(1 + (kind == TWICE))]
        if slurm:
            workers[0].join()

    def job() -> str:
        return str([e["job"] for e in run_dir.events() if e.get("job")][-1])

    def busy() -> bool:
        return job().encode() in in_queue() if slurm else any(w.is_alive() for w in workers)

    def starts() -> int:
        return sum(e.get("event") == "start" for e in run_dir.events())

    def in_time() -> bool:
        return time.monotonic() < begun + HANG

    def strike(kind: str) -> bool:
        told = JOB_FAULTS["job cancelled" if kind in DAMAGE else kind] if slurm and kind not in SIGNALS else []
        for line in told:
            if subprocess.run(line.replace("JOB", job()).split(), stderr=subprocess.DEVNULL).returncode:
                return False
        if told:
            return True
        lines = inside(home).items()
        ranks = [p for p, line in lines if "core._submit" in line and not line.startswith("srun")]
        if not slurm:
            ranks = [p for p, _ in lines if world == 1 or p != workers[0].pid]  # which is torchrun
            # and waits for ever, says its source, for a rank of a forked function that is killed once it has returned
            ranks = [] if run_dir.state() == "finished" else ranks
        try:
            os.kill(victim := chance.choice(ranks), getattr(signal, kind if kind in SIGNALS else "SIGKILL"))
            if kind == "SIGSTOP":
                time.sleep(chance.uniform(0, 2))
                os.kill(victim, signal.SIGCONT)
        except (ProcessLookupError, IndexError):
            return False
        return True

    home.mkdir()
    (home / "log").touch()
    seen = 0
    while run_dir.state() != "finished" and in_time():
        kind = wanted.pop() if wanted else ""
        if not (slurm and seen and busy()):
            start(kind)
        while starts() == seen and busy() and in_time():
            time.sleep(0.01)
        seen, struck = starts(), kind in LIMITS or kind == TWICE
        if kind and not struck and busy():
            time.sleep(chance.uniform(0, usual))
            struck = strike(kind)
        while busy() and not (slurm and starts() > seen) and in_time():
            time.sleep(0.02)
        if kind in DAMAGE:
            names, spoil = DAMAGE[kind]
            contents = {n: (run_dir.path / n).read_bytes() if (run_dir.path / n).exists() else b"" for n in names}
            there = {n: raw for n, raw in contents.items() if raw or n not in (NEWEST, PREVIOUS, RECORDS)}
            struck = struck and bool(there) and not busy() and run_dir.state() != "finished"
            for name, raw in there.items() if struck else ():
                (run_dir.path / name).write_bytes(spoil(raw, chance))
        hit[kind] += struck
    ended = run_dir.state() == "finished"
    wrong = difference(run_dir, reference) if ended else f"{run_dir.state()}: {run_dir.reason()}"
    end = time.monotonic() + ORPHAN
    while (left := inside(home)) and time.monotonic() < end:
        time.sleep(0.05)
    wrong = wrong or (f"left behind: {left}" if left else "")
    wrong = wrong or next((f"left behind: {p}" for p in run_dir.path.glob(".checkpoint*")), "")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    row = {"seed": seed, "case": number, "place": place, "processes": world, "hit": dict(+hit), "starts": starts()}
    shutil.rmtree(home)
    return {**row, "seconds": round(time.monotonic() - begun, 1), "wrong": wrong}


def campaign(count: int, seed: int, out: Path, places: list[str], until: float) -> bool:
    """Cases of a seed that `out` does not hold yet, a line each, until `count` faults have hit, or the time is over."""
    import forked

    os.environ.update(ENVIRONMENT)
    forked._SERVER.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.run", "scipy.special", "scaling_exps.cli"]
    )
    before = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known, hits, good = {(r["seed"], r["case"]) for r in before}, sum(sum(r["hit"].values()) for r in before), True
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if "SLURM, two nodes" in places and not stack.enter_context(cluster()):
            places = [p for p in places if not p.startswith("SLURM")]
        for number in itertools.count():
            if hits >= count or time.monotonic() > until or not places:
                return good
            (place,) = random.Random(f"place {seed} {number}").choices([*SHARES], [*SHARES.values()])
            if place in places and (seed, number) not in known:
                row = case(number, seed, Path(folder), place)
                hits, good = hits + sum(row["hit"].values()), good and not row["wrong"]
                with open(out, "a") as f:
                    f.write(json.dumps(row) + "\n")
                print(*row.values(), flush=True)
    raise AssertionError


@contextlib.contextmanager
def cluster() -> Iterator[bool]:
    """A SLURM cluster of two nodes; False where there cannot be one."""
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        yield False
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = f"{folder}/slurm"
        environment = {**os.environ, "PORT": "28817", "CPUS": "4"}
        os.environ["SLURM_CONF"] = ENVIRONMENT["SLURM_CONF"] = f"{directory}/slurm.conf"
        try:
            subprocess.run([ROOT / "tests/slurm/up.sh", directory], check=True, env=environment)
            yield True
        finally:
            subprocess.run([ROOT / "tests/slurm/down.sh", directory], check=False)


def render(counted: Path, page: Path) -> None:
    """Put the counts of the JSON lines `counted` between the marks of `page`."""
    rows = [json.loads(line) for line in counted.read_text().splitlines()]
    if "case" in rows[0]:
        table = [["fault", *KINDS, "in all"], ["---"] * (len(KINDS) + 2)]
        hits = {
            p: sum((collections.Counter(r["hit"]) for r in rows if r["place"] == p), collections.Counter())
            for p in KINDS
        }
        for kind in sorted(set().union(*hits.values())):
            counts = [hits[p][kind] for p in KINDS]
            table.append([kind, *counts, sum(counts)])
        for name, number in {
            "**faults**": lambda r: sum(r["hit"].values()), "runs struck": lambda r: 1, "starts": lambda r: r["starts"],
            "**wrong**": lambda r: bool(r["wrong"]),
        }.items():  # fmt: skip
            counts = [sum(number(r) for r in rows if r["place"] == p) for p in KINDS]
            table.append([name, *counts, sum(counts)])
        _put(table, page, "faults")
        return
    kinds = sorted({kind for row in rows for kind in row["counts"]})
    table = [["place", *kinds, "kills", "runs", "launched again by hand", "wrong"], ["---"] * (len(kinds) + 5)]
    for row in rows:
        counts = [row["counts"].get(kind, 0) for kind in kinds]
        wrong = "; ".join(row["wrong"]) or 0
        table.append([row["place"], *counts, sum(counts), row["runs"], row["restarts"], wrong])
    sums = [sum(column) for column in list(zip(*table[2:], strict=True))[1:-1]]
    table.append(["all", *sums, sum(len(row["wrong"]) for row in rows)])
    _put(table, page, "counted")


def _put(table: list[list[Any]], page: Path, mark: str) -> None:
    lines = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in table).replace(" --- ", "---")
    before, begin, rest = page.read_text().partition(f"<!-- {mark} -->")
    page.write_text(f"{before}{begin}\n{lines}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12800, help="of each run (default: 12800)")
    parser.add_argument("--kills", type=int, default=100, help="in all places together (default: 100)")
    parser.add_argument("--faults", type=int, help="a campaign of so many single faults, into --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", nargs="*", default=list(PLACES), choices=list(PLACES))
    parser.add_argument("--minutes", type=float, default=30, help="stop striking after so long (default: 30)")
    parser.add_argument("--out", type=Path, help="a JSON lines file that gains one line a place")
    parser.add_argument("--render", type=Path, nargs=2, metavar=("LINES", "PAGE"), help="make the table of PAGE")
    parser.add_argument("--ramp", action="store_true", help="kill runs whose batch changes four times within them")
    options = parser.parse_args()
    if options.render:
        render(*options.render)
        return 0
    until = time.monotonic() + 60 * options.minutes
    if options.faults:
        return int(not campaign(options.faults, options.seed, options.out, options.places, until))
    SWEEP.append(f"recipe.samples={options.samples}")
    if options.ramp:
        SWEEP[:3] = ["ramp=[[0,64],[0.2,128],[0.4,64],[0.6,128],[0.8,256]]", "base=none", "seed=[0,1,2,3,4,5]"]
    chance, good = random.Random(options.seed), True
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
