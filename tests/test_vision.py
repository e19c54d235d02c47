"""Image files decoded as they are needed; networks of timm and one's own; what is refused before the first step."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch
from PIL import Image
from support import scalerun, write_pictures
from torchvision.transforms import functional as tv

from scaling_exps import cli, config, data, models, plan, train
from scaling_exps.data import files

CPU = torch.device("cpu")
SHAPE = ["dataset.shape=[32,32,3]", "dataset.resize=36"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), {"train": 20, "val": 6})


@pytest.fixture(scope="module")
def parquet(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as the hub has them: shards below data/, the columns image and label."""
    import datasets

    root = tmp_path_factory.mktemp("parquet")
    (root / "data").mkdir()
    for part, name in (("train", "train"), ("val", "validation")):
        images = sorted((pictures / part).glob("*/*"))
        rows = {
            "image": [{"bytes": f.read_bytes(), "path": f.name} for f in images],
            "label": [["ant", "bee", "cow"].index(f.parent.name) for f in images],
        }
        kinds = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"])}
        )
        whole = datasets.Dataset.from_dict(rows, features=kinds)
        for k in range(2):
            whole.shard(2, k, contiguous=True).to_parquet(str(root / "data" / f"{name}-{k:05d}-of-00002.parquet"))
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small gain nothing from a second one, and a busy machine makes them wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def dataset(**changes: Any) -> Any:
    return support.dataset("imagefolder", **{"shape": [32, 32, 3], "resize": 36, **changes})


def stream(path: Path, seed: int = 0, **changes: Any) -> data.FileStream:
    one = data.stream(dataset(**changes), str(path), seed, CPU)
    assert isinstance(one, data.FileStream)
    return one


# ---- the stream ----


def test_samples_do_not_depend_on_the_micro_batch_or_on_prefetching(pictures: Path) -> None:
    """192 samples cross three epochs of 60. Fails if a draw depended on the slice, or a stale prefetch were used."""
    x, y = stream(pictures).batch(0, 192)
    assert x.shape == (192, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    for micro in (4, 16, 64):
        for ahead in (False, True):
            one, parts = stream(pictures), []
            for start in range(0, 192, micro):
                parts.append(one.batch(start, start + micro))
                if ahead:
                    one.prefetch(start + micro, start + 2 * micro)
            assert torch.equal(torch.cat([p for p, _ in parts]), x)
            assert torch.equal(torch.cat([q for _, q in parts]), y)
    one = stream(pictures)
    one.prefetch(64, 128)
    other = one.sibling(1, "train").batch(64, 128)[0]
    assert torch.equal(other, stream(pictures, seed=1).batch(64, 128)[0])  # its own, not what was prefetched here
    assert torch.equal(one.batch(0, 16)[0], x[:16])  # something else than what was prefetched
    assert not torch.equal(one.sibling(0, "noise").batch(0, 64)[0], x[:64])
    assert not torch.equal(stream(pictures, seed=1).batch(0, 64)[0], x[:64])


def test_every_image_is_seen_once_an_epoch_with_its_own_label_and_another_crop_the_next_time(pictures: Path) -> None:
    one = stream(pictures)
    first, second = one.indices(0, 60), one.indices(60, 120)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(60))
    names = [one.files.train.name(i) for i in first.tolist()]
    labels = one.batch(0, 60)[1].tolist()
    assert [["ant", "bee", "cow"].index(Path(n).parent.name) for n in names] == labels
    pixels = {i: one.pixels(k, k + 1)[0] for k, i in enumerate(first.tolist())}
    assert all(not torch.equal(one.pixels(60 + k, 61 + k)[0], pixels[i]) for k, i in enumerate(second.tolist()))


