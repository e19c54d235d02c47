"""`scalerun data [NAME]`: fetch, check and convert a data set before training, which never downloads.

Parquet files go into the data home's folder of that name (or --out), with `manifest.json`: rows and SHA-256 of each.
They are written aside and the folder is renamed at the end, so a data set is there as a whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from scaling_exps import config, data
from scaling_exps.config import TokenDataset
from scaling_exps.data import files
from scaling_exps.data.store import bar
from scaling_exps.sources import GATED, DataError, access, home, how, need
from scaling_exps.words import Parser

SHARD = 2000  # images of a parquet file that is written from an image folder


@dataclass(frozen=True)
class Source:
    """Where parquet files of the hub lie, and what they must be.

    pattern: of the files in `repository`. rows: by the start of the final name. columns: that every file must have.
    revision: None is `revision` of conf/dataset/NAME.yaml. prefix: put before the files' names.
    """

    repository: str
    pattern: str
    rows: dict[str, int]
    columns: tuple[str, ...] = ("text",)
    revision: str | None = None
    prefix: str = ""


_IMAGENET = {"train": 1_281_167, "validation": 50_000}  # the test part, which has no labels, is left out
_WIKITEXT = {"train": 1_801_350, "validation": 3_760, "test": 4_358}
_CIFAR10 = {"train": 50_000, "test": 10_000}
SETS: dict[str, tuple[Source, ...]] = {
    "cifar10": (Source("uoft-cs/cifar10", "plain_text/*.parquet", _CIFAR10, ("img", "label")),),
    "imagenet": (Source(GATED["imagenet"], "data/[tv][ra]*.parquet", _IMAGENET, ("image", "label")),),
    "wikitext103": (Source("Salesforce/wikitext", "wikitext-103-raw-v1/*.parquet", _WIKITEXT),),
    "wikibooks": (
        Source("wikimedia/wikipedia", "20231101.en/*.parquet", {"wikipedia-": 6_407_814}, prefix="wikipedia-"),
        # The hub's own conversion of a data set that no longer changes. Its commit could not be read anywhere, so the
        # branch stands here, and the manifest says which commit it was.
        Source(
            "bookcorpus/bookcorpus", "plain_text/*train/*.parquet", {"bookcorpus-": 74_004_228},
            revision="refs/convert/parquet", prefix="bookcorpus-",
        ),
    ),
}  # fmt: skip
TOKENIZER = "tokenizer:"
NAMES = (*SETS, "digits", "stdlib", "text", f"{TOKENIZER}HUBID[@COMMIT]")


def main(words: list[str]) -> int:
    """0: done. 2: it cannot be done; one message says why and what to do. 130: interrupted."""
    parser = Parser(prog="scalerun data", description="Fetch, check and convert a data set.")
    parser.add_argument("name", nargs="?", help=f"{', '.join(NAMES)}; none: a table of what is there")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are here already, not the hub's")
    parser.add_argument("--out", metavar="FOLDER", help="instead of the data home's folder of that name")
    options = parser.parse_args(words)
    try:
        if options.name is None:
            print(table())
        else:
            fetch(options.name, options.source, options.out)
    except DataError as e:
        print(f"scalerun: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scalerun: interrupted; the same command again goes on", file=sys.stderr)
        return 130
    return 0


def fetch(name: str, source: str | None = None, out: str | None = None) -> None:
    """Bring one data set of NAMES, from `source` or the hub, to `out` or the data home, checked and converted.

    Raises:
        DataError: unknown name, nothing to take, the hub refuses or cannot be reached, no room, or wrong content.
    """
    path: str | None = source
    if name.startswith(TOKENIZER):
        if source or out:
            raise DataError(f"{name} goes into the hub's own cache: drop --from and --out")
        hub_id, _, commit = name.removeprefix(TOKENIZER).partition("@")
        return fetch_tokenizer(hub_id, commit or None)
    if name in SETS:
        folder = Path(out) if out else home() / name
        try:
            _bring(name, Path(source) if source else None, folder)
        except OSError as e:
            reason = "no room left" if e.errno == errno.ENOSPC else f"{e.strerror or e}"
            raise DataError(f"cannot write below {str(folder.parent)!r}: {reason}. Give another --out=FOLDER") from e
        path = str(folder) if out else None
    elif name not in ("digits", "stdlib", "text"):
        raise DataError(f"unknown data set {name!r}; allowed: {', '.join(NAMES)}")
    elif out or (name == "text") != bool(source):
        need_source = "needs --from FILE or FOLDER and takes no --out"
        raise DataError(f"{name} {need_source if name == 'text' else 'takes neither --from nor --out'}")
    _convert(name, path)
    where = f" dataset.path={path}" if path else ""
    print(f"{name} is ready: scalerun dataset={name}{where} ...")


def _convert(name: str, path: str | None) -> None:
    """What the first training run would do: decode, tokenize, map."""
    dataset = config.dataset(name)
    if isinstance(dataset, TokenDataset) and dataset.tokenizer != "bytes":
        fetch_tokenizer(dataset.tokenizer, dataset.tokenizer_revision)
    print(f"converting {name}", flush=True)
    data.load(dataset, path)


def fetch_tokenizer(hub_id: str, revision: str | None) -> None:
    """A tokenizer into the hub's cache, where training finds it; its newest commit where `revision` is None."""
    auto = need("transformers", f"tokenizer {hub_id!r}").AutoTokenizer
    try:
        auto.from_pretrained(hub_id, revision=revision, local_files_only=True)
    except Exception:  # not there, or damaged
        with _asking(f"tokenizer {hub_id}", "use dataset.tokenizer=bytes or bpe") as hub:
            hub.HfApi().model_info(hub_id, revision=revision)  # answers at once; transformers tries for a minute
            auto.from_pretrained(hub_id, revision=revision)
    print(f"tokenizer {hub_id} is there")


