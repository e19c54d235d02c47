"""wandb: what lies in its offline files are our records, once each; the dashboard's specification; uploading."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import prepare, rows, specs, work

from scaling_exps import cli, records
from scaling_exps.report import dashboard

CLOCK = ("samples", "t")


def history(run_dir: Path) -> list[tuple[Any, ...]]:
    """Every metric in the offline files as (step, samples, t, kind/name, value), in order, nothing merged."""
    found = []
    for row in records.read_mirror(run_dir):
        for key, value in row.items():
            if not key.startswith("_") and key not in CLOCK:
                found.append((row["_step"], row["samples"], row["t"], key, value))
    return sorted(found)


def settled(read: Callable[[], list[Any]], expected: list[Any]) -> list[Any]:
    """What `read` gives, once it is as long as expected: wandb's process may still write after `finish` returned."""
    end = time.monotonic() + 20
    while len(found := read()) < len(expected) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def ours(run_dir: Path) -> list[tuple[Any, ...]]:
    return sorted(
        (r["step"], r["samples"], r["t"], "/".join([r["kind"], *([r["method"]] if "method" in r else []), k]), v)
        for r in records.read_records(run_dir)
        for k, v in r.items()
        if k not in ("kind", "step", "method", *CLOCK)
    )


def test_a_real_run_is_mirrored_exactly(tmp_path: Path) -> None:
    """A training run with wandb offline. Fails if a record were lost, logged twice, at another step, or under a key
    that another kind of record at the same step overwrites."""
    (spec,) = specs("logger=wandb", "measure.train_records=8", "measure.evaluations=4")
    run_dir = prepare(tmp_path, spec)
    work(run_dir)
    assert len(rows(run_dir)) >= 12
    assert settled(lambda: history(run_dir), ours(run_dir)) == ours(run_dir)


class Server(ThreadingHTTPServer):
    """As much of a wandb server as an upload needs; keeps the history it is sent, by run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.history: dict[str, list[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        value: Any = {}
        if self.path.endswith("/graphql"):
            value = {"data": self.graphql(json.loads(said))}
        elif self.path.endswith("/file_stream"):
            chunk = (json.loads(said).get("files") or {}).get("wandb-history.jsonl")
            if chunk:
                lines = self.server.history.setdefault(self.path.split("/")[-2], [])
                lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = asked.get("variables") or {}
        if "upsertBucket" in asked["query"]:
            project = {"id": "p", "name": "scalerun", "entity": {"id": "e", "name": "me"}}
            return {
                "upsertBucket": {"inserted": True, "bucket": {"id": "r", "name": given["name"], "project": project}}
            }
        if "createRunFiles" in asked["query"]:
            urls = [{"name": n, "uploadUrl": f"{self.server.url}/upload/{i}"} for i, n in enumerate(given["files"])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": urls}}
        lines = self.server.history.get(given.get("name", ""))
        bucket = lines and {
            "id": "r", "name": given["name"], "config": "{}", "summaryMetrics": "{}", "historyLineCount": len(lines),
            "historyTail": json.dumps(lines[-1:]), "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0,
            "wandbConfig": '{"t": 1}', "tags": [],
        }  # fmt: skip
        model = {"id": "p", "name": "scalerun", "entity": {"id": "e", "name": "me"}, "bucket": bucket or None}
        return {"serverInfo": {"features": []}, "model": model}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_wandb_reads_and_uploads_exactly_our_records(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`scalerun sync` for real, to a server on this machine: wandb's own reader takes the offline files apart, and what
    arrives is what records.jsonl holds, also of a run that was resumed. Fails if a record were lost or sent twice."""
    (spec,) = specs("logger=wandb")
    run_dir = prepare(tmp_path / "runs", spec)
    lines = [record("train", s, loss=1 / s, window=4, seconds=0.1 * s) for s in range(1, 21)]
    first = records.Writer(run_dir, spec, 0)
    for r in lines[:12]:
        first.write(r)
    size = (run_dir / "records.jsonl").stat().st_size
    first.close({})
    time.sleep(1.1)  # wandb names its folders by the second
    second = records.Writer(run_dir, spec, size)
    noise = [record("noise", 20, trace=2.0) | {"method": m} for m in ("free", "full")]
    for r in [*lines[12:], record("eval", 20, loss=0.5, accuracy=0.9), *noise]:
        second.write(r)
    second.close({"final/test_loss": 0.5})
    settled(lambda: history(run_dir), ours(run_dir))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert cli.main(["sync", str(tmp_path / "runs")]) == 0
    assert "2 of 2 offline run(s) uploaded" in capsys.readouterr().out
    arrived = [json.loads(line) for line in server.history[spec.run_id]]
    got = [
        (row["_step"], row["samples"], row["t"], k, v)
        for row in arrived
        for k, v in row.items()
        if not k.startswith("_") and k not in CLOCK
    ]
    assert sorted(got) == ours(run_dir)
    assert cli.main(["sync", str(tmp_path / "runs")]) == 0
    assert "nothing to upload" in capsys.readouterr().out


