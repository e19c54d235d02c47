"""Fetch, check and convert data sets before training, which never downloads.

    python -m scaling_exps.data.prepare                          what is there, and what is not
    python -m scaling_exps.data.prepare NAME [--from FOLDER] [--out FOLDER]

Parquet files go into the data home's folder of that name (or --out), with `manifest.json`: rows and SHA-256 of each.
They are written aside and the folder is renamed at the end, so a data set is there as a whole or not at all.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaling_exps import config, data
from scaling_exps.data import files
from scaling_exps.data.places import GATED, access, home, how
from scaling_exps.data.stream import DataError

SHARD = 10_000  # images of a parquet file that is written from an image folder
GROUP = 100  # images of a row group


@dataclass(frozen=True)
class Source:
    """Where parquet files of the hub lie, and what they must be.

    pattern: of the files in `repository` at `revision`. prefix: put before their names. rows: by the start of the
    final name. columns: that every file must have.
    """

    repository: str
    pattern: str
    rows: dict[str, int]
    columns: tuple[str, ...]
    revision: str = "main"
    prefix: str = ""


SETS: dict[str, tuple[Source, ...]] = {
    "cifar10": (
        Source("uoft-cs/cifar10", "plain_text/*.parquet", {"train": 50_000, "test": 10_000}, ("img", "label")),
    ),
    "imagenet": (
        Source(
            GATED["imagenet"],
            "data/[tv][ra]*.parquet",  # train and validation; the test part has no labels
            {"train": 1_281_167, "validation": 50_000},
            ("image", "label"),
        ),
    ),
    "wikitext103": (
        Source(
            "Salesforce/wikitext",
            "wikitext-103-raw-v1/*.parquet",
            {"train": 1_801_350, "validation": 3_760, "test": 4_358},
            ("text",),
        ),
    ),
    "wikibooks": (
        Source(
            "wikimedia/wikipedia",
            "20231101.en/*.parquet",
            {"wikipedia-": 6_407_814},
            ("text",),
            prefix="wikipedia-",
        ),
        Source(
            "bookcorpus/bookcorpus",
            "plain_text/*train/*.parquet",
            {"bookcorpus-": 74_004_228},
            ("text",),
            revision="refs/convert/parquet",
            prefix="bookcorpus-",
        ),
    ),
}
EMBEDDED = ("stdlib", "text")  # nothing to fetch, only to convert
TOKENIZER = "tokenizer:"
NAMES = (*SETS, *EMBEDDED, f"{TOKENIZER}HUBID")


def main(argv: list[str] | None = None) -> int:
    """0: done. 2: it cannot be done; one message says why and what to do."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling_exps.data.prepare", description="Fetch, check and convert a data set."
    )
    parser.add_argument("name", nargs="?", help=f"{', '.join(NAMES)}; none: a table of what is there")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are here already, not the hub's")
    parser.add_argument("--out", metavar="FOLDER", help="instead of the data home's folder of that name")
    options = parser.parse_args(argv)
    try:
        if options.name is None:
            print(table())
        else:
            prepare(options.name, options.source, options.out)
    except DataError as e:
        print(f"prepare: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted; the same command again goes on", file=sys.stderr)
        return 130
    return 0


def prepare(name: str, source: str | None = None, out: str | None = None) -> None:
    """Bring one data set to where training finds it, checked and converted.

    Args:
        name: one of SETS or EMBEDDED, or tokenizer:HUBID.
        source: a file or folder to take it from; None is the hub.
        out: folder; None is the data home's.

    Raises:
        DataError: unknown name, nothing to take, the hub refuses or cannot be reached, no room, or wrong content.
    """
    if name.startswith(TOKENIZER):
        if source or out:
            raise DataError(f"{name} goes into the hub's own cache: drop --from and --out")
        fetch_tokenizer(name.removeprefix(TOKENIZER))
        return
    if name in EMBEDDED:
        if out or (name == "text") != bool(source):
            need = (
                "needs --from FILE or FOLDER and takes no --out" if name == "text" else "takes neither --from nor --out"
            )
            raise DataError(f"{name} {need}")
        path = source
    elif name in SETS:
        folder = Path(out) if out else home() / name
        try:
            _bring(name, Path(source) if source else None, folder)
        except OSError as e:
            what = "no room left" if e.errno == errno.ENOSPC else f"{e.strerror or e}"
            raise DataError(f"cannot write below {str(folder.parent)!r}: {what}. Give another --out=FOLDER") from e
        path = str(folder) if out else None
    else:
        raise DataError(f"unknown data set {name!r}; allowed: {', '.join(NAMES)}")
    _convert(name, path)
    where = f" dataset.path={path}" if path else ""
    print(f"{name} is ready: scalerun dataset={name}{where} ...")


def _convert(name: str, path: str | None) -> None:
    """What the first training run would do: decode, tokenize, map."""
    (composed,) = config.compose([f"dataset={name}", "recipe=digits-resnet8-adam"])
    group = asdict(composed.dataset)
    tokenizer = group.get("tokenizer", "bytes")
    if tokenizer not in ("bytes", "bpe"):
        fetch_tokenizer(tokenizer)
    print(f"converting {name}", flush=True)
    data.load(group, path)


