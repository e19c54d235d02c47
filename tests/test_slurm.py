"""Sweeps on a real SLURM cluster of two nodes, which the fixture starts and stops on this machine.

No verdict hangs on the machine's speed: a run that is to be hit in the middle waits there (gate.py), and what is
awaited has bounds that only a hang exceeds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gate
import pytest
import torch
from support import ENVIRONMENT, ROOT, rows, scalerun

from scaling_exps.records import RunDir

NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "unshare", "bwrap")
ABSENT = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(ABSENT), reason=f"SLURM is not installed here: no {', '.join(ABSENT)} on the PATH"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the test cluster gives its nodes host names, which needs root"),
]
PLACE = ["launch=slurm", "launch.node_local=[]", "launch.gpus=false", "launch.cpus_per_task=1"]
TWO_NODES = ["launch.devices=2", "launch.devices_per_node=1"]
OFTEN = "checkpoint.minutes=1e-9"  # a save whenever the ranks poll: in the steps 1, 3, 7, 15, 31


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([ROOT / "tests/slurm/up.sh", folder / "slurm"], check=True, stdout=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as m:
        for environment in (os.environ, ENVIRONMENT):
            m.setitem(environment, "SLURM_CONF", str(folder / "slurm/slurm.conf"))
            m.setitem(environment, "PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
            for secret in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
                m.setitem(environment, secret, "planted-in-the-environment")
        yield
        subprocess.run([ROOT / "tests/slurm/down.sh", folder / "slurm"], check=True)


def submit(where: Path, *words: str) -> str:
    where.mkdir(exist_ok=True)
    done = scalerun(*{w.split("=", 1)[0]: w for w in [*gate.SCIENCE, *PLACE, *words]}.values(), cwd=where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(where: Path) -> list[dict[str, Any]]:
    done = scalerun("status", "--json", cwd=where)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def until(true: Callable[[], object], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, subprocess.run(["squeue", "--all"], capture_output=True, text=True).stdout
        time.sleep(0.2)


def run_dirs(where: Path) -> list[RunDir]:
    return RunDir.under(where / "runs")


def finished(where: Path) -> bool:
    states = {d: d.state() for d in run_dirs(where)}
    assert "failed" not in states.values(), {str(d): d.reason() for d in states}
    return set(states.values()) == {"finished"}


def starts(run_dir: RunDir) -> int:
    return sum(e["event"] == "start" for e in run_dir.events())


def held(where: Path, starts: int = 1) -> bool:
    """So many starts have come to the middle; the last of them waits there."""
    return len(list(where.glob("held-*"))) == starts


def same(run_dir: RunDir, other: RunDir) -> None:
    assert rows(run_dir) == rows(other)
    a, b = (torch.load(d.newest, weights_only=True)["net"] for d in (run_dir, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def twin(run_dir: RunDir, undisturbed: Path) -> RunDir:
    return RunDir(undisturbed / "runs" / run_dir.path.name)


def job(run_dir: RunDir) -> str:
    return [e["job"] for e in run_dir.events() if e.get("job")][-1]


def queued() -> set[str]:
    return set(command("squeue", "--all", "--noheader", "--format=%i").split())


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    path = tmp_path / "hold"
    path.touch()
    return path


def command(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two runs, each of two tasks on two nodes, as an array."""
    where = tmp_path_factory.mktemp("it's a $(touch owned) 'quoted' folder")
    text = submit(where, *TWO_NODES, "seed=[0,1]", "launch.wait=true")
    assert "2 submitted" in text
    return where


def test_an_array_of_two_task_runs_on_two_nodes(undisturbed: Path) -> None:
    first, second = run_dirs(undisturbed)
    assert finished(undisturbed)
    ids = {job(first), job(second)}
    array = job(first).split("_")[0]
    assert ids == {f"{array}_0", f"{array}_1"}
    assert "NumNodes=2" in command("scontrol", "show", "job", f"{array}_0")
    result = first.result()
    assert result is not None
    assert (result["world_size"], result["commit"] is not None) == (2, True)
    assert {r["state"] for r in status(undisturbed)} == {"finished"}
    assert not list(undisturbed.rglob("owned"))  # a folder's name is never run
    files = [p for p in undisturbed.rglob("*") if p.is_file()]
    assert len(files) > 20 and not [p for p in files if b"planted-in-the-environment" in p.read_bytes()]
    assert (first.path.stat().st_mode | (first.path.parent / ".slurm").stat().st_mode) & 0o077 == 0


