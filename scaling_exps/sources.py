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
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

GATED = {"imagenet": "ILSVRC/imagenet-1k"}
PICTURES = (".jpeg", ".jpg", ".png")
UNREAD = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jfif")  # pictures, too
TEST = ("val", "validation", "test")  # what the test part may be called; the first that is there
LAYOUT = (
    "dataset.path must hold train/CLASS/*.jpg (.jpeg, .png) and val/CLASS/*.jpg (or validation/, or test/), or parquet "
    "files train*.parquet and validation*.parquet with the columns image and label"
)
LOOKED_AT = 8  # pictures of a class that a plan opens
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
        raise DataError(f"dataset=imagefolder needs dataset.path=FOLDER; {LAYOUT}")
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
        where = raw_folder(name, path)
        held = _names_and_sizes(where, _pictures(where))
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


# ---- image folders ----


@dataclass(frozen=True)
class ImageFolder:
    """What an image folder holds: its fingerprint, how many classes, training and test pictures."""

    content: str
    classes: int
    train: int
    test: int


def image_folder(path: str | None) -> ImageFolder:
    """The folder of `dataset=imagefolder`, counted and looked at; no picture is decoded.

    Raises:
        DataError: with every fault: no classes, an empty one, pictures that are outside of a class or cannot be read.
    """
    root = raw_folder("imagefolder", path)
    there = _pictures(root)
    held = _names_and_sizes(root, there)
    if (shards := parquet_folder(root)) is not None:
        return ImageFolder(held, *_parquet_counts(shards))
    train, test, classes = parts(root, "imagefolder")
    by_class: dict[tuple[str, str], list[Path]] = {}
    wrong = []
    for name, size in there.items():
        part, *below = name.split("/")
        if part in (train.name, test.name) and len(below) == 1:
            wrong.append(f"{name} lies outside of a class folder")
        elif part in (train.name, test.name) and name.lower().endswith(PICTURES):
            by_class.setdefault((part, below[0]), []).append(root / name)
            wrong += [f"{name} is empty"] * (size == 0)
    if len(classes) < 2:
        wrong.append(f"{train.name} has {len(classes)} class folder(s), and a classifier needs two or more")
    wrong += [f"{train.name}/{c} holds no picture" for c in classes if (train.name, c) not in by_class]
    wrong += [f"{test.name} holds no picture"] * all(part != test.name for part, _ in by_class)
    if unread := _unread(there):
        wrong.append(f"{unread}: convert them, or move them away")
    image: Any = need("PIL.Image", "a data set of image files")
    for files in by_class.values():
        for file in files[:: max(1, len(files) // LOOKED_AT)]:
            try:
                image.open(file).close()
            except OSError as e:
                empty = file.stat().st_size == 0
                wrong += [] if empty else [f"{file.relative_to(root)} is no picture ({type(e).__name__})"]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"dataset.path={str(root)!r}: {'; '.join(wrong[:5])}{more}. It reads .jpg, .jpeg and .png")
    counts = [sum(len(f) for (part, _), f in by_class.items() if part == which.name) for which in (train, test)]
    return ImageFolder(held, len(classes), *counts)


def parts(root: Path, name: str) -> tuple[Path, Path, list[str]]:
    """The folders of training and of test pictures, and the classes by name, which is the order of their labels.

    Raises:
        DataError: it has no such folders, or a class has test pictures alone.
    """
    train, test = root / "train", next((root / t for t in TEST if (root / t).is_dir()), None)
    if not train.is_dir() or test is None:
        names = _folders(root)
        has = f"; it has the folders {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else ""
        fetch = "" if name == "imagefolder" else f"; or {how(name)}"
        raise DataError(f"no images in {str(root)!r}: {LAYOUT}{has}{fetch}")
    classes = _folders(train)
    if strange := set(_folders(test)) - set(classes):
        raise DataError(f"{str(test)!r} has the class {min(strange)!r}, which {str(train)!r} has not")
    return train, test, classes


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir())


def parquet_folder(root: Path) -> Path | None:
    """Where the shards of a data set in parquet lie; None: it is none."""
    return next((folder for folder in (root, root / "data") if any(folder.glob("train*.parquet"))), None)


def _parquet_counts(folder: Path) -> tuple[int, int, int]:
    parquet: Any = need("pyarrow.parquet", "a data set in parquet")
    sizes, classes = [], 0
    for names in (("train",), TEST):
        files = next((found for n in names if (found := sorted(folder.glob(f"{n}*.parquet")))), [])
        try:
            labels = [parquet.read_table(f, columns=["label"])["label"].to_pylist() for f in files]
        except Exception as e:  # what is no parquet file fails in many ways; KeyError: no such column
            raise DataError(f"cannot read the column label of {str(folder)!r}: {type(e).__name__}: {e}") from e
        sizes.append(sum(map(len, labels)))
        classes = classes or 1 + max((x for part in labels for x in part if x is not None), default=-1)
    if classes < 2 or not sizes[1]:
        raise DataError(f"{str(folder)!r} has {classes} class(es) and {sizes[1]} test pictures; {LAYOUT}")
    return classes, sizes[0], sizes[1]


def _unread(files: dict[str, int]) -> str:
    kinds = [os.path.splitext(name)[1].lower() for name in files if name.lower().endswith(UNREAD)]
    return f"{len(kinds)} file(s) are {', '.join(sorted(set(kinds)))}" if kinds else ""


def _pictures(folder: Path) -> dict[str, int]:
    """Relative name -> size of every picture and parquet file below a folder, whether it is of a kind that is read."""
    rows = {}
    for base, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        for name in sorted(n for n in names if n.lower().endswith((*PICTURES, ".parquet", *UNREAD))):
            file = Path(base, name)
            rows[file.relative_to(folder).as_posix()] = file.stat().st_size
    return rows


def _names_and_sizes(folder: Path, files: dict[str, int]) -> str:
    rows = [f"{name}\0{size}\n" for name, size in files.items() if not name.lower().endswith(UNREAD)]
    if not rows:
        unread = _unread(files)
        raise DataError(f"no images in {str(folder)!r}{f' ({unread})' if unread else ''}: {LAYOUT}")
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:16]
