"""Which example, and which augmentation, at (seed, sample index). See `stream` for what all data sets share."""

from __future__ import annotations

from typing import Any

import torch

from scaling_exps import plan
from scaling_exps.config import Dataset, FileDataset, ImageDataset, TokenDataset
from scaling_exps.data import corpora, files, images
from scaling_exps.data.files import FileStream
from scaling_exps.data.images import Images, ImageStream
from scaling_exps.data.stream import Stream, key, random_bits
from scaling_exps.data.tokens import TokenStream
from scaling_exps.sources import DataError

__all__ = [
    "DataError", "FileStream", "ImageStream", "Images", "Stream", "TokenStream", "check_content", "key", "load",
    "random_bits", "stream",
]  # fmt: skip

KINDS: dict[type[Dataset], tuple[Any, Any]] = {  # what loads it, its stream
    ImageDataset: (images.load, ImageStream),
    FileDataset: (files.load, FileStream),
    TokenDataset: (corpora.load, TokenStream),
}


def load(dataset: Dataset, path: str | None) -> Any:
    """The data of the `dataset` group of the config, converted if need be and checked against it.

    `path` is that of the raw data; None is the embedded one's or the data home's.

    Raises:
        DataError: nothing there, unreadable, or of other sizes than the config says.
    """
    return KINDS[type(dataset)][0](dataset, path)


def stream(dataset: Dataset, path: str | None, seed: int, device: torch.device) -> Stream:
    """The training stream of one seed, and its test set; arguments as in `load` and `Stream`."""
    return KINDS[type(dataset)][1](load(dataset, path), dataset, seed, device)


def check_content(dataset: Dataset, content: str, path: str | None) -> None:
    """Refuse data whose fingerprint is not `content`, the one that a run was planned with; see `sources.fingerprint`.

    Raises:
        DataError: the data holds something else, or cannot be read.
    """
    present = plan.content(dataset, path)
    if present != content:
        raise DataError(
            f"the data of {dataset.name} is not what the run was planned with ({present!r} here, {content!r} in "
            "run.json): bring that data back (for stdlib: the same Python), or plan the run anew"
        )