def test_the_same_command_again_submits_nothing(undisturbed: Path) -> None:
    text = submit(undisturbed, *TWO_NODES, "seed=[0,1]")
    assert "2 finished already" in text
    assert "0 submitted" in text


@pytest.mark.slow
def test_preemption_and_then_a_lost_node(undisturbed: Path, tmp_path: Path, hold: Path) -> None:
    submit(tmp_path, *TWO_NODES, "seed=0", OFTEN)
    (run_dir,) = run_dirs(tmp_path)
    until(lambda: held(tmp_path))
    command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: starts(run_dir) == 2)
    assert "saved and stopped" in run_dir.log.read_text()  # not killed: it had time to save
    assert status(tmp_path)[0]["detail"].startswith("requeued 1 time")
    until(lambda: held(tmp_path, 2))
    command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: "requeued 2 times" in status(tmp_path)[0]["detail"])  # SLURM puts it back by itself
    hold.unlink()
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False)  # it may be back by itself
    until(lambda: finished(tmp_path))
    assert starts(run_dir) == 3
    same(run_dir, twin(run_dir, undisturbed))


@pytest.mark.slow
def test_requeue_time_limit_cancel_and_resubmission(undisturbed: Path, tmp_path: Path) -> None:
    folders = requeued, limited, cancelled = [tmp_path / name for name in ("requeued", "limited", "cancelled")]
    for folder in folders:
        folder.mkdir()
        (folder / "hold").touch()
    submit(limited, *TWO_NODES, "seed=0", "launch.minutes=2", "launch.signal_seconds=60")
    submit(requeued, *TWO_NODES, "seed=1", OFTEN)
    submit(cancelled, *TWO_NODES, "seed=[0,1]", "launch.array_parallelism=1")
    (a,), (b,) = run_dirs(requeued), run_dirs(limited)
    until(lambda: held(requeued))
    command("scontrol", "requeue", job(a))
    (requeued / "hold").unlink()
    again = submit(cancelled, *TWO_NODES, "seed=[0,1]")
    assert "2 queued or running, 0 submitted" in again
    done = scalerun("cancel", cwd=cancelled)
    assert "cancelled 2 job(s)" in done.stdout
    until(lambda: {r["state"] for r in status(cancelled)} <= {"waiting", "interrupted"})
    (cancelled / "hold").unlink()
    assert "2 submitted" in submit(cancelled, *TWO_NODES, "seed=[0,1]")
    until(lambda: b.log.exists() and "saved and stopped" in b.log.read_text())
    (limited / "hold").unlink()
    until(lambda: all(map(finished, folders)))
    assert starts(a) >= 2
    stops = b.log.read_text().count("saved and stopped")  # both tasks were told at the limit: one requeue
    assert starts(b) == stops + 1 >= 2
    assert f"Restarts={stops}" in command("scontrol", "show", "job", job(b))
    for run_dir in (a, b, *run_dirs(cancelled)):
        same(run_dir, twin(run_dir, undisturbed))


@pytest.mark.slow
def test_a_ramp_requeued_around_its_switches(tmp_path: Path, hold: Path) -> None:
    """Told to go at a switch (four lie where it waits), then killed behind one: the bits of the undisturbed run.

    Fails if a switch were made twice or not at all, or if state that was moved had another stage's hyperparameters.
    """
    at = gate.MICRO_BATCH * 64
    stages = [
        [0, 64],
        [at - 64, 128],
        [at + 64, 64],
        [at + 128, 128],
        [at + 256, 64],
        [at + 320, 128],
        [at + 3600, 256],
    ]
    words = [*TWO_NODES, "seed=0", OFTEN, "batch=null", f"ramp={{samples:{stages}}}"]
    alone = tmp_path / "alone"
    submit(alone, *words, "launch.wait=true")
    submit(tmp_path, *words)
    (run_dir,) = run_dirs(tmp_path)
    until(lambda: held(tmp_path))
    command("scontrol", "requeue", job(run_dir))
    until(lambda: held(tmp_path, 2))
    assert torch.load(run_dir.newest, weights_only=True)["step"] >= gate.MICRO_BATCH - 1
    ranks = command("pgrep", "-f", f"submitit.core._submit {tmp_path}/runs/.slurm").split()
    os.kill(int(ranks[-1]), 9)
    hold.unlink()
    until(lambda: finished(tmp_path))
    assert starts(run_dir) == 3
    same(run_dir, twin(run_dir, alone))


