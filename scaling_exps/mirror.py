"""Mirrors of records.jsonl: wandb, live while it can be reached, else replayed later by `scalerun sync`; and files.

Line i of records.jsonl is the row of wandb's step i, with the training step and the clock as columns. So what wandb has
is known from its own count of rows, and a replay sends exactly the lines that it lacks, however often it is asked.

metrics.csv and TensorBoard's events lie in the run's folder. Each process of a run writes them anew from the records,
so they hold every record once, however often the run was stopped.

A mirror is a process of its own, which reads the run's folder: wandb is neither imported nor waited for where a run
is trained. It follows the run until its standard input ends, so it also ends when the run's process is killed.

    python -m scaling_exps.mirror live|sync|files RUN_DIR SECONDS
"""

from __future__ import annotations

import atexit
import configparser
import contextlib
import csv
import io
import netrc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import BusyError, RunDir

GROUPS = ("train", "eval", "noise", "event")
DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # of wandb 0.31, and of the versions before
INTERVAL = 2.0  # seconds between two looks for new records
RETRY = 20.0  # seconds from a connection that failed to the next attempt
CONNECT = 30.0  # seconds that the server has to answer at the start
PATIENCE = {"live": 20.0, "files": 20.0, "sync": 600.0}  # seconds for what is left, when the run has ended
LATER = "`scalerun sync` uploads what is missing"


class MirrorError(ValueError):
    """Nothing can be uploaded; the message says why and what to do."""


# ---- where runs are trained, and where `scalerun sync` is typed: no wandb ----


@contextlib.contextmanager
def live(run_dir: RunDir, spec: RunSpec) -> Iterator[None]:
    """Mirror the run while it is trained, as `logger` says; wandb where it is online. Each tells of a trouble once.

    On leaving, the last records have PATIENCE seconds to arrive, and result.json says how the run ended.
    """
    with contextlib.ExitStack() as stack:
        if "wandb" in spec.loggers and online():
            stack.enter_context(_mirroring("live", run_dir, "wandb", LATER))
        if {"csv", "tensorboard"} & set(spec.loggers):
            stack.enter_context(_mirroring("files", run_dir, "logger", "records.jsonl has them all"))
        yield


@contextlib.contextmanager
def _mirroring(how: str, run_dir: RunDir, name: str, consolation: str) -> Iterator[None]:
    try:
        mirror = subprocess.Popen(_command(how, run_dir), stdin=subprocess.PIPE, start_new_session=True, **_OUTPUT)
    except OSError as e:
        print(f"{name} is off for this run ({e}); {consolation}", file=sys.stderr)
        yield
        return
    assert mirror.stdin is not None and mirror.stdout is not None
    said, output = [], mirror.stdout

    def print_lines() -> None:
        for line in output:
            said.append(line)
            print(line, end="", file=sys.stderr, flush=True)

    relay = threading.Thread(target=print_lines, daemon=True)
    relay.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            mirror.stdin.close()  # so it learns that the run has ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            mirror.wait(PATIENCE[how] + 5 if run_dir.result() else 5)  # a run that was stopped must make way
        mirror.kill()
        relay.join(1)
        if mirror.wait() and not said:
            print(f"{name} did not take all records in time; {consolation}", file=sys.stderr)


def online() -> bool:
    """Whether runs are to be mirrored as they go: WANDB_MODE says so, or nothing and somebody is logged in."""
    return os.environ.get("WANDB_MODE", "").lower() in ("", "online", "shared", "run") and logged_in()


