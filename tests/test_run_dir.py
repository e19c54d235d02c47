"""`RunDir` believes nothing that lies on the disk: one bad folder raises nothing, and hides no other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import prepare, scalerun, specs

from scaling_exps import launch, train
from scaling_exps.noise import validity
from scaling_exps.plan import PlanError
from scaling_exps.records import RunDir

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = json.loads("[" * 900 + "]" * 900)  # as deep as a parser takes
TIMM = {"kind": "timm", "name": "resnet10t", "norm": "batch", "options": {"x": NESTED}}
FILES = [
    "run.json", "records.jsonl", "result.json", "log.txt", "jobs.jsonl", "lock", "code.patch", "checkpoint.pt",
    "checkpoint.prev.pt", "checkpoint-2.pt",
]  # fmt: skip


def folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def text(content: str) -> Callable[[Path, Path], None]:
    def write(path: Path, outside: Path) -> None:
        path.write_text(content)

    return write


HOSTILE = {
    "folder": folder, "fifo": fifo, "link": link, "list": text("[1]"), "deep": text(DEEP), "null": text("null"),
    "deep-in-a-key": text('{"status": ' + DEEP + "}"), "surrogate": text('"\\ud800"'), "binary": text("\0\1\2\n" * 9),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of 4 steps, with a noise record and a kept checkpoint."""
    (spec,) = specs("batch=64", "recipe.batch=64", "recipe.micro_batch=32", "checkpoint.keep=[0.5]")
    run_dir = prepare(tmp_path_factory.mktemp("finished"), spec)
    torch.set_num_threads(1)
    assert train.run(run_dir) == "finished"
    return run_dir


@pytest.fixture
def beside(finished: RunDir, tmp_path: Path) -> tuple[Path, RunDir]:
    """A folder of two copies of the run, the second one's name; the second is for the test to spoil."""
    shutil.copytree(finished.path, tmp_path / "runs" / finished.path.name)
    shutil.copytree(finished.path, tmp_path / "runs" / "spoilt")
    return tmp_path / "runs", RunDir(tmp_path / "runs" / "spoilt")


def look(run_dir: RunDir) -> None:
    """Everything that is read of a run; only `spec` may refuse."""
    run_dir.state(), run_dir.result(), run_dir.reason(), run_dir.holder(), run_dir.newest_record(), run_dir.events()
    run_dir.records(), run_dir.records_checksum(5), run_dir.kept(), run_dir.begun
    with contextlib.suppress(PlanError):
        run_dir.lacks_noise(run_dir.spec())


def states(root: Path) -> dict[str, str]:
    """What `status`, and so `cancel`, sees, by run."""
    return {Path(r["run_id"]).name: r["state"] for r in launch.status(root, strict=True)}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_bad_file_is_absent_or_damaged_and_hides_no_other(
    kind: str, name: str, beside: tuple[Path, RunDir], finished: RunDir
) -> None:
    """Fails if reading it raised, blocked (a fifo) or took the other run with it."""
    root, run_dir = beside
    (run_dir.path / name).unlink(missing_ok=True)
    HOSTILE[kind](run_dir.path / name, root / "nowhere")
    look(run_dir)
    rows = launch.status(root, strict=True)
    assert len(rows) == 2 and "finished" in [r["state"] for r in rows]
    if name == "run.json":
        assert "unreadable" in [r["state"] for r in rows]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_nothing_is_written_through_a_bad_file(
    kind: str, name: str, beside: tuple[Path, RunDir], finished: RunDir
) -> None:
    """The run is started with the bad file in place. Fails if a link were followed (the file outside changed), if the
    worker blocked, or if an error came through and ended the sweep."""
    root, run_dir = beside
    outside = root.parent / "outside"
    original = (finished.path / name).read_bytes() if (finished.path / name).exists() else b""
    outside.write_bytes(original)
    run_dir.clear_result()
    for other in (run_dir.newest, run_dir.previous, *run_dir.kept()):
        other.unlink()  # train it from the start, so that everything is written
    (run_dir.path / name).unlink(missing_ok=True)
    HOSTILE[kind](run_dir.path / name, outside)
    good = train.run_all([run_dir], log=True)
    assert outside.read_bytes() == original
    assert good == (run_dir.state() == "finished")


@pytest.mark.parametrize(
    "content",
    [
        {"status": "perhaps"},
        {"status": ["finished"]},
        {"status": "finished"},
        {"status": "finished", "metrics": []},
        {"status": "finished", "metrics": {"test_loss": "low"}},
        {"status": "finished", "metrics": {"test_loss": None}},
        {"status": "finished", "metrics": {"test_loss": 10**400}},
    ],
)
def test_a_result_that_says_nothing_is_none(content: dict[str, Any], beside: tuple[Path, RunDir]) -> None:
    """The run is brought to its end again, from its last checkpoint. Fails if an unknown word passed for an end."""
    _, run_dir = beside
    before = run_dir.result()
    (run_dir.path / "result.json").write_text(json.dumps(content))
    assert run_dir.result() is None and run_dir.state() == "interrupted"
    assert train.run(run_dir) == "finished"
    after = run_dir.result()
    assert before is not None and after is not None and after["metrics"] == before["metrics"]


