"""What is made once and then kept: written aside, renamed at the end, with a bar on a terminal while it is made."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from scaling_exps.sources import DataError


def keep(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder`, if it is not there, by `write`, which fills another one, so that a reader sees all or nothing.

    Raises:
        DataError: no room, or no right to write.
    """
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process of the same number that was killed
        aside.mkdir(parents=True)
        write(aside)
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.exists():  # else somebody was faster
                raise
    except OSError as e:
        raise DataError(
            f"cannot write {str(folder)!r}: {e.strerror or e}. Make room, or set XDG_CACHE_HOME to another folder"
        ) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def bar(what: str, total: float | None = None, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal; yields what is called with each advance."""
    count = DownloadColumn() if in_bytes else TextColumn("{task.completed:,.0f}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)
