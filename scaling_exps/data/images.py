"""Images that fit in memory: they stay on the device as uint8 and are augmented there, in batch."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scaling_exps.config import ImageDataset
from scaling_exps.data.store import bar, keep
from scaling_exps.data.stream import Stream, random_bits, uniform
from scaling_exps.sources import DataError, cache, content, need, raw_folder


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
    """A stream over resident images: padded crop, flip, and label noise by the sample's index."""

    def __init__(self, images: Images, dataset: ImageDataset, seed: int, device: torch.device) -> None:
        super().__init__(len(images.train), len(images.test), seed, device)
        self.shift, self.flip, self.noise = dataset.shift, dataset.flip, dataset.label_noise
        self.classes = dataset.classes
        self.height, self.width, self.channels = dataset.shape
        s = self.shift
        self.train = torch.nn.functional.pad(images.train, (0, 0, s, s, s, s)).to(device).view(-1, self.channels)
        self.labels, self.test_labels = images.train_labels.to(device), images.test_labels.to(device)
        self.test = images.test.to(device)
        self._normalise = Normalise(dataset.mean, dataset.std, device)
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


def load(dataset: ImageDataset, path: str | None) -> Images:
    """The decoded images, see `data.load`; decoded once, then read from the cache."""
    images = _digits() if dataset.name == "digits" else _cifar10(path)
    if list(images.train.shape[1:]) != list(dataset.shape):
        raise DataError(f"dataset.shape={list(dataset.shape)}, but the images are {list(images.train.shape[1:])}")
    n, m = dataset.train_size, dataset.test_size
    for part, want, have in (("train", n, len(images.train)), ("test", m, len(images.test))):
        if want is not None and want > have:
            raise DataError(f"dataset.{part}_size={want}: there are only {have} images")
    if int(images.train_labels.max()) >= dataset.classes:
        raise DataError(f"dataset.classes={dataset.classes}: a label is {int(images.train_labels.max())}")
    return Images(images.train[:n], images.train_labels[:n], images.test[:m], images.test_labels[:m])


# ---- digits ----


def _digits() -> Images:
    """8x8 counts in 0..16 and labels of 1,797 digits, as scikit-learn's load_digits has them; see DIGITS."""
    with np.load(DIGITS) as file:
        counts, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    pixels = (counts.double() * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    order = torch.argsort(random_bits(0, "digits/split", torch.arange(len(labels))), stable=True)
    pixels, labels = pixels[order], labels[order]
    return Images(pixels[:1437], labels[:1437], pixels[1437:], labels[1437:])


# The test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
# Repository, 1998, doi 10.24432/C50P49, licence CC BY 4.0: arrays `images` (1797, 8, 8) and `labels` (1797,), uint8.
DIGITS = Path(__file__).with_name("digits.npz")


# ---- CIFAR-10 ----


def _cifar10(path: str | None) -> Images:
    folder = raw_folder("cifar10", path)
    files = {part: sorted(p.resolve() for p in folder.glob(f"{part}*.parquet")) for part in ("train", "test")}
    for part, shards in files.items():
        if not shards:
            raise DataError(
                f"no {part}*.parquet in {str(folder)!r}: dataset.path must be a folder of CIFAR-10 parquet files as "
                "the hub's uoft-cs/cifar10 has them"
            )
    decoded = cache() / f"cifar10-{content([*files['train'], *files['test']])}"
    keep(decoded, partial(_decode_cifar10, files))
    try:
        return _mapped(decoded)
    except (OSError, ValueError):  # damaged since
        shutil.rmtree(decoded)
        keep(decoded, partial(_decode_cifar10, files))
        return _mapped(decoded)


@lru_cache(2)  # a sweep in one process maps it once
def _mapped(folder: Path) -> Images:
    """Images of the cache, mapped copy-on-write: a page is read when it is used."""
    arrays = {f.name: np.load(folder / f"{f.name}.npy", mmap_mode="c") for f in fields(Images)}
    return Images(**{name: torch.from_numpy(a) for name, a in arrays.items()})


def _decode_cifar10(files: dict[str, list[Path]], into: Path) -> None:
    pillow, parquet = need("PIL.Image", "dataset=cifar10"), need("pyarrow.parquet", "dataset=cifar10")
    arrays: dict[str, np.ndarray] = {}
    try:
        for part, shards in files.items():
            rows = parquet.read_table(shards)
            column = next(c for c in ("img", "image") if c in rows.column_names)
            decoded = []
            with bar(f"decoding {part}", len(rows)) as advance:
                for cell in rows.column(column).to_pylist():
                    decoded.append(np.asarray(pillow.open(io.BytesIO(cell["bytes"])).convert("RGB")))
                    advance(1)
            arrays |= {part: np.stack(decoded), f"{part}_labels": rows.column("label").to_numpy().astype(np.int64)}
    except Exception as e:  # pyarrow and PIL have kinds of their own for every damage
        raise DataError(
            f"cannot read CIFAR-10 from the files {[str(f) for p in files.values() for f in p]}: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else e!r}. Fetch them again, or give another dataset.path=FOLDER"
        ) from e
    for name, array in arrays.items():
        np.save(into / f"{name}.npy", array)