def container(tmp_path: Path) -> list[str]:
    """Words of bubblewrap for a root of its own, in which this code and this python's folder lie elsewhere."""
    shown = {ROOT: "/opt/code", Path(sys.prefix): "/opt/venv", Path(sys.base_prefix): sys.base_prefix}
    words = ["bwrap", "--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc", "--dev", "/dev", "--proc", "/proc"]
    for name in ("bin", "lib", "lib64"):
        words += ["--symlink", f"usr/{name}", f"/{name}"]
    for here, there in shown.items():
        words += ["--ro-bind", str(here), str(there)]
    return [*words, "--bind", str(tmp_path), str(tmp_path), "--setenv", "PYTHONPATH", "/opt/code:/opt/code/tests"]


@pytest.mark.slow
def test_a_container_in_which_every_path_is_another(undisturbed: Path, tmp_path: Path, hold: Path) -> None:
    """Fails if a job names the python or the code of the machine that submits, or if the signal ahead of a time limit
    ends the program in front of python, which loses what was not saved and spends a restart."""
    words = ["launch.container=[" + ",".join(f"'{w}'" for w in container(tmp_path)) + "]"]
    submit(tmp_path, *TWO_NODES, "seed=0", OFTEN, *words, "launch.python=/opt/venv/bin/python")
    (run_dir,) = run_dirs(tmp_path)
    until(lambda: held(tmp_path))
    command("scancel", "--signal=USR2", job(run_dir))
    until(lambda: starts(run_dir) == 2)
    hold.unlink()
    until(lambda: finished(tmp_path))
    assert "saved and stopped" in run_dir.log.read_text() and not list(tmp_path.glob("runs/.slurm/kills*"))
    same(run_dir, twin(run_dir, undisturbed))


