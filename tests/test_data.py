"""The stream is a function of (seed, sample index); what data sets hold; real images; refusals."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import ENVIRONMENT, dataset, write_pictures

from scaling_exps import data, sources

CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, away from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scalerun"


def stream(name: str, seed: int = 0, path: str | None = None, **changes: Any) -> data.ImageStream:
    one = data.stream(dataset(name, **changes), path, seed, CPU)
    assert isinstance(one, data.ImageStream)
    return one


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
        crops = [
            (dy, dx, f)
            for dy in range(3) for dx in range(3) for f in range(2)
            if torch.equal(pixels.flip(1) if f else pixels, padded[index, dy : dy + 8, dx : dx + 8])
        ]  # fmt: skip
        assert crops
        counts[crops[0]] += 1
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


def test_the_embedded_digits_are_those_of_scikit_learn() -> None:
    """To the bit, in the order of the fixed shuffle: runs of before that were read from scikit-learn stay the same."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    order = torch.argsort(data.random_bits(0, "digits/split", torch.arange(1797)), stable=True)
    images = data.load(dataset("digits"), None)
    assert torch.equal(torch.cat([images.train, images.test]), pixels[order])
    assert torch.equal(torch.cat([images.train_labels, images.test_labels]), torch.from_numpy(bunch.target)[order])


