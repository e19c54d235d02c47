"""Helpers that several tests share: a way to plan and run real, tiny runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import msgspec
from forked import ENVIRONMENT, ROOT

from scaling_exps import config, plan
from scaling_exps.records import RunDir

TINY = [
    "model.width=4", "recipe.epochs=null", "recipe.samples=256", "logger=none", "recipe.statistics_samples=64",
    "measure.evaluations=2", "measure.noise_records=2",
]  # fmt: skip


def specs(*words: str) -> list[plan.RunSpec]:
    """Planned runs of the embedded default, made tiny; later words win."""
    last = {w.split("=", 1)[0]: w for w in [*TINY, *words]}
    return plan.plan(config.compose(list(last.values())))


def prepare(root: Path, spec: plan.RunSpec) -> RunDir:
    """The folder of a planned run, ready to be worked on."""
    run_dir = RunDir(root / spec.run_id)
    run_dir.prepare(spec)
    return run_dir


def placed(spec: plan.RunSpec, world: int) -> plan.RunSpec:
    """The same run on another number of processes."""
    total = spec.placement.world_size * spec.placement.accumulation
    placement = msgspec.structs.replace(spec.placement, world_size=world, accumulation=total // world)
    return msgspec.structs.replace(spec, placement=placement)


def weights(run_dir: RunDir) -> dict[str, Any]:
    """The network in the newest checkpoint: tensors by name."""
    import torch

    state: dict[str, Any] = torch.load(run_dir.newest, weights_only=True)["net"]
    return state


def same_run(a: RunDir, b: RunDir) -> None:
    """Assert that two runs hold the same records, each once, and the same weights, to the bit."""
    import torch

    assert rows(a) == rows(b) and not a.records().damaged
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def take_steps(trainer: Any, count: int) -> None:
    """Train on by `count` steps, as the loop does."""
    for _ in range(count):
        trainer.train_step()


def worker(run_dir: RunDir, processes: int = 1) -> list[str]:
    """Python's words that run a folder, one process or several; torchrun forks them, so that they import no torch."""
    if processes == 1:
        return ["-m", "scaling_exps.train", str(run_dir)]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--start-method=fork"]
    return [*start, "--run-path", str(ROOT / "scaling_exps/train/__main__.py"), str(run_dir)]


def work(run_dir: RunDir, processes: int = 1) -> None:
    """Run a folder to its end in processes of its own."""
    done = forked.run(worker(run_dir, processes))
    log = run_dir.log.read_text() if run_dir.log.exists() else ""
    assert done.returncode == 0, (done.stdout, done.stderr, log)


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own; whoever cannot mount one skips the test."""
    import pytest

    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """The records without their wall-clock field, the only one that two equal runs may differ in."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in run_dir.records().rows]


def scalerun(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a user gets who types `scalerun ...` in `cwd`."""
    return forked.run(["-m", "scaling_exps.cli", *words], cwd=cwd, env={**ENVIRONMENT, **environment})


def plan_json(*words: str, cwd: Path) -> list[dict[str, Any]]:
    """What `scalerun plan --json` prints."""
    done = scalerun("plan", "--json", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    described: list[dict[str, Any]] = json.loads(done.stdout)
    return described


def dataset(name: str, /, **changes: Any) -> Any:
    """The group conf/dataset/NAME.yaml as its struct, with some fields changed; imagefolder has three classes."""
    if name == "imagefolder":  # which is imagenet's group, and none before it is given its classes
        owned = {"name": name, "classes": 3, "revision": None, "train_size": None, "test_size": None}
        return msgspec.structs.replace(config.dataset("imagenet"), **owned | changes)
    return msgspec.structs.replace(config.dataset(name), **changes)


def write_pictures(root: Path, counts: dict[str, int]) -> Path:
    """Real JPEGs, each of its own size: counts[part] of each of 3 classes, below root/part/CLASS.

    Smooth random fields: in noise a resized crop would look like any other.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in counts.items():
        for name in ("ant", "bee", "cow"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                h, w = (int(n) for n in rng.integers(40, 120, 2))
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                coarse.resize((w, h), Image.Resampling.BICUBIC).save(root / part / name / f"{i:03d}.JPEG", quality=90)
    return root
