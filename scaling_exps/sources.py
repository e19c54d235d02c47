"""Where raw data lies, and what it holds. Planning asks here for a data set's identity, so nothing heavy is imported.

Training reads; only `scalerun data` downloads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import platform
import sysconfig
import time
from pathlib import Path
from types import ModuleType

GATED = {"imagenet": "ILSVRC/imagenet-1k"}
PICTURES = (".jpeg", ".jpg", ".png")
LAYOUT = (
    "dataset.path must hold train/CLASS/*.jpg (.jpeg, .png) and val/CLASS/*.jpg, or parquet files train*.parquet and "
    "validation*.parquet with the columns image and label"
)
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip"}
CHECKPOINT = "checkpoint.pt"  # the newest one in a run's folder
JUST_WRITTEN = 2.0  # seconds: a file this young may change again within its clock's tick, so its hash is not kept


class DataError(ValueError):
    """The data set is missing, unreadable or not what the config says."""


# ---- places ----


def cache() -> Path:
    """Folder of decoded images, token files and hashes; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalerun"


def home() -> Path:
    """Folder of raw data sets, one folder each: SCALERUN_DATA, or `data` in the cache."""
    return Path(os.environ.get("SCALERUN_DATA") or cache() / "data")


def raw_folder(name: str, path: str | None) -> Path:
    """The folder (or file) that `dataset.path` names, else the data home's folder of that name.

    Raises:
        DataError: it does not exist, or the data set is the user's own and no path is given.
    """
    if path is None and name == "text":
        raise DataError("dataset=text needs dataset.path=FILE or FOLDER (of .txt or .parquet files)")
    if path is None and name == "imagefolder":
        raise DataError(f"dataset=imagefolder needs dataset.path=FOLDER and dataset.classes=N; {LAYOUT}")
    where = Path(path) if path is not None else home() / name
    if where.exists():
        return where
    own = f", or fetch it: {how(name)}" if name not in ("text", "imagefolder") else ""
    if path is not None:
        raise DataError(f"dataset.path={path!r} does not exist; give the folder of {name}{own}")
    raise DataError(
        f"{name} is not on this machine (looked for {str(where)!r}), and training never downloads. Fetch it once: "
        f"{how(name)}; or give dataset.path=FOLDER, or set SCALERUN_DATA to the folder above"
    )


def how(name: str) -> str:
    """The command that fetches a data set."""
    return f"scalerun data {name}" + (f" (gated: {access(GATED[name])})" if name in GATED else "")


def access(hub_id: str) -> str:
    """What a data set asks for that the hub gives only to those who accept its terms."""
    return f"first accept the terms on the hub's page of {hub_id}, then log in with `hf auth login`"


def need(module: str, what: str) -> ModuleType:
    """Import a module of the extra `data`; where it is not installed, a DataError says `what` needs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise DataError(f"{what} needs {module.partition('.')[0]}: pip install 'scalerun[data]'") from e


# ---- identity ----


def fingerprint(
    name: str, path: str | None, tokenizer: str | None = None, tokenizer_revision: str | None = None
) -> str:
    """What a data set holds, as far as its name and its pinned revision do not say it; no part of it is a place.

    * text: the content of its files. imagefolder: the relative names and the sizes of its files, not their content.
    * stdlib: the version of Python. All others: nothing.
    * and of a tokenizer: the content of its folder, or its commit on the hub (None: the one in the local cache).

    Raises:
        DataError: nothing there, not readable, or a path for what is part of this package or of Python.
    """
    if path is not None and name in ("digits", "stdlib"):
        raise DataError(f"dataset.path={path!r}: {name} is embedded and takes no path; drop it")
    held = ""
    if name == "text":
        held = content(text_files(name, path))
    elif name == "stdlib":
        held = f"python-{platform.python_version()}"
    elif name == "imagefolder":
        held = _names_and_sizes(raw_folder(name, path))
    return f"{held} {tokenizer_content(tokenizer or 'bytes', tokenizer_revision)}".strip()


def tokenizer_content(name: str, revision: str | None) -> str:
    """A tokenizer's identity beside its name: see `fingerprint`, also for arguments and errors."""
    if name in ("bytes", "bpe"):
        return ""
    if Path(name).is_dir():
        return content(sorted(f for f in Path(name).iterdir() if f.is_file()))
    if revision is not None:
        return revision
    hub = need("huggingface_hub.constants", f"tokenizer {name!r}")
    folder = Path(hub.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError):
        commit = (folder / "refs" / "main").read_text().strip()
        if commit and (folder / "snapshots" / commit).is_dir():
            return commit
    raise DataError(no_tokenizer(name, None))


