"""wandb's own client and core against a server on loopback: what arrives is records.jsonl, once, whatever happens.

A run that costs no training is written by hand: the mirror sees of a run nothing but its folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import wandb_server
from support import ENVIRONMENT, ROOT, prepare, rows, scalerun, small_disk, specs, worker

from scaling_exps import cli, mirror
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir

KEY = "0123456789abcdef" * 3
PLANTED = "a-secret-that-nobody-needs"  # in the environment of every run
NOBODY = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC", "WANDB_MODE")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[wandb_server.Server]:
    """A server, and an environment in which somebody is logged in to it."""
    with wandb_server.serving() as server:
        for name, value in online(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


def online(url: str) -> dict[str, str]:
    return {
        "WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false",
    }  # fmt: skip


def record(kind: str, step: int, **metrics: float | str) -> dict[str, Any]:
    return {"kind": kind, "step": step, "samples": step * 4, "t": step * 1e-6, **metrics}


LINES = [record("train", s, loss=1 / s, window=4, seconds=0.1 * s) for s in range(1, 21)]
LINES += [
    record("eval", 20, loss=0.5),
    *(record("noise", 20, batch=4, enough=False, method=m) for m in ("free", "full")),
]


def begun(root: Path, *words: str, lines: list[dict[str, Any]] = LINES) -> tuple[RunDir, RunSpec]:
    """A run with these records, that nobody works on."""
    (spec,) = specs("logger=wandb", *words)
    run_dir = prepare(root, spec)
    write(run_dir, lines)
    return run_dir, spec


def write(run_dir: RunDir, lines: list[dict[str, Any]], size: int | None = None) -> None:
    with run_dir.writer(-1 if size is None else size) as writer:
        for line in lines:
            writer.write(line)


def finish(run_dir: RunDir, **metrics: float) -> None:
    run_dir.write_result({"status": "finished", "metrics": metrics or {"test_loss": 0.5}})


def mirrored(run: wandb_server.Run) -> list[dict[str, Any]]:
    """What the server has, as records."""
    records = []
    for i, row in enumerate(run.rows):
        assert row["_step"] == i
        named = {k: v for k, v in row.items() if not k.startswith("_") and k not in ("samples", "t", "trainer/step")}
        (group,) = {k.rpartition("/")[0] for k in named}
        kind, _, method = group.partition("/")
        metrics = {k.rpartition("/")[2]: v for k, v in named.items()} | ({"method": method} if method else {})
        records.append({"kind": kind, "step": row["trainer/step"], "samples": row["samples"], "t": row["t"], **metrics})
    return records


def wait(condition: Callable[[], Any]) -> None:
    """No verdict hangs on the machine's speed: this waits until the test itself is ended."""
    while not condition():
        time.sleep(0.05)