@pytest.mark.slow
def test_an_elastic_run_goes_on_with_fewer_tasks(undisturbed: Path, tmp_path: Path, hold: Path) -> None:
    """Cancelled in the middle, then submitted for one task. Fails if that came unasked, was not said, or moved a record
    by more than the order of the sums does."""
    submit(tmp_path, *TWO_NODES, "seed=0", OFTEN)
    (run_dir,) = run_dirs(tmp_path)
    until(lambda: held(tmp_path))
    assert "cancelled 1 job" in scalerun("cancel", cwd=tmp_path).stdout
    until(lambda: not queued())
    hold.unlink()
    one = ["launch.devices=1", "launch.devices_per_node=1", "seed=0"]
    text = submit(tmp_path, *one, "launch.dry_run=true")
    assert "--nodes=2" in text
    submit(tmp_path, *one, "launch.elastic=true")
    assert "NumTasks=1" in command("scontrol", "show", "job", job(run_dir))
    until(lambda: finished(tmp_path))
    ((event,), found) = ([r for r in rows(run_dir) if (r["kind"] == "event") == said] for said in (True, False))
    assert (event["before"], event["after"]) == (2, 1)
    whole = rows(twin(run_dir, undisturbed))
    assert [r["step"] for r in found] == [r["step"] for r in whole]
    for mine, theirs in zip(found, whole, strict=True):
        for key in mine.keys() & {"samples", "loss", "window", "accuracy", "weight_norm"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_a_killed_rank_is_requeued_and_a_broken_run_is_not(undisturbed: Path, tmp_path: Path, hold: Path) -> None:
    submit(tmp_path, *TWO_NODES, "seed=0", OFTEN)
    submit(tmp_path / "broken", "seed=0", "model.factory=gate:broken")
    (run_dir,), (broken,) = run_dirs(tmp_path), run_dirs(tmp_path / "broken")
    until(lambda: held(tmp_path))
    ranks = command("pgrep", "-f", f"submitit.core._submit {tmp_path}/runs/.slurm").split()
    os.kill(int(ranks[-1]), 9)
    hold.unlink()
    until(lambda: finished(tmp_path))
    assert starts(run_dir) == 2
    same(run_dir, twin(run_dir, undisturbed))
    until(lambda: status(tmp_path / "broken")[0]["state"] == "failed")
    assert starts(broken) == 1
    assert "no network today" in status(tmp_path / "broken")[0]["detail"]


@pytest.mark.slow
def test_a_member_over_its_limit_does_not_lose_the_others(tmp_path: Path) -> None:
    """The array's first member is killed at its time limit, since it hears no signal.

    Fails if `launch.wait` returned before the other had ended, or if the lost one were finished, or failed.
    """
    words = ["seed=[0,1]", "model.factory=gate:deaf", "launch.minutes=2", "launch.signal_seconds=20"]
    done = scalerun(
        *{w.split("=", 1)[0]: w for w in [*gate.SCIENCE, *PLACE, *words]}.values(), "launch.wait=true", cwd=tmp_path
    )
    assert done.returncode == 1, done.stdout + done.stderr
    until(lambda: "SLURM: TIMEOUT" in [r["detail"].split(", ")[0] for r in status(tmp_path)])
    lost, other = sorted(status(tmp_path), key=lambda r: r["state"] == "finished")
    assert lost["state"] in ("waiting", "interrupted") and other["state"] == "finished"


@pytest.fixture
def closed() -> Iterator[None]:
    """The queue is empty, and the partition takes jobs, but starts none."""
    command("scancel", f"--user={os.geteuid()}")
    until(lambda: not queued())
    command("scontrol", "update", "partitionname=main", "state=down")
    yield
    command("scancel", f"--user={os.geteuid()}")
    command("scontrol", "update", "partitionname=main", "state=up")


def test_a_limit_on_submitted_jobs_leaves_the_rest_to_the_same_command(closed: None, tmp_path: Path) -> None:
    """Fails if a full queue refuses the sweep as a whole, or if what is left is not said."""

    def limit(jobs: int) -> None:
        command("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={jobs}")
        text = "MaxSubmitJobs= " if jobs < 0 else f"MaxSubmitJobs={jobs}("
        until(
            lambda: text in command("scontrol", "show", "assoc_mgr", "flags=assoc", "users=root").replace("\n", " \n")
        )

    try:
        limit(3)
        tries = [scalerun(*gate.SCIENCE, *PLACE, "seed=[0,1,2,3,4]", cwd=tmp_path) for _ in range(2)]
        limit(5)
        tries.append(scalerun(*gate.SCIENCE, *PLACE, "seed=[0,1,2,3,4]", cwd=tmp_path))
    finally:
        limit(-1)
    assert [t.returncode for t in tries] == [1, 1, 0], tries
    for attempt, text in zip(
        tries, ("0 queued or running, 3 sub", "3 queued or running, 0", "3 queued or running, 2"), strict=True
    ):
        assert text in attempt.stdout
        assert ("2 run(s) are left" in attempt.stderr) == (attempt.returncode == 1)
    assert "cancelled 5 job(s)" in scalerun("cancel", cwd=tmp_path).stdout


def test_ten_runs_and_arrays_of_at_most_four(closed: None, tmp_path: Path) -> None:
    """Fails if an array is larger than MaxArraySize, or smaller than it may be."""
    conf = Path(os.environ["SLURM_CONF"])
    before = conf.read_text()
    try:
        conf.write_text(f"MaxArraySize=4\n{before}")
        command("scontrol", "reconfigure")
        until(lambda: "MaxArraySize            = 4" in command("scontrol", "show", "config"))
        assert "10 submitted" in submit(tmp_path, "seed=[0,1,2,3,4,5,6,7,8,9]")
    finally:
        conf.write_text(before)
        command("scontrol", "reconfigure")
    arrays = [job(d).split("_")[0] for d in run_dirs(tmp_path)]
    assert sorted(map(arrays.count, set(arrays))) == [2, 4, 4]


def test_a_dry_run_and_further_options(closed: None, tmp_path: Path) -> None:
    """Fails if a dry run submits or writes, or if an option is read by a shell, or not by sbatch."""
    comment = "it's $(touch owned) two words"
    words = ["seed=[0,1]", f'launch.sbatch.comment="{comment}"', "launch.sbatch={hint:nomultithread,exclusive:true}"]
    before = queued()
    text = submit(tmp_path, *words, "launch.dry_run=true")
    assert text.count("#!/bin/bash") == 1
    for line in ("#SBATCH --array=0-1%2", "#SBATCH --exclusive\n", "#SBATCH --hint=nomultithread", "scontrol requeue"):
        assert line in text
    assert queued() <= before  # cancelled jobs may leave it
    assert not list(tmp_path.iterdir())
    submit(tmp_path, *words)
    described = command("scontrol", "show", "job", job(run_dirs(tmp_path)[0]).split("_")[0])
    assert f"Comment={comment}" in described
    assert not list(tmp_path.rglob("owned"))


def test_a_sweep_submitted_from_inside_a_job(undisturbed: Path, tmp_path: Path) -> None:
    """Fails if what the job around it sets reaches the new one: its time limit, its CPUs, its number of tasks."""
    words = [
        *gate.SCIENCE,
        *PLACE,
        *TWO_NODES,
        "seed=0",
        "launch.minutes=17",
        "launch.signal_seconds=60",
        "launch.wait=true",
    ]
    done = subprocess.run(
        ["srun", "--ntasks=1", "--time=60", "--cpus-per-task=1", sys.executable, "-m", "scaling_exps.cli", *words],
        cwd=tmp_path, env={**ENVIRONMENT, "SBATCH_TIMELIMIT": "1", "WORLD_SIZE": "5"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = run_dirs(tmp_path)
    assert "TimeLimit=00:17:00" in command("scontrol", "show", "job", job(run_dir))
    same(run_dir, twin(run_dir, undisturbed))


@pytest.mark.parametrize("parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_tasks_of_srun_are_two_launchers(parallel: int, tmp_path: Path) -> None:
    """Fails by a hang, or a world of two, if the workers of a local launch take the ranks of the step around it."""
    words = [*gate.SCIENCE, "seed=[0,1]", "launch=local", f"launch.parallel={parallel}"]
    done = subprocess.run(
        ["srun", "--ntasks=2", "--nodes=2", sys.executable, "-m", "scaling_exps.cli", *words],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    states = [d.state() for d in run_dirs(tmp_path)]
    assert len(states) == 2
    if "running" not in done.stderr:  # else one launcher ended while the other still worked, and srun ended that too
        assert states == ["finished"] * 2, done.stderr
    again = scalerun(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [(d.result() or {})["world_size"] for d in run_dirs(tmp_path)] == [1, 1]


def test_two_hundred_runs_are_submitted_and_cancelled_without_torch(closed: None, tmp_path: Path) -> None:
    words = ["batch=[4,16]", f"seed={list(range(100))}".replace(" ", ""), "launch.array_parallelism=1"]
    program = (
        "import sys; from scaling_exps.cli import main; code = main(sys.argv[1:]); "
        "assert main(['status', '--json']) == 0; assert main(['cancel']) == 0; "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "logger=none", *PLACE, "runs_dir=runs", *words],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "200 submitted" in done.stdout
    assert "cancelled 200 job(s)" in done.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.partition=nowhere", "partition main"),
        ("launch.gpus=true", "gpu:2"),  # three on a node
        ("launch.account=a b", "one word"),
        ("launch.sbatch={reservation:nowhere}", "reservation is invalid"),
        ("launch.sbatch={gres:'cake:1'}", "gres"),
        ("launch.sbatch={made_up:1}", "unrecognized option '--made-up=1'"),
        ("runs_dir=/proc/runs", "choose another with runs_dir="),
        ("launch.python=/nowhere/python", "/nowhere/python"),
        ("launch.node_local=[/]", "shared file system"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(word: str, said: str, tmp_path: Path) -> None:
    before = queued()
    words = [*gate.SCIENCE, "recipe.micro_batch=16", "batch=48", *PLACE, "launch.devices=3", word]
    last = {w.split("=", 1)[0]: w for w in words}
    done = scalerun(*last.values(), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert queued() <= before
    assert not list(tmp_path.rglob("*.sh"))


def test_a_plain_sbatch_script_runs_directories(undisturbed: Path, tmp_path: Path) -> None:
    """slurm/run.sbatch, for one run and for an array."""
    shutil.copytree(undisturbed / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("*.pt", "re*", "jobs*"))
    dirs = run_dirs(tmp_path)
    where = {**ENVIRONMENT, "SCALERUN_PYTHON": sys.executable}
    options = ["--nodes=2", "--ntasks-per-node=1", "--output=/dev/null"]
    for words in (
        [ROOT / "slurm/run.sbatch", dirs[0].path],
        ["--array=1", ROOT / "slurm/run.sbatch", "x", dirs[1].path],
    ):
        subprocess.run(["sbatch", *options, *words], check=True, env=where, cwd=tmp_path)
    until(lambda: finished(tmp_path))
    for run_dir in dirs:
        same(run_dir, twin(run_dir, undisturbed))


def test_shell_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed here")
    scripts = [*(ROOT / "slurm").glob("*.s*"), *(ROOT / "tests/slurm").glob("*.sh")]
    assert len(scripts) >= 3
    subprocess.run(["shellcheck", "--shell=bash", *scripts], check=True)