def record(kind: str, step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": kind, "step": step, "samples": step * 4, "t": step * 1e-6, **metrics}


def test_a_resumed_run_is_in_it_once(tmp_path: Path) -> None:
    """A process dies after step 60, having a checkpoint of step 30: records 31..60 are cut off and written anew, and so
    is the mirror's. Fails (steps 31..60 twice) if the second offline file started at the checkpoint."""
    (spec,) = specs("logger=wandb")
    run_dir = prepare(tmp_path, spec)
    line = [record("train", s, loss=1 / s, window=4, seconds=0.1 * s) for s in range(1, 101)]
    first = records.Writer(run_dir, spec, 0)
    for r in line[:30]:
        first.write(r)
    size = first.sync()
    for r in line[30:60]:
        first.write(r)
    first.file.close()
    first.mirror.run.finish()  # what wandb's own process does when ours is gone
    steps = list(range(1, 61))
    assert settled(lambda: [r["_step"] for r in records.read_mirror(run_dir)], steps) == steps
    time.sleep(1.1)  # wandb names its folders by the second
    second = records.Writer(run_dir, spec, size)
    for r in line[30:]:
        second.write(r)
    second.write(record("eval", 100, loss=0.5))
    second.close({"final/test_loss": 0.5})
    assert settled(lambda: history(run_dir), ours(run_dir)) == ours(run_dir)
    assert len(ours(run_dir)) == 301


def test_runs_are_arranged_for_comparing_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group, job type, tags, columns, step metric, and the gap to the base run. A stand-in hears what wandb is told."""
    import wandb

    told: dict[str, Any] = {"defined": {}}

    class Run:
        summary: dict[str, Any] = {}  # noqa: RUF012

        def define_metric(self, name: str, step_metric: str) -> None:
            told["defined"][name] = step_metric

        def log(self, *_: Any, **__: Any) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **kw: told.update(kw) or Run())
    base, scaled = specs("logger=wandb", "batch=[4,16]", "recipe.batch=4")
    write = records.write_json
    write(prepare(tmp_path, base) / "result.json", {"status": "finished", "metrics": {"test_loss": 0.5}})
    writer = records.Writer(prepare(tmp_path, scaled), scaled, 0)
    writer.write(record("train", 10, loss=1.0, window=40, seconds=0.5))
    writer.close({"final/test_loss": 0.75})
    assert (told["id"], told["job_type"]) == (scaled.run_id, "sqrt x4")
    assert {"sqrt", "batch 16", "adam", "digits"} <= set(told["tags"])
    assert {k: told["config"][k] for k in ("batch", "rule", "kappa", "seed")} == {
        "batch": 16, "rule": "sqrt", "kappa": 4.0, "seed": 0,
    }  # fmt: skip
    assert set(told["defined"].values()) == {"samples"} and "train/*" in told["defined"]
    assert Run.summary == {"final/test_loss": 0.75, "gap/test_loss": 0.25, "samples_per_second": 80.0}


def test_a_torn_offline_file_is_read_up_to_the_tear(tmp_path: Path) -> None:
    """Cut anywhere, also inside a record that spans two blocks: what is whole before is read, nothing raises."""
    (spec,) = specs("logger=wandb")
    run_dir = prepare(tmp_path, spec)
    writer = records.Writer(run_dir, spec, 0)
    for s in range(1, 301):
        writer.write(record("train", s, loss=1 / s, window=4, **{f"x{i}": float(i) for i in range(20)}))
    writer.close({})
    steps = list(range(1, 301))
    assert settled(lambda: [r["_step"] for r in records.read_mirror(run_dir)], steps) == steps
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    raw = file.read_bytes()
    assert len(raw) > 2 * 32768  # so that records cross blocks
    for end in (len(raw) // 2, 32768 + 3, 32768, 100, 8, 0):
        file.write_bytes(raw[:end])
        cut = [r["_step"] for r in records.read_mirror(run_dir)]
        assert cut == steps[: len(cut)]


@pytest.mark.parametrize("spare", range(9))
def test_blocks_are_padded(tmp_path: Path, spare: int) -> None:
    """A record leaves 0 to 8 bytes of a block: fewer than 7 hold no head and are padding, 7 hold an empty fragment.
    Fails if the next head were looked for in the padding: then all after it would be lost."""
    from wandb.proto import wandb_internal_pb2 as proto

    def row(step: int, size: int) -> bytes:
        record: Any = proto.Record()
        for key, value in (("_step", str(step)), ("x", json.dumps("x" * size))):
            record.history.item.add(key=key, value_json=value)
        return bytes(record.SerializeToString())

    first = row(1, 32000)
    first = row(1, 32000 + 32768 - 7 - 7 - spare - len(first))
    assert 7 + 7 + len(first) + spare == 32768
    parts = [(1, first)] if spare != 7 else [(1, first), (2, b"")]
    raw = b":W&B" + bytes(3) + b"".join(bytes(4) + len(d).to_bytes(2, "little") + bytes([k]) + d for k, d in parts)
    raw += bytes(spare if spare < 7 else 0)
    second = row(2, 5)
    cut = 1 if spare == 8 else 0
    pieces = [(4, second)] if spare == 7 else [(2, second[:1]), (4, second[1:])] if cut else [(1, second)]
    raw += b"".join(bytes(4) + len(d).to_bytes(2, "little") + bytes([k]) + d for k, d in pieces)
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-x"
    folder.mkdir(parents=True)
    (folder / "run-x.wandb").write_bytes(raw)
    assert [r["_step"] for r in records.read_mirror(tmp_path)] == [1, 2]


def test_upload(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded are the offline folders that are not yet, oldest first; wandb's own marker is believed."""
    for day, run, done in ((3, "b", False), (1, "a", False), (2, "c", True)):
        folder = tmp_path / "runs" / run / "wandb" / f"offline-run-2026010{day}_000000-{run}"
        folder.mkdir(parents=True)
        (folder / f"run-{run}.wandb").write_bytes(b"")
        if done:
            (folder / f"run-{run}.wandb.synced").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sync", "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [Path(x).parts[1] for x in listed[:2]] == ["a", "b"] and "2 offline run(s)" in listed[2]
    monkeypatch.setattr(records, "logged_in", lambda: False)
    assert cli.main(["sync"]) == 2
    assert "wandb login" in capsys.readouterr().err

    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        asked.append(command)
        (Path(command[4]) / "run-a.wandb.synced").write_text("")  # and the second one fails

    monkeypatch.setattr(records, "logged_in", lambda: True)
    monkeypatch.setattr(dashboard.subprocess, "run", run)
    assert cli.main(["sync"]) == 1
    assert asked[0][1:4] == ["-m", "wandb", "sync"] and [Path(p).name[-1] for p in asked[0][4:]] == ["a", "b"]
    assert "1 of 2 offline run(s) uploaded" in capsys.readouterr().out
