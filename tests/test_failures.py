"""Failure drills, one fault each: what was broken is said, and the run ends in the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import msgspec
import pytest
import torch
from support import (
    ENVIRONMENT,
    ROOT,
    TINY,
    placed,
    prepare,
    rows,
    same_run,
    scalerun,
    small_disk,
    specs,
    take_steps,
    weights,
    work,
    worker,
)

from scaling_exps import cli, config, mirror, optim, plan, rules, train
from scaling_exps.launch import local
from scaling_exps.plan import RunSpec
from scaling_exps.records import BusyError, RunDir
from scaling_exps.train import checkpoint
from scaling_exps.train import loop as loop_module
from scaling_exps.train import worker as worker_module

OFTEN = ["batch=16", "recipe.samples=1600", "checkpoint.minutes=1e-9"]  # 100 steps; a save at every look


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    torch.set_num_threads(1)  # another number, other bits
    return specs(*OFTEN)[0]


@pytest.fixture(scope="module")
def undisturbed(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = prepare(tmp_path_factory.mktemp("undisturbed"), spec)
    assert train.run(run_dir) == "finished"
    return run_dir


@pytest.fixture(scope="module")
def stopped(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = half(prepare(tmp_path_factory.mktemp("stopped"), spec))
    assert run_dir.previous.exists()
    return run_dir


def half(run_dir: RunDir) -> RunDir:
    """The run, stopped in the middle."""
    spec, step = run_dir.spec(), train.Trainer.train_step

    def steps(trainer: train.Trainer) -> None:
        step(trainer)
        if trainer.step >= spec.science.steps // 2:
            worker_module._signals.append(signal.SIGTERM)  # what the handler does

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train.Trainer, "train_step", steps)
        m.setattr(loop_module, "POLL", 0.0)  # asked at every step
        assert train.run(run_dir) == "stopped"
    worker_module._signals.clear()
    assert run_dir.state() == "interrupted"
    return run_dir


@pytest.fixture
def halfway(stopped: RunDir, tmp_path: Path) -> RunDir:
    """A run that was stopped in the middle: two checkpoints, and records up to the newer one."""
    return RunDir(shutil.copytree(stopped.path, tmp_path / stopped.path.name))


def goes_on(run_dir: RunDir, undisturbed: RunDir) -> None:
    assert train.run(run_dir) == "finished"
    same_run(run_dir, undisturbed)


def test_a_signal_saves_and_the_run_goes_on(halfway: RunDir, undisturbed: RunDir) -> None:
    state = torch.load(halfway.newest, weights_only=True)
    assert state["step"] == halfway.spec().science.steps // 2  # saved when asked to, not when due
    goes_on(halfway, undisturbed)


@pytest.mark.parametrize("name", ["cut", "flipped", "empty", "gone", "both"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    name: str, halfway: RunDir, undisturbed: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    path = halfway.newest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": bytes(content[: len(content) // 2]), "empty": b""}.get(name, bytes(content))
    path.write_bytes(damaged)
    if name == "gone":  # killed between the two renames of a save
        path.unlink()
    if name == "both":
        halfway.previous.write_bytes(damaged)
    goes_on(halfway, undisturbed)
    assert ("damaged" in capfd.readouterr().err) == (name != "gone")


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.0])
def test_records_cut_in_a_line(keep: float, halfway: RunDir, undisturbed: RunDir) -> None:
    """A torn line past the checkpoint is cut off; records that the checkpoint counts on lead back to an older state."""
    path = halfway.path / "records.jsonl"
    content = path.read_bytes()
    torn = b'{"kind": "train", "st'
    path.write_bytes(content + torn if keep == 1 else content[: int(keep * len(content))])
    goes_on(halfway, undisturbed)


@pytest.mark.parametrize("line", [0, -1])
def test_an_altered_record_leads_further_back(
    line: int, halfway: RunDir, undisturbed: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    """One altered character in a record that the checkpoint counts on: the last is the newer checkpoint's alone, the
    first is both's. Fails if the record were skipped: a run then ends with the metrics of an earlier evaluation."""
    path = halfway.path / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"step"', b'"stop"')
    path.write_bytes(b"".join(lines))
    assert halfway.records().damaged == 1
    goes_on(halfway, undisturbed)
    assert capfd.readouterr().err.count("going further back") == (2 if line == 0 else 1)


