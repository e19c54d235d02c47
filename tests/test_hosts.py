"""Two hosts: network namespaces on a switch of their own, each with a name and an address; a task on each, DDP by gloo.

A host is lost as a machine is: its cable first, then its processes, so that nobody is told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gate
import pytest
from support import ENVIRONMENT, ROOT, placed, prepare, same_run, work

from scaling_exps import config, plan
from scaling_exps.records import RunDir
from scaling_exps.train import worker

NAMES = [f"h{i}-{os.getpid()}" for i in (1, 2)]
SWITCH = f"sw{os.getpid()}"
CAN = os.geteuid() == 0 and None not in map(shutil.which, ("ip", "unshare", "nsenter"))
if CAN:
    CAN = not subprocess.run(["unshare", "--net", "ip", "link", "add", "sw", "type", "bridge"]).returncode
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CAN, reason="network namespaces are not allowed here")]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture(scope="module", autouse=True)
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """/etc/hosts as both see it."""
    names = tmp_path_factory.mktemp("etc") / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} {n}\n" for i, n in enumerate(NAMES, 1)))
    with contextlib.ExitStack() as stack:
        ip("link", "add", SWITCH, "type", "bridge")
        stack.callback(ip, "link", "del", SWITCH)
        ip("link", "set", SWITCH, "up")
        for i, name in enumerate(NAMES, 1):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", port(i - 1), "type", "veth", "peer", "name", "eth0", "netns", name)
            stack.callback(ip, "link", "del", port(i - 1))
            ip("link", "set", port(i - 1), "master", SWITCH, "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names


def port(host: int) -> str:
    """The switch's end of a host's cable."""
    return f"p{host}-{os.getpid()}"


Host = subprocess.Popen[bytes]


@pytest.fixture
def on(hosts: Path, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """`on(0, words, **environment)` starts a python on a host."""
    (tmp_path / "hold").touch()
    started: list[Host] = []

    def start(host: int, *words: str, **environment: str) -> Host:
        name = NAMES[host]
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        argv = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", script, "sh"]
        env = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
        with open(tmp_path / f"log-{host}", "a") as log:
            started.append(
                subprocess.Popen(
                    [*argv, str(hosts), name, sys.executable, *words], env=env, cwd=tmp_path, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        return started[-1]

    yield start
    for host in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(host.pid, 9)
        host.wait()


def both(on: Callable[..., Host], run_dir: RunDir, words: str, seconds: float = 600) -> list[Host]:
    """A rank on each host, by torchrun's words or by SLURM's; they give each other up after so many seconds."""
    script = [str(ROOT / "tests/gate.py"), str(seconds), str(run_dir)]
    if words == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--master-addr={NAMES[0]}"]
        return [on(i, *torchrun, "--master-port=29400", f"--node-rank={i}", *script) for i in (0, 1)]
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    step |= {"SLURM_STEP_NODELIST": ",".join(NAMES), "SLURM_RESTART_COUNT": str(len(run_dir.events()))}
    return [on(i, *script, SLURM_PROCID=str(i), **step) for i in (0, 1)]


def two_hosts(root: Path) -> RunDir:
    (spec,) = plan.plan(config.compose([*gate.SCIENCE, "checkpoint.minutes=1e-9"]))
    return prepare(root, placed(spec, 2))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same run of two processes on one host."""
    run_dir = two_hosts(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as m:
        m.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        work(run_dir, 2)
    return run_dir


def held(where: Path, hosts: list[Host]) -> None:
    """The ranks wait in the middle; those of a SLURM job leave one file."""
    while not list(where.glob("held-*")):
        assert [h.poll() for h in hosts] == [None, None], log(where)
        time.sleep(0.1)


def log(where: Path) -> str:
    return "\n".join(p.read_text()[-3000:] for p in [*where.glob("log-*"), *where.glob("*/log.txt")])


@pytest.mark.parametrize("words", ["torchrun", "SLURM"])
def test_a_cable_that_is_out_for_a_minute(
    words: str, on: Callable[..., Host], undisturbed: RunDir, tmp_path: Path
) -> None:
    """Fails if the run ended, or went on with other bits than those of one host."""
    run_dir = two_hosts(tmp_path)
    hosts = both(on, run_dir, words)
    held(tmp_path, hosts)
    ip("link", "set", port(1), "down")
    (tmp_path / "hold").unlink()
    time.sleep(60)
    assert [h.poll() for h in hosts] == [None, None], log(tmp_path)
    ip("link", "set", port(1), "up")
    assert [h.wait() for h in hosts] == [0, 0], log(tmp_path)
    same_run(run_dir, undisturbed)


@pytest.mark.parametrize(("words", "lost"), [("torchrun", 1), ("SLURM", 0)])
def test_the_host_of_a_rank_is_gone(
    words: str, lost: int, on: Callable[..., Host], undisturbed: RunDir, tmp_path: Path
) -> None:
    """Fails if the other rank waits for ever, calls the run a failed one, or the next start does not go on with it."""
    run_dir = two_hosts(tmp_path)
    hosts = both(on, run_dir, words, seconds=20)
    held(tmp_path, hosts)
    ip("link", "set", port(lost), "down")
    os.killpg(hosts[lost].pid, 9)
    (tmp_path / "hold").unlink()
    code = hosts[1 - lost].wait(300)
    ip("link", "set", port(lost), "up")
    assert code == (1 if words == "torchrun" else worker.LOST), log(tmp_path)
    assert run_dir.state() == "interrupted", run_dir.reason()
    assert [h.wait() for h in both(on, run_dir, words)] == [0, 0], log(tmp_path)
    assert sum(e["event"] == "start" for e in run_dir.events()) == 2
    same_run(run_dir, undisturbed)