def test_a_number_of_a_result_that_is_none_is_left_out(
    beside: tuple[Path, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails by a traceback: it was formatted as a number."""
    root, run_dir = beside
    content = json.loads((run_dir.path / "result.json").read_text())
    (run_dir.path / "result.json").write_text(json.dumps({**content, "samples_per_second": "fast", "seconds": []}))
    launch.print_status(launch.status(root))
    assert "2 finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "{}", "3", "[]", '{"kind": "train"}', '{"kind": "train", "step": 1, "samples": 4}',
        '{"kind": "train", "step": 1, "samples": 4, "loss": 1}',
        '{"kind": "eval", "step": 1, "samples": 4, "loss": 1, "accuracy": 1' + "0" * 400 + "}",
        '{"kind": "train", "step": 1, "samples": 0, "t": 1, "window": 4, "loss": 1}',
        '{"kind": "eval", "step": 1, "samples": 4, "loss": "low"}', '{"kind": ["eval"], "step": 1, "samples": 4}',
        '{"kind": "train", "step": true, "samples": 4, "loss": 1}',
        '{"kind": "train", "step": NaN, "samples": 4, "loss": 1}',
        '{"kind": "train", "step": 1, "samples": 1e400, "loss": 1}',
        '{"kind": "train", "step": -1, "samples": 4, "loss": 1}',
        '{"kind": "noise", "step": 1, "samples": 4}', '{"kind": "rumour", "step": 1, "samples": 4}',
        '{"kind": "noise", "step": 1, "samples": 4, "method": "full", "batch": 0, "enough": false}',
        '{"kind": "noise", "step": 1, "samples": 4, "method": "full", "batch": 4, "enough": true}', DEEP,
    ],
)  # fmt: skip
def test_json_that_is_no_record_is_damage(line: str, tmp_path: Path) -> None:
    """Fails if a reader were handed a row without what every row of its kind has."""
    (tmp_path / "records.jsonl").write_text(
        '{"kind": "event", "step": 0, "samples": 0}\n'
        + line
        + '\n{"kind": "train", "step": 2, "samples": 8, "t": 1, "window": 8, "loss": NaN}\n'
        '{"kind": "tr'
    )
    records = RunDir(tmp_path).records()
    assert [r["kind"] for r in records.rows] == ["event", "train"]
    assert records.damaged == 1
    assert (RunDir(tmp_path).newest_record() or {})["step"] == 2  # a line cut by a crash is none


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["placement"].update(world_size="2"), "world_size"),
        (lambda raw: raw["placement"].update(world_size=2.5), "world_size"),
        (lambda raw: raw["science"].update(seed=5), "it was edited"),
        (lambda raw: raw["science"]["model"].update(kind="rumour"), "rumour"),
        (lambda raw: raw["science"].update(model=TIMM), "run.json"),
        (lambda raw: raw.update(arms=[]), "no arm"),
        (lambda raw: raw.update(version="2"), "version '2'"),
        (lambda raw: raw.pop("measure"), "measure"),
        (lambda raw: raw.update(measure=5), "measure"),
    ],
)  # fmt: skip
def test_a_spec_that_was_tampered_with_is_refused(
    change: Callable[[dict[str, Any]], Any], says: str, beside: tuple[Path, RunDir]
) -> None:
    root, run_dir = beside
    raw = json.loads((run_dir.path / "run.json").read_text())
    change(raw)
    (run_dir.path / "run.json").write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="spoilt") as e:
        run_dir.spec()
    assert says in str(e.value)
    assert states(root)["spoilt"] == "unreadable"


def test_a_bad_base_run_does_not_keep_a_plan_from_another(tmp_path: Path, finished: RunDir) -> None:
    """The base run of seed 0 is a folder nobody can read, that of seed 1 has noise records. Fails if `scalerun plan`
    were refused for the first."""
    words = ["recipe.batch=4", "recipe.samples=512", "measure.noise_examples=512"]
    runs = specs("batch=[4,8]", "seed=[0,1]", *words)
    by_seed = {s.science.seed: s for s in runs if s.arms[0].role == "base"}
    whole = prepare(tmp_path, by_seed[1])
    assert train.run(whole) == "finished"
    (tmp_path / by_seed[0].run_id).mkdir()
    (tmp_path / by_seed[0].run_id / "run.json").write_text(DEEP)
    described = validity.describe(runs, tmp_path, None)
    assert {row["source"] for row in described.values()} == {str(whole)}


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers could train one run there. Fails if the run were started, or the sweep ended in a traceback."""
    (spec,) = specs("batch=64", "recipe.batch=64")
    run_dir = prepare(tmp_path, spec)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"has no file locks.*another runs_dir"):
        train.run(run_dir)
    assert not train.run_all([run_dir])
    assert run_dir.state() == "waiting" and not run_dir.begun


def test_the_words_of_a_bad_folder_reach_the_user(beside: tuple[Path, RunDir]) -> None:
    root, run_dir = beside
    (run_dir.path / "run.json").unlink()
    (run_dir.path / "run.json").mkdir()
    done = scalerun("status", str(root), cwd=root)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "1 finished" in done.stdout and "1 unreadable" in done.stdout
