"""The parts of launch=slurm that need no cluster."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support import ROOT, prepare, scalerun, specs

from scaling_exps import config, plan, train
from scaling_exps.launch import overview, queue, slurm


def settings(*words: str) -> config.SlurmLaunch:
    (composed,) = config.compose(["launch=slurm", *words])
    assert isinstance(composed.launch, config.SlurmLaunch)
    return composed.launch


@pytest.mark.parametrize(
    ("world", "per_node", "shape"),
    [(1, 8, (1, 1)), (8, 8, (1, 8)), (16, 8, (2, 8)), (12, 8, (2, 6)), (9, 8, (3, 3)), (2, 1, (2, 1)), (7, 4, (7, 1))],
)
def test_nodes_and_tasks(world: int, per_node: int, shape: tuple[int, int]) -> None:
    assert slurm._shape(world, settings(f"launch.devices_per_node={per_node}")) == shape


def test_devices_follow_from_the_batch() -> None:
    composed = config.compose(["launch=slurm", "batch=[64,128,192,256]", "launch.max_devices=3"])
    assert [s.placement.world_size for s in plan.plan(composed)] == [1, 2, 3, 2]


def test_rank_and_address_come_from_slurm() -> None:
    for module in (train.ranks, queue):
        assert doctest.testmod(module).attempted > 0
        assert doctest.testmod(module).failed == 0
    assert train.slurm_rank({}) is None
    assert train.slurm_rank({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("a-b[3,5]-x", "a-b3-x"),
        ("x7,y[1-2]", "x7"),
        ("n[001-128]", "n001"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("r[10,12]c[08-09]s[1]", "r10c08s1"),
        ("login,n[1-2]", "login"),
    ],
)
def test_the_address_is_the_first_host(nodes: str, first: str) -> None:
    """Fails where only the first bracket of a list is opened: `rack1node[3-4]` is no host."""
    rank = train.slurm_rank({**STEP, "SLURM_STEP_NODELIST": nodes})
    assert rank is not None
    assert rank["MASTER_ADDR"] == first


def test_the_port_differs_by_job_step_and_restart() -> None:
    """Fails if one that is about to end can be met by the next on the same node."""
    others = [{}, {"SLURM_JOB_ID": "2"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "2"}]
    ports = {(train.slurm_rank({**STEP, **other}) or {})["MASTER_PORT"] for other in others}
    assert len(ports) == len(others)


def test_a_node_without_submitit_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)  # an import of it fails
    with pytest.raises(SystemExit, match=r"pip install 'scalerun\[slurm\]'"):
        train.slurm_rank(STEP)
    assert train.slurm_rank({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None  # which needs none


def test_the_rule_of_requeueing_is_one() -> None:
    """Fails when slurm/run.sbatch and the jobs of launch=slurm would not be requeued alike."""
    rule = slurm._AFTERWARDS.replace("REQUEUES", str(settings().requeues))
    assert (ROOT / "slurm/run.sbatch").read_text().endswith(f"\n{rule}\n")


def refused(tmp_path: Path, *words: str, path: str | None = None) -> str:
    done = scalerun("launch=slurm", *words, cwd=tmp_path, **({"PATH": path} if path is not None else {}))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    return done.stderr


def test_no_slurm_on_this_machine(tmp_path: Path) -> None:
    assert "launch=local" in refused(tmp_path, path="/nonexistent")


def test_unknown_settings_are_refused_with_the_valid_list(tmp_path: Path) -> None:
    said = refused(tmp_path, "launch.partitoin=gpu")
    assert "did you mean 'launch.partition'" in said
    assert "launch.array_parallelism" in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.minutes=0", "launch.minutes=0 must be an integer in [1, "),
        ("launch.signal_seconds=99999", "time limit"),
        ("launch.memory_gb=-1", "must be a number in (0, "),
        ("launch.requeues=-1", "in [0, "),
        ("launch.max_devices=0", "in [1, "),
        ("launch.gpus=3", "must be true or false"),
        ("launch.sbatch=gres", "must be"),
        ("launch.sbatch={gres:[a]}", "must be"),
    ],
)
def test_wrong_values(word: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, word)


@pytest.mark.parametrize("partition", ["a b", "a\nb", "$(touch x)", "'", "`x`", "a;b", ""])
def test_nothing_odd_reaches_a_job_script(partition: str) -> None:
    wanted = msgspec.structs.replace(settings("launch.node_local=[]"), partition=partition)
    with pytest.raises(slurm.LaunchError, match="must be one word"):
        slurm._check(Path("/shared/runs"), wanted)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("time", "1", "--time is set by scalerun"),
        ("ti", "1", "--time is set by scalerun"),  # sbatch takes abbreviations
        ("cpus_per_task", "1", "--cpus-per-task is set by scalerun"),
        ("array", "0-9", "--array is set by scalerun"),
        ("-p", "x", "is no name of an option"),
        ("comment=x --wrap", "x", "is no name of an option"),
        ("gres\n", "x", "is no name of an option"),
        ("comment", "x\nrm -rf /", "must be one line"),
        ("export", "ALL,WANDB_API_KEY=abc", "hold no secret"),
    ],
)
def test_further_options_that_are_refused(option: str, value: str, said: str) -> None:
    """Fails if an option undoes what the launcher counts on, or a second line or a secret gets into the job script."""
    wanted = msgspec.structs.replace(settings("launch.node_local=[]"), sbatch={option: value})
    with pytest.raises(slurm.LaunchError, match=said) as e:
        slurm._check(Path("/shared/runs"), wanted)
    assert "abc" not in str(e.value)


def test_further_options_compose() -> None:
    wanted = settings("launch.sbatch={gres:'gpu:a100:1',nice:100}", "launch.sbatch.exclusive=true")
    assert wanted.sbatch == {"gres": "gpu:a100:1", "nice": 100, "exclusive": True}
    assert {"gres": "gpu:a100:1", "nodes": 1}.items() <= slurm._parameters((1, 1), wanted).items()


def test_what_a_job_around_the_launcher_sets_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if SBATCH_TIMELIMIT overrules launch.minutes, or a world of the outer job reaches the inner one."""
    inherited = ("SLURM_CPU_BIND", "SBATCH_TIMELIMIT", "SLURM_JOB_ID", "SQUEUE_STATES", "WORLD_SIZE", "MASTER_PORT")
    for name in (*inherited, "SLURM_CONF", "SCALERUN_RUNS", "RANKS"):
        monkeypatch.setenv(name, "1")
    with queue.own_environment():
        assert not set(inherited) & set(os.environ)
        assert {"SLURM_CONF", "SCALERUN_RUNS", "RANKS", "PATH"} <= set(os.environ)
    assert set(inherited) <= set(os.environ)