def logged_in() -> bool:
    """Whether there are credentials for wandb, as wandb looks for them; whether they are valid, the server knows."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb").expanduser()
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read([folder / "settings", Path("wandb", "settings")])
    if settings.get("default", "api_key", fallback=""):
        return True
    server = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="")
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser())
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return False
    keys = [known.authenticators(host) for host in ([urlsplit(server).netloc] if server else DEFAULT_HOSTS)]
    return any(key and key[2] for key in keys)


def sync(roots: list[Path], dry_run: bool = False) -> int:
    """Replay the records of the runs under `roots` that were made with logger=wandb; returns the exit code.

    A run that is mirrored at this moment, live or by another `sync`, is left to that one.

    Raises:
        MirrorError: no such folder, nothing to upload, or nobody is logged in.
    """
    todo = []
    for root in roots:
        if not root.is_dir():
            raise MirrorError(f"no folder {str(root)!r}; give folders of runs (runs_dir, by default ./runs)")
        for run_dir in [RunDir(root)] if RunDir(root).exists else RunDir.under(root):
            try:
                if "wandb" in run_dir.spec().loggers and run_dir.records().rows:
                    todo.append(run_dir)
            except PlanError as e:
                print(f"scalerun: {e}", file=sys.stderr)
    if not todo:
        raise MirrorError(f"nothing to upload under {', '.join(map(str, roots))}: no records of runs with logger=wandb")
    if dry_run:
        for run_dir in todo:
            print(f"{run_dir}: {len(run_dir.records().rows)} records")
        return 0
    if not logged_in():
        raise MirrorError("nobody is logged in to wandb: `wandb login`, or set WANDB_API_KEY")
    with ThreadPoolExecutor(4) as pool:
        return max(pool.map(_replay, todo))


def _replay(run_dir: RunDir) -> int:
    done = subprocess.run(_command("sync", run_dir), stdin=subprocess.DEVNULL, **_OUTPUT)
    said = done.stdout or f"{run_dir}: not uploaded, the mirror ended with status {done.returncode}\n"
    print(said, end="", flush=True)
    return int(done.returncode != 0)


_OUTPUT: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}


def _command(how: str, run_dir: RunDir) -> list[str]:
    return [sys.executable, "-m", "scaling_exps.mirror", how, str(run_dir), str(PATIENCE[how])]


# ---- the mirror's own process ----


def main(how: str, path: str, patience: float) -> int:
    """Mirror one run: `live` until standard input ends, `sync` what there is; and `patience` seconds longer at most."""
    for name in ("WANDB_SERVICE", "WANDB_SILENT"):  # a program around this one; what wandb prints is read below
        os.environ.pop(name, None)
    run_dir, over = RunDir(path), threading.Event()
    if how == "files":
        threading.Thread(target=_watch, args=(over, patience), daemon=True).start()
        return _files(run_dir, over)
    try:
        folder = tempfile.mkdtemp(prefix="scalerun-wandb-")
    except OSError as e:
        print(f"{run_dir}: wandb needs a folder for its files ({e}; set TMPDIR); {LATER}")
        return 1
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # before wandb's own handlers, so after them
    threading.Thread(target=_watch, args=(over, patience, folder), daemon=True).start()
    said = False
    while True:
        try:
            with run_dir.lock("wandb.lock"), contextlib.redirect_stderr(io.StringIO()) as printed:
                count = _follow(run_dir, how, folder, over, patience)
            if "Fatal error" in printed.getvalue():  # so does wandb's core say that it gave up
                raise MirrorError("the server refuses records")
            if how == "sync":
                print(f"{run_dir}: {count}")
            return 0
        except BusyError:
            if how == "sync":
                print(f"{run_dir}: another process mirrors it at this moment")
                return 0
            if over.wait(1):  # it may be the mirror of this run's last process, which was killed
                return 1
        except Exception as e:
            if not said:
                why = " ".join(f"{type(e).__name__}: {e}".split())
                print(f"{run_dir}: wandb is not reached ({why[:300]}); {LATER}", flush=True)
            said = True
            if over.wait(RETRY):
                return 1
            if wandb := sys.modules.get("wandb"):
                wandb.teardown()  # else its core holds this id to be in use, for ever


def _watch(over: threading.Event, patience: float, folder: str = "") -> None:
    """Set `over` when standard input ends, and end this process `patience` seconds later, whatever wandb waits for."""
    while os.read(0, 512):
        pass
    over.set()
    time.sleep(patience)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _follow(run_dir: RunDir, how: str, folder: str, over: threading.Event, patience: float) -> str:
    """Send the lines that wandb lacks, until the run is over and all are sent; then say how it ended.

    Returns:
        How many lines were sent.

    Raises:
        Exception: whatever wandb, or the network below it, raises.
    """
    spec = run_dir.spec()
    run = _init(spec, folder, 0.75 * patience)
    sent, known = 0, run.starting_step
    last = [run.summary.get(k) for k in ("_step", "trainer/step", "samples")]
    ended = False
    try:
        while not ended:
            ended = over.wait(INTERVAL)  # first: what was written before the end is read after it
            records = run_dir.records()
            for line, record in zip(records.lines, records.rows, strict=True):
                if line == last[0] and [record["step"], record["samples"]] != last[1:]:
                    raise MirrorError(
                        f"{run.url} holds other records, of a run that measured at other steps; choose another project"
                    )
                if line >= known:
                    run.log(_columns(record), step=line, commit=True)
                    sent, known = sent + 1, line + 1
    except Exception:
        with contextlib.suppress(Exception):
            run.finish(exit_code=1)
        raise
    result = run_dir.result() or {}
    finished = result.get("status") == "finished"
    trains_on = not result and how == "sync" and run_dir.state() == "running"
    if finished:
        run.summary.update(_final(run_dir, spec, result["metrics"]))
    elif not result and not trains_on:
        run.mark_preempting()  # it was stopped, and may go on
    run.finish(exit_code=0 if finished or trains_on else 1)
    return f"{sent} of {len(records.rows)} records uploaded"


def _files(run_dir: RunDir, over: threading.Event) -> int:
    """Write metrics.csv and the events of TensorBoard, each anew, and go on with them until the run is over."""
    spec, known, ended, columns = run_dir.spec(), 0, False, list[str]()
    try:
        board = _board(run_dir, spec) if "tensorboard" in spec.loggers else None
        while not ended:
            ended = over.wait(INTERVAL)  # first: what was written before the end is read after it
            rows = run_dir.records().rows
            for record in rows[known:]:
                if board is not None:
                    board(record)
            if "csv" in spec.loggers and len(rows) != known:
                columns, before = list(dict.fromkeys(k for r in rows for k in r)), columns
                text = io.StringIO()
                table = csv.DictWriter(text, columns, lineterminator="\n")
                if columns == before:
                    table.writerows(rows[known:])
                    run_dir.append_text("metrics.csv", text.getvalue())
                else:
                    table.writeheader()
                    table.writerows(rows)
                    run_dir.write_text("metrics.csv", text.getvalue())
            known = len(rows)
        return 0
    except (OSError, ImportError) as e:
        print(f"{run_dir}: its records are not mirrored ({type(e).__name__}: {e}); records.jsonl has them", flush=True)
        return 1


def _board(run_dir: RunDir, spec: RunSpec) -> Callable[[dict[str, Any]], None]:
    """What puts a record into the run's events, of which those of an earlier process are removed; steps are samples."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for old in run_dir.path.glob("events.out.tfevents.*"):
        old.unlink(missing_ok=True)
    writer = EventFileWriter(str(run_dir.path), flush_secs=round(INTERVAL))
    atexit.register(writer.close)

    def put(record: dict[str, Any]) -> None:
        numbers = {k: v for k, v in _columns(record).items() if "/" in k and isinstance(v, int | float)}
        values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        writer.add_event(Event(wall_time=time.time(), step=record["samples"], summary=Summary(value=values)))

    return put