def small_cifar10(folder: Path, colours: list[int]) -> Path:
    """A folder in the form of the hub's CIFAR-10: one image of each colour for train, and the same for test."""
    folder.mkdir(exist_ok=True)
    cells = []
    for colour in colours:
        png = io.BytesIO()
        Image.new("RGB", (32, 32), (colour, colour, colour)).save(png, "PNG", compress_level=0)
        cells.append({"bytes": png.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in ("train", "test"):
        rows = pa.table({"img": pa.array(cells, kind), "label": list(range(len(colours)))})
        pq.write_table(rows, folder / f"{part}.parquet", compression="none")
    return folder


def test_decoded_images_follow_the_content_of_the_files(own_cache: Path, tmp_path: Path) -> None:
    """Fails for a cache that knows files by name or size (other pixels of one size), by place (a copy is decoded
    again), or that believes a damaged array."""
    few = dataset("cifar10", train_size=2, test_size=2)
    here = small_cifar10(tmp_path / "here", [10, 20])
    assert data.load(few, str(here)).train[:, 0, 0, 0].tolist() == [10, 20]
    small_cifar10(here, [30, 40])
    assert data.load(few, str(here)).train[:, 0, 0, 0].tolist() == [30, 40]
    assert len(list(own_cache.glob("cifar10-*"))) == 2
    copy = small_cifar10(tmp_path / "copy", [30, 40])
    data.load(few, str(copy))
    kept = list(own_cache.glob("cifar10-*"))
    assert len(kept) == 2
    for folder in kept:
        (folder / "train.npy").write_bytes(b"damaged")
    data.images._mapped.cache_clear()  # as another process would
    assert data.load(few, str(copy)).train[:, 0, 0, 0].tolist() == [30, 40]
    assert all(np.load(f, allow_pickle=False).size for f in kept[0].glob("test*.npy"))


def test_cifar10_is_decoded_whole(cifar10: str) -> None:
    images = data.load(dataset("cifar10"), cifar10)
    assert images.train.shape == (50000, 32, 32, 3) and images.test.shape == (10000, 32, 32, 3)
    assert torch.equal(images.train_labels.bincount(), torch.full((10,), 5000))
    mean = images.train.float().mean((0, 1, 2)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)  # the config's constants


# ---- what data sets hold ----


def touch(file: Path, seconds: float) -> None:
    """Move the time of change, so that the hash is kept as of a file that has rested."""
    os.utime(file, (file.stat().st_atime - seconds, file.stat().st_mtime - seconds))


def test_a_text_is_its_content_not_its_place(own_cache: Path, tmp_path: Path) -> None:
    """Fails for a fingerprint of paths or times, and for one that misses a byte or a file's name."""
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "one.txt").write_text("to be")
        (tmp_path / folder / "sub" / "two.txt").write_text("or not")
    touch(tmp_path / "b" / "one.txt", 1000)
    a, b = (str(tmp_path / folder) for folder in ("a", "b"))
    first = sources.fingerprint("text", a)
    assert len(first) == 16 and sources.fingerprint("text", b) == first
    single = sources.fingerprint("text", str(tmp_path / "a" / "one.txt"))
    (tmp_path / "other name.txt").write_text("to be")
    assert sources.fingerprint("text", str(tmp_path / "other name.txt")) == single != first
    (tmp_path / "b" / "one.txt").rename(tmp_path / "b" / "test.txt")  # now it is the test part
    assert sources.fingerprint("text", b) != first
    (tmp_path / "a" / "one.txt").write_text("to bE")
    assert sources.fingerprint("text", a) != first


def test_a_hash_is_kept_and_never_of_a_file_that_may_still_change(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second look reads nothing; but a file that was written just now may be written again within one tick of the
    file system's clock, with the same size and time, and its hash is taken anew."""
    text = tmp_path / "text.txt"
    text.write_text("aaaa")
    stamp = text.stat()
    first = sources.fingerprint("text", str(text))
    text.write_text("bbbb")
    os.utime(text, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = sources.fingerprint("text", str(text))
    assert second != first
    touch(text, 10)
    assert sources.fingerprint("text", str(text)) == second
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert sources.fingerprint("text", str(text)) == second


def test_what_the_name_and_the_revision_fix_needs_no_fingerprint(tmp_path: Path) -> None:
    """Nothing is read, so a plan for a cluster needs no data on the laptop; of stdlib the version of Python counts
    (review, defect 14: 3.11 and 3.12 gave one run id and other bytes)."""
    for name in ("digits", "cifar10", "imagenet", "wikitext103", "wikibooks"):
        assert sources.fingerprint(name, None) == ""
    assert sources.fingerprint("stdlib", None, "bytes", None) == f"python-{platform.python_version()}"
    for arguments, says in (
        (("text", None), "needs dataset.path=FILE or FOLDER"),
        (("text", str(tmp_path)), "no .parquet and no .txt file"),
        (("text", str(tmp_path / "nowhere")), "does not exist"),
        (("imagefolder", None), "needs dataset.path=FOLDER"),
        (("imagefolder", str(tmp_path)), "no images in"),
        (("stdlib", str(tmp_path)), "takes no path"),
        (("digits", str(tmp_path)), "takes no path"),
    ):
        with pytest.raises(data.DataError) as refusal:
            sources.fingerprint(*arguments)
        assert says in str(refusal.value)


def test_an_image_folder_is_its_names_and_sizes(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", {"train": 2, "val": 1})
    first = sources.fingerprint("imagefolder", str(root))
    copied = write_pictures(tmp_path / "copy", {"train": 2, "val": 1})
    assert sources.fingerprint("imagefolder", str(copied)) == first
    (root / "train" / "ant" / "notes.md").write_text("no image")
    assert sources.fingerprint("imagefolder", str(root)) == first
    (root / "val" / "bee" / "000.JPEG").unlink()
    assert sources.fingerprint("imagefolder", str(root)) != first


def test_a_tokenizer_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    """Pinned: the commit that is given. Else the one that lies in the local cache, and without one a refusal."""
    pinned = sources.fingerprint("wikitext103", None, "gpt2", "c" * 40)
    assert pinned == "c" * 40
    folder = tmp_path / "hub" / "models--some--hub"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("d" * 40)
    code = "from scaling_exps import sources; print(sources.fingerprint('stdlib', None, 'some/hub', None))"
    environment = {**ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "hub")}

    def asked() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert "tokenizer 'some/hub' is not on this machine, and training never downloads" in asked().stderr
    (folder / "snapshots" / ("d" * 40)).mkdir(parents=True)
    assert asked().stdout == f"python-{platform.python_version()} {'d' * 40}\n"


def test_a_worker_refuses_other_data(tmp_path: Path) -> None:
    """As where a folder changed since the plan, or a node has another Python (review, defect 14)."""
    text = tmp_path / "text.txt"
    text.write_text("to be")
    planned = sources.fingerprint("text", str(text), "bytes", None)
    data.check_content(dataset("text"), planned, str(text))
    text.write_text("to be or not")
    with pytest.raises(data.DataError, match="is not what the run was planned with"):
        data.check_content(dataset("text"), planned, str(text))
    with pytest.raises(data.DataError, match=r"'python-3\.10\.1' in run\.json"):
        data.check_content(dataset("stdlib"), "python-3.10.1", None)
    data.check_content(dataset("digits"), "", None)


def test_planning_imports_nothing_heavy() -> None:
    code = "import sys, scaling_exps.sources; print({m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "msgspec", "huggingface_hub", "datasets"} & eval(done.stdout)


def test_a_missing_extra_is_one_sentence() -> None:
    with pytest.raises(data.DataError, match=r"^reading x needs nowhere: pip install 'scalerun\[data\]'$"):
        sources.need("nowhere.at_all", "reading x")


def test_refusals(tmp_path: Path) -> None:
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
