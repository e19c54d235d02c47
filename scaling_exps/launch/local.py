"""Runs on this machine: one after another in this process, or workers side by side, or one process a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scaling_exps import records
from scaling_exps.config import Launch
from scaling_exps.launch import directories
from scaling_exps.plan import RunSpec


def launch(specs: list[RunSpec], root: Path, settings: Launch) -> bool:
    """Bring every run of the list to its end, skipping those that are; returns whether all of them are finished."""
    todo = [spec for spec in specs if directories.known_state(root / spec.run_id) != "finished"]
    if todo:
        from scaling_exps import train

        train.preflight(todo)
    dirs = directories.write(specs, root)
    print(f"{len(specs)} run(s), {len(specs) - len(todo)} finished already, under {root}/", flush=True)
    todo_dirs = [dirs[spec.run_id] for spec in todo]
    if len(todo) == 1 and todo[0].placement.world_size == 1:
        train.run_all(todo_dirs, log=False)
    elif settings.parallel == 1 and all(s.placement.world_size == 1 for s in todo):
        for i, run_dir in enumerate(todo_dirs, 1):
            print(f"[{i}/{len(todo)}] ", end="", flush=True)
            train.run_all([run_dir], log=False)
            if train.stop_requested():
                break
    else:
        for world in sorted({s.placement.world_size for s in todo}):
            _workers([dirs[s.run_id] for s in todo if s.placement.world_size == world], world, settings.parallel)
    states = {d: records.state(d) for d in dirs.values()}
    for run_dir, state in states.items():
        if state != "finished":
            why = directories.reason(run_dir)
            print(f"{state}: {run_dir}" + (f": {why}" if why else ""), file=sys.stderr)
    good = all(state == "finished" for state in states.values())
    if not good:
        print("the same command again goes on with what is missing", file=sys.stderr)
    return good


def _workers(run_dirs: list[Path], world: int, parallel: int) -> None:
    """`parallel` workers (each of `world` processes) share the list out by its locks; a bar counts finished runs."""
    from tqdm import tqdm

    module = ["-m", "scaling_exps.train", *map(str, run_dirs)]
    if world > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *module]
    count = min(parallel, len(run_dirs))
    threads = str(max(1, (os.cpu_count() or 1) // (count * world)))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    quiet = subprocess.DEVNULL if world > 1 else None  # torchrun's own report; ours is in log.txt and result.json
    workers = [subprocess.Popen([sys.executable, *module], env=environment, stderr=quiet) for _ in range(count)]
    before = signal.signal(signal.SIGTERM, _end)  # the workers save and end when this process is told to
    try:
        with tqdm(total=len(run_dirs), unit="run", disable=None, desc=f"{count} side by side") as bar:
            while any(w.poll() is None for w in workers):
                time.sleep(0.2)
                bar.update(sum((d / "result.json").exists() for d in run_dirs) - bar.n)
            bar.update(sum((d / "result.json").exists() for d in run_dirs) - bar.n)
    except BaseException:
        for w in workers:
            w.terminate()
        for w in workers:
            w.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)