def test_a_kept_checkpoint_is_gone_back_to(
    tmp_path: Path, undisturbed: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if a run whose two newest checkpoints are bad began anew beside a whole one of its middle."""
    (keeping,) = specs(*OFTEN, "checkpoint.keep=[0.5]")
    run_dir = prepare(tmp_path, keeping)
    assert train.run(run_dir) == "finished"
    for path in (run_dir.newest, run_dir.previous):
        path.write_bytes(b"")
    run_dir.clear_result()
    capfd.readouterr()
    goes_on(run_dir, undisturbed)
    assert "from step 50" in capfd.readouterr().out


def test_a_checkpoint_beyond_the_run_is_not_believed(halfway: RunDir, undisturbed: RunDir) -> None:
    for step in (10**9, -1, "7"):
        state = torch.load(halfway.newest, weights_only=True)
        torch.save({**state, "step": step}, halfway.newest)
        trainer = train.Trainer(halfway.spec())
        checkpoint.restore(trainer, halfway)
        assert 0 < trainer.step < halfway.spec().science.steps // 2, step  # the one before
    goes_on(halfway, undisturbed)


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    halfway: RunDir, undisturbed: RunDir
) -> None:
    """The disk, the network or the memory failed, not the file: starting anew would cut the records off."""
    files = (halfway.newest, halfway.previous, halfway.path / "records.jsonl")
    whole = {file: file.read_bytes() for file in files}
    halfway.newest.unlink()
    halfway.newest.symlink_to("checkpoint.pt")  # reading it is an OSError, for root too
    assert train.run(halfway) == "failed"
    assert "symbolic links" in halfway.reason()
    halfway.newest.unlink()
    halfway.newest.write_bytes(whole[halfway.newest])
    assert whole == {file: file.read_bytes() for file in files}
    goes_on(halfway, undisturbed)


def test_what_a_killed_save_left_is_removed(halfway: RunDir, undisturbed: RunDir) -> None:
    (halfway.path / ".checkpoint.pt.4711").write_bytes(b"half a checkpoint")
    goes_on(halfway, undisturbed)
    assert not list(halfway.path.glob(".*"))


def test_a_clock_that_jumps_changes_nothing(
    halfway: RunDir, undisturbed: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 86400 * 365)
    goes_on(halfway, undisturbed)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="a small tmpfs needs root")
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    spec: RunSpec, undisturbed: RunDir, tmp_path: Path
) -> None:
    size = undisturbed.newest.stat().st_size
    with small_disk(tmp_path / "disk", f"{2 * size // 1024 + 60}k"):  # two checkpoints fit; a third, being written, not
        run_dir = prepare(tmp_path / "disk", spec)
        assert train.run(run_dir) == "failed"
        why = run_dir.reason()
        assert "space" in why.lower() or "write" in why.lower(), why
        assert checkpoint.load(run_dir.newest, torch.device("cpu")) is not None
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path / "disk"], check=True)
        goes_on(run_dir, undisturbed)


@pytest.mark.slow
def test_two_launchers_race_for_one_run(spec: RunSpec, tmp_path: Path) -> None:
    (big,) = specs("recipe.samples=1000000")
    run_dir = prepare(tmp_path / "runs", big)
    first = forked.start(worker(run_dir))
    try:
        while run_dir.holder() is None:
            assert first.is_alive()
            time.sleep(0.05)
        second = scalerun(*TINY, "recipe.samples=1000000", cwd=tmp_path)
        assert second.returncode == 1
        assert f"held by process {first.pid} on" in second.stderr
        with pytest.raises(BusyError, match=f"process {first.pid} on"):
            train.run(run_dir)
        os.kill(first.pid, signal.SIGTERM)
        first.join()
        assert first.exitcode == train.AGAIN
    finally:
        first.kill()
        first.join()
    assert run_dir.state() == "interrupted"
    assert "saved and stopped" in run_dir.log.read_text()


def two_ranks(root: Path, *words: str) -> RunDir:
    (spec,) = specs("batch=32", "recipe.micro_batch=16", "recipe.samples=64", *words)
    return prepare(root, placed(spec, 2))


@pytest.mark.slow
def test_all_ranks_leave_a_run_that_somebody_took_in_the_last_instant(tmp_path: Path) -> None:
    """A shared lock does not show as a running run, and is in the way: what another launcher does between the look and
    the lock. Fails by a deadlock if rank 0 alone goes on to the next run."""
    held, free = two_ranks(tmp_path), two_ranks(tmp_path, "seed=1")
    with open(held.path / "lock", "a+") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        done = forked.run([*worker(held, 2), str(free)])
    assert done.returncode == 0, done.stderr
    assert (held.state(), free.state()) == ("waiting", "finished")


def test_ranks_of_a_step_meet_elsewhere_where_their_port_is_taken(tmp_path: Path) -> None:
    """A step of two tasks, by hand. The first port never answers, the next hangs up, the third is another step's.

    Fails if rank 0 gave up, if rank 1 took another for rank 0 or hung, or if a folder that is shown late were an error.
    """
    run_dir = prepare(tmp_path / "elsewhere", placed(specs("batch=64", "recipe.micro_batch=32")[0], 2))
    step = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }  # fmt: skip
    port = int((train.slurm_rank({**step, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) or {})["MASTER_PORT"])
    with socket.create_server(("", port)), socket.create_server(("", port + 1)) as rude:
        threading.Thread(target=lambda: [rude.accept()[0].close() for _ in range(9999)], daemon=True).start()
        store = torch.distributed.TCPStore("localhost", port + 2, None, True, wait_for_workers=False)
        store.set("name", b"of another step")
        late = RunDir(tmp_path / "runs" / run_dir.path.name)
        ranks = [
            forked.start(worker(late), env={**ENVIRONMENT, **step, "SLURM_PROCID": r, "SLURM_LOCALID": r}) for r in "01"
        ]
        time.sleep(0.5)
        run_dir.path.parent.rename(tmp_path / "runs")
        for rank in ranks:
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], late.log.read_text()
    assert (late.result() or {})["world_size"] == 2


def test_a_look_at_a_run_does_not_keep_it_from_starting(spec: RunSpec, tmp_path: Path) -> None:
    run_dir = prepare(tmp_path, spec)
    with open(run_dir.path / "lock", "a+") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        threading.Timer(0.15, fcntl.flock, (f, fcntl.LOCK_UN)).start()
        with run_dir.lock():
            assert run_dir.holder() is not None


# ---- whatever a run raises ----

NETWORK = """
import builtins

import torch


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class Net(torch.nn.Module):
    def __init__(self, classes, error):
        super().__init__()
        self.layer, self.error, self.calls = torch.nn.Linear(64, classes), error, 0

    def forward(self, x):
        self.calls += self.training
        x = self.layer(x.flatten(1))
        if self.error and self.calls > 3:
            if self.error == "loss":
                return x * torch.nan
            if self.error == "gradient":
                return Explode.apply(x)
            errors = {**vars(builtins), "OutOfMemoryError": torch.OutOfMemoryError}
            raise errors[self.error]("of my own")
        return x


def net(shape, classes, error):
    return Net(classes, error)
"""
CUSTOM = [
    "model=custom", "model.factory=dying:net", "model.norm=layer", "batch=32", "recipe.batch=32", "recipe.epochs=null",
    "recipe.samples=256", "logger=none", "measure.noise=none", "measure.evaluations=1",
]  # fmt: skip


def options(*errors: str) -> list[str]:
    """The words of a sweep of networks that raise in their fourth training step; "" never does."""
    return ["-m", *CUSTOM, "model.options=" + ",".join(f"{{error:{e or 'null'}}}" for e in errors)]


def failing(error: str, *words: str) -> RunSpec:
    """One run of such a network."""
    return plan.plan(config.compose([*CUSTOM, f"model.options={{error:{error}}}", *words]))[0]


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A network of the user's own that can be made to fail; the PYTHONPATH with which it is imported."""
    (tmp_path / "dying.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dying", raising=False)
    return f"{ROOT}:{tmp_path}"


def test_whatever_a_network_raises_the_sweep_goes_on(tmp_path: Path, dying: str) -> None:
    """Fails if an exception that nobody listed ended the sweep, or left no reason and traceback (repro/b03)."""
    errors = ["IndexError", "ValueError", "KeyError", "AssertionError", "TypeError", "OutOfMemoryError", ""]
    done = scalerun(*options(*errors), cwd=tmp_path, PYTHONPATH=dying)
    assert done.returncode == 1, done.stderr
    ended = [d.result() for d in RunDir.under(tmp_path / "runs")]
    assert len(ended) == len(errors) and all(ended), done.stderr
    failed = {r["reason"].split(":")[0]: r["traceback"] for r in ended if r and r["status"] == "failed"}
    assert failed.keys() == set(errors) - {""}
    assert all("dying.py" in trace and name in trace for name, trace in failed.items())


def test_a_failed_run_that_is_tried_again_is_failed_no_more(spec: plan.RunSpec, tmp_path: Path) -> None:
    """Fails if its old result stood while it loads: a job that is requeued then would stay failed."""
    run_dir, seen = prepare(tmp_path, spec), []

    def fit(spec: plan.RunSpec, run_dir: RunDir, signalled: object) -> dict[str, object]:
        seen.append(run_dir.result())
        raise train.TrainError("out of luck")

    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop_module, "fit", fit)
        assert [train.run(run_dir), train.run(run_dir)] == ["failed", "failed"]
    assert seen == [None, None] and run_dir.reason() == "out of luck"


