"""As much of a wandb server as a run needs, on loopback: it keeps what wandb's core sends, by run."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Run:
    """What the server has of one run."""

    created: dict[str, Any]  # group, job type, tags, config ... as they were sent last
    lines: dict[int, str] = field(default_factory=dict)  # history by offset
    sent: list[int] = field(default_factory=list)  # offset of every line that came, in order
    summary: dict[str, Any] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    preempting: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[i]) for i in sorted(self.lines)]


class Server(ThreadingHTTPServer):
    """Settings of its behaviour may change while it runs.

    mode: `well`; `busy` (429); `refusing` (400 to records); `silent` (accepts, and never answers).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.runs: dict[str, Run] = {}
        self.mode = "well"
        self.silence = threading.Event()
        self.requests = 0
        self.keys: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None: ...  # a client that is killed


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        self.server.requests += 1
        self.server.keys.add(self.headers.get("Authorization", ""))
        status, value = 200, {}
        if self.server.mode == "silent":
            self.server.silence.wait()
        elif self.server.mode == "busy":
            status = 429
        elif self.path.endswith("/graphql"):
            value = {"data": self.graphql(json.loads(text))}
        elif self.path.endswith("/file_stream") and self.server.mode == "refusing":
            status = 400
        elif self.path.endswith("/file_stream"):
            self.keep(self.server.runs[self.path.split("/")[-2]], json.loads(text))
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def keep(self, run: Run, chunk: dict[str, Any]) -> None:
        files = chunk.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for i, line in enumerate(history["content"], history["offset"]):
            run.lines[i] = line
            run.sent.append(i)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            run.summary = json.loads(line)
        run.preempting |= bool(chunk.get("preempting"))
        if chunk.get("complete"):
            run.exits.append(chunk["exitcode"])

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        given, query = request.get("variables") or {}, request["query"]
        entity = {"id": "e", "name": given.get("entity") or "me"}
        project = {"id": "p", "name": given.get("project") or "scalerun", "entity": entity}
        if "upsertBucket" in query:
            name = given["name"]
            run = self.server.runs.setdefault(name, Run({}))
            run.created |= {k: v for k, v in given.items() if v is not None}
            return {"upsertBucket": {"inserted": True, "bucket": {"id": "r", "name": name, "project": project}}}
        if "createRunFiles" in query:
            urls = [{"name": n, "uploadUrl": f"{self.server.url}/upload/{i}"} for i, n in enumerate(given["files"])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": urls}}
        known = self.server.runs.get(given.get("name", ""))
        bucket = known and {
            "id": "r", "name": given["name"], "config": known.created.get("config", "{}"),
            "summaryMetrics": json.dumps(known.summary), "historyLineCount": len(known.lines),
            "historyTail": json.dumps([known.lines[i] for i in sorted(known.lines)][-1:]),
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0, "wandbConfig": '{"t": 1}', "tags": [],
        }  # fmt: skip
        return {"serverInfo": {"features": []}, "model": {**project, "bucket": bucket}}


@contextmanager
def serving() -> Iterator[Server]:
    """A server that answers until the block is left."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.silence.set()
            server.shutdown()
            thread.join()
