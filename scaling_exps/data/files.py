"""Images that are decoded as they are needed: a folder for each class, or parquet shards as the hub has them.

A thread pool decodes, crops and resizes (PIL releases the interpreter's lock); `prefetch` lets it work on the next
micro-batch while the network works on this one. The device normalises.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from scaling_exps.config import FileDataset
from scaling_exps.data.images import Normalise
from scaling_exps.data.stream import Stream, random_bits, uniform
from scaling_exps.sources import LAYOUT, PICTURES, TEST, DataError, cache, how, need, parquet_folder, parts, raw_folder

if TYPE_CHECKING:
    from PIL import Image

ASPECT = (3 / 4, 4 / 3)  # of a random crop, width over height
TRIES = 10  # of a random crop, before the central one
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Part:
    """Examples of one part: their labels, int64 (N,), and how to open and to name one of them."""

    labels: Tensor
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]

    def subset(self, keep: Tensor) -> Part:
        rows = keep.tolist()
        return Part(self.labels[keep], lambda i: self.open(rows[i]), lambda i: self.name(rows[i]))


@dataclass(frozen=True)
class Files:
    """Both parts. fingerprint: of the names and labels."""

    train: Part
    test: Part
    fingerprint: str


class FileStream(Stream):
    """A stream over image files: random resized crop and flip by the sample's index; the central crop for the test."""

    def __init__(self, files: Files, dataset: FileDataset, seed: int, device: torch.device) -> None:
        super().__init__(len(files.train.labels), len(files.test.labels), seed, device)
        self.files, self.fingerprint = files, files.fingerprint
        self.height, self.width, _ = dataset.shape
        self.area, self.flip, self.resize = dataset.area, dataset.flip, dataset.resize
        self._normalise = Normalise(dataset.mean, dataset.std, device)
        self._ahead: tuple[tuple[int, int], Callable[[], Tensor]] | None = None

    def sibling(self, seed: int, purpose: str) -> Self:
        other = super().sibling(seed, purpose)
        other._ahead = None
        return other

    def _make_epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """For every sample of one epoch, on the host: its image; (N,)."""
        return (self._order(torch.arange(epoch * self.size, (epoch + 1) * self.size)),)

    def crops(self, start: int, stop: int) -> list[tuple[Callable[[int, int], Box], bool]]:
        """For samples start..stop-1: the crop as a function of the image's (width, height), and whether it is flipped.

        A size is known only once the file is open; all that is random is drawn here.
        """
        i = torch.arange(start, stop)
        tries = i[:, None] * TRIES + torch.arange(TRIES)
        low, high = self.area
        area = low + (high - low) * uniform(self.draw("area", tries))  # (n, TRIES), share of the image
        lows, highs = math.log(ASPECT[0]), math.log(ASPECT[1])
        aspect = torch.exp(lows + (highs - lows) * uniform(self.draw("aspect", tries)))
        left, top = uniform(self.draw("column", i)), uniform(self.draw("row", i))
        flipped = (self.draw("flip", i) >> 9) % 2 == 1 if self.flip else torch.zeros(len(i), dtype=torch.bool)
        columns = (area.tolist(), aspect.tolist(), left.tolist(), top.tolist(), flipped.tolist())
        return [
            (partial(random_crop, area=a, aspect=r, left=x, top=y), f) for a, r, x, y, f in zip(*columns, strict=True)
        ]

    def _train_image(self, row: int, crop: Callable[[int, int], Box], flipped: bool) -> np.ndarray:
        image = _decode(self.files.train, row)
        image = image.crop(crop(*image.size)).resize((self.width, self.height), BILINEAR)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if flipped else pixels

    def _test_image(self, row: int) -> np.ndarray:
        image = _decode(self.files.test, row)
        w, h = (self.resize * side // min(image.size) for side in image.size)
        image = image.resize((w, h), BILINEAR)
        left, top = round((w - self.width) / 2), round((h - self.height) / 2)  # as torchvision's CenterCrop
        return np.asarray(image.crop((left, top, left + self.width, top + self.height)))

    def _decode_train(self, start: int, stop: int) -> Callable[[], Tensor]:
        rows, crops = self.indices(start, stop).tolist(), self.crops(start, stop)
        work = [(self._train_image, row, *crop) for row, crop in zip(rows, crops, strict=True)]
        return _decoding(work, (self.height, self.width), self.device)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to decode samples start..stop-1; one such slice is kept."""
        self._ahead = (start, stop), self._decode_train(start, stop)

    def pixels(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Augmented pixels, uint8 (n, H, W, 3), and labels, int64 (n,), of samples start..stop-1; on the host."""
        ahead, self._ahead = self._ahead, None
        decoded = ahead[1] if ahead is not None and ahead[0] == (start, stop) else self._decode_train(start, stop)
        return decoded(), self.files.train.labels[self.indices(start, stop)]

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (n, 3, H, W), channels_last in memory, and labels, of samples start..stop-1.

        Raises:
            DataError: an image cannot be decoded.
        """
        return self._ready(*self.pixels(start, stop))

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Test images start..stop-1, normalised, and their labels; shorter at the end."""
        work = [(self._test_image, row) for row in range(start, min(stop, self.test_size))]
        decoded = _decoding(work, (self.height, self.width), self.device)
        return self._ready(decoded(), self.files.test.labels[start:stop])

    def _ready(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._normalise(pixels.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def _decoding(work: list[tuple[Any, ...]], size: tuple[int, int], device: torch.device) -> Callable[[], Tensor]:
    """Begin to make images, each by the function and arguments of a row of `work`; what waits for all of them.

    They come as one tensor, uint8 (n, H, W, 3); pinned where a GPU will read it.
    """
    out = torch.empty((len(work), *size, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
    into = out.numpy()

    def one(k: int) -> None:
        make, *given = work[k]
        into[k] = make(*given)

    ends = _pool().map(one, range(len(work)))  # its iterator raises the first failure and cancels the rest

    def result() -> Tensor:
        for _ in ends:
            pass
        return out

    return result


@lru_cache(1)
def _pool() -> ThreadPoolExecutor:
    """The process's decoding threads: its share of the CPUs that it may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), "decode")


def _open(file: str | io.BytesIO) -> Image.Image:
    image: Image.Image = need("PIL.Image", "a data set of image files").open(file)
    return image


def _decode(part: Part, row: int) -> Image.Image:
    try:
        return part.open(row).convert("RGB")
    except DataError:
        raise
    except Exception as e:  # PIL has several kinds for a damaged file
        raise DataError(
            f"cannot decode image {part.name(row)}: {type(e).__name__}: {e}. Fetch it again, or take it out of the "
            "data set (then start anew in another runs_dir: the order of the samples changes)"
        ) from e


def random_crop(width: int, height: int, area: list[float], aspect: list[float], left: float, top: float) -> Box:
    """torchvision's RandomResizedCrop with its random numbers given: (left, top, right, bottom), all inside.

    Args:
        width, height: of the image, pixels.
        area, aspect: of each try: share of the image's area; width over height.
        left, top: in [0, 1): where the crop lies in the room that it leaves.

    >>> random_crop(100, 50, [0.5], [1.0], 0.0, 0.99)
    (0, 0, 50, 50)
    """
    for a, r in zip(area, aspect, strict=True):
        w, h = round(math.sqrt(width * height * a * r)), round(math.sqrt(width * height * a / r))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


# ---- what is on the disk ----


def load(dataset: FileDataset, path: str | None) -> Files:
    """The files, see `data.load`; nothing is decoded.

    A size below what there is takes the first so many of a fixed shuffle, since files lie sorted by class.
    """
    files = listing(str(raw_folder(dataset.name, path).resolve()), dataset.name)
    parts = {}
    wanted = {"train": (files.train, dataset.train_size), "test": (files.test, dataset.test_size)}
    for which, (part, want) in wanted.items():
        have = len(part.labels)
        if want is not None and want > have:
            raise DataError(f"dataset.{which}_size={want}: there are only {have} {which} images")
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= dataset.classes:
            raise DataError(
                f"dataset.classes={dataset.classes}: the {which} images have labels from {low} to {high}; give "
                f"dataset.classes={high + 1}, or another folder"
            )
        order = torch.argsort(random_bits(0, f"files/{which}", torch.arange(have)), stable=True)
        parts[which] = part.subset(order[:want])
    return Files(parts["train"], parts["test"], files.fingerprint)


@lru_cache(2)  # a sweep in one process lists once
def listing(folder: str, name: str) -> Files:
    """Every file of a folder in its own order: by class and name, or by row. Raises as `load` does."""
    root = Path(folder)
    if (shards := parquet_folder(root)) is not None:
        return _parquet(shards, name)
    *both, classes = parts(root, name)
    digest = hashlib.sha256()
    train, held_out = (_folder(part, classes, digest) for part in both)
    return Files(train, held_out, digest.hexdigest()[:16])


def _folder(folder: Path, classes: list[str], digest: Any) -> Part:
    """Images below the class folders, numbered as torchvision's ImageFolder does; their names go into `digest`."""
    names, labels = [], []
    for label, name in enumerate(classes):
        for base, subfolders, inside in os.walk(folder / name, followlinks=True):
            subfolders.sort()
            images = [os.path.join(base, f) for f in sorted(inside) if f.lower().endswith(PICTURES)]
            names += images
            labels += [label] * len(images)
    if not names:
        raise DataError(f"no image in {str(folder)!r}: {LAYOUT}")
    digest.update("\n".join(os.path.relpath(n, folder) for n in names).encode())
    return Part(torch.tensor(labels), lambda i: _open(names[i]), lambda i: names[i])


def _parquet(folder: Path, name: str) -> Files:
    import datasets

    test = next((of_part for t in TEST if (of_part := sorted(folder.glob(f"{t}*.parquet")))), [])
    if not test:
        raise DataError(f"no validation*.parquet in {str(folder)!r}: {LAYOUT}; or {how(name)}")
    shards = {"train": sorted(folder.glob("train*.parquet")), "test": test}
    digest = hashlib.sha256(repr([(f.name, f.stat().st_size) for p in shards.values() for f in p]).encode())
    try:
        both = datasets.load_dataset(
            "parquet", data_files={k: [str(f) for f in v] for k, v in shards.items()}, cache_dir=str(cache() / "arrow")
        )
        parts = {}
        for which, rows in both.items():
            rows = rows.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
            labels = torch.from_numpy(rows.data.column("label").to_numpy().astype(np.int64))
            parts[which] = _rows(rows, labels, f"of {shards[which][0].parent}/{which}*.parquet")
    except Exception as e:  # datasets raises its own kinds for a corrupt file, a missing column
        reason = str(e.__cause__ or e) or repr(e)
        raise DataError(
            f"cannot read columns image and label of the parquet files in {str(folder)!r}: {type(e).__name__}: "
            f"{reason.splitlines()[0]}. Fetch them again, or give another dataset.path=FOLDER"
        ) from e
    return Files(parts["train"], parts["test"], digest.hexdigest()[:16])


def _rows(rows: Any, labels: Tensor, where: str) -> Part:
    def name(i: int) -> str:
        return f"{rows[i]['image']['path'] or ''} (row {i}) {where}".strip()

    return Part(labels, lambda i: _open(io.BytesIO(rows[i]["image"]["bytes"])), name)
