"""Texts -> token files: the documents of each corpus, tokenizers, and the memory-mapped files that training reads.

A corpus is converted once, into a folder of the cache: `train.bin`, `test.bin` (of the smallest unsigned integers
that hold the vocabulary), `meta.json`, and `tokenizer.json` where one was trained. Its name is a hash of the content
of the raw files and of the tokenizer, so another version of either is another folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from scaling_exps.config import TokenDataset
from scaling_exps.data.store import bar, keep
from scaling_exps.sources import DataError, cache, content, need, no_tokenizer, text_files, tokenizer_content

TEST_SHARE = 20  # one document in so many is test, where a corpus comes without a test part
PART = re.compile(r"(train|valid(?:ation)?|val|test)(?![a-z])")  # how a file's name says its part: no testament.txt
END = "<|endoftext|>"  # of a trained tokenizer
DOCUMENTS = 1000  # that a tokenizer is given at once

Document = tuple[str, bytes]  # ("train" or "test", UTF-8)
Encode = Callable[[list[bytes]], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Tokens:
    """A converted corpus: memory-mapped, one-dimensional. bytes_per_token: of the test part's text."""

    train: np.ndarray
    test: np.ndarray
    vocab: int
    bytes_per_token: float
    fingerprint: str


def load(dataset: TokenDataset, path: str | None) -> Tokens:
    """The corpus as tokens, see `data.load`. A trained tokenizer gets `dataset.vocab` ids, any other must fit it."""
    if dataset.tokenizer == "bytes" and dataset.vocab != 256:
        raise DataError(f"dataset.vocab={dataset.vocab}: the tokenizer `bytes` has 256 ids; use dataset.vocab=256")
    files = text_files(dataset.name, path)
    held = tokenizer_content(dataset.tokenizer, dataset.tokenizer_revision)
    identity = json.dumps([2, content(files), dataset.tokenizer, held, dataset.vocab])
    folder = cache() / f"{dataset.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    keep(folder, lambda aside: _convert(files, dataset.tokenizer, held, dataset.vocab, aside))
    tokens = _mapped(folder)
    for part, ids, want in (("train", tokens.train, dataset.train_size), ("test", tokens.test, dataset.test_size)):
        have = (len(ids) - (dataset.context + 1 if part == "train" else 0)) // dataset.context
        if have < 1 or (want is not None and want > have):
            raise DataError(
                f"dataset.{part}_size={want}: {dataset.name} has {len(ids):,} {part} tokens, which make "
                f"{max(have, 0):,} sequences of dataset.context={dataset.context}"
            )
    return tokens


@lru_cache(2)  # a sweep in one process maps it once
def _mapped(folder: Path) -> Tokens:
    meta = json.loads((folder / "meta.json").read_text())
    train, test = (np.memmap(folder / f"{part}.bin", meta["dtype"], "r") for part in ("train", "test"))
    return Tokens(train, test, meta["vocab"], meta["bytes"]["test"] / meta["tokens"]["test"], meta["sha256"])


def _convert(files: list[Path], tokenizer: str, revision: str, vocab: int, into: Path) -> None:
    encode = _tokenizer(tokenizer, revision, vocab, files, into)
    dtype = "uint8" if vocab <= 2**8 else "uint16" if vocab <= 2**16 else "uint32"
    sizes, lengths, digest = {"train": 0, "test": 0}, {"train": 0, "test": 0}, hashlib.sha256()
    documents = _documents(files)
    with (
        open(into / "train.bin", "wb") as train,
        open(into / "test.bin", "wb") as test,
        bar(f"tokenizing {files[0].parent.name}", in_bytes=True) as advance,
    ):
        while batch := list(islice(documents, DOCUMENTS)):
            for (part, text), ids in zip(batch, encode([t for _, t in batch]), strict=True):
                if len(ids) and int(ids.max()) >= vocab:
                    raise DataError(
                        f"dataset.vocab={vocab}, and tokenizer {tokenizer!r} gave id {int(ids.max())}: give "
                        "dataset.vocab the size of the tokenizer's vocabulary"
                    )
                raw = ids.astype(dtype).tobytes()
                (train if part == "train" else test).write(raw)
                digest.update(raw)
                sizes[part] += len(text)
                lengths[part] += len(ids)
                advance(len(text))
    if not lengths["train"] or not lengths["test"]:
        raise DataError(
            f"{str(files[0].parent)!r} has {lengths['train']} train and {lengths['test']} test tokens, and needs both: "
            "name files train* and test* (or validation*), or none of them so"
        )
    meta = {"dtype": dtype, "vocab": vocab, "bytes": sizes, "tokens": lengths, "sha256": digest.hexdigest()[:16]}
    (into / "meta.json").write_text(json.dumps(meta))


