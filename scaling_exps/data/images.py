"""Images that fit in memory: they stay on the device as uint8 and are augmented there, in batch."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaling_exps.data.places import cache, raw_folder
from scaling_exps.data.stream import DataError, Stream, random_bits, uniform


@dataclass(frozen=True)
class Images:
    """Decoded images: uint8 of shape (N, H, W, C), and int64 labels of shape (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Normalise:
    """uint8 (n, H, W, C) -> float32 (n, C, H, W), channels_last in memory: (x / 255 - mean) / std of each channel."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        m, s = torch.tensor(mean), torch.tensor(std)
        self.factor, self.offset = (1 / (255 * s)).to(device), (-m / s).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.offset, pixels.float(), self.factor).permute(0, 3, 1, 2)


class ImageStream(Stream):
    """A stream over resident images: padded crop, flip, and label noise by the sample's index.

    Args:
        images: decoded images.
        dataset: the `dataset` group of the config, as a dict.
        seed, device, purpose: see Stream.
    """

    def __init__(
        self, images: Images, dataset: dict[str, Any], seed: int, device: torch.device, purpose: str = "train"
    ) -> None:
        super().__init__(len(images.train), len(images.test), seed, device, purpose)
        self.shift, self.flip, self.noise = dataset["shift"], dataset["flip"], dataset["label_noise"]
        self.classes = dataset["classes"]
        self.height, self.width, self.channels = dataset["shape"]
        s = self.shift
        self.train = torch.nn.functional.pad(images.train, (0, 0, s, s, s, s)).to(device).view(-1, self.channels)
        self.labels, self.test_labels = images.train_labels.to(device), images.test_labels.to(device)
        self.test = images.test.to(device)
        self._normalise = Normalise(dataset["mean"], dataset["std"], device)
        padded = self.width + 2 * s
        self.rows = torch.arange(self.height, device=device).view(1, -1, 1) * padded
        self.columns = torch.arange(self.width, device=device).view(1, 1, -1)

    def _make_epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """For every sample of one epoch: image, label, flat position of its crop's corner, flipped; (N,) each."""
        i = torch.arange(epoch * self.size, (epoch + 1) * self.size, device=self.device)
        image = self._order(i)
        label = self.labels[image]
        if self.noise:
            drawn = uniform(self.draw("noisy", i)) < self.noise
            label = torch.where(drawn, self.draw("label", i) % self.classes, label)
        span, padded_width = 2 * self.shift + 1, self.width + 2 * self.shift
        padded_height = self.height + 2 * self.shift
        corner = (image * padded_height + self.draw("row", i) % span) * padded_width + self.draw("column", i) % span
        flipped = (self.draw("flip", i) >> 9) % 2 == 1 if self.flip else torch.zeros_like(image, dtype=torch.bool)
        return image, label, corner, flipped

    def pixels(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Augmented pixels, uint8 (n, H, W, C), and labels, int64 (n,), of samples start..stop-1."""
        _, label, corner, flipped = self._slice(start, stop)
        columns = self.columns
        if self.flip:
            columns = torch.where(flipped.view(-1, 1, 1), self.width - 1 - columns, columns)
        where = corner.view(-1, 1, 1) + self.rows + columns  # (n, H, W)
        flat = self.train.index_select(0, where.flatten())
        return flat.view(-1, self.height, self.width, self.channels), label

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (n, C, H, W), channels_last in memory, and labels, of samples start..stop-1."""
        pixels, labels = self.pixels(start, stop)
        return self._normalise(pixels), labels

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Test images start..stop-1, normalised, and their labels; shorter at the end."""
        return self._normalise(self.test[start:stop]), self.test_labels[start:stop]


def load(dataset: dict[str, Any], path: str | None) -> Images:
    """The decoded images of the `dataset` group of the config; decoded once, then read from a cache.

    Args:
        dataset: the group as a dict (`name`, `train_size`, `test_size`, `shape`, `classes` are used).
        path: folder of the raw data, or None for the embedded one or the data home's.

    Raises:
        DataError: nothing there, unreadable, or of other sizes than the config says.
    """
    if dataset["name"] not in LOADERS:
        raise DataError(f"unknown dataset {dataset['name']!r}; allowed: {', '.join(LOADERS)}")
    images = _load(dataset["name"], path)
    shape = tuple(dataset["shape"])
    if tuple(images.train.shape[1:]) != shape:
        raise DataError(f"dataset.shape={list(shape)}, but the images are {list(images.train.shape[1:])}")
    for part, have in (("train", len(images.train)), ("test", len(images.test))):
        if dataset[f"{part}_size"] > have:
            raise DataError(f"dataset.{part}_size={dataset[f'{part}_size']}: there are only {have} images")
    if int(images.train_labels.max()) >= dataset["classes"]:
        raise DataError(f"dataset.classes={dataset['classes']}: a label is {int(images.train_labels.max())}")
    n, m = dataset["train_size"], dataset["test_size"]
    return Images(images.train[:n], images.train_labels[:n], images.test[:m], images.test_labels[:m])


@lru_cache(2)  # a sweep in one process decodes once
def _load(name: str, path: str | None) -> Images:
    return LOADERS[name](path)


def _digits(path: str | None) -> Images:
    if path is not None:
        raise DataError(f"dataset.path={path!r}: digits is embedded and takes no path; drop it")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.argsort(random_bits(0, "digits/split", torch.arange(len(labels))), stable=True)
    pixels, labels = pixels[order], labels[order]
    return Images(pixels[:1437], labels[:1437], pixels[1437:], labels[1437:])


def _cifar10(path: str | None) -> Images:
    folder = raw_folder("cifar10", path)
    files: dict[str, list[str]] = {}
    for part in ("train", "test"):
        files[part] = sorted(str(p.resolve()) for p in folder.glob(f"{part}*.parquet"))
        if not files[part]:
            raise DataError(
                f"no {part}*.parquet in {str(folder)!r}: dataset.path must be a folder of CIFAR-10 parquet files as "
                "the hub's uoft-cs/cifar10 has them"
            )
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for part in files.values() for f in part]
    fingerprint = hashlib.sha256(repr(stats).encode()).hexdigest()[:12]
    return _cached(cache() / f"cifar10-{fingerprint}.safetensors", lambda: _decode_cifar10(files))


def _decode_cifar10(files: dict[str, list[str]]) -> dict[str, Tensor]:
    import datasets
    import numpy as np
    from tqdm import tqdm

    try:
        parts = datasets.load_dataset("parquet", data_files=files)
        out = {}
        for part in ("train", "test"):
            rows = parts[part]
            column = next(c for c in ("img", "image") if c in rows.column_names)
            rows = rows.cast_column(column, datasets.Image())
            decoded = [np.asarray(r[column].convert("RGB")) for r in tqdm(rows, desc=f"decoding {part}", disable=None)]
            out[part] = torch.from_numpy(np.stack(decoded))
            out[f"{part}_labels"] = torch.tensor(rows["label"][:], dtype=torch.int64)
        return out
    except Exception as e:  # datasets raises its own kinds for a corrupt file, a missing column
        raise DataError(
            f"cannot read CIFAR-10 from the files {[f for p in files.values() for f in p]}: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else e!r}. Fetch them again, or give another dataset.path=FOLDER"
        ) from e


def _cached(file: Path, make: Callable[[], dict[str, Tensor]]) -> Images:
    """Tensors from `file`, or made and put there (written aside and renamed, so a reader sees all or nothing)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        return Images(**load_file(file))
    except (FileNotFoundError, SafetensorError, TypeError):
        pass
    made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    save_file(made, aside)
    os.replace(aside, file)
    return Images(**made)


LOADERS: dict[str, Callable[[str | None], Images]] = {"digits": _digits, "cifar10": _cifar10}
