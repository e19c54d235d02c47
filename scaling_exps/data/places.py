"""Where raw data lies, and where what was made of it is kept. Training reads; only `prepare` downloads."""

from __future__ import annotations

import os
from pathlib import Path

from scaling_exps.data.stream import DataError

GATED = {"imagenet": "ILSVRC/imagenet-1k"}


def cache() -> Path:
    """Folder of decoded images and token files; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalerun"


def home() -> Path:
    """Folder of raw data sets, one folder each: SCALERUN_DATA, or `data` in the cache."""
    return Path(os.environ.get("SCALERUN_DATA") or cache() / "data")


def raw_folder(name: str, path: str | None) -> Path:
    """The folder (or file) that `dataset.path` names, else the data home's folder of that name.

    Raises:
        DataError: it does not exist.
    """
    where = Path(path) if path is not None else home() / name
    if where.exists():
        return where
    if path is not None:
        raise DataError(f"dataset.path={path!r} does not exist; give the folder of {name}, or fetch it: {how(name)}")
    raise DataError(
        f"{name} is not on this machine (looked for {str(where)!r}), and training never downloads. Fetch it once: "
        f"{how(name)}; or give dataset.path=FOLDER, or set SCALERUN_DATA to the folder above"
    )


def how(name: str) -> str:
    """The command that fetches a data set."""
    command = f"python -m scaling_exps.data.prepare {name}"
    return command if name not in GATED else f"{command} (gated: {access(GATED[name])})"


def access(hub_id: str) -> str:
    """What a data set asks for that the hub gives only to those who accept its terms."""
    return f"first accept the terms on the hub's page of {hub_id}, then log in with `hf auth login`"
