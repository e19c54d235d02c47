"""Runs on a SLURM cluster, through submitit: job arrays of equal resources, one srun task a device.

What a job holds is the name of `work` and a run's directory. Everything else is read from that directory when the
job starts, so that a requeued job, or one that was submitted twice, goes on with what is there.
"""

from __future__ import annotations

import bisect
import re
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from scaling_exps.config import SlurmLaunch
from scaling_exps.launch import folders, overview, queue
from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import RunSpec
from scaling_exps.records import BusyError, RunDir

if TYPE_CHECKING:
    from submitit import SlurmExecutor

PATIENCE = 600.0  # seconds for which `launch.wait` goes on asking a SLURM that does not answer: a controller restarts
SIZE = 1000  # runs of a job array, where SLURM does not say
JOBS = ".slurm"  # in the folder of runs: logs and submitit's files
_WORDS = ("partition", "account", "qos", "constraint", "exclude")
_WORD = re.compile(r"[\w.,:@+=/&|()\[\]*!-]+", re.ASCII)
# Options of sbatch that other settings give, or that are the launcher's own business.
_TAKEN = (
    "account", "array", "chdir", "clusters", "constraint", "cpus-per-task", "error", "exclude", "gpus-per-node", "help",
    "input", "job-name", "mem", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable",
    "partition", "qos", "quiet", "requeue", "signal", "test-only", "time", "usage", "version", "wait", "wrap",
)  # fmt: skip
_FULL = re.compile(r"\w*Submit\w*Limit")  # what SLURM calls its limits on a user's jobs: AssocMaxSubmitJobLimit, ...
_SECRET = re.compile(r"\w*(API_?KEY|TOKEN|SECRET|PASSWORD)\w*\s*=", re.IGNORECASE)


def work(run_dir: str) -> None:
    """What a job's tasks call. Signals that come while torch is loaded are kept for the training loop."""
    import signal

    early: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, _: early.append(n))
    from scaling_exps import train

    if code := train.work([Path(run_dir)], earlier=early):
        raise SystemExit(code)


def launch(specs: list[RunSpec], root: Path, settings: SlurmLaunch) -> bool:
    """Submit what is neither finished, nor queued, nor running; see `launch.launch`."""
    if not settings.dry_run and (shutil.which("srun") is None or shutil.which("sbatch") is None):
        raise LaunchError(queue.NO_SLURM.format("srun and sbatch are"))
    if find_spec("submitit") is None:
        raise LaunchError("launch=slurm needs submitit: pip install 'scalerun[slurm]'")
    root = root.absolute()
    python = _check(root, settings)
    try:
        queued = queue.entries()  # refuses here, before anything is written, where SLURM does not answer
    except LaunchError:
        if not settings.dry_run:
            raise
        _print_scripts(folders.unfinished(specs, root), root, settings, python, SIZE)
        print("no SLURM answers: whether it takes such jobs, and which are queued, is not known", file=sys.stderr)
        return True
    todo = folders.unfinished(specs, root)
    missing = [_as_begun(s, root, settings) for s in todo if not _in_hand(RunDir(root / s.run_id), queued)]
    for shape in {_shape(s.placement.world_size, settings) for s in missing}:
        _room(_parameters(shape, settings), 1)
    if settings.dry_run:
        _print_scripts(missing, root, settings, python, _array_size())
        return True
    prepared = folders.prepare(specs, root, lambda run_dir: settings.elastic and not _in_hand(run_dir, queued))
    jobs: list[str] = []
    left = 0
    if missing:
        (root / JOBS).mkdir(mode=0o700, exist_ok=True)
        try:
            with RunDir(root / JOBS).lock():
                queued = queue.entries()  # another launcher may have been faster
                ids = {s.run_id for s in missing}
                waiting = {d: s for d, s in prepared.items() if s.run_id in ids and not _in_hand(d, queued)}
                jobs, left = _submit(waiting, root, settings, python)
        except BusyError as e:
            raise LaunchError(f"{e}: it submits runs of this folder now; try again when it is done") from e
    print(
        f"{len(specs)} run(s): {len(specs) - len(todo)} finished already, "
        f"{len(todo) - len(jobs) - left} queued or running, {len(jobs)} submitted, under {root}/"
    )
    if left:
        print(
            f"{left} run(s) are left: SLURM takes no more jobs of this user now (sacctmgr show assoc, show qos: "
            "MaxSubmit). The same command again submits them when others have ended",
            file=sys.stderr,
        )
    if jobs:
        print(f"jobs: {', '.join(_ranges(jobs))}\nlogs: log.txt in each run's folder; {root / JOBS}/JOB_TASK_log.*")
    if settings.wait:
        return _follow({s.run_id for s in specs}, root)
    print("scalerun status shows how they stand; the same command again submits what is missing", flush=True)
    return not left