def no_tokenizer(name: str, revision: str | None) -> str:
    """What to do about a tokenizer that is not on this machine."""
    pinned = f"@{revision}" if revision else ""
    other = f"; dataset.tokenizer_revision={revision} must be a commit of this tokenizer, or null" if revision else ""
    return (
        f"tokenizer {name!r} is not on this machine, and training never downloads. Fetch it once: "
        f"{how(f'tokenizer:{name}{pinned}')}{other}; or choose dataset.tokenizer=bytes or bpe"
    )


def text_files(name: str, path: str | None) -> list[Path]:
    """The files of a text corpus, in the order in which their documents are read; a DataError if there are none.

    stdlib: the standard library's own sources, without its tests and what was installed beside it.
    """
    if name == "stdlib":
        sources = []
        for base, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
            subfolders[:] = [s for s in subfolders if s not in NOT_STDLIB]
            sources += [Path(base, n) for n in names if n.endswith(".py")]
        return sorted(sources)
    where = raw_folder(name, path)
    if where.is_file():
        return [where.resolve()]
    files = sorted([*where.rglob("*.parquet"), *where.rglob("*.txt")])
    if not files:
        raise DataError(f"no .parquet and no .txt file under {str(where)!r}")
    return files


def content(files: list[Path]) -> str:
    """SHA-256 of files, 16 hex digits: of their bytes, and of their names below the folder that holds them all.

    A single text file is its bytes alone (its name decides nothing). The hash is kept in the cache by path, size and
    time of change, so only the first call reads the files. Raises DataError where one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        stats = [(str(f.absolute()), s.st_size, s.st_mtime_ns) for f, s in ((f, f.stat()) for f in files)]
        kept = cache() / "content" / hashlib.sha256(repr(stats).encode()).hexdigest()[:32]
        if kept.exists() and len(known := kept.read_text()) == 16:
            return known
        root = os.path.commonpath([f.parent for f in files])
        for f, (_, size, _) in zip(files, stats, strict=True):
            name = "" if len(files) == 1 and f.suffix != ".parquet" else f.relative_to(root).as_posix()
            digest.update(f"{name}\0{size}\0".encode())
            with open(f, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as e:
        raise DataError(f"cannot read {e.filename!r}: {e.strerror}; make it readable, or give other files") from e
    if max(s[2] for s in stats) / 1e9 < time.time() - JUST_WRITTEN:
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(digest.hexdigest()[:16])
            os.replace(aside, kept)
    return digest.hexdigest()[:16]


def weights(path: str | None) -> str | None:
    """Identity of the weights that training begins with; None: those of the seed.

    Raises:
        DataError: nothing there, or not readable.
    """
    return None if path is None else content([weights_file(path)])


def weights_file(path: str) -> Path:
    """The file of weights at `path`: itself, or the newest checkpoint of a run's folder. Raises as `weights`."""
    file = Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)
    if file.is_file():
        return file
    raise DataError(
        f"recipe.start_from={path!r}: there is no file {str(file)!r}; give a run's folder, a checkpoint (.pt) or "
        ".safetensors"
    )


def _names_and_sizes(folder: Path) -> str:
    rows = []
    for base, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        for name in sorted(n for n in names if n.lower().endswith((*PICTURES, ".parquet"))):
            file = Path(base, name)
            rows.append(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\n")
    if not rows:
        raise DataError(f"no images in {str(folder)!r}: {LAYOUT}")
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:16]
