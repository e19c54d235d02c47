"""A worker: run folders in, one after another; signals, ranks, exit codes."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from scaling_exps import mirror
from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import BusyError, RunDir
from scaling_exps.train import loop, provenance, ranks
from scaling_exps.train.trainer import DivergedError

AGAIN = 75  # exit status of a worker that was stopped: its job is to be requeued
# Exit status of a rank whose run failed: srun reports the highest of all ranks, and those that it then ends have
# 128 + a signal. So a run that failed differs from one whose process was killed, which is worth another start.
FAILED = 200
LOST = 140  # of a rank that lost another one: as if it had been killed, too
_signals: list[int] = []  # received; the handler does nothing else


def run(run_dir: RunDir, until: float = float("inf"), since: float = float("inf")) -> str:
    """Run what the folder's run.json says, or go on with it, to its end, holding its lock. Every rank calls this.

    Whatever raises on the way ends in result.json, with its reason and traceback.

    Args:
        until: save and stop after this time (time.monotonic), as after a signal.
        since: leave it alone if it failed after this time (seconds of the epoch).

    Returns:
        How it ended: `finished`, `failed`, or `stopped`.

    Raises:
        BusyError: another process works on it, or did `since`.
        PlanError: its run.json cannot be read.
        OSError: it cannot be locked; nothing was written.
    """
    spec = run_dir.spec()
    world, rank = ranks.world()
    with contextlib.ExitStack() as stack:
        refusal: BusyError | OSError | None = None
        try:
            if rank == 0:
                stack.enter_context(run_dir.lock())
                if _failed(run_dir, since):  # between the look and the lock
                    raise BusyError(f"{run_dir} was run by another process, and failed")
        except (BusyError, OSError) as e:
            refusal = e
        if ranks.maximum(refusal is not None):  # all ranks know it, or the others wait for rank 0
            raise refusal or BusyError(f"{run_dir} is being run by another process")
        finished = (run_dir.result() or {}).get("status") == "finished"
        if finished and not run_dir.lacks_noise(spec):
            return "finished"
        if rank == 0:
            stack.enter_context(mirror.live(run_dir, spec))  # it ends after result.json is written
        try:
            if finished:
                result = loop.measure_kept(spec, run_dir)
            else:
                if rank == 0:
                    run_dir.clear_result()  # at once: a job that is requeued now is not one whose run failed
                    event = {"event": "start", "job": provenance.job(), "host": platform.node()}
                    run_dir.append_event({**event, **provenance.code(run_dir)})
                result = loop.fit(spec, run_dir, lambda: bool(_signals) or time.monotonic() > until)
            if rank == 0:
                run_dir.write_result(result)
            return "finished"
        except loop.Stopped:
            if rank == 0:
                print(f"run {spec.run_id} saved and stopped; the same command goes on with it", flush=True)
            return "stopped"
        except Exception as e:
            if world > 1 and ranks.lost(e):
                traceback.print_exc()
                print(f"run {spec.run_id}: another process of it is gone ({e})", file=sys.stderr, flush=True)
                raise SystemExit(LOST) from e
            _fail(spec, run_dir, e, finished)
            if world > 1:
                raise SystemExit(FAILED) from e  # the others wait in a collective; the launcher ends them
            return "failed"


def _fail(spec: RunSpec, run_dir: RunDir, e: Exception, finished: bool) -> None:
    """Say why the run failed, on the terminal (with the traceback where nobody refused) and in its result.json.

    Of a finished run only a measurement failed: it stays finished.
    """
    refusal = isinstance(e, ValueError) and type(e).__module__.startswith("scaling_exps")
    reason = str(e) if refusal else f"{type(e).__name__}: {e}"
    trace = "".join(traceback.format_exception(e))
    if not refusal and not isinstance(e, OSError):
        print(trace, file=sys.stderr)
    print(f"run {spec.run_id} failed: {reason}", file=sys.stderr)
    if not finished:
        result = {"status": "failed", "reason": reason, "diverged": isinstance(e, DivergedError), "traceback": trace}
        with contextlib.suppress(OSError):
            run_dir.write_result({**result, **provenance.environment()})


def run_all(
    run_dirs: list[RunDir],
    *,
    log: bool = False,
    since: float = float("inf"),
    until: float = float("inf"),
    patience: float = 0,
) -> bool:
    """Run each directory that has work left and is not held by somebody else: workers may share one list.

    Args:
        log: send a run's output to its log.txt.
        since, until: as in `run`.
        patience: seconds to wait for a run that is held, or not there. A requeued job may start while its last process
            still dies; a file system may show files late on other nodes.

    Returns:
        Whether every run that was done here finished.
    """
    good = True
    ranks.keep_memory()
    with _handlers():
        for run_dir in run_dirs:
            first, work_left, until_there = ranks.world()[1] == 0, False, time.monotonic() + patience
            while not run_dir.exists and time.monotonic() < until_there:
                time.sleep(0.2)
            if first:
                work_left = _work_left(run_dir, since, patience)
                if patience and (who := run_dir.holder()):
                    print(f"{run_dir} is held by {who}", file=sys.stderr)
                    good = False
            if not ranks.maximum(work_left):
                continue
            with _output_to(run_dir) if log and first else contextlib.nullcontext():
                try:
                    how = run(run_dir, until, since)
                except BusyError:
                    continue
                except (PlanError, OSError) as e:
                    print(e, file=sys.stderr)
                    how = "failed"
            good &= how == "finished"
            if how == "stopped":
                break
    return good


def _failed(run_dir: RunDir, since: float) -> bool:
    """Whether the run failed after that time."""
    result = run_dir.result() or {}
    ended = result.get("ended")
    return result.get("status") == "failed" and isinstance(ended, int | float) and ended >= since


def _work_left(run_dir: RunDir, since: float, patience: float) -> bool:
    until = time.monotonic() + patience
    while (state := run_dir.state()) == "running" and time.monotonic() < until:
        time.sleep(0.2)
    if state == "failed":  # a requeued job is not a person who tries again
        requeued = provenance.job() and int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return not requeued and not _failed(run_dir, since)
    if state == "finished":
        with contextlib.suppress(PlanError):
            return run_dir.lacks_noise(run_dir.spec())
        return False
    return state != "running"


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C leave a note, which the ranks read at a step's boundary.

    The third Ctrl-C stops a process at once, without saving. SIGHUP stays ignored where nohup ignores it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def note(number: int, frame: FrameType | None) -> None:
        _signals.append(number)
        if number == signal.SIGINT:
            if _signals.count(number) > 2:
                signal.default_int_handler(number, frame)
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving at the next step; the third Ctrl-C stops without saving\n")
        if number == signal.SIGHUP:  # the terminal is gone: what is printed from now on would be an error
            for fd in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, *hangup]
    before = {n: signal.signal(n, note) for n in numbers}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def stop_requested() -> bool:
    """Whether a signal has asked this process to save and stop; KeyboardInterrupt if it was Ctrl-C."""
    if signal.SIGINT in _signals:
        raise KeyboardInterrupt
    return bool(_signals)


def _stop_at_end_of_input() -> None:
    """Save and stop when standard input ends."""
    while os.read(0, 512):
        pass
    _signals.append(signal.SIGTERM)


def _output_to(run_dir: RunDir) -> contextlib.ExitStack:
    """Into the run's log.txt; where that cannot be written, onto the terminal."""
    stack = contextlib.ExitStack()
    try:
        log = stack.enter_context(run_dir.open_log())
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
    except OSError as e:
        print(f"{run_dir} has no log: {e}", file=sys.stderr)
    return stack