def cancel(root: Path) -> list[str]:
    """Take every queued or running SLURM job of the runs under `root` back; returns the job ids."""
    last = [job.id for d in folders.under(root) if (job := queue.last_job(d)) is not None]
    queued = queue.entries() if last else {}
    jobs = [job for job in last if job in queued]
    if jobs:
        queue.ask("scancel", "--", *jobs)
    return jobs


# ---- what is asked for ----


def _in_hand(run_dir: RunDir, queued: dict[str, queue.Entry]) -> bool:
    job = queue.last_job(run_dir)
    return (job is not None and job.id in queued) or run_dir.holder() is not None


def _as_begun(spec: RunSpec, root: Path, settings: SlurmLaunch) -> RunSpec:
    """The run with the processes that it began with, which it keeps unless it is elastic."""
    run_dir = RunDir(root / spec.run_id)
    return replace(spec, placement=run_dir.spec().placement) if run_dir.begun and not settings.elastic else spec


def _shape(world: int, settings: SlurmLaunch) -> tuple[int, int]:
    """(nodes, tasks a node): as few nodes as hold the processes, each with the same number."""
    nodes = -(-world // settings.devices_per_node)
    while world % nodes:
        nodes += 1
    return nodes, world // nodes


def _check(root: Path, settings: SlurmLaunch) -> str:
    """Validate paths and sbatch settings; return the nodes' python."""
    faults = [
        f"launch.{key}={value!r} must be one word of letters, digits and .,:@+=/&|()[]*!-"
        for key in _WORDS
        if (value := getattr(settings, key)) is not None and not _WORD.fullmatch(value)
    ]
    for option, value in settings.sbatch.items():
        if not re.fullmatch(r"[a-z]+([-_][a-z]+)*", option):
            faults.append(
                f"launch.sbatch: {option!r} is no name of an option; write it as in sbatch --help, without --"
            )
        elif taken := [t for t in _TAKEN if t.startswith(option.replace("_", "-"))]:  # sbatch takes abbreviations
            faults.append(f"launch.sbatch.{option}: sbatch's --{taken[0]} is set by scalerun, or by another launch.*")
        if not str(value).isprintable() or _SECRET.search(str(value)):
            faults.append(f"launch.sbatch.{option} must be one line, and hold no secret")
    for line in settings.setup:
        if not line.isprintable():
            faults.append(f"launch.setup: {line!r} must be one line")
        if found := _SECRET.search(line):
            faults.append(f"launch.setup: {found[0]!r}... would put a secret into the job script; keep it in ~/.netrc")
    if not str(root).isprintable() or "%" in str(root) or "\\" in str(root):
        faults.append(f"runs_dir={str(root)!r}: SLURM cannot write logs to a path with %, \\ or control characters")
    python = settings.python or sys.executable
    code = Path(__file__).resolve().parents[2]
    if not settings.container and shutil.which(python) is None:
        faults.append(
            f"launch.python={python!r} is no program here; give the nodes' python, or null for {sys.executable}"
        )
    places = {"runs_dir": root, "the code": code}
    places |= {} if settings.container else {"python": Path(python).absolute()}
    for name, path in places.items():
        for folder in settings.node_local:
            if path.is_relative_to(folder) or path.resolve().is_relative_to(folder):
                faults.append(
                    f"{name} ({path}) lies in {folder}, which each node has for itself: move it to a shared file "
                    f"system, or take {folder} out of launch.node_local={settings.node_local}"
                )
    if faults:
        raise LaunchError("\n".join(faults))
    return python


def _parameters(shape: tuple[int, int], settings: SlurmLaunch) -> dict[str, Any]:
    """sbatch's names, as submitit spells them, for what a run of this shape asks for."""
    nodes, tasks = shape
    asked = {
        "job_name": "scalerun",
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": tasks if settings.gpus else None,
        "cpus_per_task": settings.cpus_per_task,
        "mem": None if settings.memory_gb is None else f"{max(1, round(settings.memory_gb * 1024))}M",
        "time": settings.minutes,
        **{key: getattr(settings, key) for key in _WORDS},
        **settings.sbatch,
    }
    return {key: value for key, value in asked.items() if value is not None and value is not False}


def _room(parameters: dict[str, Any], count: int) -> int:
    """How many of `count` such jobs SLURM would take now; LaunchError where it refuses not their number but the job."""
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in parameters.items()]

    def full(number: int) -> bool:
        array = [f"--array=0-{number - 1}"] if number > 1 else []
        try:
            queue.ask("sbatch", "--test-only", *words, *array, "--wrap=true")
        except LaunchError as e:
            if _FULL.search(str(e)):
                return True
            asked = ", ".join(f"{k}={v}" for k, v in parameters.items() if k != "job_name")
            text = queue.ask("sinfo", "--noheader", "--format=%R (%D nodes, each %c CPUs, %m MB, gres %G, limit %l)")
            offers = "; ".join(f"partition {line}" for line in text.splitlines())
            raise LaunchError(f"SLURM refuses a job of {asked}: {e}; the cluster has {offers}") from e
        return False

    return bisect.bisect_left(range(1, count), True, key=full) if full(count) else count