@pytest.mark.slow
def test_a_sweep_of_two_devices_goes_past_a_run_that_fails_and_says_why(tmp_path: Path, dying: str) -> None:
    """The network dies in its fourth training step on both ranks, of one run only."""
    words = [*options("IndexError", ""), "recipe.micro_batch=16", "launch.devices=2"]
    done = scalerun(*words, cwd=tmp_path, PYTHONPATH=dying)
    assert done.returncode == 1
    states = {r["state"]: r["detail"] for r in json.loads(scalerun("status", "--json", cwd=tmp_path).stdout)}
    assert states.keys() == {"finished", "failed"}, (states, done.stderr)
    assert "IndexError: of my own" in states["failed"]


def starts(root: Path) -> list[int]:
    """How often each run was started."""
    return [sum(e["event"] == "start" for e in d.events()) for d in RunDir.under(root)]


@pytest.mark.slow
def test_a_run_that_failed_is_not_started_again_by_its_neighbour(tmp_path: Path, dying: str) -> None:
    """Two workers have one list. Fails if the second tried what the first has just failed (repro/b02), or if the next
    command did not try again."""
    words = [*options("IndexError", "KeyError", "TypeError"), "launch.parallel=2"]
    for command in (1, 2):
        done = scalerun(*words, cwd=tmp_path, PYTHONPATH=dying)
        assert done.returncode == 1
        assert starts(tmp_path / "runs") == [command] * 3, done.stderr
    run_dirs, since = RunDir.under(tmp_path / "runs"), time.time()
    for _ in range(2):  # one worker after the other, whatever the timing
        train.run_all(run_dirs, since=since)
    assert starts(tmp_path / "runs") == [3] * 3
    with pytest.raises(BusyError, match="was run by another process, and failed"):
        train.run(run_dirs[0], since=since)  # its neighbour looked before the failure, and has the lock after it


