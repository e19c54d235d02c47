"""A panel of the paper's Fig. 1 on one GPU, in pieces of minutes: each call goes on where the last one stopped.

    python scripts/fig1_panel.py experiment=fig1_vgg16_adam [key=value ...] [--pack 6] [--minutes 9]

The words are scalerun's. Unless they say otherwise, `precision=bfloat16 launch.compile=true launch.devices=1
checkpoint.minutes=2` are added. A piece plans and checks the whole list, keeps `--pack` ordinary workers (the training
loop, one run a process, all on the same card) busy for `--minutes`, tells them to save and stop, and prints what they
did. Exit status:

    0   every run is finished
    75  all is well, and another piece is needed: give the same command again
    1   a run failed, or its worker died; the table says which and why. The same command tries it again
    2   the words or options cannot be done; nothing was started

so that the loop that ends both when all is done and when something is wrong is

    code=75; while [ $code -eq 75 ]; do python scripts/fig1_panel.py experiment=fig1_vgg16_adam; code=$?; done

Why several runs at once: a step of VGG-16 at batch 256 is 0.48 TFLOP, half a millisecond of an H100 at its peak, while
the host needs about a millisecond or more to issue the hundreds of kernels of a step (an estimate, not measured here).
One run would leave most of the card idle; six fill each other's gaps. Without CUDA MPS the processes take turns on the
card, with its daemon running (nvidia-cuda-mps-control) their kernels overlap; the script uses it if it is there and
starts none. Each process holds its own copy of the data, the network and about half a GiB of CUDA: lower --pack if
the card's memory is short (a run that finds none fails, and says so).

Begun runs come first, and among equals the longest, so that the pack stays full to the end. No run is started in the
last tenth of a piece. A run that another process holds is left alone. Whatever ends this script, and however, its
workers save and stop (Linux tells them of its death); if they are killed too, what is lost is the time since their
last checkpoint, never the run: it goes on to the same bits. What torch.compile made is kept in RUNS_DIR/.compiled,
unless TORCHINDUCTOR_CACHE_DIR names another folder, so that later pieces start sooner; and unless you set it to 0,
TORCHINDUCTOR_DETERMINISTIC=1 has it choose kernels by rule, not by timing, so that every piece runs the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scaling_exps import config, plan, records  # noqa: E402
from scaling_exps.launch import directories  # noqa: E402
from scaling_exps.plan import RunSpec  # noqa: E402

AGAIN = 75  # as scaling_exps.train's, which is not imported before the words are checked
WORDS = {"precision": "bfloat16", "launch.compile": "true", "launch.devices": "1", "checkpoint.minutes": "2"}
PEAKS = {  # dense bfloat16 FLOP/s by the name that CUDA gives (NVIDIA's data sheets)
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
ENVIRONMENT = dict(os.environ)  # before torch is imported, which adds to it
LAST_STARTS = 0.9  # of a piece: later, starting and compiling would cost more than the run gains
TRIES = 3  # starts of one run in a piece, where its worker ended without a reason
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class PanelError(ValueError):
    """The words or options cannot be done; nothing was started."""


@dataclass
class Run:
    """A planned run in this piece. Samples are those of its newest checkpoint."""

    spec: RunSpec
    folder: Path
    before: int = 0  # samples at the start of the piece
    after: int = 0  # and at its end
    seconds: float = 0.0  # of its workers in this piece, start-up included
    tries: int = 0
    last: bool = False  # it was stopped because the piece was over
    wrong: str = ""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    @property
    def total(self) -> int:
        return self.spec.samples(self.spec.science.steps)

    @property
    def left(self) -> int:
        """How long it still takes, in micro-batches: an optimizer step counts like one more (a guess)."""
        steps = (self.total - self.before) // self.spec.samples(1)
        return steps * (self.spec.placement.accumulation + 1)


# ---- a worker ----


def work(run_dir: str, parent: str) -> int:
    """One run. Signals that come while torch is loaded are kept for the loop, so each start does at least one step."""
    early: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, _: early.append(n))
    with contextlib.suppress(AttributeError, OSError):  # Linux: SIGTERM when the script dies, even of SIGKILL
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before
        return AGAIN
    from scaling_exps import train

    return train.work([Path(run_dir)], early)


# ---- the piece ----


def planned(words: list[str]) -> tuple[list[RunSpec], Path] | None:
    """The runs, and the folder they lie in; None where Hydra only printed something (--cfg)."""
    given = {w.split("=", 1)[0] for w in words}
    configs = config.compose([*words, *(f"{k}={v}" for k, v in WORDS.items() if k not in given)])
    if not configs:
        return None
    if isinstance(configs[0].launch, config.SlurmLaunch):
        raise PanelError("launch=slurm: this script starts its workers itself; run it inside a job, with launch=local")
    specs = plan.plan(configs)
    if several := [s.run_id for s in specs if s.placement.world_size != 1]:
        raise PanelError(f"run {several[0]} is planned for several devices; a panel runs on one: launch.devices=1")
    return specs, Path(configs[0].runs_dir)


def prepare(specs: list[RunSpec], root: Path) -> list[Run]:
    """Check data and networks, make the directories, and see how far the runs are."""
    from scaling_exps import train

    train.preflight([s for s in specs if directories.known_state(root / s.run_id) != "finished"])
    folders = directories.write(specs, root)
    runs = [Run(records.read_spec(d), d.absolute()) for d in folders.values()]
    for run in runs:
        if run.spec.placement.world_size != 1:
            raise PanelError(f"{run.folder} was begun on several devices; go on with scalerun, or in another runs_dir=")
        run.before = run.after = samples(run)
    return runs


def samples(run: Run) -> int:
    """Samples in its newest readable checkpoint."""
    import torch

    if records.state(run.folder) == "finished":
        return run.total
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        with contextlib.suppress(Exception):  # absent or damaged: whatever torch raises, the one before counts
            state = torch.load(run.folder / name, map_location="cpu", mmap=True, weights_only=True)
            return run.spec.samples(int(state["step"]))
    return 0


def piece(runs: list[Run], pack: int, until: float, last_start: float, grace: float, stop: list[int]) -> None:
    """Keep `pack` workers busy until `until` (time.monotonic) or a signal, then let them save.

    Args:
        runs: all of the panel; those that are not finished are worked on.
        last_start: time.monotonic after which none is started.
        grace: seconds that they have to save, before they are killed.
        stop: signals that have come.
    """
    todo = [r for r in runs if records.state(r.folder) != "finished"]
    todo.sort(key=lambda r: (r.before == 0, -r.left))
    environment = environment_of(runs, pack)
    running: list[Run] = []

    def fill() -> None:
        for run in list(todo):
            if len(running) < pack and records.holder(run.folder) is None:
                todo.remove(run)
                if records.state(run.folder) != "finished":  # by another process
                    start(run, environment)
                    running.append(run)

    try:
        fill()  # however short the piece is: every worker that is started does at least one step
        while (todo or running) and not stop and time.monotonic() < until:
            for run in [r for r in running if r.process is not None and r.process.poll() is not None]:
                running.remove(run)
                if ended(run):
                    todo.insert(0, run)
            if time.monotonic() < last_start:
                fill()
            elif not running:
                break
            time.sleep(0.1)
    finally:
        end(running, grace)


def environment_of(runs: list[Run], pack: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // pack))
    environment = {"OMP_NUM_THREADS": threads, **ENVIRONMENT}
    if any(r.spec.placement.compile for r in runs):
        kept = str(runs[0].folder.parent / ".compiled")
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": kept,
            "TORCHINDUCTOR_COMPILE_THREADS": threads,
            "TORCHINDUCTOR_DETERMINISTIC": "1",  # sums are not ordered by which kernel was faster on a busy card
            **environment,
        }
    return environment


def start(run: Run, environment: dict[str, str]) -> None:
    argv = [sys.executable, str(Path(__file__).resolve()), "--work", str(run.folder), str(os.getpid())]
    run.tries, run.started = run.tries + 1, time.monotonic()
    # a session of its own: Ctrl-C is this script's, which then stops its workers as at the end of a piece
    run.process = subprocess.Popen(argv, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
    print(f"started   {name(run)}", flush=True)


def ended(run: Run) -> bool:
    """Note how its worker ended by itself; True if it is to be started again."""
    assert run.process is not None
    run.seconds += time.monotonic() - run.started
    state, code = records.state(run.folder), run.process.returncode
    if state == "failed":
        run.wrong = directories.reason(run.folder)
    elif state != "finished":
        # held by another process: once that lets go; told to stop by somebody else, or locked out by a glance: at once
        if state == "running" or (code in (0, AGAIN) and run.tries < TRIES):
            return True
        run.wrong = f"its worker ended with status {code}: {directories.reason(run.folder)}"
    print(f"{'failed' if run.wrong else state:<9} {name(run)}", flush=True)
    return False


def end(running: list[Run], grace: float) -> None:
    """Tell every worker to save and stop; kill those that have not done so after `grace` seconds."""
    limit = time.monotonic() + grace
    while alive := [r for r in running if r.process is not None and r.process.poll() is None]:
        for run in alive:
            assert run.process is not None
            if time.monotonic() < limit:
                run.process.terminate()  # every second: nothing is lost by a signal that comes at a bad moment
            else:
                run.process.kill()
                print(f"killed    {name(run)}: not saved within {grace:g} s; it goes on from its last checkpoint")
        for _ in range(10):
            if all(r.process is None or r.process.poll() is not None for r in alive):
                break
            time.sleep(0.1)
    for run in running:
        assert run.process is not None
        run.seconds += time.monotonic() - run.started
        run.last = True
        code = run.process.returncode
        if records.state(run.folder) == "failed":
            run.wrong = directories.reason(run.folder)
        elif code not in (0, AGAIN, -signal.SIGTERM, -signal.SIGKILL) and records.state(run.folder) != "finished":
            run.wrong = f"its worker ended with status {code}: {directories.reason(run.folder)}"


# ---- what it did ----


def name(run: Run) -> str:
    s = run.spec.science
    return f"{run.spec.run_id}  {s.model['name']} {s.optimizer} batch {s.batch} seed {s.seed}"


def flop_per_sample(spec: RunSpec) -> float:
    """Multiplications and additions of a training sample, forward and backward, counted on the real network."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from scaling_exps import train

    s, n = spec.science, 2  # examples: BN wants more than one
    net = train.build_net(spec).to("meta")  # shapes without numbers
    if s.dataset["kind"] == "tokens":
        x = y = torch.zeros(n, s.dataset["context"], dtype=torch.long, device="meta")
    else:
        height, width, channels = s.dataset["shape"]
        x = torch.zeros(n, channels, height, width, device="meta")
        y = torch.zeros(n, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        train.mean_loss(net(x), y).backward()
    return counter.get_total_flops() / n


def work_done(runs: list[Run]) -> float:
    """FLOP of the training samples of this piece."""
    known: dict[str, float] = {}
    done = 0.0
    for run in (r for r in runs if r.after > r.before):
        s = run.spec.science
        kind = repr((s.model, s.dataset, s.freeze_last))
        known[kind] = known.get(kind) or flop_per_sample(run.spec)
        done += known[kind] * (run.after - run.before)
    return done


def steady(run: Run) -> float | None:
    """Samples/s of the loop alone: between the first and the last train record of this piece; None without two."""
    mine = [r for r in records.read_records(run.folder) if r["kind"] == "train" and r["samples"] > run.before]
    seconds = mine[-1]["seconds"] - mine[0]["seconds"] if mine else 0.0
    return (mine[-1]["samples"] - mine[0]["samples"]) / seconds if seconds > 0 else None


def card() -> tuple[str, float | None]:
    """The device's name, and its peak bfloat16 FLOP/s where the table has it."""
    import torch

    if not torch.cuda.is_available():
        return "this CPU", None
    device = torch.cuda.get_device_name()
    return device, PEAKS.get(device)


def report(runs: list[Run], seconds: float, peak: float | None) -> int:
    """Print the table; returns the exit status."""
    print(f"\n{'run':<12} {'batch':>6} {'seed':>4}  {'state':<11} {'done':>7} {'samples/s':>10} {'steady':>10}")
    for run in runs:
        s, rate = run.spec.science, (run.after - run.before) / run.seconds if run.seconds else None
        state = "failed" if run.wrong else records.state(run.folder)
        print(
            f"{run.spec.run_id:<12} {s.batch:>6} {s.seed:>4}  {state:<11} {run.after / run.total:>7.1%} "
            f"{_rate(rate):>10} {_rate(steady(run) if run.seconds else None):>10}"
            + (f"  {run.wrong}" if run.wrong else "")
        )
    finished = sum(records.state(r.folder) == "finished" for r in runs)
    together = sum(r.after - r.before for r in runs) / seconds
    left = sum(r.total - r.after for r in runs)
    print(f"\n{len(runs)} runs: {finished} finished, {len(runs) - finished} unfinished")
    print(f"this piece: {seconds:.0f} s, {together:,.0f} samples/s together (start-up, compiling, evaluation included)")
    at_end = [rate for r in runs if r.last and (rate := steady(r)) is not None]
    if at_end:
        print(f"the {len(at_end)} that ran to its end: {sum(at_end):,.0f} samples/s steady (of training alone)")
    if together:
        device, known = card()
        rate = work_done(runs) / seconds
        half = all(r.spec.science.precision == "bfloat16" for r in runs)
        share = peak or (known if half else None)
        print(
            f"training FLOP: {rate:.3g}/s on {device}, "
            + (f"{rate / share:.1%} of {share:.3g}" if share else "share of its peak not known (--peak gives one)")
        )
    if left:
        minutes = left / together / 60 if together else 0.0
        time_left = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
        print(f"left: {left:,} samples" + (f", {time_left} at this rate (while the pack is full)" if together else ""))
    if any(r.wrong for r in runs):
        return 1
    return 0 if finished == len(runs) else AGAIN


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="fig1_panel.py", usage="python scripts/fig1_panel.py key=value ... [options]", allow_abbrev=False,
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--pack", type=int, default=6, metavar="N", help="runs at once (default: 6)")
    parser.add_argument("--minutes", type=float, default=9, metavar="M", help="of a piece (default: 9)")
    parser.add_argument(
        "--grace",
        type=float,
        default=45,
        metavar="SECONDS",
        help="to save after the minutes, then killed (default: 45)",
    )
    parser.add_argument(
        "--peak", type=float, metavar="FLOP/S", help="of the card, if the table of this script lacks it or is wrong"
    )
    options, words = parser.parse_known_args(argv)
    for key, least in (("pack", 1), ("minutes", 0), ("grace", 0), ("peak", 0)):
        value = getattr(options, key)
        if value is not None and not (value >= 1 if least else 0 < value < math.inf):
            raise PanelError(f"--{key} {value:g}: give {'a number >= 1' if least else 'a finite number > 0'}")
    return options, words


def main(argv: list[str]) -> int:
    began = time.monotonic()
    stop: list[int] = []
    try:
        options, words = _options(argv)
        found = planned(words)
        if found is None:
            return 0
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, lambda n, _: stop.append(n))
        runs = prepare(*found)
    except ValueError as e:  # every refusal is one, scalerun's too
        print("\n".join(f"fig1_panel: {line}" for line in str(e).splitlines()), file=sys.stderr)
        return 2
    length = 60 * options.minutes
    piece(runs, options.pack, began + length, began + LAST_STARTS * length, options.grace, stop)
    seconds = time.monotonic() - began
    for run in runs:
        run.after = max(run.before, samples(run)) if run.seconds else samples(run)
    return report(runs, seconds, options.peak)


def _main() -> int:
    argv: list[Any] = sys.argv[1:]
    return work(*argv[1:]) if argv[:1] == ["--work"] else main(argv)


if __name__ == "__main__":
    raise SystemExit(_main())
