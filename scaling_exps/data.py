"""Which example, and which augmentation, at (seed, sample index).

The stream is endless: sample i belongs to epoch i // N, and everything about it (which image, which crop,
flip and label noise) is a hash of (seed, purpose, i). Batch size, world size, micro-batch and restarts only
decide who asks for which slice. Images stay on the device as uint8 and are augmented there, in batch.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class DataError(ValueError):
    """The data set is missing, unreadable or not what the config says."""


@dataclass(frozen=True)
class Images:
    """Decoded images: uint8 of shape (N, H, W, C), and int64 labels of shape (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def random_bits(seed: int, purpose: str, index: Tensor) -> Tensor:
    """62 random bits for each index: int64 in [0, 2^62), a function of (seed, purpose, index) alone.

    Integer arithmetic (two rounds of the splitmix64 finaliser), hence the same on every device.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little", signed=True)
    x = _mix(index * _signed(0x9E3779B97F4A7C15) + key)
    return (_mix(x ^ key) >> 2) & (2**62 - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)  # >> is arithmetic: mask the sign
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Stream:
    """The training stream of one seed over one set of images, and its test set.

    Args:
        images: decoded images.
        dataset: the `dataset` group of the config, as a dict.
        seed: of the run.
        device: where images live and batches are made.
        purpose: streams of different purposes are independent (the loop's is "train").
    """

    def __init__(
        self, images: Images, dataset: dict[str, Any], seed: int, device: torch.device, purpose: str = "train"
    ) -> None:
        self.shift, self.flip, self.noise = dataset["shift"], dataset["flip"], dataset["label_noise"]
        self.classes, self.seed, self.purpose, self.device = dataset["classes"], seed, purpose, device
        self.height, self.width, self.channels = dataset["shape"]
        s = self.shift
        self.train = torch.nn.functional.pad(images.train, (0, 0, s, s, s, s)).to(device).view(-1, self.channels)
        self.size = len(images.train)
        self.labels, self.test_labels = images.train_labels.to(device), images.test_labels.to(device)
        self.test = images.test.to(device)
        mean, std = torch.tensor(dataset["mean"]), torch.tensor(dataset["std"])
        self.factor, self.offset = (1 / (255 * std)).to(device), (-mean / std).to(device)
        padded = self.width + 2 * s
        self.rows = torch.arange(self.height, device=device).view(1, -1, 1) * padded
        self.columns = torch.arange(self.width, device=device).view(1, 1, -1)
        self._epoch = lru_cache(2)(self._make_epoch)

    def sibling(self, seed: int, purpose: str) -> Stream:
        """Another stream over the same images, which it shares."""
        other = copy.copy(self)
        other.seed, other.purpose = seed, purpose
        other._epoch = lru_cache(2)(other._make_epoch)
        return other

    def _make_epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """For every sample of one epoch: image, label, flat position of its crop's corner, flipped; (N,) each."""
        i = torch.arange(epoch * self.size, (epoch + 1) * self.size, device=self.device)

        def draw(what: str) -> Tensor:
            return random_bits(self.seed, f"{self.purpose}/{what}", i)

        image = torch.argsort(draw("order"), stable=True)
        label = self.labels[image]
        if self.noise:
            drawn = (draw("noisy") >> 9).double() * 2.0**-53 < self.noise
            label = torch.where(drawn, draw("label") % self.classes, label)
        span, padded_width = 2 * self.shift + 1, self.width + 2 * self.shift
        padded_height = self.height + 2 * self.shift
        corner = (image * padded_height + draw("row") % span) * padded_width + draw("column") % span
        flipped = (draw("flip") >> 9) % 2 == 1 if self.flip else torch.zeros_like(image, dtype=torch.bool)
        return image, label, corner, flipped

    def _slice(self, start: int, stop: int) -> list[Tensor]:
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.size)
            count = min(stop - start, self.size - first)
            parts.append([t[first : first + count] for t in self._epoch(epoch)])
            start += count
        return [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)]

    def indices(self, start: int, stop: int) -> Tensor:
        """Which training images samples start..stop-1 of the stream are; int64 (stop - start,)."""
        return self._slice(start, stop)[0]

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

    def _normalise(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.offset, pixels.float(), self.factor).permute(0, 3, 1, 2)


def load(dataset: dict[str, Any], path: str | None) -> Images:
    """The decoded images of the `dataset` group of the config; decoded once, then read from a cache.

    Args:
        dataset: the group as a dict (`name`, `train_size`, `test_size`, `shape`, `classes` are used).
        path: folder of the raw data, or None for the embedded or hub copy.

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
    if path is None and (root := os.environ.get("SCALERUN_DATA")) and (Path(root) / "cifar10").is_dir():
        path = str(Path(root) / "cifar10")
    files: dict[str, list[str]] = {}
    if path is not None:
        for part in ("train", "test"):
            files[part] = sorted(str(p.resolve()) for p in Path(path).glob(f"{part}*.parquet"))
            if not files[part]:
                raise DataError(
                    f"no {part}*.parquet in {path!r}: dataset.path must be a folder of CIFAR-10 parquet files as "
                    "the hub's uoft-cs/cifar10 has them; without dataset.path they are downloaded"
                )
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for part in files.values() for f in part]
    fingerprint = hashlib.sha256(repr(stats or "hub").encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalerun"
    return _cached(cache / f"cifar10-{fingerprint}.safetensors", lambda: _decode_cifar10(files))


def _decode_cifar10(files: dict[str, list[str]]) -> dict[str, Tensor]:
    import datasets
    import numpy as np
    from tqdm import tqdm

    try:
        if files:
            parts = datasets.load_dataset("parquet", data_files=files)
        else:
            parts = datasets.load_dataset("uoft-cs/cifar10")
        out = {}
        for part in ("train", "test"):
            rows = parts[part]
            column = next(c for c in ("img", "image") if c in rows.column_names)
            rows = rows.cast_column(column, datasets.Image())
            decoded = [np.asarray(r[column].convert("RGB")) for r in tqdm(rows, desc=f"decoding {part}", disable=None)]
            out[part] = torch.from_numpy(np.stack(decoded))
            out[f"{part}_labels"] = torch.tensor(rows["label"][:], dtype=torch.int64)
        return out
    except Exception as e:  # datasets raises its own kinds for a corrupt file, a missing column, no network
        source = f"the files {[f for p in files.values() for f in p]}" if files else "the hub's uoft-cs/cifar10"
        raise DataError(
            f"cannot read CIFAR-10 from {source}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else e!r}. "
            "Give a folder of parquet files with dataset.path=FOLDER, or set SCALERUN_DATA to its parent"
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
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(made, aside)
    os.replace(aside, file)
    return Images(**made)


LOADERS: dict[str, Callable[[str | None], Images]] = {"digits": _digits, "cifar10": _cifar10}
