"""A launcher on this machine that is killed, interrupted, or loses its terminal: its runs are saved, nobody is left.

The runs wait in the middle (gate.py) until the test has done what it does; no verdict hangs on the machine's speed.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import forked
import gate
import pytest
import torch
from support import ENVIRONMENT, ROOT, TINY

from scaling_exps import cli
from scaling_exps.records import RunDir

ENV = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
ONE, SIDE_BY_SIDE, TORCHRUN = ["seed=0"], ["seed=[0,1]", "launch.parallel=2"], ["seed=0", "launch.devices=2"]
pytestmark = pytest.mark.timeout(1200)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "scaling_exps.cli", *gate.SCIENCE, *words]


def until(true: Callable[[], object], where: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        logs = {p.name: p.read_text() for p in [*where.glob("*.txt"), *where.glob("runs/*/log.txt")]}
        assert time.monotonic() < end, logs
        time.sleep(0.1)


def held(where: Path) -> list[int]:
    """The processes that wait in the middle."""
    return [int(p.name.removeprefix("held-")) for p in where.glob("held-*")]


def processes(words: Sequence[str]) -> int:
    return 1 if list(words) == ONE else 2


def gone(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody waits for it
    return True


def start(where: Path, *words: str, program: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """A launcher whose processes have all come to the middle."""
    (where / "hold").touch()
    with open(where / "output.txt", "ab") as output:
        launcher = subprocess.Popen(
            [*program, *command(*words)], cwd=where, env=ENV, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    until(lambda: len(held(where)) == processes(words), where)
    return launcher


def saved(where: Path) -> None:
    """Every process is gone, every run saved what it had; the same command brings them to their end."""
    until(lambda: all(map(gone, held(where))), where)
    run_dirs = RunDir.under(where / "runs")
    assert run_dirs
    for run_dir in run_dirs:
        assert run_dir.state() == "interrupted", run_dir.reason()
        step = torch.load(run_dir.newest, weights_only=True)["step"]
        assert step * run_dir.spec().placement.accumulation >= gate.MICRO_BATCH


def goes_on(where: Path, *words: str) -> None:
    (where / "hold").unlink(missing_ok=True)
    done = forked.run(command(*words)[1:], cwd=where, env=ENV)
    assert done.returncode == 0, done.stderr
    for run_dir in RunDir.under(where / "runs"):
        assert run_dir.state() == "finished"
        assert run_dir.records().rows[-1]["step"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("words", [SIDE_BY_SIDE, TORCHRUN], ids=["parallel", "torchrun"])
def test_workers_notice_that_their_launcher_was_killed(words: list[str], tmp_path: Path) -> None:
    """Fails if they train on to the end, and hold the runs against the next command."""
    launcher = start(tmp_path, *words)
    launcher.kill()
    launcher.wait()
    (tmp_path / "hold").unlink()
    saved(tmp_path)
    goes_on(tmp_path, *words)


@pytest.mark.slow
def test_ranks_notice_that_torchrun_was_killed(tmp_path: Path) -> None:
    launcher = start(tmp_path, *TORCHRUN)
    (parent,) = {int(Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[1]) for p in held(tmp_path)}
    os.kill(parent, signal.SIGKILL)
    assert launcher.wait() == 1
    (tmp_path / "hold").unlink()
    saved(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "signals"),
    [
        (ONE, [signal.SIGINT] * 2),
        (ONE, [signal.SIGHUP]),
        (SIDE_BY_SIDE, [signal.SIGHUP]),
        (TORCHRUN, [signal.SIGINT] * 2),
    ],
    ids=["one-ctrl-c twice", "one-hangup", "parallel-hangup", "torchrun-ctrl-c twice"],
)
def test_signals_save(words: list[str], signals: list[int], tmp_path: Path) -> None:
    """Fails if a second Ctrl-C, or SIGHUP, ends a run without saving it, or leaves its processes."""
    launcher = start(tmp_path, *words)
    for number in signals:
        launcher.send_signal(number)
        time.sleep(0.2)
    # the second Ctrl-C may come when the run is saved and Python itself ends
    allowed = (1, 128 + signal.SIGHUP) if signal.SIGHUP in signals else (130, -signal.SIGINT)
    assert launcher.wait() in allowed
    saved(tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """Fails if the other rank trains on, or waits for it; or if the state is saved twice."""
    launcher = start(tmp_path, *TORCHRUN)
    os.kill(held(tmp_path)[-1], signal.SIGUSR2)
    (tmp_path / "hold").unlink()
    assert launcher.wait() == 1
    saved(tmp_path)
    (run_dir,) = RunDir.under(tmp_path / "runs")
    assert run_dir.log.read_text().count("saved and stopped") == 1 and not run_dir.previous.exists()


@pytest.mark.slow
def test_torchrun_waits_for_a_slow_disk(tmp_path: Path) -> None:
    """Fails if torchrun kills the ranks in the middle of a save that takes more than its usual 30 s."""
    words = [*TORCHRUN, "model.factory=gate:slow_disk"]
    launcher = start(tmp_path, *words)
    launcher.terminate()
    launcher.wait()
    saved(tmp_path)
    goes_on(tmp_path, *words)


@pytest.mark.slow
@pytest.mark.parametrize("words", [ONE, TORCHRUN], ids=["one", "torchrun"])
def test_closing_the_terminal_saves(words: list[str], tmp_path: Path) -> None:
    """Fails if SIGHUP ends the run, or if what it prints to the closed terminal makes it a failed one."""
    (tmp_path / "hold").touch()
    launcher, terminal = pty.fork()
    if not launcher:
        os.chdir(tmp_path)
        os.execve(sys.executable, command(*words), ENV)

    def read() -> None:
        while select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 4096)

    until(lambda: read() or len(held(tmp_path)) == processes(words), tmp_path)
    os.close(terminal)
    os.waitpid(launcher, 0)
    saved(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("words", [ONE, TORCHRUN], ids=["one", "torchrun"])
def test_nohup_outlives_the_terminal(words: list[str], tmp_path: Path) -> None:
    """Fails if a handler of ours, or torchrun's, takes the SIGHUP that nohup ignores."""
    launcher = start(tmp_path, *words, program=("nohup",))
    os.killpg(launcher.pid, signal.SIGHUP)
    time.sleep(0.5)
    (tmp_path / "hold").unlink()
    assert launcher.wait() == 0
    assert [d.state() for d in RunDir.under(tmp_path / "runs")] == ["finished"]


def test_a_worker_keeps_the_memory_that_it_frees() -> None:
    """Of 160 MB that lie at the end of the heap, another process hands back all when they are freed."""
    program = """
import ctypes, sys
from scaling_exps.train import ranks
if sys.argv[1] == "kept":
    ranks.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
blocks = [ctypes.c_void_p(libc.malloc(8_000_000)) for _ in range(20)]
for block in blocks:
    libc.memset(block, 1, 8_000_000)
before = resident()
for block in blocks:
    libc.free(block)
print(before - resident())
"""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True, check=True).stdout)
        for way in ("kept", "returned")
    )
    assert kept < 20e6 and returned > 100e6


def test_a_sweep_goes_seed_after_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order that was given. Fails if all seeds of a batch came first: cut short, nothing is compared."""
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main([*TINY, "recipe.samples=64", "measure.noise=none", "batch=[4,16]", "rule=[sqrt,none]", "seed=[3,1]"])
        == 0
    )
    begun = re.findall(r"rule (\w+) at κ = (\d+), seed (\d)", capsys.readouterr().out)
    assert begun == [
        (rule, kappa, seed) for seed in "31" for rule, kappa in (("sqrt", "1"), ("sqrt", "4"), ("none", "4"))
    ]
