"""Sweeps on a real SLURM cluster of two nodes, which the fixture starts and stops on this machine."""

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

import pytest
import torch
from support import ENVIRONMENT, ROOT, prepare, rows, scalerun, work

from scaling_exps import records

NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "unshare")
ABSENT = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(ABSENT), reason=f"SLURM is not installed here: no {', '.join(ABSENT)} on the PATH"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the test cluster gives its nodes host names, which needs root"),
]
PLACE = ["launch=slurm", "launch.node_local=[]", "launch.gpus=false", "launch.cpus_per_task=1"]
TWO_NODES = ["launch.devices=2", "launch.devices_per_node=1"]
# Two tasks take about 6 s for it: long enough to be hit in the middle.
SCIENCE = [
    "batch=64", "recipe.micro_batch=32", "model.width=4", "recipe.epochs=null", "recipe.samples=38400", "logger=none",
    "measure.statistics_samples=64",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([ROOT / "tests/slurm/up.sh", folder / "slurm"], check=True, stdout=subprocess.DEVNULL)
    os.environ["SLURM_CONF"] = ENVIRONMENT["SLURM_CONF"] = str(folder / "slurm/slurm.conf")
    yield
    subprocess.run([ROOT / "tests/slurm/down.sh", folder / "slurm"], check=True)
    del os.environ["SLURM_CONF"], ENVIRONMENT["SLURM_CONF"]


def submit(where: Path, *words: str) -> str:
    where.mkdir(exist_ok=True)
    done = scalerun(*SCIENCE, *PLACE, *words, cwd=where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(where: Path) -> list[dict[str, Any]]:
    done = scalerun("status", "--json", cwd=where)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def until(true: Callable[[], object], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, subprocess.run(["squeue", "--all"], capture_output=True, text=True).stdout
        time.sleep(0.2)


def run_dirs(where: Path) -> list[Path]:
    return sorted(p.parent for p in where.glob("runs/*/run.json"))


def finished(where: Path) -> bool:
    return all(records.state(d) == "finished" for d in run_dirs(where))


def starts(run_dir: Path) -> int:
    return sum(e["event"] == "start" for e in records.read_events(run_dir))


def in_the_middle(run_dir: Path, start: int = 1) -> bool:
    """In its `start`-th start, and past the last checkpoint by some records."""
    return starts(run_dir) == start and records.holder(run_dir) is not None and len(rows(run_dir)) > 12 * start


def same(run_dir: Path, other: Path) -> None:
    assert rows(run_dir) == rows(other)
    a, b = (torch.load(d / "checkpoint.pt", weights_only=True)["net"] for d in (run_dir, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def job(run_dir: Path) -> str:
    return str(records.read_events(run_dir)[-1]["job"])


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
    result = records.read_json(first / "result.json")
    assert result is not None
    assert (result["world_size"], result["commit"] is not None) == (2, True)
    assert {r["state"] for r in status(undisturbed)} == {"finished"}
    assert not list(undisturbed.rglob("owned"))  # a folder's name is never run
    assert (first.stat().st_mode | (first.parent / ".slurm").stat().st_mode) & 0o077 == 0


def test_the_same_command_again_submits_nothing(undisturbed: Path) -> None:
    text = submit(undisturbed, *TWO_NODES, "seed=[0,1]")
    assert "2 finished already" in text
    assert "0 submitted" in text


def test_preemption_and_then_a_lost_node(undisturbed: Path, tmp_path: Path) -> None:
    submit(tmp_path, *TWO_NODES, "seed=0", "checkpoint.minutes=0.01")
    (run_dir,) = run_dirs(tmp_path)
    until(lambda: in_the_middle(run_dir))
    command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: starts(run_dir) == 2)
    assert "saved and stopped" in (run_dir / "log.txt").read_text()  # not killed: it had time to save
    assert status(tmp_path)[0]["detail"].startswith("requeued 1 time")
    until(lambda: in_the_middle(run_dir, 2) or finished(tmp_path))
    assert not finished(tmp_path)
    command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: status(tmp_path)[0]["state"] == "queued")  # SLURM puts it back by itself
    assert "requeued 2 times" in status(tmp_path)[0]["detail"]
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False)  # it may be back by itself
    until(lambda: finished(tmp_path))
    assert starts(run_dir) == 3
    same(run_dir, undisturbed / "runs" / run_dir.name)


def test_requeue_time_limit_cancel_and_resubmission(undisturbed: Path, tmp_path: Path) -> None:
    requeued, limited, cancelled = (tmp_path / name for name in ("requeued", "limited", "cancelled"))
    # SLURM looks at time limits only now and then: this run is long enough to be caught
    submit(limited, *TWO_NODES, "seed=0", "recipe.samples=230400", "launch.minutes=1", "launch.signal_seconds=55")
    submit(requeued, *TWO_NODES, "seed=1", "checkpoint.minutes=0.01")
    submit(cancelled, *TWO_NODES, "seed=[0,1]", "launch.array_parallelism=1")
    (a,), (b,) = run_dirs(requeued), run_dirs(limited)
    until(lambda: in_the_middle(a))
    command("scontrol", "requeue", job(a))
    again = submit(cancelled, *TWO_NODES, "seed=[0,1]")
    assert "2 queued or running, 0 submitted" in again
    done = scalerun("cancel", cwd=cancelled)
    assert "cancelled 2 job(s)" in done.stdout
    until(lambda: {r["state"] for r in status(cancelled)} <= {"waiting", "interrupted"})
    assert "2 submitted" in submit(cancelled, *TWO_NODES, "seed=[0,1]")
    until(lambda: finished(requeued) and finished(limited) and finished(cancelled))
    assert starts(a) >= 2
    assert starts(b) >= 2
    assert "saved and stopped" in (b / "log.txt").read_text()
    for run_dir in (a, *run_dirs(cancelled)):
        same(run_dir, undisturbed / "runs" / run_dir.name)
    whole = prepare(tmp_path / "whole", records.read_spec(b))
    work(whole, 2)
    same(b, whole)


def test_a_killed_rank_is_requeued_and_a_broken_run_is_not(undisturbed: Path, tmp_path: Path) -> None:
    submit(tmp_path, *TWO_NODES, "seed=0", "checkpoint.minutes=0.01")
    submit(tmp_path / "broken", "seed=0", "recipe.lr=1e30", "recipe.warmup_fraction=0", "optimizer=sgd")
    (run_dir,), (broken,) = run_dirs(tmp_path), run_dirs(tmp_path / "broken")
    until(lambda: in_the_middle(run_dir))
    ranks = command("pgrep", "-f", f"submitit.core._submit {tmp_path}/runs/.slurm").split()
    os.kill(int(ranks[-1]), 9)
    until(lambda: finished(tmp_path))
    assert starts(run_dir) == 2
    same(run_dir, undisturbed / "runs" / run_dir.name)
    until(lambda: status(tmp_path / "broken")[0]["state"] == "failed")
    assert starts(broken) == 1
    assert "not finite" in status(tmp_path / "broken")[0]["detail"]


def test_two_hundred_runs_are_submitted_and_cancelled_without_torch(tmp_path: Path) -> None:
    words = ["batch=[4,16]", f"seed={list(range(100))}".replace(" ", ""), "launch.array_parallelism=1"]
    program = (
        "import sys; from scaling_exps.cli import main; code = main(sys.argv[1:]); "
        "assert main(['status', '--json']) == 0; assert main(['cancel']) == 0; "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command("scontrol", "update", "partitionname=main", "state=down")  # nothing starts
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *SCIENCE[1:], *PLACE, "runs_dir=runs", *words],
            cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        command("scontrol", "update", "partitionname=main", "state=up")
    assert done.returncode == 0, done.stderr
    assert "200 submitted" in done.stdout
    assert "cancelled 200 job(s)" in done.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.partition=nowhere", "partition main"),
        ("launch.gpus=true", "gpu:2"),  # three on a node
        ("launch.account=a b", "one word"),
        ("runs_dir=/proc/runs", "choose another with runs_dir="),
        ("launch.python=/nowhere/python", "/nowhere/python"),
        ("launch.node_local=[/]", "shared file system"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(word: str, said: str, tmp_path: Path) -> None:
    before = command("squeue", "--all", "--noheader", "--format=%i")
    words = [*SCIENCE, "recipe.micro_batch=16", "batch=48", *PLACE, "launch.devices=3", word]
    last = {w.split("=", 1)[0]: w for w in words}
    done = scalerun(*last.values(), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert command("squeue", "--all", "--noheader", "--format=%i") == before
    assert not list(tmp_path.rglob("*.sh"))


def test_a_plain_sbatch_script_runs_directories(undisturbed: Path, tmp_path: Path) -> None:
    """slurm/run.sbatch and array.sbatch, for sites without submitit."""
    shutil.copytree(undisturbed / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("*.pt", "re*", "jobs*"))
    dirs = run_dirs(tmp_path)
    where = {**ENVIRONMENT, "SCALERUN_PYTHON": sys.executable}
    options = ["--nodes=2", "--ntasks-per-node=1", "--output=/dev/null"]
    subprocess.run(["sbatch", *options, ROOT / "slurm/run.sbatch", dirs[0]], check=True, env=where, cwd=tmp_path)
    subprocess.run(
        ["sbatch", *options, "--array=0-0", ROOT / "slurm/array.sbatch", dirs[1]], check=True, env=where, cwd=tmp_path
    )
    until(lambda: finished(tmp_path))
    for run_dir in dirs:
        same(run_dir, undisturbed / "runs" / run_dir.name)


def test_shell_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed here")
    scripts = [*(ROOT / "slurm").glob("*.s*"), *(ROOT / "tests/slurm").glob("*.sh")]
    assert len(scripts) >= 4
    subprocess.run(["shellcheck", "--shell=bash", *scripts], check=True)