def test_a_sample_is_the_crop_that_torchvision_would_cut(pictures: Path) -> None:
    """Pixels against torchvision's resized_crop of the box that is drawn; flips are a half."""
    one = stream(pictures)
    pixels, rows, flips = one.pixels(0, 60)[0], one.indices(0, 60).tolist(), 0
    for k, (crop, flipped) in enumerate(one.crops(0, 60)):
        image = Image.open(one.files.train.name(rows[k])).convert("RGB")
        left, top, right, bottom = crop(*image.size)
        expected = tv.resized_crop(image, top, left, bottom - top, right - left, [32, 32])
        expected = tv.hflip(expected) if flipped else expected
        assert np.array_equal(pixels[k].numpy(), np.asarray(expected))
        flips += flipped
    assert 15 < flips < 45  # of 60: sd 3.9, four of them
    assert not any(f for _, f in stream(pictures, flip=False).crops(0, 60))


def test_crops_are_those_of_the_algorithm() -> None:
    """In a large image no try fails: area uniform in its range, log aspect uniform, the place uniform, all inside."""
    one = object.__new__(data.FileStream)
    data.Stream.__init__(one, 10, 1, 0, CPU)
    one.area, one.flip = [0.08, 0.5], True
    n, side = 4000, 10_000
    boxes = torch.tensor([crop(side, side) for crop, _ in one.crops(0, n)]).double()
    left, top, right, bottom = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (right <= side).all() and (bottom <= side).all()
    w, h = right - left, bottom - top
    free_x, free_y = left / (side - w), top / (side - h)
    uniform = {
        "area": ((w * h / side**2) - 0.08) / 0.42,
        "aspect": (torch.log(w / h) - np.log(3 / 4)) / np.log(16 / 9),
        "column": free_x,
        "row": free_y,
    }
    for name, u in uniform.items():
        u = u.sort().values
        distance = (u - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 2.2 / n**0.5, name  # Kolmogorov: p = 1e-4
    for a, b in (("area", "aspect"), ("column", "row"), ("area", "column")):
        assert abs(torch.corrcoef(torch.stack([uniform[a], uniform[b]]))[0, 1]) < 4 / n**0.5


def test_a_crop_that_never_fits_is_the_central_one() -> None:
    """torchvision's fallback: the whole height, and the widest allowed aspect, in the middle."""
    tries = [1.0] * files.TRIES, [1.0] * files.TRIES
    assert files.random_crop(400, 100, *tries, 0.9, 0.9) == (133, 0, 266, 100)
    assert files.random_crop(100, 400, *tries, 0.9, 0.9) == (0, 133, 100, 266)
    assert files.random_crop(100, 100, *tries, 0.9, 0.9) == (0, 0, 100, 100)
    assert files.random_crop(400, 100, [1.0, 0.25], [1.0, 1.0], 0.999, 0.0) == (300, 0, 400, 100)  # the second try


def test_a_test_image_is_torchvisions_resize_and_central_crop(pictures: Path) -> None:
    one = stream(pictures)
    x, y = one.test_batch(0, 250)
    assert x.shape == (18, 3, 32, 32) and len(y) == 18
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset().mean, dataset().std))
    for k in range(18):
        image = Image.open(one.files.test.name(k)).convert("RGB")
        expected = tv.to_tensor(tv.center_crop(tv.resize(image, 36), [32, 32]))
        assert torch.allclose(x[k], (expected - mean) / std, atol=1e-5)


def test_parquet_and_folder_are_the_same_data(pictures: Path, parquet: Path) -> None:
    for changes in ({}, {"train_size": 30, "test_size": 7}):
        a, b = stream(pictures, **changes), stream(parquet, **changes)
        assert (a.size, a.test_size) == (b.size, b.test_size)
        for one, other in zip(
            a.batch(20, 70) + a.test_batch(0, 18), b.batch(20, 70) + b.test_batch(0, 18), strict=True
        ):
            assert torch.equal(one, other)


