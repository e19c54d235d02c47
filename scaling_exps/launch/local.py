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
from scaling_exps.launch.directories import LaunchError
from scaling_exps.plan import RunSpec


def launch(specs: list[RunSpec], root: Path, settings: Launch) -> bool:
    """Bring every run of the list to its end, skipping those that are; returns whether all of them are finished."""
    todo = [spec for spec in specs if directories.known_state(root / spec.run_id) != "finished"]
    if todo:
        from scaling_exps import train

        train.preflight(todo)
    dirs = directories.write(specs, root)
    todo_dirs = [dirs[spec.run_id] for spec in todo]
    worlds = {d: records.read_spec(d).placement.world_size for d in todo_dirs}  # a begun run keeps its own
    cards = _cards() if max(worlds.values(), default=1) * settings.parallel > 1 else []
    for run_dir, world in worlds.items():
        if cards and world > len(cards):
            raise LaunchError(
                f"{run_dir} is a run of {world} processes, and this machine shows {len(cards)} GPU(s): give "
                "launch.devices; a run that has begun keeps its number (another runs_dir starts it anew)"
            )
    print(f"{len(specs)} run(s), {len(specs) - len(todo)} finished already, under {root}/", flush=True)
    if len(todo) == 1 and worlds[todo_dirs[0]] == 1:
        train.run_all(todo_dirs, log=False)
        train.stop_requested()
    elif settings.parallel == 1 and all(world == 1 for world in worlds.values()):
        for i, run_dir in enumerate(todo_dirs, 1):
            print(f"[{i}/{len(todo)}] ", end="", flush=True)
            train.run_all([run_dir], log=False)
            if train.stop_requested():
                break
    else:
        for world in sorted(set(worlds.values())):
            _workers([d for d in todo_dirs if worlds[d] == world], world, settings.parallel, cards)
        for run_dir in todo_dirs:  # what a run in this process says itself
            result = records.read_json(run_dir / "result.json") or {}
            if told := ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in result.get("metrics", {}).items()):
                print(f"finished: {run_dir}: {told}")
    states = {d: records.state(d) for d in dirs.values()}
    for run_dir, state in states.items():
        if state != "finished":
            why = directories.reason(run_dir)
            print(f"{state}: {run_dir}" + (f": {why}" if why else ""), file=sys.stderr)
    good = all(state == "finished" for state in states.values())
    if not good:
        print("the same command again goes on with what is missing", file=sys.stderr)
    return good


def _workers(run_dirs: list[Path], world: int, parallel: int, cards: list[str]) -> None:
    """`parallel` workers at a time, of `world` processes each, on their own shares of the cards; a bar counts results.

    Workers of one process share the list out by its locks. A group of processes ends with a run that fails, so it is
    given one.
    """
    from tqdm import tqdm

    count = min(parallel, len(run_dirs))
    queue = [run_dirs] * count if world == 1 else [[d] for d in run_dirs]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    threads = str(max(1, (os.cpu_count() or 1) // (count * world)))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    quiet = subprocess.DEVNULL if world > 1 else None  # torchrun's own report; ours is in log.txt and result.json
    workers: dict[int, subprocess.Popen[bytes]] = {}  # by the share of the cards that they have
    before = signal.signal(signal.SIGTERM, _end)  # the workers save and end when this process is told to
    try:
        with tqdm(total=len(run_dirs), unit="run", disable=None, desc=f"{count} side by side") as bar:
            while queue or any(w.poll() is None for w in workers.values()):
                for share in range(count):
                    if queue and (share not in workers or workers[share].poll() is not None):
                        command = [sys.executable, *start, "-m", "scaling_exps.train", *map(str, queue.pop(0))]
                        mine = _share(cards, share, world)
                        workers[share] = subprocess.Popen(command, env={**environment, **mine}, stderr=quiet)
                time.sleep(0.2)
                bar.update(sum((d / "result.json").exists() for d in run_dirs) - bar.n)
            bar.update(sum((d / "result.json").exists() for d in run_dirs) - bar.n)
    except BaseException:
        for w in workers.values():
            w.terminate()
        for w in workers.values():
            w.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _share(cards: list[str], share: int, world: int) -> dict[str, str]:
    """The environment that gives a worker `world` cards of its own; with more workers than cards some are shared."""
    mine = [cards[(share * world + i) % len(cards)] for i in range(world)] if cards else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)