def test_secrets_and_second_lines_are_kept_out_of_setup() -> None:
    lines = ["export WANDB_API_KEY=abc", "module load x\nrm -rf /"]
    wanted = msgspec.structs.replace(settings("launch.node_local=[]"), setup=lines)
    with pytest.raises(slurm.LaunchError, match="secret") as e:
        slurm._check(Path("/shared/runs"), wanted)
    assert "abc" not in str(e.value)
    assert "must be one line" in str(e.value)


def test_places_that_nodes_do_not_share() -> None:
    with pytest.raises(slurm.LaunchError, match=r"runs_dir .*shared file system"):
        slurm._check(Path("/tmp/runs"), settings())


def test_a_site_file_composes() -> None:
    folder = Path(__file__).resolve().parent.parent / "slurm"
    (composed,) = config.compose(["--config-dir", str(folder), "launch=example_site"])
    assert isinstance(composed.launch, config.SlurmLaunch)
    assert (composed.launch.partition, composed.launch.requeues) == ("gpu", 10)


Says = Callable[[str, str], None]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """`says(NAME, SCRIPT)` puts a program before SLURM's own; those that it did not put do not answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    for name in ("squeue", "sacct", "scancel"):
        put(name, f"echo {name} does not answer >&2; exit 1")
    return put


def test_following_outlives_a_queue_that_does_not_answer(
    says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers number 1, 2 and 4 are errors; the run is finished when the fifth comes."""
    root, calls = tmp_path / "runs", tmp_path / "calls"
    run_dir = prepare(root, specs()[0])
    run_dir.append_event({"event": "submitted", "job": "7"})
    says(
        "squeue",
        f"""echo >> {calls}
        case $(wc -l < {calls}) in
        3) echo "7|RUNNING|None" ;;
        5) echo '{{"status": "finished", "metrics": {{}}}}' > {run_dir}/result.json ;;
        *) echo "Unable to contact slurm controller" >&2; exit 1 ;;
        esac""",
    )
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    assert slurm._follow({run_dir.path.name}, root)
    assert capsys.readouterr().out.splitlines() == ["1 running", "1 finished"]


