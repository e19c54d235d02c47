"""launch.shard=true: weights, gradients and moments in parts over two processes."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from support import placed, prepare, rows, same_run, specs, work
from torch.utils._pytree import tree_flatten

from scaling_exps import config, plan
from scaling_exps.records import RunDir

WORDS = [
    "model=gpt", "dataset=stdlib", "dataset.context=64", "dataset.test_size=18", "model.layers=2", "model.width=32",
    "batch=16", "base=none", "recipe.micro_batch=4", "recipe.samples=128", "recipe.clip=0.5", "recipe.ema=0.9",
    "measure.noise=none", "measure.evaluations=2", "measure.train_records=4", "checkpoint.keep=[0.5]",
]  # fmt: skip


def close(run_dir: RunDir, other: RunDir) -> None:
    """Assert that records and checkpoints are the same to 1e-5, and of one shape."""
    for a, b in zip(rows(run_dir), rows(other), strict=True):
        assert a.pop("kind") == b.pop("kind") and a == pytest.approx(b, rel=1e-5)
    states = (torch.load(d.newest, weights_only=True) for d in (run_dir, other))
    (leaves, tree), (others, other_tree) = (
        tree_flatten({k: s[k] for k in ("net", "optimizer", "average")}) for s in states
    )
    assert tree == other_tree
    for x, y in zip(leaves, others, strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
        else:
            assert x == y


@pytest.mark.slow
def test_a_sharded_run_is_the_plain_one_and_goes_on(tmp_path: Path) -> None:
    """With clipping, averaged weights, tied weights and a test set that two processes cannot share evenly. Fails if a
    norm were of one part or counted what is whole twice, if a checkpoint held parts, or if parts were not put back."""
    (plain,) = specs(*WORDS)
    one = prepare(tmp_path / "one", plain)
    work(one)
    two = placed(plain, 2)
    cut = msgspec.structs.replace(two, placement=msgspec.structs.replace(two.placement, shard=True))
    assert cut.run_id == plain.run_id
    sharded = prepare(tmp_path / "two", cut)
    work(sharded, 2)
    close(sharded, one)
    (noisy,) = specs(*[w for w in WORDS if not w.startswith("measure.noise")], "measure.noise=full")
    measured = RunDir(shutil.copytree(sharded.path, tmp_path / "measured" / sharded.path.name))
    measured.prepare(noisy)
    work(measured, 2)
    assert not measured.lacks_noise(noisy)
    for begun, same in ((sharded, same_run), (one, close)):  # from a sharded checkpoint, and from a plain one
        again = RunDir(shutil.copytree(begun.path, tmp_path / begun.path.parent.name / "again" / begun.path.name))
        for file in (again.newest, again.previous, again.path / "result.json"):
            file.unlink()
        again.prepare(cut, elastic=True)
        assert again.kept()
        work(again, 2)
        if begun is one:
            assert [r["event"] for r in again.records().rows if r["kind"] == "event"] == ["world size"]
            again.path.joinpath("records.jsonl").write_text(
                "".join(
                    x for x in again.path.joinpath("records.jsonl").read_text().splitlines(True) if '"event"' not in x
                )
            )
        same(again, begun)


def test_what_cannot_be_sharded_is_refused() -> None:
    for words, said in (
        (["model=resnet8", "model.norm=batch"], "batch normalisation"),
        (["model=gpt", "dataset=stdlib", "optimizer=invariant_adam"], "optimizer=invariant_adam"),
        (["model=gpt", "dataset=stdlib", "measure.noise=full"], "measure.noise=full"),
    ):
        with pytest.raises(plan.PlanError, match=f"launch.shard=true.*{said}"):
            plan.plan(config.compose([*words, "launch.shard=true", "launch.devices=2"]))
    (spec,) = plan.plan(config.compose(["model=gpt", "dataset=stdlib", "launch.shard=true", "batch=16"]))
    assert spec.noise != "none"  # one process has nothing to share