# ---- submission ----

# Runs in the job script, after srun; slurm/run.sbatch holds the same lines (a test compares). 75: the run was told to
# stop, and saved. Above 128: a process was killed, and how often is counted in a file of the job: SLURM's own count has
# preemptions, too. 200: the run failed, and would fail again (train.AGAIN, train.FAILED; srun reports the highest
# status of all tasks). Only a job that still counts as running may be requeued: a cancelled one is on its way out.
# sleep: until SLURM ends this script.
_AFTERWARDS = """\
code=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
allowed() { [ $code -eq 75 ] || { echo $code >> "$kills-$job" && [ "$(wc -l < "$kills-$job")" -le REQUEUES ]; }; }
if [ $code -eq 75 ] || { [ $code -gt 128 ] && [ $code -lt 200 ]; }; then
  state=$(squeue --noheader --array --jobs="$job" --format=%T)
  [ "$state" = RUNNING ] && allowed && scontrol requeue "$job" && sleep 120
fi
exit $code"""


def _executor(shape: tuple[int, int], root: Path, settings: SlurmLaunch, python: str) -> SlurmExecutor:
    """submitit's executor for runs of one shape."""
    import submitit

    # a container's program that stays in front of python must not die of a signal that is python's
    deaf = ["sh", "-c", "trap '' TERM USR1 USR2; exec \"$@\"", "sh"] if settings.container else []
    command = shlex.join([*deaf, *settings.container, python])
    reachable = f"command -v {shlex.quote(settings.container[0] if settings.container else python)} >/dev/null"
    quotable = re.sub(r"[^\w ./-]", "?", command)  # between double quotes of a shell
    guard = f'{reachable} || {{ echo "this node cannot reach the code: {quotable}" >&2; exit 2; }}'

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # what is missing here, `launch` has said
            return 2

    executor = Executor(folder=root / JOBS / "%j", max_num_timeout=1000, python=command)
    asked = _parameters(shape, settings)
    further = {option: asked.pop(option) for option in settings.sbatch if option in asked}
    executor.update_parameters(
        **asked,
        array_parallelism=settings.array_parallelism,
        signal_delay_s=settings.signal_seconds,
        setup=[*settings.setup, guard, f"kills={shlex.quote(str(root / JOBS / 'kills'))}"],
        teardown=_AFTERWARDS.replace("REQUEUES", str(settings.requeues)).splitlines(),
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True, **further},
    )
    return executor