# ---- the files ----


def _bring(name: str, source: Path | None, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if source is not None:
            raise DataError(f"{str(folder)!r} is there already; move it away, or give another --out=FOLDER")
        if not (folder / "manifest.json").exists():
            _write_manifest(folder, verify(name, folder), str(folder))
        else:
            check_manifest(folder)
        print(f"{name} is there: {folder}")
        return
    aside = folder.with_name(f".{folder.name}.partial")  # kept when a fetch is cut: the next one goes on with it
    aside.mkdir(parents=True, exist_ok=True)
    if source is None:
        try:
            for part in SETS[name]:
                _fetch(name, part, aside)
        finally:
            if not [*aside.glob("*.parquet"), *aside.rglob("*.incomplete")]:  # nothing to go on with
                shutil.rmtree(aside)
    else:
        try:
            _copy(name, source, aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    shutil.rmtree(aside / ".cache", ignore_errors=True)  # the hub client's own notes
    try:
        found = verify(name, aside)
    except DataError:
        if source is not None:  # what came from the hub has its checksum: it is not fetched twice
            shutil.rmtree(aside)
        raise
    _write_manifest(aside, found, str(source or [p.repository for p in SETS[name]]))
    if folder.exists():
        folder.rmdir()  # empty
    os.rename(aside, folder)
    print(f"{name}: {sum(f['rows'] for f in found.values()):,} rows in {len(found)} files, {folder}")


def _fetch(name: str, part: Source, aside: Path) -> None:
    """The part's files from the hub into `aside`, under their final names, each as its checksum there says."""
    from fnmatch import fnmatch

    import huggingface_hub as hub

    with _told(part.repository):
        info = hub.HfApi().dataset_info(part.repository, revision=part.revision, files_metadata=True)
        wanted = [f for f in info.siblings or [] if fnmatch(f.rfilename, part.pattern)]
        if not wanted:
            raise DataError(f"the hub's {part.repository} has no {part.pattern} at {part.revision} any more")
        missing = [f for f in wanted if not (aside / _final(part, f.rfilename)).exists()]
        need, free = sum(f.size or 0 for f in missing), shutil.disk_usage(aside).free
        if need > free:
            raise DataError(
                f"{part.repository} needs {need / 1e9:.1f} GB, and {str(aside.parent)!r} has {free / 1e9:.1f} GB left; "
                "make room, or give another --out=FOLDER"
            )
        for k, f in enumerate(missing, 1):
            print(f"{name}: file {k} of {len(missing)}, {f.rfilename}", flush=True)
            got = hub.hf_hub_download(
                part.repository, f.rfilename, repo_type="dataset", revision=part.revision, local_dir=aside
            )
            if f.lfs is not None and _sha256(Path(got)) != f.lfs.sha256:
                os.unlink(got)
                raise DataError(f"{f.rfilename} of {part.repository} arrived damaged; run the same command again")
            os.replace(got, aside / _final(part, f.rfilename))
    for rest in {Path(f.rfilename).parts[0] for f in wanted if "/" in f.rfilename}:
        shutil.rmtree(aside / rest, ignore_errors=True)  # folders that are empty now


def _final(part: Source, name: str) -> str:
    return part.prefix + name.rsplit("/", 1)[-1]


class _told:  # noqa: N801 (a context, used as a word)
    """Turns what the hub's client raises into what to do.

    Args:
        what: is fetched.
        otherwise: what can be done without the hub.
    """

    def __init__(self, what: str, otherwise: str = "give --from FOLDER with a copy of the files") -> None:
        self.what, self.otherwise = what, otherwise

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, e: BaseException | None, trace: Any) -> None:
        from huggingface_hub import constants, errors

        if e is None or isinstance(e, DataError) or not isinstance(e, Exception):
            return
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            return  # the caller's
        status = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(e, errors.GatedRepoError) or (status in (401, 403) and self.what in GATED.values()):
            raise DataError(f"{self.what} is gated: {access(self.what)}, and run the same command again") from e
        if status is not None:
            raise DataError(f"the hub refuses {self.what} ({status}): {str(e).splitlines()[0]}") from e
        if constants.HF_HUB_OFFLINE:
            raise DataError(
                f"{self.what}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or {self.otherwise}"
            ) from e
        raise DataError(
            f"the hub cannot be reached for {self.what} ({type(e).__name__}). Run the same command where there is a "
            f"network, or {self.otherwise}"
        ) from e


def fetch_tokenizer(hub_id: str) -> None:
    """A tokenizer into the hub's cache, where training finds it.

    Raises:
        DataError: the hub refuses or cannot be reached.
    """
    import huggingface_hub as hub
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(hub_id, local_files_only=True)
    except Exception:  # not there, or damaged
        with _told(f"tokenizer {hub_id}", "use dataset.tokenizer=bytes or bpe"):
            hub.HfApi().model_info(hub_id)  # answers at once where transformers tries for a minute
            AutoTokenizer.from_pretrained(hub_id)
    print(f"tokenizer {hub_id} is there")


def _copy(name: str, source: Path, aside: Path) -> None:
    """Parquet files that lie below `source`, or an image folder, which is packed into parquet files."""
    if not source.is_dir():
        raise DataError(f"--from {str(source)!r} is no folder")
    heads = {head for part in SETS[name] for head in part.rows}
    found = [f for f in sorted(source.rglob("*.parquet")) if f.name.startswith(tuple(heads))]
    if not found and (source / "train").is_dir() and SETS[name][0].columns == ("image", "label"):
        _pack(files.listing(str(source), name), aside)
        return
    if not found:
        raise DataError(f"--from {str(source)!r} has no parquet file named {' or '.join(sorted(heads))}*.parquet")
    if len({f.name for f in found}) < len(found):
        raise DataError(f"--from {str(source)!r} has two parquet files of one name; give the folder of one copy")
    need, free = sum(f.stat().st_size for f in found), shutil.disk_usage(aside).free
    if need > free:
        raise DataError(f"{name} needs {need / 1e9:.1f} GB, and {str(aside.parent)!r} has {free / 1e9:.1f} GB left")
    for f in found:
        shutil.copyfile(f, aside / f.name)


def _pack(found: files.Files, aside: Path) -> None:
    """Image files as they are (not decoded) into parquet files with the columns image and label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for head, part in (("train", found.train), ("validation", found.test)):
        n = len(part.labels)
        shards = -(-n // SHARD)
        for k in range(shards):
            file = aside / f"{head}-{k:05d}-of-{shards:05d}.parquet"
            with pq.ParquetWriter(file, pa.schema([("image", kind), ("label", pa.int64())])) as writer:
                for start in range(k * SHARD, min((k + 1) * SHARD, n), GROUP):
                    rows = range(start, min(start + GROUP, (k + 1) * SHARD, n))
                    images = [{"bytes": Path(p).read_bytes(), "path": Path(p).name} for p in map(part.name, rows)]
                    labels = part.labels[start : start + len(rows)].numpy()
                    writer.write_table(pa.table({"image": pa.array(images, kind), "label": labels}))


# ---- what it must be ----


def verify(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Rows, bytes and SHA-256 of every parquet file in `folder`, which must be those of the data set.

    Raises:
        DataError: a file cannot be read or lacks a column, or a part has another number of rows.
    """
    import pyarrow.parquet as pq

    found: dict[str, dict[str, Any]] = {}
    for part in SETS[name]:
        for head, rows in part.rows.items():
            have = 0
            for f in sorted(folder.glob(f"{head}*.parquet")):
                try:
                    with pq.ParquetFile(f) as opened:
                        columns, count = opened.schema_arrow.names, opened.metadata.num_rows
                except Exception as e:  # pyarrow has a kind of its own for every damage
                    raise DataError(
                        f"{f.name} is no whole parquet file ({type(e).__name__}); fetch {name} again"
                    ) from e
                if lacking := [c for c in part.columns if c not in columns]:
                    raise DataError(f"{f.name} has the columns {columns}, and {name} needs {lacking[0]!r}")
                have += count
                found[f.name] = {"rows": count, "bytes": f.stat().st_size, "sha256": _sha256(f)}
            if have != rows:
                raise DataError(
                    f"{name} has {rows:,} rows in {head}*.parquet, and here are {have:,}: a file is missing, or it is "
                    "another data set (train on it with dataset.path=FOLDER and its sizes)"
                )
    return found


def check_manifest(folder: Path) -> None:
    """The files of a folder against its manifest.

    Raises:
        DataError: a file is missing or was altered.
    """
    for name, said in json.loads((folder / "manifest.json").read_text())["files"].items():
        f = folder / name
        if not f.exists() or f.stat().st_size != said["bytes"] or _sha256(f) != said["sha256"]:
            raise DataError(
                f"{str(f)!r} is missing or was altered since it was fetched; remove {str(folder)!r} and fetch anew"
            )


def _write_manifest(folder: Path, found: dict[str, dict[str, Any]], source: str) -> None:
    (folder / "manifest.json").write_text(json.dumps({"source": source, "files": found}, indent=1) + "\n")


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def table() -> str:
    """What is there and what is not, a line a data set."""
    lines = [f"data home: {home()} (SCALERUN_DATA changes it)"]
    for name in SETS:
        folder = home() / name
        manifest = folder / "manifest.json"
        if manifest.exists():
            said = json.loads(manifest.read_text())["files"].values()
            state = (
                f"there: {sum(f['rows'] for f in said):,} rows, {sum(f['bytes'] for f in said) / 1e9:.2f} GB, checked"
            )
        elif folder.exists():
            state = f"there, not checked: {how(name)}"
        elif folder.with_name(f".{name}.partial").exists():
            state = f"partly fetched; go on: {how(name)}"
        else:
            state = f"not there: {how(name)}"
        lines.append(f"{name:<12} {state}")
    lines.append(f"{'stdlib':<12} embedded")
    lines.append(f"{'digits':<12} embedded")
    lines.append(f"{'text':<12} your own: {how('text --from FILE')}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
