"""The stream is a function of (seed, sample index); real images; refusals."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from scaling_exps import config, data

CPU = torch.device("cpu")


def dataset(name: str, **changes: Any) -> dict[str, Any]:
    (composed,) = config.compose([f"dataset={name}"])
    return asdict(composed.dataset) | changes


def stream(name: str, seed: int = 0, path: str | None = None, **changes: Any) -> data.ImageStream:
    group = dataset(name, **changes)
    made = data.stream(group, path, seed, CPU)
    assert isinstance(made, data.ImageStream)
    return made


def check_coupling(one: data.ImageStream) -> None:
    first = [one.pixels(0, 8192), (one.indices(0, 8192),)]
    for batch in (64, 256):
        parts = [one.pixels(i, i + batch) for i in range(0, 8192, batch)]
        assert torch.equal(torch.cat([p for p, _ in parts]), first[0][0])
        assert torch.equal(torch.cat([y for _, y in parts]), first[0][1])
        assert torch.equal(torch.cat([one.indices(i, i + batch) for i in range(0, 8192, batch)]), first[1][0])


def test_samples_do_not_depend_on_the_batch() -> None:
    check_coupling(stream("digits", label_noise=0.4))  # crosses epochs: 8192 > 1437


def test_samples_do_not_depend_on_the_batch_cifar10(cifar10: str) -> None:
    one = stream("cifar10", path=cifar10)
    check_coupling(one)
    assert one.pixels(0, 8)[0].shape == (8, 32, 32, 3)


def test_an_epoch_is_a_permutation_and_epochs_and_seeds_differ() -> None:
    a, b = stream("digits"), stream("digits", seed=1)
    first, second = a.indices(0, 1437), a.indices(1437, 2874)
    assert torch.equal(first.sort().values, torch.arange(1437)) and torch.equal(
        second.sort().values, torch.arange(1437)
    )
    assert not torch.equal(first, second) and not torch.equal(first, b.indices(0, 1437))


def test_augmentation_is_a_padded_crop_and_a_flip() -> None:
    """Every output is one of the crops of its own image; all shifts and both flips occur about equally often."""
    group = dataset("digits", flip=True, shift=1)
    images = data.load(group, None)
    one = data.ImageStream(images, group, 0, CPU)
    out, labels = one.pixels(0, 1437)
    padded = torch.nn.functional.pad(images.train, (0, 0, 1, 1, 1, 1))
    counts = torch.zeros(3, 3, 2)
    for pixels, label, index in zip(out, labels, one.indices(0, 1437), strict=False):
        assert label == images.train_labels[index]
        found = [
            (dy, dx, f)
            for dy in range(3) for dx in range(3) for f in range(2)
            if torch.equal(pixels.flip(1) if f else pixels, padded[index, dy : dy + 8, dx : dx + 8])
        ]  # fmt: skip
        assert found
        counts[found[0]] += 1
    assert counts.min() > 45  # 1,437 draws over 18 kinds: 80 each, sd 8.7; four of them below


def test_label_noise_is_drawn_afresh_at_each_occurrence() -> None:
    noisy, clean = stream("digits", label_noise=0.4), stream("digits")
    share = [(noisy.pixels(s, s + 1437)[1] != clean.pixels(s, s + 1437)[1]).float().mean() for s in (0, 1437)]
    assert share == pytest.approx([0.36, 0.36], abs=0.05)  # 0.4 x 9/10; sd 0.013
    first = {int(i): int(y) for i, y in zip(noisy.indices(0, 1437), noisy.pixels(0, 1437)[1], strict=True)}
    again = {int(i): int(y) for i, y in zip(noisy.indices(1437, 2874), noisy.pixels(1437, 2874)[1], strict=True)}
    assert first != again


def test_random_bits_are_uniform() -> None:
    i = torch.arange(1 << 16)
    bits = data.random_bits(3, "x", i)
    assert bits.min() >= 0 and len(bits.unique()) == len(bits)
    for k in range(62):  # each bit is fair: 65,536 draws, sd 0.00195, five of them
        assert abs(((bits >> k) & 1).double().mean() - 0.5) < 0.0098
    assert not torch.equal(bits, data.random_bits(3, "y", i)) and not torch.equal(bits, data.random_bits(4, "x", i))


def test_cifar10_is_decoded_once_and_whole(cifar10: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = data.load(dataset("cifar10"), cifar10)
    assert images.train.shape == (50000, 32, 32, 3) and images.test.shape == (10000, 32, 32, 3)
    assert torch.equal(images.train_labels.bincount(), torch.full((10,), 5000))
    mean = images.train.float().mean((0, 1, 2)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)  # the config's constants


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="takes no path"):
        data.load(dataset("digits"), "somewhere")
    with pytest.raises(data.DataError, match="no train"):
        data.load(dataset("cifar10"), str(tmp_path))
    with pytest.raises(data.DataError, match="there are only 1437"):
        data.load(dataset("digits", train_size=2000), None)
    with pytest.raises(data.DataError, match="but the images are"):
        data.load(dataset("digits", shape=[16, 16, 1]), None)
    for part in ("train", "test"):
        (tmp_path / f"{part}.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    with pytest.raises(data.DataError, match=r"cannot read CIFAR-10 from the files"):
        data.load(dataset("cifar10"), str(tmp_path))