def test_following_ends_where_the_queue_never_answers(
    says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = prepare(tmp_path / "runs", specs()[0])
    run_dir.append_event({"event": "submitted", "job": "7"})
    monkeypatch.setattr(slurm, "PATIENCE", 0.0)
    assert not slurm._follow({run_dir.path.name}, tmp_path / "runs")
    assert "squeue does not answer" in (said := capsys.readouterr().err)
    assert "stops following" in said


def test_the_job_around_a_run_is_not_the_runs_job(says: Says, tmp_path: Path) -> None:
    """Somebody ran it in a shell that is job 99, and the shell lives on."""
    root = tmp_path / "runs"
    run_dir = prepare(root, specs()[0])
    run_dir.append_event({"event": "submitted", "job": "7"})  # it is over
    run_dir.append_event({"event": "start", "job": "99"})
    (run_dir.path / "records.jsonl").touch()
    says("squeue", "echo '99|RUNNING|None'")
    assert [(r["state"], r["job"]) for r in overview.status(root)] == [("interrupted", "7")]
    run_dir.write_result({"status": "failed", "reason": "why"})
    assert [(r["state"], r["detail"]) for r in overview.status(root)] == [("failed", "why")]
    assert not slurm._in_hand(run_dir, queue.entries())
    assert slurm.cancel(root) == []  # scancel would have said no

    says("squeue", "echo '99|RUNNING|None'; echo '7|PENDING|Priority'")  # tried again
    says("scancel", f'echo "$@" > {tmp_path}/cancelled')
    assert [(r["state"], r["detail"]) for r in overview.status(root)] == [("queued", "Priority")]
    assert slurm._in_hand(run_dir, queue.entries())
    with run_dir.lock():
        run_dir.clear_result()
        assert [r["state"] for r in overview.status(root)] == ["running"]
    assert slurm.cancel(root) == ["7"]
    assert (tmp_path / "cancelled").read_text() == "-- 7\n"


def test_a_finished_run_whose_noise_is_being_measured_is_followed(says: Says, tmp_path: Path) -> None:
    """Fails if launch.wait returns at once, for the run has its result already."""
    run_dir = prepare(tmp_path / "runs", specs("measure.noise=full")[0])
    run_dir.append_event({"event": "submitted", "job": "7"})
    run_dir.write_result({"status": "finished", "metrics": {}})
    says("squeue", "echo '7|RUNNING|None'")
    assert [r["state"] for r in overview.status(tmp_path / "runs")] == ["running"]
    record = {"kind": "noise", "method": "full", "step": 1, "samples": 1, "t": 0.1, "batch": 1, "enough": False}
    (run_dir.path / "records.jsonl").write_text(json.dumps(record) + "\n")
    assert [r["state"] for r in overview.status(tmp_path / "runs")] == ["finished"]


@pytest.mark.parametrize(
    ("end", "state"),
    [("PREEMPTED", "interrupted"), ("TIMEOUT", "interrupted"), ("NODE_FAIL", "interrupted"), ("FAILED", "failed")],
)
def test_a_job_that_slurm_ended_is_no_failed_run(end: str, state: str, says: Says, tmp_path: Path) -> None:
    """Fails if a preempted run were finished or failed: the same command goes on with it."""
    run_dir = prepare(tmp_path / "runs", specs()[0])
    run_dir.append_event({"event": "submitted", "job": "7"})
    (run_dir.path / "records.jsonl").touch()
    says("squeue", "exit 0")
    says("sacct", f"echo '7|{end}'")
    assert [(r["state"], r["detail"]) for r in overview.status(tmp_path / "runs")] == [(state, f"SLURM: {end}")]


@pytest.mark.parametrize(("code", "requeued"), [(137, 10), (75, 12), (200, 0), (1, 0)])
def test_a_requeue_spends_no_restart_of_a_killed_process(code: int, requeued: int, says: Says, tmp_path: Path) -> None:
    """A job that was preempted fifty times before. Fails if those count, or if a process that always dies goes on."""
    run_dir = prepare(tmp_path / "runs", specs()[0])
    says("srun", f"exit {code}")
    says("squeue", "echo RUNNING")
    says("scontrol", f"echo >> {tmp_path}/requeued")
    says("sleep", "exit 0")
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "50"}
    for _ in range(12):
        done = subprocess.run(["bash", ROOT / "slurm/run.sbatch", run_dir.path], env=environment)
        assert done.returncode == code
    calls = tmp_path / "requeued"
    assert (len(calls.read_text().splitlines()) if calls.exists() else 0) == requeued


@pytest.mark.parametrize(
    ("job", "environment"),
    [
        ("7", {"SLURM_JOB_ID": "7"}),
        ("7_0", {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}),
    ],
)
def test_the_script_says_whose_job_it_is(job: str, environment: dict[str, str], says: Says, tmp_path: Path) -> None:
    run_dir = prepare(tmp_path / "runs of 'mine'", specs()[0])
    says("srun", "exit 200")
    done = subprocess.run(["bash", ROOT / "slurm/run.sbatch", run_dir.path], env={**os.environ, **environment})
    assert done.returncode == 200
    assert queue.last_job(run_dir) == queue.Job(job, 0)
    assert (run_dir.path / "jobs.jsonl").stat().st_mode & 0o077 == 0
