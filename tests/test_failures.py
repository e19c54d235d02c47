"""Failure drills, one fault each: what was broken is said, and the run ends in the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ENVIRONMENT, ROOT, prepare, rows, scalerun, specs, worker

from scaling_exps import config, records, train
from scaling_exps.launch import directories, local
from scaling_exps.plan import RunSpec

OFTEN = ["batch=16", "recipe.samples=4800", "checkpoint.minutes=1e-9"]  # 300 steps; a save at every look


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return specs(*OFTEN)[0]


@pytest.fixture(scope="module")
def undisturbed(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = prepare(tmp_path_factory.mktemp("undisturbed"), spec)
    torch.set_num_threads(1)
    assert train.run(run_dir) == "finished"
    return run_dir


@pytest.fixture
def halfway(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in the middle: two checkpoints, and records up to the newer one."""
    run_dir = prepare(tmp_path, spec)
    step = train.Trainer.train_step

    def steps(trainer: train.Trainer) -> None:
        step(trainer)
        if trainer.step >= spec.science.steps // 2:
            train.runs._signals.append(signal.SIGTERM)  # what the handler does

    with monkeypatch.context() as m:
        m.setattr(train.Trainer, "train_step", steps)
        m.setattr(train.runs, "LOOK", 0.1)
        assert train.run(run_dir) == "stopped"
    train.runs._signals.clear()
    assert records.state(run_dir) == "interrupted"
    assert (run_dir / "checkpoint.prev.pt").exists()
    return run_dir


def goes_on(run_dir: Path, undisturbed: Path) -> None:
    assert train.run(run_dir) == "finished"
    assert rows(run_dir) == rows(undisturbed)
    assert len((run_dir / "records.jsonl").read_text().splitlines()) == len(rows(undisturbed))
    a, b = (torch.load(d / "checkpoint.pt", weights_only=True)["net"] for d in (run_dir, undisturbed))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_signal_saves_and_the_run_goes_on(halfway: Path, undisturbed: Path) -> None:
    state = torch.load(halfway / "checkpoint.pt", weights_only=True)
    assert state["step"] >= records.read_spec(halfway).science.steps // 2  # saved when told, not when due
    goes_on(halfway, undisturbed)


@pytest.mark.parametrize("name", ["cut", "flipped", "empty", "gone", "both"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    name: str, halfway: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = halfway / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": bytes(content[: len(content) // 2]), "empty": b""}.get(name, bytes(content))
    path.write_bytes(damaged)
    if name == "gone":  # killed between the two renames of a save
        path.unlink()
    if name == "both":
        (halfway / "checkpoint.prev.pt").write_bytes(damaged)
    goes_on(halfway, undisturbed)
    assert ("damaged" in capfd.readouterr().err) == (name != "gone")


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.0])
def test_records_cut_in_a_line(keep: float, halfway: Path, undisturbed: Path) -> None:
    """A torn line past the checkpoint is cut off; records that the checkpoint counts on lead back to an older state."""
    path = halfway / "records.jsonl"
    content = path.read_bytes()
    torn = b'{"kind": "train", "st'
    path.write_bytes(content + torn if keep == 1 else content[: int(keep * len(content))])
    goes_on(halfway, undisturbed)


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(halfway: Path, undisturbed: Path) -> None:
    """The disk, the network or the memory failed, not the file: starting anew would cut the records off."""
    whole = {name: (halfway / name).read_bytes() for name in ("checkpoint.pt", "checkpoint.prev.pt", "records.jsonl")}
    (halfway / "checkpoint.pt").unlink()
    (halfway / "checkpoint.pt").symlink_to("checkpoint.pt")  # reading it is an OSError, for root too
    assert train.run(halfway) == "failed"
    assert "symbolic links" in directories.reason(halfway)
    (halfway / "checkpoint.pt").unlink()
    (halfway / "checkpoint.pt").write_bytes(whole["checkpoint.pt"])
    assert whole == {name: (halfway / name).read_bytes() for name in whole}
    goes_on(halfway, undisturbed)


def test_what_a_killed_save_left_is_removed(halfway: Path, undisturbed: Path) -> None:
    (halfway / ".checkpoint.pt.4711").write_bytes(b"half a checkpoint")
    goes_on(halfway, undisturbed)
    assert not list(halfway.glob(".*"))


def test_a_clock_that_jumps_changes_nothing(halfway: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 86400 * 365)
    goes_on(halfway, undisturbed)


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="a small tmpfs needs root")
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    spec: RunSpec, undisturbed: Path, tmp_path: Path
) -> None:
    size = (undisturbed / "checkpoint.pt").stat().st_size
    with small_disk(tmp_path / "disk", f"{2 * size // 1024 + 60}k"):  # two checkpoints fit; a third, being written, not
        run_dir = prepare(tmp_path / "disk", spec)
        assert train.run(run_dir) == "failed"
        why = directories.reason(run_dir)
        assert "space" in why.lower() or "write" in why.lower(), why
        assert train.trainer.load_checkpoint(run_dir / "checkpoint.pt", torch.device("cpu")) is not None
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path / "disk"], check=True)
        goes_on(run_dir, undisturbed)