def test_a_failing_run_closes_what_it_opened(tmp_path: Path, dying: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one process. Fails if the first left its mirror or records open, or if its mirror, which reads how
    the run ended, were closed before that was written."""
    ends: list[tuple[RunDir, str]] = []
    mirrored = mirror.live

    @contextlib.contextmanager
    def live(run_dir: RunDir, spec: RunSpec) -> Iterator[None]:
        with mirrored(run_dir, spec):
            yield
        ends.append((run_dir, str((run_dir.result() or {}).get("status"))))

    monkeypatch.setattr(mirror, "live", live)
    sweep = [failing(error) for error in ("IndexError", "null")]
    run_dirs = [prepare(tmp_path, spec) for spec in sweep]
    assert not train.run_all(run_dirs)
    assert ends == [(run_dirs[0], "failed"), (run_dirs[1], "finished")]
    descriptors = Path("/proc/self/fd").iterdir()
    assert not [d for d in descriptors if d.exists() and tmp_path in d.resolve().parents]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "paper_adam"])
def test_nothing_is_updated_from_a_step_that_is_not_finite(
    what: str, optimizer: str, tmp_path: Path, dying: str
) -> None:
    """Fails if a gradient of infinities below a finite loss reached the weights, or the moments."""
    words = ["recipe.momentum=0.9"] if optimizer == "sgd" else []
    spec = failing(what, f"optimizer={optimizer}", "checkpoint.minutes=1e-9", *words)
    trainer = train.Trainer(spec)
    take_steps(trainer, 3)

    def state() -> list[torch.Tensor]:
        moments = [v for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        return [t.detach().clone() for t in (*trainer.net.parameters(), *moments)]

    before = state()
    with pytest.raises(train.TrainError, match="not finite at step 3 "):
        trainer.train_step()
    assert trainer.step == 3 and all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    run_dir = prepare(tmp_path, spec)
    assert train.run(run_dir) == "failed"
    assert "the loss or a gradient is not finite at step 3 (96 samples)" in run_dir.reason()
    saved = weights(run_dir)  # of the step before
    assert all(torch.equal(saved[k], v) for k, v in trainer.net.state_dict().items())


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_a_fused_optimizer_skips_a_step_by_found_inf(name: str) -> None:
    """What `Trainer._watch` relies on where the host does not wait: with found_inf = 1 torch moves neither weights nor
    state, with 0 it is the same step as without. Fails if an optimizer here were not fused, or torch ignored it."""
    betas = (0.9,) if name == "sgd" else (0.9, 0.99)
    results = []
    for flags in ((None, None), (0.0, 0.0), (0.0, 1.0)):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = optim.build(name, [p], rules.Hyper(0.1, betas, 1e-8, 0.01))
        assert optimizer.defaults["fused"]
        for flag in flags:
            p.grad = torch.linspace(-1, 1, 5)
            optimizer.found_inf = None if flag is None else torch.tensor(flag)  # type: ignore[attr-defined]
            optimizer.step()
            results.append([p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for k in (0, 1) for a, b in zip(results[k], results[k + 2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[4], results[5], strict=True))


# ---- pieces of minutes ----

PIECES = ["batch=4", "recipe.batch=4", "seed=[0,1]", "measure.noise=none", "measure.evaluations=2"]


def undisturbed_sweep(root: Path, sweep: list[RunSpec]) -> dict[str, RunDir]:
    run_dirs = {spec.run_id: prepare(root, spec) for spec in sweep}
    assert train.run_all(list(run_dirs.values()))
    return run_dirs


def test_minutes_that_are_over_save_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """In one process, a step a command. Fails if a stop lost or doubled anything, or its exit code were 0."""
    sweep = specs(*PIECES, "recipe.samples=12")
    whole = undisturbed_sweep(tmp_path / "whole", sweep)
    words = [*TINY, *PIECES, "recipe.samples=12", "launch.minutes=1e-9", f"runs_dir={tmp_path / 'runs'}"]
    codes = [1]
    while codes[-1]:
        codes.append(cli.main(words))
        assert len(codes) < 20
    assert set(codes[1:-1]) == {1} and len(codes) > 3
    for run_dir in RunDir.under(tmp_path / "runs"):
        same_run(run_dir, whole[run_dir.path.name])


def both_write(sweep: list[RunSpec], root: Path) -> bool:
    run_dirs = [RunDir(root / spec.run_id) for spec in sweep]
    return all(d.newest_record() is not None and d.holder() is not None for d in run_dirs)


@pytest.mark.slow
def test_workers_side_by_side_save_when_the_minutes_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The minutes end when both workers train. Fails if one did not hear, did not save, or lost or doubled anything."""
    sweep = specs(*PIECES, "recipe.samples=2000")
    whole = undisturbed_sweep(tmp_path / "whole", sweep)
    settings, clock = config.compose(["launch.parallel=2", "launch.minutes=60"])[0].launch, time.monotonic
    assert isinstance(settings, config.LocalLaunch)
    with monkeypatch.context() as m:
        m.setattr(time, "monotonic", lambda: clock() + 1e6 * both_write(sweep, tmp_path))
        assert not local.launch(sweep, tmp_path, settings)
    run_dirs = [RunDir(tmp_path / spec.run_id) for spec in sweep]
    assert [d.state() for d in run_dirs] == ["interrupted"] * 2 and all(d.begun for d in run_dirs)
    assert local.launch(sweep, tmp_path, settings)
    for run_dir in run_dirs:
        same_run(run_dir, whole[run_dir.path.name])


@pytest.mark.slow
def test_workers_end_with_their_launcher(tmp_path: Path) -> None:
    """The launcher is killed outright. Fails if its workers trained on, or died without saving."""
    sweep = specs(*PIECES, "recipe.samples=40000")
    words = [*TINY, *PIECES, "recipe.samples=40000", "launch.parallel=2", "runs_dir=."]
    process = forked.start(["-m", "scaling_exps.cli", *words], cwd=tmp_path)
    while not both_write(sweep, tmp_path):
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    run_dirs = [RunDir(tmp_path / spec.run_id) for spec in sweep]
    while any(d.holder() for d in run_dirs):  # (a worker that trained on would finish)
        time.sleep(0.05)
    assert [d.state() for d in run_dirs] == ["interrupted"] * 2 and all(d.begun for d in run_dirs)


@pytest.mark.slow
def test_a_begun_run_keeps_its_number_of_processes(tmp_path: Path) -> None:
    run_dir = two_ranks(tmp_path)
    work(run_dir, 2)
    run_dir.clear_result()  # as if killed in the last instant
    (spec,) = specs("batch=32", "recipe.micro_batch=16", "recipe.samples=64")
    assert spec.placement.world_size == 1
    assert local.launch([spec], tmp_path, config.compose([])[0].launch)
    assert (run_dir.result() or {})["world_size"] == 2


def test_an_elastic_run_goes_on_with_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, then two, from the middle of a train record. Fails if the loss were summed over other samples than
    were trained on, if the change were not said, or if it came unasked or to a run that is held."""
    (one,) = specs("batch=64", "recipe.micro_batch=32", "recipe.samples=1280", "measure.train_records=5")
    whole, run_dir = prepare(tmp_path / "whole", one), half(prepare(tmp_path, one))
    work(whole)
    two = placed(one, 2)
    assert run_dir.prepare(two).placement == one.placement
    (settings,) = config.compose(["launch.elastic=true", "launch.devices=2"])
    with run_dir.lock():
        monkeypatch.setattr(local, "_workers", lambda *_: None)
        assert isinstance(settings.launch, config.LocalLaunch) and not local.launch([two], tmp_path, settings.launch)
        assert run_dir.spec().placement == one.placement
    assert not local.launch([two], tmp_path, settings.launch)
    assert run_dir.spec().placement == two.placement
    work(run_dir, 2)
    ((event,), found) = ([r for r in rows(run_dir) if (r["kind"] == "event") == said] for said in (True, False))
    assert (event["step"], event["before"], event["after"]) == (10, 1, 2)
    for mine, theirs in zip(found, rows(whole), strict=True):
        for key in mine.keys() & {"step", "samples", "loss", "window", "accuracy", "weight_norm"}:
            assert mine.get(key) == pytest.approx(theirs.get(key), rel=1e-5), key


def test_what_a_finished_run_says_of_its_data_stays(spec: RunSpec, undisturbed: RunDir) -> None:
    undisturbed.prepare(msgspec.structs.replace(spec, dataset_path="/elsewhere", experiment="another"))
    assert undisturbed.spec() == spec


def test_workers_side_by_side_have_cards_of_their_own() -> None:
    cards = ["4", "5", "6", "7"]
    shares = [local._share(cards, share, 2)["CUDA_VISIBLE_DEVICES"] for share in range(3)]
    assert shares == ["4,5", "6,7", "4,5"]
    assert local._share([], 1, 2) == {}


def test_another_repository_s_commit_is_not_ours(tmp_path: Path) -> None:
    """Installed below somebody's repository, untracked there: fails if that one's commit were recorded as ours."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "theirs.txt").write_text("theirs")
    author = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), "add", "theirs.txt"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-qm", "theirs"], check=True)
    site = tmp_path / ".venv" / "site"
    for folder in ("scaling_exps", "conf"):
        shutil.copytree(ROOT / folder, site / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from scaling_exps.train import provenance; print(provenance.code(None))"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "{'commit': None}"