def work(
    run_dirs: list[Path], since: float = float("inf"), earlier: list[int] | None = None, attached: bool = False
) -> int:
    """A worker process: join the group, run the directories, and say by the exit status how it went.

    Args:
        since: as in `run`.
        earlier: signals that came before this module was loaded.
        attached: save and stop when standard input, a pipe of the process that started this one, ends: it is gone.

    Returns:
        0: done. 1: a run failed. AGAIN: stopped by a signal; start it again.
    """
    _signals.extend(earlier or [])
    in_job = provenance.job() is not None and not attached  # a task of the run's own job
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if attached:
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    status: list[int] = []
    atexit.register(_leave, status)
    try:
        with _handlers(), ranks.process_group():
            good = run_all([RunDir(d) for d in run_dirs], log=True, since=since, patience=60 if in_job else 0)
            stopped = ranks.maximum(len(_signals)) > 0 and not good
            rank = ranks.world()[1]
    except BaseException as e:
        status.append(e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1)
        raise
    code = AGAIN if stopped else 0 if good else 1
    if stopped and in_job:  # rank 0 alone says so, last: srun ends the others as soon as one exits badly
        code = 0 if rank else code
        time.sleep(0 if rank else 1)
    status.append(code)
    return code


def _leave(status: list[int]) -> None:
    """End the process before the interpreter shuts down; registered first, so the last of the exit handlers.

    DistributedDataParallel keeps gloo's threads alive after its group is destroyed (seen with torch 2.14), and one that
    frees a tensor in the shutdown aborts the process (pytorch/pytorch#190489): a finished run would count as killed.
    """
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])