def test_two_launchers_race_for_one_run(spec: RunSpec, tmp_path: Path) -> None:
    (big,) = specs("recipe.samples=1000000")
    run_dir = prepare(tmp_path / "runs", big)
    first = subprocess.Popen(worker(run_dir), env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while records.holder(run_dir) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        second = scalerun(
            "model.width=4", "recipe.epochs=null", "recipe.samples=1000000", "logger=none",
            "measure.statistics_samples=64", cwd=tmp_path,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"held by process {first.pid} on" in second.stderr
        with pytest.raises(records.BusyError, match=f"process {first.pid} on"):
            train.run(run_dir)
        os.kill(first.pid, signal.SIGTERM)
        assert first.wait(timeout=30) == train.AGAIN
    finally:
        first.kill()
        first.wait()
    assert records.state(run_dir) == "interrupted"
    assert "saved and stopped" in (run_dir / "log.txt").read_text()


def two_ranks(root: Path, *words: str) -> Path:
    (spec,) = specs("batch=32", "recipe.micro_batch=16", "recipe.samples=64", *words)
    return prepare(root, replace(spec, placement=replace(spec.placement, world_size=2)))


def test_all_ranks_leave_a_run_that_somebody_took_in_the_last_instant(tmp_path: Path) -> None:
    """A shared lock does not show as a running run, and is in the way: what another launcher does between the look and
    the lock. Fails by a deadlock if rank 0 alone goes on to the next run."""
    held, free = two_ranks(tmp_path), two_ranks(tmp_path, "seed=1")
    with open(held / "lock", "a+") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        done = subprocess.run(
            [*worker(held, 2), str(free)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100
        )
    assert done.returncode == 0, done.stderr
    assert (records.state(held), records.state(free)) == ("waiting", "finished")


def test_a_look_at_a_run_does_not_keep_it_from_starting(spec: RunSpec, tmp_path: Path) -> None:
    run_dir = prepare(tmp_path, spec)
    with open(run_dir / "lock", "a+") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        threading.Timer(0.15, fcntl.flock, (f, fcntl.LOCK_UN)).start()
        with records.lock(run_dir):
            assert records.holder(run_dir) is not None


def test_a_sweep_of_two_devices_goes_past_a_run_that_fails_and_says_why(tmp_path: Path) -> None:
    """The network dies in its fourth training step on both ranks, for seed 0 only."""
    (tmp_path / "dying.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, classes, dies):\n        super().__init__()\n"
        "        self.layer, self.dies, self.calls = torch.nn.Linear(64, classes), dies, 0\n\n"
        "    def forward(self, x):\n        self.calls += self.training\n"
        "        if self.dies and self.calls > 3:\n            raise torch.OutOfMemoryError('no room for a tensor')\n"
        "        return self.layer(x.flatten(1))\n\n\n"
        "def net(shape, classes, dies):\n    return Net(classes, dies)\n"
    )
    words = [
        "model=custom", "model.factory=dying:net", "model.norm=layer", "batch=32", "recipe.batch=32",
        "recipe.micro_batch=16", "recipe.epochs=null", "recipe.samples=256", "logger=none", "launch.devices=2",
        "measure.evaluations=1",
    ]  # fmt: skip
    done = scalerun(
        "-m", *words, "model.options={dies:true},{dies:false}", cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}"
    )
    assert done.returncode == 1
    states = {r["state"]: r["detail"] for r in json.loads(scalerun("status", "--json", cwd=tmp_path).stdout)}
    assert states.keys() == {"finished", "failed"}, (states, done.stderr)
    assert "OutOfMemoryError: no room for a tensor" in states["failed"]


def test_a_begun_run_keeps_its_number_of_processes(tmp_path: Path) -> None:
    run_dir = two_ranks(tmp_path)
    subprocess.run(worker(run_dir, 2), env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True)
    (run_dir / "result.json").unlink()  # as if killed in the last instant
    (spec,) = specs("batch=32", "recipe.micro_batch=16", "recipe.samples=64")
    assert spec.placement.world_size == 1
    assert local.launch([spec], tmp_path, config.compose([])[0].launch)
    assert (records.read_json(run_dir / "result.json") or {})["world_size"] == 2


def test_what_a_finished_run_says_of_its_data_stays(spec: RunSpec, undisturbed: Path) -> None:
    directories.write([replace(spec, dataset_path="/elsewhere", experiment="another")], undisturbed.parent)
    assert records.read_spec(undisturbed) == spec


def test_workers_side_by_side_have_cards_of_their_own() -> None:
    cards = ["4", "5", "6", "7"]
    shares = [local._share(cards, share, 2)["CUDA_VISIBLE_DEVICES"] for share in range(3)]
    assert shares == ["4,5", "6,7", "4,5"]
    assert local._share([], 1, 2) == {}


def test_wandb_unreachable_is_said_once_and_stops_nothing(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def unreachable(**_: object) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", unreachable)
    (mirrored,) = specs(*OFTEN, "logger=wandb")
    run_dir = prepare(tmp_path, mirrored)
    assert train.run(run_dir) == "finished"
    assert rows(run_dir) == rows(undisturbed)
    assert capfd.readouterr().err.count("wandb is off") == 1
