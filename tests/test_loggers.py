"""logger=csv and logger=tensorboard: files of a run that say what its records say, once."""

from __future__ import annotations

import csv
import threading
import time
from pathlib import Path

import pytest
from support import prepare, specs

from scaling_exps import mirror
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir
from scaling_exps.train import worker as work


def scalars(run_dir: RunDir) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir.path), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_files_hold_every_record_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run is stopped, as if killed behind its checkpoint, and goes on. Fails if a step stood there twice."""
    words = ["logger=[csv,tensorboard]", "measure.train_records=16", "checkpoint.minutes=1e-6", "measure.noise=none"]
    (spec,) = specs(*words)
    run_dir = prepare(tmp_path, spec)
    begin = 1e-9 + time.monotonic()
    assert work.run(run_dir, until=begin) == "stopped"
    first = run_dir.newest_record()
    with run_dir.writer() as writer:  # what a killed process wrote after its checkpoint
        writer.write({"kind": "train", "step": 60, "samples": 240, "t": 1.0, "loss": 9.0, "window": 4})
    assert work.run(run_dir) == "finished"
    assert first != run_dir.newest_record()
    rows = run_dir.records().rows
    with open(run_dir.path / "metrics.csv", newline="") as f:
        written = list(csv.DictReader(f))
    assert [{k: v for k, v in w.items() if v} for w in written] == [{k: str(v) for k, v in r.items()} for r in rows]
    wanted = [(r["samples"], pytest.approx(r["loss"])) for r in rows if r["kind"] == "train"]
    shown = scalars(run_dir)
    assert shown["train/loss"] == wanted and len({s for s, _ in wanted}) == len(wanted) > 8
    assert shown["eval/accuracy"] == [(r["samples"], pytest.approx(r["accuracy"])) for r in rows if r["kind"] == "eval"]
    assert len(list(run_dir.path.glob("events.out.tfevents.*"))) == 1


def test_a_table_grows_and_gains_columns(tmp_path: Path) -> None:
    """Three rounds: train, evaluation, train. Fails if a row stood there twice or lacked its head."""
    (spec,) = specs("logger=[csv]")
    run_dir = prepare(tmp_path, spec)
    kinds = ["train", "eval", "train"]

    class Rounds(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            kind = kinds.pop(0)
            more = {"window": 4} if kind == "train" else {"accuracy": 0.5}
            size = len(run_dir.records().rows)
            with run_dir.writer() as writer:
                writer.write({"kind": kind, "step": size + 1, "samples": 4, "t": 0.5, "loss": 2.0, **more})
            return not kinds

    assert mirror._files(run_dir, Rounds()) == 0
    with open(run_dir.path / "metrics.csv", newline="") as f:
        written = list(csv.DictReader(f))
    assert [w["step"] for w in written] == ["1", "2", "3"] and [w["accuracy"] for w in written] == ["", "0.5", ""]


def test_a_logger_that_cannot_write_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spec,) = specs("logger=[wandb,csv]", "measure.noise=none")
    run_dir = prepare(tmp_path, spec)
    (run_dir.path / "metrics.csv").mkdir()
    assert work.run(run_dir) == "finished"
    assert capsys.readouterr().err.count("records.jsonl has them") == 1


def test_run_json_of_one_logger_is_as_it_was_and_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = specs("logger=wandb")[0], specs("logger=[wandb,csv]")[0]
    assert one.to_json()["logger"] == "wandb" and one.loggers == ("wandb",)
    assert several.loggers == ("wandb", "csv") and several.run_id == one.run_id
    assert RunSpec.from_json(several.to_json()) == several
    monkeypatch.setattr("scaling_exps.config.schema.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scalerun\[tensorboard\]"):
        specs("logger=[csv,tensorboard]")