# ---- the files ----


def _bring(name: str, source: Path | None, folder: Path) -> None:
    manifest = folder / "manifest.json"
    if folder.exists() and any(folder.iterdir()):
        if source is not None:
            raise DataError(f"{str(folder)!r} is there already; move it away, or give another --out=FOLDER")
        described = {f.name: _describe(f) for f in sorted(folder.glob("*.parquet"))}
        for file, said in json.loads(manifest.read_text())["files"].items() if manifest.exists() else ():
            if described.get(file, {}).get("sha256") != said["sha256"]:
                raise DataError(
                    f"{str(folder / file)!r} is missing or was altered since it was fetched; remove {str(folder)!r} "
                    "and fetch anew"
                )
        _check(name, described)
        if not manifest.exists():
            _write_manifest(manifest, [str(folder)], described)
        print(f"{name} is there: {folder}")
        return
    aside = folder.with_name(f".{folder.name}.partial")  # kept when a download is cut: the next one goes on with it
    aside.mkdir(parents=True, exist_ok=True)
    origin = [str(source)]
    arrived: dict[str, tuple[Path, str | None]] = {}  # by final name; the hub's checksum
    try:
        if source is None:
            origin = [_download(name, part, aside, arrived) for part in SETS[name]]
        else:
            arrived = {file.name: (file, None) for file in _copy(name, source, aside)}
        described = {final: _describe(file) for final, (file, _) in arrived.items()}
        for final, (file, said) in arrived.items():
            if said not in (None, described[final]["sha256"]):
                file.unlink()
                raise DataError(f"{final} arrived damaged; run the same command again")
        _check(name, described)
    except BaseException:
        if source is not None or not [*aside.rglob("*.parquet"), *aside.rglob("*.incomplete")]:  # nothing to go on with
            shutil.rmtree(aside)
        raise
    for final, (file, _) in arrived.items():
        os.replace(file, aside / final)
    for below in filter(Path.is_dir, [*aside.iterdir()]):
        shutil.rmtree(below)
    _write_manifest(aside / "manifest.json", origin, described)
    if folder.exists():
        folder.rmdir()  # empty
    os.rename(aside, folder)
    print(f"{name}: {sum(f['rows'] for f in described.values()):,} rows in {len(described)} files, {folder}")


def _download(name: str, part: Source, aside: Path, arrived: dict[str, tuple[Path, str | None]]) -> str:
    """Bring a part from the hub; add its files and their checksums to `arrived`; repository and commit."""
    revision = part.revision or config.dataset(name).revision
    folder = aside / part.repository.replace("/", "--")
    with _asking(part.repository) as hub:
        info = hub.HfApi().dataset_info(part.repository, revision=revision, files_metadata=True)
        wanted = {f.rfilename: f for f in info.siblings or [] if fnmatch(f.rfilename, part.pattern)}
        if not wanted:
            raise DataError(f"the hub's {part.repository} has no {part.pattern} at {revision}")
        _room(name, sum(f.size or 0 for file, f in wanted.items() if not (folder / file).exists()), aside)
        print(f"{name}: {len(wanted)} files of {part.repository} at {info.sha}", flush=True)
        hub.snapshot_download(
            part.repository, repo_type="dataset", revision=info.sha, allow_patterns=part.pattern, local_dir=folder
        )
    for file, f in wanted.items():
        arrived[part.prefix + Path(file).name] = folder / file, f.lfs and f.lfs.sha256
    return f"{part.repository}@{info.sha}"


@contextmanager
def _asking(what: str, otherwise: str = "give --from FOLDER with a copy of the files") -> Iterator[Any]:
    """The hub's client, for fetching `what`; what it raises becomes what to do, `otherwise` without the hub."""
    hub = need("huggingface_hub", f"fetching {what}")
    constants, errors, utils = (need(f"huggingface_hub.{m}", what) for m in ("constants", "errors", "utils"))
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield hub
    except DataError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise  # the caller's
        status = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(e, errors.GatedRepoError) or (status in (401, 403) and what in GATED.values()):
            says = f"{what} is gated: {access(what)}, and run the same command again"
        elif status is not None:
            says = f"the hub refuses {what} ({status}): {str(e).splitlines()[0]}"
        elif constants.HF_HUB_OFFLINE:
            says = f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or {otherwise}"
        else:
            says = f"the hub cannot be reached for {what} ({type(e).__name__}): go where it can, or {otherwise}"
        raise DataError(says) from e


