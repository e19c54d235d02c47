"""What SLURM says: squeue and sacct, read as values. No shell, and nothing but fixed words and job ids in argv."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scaling_exps.launch.folders import LaunchError
from scaling_exps.records import RunDir

# What a job that this process runs in, or the shell, tells SLURM's commands and the processes of a run. SLURM_CONF says
# which cluster it is. SBATCH_TIMELIMIT and its like would overrule the job script.
_INHERITED = re.compile(
    r"(SLURMD?|SRUN|SBATCH|SQUEUE|SACCT|SINFO|SCANCEL|SUBMITIT|TORCHELASTIC)_(?!CONF$)"
    r"|(MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE)$"
)


NO_SLURM = (
    "launch=slurm needs SLURM's commands, and {} not on this machine's PATH: use a login node of the cluster, or "
    "launch=local"
)


@dataclass(frozen=True)
class Job:
    """The job of a run: its id, and how often the run has started in it."""

    id: str
    starts: int


@dataclass(frozen=True)
class Entry:
    """A job that is in the queue, running or not."""

    state: str
    reason: str


def last_job(run_dir: RunDir) -> Job | None:
    """The job that was last submitted for this run, by `launch=slurm` or with slurm/*.sbatch.

    A start names its job, too, and that one does not count: it may be the shell (`srun --pty bash`) of somebody who
    ran it there, which lives on when the run has ended, and is not ours to cancel.
    """
    events = run_dir.events()
    ids = [str(e["job"]) for e in events if e.get("event") == "submitted" and e.get("job")]
    if not ids:
        return None
    return Job(ids[-1], sum(e.get("event") == "start" and e.get("job") == ids[-1] for e in events))


def ask(*argv: str) -> str:
    """Output of a SLURM command; LaunchError where it is not there, or says no (it is quoted)."""
    try:
        with own_environment():
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise LaunchError(NO_SLURM.format(f"{argv[0]!r} is")) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{argv[0]} gave no answer in 60 s: is the SLURM controller up?") from None
    if done.returncode:
        raise LaunchError(f"{argv[0]}: {quote(done.stderr) or quote(done.stdout)}")
    return done.stdout


@contextmanager
def own_environment() -> Iterator[None]:
    """Hide what this process inherits from a job around it, and what the shell sets for SLURM's commands."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _INHERITED.match(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def quote(text: str) -> str:
    """What a command of SLURM's says, in one line, without the hint that follows an unknown option.

    >>> quote("sbatch: unrecognized option '--foo=1'\\nTry \\"sbatch --help\\" for more information")
    "unrecognized option '--foo=1'"
    """
    lines = [re.sub(r"^(\w+: )?(error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("Try "))[-500:]


def entries() -> dict[str, Entry]:
    """Job id (`12`, or `12_3` in an array) -> entry, of this user's jobs."""
    lines = ask("squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r").splitlines()
    cells = ([*line.strip().split("|", 2), "", ""] for line in lines)
    return {job: Entry(state, reason) for job, state, reason, *_ in cells}


def ended(jobs: list[str]) -> dict[str, str]:
    """Job id -> final state (COMPLETED, CANCELLED, TIMEOUT, ...), as far as the accounting knows."""
    jobs = [j for j in jobs if re.fullmatch(r"\d+(_\d+)?", j)]
    if not jobs:
        return {}
    try:
        text = ask("sacct", "-n", "-X", "-P", "--format=JobID,State", "--jobs", ",".join(jobs))
    except LaunchError:  # a site without accounting: the directories have to do
        return {}
    lines = (line.split("|") for line in text.splitlines() if "|" in line)
    return {job: state.split()[0] for job, state in lines if state.split()}
