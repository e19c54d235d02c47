"""`dataset=imagefolder` counts its folder when it is planned, and refuses one that is not what it should be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import write_pictures
from test_vision import SHAPE

from scaling_exps import config, data, plan, train

WORDS = ["model=timm", "model.name=resnet10t", "dataset=imagefolder", *SHAPE, "measure.noise=none", "logger=none"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", {"train": 4, "val": 2})


def planned(path: Path, *words: str) -> plan.RunSpec:
    return plan.plan(config.compose([*WORDS, f"dataset.path={path}", *words]))[0]


def test_it_sizes_itself(pictures: Path) -> None:
    """Classes and epochs need no number; one that is given and right makes the same run. Fails if a size that nobody
    typed got into the run id, which it is not in where it was left null before."""
    spec = planned(pictures, "recipe.epochs=8", "recipe.samples=null")
    assert spec.science.dataset.classes == 3 and spec.science.schedule.total_samples == 8 * 12
    assert spec.run_id == planned(pictures, "recipe.samples=96", "dataset.classes=3").run_id
    assert spec.science.dataset.train_size is None
    train.preflight([spec])  # the network has as many logits as the folder has classes


def empty(root: Path) -> None:
    for file in (root / "train" / "ant").iterdir():
        file.unlink()


def mixed(root: Path) -> None:
    (root / "train" / "ant" / "a.webp").touch()
    (root / "train" / "bee" / "page.jpg").write_text("<html>")
    (root / "val" / "cow" / "none.png").touch()
    shutil.copy(root / "train" / "ant" / "000.JPEG", root / "train" / "loose.jpg")


def one(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            shutil.rmtree(root / part / name)


def flat(root: Path) -> None:
    shutil.rmtree(root / "val")


def renamed(root: Path) -> None:
    (root / "train").rename(root / "Train")
    (root / "val").rename(root / "valid")


def other(root: Path) -> None:
    for file in root.rglob("*.JPEG"):
        file.rename(file.with_suffix(".webp"))


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (None, ["dataset.classes=4"], ["dataset.classes=4: the folder has classes=3, train_size=12, test_size=6"]),
        (None, ["dataset.train_size=13", "dataset.classes=2"], ["dataset.classes=2, dataset.train_size=13: the"]),
        (None, ["dataset.classes=1"], ["dataset.classes=1 must be >= 2"]),
        (empty, [], ["train/ant holds no picture"]),
        (mixed, [], ["train/loose.jpg lies outside of a class", "page.jpg is no picture", "none.png is empty",
                     "1 file(s) are .webp: convert"]),
        (one, [], ["train has 1 class folder(s)"]),
        (flat, [], ["it has the folders train"]),
        (renamed, [], ["(or validation/, or test/)", "it has the folders Train, valid"]),
        (other, [], ["no images in", "18 file(s) are .webp"]),
    ],
)  # fmt: skip
def test_what_it_refuses(
    pictures: Path, change: Callable[[Path], None] | None, words: list[str], says: list[str]
) -> None:
    if change is not None:
        change(pictures)
    with pytest.raises((plan.PlanError, config.ConfigError)) as refusal:
        planned(pictures, *words)
    assert all(part in str(refusal.value) for part in says), refusal.value


def test_shards_are_counted(pictures: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    image = {"bytes": (pictures / "train" / "ant" / "000.JPEG").read_bytes(), "path": "a.jpg"}
    for name, labels in (("train-0", [0, 1]), ("train-1", [2, 0, 1]), ("validation", [2])):
        table = pyarrow.table({"image": [image] * len(labels), "label": labels})
        (tmp_path / "shards").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "shards" / f"{name}.parquet")
    spec = planned(tmp_path / "shards", "recipe.epochs=2", "recipe.samples=null")
    assert spec.science.dataset.classes == 3 and spec.science.schedule.total_samples == 10
    assert data.load(spec.science.dataset, spec.dataset_path).train.labels.sort().values.tolist() == [0, 0, 1, 1, 2]
    parquet.write_table(pyarrow.table({"label": [0]}), tmp_path / "shards" / "train-1.parquet")
    (tmp_path / "shards" / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(plan.PlanError, match="cannot read the column label"):
        planned(tmp_path / "shards")
