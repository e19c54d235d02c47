"""Which example, and which augmentation, at (seed, sample index). See `stream` for what all data sets share."""

from __future__ import annotations

from typing import Any

import torch

from scaling_exps.data import corpora, files, images
from scaling_exps.data.files import FileStream
from scaling_exps.data.images import Images, ImageStream
from scaling_exps.data.stream import DataError, Stream, key, random_bits
from scaling_exps.data.tokens import TokenStream

__all__ = [
    "DataError", "FileStream", "ImageStream", "Images", "Stream", "TokenStream", "key", "load", "random_bits", "stream",
]  # fmt: skip


def _corpus(dataset: dict[str, Any], path: str | None) -> corpora.Tokens:
    found = corpora.load(dataset["name"], path, dataset["tokenizer"], dataset["vocab"])
    corpora.check(dataset, found)
    return found


KINDS: dict[str, tuple[Any, Any]] = {  # dataset.kind -> what loads it, its stream
    "images": (images.load, ImageStream),
    "files": (files.load, FileStream),
    "tokens": (_corpus, TokenStream),
}


def load(dataset: dict[str, Any], path: str | None) -> Any:
    """The data of the `dataset` group of the config, converted if need be and checked against it.

    Args:
        dataset: the group as a dict; `kind` says what it is.
        path: of the raw data, or None for the embedded or the data home's.

    Raises:
        DataError: nothing there, unreadable, or of other sizes than the config says.
    """
    return KINDS[dataset["kind"]][0](dataset, path)


def stream(
    dataset: dict[str, Any], path: str | None, seed: int, device: torch.device, purpose: str = "train"
) -> Stream:
    """The training stream of one seed, and its test set; arguments as in `load` and `Stream`."""
    return KINDS[dataset["kind"]][1](load(dataset, path), dataset, seed, device, purpose)
