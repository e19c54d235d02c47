"""Where runs lie, and what else a machine has: disks, quotas, names, homes, many runs, many launchers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import forked
import msgspec
import pytest
import torch
from support import TINY, prepare, same_run, scalerun, small_disk, specs

from scaling_exps import launch, train
from scaling_exps.records import RunDir
from scaling_exps.report import ReportError
from scaling_exps.report.runs import folder

root = pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="a small tmpfs needs root")


def remount(path: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", path], check=True)


@root
def test_a_disk_that_cannot_be_written_is_refused_and_costs_no_other_run(tmp_path: Path) -> None:
    """Fails if a launch there were no refusal of one message, or if such a run ended the sweep."""
    here, other = specs("seed=[0,1]")
    (tmp_path / "file").touch()
    with small_disk(tmp_path / "disk", "9m"):
        run_dirs = [prepare(tmp_path / "disk/runs", here), prepare(tmp_path / "runs", other)]
        remount(tmp_path / "disk", "ro")
        for place in ("disk/new", "file", "disk/runs"):
            done = scalerun(*TINY, "seed=2", f"runs_dir={place}", cwd=tmp_path)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "choose another with runs_dir=" in done.stderr
        assert not train.run_all(run_dirs)
        assert [d.state() for d in run_dirs] == ["waiting", "finished"]
        remount(tmp_path / "disk", "rw")
        assert train.run(run_dirs[0]) == "finished"


@pytest.mark.slow
@root
def test_a_quota_that_is_reached_in_the_middle_of_a_record(tmp_path: Path) -> None:
    """Fails if the run did not say so, or took the half record for one when it goes on."""
    words = ["recipe.samples=1600", "measure.train_records=400", "measure.noise=none", "checkpoint.minutes=1000"]
    (spec,) = specs(*words)
    whole = prepare(tmp_path / "whole", spec)
    torch.set_num_threads(1)
    assert train.run(whole) == "finished"
    with small_disk(tmp_path / "disk", "24k"):
        run_dir = prepare(tmp_path / "disk", spec)
        assert train.run(run_dir) == "failed"
        records = (run_dir.path / "records.jsonl").read_bytes()
        assert len(records) > 4000 and not records.endswith(b"\n")
        assert run_dir.state() == "failed" or not run_dir.result()  # there may have been no room to say it in
        remount(tmp_path / "disk", "size=9m")
        assert train.run(run_dir) == "finished"
        same_run(run_dir, whole)


def test_a_report_whose_folder_goes_while_it_is_written(tmp_path: Path) -> None:
    def written() -> None:
        with folder(tmp_path / "out"):
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out/index.html").touch()

    with pytest.raises(ReportError, match="choose another with --out"):
        written()


def test_every_run_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Fails if a launch named the first alone."""
    planned = specs("seed=[0,1]")
    for spec in planned:
        (tmp_path / "runs" / spec.run_id / "run.json").mkdir(parents=True)
    done = scalerun(*TINY, "seed=[0,1]", cwd=tmp_path)
    assert done.returncode == 2 and all(spec.run_id in done.stderr for spec in planned)


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """Fails if a sweep, its report or its figures needed one."""
    homeless = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "MPLCONFIGDIR": ""}
    for words in ([*TINY, "logger=[wandb,csv]"], ["report"], ["status"]):
        done = scalerun(*words, cwd=tmp_path, **homeless)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "report/index.html").exists() and list((tmp_path / "report").glob("*.png"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_thousand_runs(tmp_path: Path) -> None:
    """Fails if a command took minutes over them, one descriptor or one process each, or wrote a screen a run."""
    (first,) = specs("logger=wandb")
    for seed in range(5000):
        spec = msgspec.structs.replace(first, science=msgspec.structs.replace(first.science, seed=seed))
        folder = tmp_path / "runs" / spec.run_id
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(spec.to_json()))
    rows = json.loads(scalerun("status", "--json", cwd=tmp_path).stdout)
    assert len(rows) == 5000 and {r["state"] for r in rows} == {"waiting"}
    for command, code in (("status", 0), ("cancel", 0), ("sync", 2), ("report", 2)):
        done = scalerun(command, cwd=tmp_path)
        assert done.returncode == code and "Traceback" not in done.stderr
    assert "5000 waiting" in scalerun("status", cwd=tmp_path).stdout
    assert scalerun("rm", spec.run_id, "--yes", cwd=tmp_path).returncode == 0
    assert len(launch.status(tmp_path / "runs")) == 4999


@pytest.mark.slow
def test_names_of_odd_letters(tmp_path: Path) -> None:
    """Fails if a shell, Hydra, rich, a page or a format string read the name of a folder."""
    where = tmp_path / 'it\'s "a" $(touch owned) `id` ${oc.env:HOME} [red] %s {x} é κ 😀 # ; & \\ \n *?'
    where.mkdir()
    sweep = [*TINY, "seed=[0,1]", "logger=csv", "measure.noise=none", "launch.parallel=2"]
    for words in (sweep, ["status"], ["report"], ["report", "--markdown"], ["plan", *sweep]):
        done = scalerun(*words, cwd=where)
        assert done.returncode == 0, done.stderr
    a, b = RunDir.under(where / "runs")
    for words in (["show", str(a)], ["diff", str(a), str(b)], ["export", str(a), "--to", "safetensors"]):
        done = scalerun(*words, cwd=where)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("owned")) and (where / "report/index.html").exists()


@pytest.mark.slow
def test_two_identical_commands_in_the_same_second(tmp_path: Path) -> None:
    """Fails if one ended in an error that is not "it is running", or if a run was trained by both."""
    words = ["-m", "scaling_exps.cli", *TINY, "seed=[0,1,2]", "launch.parallel=2"]
    commands = [forked.start(words, cwd=tmp_path) for _ in range(2)]
    for command in commands:
        command.join()
    assert {c.exitcode for c in commands} <= {0, 1} and 0 in {c.exitcode for c in commands}
    run_dirs = RunDir.under(tmp_path / "runs")
    assert [d.state() for d in run_dirs] == ["finished"] * 3
    assert [sum(e["event"] == "start" for e in d.events()) for d in run_dirs] == [1] * 3