# ---- tokenizers ----


def _tokenizer(name: str, revision: str, vocab: int, files: list[Path], folder: Path) -> Encode:
    """Documents -> their ids, each ended by the tokenizer's end of text (byte 0 for bytes)."""
    if name == "bytes":
        return lambda texts: (np.frombuffer(t + b"\0", np.uint8) for t in texts)
    if name == "bpe":
        bpe = need("tokenizers", "dataset.tokenizer=bpe").ByteLevelBPETokenizer()
        train = (t.decode(errors="replace") for part, t in _documents(files) if part == "train")
        if vocab < 300:
            raise DataError(f"dataset.vocab={vocab} is too small for bpe: 256 bytes, the end of text, and merges")
        bpe.train_from_iterator(train, vocab_size=vocab, special_tokens=[END], show_progress=False)
        bpe.save(str(folder / "tokenizer.json"))
        end = bpe.token_to_id(END)
        return lambda texts: (
            np.array([*e.ids, end]) for e in bpe.encode_batch([t.decode(errors="replace") for t in texts])
        )
    transformers = need("transformers", f"tokenizer {name!r}")
    commit = None if Path(name).is_dir() else revision
    try:
        hub = transformers.AutoTokenizer.from_pretrained(name, revision=commit, local_files_only=True)
    except Exception as e:  # OSError for one that is not there, other kinds for a damaged one
        raise DataError(no_tokenizer(name, commit)) from e
    if len(hub) > vocab:
        raise DataError(f"dataset.vocab={vocab}: tokenizer {name!r} has {len(hub)} ids; use dataset.vocab={len(hub)}")
    last = [hub.eos_token_id] if hub.eos_token_id is not None else []

    def encode(texts: list[bytes]) -> Iterator[np.ndarray]:
        given = [t.decode(errors="replace") for t in texts]
        for ids in hub(given, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.array([*ids, *last], dtype=np.int64)

    return encode


# ---- documents ----


def _parts(files: list[Path]) -> dict[Path, str] | None:
    """Which files are train and which are test, by their names; None: the names do not say.

    Test is the validation files or, without one, the test files; train is the train files or, without one, those
    that name no part.
    """
    by_name: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "": []}
    for f in files:
        match = PART.match(f.name)
        by_name[("val" if match[1].startswith("val") else match[1]) if match else ""].append(f)
    held_out = by_name["val"] or by_name["test"]
    if not held_out:
        return None
    return {f: "train" for f in by_name["train"] or by_name[""]} | {f: "test" for f in held_out}


def _drawn(file: Path, index: int) -> str:
    """One document in TEST_SHARE is test, by a hash of its place."""
    digest = hashlib.sha256(f"{file.name}/{index}".encode()).digest()
    return "test" if digest[0] * TEST_SHARE < 256 else "train"


def _documents(files: list[Path]) -> Iterator[Document]:
    """Every document of the files, in their order: a row of a parquet file, or a whole text file.

    Test is what the files' names say (`_parts`), else a share of the documents, and of a single text file its end.
    """
    if len(files) == 1 and files[0].suffix != ".parquet":
        text = files[0].read_bytes()
        cut = len(text) - len(text) // TEST_SHARE
        yield "train", text[:cut]
        yield "test", text[cut:]
        return
    parts = None if files[0].suffix == ".py" else _parts(files)  # the name of a source file says nothing
    for file in files:
        if parts is None or file in parts:
            for i, text in enumerate(_rows(file) if file.suffix == ".parquet" else [file.read_bytes()]):
                yield parts[file] if parts else _drawn(file, i), text


def _rows(file: Path) -> Iterator[bytes]:
    parquet = need("pyarrow.parquet", f"reading {file.name}")
    try:
        for group in parquet.ParquetFile(file).iter_batches(DOCUMENTS, columns=["text"]):
            for text in group.column("text").to_pylist():
                if text:
                    yield text.encode()
    except Exception as e:  # pyarrow has a kind of its own for every damage
        raise DataError(f"cannot read column `text` of {str(file)!r}: {type(e).__name__}: {e}") from e