def _room(name: str, size: int, aside: Path) -> None:
    if size > (free := shutil.disk_usage(aside).free):
        raise DataError(
            f"{name} needs {size / 1e9:.1f} GB, and {str(aside.parent)!r} has {free / 1e9:.1f} GB left; make room, or "
            "give another --out=FOLDER"
        )


def _copy(name: str, source: Path, aside: Path) -> list[Path]:
    """Parquet files that lie below `source`, or an image folder, which is packed into parquet files."""
    if not source.is_dir():
        raise DataError(f"--from {str(source)!r} is no folder")
    heads = tuple(sorted({head for part in SETS[name] for head in part.rows}))
    parquet = [f for f in sorted(source.rglob("*.parquet")) if f.name.startswith(heads)]
    if not parquet and (source / "train").is_dir() and SETS[name][0].columns == ("image", "label"):
        _pack(files.listing(str(source), name), aside)
    elif not parquet:
        raise DataError(f"--from {str(source)!r} has no parquet file named {' or '.join(heads)}*.parquet")
    if len({f.name for f in parquet}) < len(parquet):
        raise DataError(f"--from {str(source)!r} has two parquet files of one name; give the folder of one copy")
    _room(name, sum(f.stat().st_size for f in parquet), aside)
    for f in parquet:
        shutil.copyfile(f, aside / f.name)
    return sorted(aside.glob("*.parquet"))


def _pack(images: files.Files, aside: Path) -> None:
    """Image files as they are (not decoded) into parquet files with the columns image and label."""
    pa, pq = need("pyarrow", "packing images"), need("pyarrow.parquet", "packing images")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for head, part in (("train", images.train), ("validation", images.test)):
        starts = range(0, len(part.labels), SHARD)
        with bar(f"packing {head}", len(part.labels)) as advance:
            for k, start in enumerate(starts):
                labels = part.labels[start : start + SHARD].numpy()
                names = [Path(part.name(start + i)) for i in range(len(labels))]
                raw = pa.array([{"bytes": f.read_bytes(), "path": f.name} for f in names], kind)
                file = aside / f"{head}-{k:05d}-of-{len(starts):05d}.parquet"
                pq.write_table(pa.table({"image": raw, "label": labels}), file, row_group_size=100)
                advance(len(labels))


# ---- what it must be ----


def _describe(file: Path) -> dict[str, Any]:
    """Rows, columns, bytes and SHA-256 of a parquet file; no columns if it is not a whole one."""
    parquet = need("pyarrow.parquet", f"reading {file.name}")
    try:
        with parquet.ParquetFile(file) as opened:
            columns, rows = opened.schema_arrow.names, opened.metadata.num_rows
    except Exception:  # pyarrow has a kind of its own for every damage
        columns, rows = [], 0
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"rows": rows, "columns": columns, "bytes": file.stat().st_size, "sha256": digest}


def _check(name: str, described: dict[str, dict[str, Any]]) -> None:
    """Refuse files, described by their names, that are not those of a data set."""
    for part in SETS[name]:
        for head, rows in part.rows.items():
            group = {file: f for file, f in described.items() if file.startswith(head)}
            for file, f in group.items():
                if not f["columns"]:
                    raise DataError(f"{file} is no whole parquet file; fetch {name} again")
                if lacking := [c for c in part.columns if c not in f["columns"]]:
                    raise DataError(f"{file} has the columns {f['columns']}, and {name} needs {lacking[0]!r}")
            if (have := sum(f["rows"] for f in group.values())) != rows:
                raise DataError(
                    f"{name} has {rows:,} rows in {head}*.parquet, and here are {have:,}: a file is missing, or it is "
                    "another data set (train on it with dataset.path=FOLDER and its sizes)"
                )


def _write_manifest(file: Path, origin: list[str], described: dict[str, dict[str, Any]]) -> None:
    file.write_text(json.dumps({"source": origin, "files": described}, indent=1) + "\n")


def table() -> str:
    """What is there and what is not, a line a data set."""
    states = {}
    for name in SETS:
        folder, manifest = home() / name, home() / name / "manifest.json"
        partly = folder.with_name(f".{name}.partial").exists()
        state = "there, not checked" if folder.exists() else "partly fetched; go on" if partly else "not there"
        states[name] = f"{state}: {how(name)}"
        if manifest.exists():
            said = json.loads(manifest.read_text())["files"].values()
            size = sum(f["bytes"] for f in said) / 1e9
            states[name] = f"there: {sum(f['rows'] for f in said):,} rows, {size:.2f} GB, checked"
    states |= {"stdlib": "embedded", "digits": "embedded", "text": f"your own: {how('text --from FILE')}"}
    lines = [f"{name:<12} {state}" for name, state in states.items()]
    return "\n".join([f"data home: {home()} (SCALERUN_DATA changes it)", *lines])