def test_a_part_of_the_data_has_every_class(pictures: Path) -> None:
    """Files lie sorted by class: the first 20 of them would be one."""
    one = stream(pictures, train_size=20)
    assert set(one.files.train.labels.tolist()) == {0, 1, 2}
    whole = {stream(pictures).files.train.name(i) for i in range(20)}
    assert {one.files.train.name(i) for i in range(20)} == whole


def test_the_pool_is_this_process_share_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    for world, threads in (("1", 12), ("4", 3), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
        pool = files._pool.__wrapped__()
        assert pool._max_workers == threads
        pool.shutdown()


def words(pictures: Path, *more: str) -> list[str]:
    return [
        "model=timm", "model.name=resnet10t", "model.options={channels:[8,8,16,16],stem_width:8}",
        "dataset=imagefolder", f"dataset.path={pictures}", "dataset.classes=3", *SHAPE, "recipe.micro_batch=8",
        "recipe.samples=64", "logger=none", "recipe.statistics_samples=32", "measure.noise=none",
        "measure.evaluations=2", *more,
    ]  # fmt: skip


def planned(*given: str) -> plan.RunSpec:
    return plan.plan(config.compose(list(given)))[0]


def test_training_asks_ahead_for_what_it_then_reads(pictures: Path, tmp_path: Path) -> None:
    """Each batch after the first was prefetched: over micro-batches, SVAG's two draws and steps; none past the end."""
    for svag in (1, 2):
        spec = planned(*words(pictures, "batch=16", "recipe.batch=16", f"svag={svag}", "recipe.samples=32"))
        trainer = train.Trainer(spec)
        asked: list[tuple[int, int]] = []
        read: list[tuple[int, int]] = []
        ask, get = trainer.stream.prefetch, trainer.stream.batch
        trainer.stream.prefetch = lambda a, b, ask=ask, to=asked: (to.append((a, b)), ask(a, b))[1]  # type: ignore[method-assign]
        trainer.stream.batch = lambda a, b, get=get, to=read: (to.append((a, b)), get(a, b))[1]  # type: ignore[method-assign]
        for _ in range(spec.science.steps):
            trainer.train_step()
            trainer.optimizer.zero_grad()
        assert read == [(k, k + 8) for k in range(0, spec.science.samples(spec.science.steps), 8)]
        assert asked == read[1:]


def test_a_run_from_the_command_line(pictures: Path, tmp_path: Path) -> None:
    done = scalerun(*words(pictures), "runs_dir=runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"finished: .* accuracy", done.stdout)


def test_a_damaged_image_ends_the_run_with_its_name(pictures: Path, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", {"train": 4, "val": 2})
    bad = root / "train" / "bee" / "002.JPEG"
    bad.write_bytes(bad.read_bytes()[:-200])  # which the plan's look at its first bytes does not see
    done = scalerun(*words(root), cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"cannot decode image {bad}" in done.stderr and "another runs_dir" in done.stderr
    first = stream(root).files.test.name(0)
    Path(first).write_bytes(b"no image")
    done = scalerun(*words(root), "runs_dir=other", cwd=tmp_path)  # seen before anything is written
    assert done.returncode == 2 and f"{Path(first).relative_to(root)} is no picture" in done.stderr
    assert not (tmp_path / "other").exists()


def test_world_size_does_not_matter(pictures: Path) -> None:
    """Rank r of w reads its own slices of one stream: together what a single process reads."""
    whole = stream(pictures).batch(0, 64)[0]
    ranks = [stream(pictures) for _ in range(2)]
    for start in range(0, 64, 16):
        for rank, one in enumerate(ranks):
            at = start + 8 * rank
            assert torch.equal(one.batch(at, at + 8)[0], whole[at : at + 8])
            one.prefetch(at + 16, at + 24)


# ---- networks ----


def test_resnet50_has_its_imagenet_form_above_64_pixels() -> None:
    def stem(side: int) -> tuple[int, int]:
        net = models.build(
            config.ResNet50(name="resnet50", norm="batch"), dataset(shape=[side, side, 3], classes=1000), 0
        )
        return net.conv1.kernel_size[0], net.conv1.stride[0]  # type: ignore[union-attr,index,return-value]

    assert stem(224) == (7, 2) and stem(64) == (3, 1)


def test_options_reach_timm_added_or_replaced() -> None:
    """Hydra's struct mode refuses a new key in a dict; `options` takes what the network takes."""
    for word in ("model.options={drop_path_rate:0.1}", "model.options.drop_path_rate=0.1"):
        (composed,) = config.compose(["model=vit", word])
        assert composed.model.options == {"img_size": 32, "patch_size": 4, "drop_path_rate": 0.1}
    (composed,) = config.compose(["model=timm", "model.options={drop_path_rate:0.1}"])
    assert composed.model.options == {"drop_path_rate": 0.1}
    for word, says in (
        ("model.options.x=1", "unknown key 'model.options'; allowed: name, depth, width, norm"),
        ("model.optionss=1", "unknown key"),
    ):
        with pytest.raises(config.ConfigError, match=says):
            config.compose([word])
    with pytest.raises(config.ConfigError, match="must be keywords"):
        config.compose(["model=timm", "model.options=3"])


@pytest.mark.slow
def test_a_vit_takes_steps_on_cifar10(cifar10: str, tmp_path: Path) -> None:
    """Real images: from the loss of a guess, log 10, to below it."""
    spec = planned(
        "model=vit", "optimizer=adamw", f"dataset.path={cifar10}", "recipe.epochs=null", "recipe.samples=1920",
        "model.options={patch_size:8,embed_dim:48,depth:2,num_heads:3}", "recipe.lr=2e-3", "measure.noise=none",
    )  # fmt: skip
    trainer = train.Trainer(spec)
    losses = []
    for _ in range(spec.science.steps):
        before = float(trainer.loss_sum)
        trainer.train_step()
        losses.append(float(trainer.loss_sum) - before)
        trainer.optimizer.zero_grad()
    assert sum(losses[:5]) / 5 > 2.25 and sum(losses[-20:]) / 20 < 2.2


FACTORY = """
import torch
from torch import nn

def good(shape, classes, width=8):
    h, w, c = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(h * w * c, width), nn.ReLU(), nn.Linear(width, classes))

def raises(shape, classes):
    raise RuntimeError("no such thing")

def nothing(shape, classes):
    return 7

def wrong(shape, classes):
    return good(shape, classes)[:2]

def fails(shape, classes):
    class Net(nn.Module):
        def forward(self, x):
            return {}["logits"]
    return Net()

def answers(shape, classes):
    class Net(nn.Module):
        def forward(self, x):
            return {"logits": x}
    return Net()

def batch(shape, classes):
    h, w, c = shape
    return nn.Sequential(nn.BatchNorm2d(c), nn.Flatten(), nn.Linear(h * w * c, classes))
"""


def test_a_network_of_ones_own_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "nets.py").write_text(FACTORY)
    done = scalerun(
        "model=custom", "model.factory=mine.nets:good", "model.options={width:4}", "recipe.epochs=null",
        "recipe.samples=128", "logger=none", "batch=[4,8]", "launch.parallel=2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # this process and the workers find it


REFUSED = [
    (
        ["model=resnet50", "dataset=imagenet"],
        ["is not on this machine", "scalerun data imagenet", "gated", "hf auth login"],
    ),
    (["dataset=imagefolder", "model=timm"], ["needs dataset.path=FOLDER"]),
    (["model=timm", "model.name=resnet5O", "DIGITS"], ["no network of timm", "resnet50"]),
    (["model=timm", "model.name=vit_tiny_patch16_224", "model.norm=layer", "DIGITS"], ["cannot take inputs of shape"]),
    (["model=timm", "model.options={no_such_word:1}", "DIGITS"], ["timm cannot make 'resnet18'", "no_such_word"]),
    (["model=timm", "model.norm=layer", "DIGITS"], ["normalises over the batch", "Use model.norm=batch"]),
    (
        ["model=timm", "model.norm=bach", "DIGITS"],
        ["model.norm='bach' (did you mean batch?) must be one of batch, group, layer, none"],
    ),
    (["model=custom"], ["model.factory=None must be package.module:function"]),
    (["model=custom", "model.factory=nets"], ["model.factory='nets' must be package.module:function"]),
    (["model=custom", "model.factory=nowhere:f"], ["there is no module 'nowhere' here"]),
    (["model=custom", "model.factory=nets:absent"], ["has no attribute 'absent'; it has good, "]),
    (["model=custom", "model.factory=nets:raises"], ["RuntimeError: no such thing"]),
    (
        ["model=custom", "model.factory=nets:good", "model.options={depth:3}"],
        ["unexpected keyword argument 'depth'; it takes ("],
    ),
    (["model=custom", "model.factory=nets:nothing"], ["returned int, not a torch.nn.Module"]),
    (["model=custom", "model.factory=nets:wrong"], ["returns (1, 8) for one example", "(1, 10)"]),
    (["model=custom", "model.factory=nets:fails"], ["cannot take inputs of shape", "KeyError"]),
    (["model=custom", "model.factory=nets:answers"], ["cannot take inputs of shape", "'dict'"]),
    (["model=custom", "model.factory=nets:batch"], ["normalises over the batch", "Use model.norm=batch"]),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else None)
def test_bad_input_is_one_message_before_the_first_step(
    given: list[str], says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As in the command line, in this process for speed; DIGITS is a data set that needs no files."""
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALERUN_DATA", str(tmp_path / "home"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    embedded = ["dataset=digits", "recipe=digits-small"]
    typed = [w for word in given for w in (embedded if word == "DIGITS" else [word])]
    assert cli.main(typed) == 2
    message = capsys.readouterr().err
    assert message.startswith("scalerun: ") and len(message.splitlines()) == 1
    for part in says:
        assert part in message
    assert not (tmp_path / "runs").exists()


def test_bad_data_is_refused(pictures: Path, tmp_path: Path) -> None:
    def refused(path: Path, says: str, **changes: Any) -> None:
        with pytest.raises(data.DataError) as refusal:
            data.load(dataset(**changes), str(path))
        assert says in str(refusal.value)

    refused(pictures, "dataset.classes=2: the train images have labels from 0 to 2", classes=2)
    refused(pictures, "dataset.train_size=61: there are only 60 train images", train_size=61)
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "train/CLASS/*.jpg")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    refused(tmp_path, "no images in")  # no test part
    (tmp_path / "val" / "ant").mkdir(parents=True)
    refused(tmp_path, "no image in", name="imagenet")
    (tmp_path / "val" / "dog").mkdir()
    refused(tmp_path, "has the class 'dog'", train_size=1)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    refused(tmp_path, "no validation*.parquet", train_size=2)
    (tmp_path / "validation-0.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    refused(tmp_path, "cannot read columns image and label", train_size=3)


def test_a_parquet_row_that_is_no_image_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = io.BytesIO()
    Image.new("L", (50, 40), 128).save(raw, "PNG")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part, broken in (("train", b"no image"), ("validation", raw.getvalue())):
        images = [{"bytes": b, "path": f"{k}.png"} for k, b in enumerate((raw.getvalue(), broken))]
        pq.write_table(
            pa.table({"image": pa.array(images, kind), "label": [0, 1]}), tmp_path / f"{part}-00000-of-00001.parquet"
        )
    one = stream(tmp_path)
    assert one.test_batch(0, 2)[0].shape == (2, 3, 32, 32)  # grey becomes RGB
    with pytest.raises(data.DataError, match=r"cannot decode image 1\.png \(row 1\) of .*train\*\.parquet"):
        one.batch(0, 2)