def _array_size() -> int:
    """SLURM's bound on an array's size."""
    limit = re.search(r"MaxArraySize\s*=\s*(\d+)", queue.ask("scontrol", "show", "config"))
    return max(1, int(limit[1])) if limit else SIZE


def _parts(runs: dict[RunDir, RunSpec], settings: SlurmLaunch, size: int) -> list[tuple[tuple[int, int], list[RunDir]]]:
    """(shape, runs) of each job array: runs of one shape, as many as fit."""
    groups: dict[tuple[int, int], list[RunDir]] = {}
    for run_dir, spec in runs.items():
        groups.setdefault(_shape(spec.placement.world_size, settings), []).append(run_dir)
    return [(shape, dirs[i : i + size]) for shape, dirs in groups.items() for i in range(0, len(dirs), size)]


def _submit(runs: dict[RunDir, RunSpec], root: Path, settings: SlurmLaunch, python: str) -> tuple[list[str], int]:
    """Submit the runs; returns the job ids, and how many runs are left because SLURM takes no more jobs now."""
    from submitit.core import utils

    submitted: list[tuple[RunDir, str]] = []
    for shape, part in _parts(runs, settings, _array_size()):
        room = _room(_parameters(shape, settings), len(part))
        if room:
            try:
                with queue.own_environment():
                    jobs = _executor(shape, root, settings, python).map_array(work, [str(d) for d in part[:room]])
            except (utils.FailedJobError, utils.FailedSubmissionError) as e:
                if submitted:
                    queue.ask("scancel", "--", *(job for _, job in submitted))
                raise LaunchError(f"SLURM refused the submission, nothing is submitted: {queue.quote(str(e))}") from e
            for run_dir, job in zip(part, jobs, strict=False):
                run_dir.append_event({"event": "submitted", "job": job.job_id})
                submitted.append((run_dir, job.job_id))
        if room < len(part):
            break
    return [job for _, job in submitted], len(runs) - len(submitted)


def _print_scripts(specs: list[RunSpec], root: Path, settings: SlurmLaunch, python: str, size: int) -> None:
    """Print the job scripts that `_submit` would hand to sbatch."""
    runs = {RunDir(root / s.run_id): s for s in specs}
    for shape, part in _parts(runs, settings, size):
        executor = _executor(shape, root, settings, python)
        if len(part) > 1:
            executor.parameters["map_count"] = len(part)
        print(f"# {len(part)} run(s): {', '.join(d.path.name for d in part)}")
        print(executor._make_submission_file_text(executor._submitit_command_str, ""), end="\n\n")
    print("launch.dry_run=true: nothing is submitted", file=sys.stderr)


def _ranges(jobs: list[str]) -> list[str]:
    """`12_0, 12_1, 12_2` -> `12_[0-2]`."""
    arrays: dict[str, list[int]] = {}
    for job in jobs:
        array, _, index = job.partition("_")
        arrays.setdefault(array, []).extend([int(index)] if index else [])
    return [f"{a}_[{min(i)}-{max(i)}]" if i else a for a, i in arrays.items()]


def _follow(wanted: set[str], root: Path) -> bool:
    """Show the table until no run of the list is queued or running; returns whether all are finished."""
    before, answered = "", time.monotonic()
    while True:
        try:
            rows = [r for r in overview.status(root, strict=True) if r["run_id"] in wanted]
            answered = time.monotonic()
        except LaunchError as e:  # the directories alone do not say which run is still queued
            if time.monotonic() - answered > PATIENCE:
                print(
                    f"scalerun: {e}; so it was for {PATIENCE / 60:g} minutes, and this command stops following. The "
                    "jobs are not touched: scalerun status shows how they stand, the same command again follows them",
                    file=sys.stderr,
                )
                return False
            time.sleep(2)
            continue
        if (now := overview.count(rows)) != before:
            overview.print_status(rows) if sys.stdout.isatty() else print(now, flush=True)
            before = now
        if not any(r["state"] in ("queued", "running") for r in rows):
            return all(r["state"] == "finished" for r in rows)
        time.sleep(2)
