"""Runs on this machine: one after another in this process, or workers side by side, or one process a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scaling_exps.config import LocalLaunch
from scaling_exps.launch import folders
from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import RunSpec, threads
from scaling_exps.records import RunDir


def launch(specs: list[RunSpec], root: Path, settings: LocalLaunch) -> bool:
    """Bring every run of the list to its end, skipping those that are; returns whether all of them are finished."""
    from scaling_exps import train

    todo = folders.unfinished(specs, root)
    train.preflight(todo)
    prepared = folders.prepare(specs, root, lambda run_dir: settings.elastic and run_dir.holder() is None)
    worlds = {d: prepared[d].placement.world_size for d in (RunDir(root / spec.run_id) for spec in todo)}
    side_by_side = settings.parallel > 1 and len(worlds) > 1
    cards = _cards() if side_by_side or max(worlds.values(), default=1) > 1 else []
    for run_dir, world in worlds.items():
        if cards and world > len(cards):
            raise LaunchError(
                f"{run_dir} is a run of {world} processes, and this machine shows {len(cards)} GPU(s): give "
                "launch.devices; a run that has begun keeps its number (launch.elastic=true changes it)"
            )
    print(f"{len(specs)} run(s), {len(specs) - len(todo)} finished already, under {root}/", flush=True)
    deadline = time.monotonic() + 60 * (settings.minutes or float("inf"))
    if side_by_side or any(world > 1 for world in worlds.values()):
        for world in sorted(set(worlds.values())):
            _workers([d for d, w in worlds.items() if w == world], world, settings.parallel, cards, deadline)
        for run_dir in worlds:  # what a run in this process says itself
            if metrics := (run_dir.result() or {}).get("metrics"):
                values = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in metrics.items())
                print(f"finished: {run_dir}: {values}")
    else:
        for i, run_dir in enumerate(worlds, 1):
            if len(worlds) > 1:
                print(f"[{i}/{len(worlds)}] ", end="", flush=True)
            train.run_all([run_dir], until=deadline)
            if train.stop_requested() or time.monotonic() > deadline:
                break
    asked = zip(prepared, specs, strict=True)
    unfinished = [d for d, spec in asked if d.state() != "finished" or d.lacks_noise(spec)]
    for run_dir in unfinished:
        state = run_dir.state().replace("finished", "finished, but its noise is not measured")
        print(": ".join(filter(None, (state, str(run_dir), run_dir.reason()))), file=sys.stderr)
    if unfinished and time.monotonic() > deadline:
        print(f"launch.minutes={settings.minutes:g} are over", file=sys.stderr)
    if unfinished:
        print("the same command again goes on with what is missing", file=sys.stderr)
    return not unfinished


def _workers(run_dirs: list[RunDir], world: int, parallel: int, cards: list[str], deadline: float) -> None:
    """Start up to `parallel` workers of `world` processes, each on its GPUs; at the deadline they save and end.

    They do so, too, when this process dies, however it dies: that ends their standard input. Each is a session of its
    own, so that a terminal's signals come to it once, through this process. Workers of one process share the list out
    by its locks. A group of processes ends with a run that fails, so it is given one.
    """
    from rich.progress import Progress

    count = min(parallel, len(run_dirs))
    queue = [run_dirs] * count if world == 1 else [[d] for d in run_dirs]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *start, "-m", "scaling_exps.train", "--attached", f"--since={time.time()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": threads(count * world)}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # torchrun kills after 30 s: a disk may be slower
    environment["WORLD_SIZE"] = "1"  # the tasks of an srun around this process are no group; torchrun sets its own
    workers: dict[int, subprocess.Popen[bytes]] = {}  # by the share of the cards that they have
    ends = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
    # the workers save and end when this process is told to
    before = {n: signal.signal(n, lambda number, _: sys.exit(128 + number)) for n in ends}
    try:
        with Progress(disable=not sys.stdout.isatty()) as bar:
            task = bar.add_task(f"{count} side by side", total=len(run_dirs))
            while (queue or any(w.poll() is None for w in workers.values())) and time.monotonic() <= deadline:
                for share in range(count):
                    if not queue or (share in workers and workers[share].poll() is None):
                        continue
                    members = queue.pop(0)
                    with contextlib.ExitStack() as stack:
                        log = None
                        if world > 1:  # torchrun's own report goes where ours does
                            with contextlib.suppress(OSError):
                                log = stack.enter_context(members[0].open_log())
                        words, env = [*command, *map(str, members)], {**environment, **_share(cards, share, world)}
                        workers[share] = subprocess.Popen(
                            words, env=env, stdin=subprocess.PIPE, stderr=log, start_new_session=True
                        )
                time.sleep(0.2)
                bar.update(task, completed=sum(d.result() is not None for d in run_dirs))
    finally:
        for w in workers.values():
            w.terminate()
        for w in workers.values():
            w.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _share(cards: list[str], share: int, world: int) -> dict[str, str]:
    """The environment that gives a worker `world` cards of its own; with more workers than cards some are shared."""
    own = [cards[(share * world + i) % len(cards)] for i in range(world)] if cards else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