# ---- real runs ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[wandb_server.Server, list[tuple[RunDir, RunSpec]]]:
    """Three runs of one process, the second of which fails, mirrored live."""
    root = tmp_path_factory.mktemp("runs")
    words = ["logger=wandb", "measure.noise=none", "checkpoint.keep=[0.5]"]
    planned = [
        *specs(*words, "wandb.tags=[mine]", "wandb.project=elsewhere", "wandb.entity=us"),
        *specs(*words, "optimizer=sgd", "recipe.lr=1e6"),
        *specs(*words, "batch=16", "recipe.batch=4")[-1:],
    ]
    run_dirs = [prepare(root, spec) for spec in planned]
    command = worker(run_dirs[0])[:-1] + [str(d) for d in run_dirs]
    for name in ("home", "tmp"):
        (root / name).mkdir()
    planted = {name: PLANTED for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "OPENAI_API_KEY")}
    with wandb_server.serving() as server:
        environment = {**ENVIRONMENT, **planted, "HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        done = forked.run(command, env={**environment, **online(server.url)})
    assert done.returncode == 1, done.stderr
    return server, list(zip(run_dirs, planned, strict=True))


@pytest.mark.slow
def test_runs_of_one_process_are_runs_of_their_own(
    trained: tuple[wandb_server.Server, list[tuple[RunDir, RunSpec]]],
) -> None:
    """Fails if a failed run were left open and handed to the next one (issue 12, defect 1), or closed as a good one."""
    server, runs = trained
    assert [(run_dir.result() or {})["status"] for run_dir, _ in runs] == ["finished", "failed", "finished"]
    for run_dir, spec in runs:
        run = server.runs[spec.run_id]
        assert mirrored(run) == run_dir.records().rows
        assert run.exits == [int(run_dir.state() == "failed")]
    assert len(server.runs) == 3 and len(runs[0][0].records().rows) > 10


def test_runs_are_arranged_for_comparing_batches(
    trained: tuple[wandb_server.Server, list[tuple[RunDir, RunSpec]]],
) -> None:
    """Fails if a hyperparameter were no column, the seed no tag, or a key of wandb.* went nowhere."""
    server, runs = trained
    (_, first), _, (run_dir, spec) = runs
    created = server.runs[first.run_id].created
    assert (created["project"], created["entity"], "mine" in created["tags"]) == ("elsewhere", "us", True)
    run = server.runs[spec.run_id]
    assert (run.created["project"], run.created["jobType"]) == ("scalerun", "sqrt x4")
    assert {"sqrt", "batch 16", "adam", "digits", "seed 0"} <= set(run.created["tags"])
    columns = {k: v["value"] for k, v in json.loads(run.created["config"]).items()}
    hyper = spec.science.hyper
    assert {k: columns[k] for k in ("batch", "rule", "kappa", "seed", "eps", "weight_decay", "lr")} == {
        "batch": 16, "rule": "sqrt", "kappa": 4, "seed": 0, "eps": hyper.eps, "weight_decay": 0, "lr": hyper.lr,
    }  # fmt: skip
    assert columns["betas"] == list(hyper.betas)
    metrics = (run_dir.result() or {})["metrics"]
    assert {k: run.summary[f"final/{k}"] for k in metrics} == metrics


def test_no_secret_is_in_a_file(trained: tuple[wandb_server.Server, list[tuple[RunDir, RunSpec]]]) -> None:
    """Runs (one failed), home and the temporary folder. Fails if wandb's own files, which may hold its settings, lay
    there, or if a run kept its environment."""
    server, runs = trained
    root = runs[0][0].path.parent
    done = scalerun("report", ".", "--out", "report", cwd=root, WANDB_API_KEY=KEY, MY_PASSWORD=PLANTED)
    assert done.returncode == 0, done.stderr
    assert any(server.keys - {""})  # the key was used
    assert PLANTED not in repr([vars(run) for run in server.runs.values()])
    files = [p for p in root.rglob("*") if p.is_file()]
    assert len(files) > 12 and not [p for p in files if re.search(f"{KEY}|{PLANTED}".encode(), p.read_bytes())]
    assert "wandb" not in [p.name for p in files] and root / "report/index.html" in files


def test_noise_that_is_measured_later_arrives(
    trained: tuple[wandb_server.Server, list[tuple[RunDir, RunSpec]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full noise asked of a finished run adds records. Fails if only a run that trains were mirrored."""
    earlier, ((run_dir, spec), *_) = trained
    (more,) = specs("logger=wandb", "measure.noise=full", "measure.noise_examples=64", "wandb.project=elsewhere")
    assert more.run_id == spec.run_id
    run_dir.prepare(more)
    with wandb_server.serving() as server:
        server.runs[spec.run_id] = earlier.runs[spec.run_id]
        done = forked.run(worker(run_dir), env={**ENVIRONMENT, **online(server.url)})
    assert done.returncode == 0
    run = server.runs[spec.run_id]
    assert "noise" in {r["kind"] for r in run_dir.records().rows}
    assert mirrored(run) == run_dir.records().rows and sorted(run.sent) == sorted(set(run.sent))
    assert run.exits[-1] == 0


@pytest.mark.parametrize("mode", ["", "offline"])
def test_without_a_login_nothing_of_wandb_is_loaded(mode: str, tmp_path: Path) -> None:
    """Fails if `import wandb`, a second or more, were paid by runs that are not mirrored, or anybody were asked for a
    key."""
    (spec,) = specs("logger=wandb")
    run_dir = prepare(tmp_path, spec)
    code = (
        "import pathlib, sys; sys.modules['wandb'] = None; from scaling_exps import mirror, records; "
        f"d = records.RunDir({str(run_dir.path)!r})\nwith mirror.live(d, d.spec()): print('trained')"
    )
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in NOBODY}
    environment |= {"HOME": str(tmp_path), "WANDB_MODE": mode}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")
    assert [p.name for p in run_dir.path.iterdir()] == ["run.json"]


# ---- who is logged in ----

OURS, DEFAULT = "http://ours.example:8080", "https://api.wandb.ai"
LOGINS: dict[str, tuple[dict[str, str], str, str]] = {  # variables, ~/.netrc, settings
    "nobody": ({}, "", ""),
    "variable": ({"WANDB_API_KEY": KEY}, "", ""),
    "netrc": ({}, f"machine api.wandb.ai login user password {KEY}", ""),
    "another host": ({}, f"machine github.com login user password {KEY}", ""),
    "our server": ({"WANDB_BASE_URL": OURS}, f"machine ours.example:8080 login user password {KEY}", ""),
    "not our server": ({"WANDB_BASE_URL": OURS}, f"machine api.wandb.ai login user password {KEY}", ""),
    "wandb login --host": ({}, f"machine ours.example:8080 login user password {KEY}", f"base_url = {OURS}"),
    "key in settings": ({}, "", f"api_key = {KEY}"),
    "NETRC": ({"NETRC": "~/other"}, "", ""),
    "broken netrc": ({}, "machine", ""),
    "broken settings": ({}, "", "base_url"),
}


@pytest.mark.parametrize("case", LOGINS)
def test_a_login_is_what_wandb_takes_for_one(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb itself is asked the same. Fails if we read another file, or another host's entry, than it does."""
    variables, netrc, settings = LOGINS[case]
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc + "\n")
    (tmp_path / "other").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\n{settings}\n")
    for name in NOBODY:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    code = "import wandb; print(bool(wandb.login(prompt=False, verify=False)))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert mirror.logged_in() == (asked.stdout.split()[-1] == "True"), asked.stderr


# ---- sync ----


@pytest.mark.slow
def test_offline_then_online(tmp_path: Path, server: wandb_server.Server, capsys: pytest.CaptureFixture[str]) -> None:
    """`scalerun sync` of a run that was never mirrored, while it is written, when it is done, and again. Fails if a
    record were lost or sent twice, or a run that still trains were closed as failed."""
    run_dir, spec = begun(tmp_path, lines=LINES[:8])
    with run_dir.lock():
        assert cli.main(["sync", str(tmp_path)]) == 0
        run = server.runs[spec.run_id]
        assert mirrored(run) == LINES[:8] and run.exits == [0]
        write(run_dir, LINES[8:])
    finish(run_dir)
    said = []
    for _ in range(2):
        assert cli.main(["sync", str(tmp_path)]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1].split(": ")[1])
    assert said == [f"{len(LINES) - 8} of {len(LINES)} records uploaded", f"0 of {len(LINES)} records uploaded"]
    assert mirrored(run) == LINES and run.sent == list(range(len(LINES))) and run.exits == [0, 0, 0]
    assert run.summary["final/test_loss"] == 0.5


def test_the_gap_to_the_base(tmp_path: Path, server: wandb_server.Server) -> None:
    base, scaled = specs("logger=wandb", "batch=[4,16]", "recipe.batch=4")
    for spec, loss in ((base, 0.5), (scaled, 0.75)):
        run_dir = prepare(tmp_path, spec)
        write(run_dir, LINES[:2])
        finish(run_dir, test_loss=loss)
    assert mirror.sync([tmp_path]) == 0
    assert server.runs[scaled.run_id].summary["gap/test_loss"] == 0.25
    assert "gap/test_loss" not in server.runs[base.run_id].summary


def test_two_at_once(tmp_path: Path, server: wandb_server.Server) -> None:
    """Two `scalerun sync` at a time. Fails if both mirrored one run, or the second waited or failed."""
    run_dir, spec = begun(tmp_path)
    finish(run_dir)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(mirror.sync([tmp_path]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run = server.runs[spec.run_id]
    assert codes == [0, 0] and mirrored(run) == LINES and run.sent == list(range(len(LINES)))


@pytest.mark.slow
def test_records_that_the_server_refuses_are_told_and_sent_later(
    tmp_path: Path, server: wandb_server.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """wandb's finish() succeeds although its core gave up. Fails if `sync` believed it."""
    run_dir, spec = begun(tmp_path, lines=LINES[:5])
    assert mirror.sync([tmp_path]) == 0
    write(run_dir, LINES[5:])
    finish(run_dir)
    server.mode = "refusing"
    assert mirror.sync([tmp_path]) == 1
    assert "the server refuses records" in capsys.readouterr().out
    server.mode = "well"
    assert mirror.sync([tmp_path]) == 0
    assert mirrored(server.runs[spec.run_id]) == LINES


def test_a_damaged_line_moves_no_other(tmp_path: Path, server: wandb_server.Server) -> None:
    """Fails if the lines behind it were numbered without it: mended, they would not be sent."""
    run_dir, spec = begun(tmp_path)
    path = run_dir.path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step": 3,', b'"step" 3,', 1))
    assert mirror.sync([tmp_path]) == 0
    steps = [row["_step"] for row in server.runs[spec.run_id].rows]
    assert steps == [i for i in range(len(LINES)) if i != 2]


def test_other_records_under_the_same_id_are_not_mixed_in(
    tmp_path: Path, server: wandb_server.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder was removed and the run trained with other measurements. Fails if line 5 followed another line 4."""
    begun(tmp_path / "first", lines=LINES[:5])
    assert mirror.sync([tmp_path / "first"]) == 0
    _, spec = begun(tmp_path / "second", lines=LINES[:4] + LINES[10:])
    assert mirror.sync([tmp_path / "second"]) == 1
    assert "holds other records" in capsys.readouterr().out
    assert mirrored(server.runs[spec.run_id]) == LINES[:5]


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_sync_without_a_login(words: list[str], tmp_path: Path) -> None:
    run_dir, _ = begun(tmp_path / "runs")
    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "", "NETRC": ""}
    done = scalerun("sync", *words, cwd=tmp_path, **environment)
    if words:
        assert (done.returncode, done.stdout) == (0, f"runs/{run_dir.path.name}: {len(LINES)} records\n")
    else:
        assert (done.returncode, done.stdout) == (2, "") and "wandb login" in done.stderr


# ---- live ----


def test_live_then_killed_then_resumed(
    tmp_path: Path, server: wandb_server.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is mirrored live is left alone by `sync`; it is stopped without a result; its records are cut back
    and written anew. Fails if its rows came twice, or wandb took it for finished."""
    run_dir, spec = begun(tmp_path, lines=LINES[:1])
    with run_dir.lock(), mirror.live(run_dir, spec):
        wait(lambda: server.runs)
        assert mirror.sync([tmp_path]) == 0
        assert "another process mirrors it" in capsys.readouterr().out
        size = (run_dir.path / "records.jsonl").stat().st_size
        write(run_dir, LINES[1:15])
    run = server.runs[spec.run_id]
    assert (len(run.rows), run.exits, run.preempting) == (15, [1], True)
    with run_dir.lock(), mirror.live(run_dir, spec):
        write(run_dir, LINES[1:], size)
        finish(run_dir)
    assert mirrored(run) == LINES and run.sent == list(range(len(LINES))) and run.exits == [1, 0]
    assert capsys.readouterr().err == ""


def test_a_killed_run_leaves_no_process(tmp_path: Path, server: wandb_server.Server) -> None:
    """The run's process is killed (SIGKILL). Fails if its mirror waited for ever, or lost what was written."""
    run_dir, spec = begun(tmp_path)
    code = (
        "import sys, time; from scaling_exps import mirror, records; d = records.RunDir(sys.argv[1])\n"
        "with d.lock(), mirror.live(d, d.spec()): print(flush=True); time.sleep(3600)"
    )
    run_process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)], env={**ENVIRONMENT, **online(server.url)}, cwd=ROOT,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert run_process.stdout is not None
    run_process.stdout.readline()
    wait(lambda: server.runs)
    run_process.kill()
    run_process.wait()
    wait(lambda: not processes_of(run_dir))
    run = server.runs[spec.run_id]
    assert mirrored(run) == LINES and run.exits == [1] and run.preempting


def processes_of(run_dir: RunDir) -> list[int]:
    """Mirrors of this run, and the cores that they started."""
    mirrors, parents = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parents[int(folder.name)] = words
            if str(run_dir).encode() in words and b"scaling_exps.mirror" in words:
                mirrors.add(int(folder.name))
    cores = [
        p for p, words in parents.items() if b"--pid" in words and int(words[words.index(b"--pid") + 1]) in mirrors
    ]
    return [*mirrors, *cores]


def hostile(
    tmp_path: Path, server: wandb_server.Server, begin: Callable[[], None], end: Callable[[], None]
) -> tuple[RunDir, RunSpec]:
    """A live run during which these happen; it is whole afterwards, and `sync` sends all that is missing."""
    run_dir, spec = begun(tmp_path, lines=[])
    begin()
    with run_dir.lock(), mirror.live(run_dir, spec):
        write(run_dir, LINES[:10])
        end()
        write(run_dir, LINES[10:])
        finish(run_dir)
    assert rows(run_dir) == [{k: v for k, v in r.items() if k != "seconds"} for r in LINES]
    wait(lambda: not processes_of(run_dir))
    server.mode = "well"
    server.silence.set()
    assert mirror.sync([tmp_path]) == 0
    run = server.runs[spec.run_id]
    assert mirrored(run) == LINES and run.exits[-1] == 0
    return run_dir, spec


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["refusing", "silent", "silent at the end", "unreachable"])
def test_whatever_the_server_does_the_run_goes_on(
    trouble: str, tmp_path: Path, server: wandb_server.Server, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Fails if the run raised, waited without end, or said more than one line."""

    def begin() -> None:
        if trouble == "unreachable":
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        elif trouble != "silent at the end":
            server.mode = trouble

    def end() -> None:
        if trouble == "silent at the end":
            wait(lambda: server.runs)
            server.mode = "silent"
        monkeypatch.setenv("WANDB_BASE_URL", server.url)

    monkeypatch.setitem(mirror.PATIENCE, "live", 6)
    hostile(tmp_path / "runs", server, begin, end)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "`scalerun sync` uploads what is missing" in said


def test_a_full_disk_below_wandb_s_files(
    tmp_path: Path, server: wandb_server.Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the run ended with it, or if more than one message said so."""
    with small_disk(tmp_path / "disk", "64k"):
        with contextlib.suppress(OSError):
            (tmp_path / "disk/full").write_bytes(bytes(99_999))

        def begin() -> None:
            monkeypatch.setenv("TMPDIR", str(tmp_path / "disk"))

        hostile(tmp_path / "runs", server, begin, lambda: monkeypatch.delenv("TMPDIR"))
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.slow
def test_a_busy_server_is_tried_again(tmp_path: Path, server: wandb_server.Server) -> None:
    """429 from the start, for longer than one attempt takes. Fails if the mirror had given up by then."""
    run_dir, spec = begun(tmp_path, lines=LINES[:10])
    server.mode = "busy"
    with run_dir.lock(), mirror.live(run_dir, spec):
        time.sleep(60)
        server.mode = "well"
        wait(lambda: server.runs)
        write(run_dir, LINES[10:])
        finish(run_dir)
    assert mirrored(server.runs[spec.run_id]) == LINES


@pytest.mark.slow
def test_twenty_starts_at_once(tmp_path: Path, server: wandb_server.Server) -> None:
    """Fails if they shared a folder, a lock or a core. On a slow machine some are in time, and `sync` does the rest."""
    planned = specs("logger=wandb", f"seed=[{','.join(map(str, range(20)))}]")
    run_dirs = [prepare(tmp_path, spec) for spec in planned]
    with contextlib.ExitStack() as stack:
        for run_dir, spec in zip(run_dirs, planned, strict=True):
            stack.enter_context(run_dir.lock())
            stack.enter_context(mirror.live(run_dir, spec))
        for run_dir in run_dirs:
            write(run_dir, LINES)
            finish(run_dir)
        wait(lambda: len(server.runs) == 20)
    late = [d.path for d in run_dirs if len(server.runs[d.path.name].lines) < len(LINES)]
    assert not late or mirror.sync(late) == 0
    for spec in planned:
        run = server.runs[spec.run_id]
        assert mirrored(run) == LINES and run.sent == list(range(len(LINES)))
