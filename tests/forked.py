"""Programs of the project in processes of their own that need not import torch again: a server that has is forked.

A training process spends five of its seven seconds importing torch; the suite starts some two hundred of them. Only
libraries are imported beforehand, never the project.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.run", "hydra.core.override_parser.overrides_parser", "rich.progress"]
)


def start(
    words: list[str], cwd: Path = ROOT, env: dict[str, str] = ENVIRONMENT, out: str = os.devnull, err: str = os.devnull
) -> Any:
    """Start `python WORDS`, its output appended to two files; a multiprocessing.Process."""
    process = _SERVER.Process(target=_main, args=(words, str(cwd), env, out, err))
    process.start()
    return process


def run(words: list[str], cwd: Path = ROOT, env: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([sys.executable, *words], capture_output=True, text=True), with no standard input."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = start(words, cwd, env, out.name, err.name)
        process.join()
        return subprocess.CompletedProcess([sys.executable, *words], process.exitcode, out.read(), err.read())


def _main(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    code: Any = 1
    try:
        _python(*words)
        code = 0
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:  # as the interpreter does; multiprocessing would skip the exit handlers
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _python(first: str, *rest: str) -> None:
    """What Python does with its words: -m MODULE ..., -c CODE ..., SCRIPT ...."""
    if not first.startswith("-"):
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
        return
    sys.argv = list(rest) if first == "-m" else [first, *rest[1:]]
    sys.path.insert(0, os.getcwd())
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        exec(rest[0], {"__name__": "__main__"})
