"""Texts -> token files: the documents of each corpus, tokenizers, and the memory-mapped files that training reads.

A corpus is converted once, into a folder of the cache: `train.bin`, `test.bin` (of the smallest unsigned integers
that hold the vocabulary), `meta.json`, and `tokenizer.json` where one was trained. Its name is a hash of the raw files
and the tokenizer, so another version of either is another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from scaling_exps.data.places import cache, how, raw_folder
from scaling_exps.data.stream import DataError

TEST_SHARE = 20  # one document in so many is test, where a corpus comes without a test part
END = "<|endoftext|>"  # of a trained tokenizer
DOCUMENTS = 1000  # that a tokenizer is given at once

Document = tuple[str, bytes]  # ("train" or "test", UTF-8)


@dataclass(frozen=True)
class Tokens:
    """A converted corpus: memory-mapped, one-dimensional.

    bytes_per_token: of the test part's text. fingerprint: of the tokens themselves.
    """

    train: np.ndarray
    test: np.ndarray
    vocab: int
    bytes_per_token: float
    fingerprint: str


def load(name: str, path: str | None, tokenizer: str, vocab: int) -> Tokens:
    """The corpus as tokens, converted now if it was not before.

    Args:
        name: stdlib, text, wikitext103 or wikibooks.
        path: file or folder of the raw text; None is the data home's (stdlib is embedded).
        tokenizer: bytes, bpe (trained on the train part), or a tokenizer of the hub or of a folder.
        vocab: number of token ids; what a trained tokenizer gets, what any other must fit.

    Raises:
        DataError: nothing there, unreadable, or a tokenizer that needs a larger vocabulary.
    """
    if name not in CORPORA:
        raise DataError(f"unknown dataset {name!r}; allowed: {', '.join(CORPORA)}")
    if tokenizer == "bytes" and vocab != 256:
        raise DataError(f"dataset.vocab={vocab}: the tokenizer `bytes` has 256 ids; use dataset.vocab=256")
    return _load(name, path, tokenizer, vocab)


@lru_cache(2)  # a sweep in one process maps it once
def _load(name: str, path: str | None, tokenizer: str, vocab: int) -> Tokens:
    files = CORPORA[name](path)
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    spec = json.dumps([1, name, tokenizer, vocab, stats])
    folder = cache() / f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"
    if not (folder / "meta.json").exists():
        _convert(files, tokenizer, vocab, folder)
    meta = json.loads((folder / "meta.json").read_text())
    train, test = (np.memmap(folder / f"{part}.bin", meta["dtype"], "r") for part in ("train", "test"))
    return Tokens(train, test, vocab, meta["bytes"]["test"] / meta["tokens"]["test"], meta["sha256"])


def _convert(files: list[Path], tokenizer: str, vocab: int, folder: Path) -> None:
    """Write the token files aside and rename the folder, so a reader sees all or nothing."""
    from tqdm import tqdm

    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        encode = _tokenizer(tokenizer, vocab, files, aside)
        dtype = "uint8" if vocab <= 2**8 else "uint16" if vocab <= 2**16 else "uint32"
        sizes, lengths, digest = {"train": 0, "test": 0}, {"train": 0, "test": 0}, hashlib.sha256()
        with open(aside / "train.bin", "wb") as train, open(aside / "test.bin", "wb") as test:
            out = {"train": train, "test": test}
            bar = tqdm(desc=f"tokenizing {folder.name}", unit="B", unit_scale=True, disable=None)
            for batch in _batches(_documents(files)):
                for (part, text), ids in zip(batch, encode([t for _, t in batch]), strict=True):
                    if len(ids) and int(ids.max()) >= vocab:
                        raise DataError(
                            f"dataset.vocab={vocab}, and tokenizer {tokenizer!r} gave id {int(ids.max())}: give "
                            "dataset.vocab the size of the tokenizer's vocabulary"
                        )
                    raw = ids.astype(dtype).tobytes()
                    out[part].write(raw)
                    digest.update(raw)
                    sizes[part] += len(text)
                    lengths[part] += len(ids)
                    bar.update(len(text))
            bar.close()
        if not lengths["train"] or not lengths["test"]:
            raise DataError(f"{files[0].parent} has {lengths} tokens: a train and a test part are needed")
        meta = {"dtype": dtype, "vocab": vocab, "bytes": sizes, "tokens": lengths, "sha256": digest.hexdigest()[:16]}
        (aside / "meta.json").write_text(json.dumps(meta))
        try:
            os.rename(aside, folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else somebody was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- tokenizers ----


def _tokenizer(name: str, vocab: int, files: list[Path], folder: Path) -> Callable[[list[bytes]], Iterable[np.ndarray]]:
    """Documents -> their ids, each ended by the tokenizer's end of text (byte 0 for bytes)."""
    if name == "bytes":
        return lambda texts: (np.frombuffer(t + b"\0", np.uint8) for t in texts)
    if name == "bpe":
        from tokenizers import ByteLevelBPETokenizer

        made = ByteLevelBPETokenizer()
        train = (t.decode(errors="replace") for part, t in _documents(files) if part == "train")
        if vocab < 300:
            raise DataError(f"dataset.vocab={vocab} is too small for bpe: 256 bytes, the end of text, and merges")
        made.train_from_iterator(train, vocab_size=vocab, special_tokens=[END], show_progress=False)
        made.save(str(folder / "tokenizer.json"))
        end = made.token_to_id(END)
        return lambda texts: (
            np.array([*e.ids, end]) for e in made.encode_batch([t.decode(errors="replace") for t in texts])
        )
    from transformers import AutoTokenizer

    try:
        hub = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception as e:  # OSError for one that is not there, other kinds for a damaged one
        raise DataError(
            f"tokenizer {name!r} is not on this machine, and training never downloads. Fetch it once: "
            f"{how(f'tokenizer:{name}')}; or choose dataset.tokenizer=bytes or bpe"
        ) from e
    if len(hub) > vocab:
        raise DataError(f"dataset.vocab={vocab}: tokenizer {name!r} has {len(hub)} ids; use dataset.vocab={len(hub)}")
    last = [hub.eos_token_id] if hub.eos_token_id is not None else []
    return lambda texts: (
        np.array([*ids, *last], dtype=np.int64)
        for ids in hub([t.decode(errors="replace") for t in texts], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    )


# ---- documents ----


def _part(file: Path, index: int, several: bool) -> str:
    """train or test: by the file's name where the files say so, else one document in TEST_SHARE by a hash."""
    if not several:
        return "test" if file.name.startswith(("valid", "test")) else "train"
    digest = hashlib.sha256(f"{file.name}/{index}".encode()).digest()
    return "test" if digest[0] * TEST_SHARE < 256 else "train"


def _documents(files: list[Path]) -> Iterator[Document]:
    """Every document of the files, in their order: a row of a parquet file, or a whole text file.

    `test` is the validation files' (or, without one, the test files'); without either it is a share of the documents,
    and of a single text file its end.
    """
    held_out = [f for f in files if f.name.startswith("valid")] or [f for f in files if f.name.startswith("test")]
    named = bool(held_out) and files[0].suffix != ".py"
    for file in files:
        if named and file not in held_out and not file.name.startswith("train"):
            continue
        if file.suffix == ".parquet":
            for i, text in enumerate(_rows(file)):
                yield _part(file, i, not named), text
            continue
        text = file.read_bytes()
        if len(files) == 1:
            cut = len(text) - len(text) // TEST_SHARE
            yield "train", text[:cut]
            yield "test", text[cut:]
        else:
            yield _part(file, 0, not named), text


def _rows(file: Path) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        for group in table.iter_batches(DOCUMENTS, columns=["text"]):
            for text in group.column("text").to_pylist():
                if text:
                    yield text.encode()
    except Exception as e:  # pyarrow has a kind of its own for every damage
        raise DataError(f"cannot read column `text` of {str(file)!r}: {type(e).__name__}: {e}") from e


def _stdlib(path: str | None) -> list[Path]:
    """The standard library's own sources, without its tests and what was installed beside it."""
    if path is not None:
        raise DataError(f"dataset.path={path!r}: stdlib is embedded and takes no path; drop it")
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def _local(name: str) -> Callable[[str | None], list[Path]]:
    def files(path: str | None) -> list[Path]:
        if name == "text" and path is None:
            raise DataError("dataset=text needs dataset.path=FILE or FOLDER (of .txt or .parquet files)")
        where = raw_folder(name, path)
        found = [where] if where.is_file() else sorted([*where.rglob("*.parquet"), *where.rglob("*.txt")])
        if not found:
            raise DataError(f"no .parquet and no .txt file under {str(where)!r}")
        return [f.resolve() for f in found] if where.is_file() else found

    return files


CORPORA: dict[str, Callable[[str | None], list[Path]]] = {
    "stdlib": _stdlib,
    "text": _local("text"),
    "wikitext103": _local("wikitext103"),
    "wikibooks": _local("wikibooks"),
}


def check(dataset: dict[str, Any], tokens: Tokens) -> None:
    """Refuse sizes that the corpus does not have.

    Raises:
        DataError: with what there is.
    """
    context = dataset["context"]
    for part, have in (("train", (len(tokens.train) - context - 1) // context), ("test", len(tokens.test) // context)):
        want = dataset[f"{part}_size"]
        if have < 1 or (want is not None and want > have):
            raise DataError(
                f"dataset.{part}_size={want}: {dataset['name']} has {len(getattr(tokens, part)):,} {part} tokens, "
                f"which make {max(have, 0):,} sequences of dataset.context={context}"
            )