def _columns(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a row: `train/loss`, `noise/full/b_noise`, ... over `samples`; the kinds share no name."""
    group = "/".join(str(record[k]) for k in ("kind", "method") if k in record)
    metrics = {f"{group}/{k}": v for k, v in record.items() if k not in ("kind", "step", "samples", "t", "method")}
    return {"samples": record["samples"], "t": record.get("t"), "trainer/step": record["step"]} | metrics


def _final(run_dir: RunDir, spec: RunSpec, metrics: dict[str, float]) -> dict[str, float]:
    """The final metrics, and their gaps to the base run of the same seed where that is finished beside this run."""
    base_id = spec.arms[0].base_run_id
    base = (RunDir(run_dir.path.parent / base_id).result() or {}) if base_id != spec.run_id else {}
    theirs = base.get("metrics", {}) if base.get("status") == "finished" else {}
    gaps = {f"gap/{k}": v - theirs[k] for k, v in metrics.items() if k in theirs}
    return {f"final/{k}": v for k, v in metrics.items()} | gaps


def _init(spec: RunSpec, folder: str, finish_timeout: float) -> Any:
    """wandb's run of this id, made or resumed.

    Runs lie there as they are compared: the group is the experiment, the job type the arm; batch, rule, kappa, seed and
    the hyperparameters are columns.
    """
    import wandb

    science, arm, described = spec.science, spec.arms[0], spec.to_json()
    rule, job = ("base", "base") if arm.role == "base" else (arm.rule, f"{arm.rule} x{arm.kappa:g}")
    job += " ramp" if science.ramp else ""
    job += f" svag {science.svag}" if science.svag > 1 else ""
    named = {"model": science.model.name, "dataset": science.dataset.name, "optimizer": science.optimizer, "rule": rule}
    numbers = {"batch": science.batch, "kappa": arm.kappa, "svag": science.svag, "seed": science.seed}
    tags = [spec.experiment, *named.values(), f"batch {science.batch}", f"seed {science.seed}", *spec.wandb.tags]
    run = wandb.init(
        id=spec.run_id,
        name=f"{science.model.name} {job} batch {science.batch} seed {science.seed}",
        project=spec.wandb.project or os.environ.get("WANDB_PROJECT", "scalerun"),
        entity=spec.wandb.entity,
        group=spec.experiment or f"{science.model.name}-{science.dataset.name}-{science.optimizer}",
        job_type=job,
        tags=list(dict.fromkeys(str(t)[:64] for t in tags if t)),
        config={
            **named,
            **numbers,
            **described["science"]["hyper"],
            **{k: described[k] for k in ("science", "arms", "placement", "notes", "margin")},
        },
        dir=folder,  # none of wandb's files lies in the run's folder: records.jsonl is what is kept
        resume="allow",
        reinit="create_new",
        mode="online",
        settings=wandb.Settings(
            program="scalerun",
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_skip_transaction_log=True,
            x_file_stream_retry_max=10_000,
            x_file_stream_retry_wait_max_seconds=30,
            init_timeout=CONNECT,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,
        ),
    )
    for group in GROUPS:
        run.define_metric(f"{group}/*", step_metric="samples")
    return run


if __name__ == "__main__":
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # wandb's core prints, too
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
