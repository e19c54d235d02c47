"""`scripts/fig1_panel.py`: pieces, however they end, lead to the runs that nobody disturbed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ENVIRONMENT, ROOT, rows

from scaling_exps import config, plan, records, train
from scaling_exps.launch import directories

WORDS = [
    "experiment=demo", "batch=[4,16]", "seed=[0,1]", "rule=sqrt", "model.width=4", "recipe.epochs=null",
    "recipe.samples=2000", "logger=none", "measure.evaluations=2", "launch.compile=false", "precision=float32",
]  # fmt: skip


def panel(tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, str(ROOT / "scripts/fig1_panel.py"), *WORDS, "runs_dir=runs", "--pack", "2", *more]
    return subprocess.Popen(
        argv, cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_pieces_killed_and_stopped_end_in_the_same_bits(tmp_path: Path) -> None:
    """One piece whose script is killed, one of three seconds, and one to the end, against the runs in a row. Fails if
    workers outlived their script, if a stop lost or doubled anything, if only one run went at a time."""
    specs = plan.plan(config.compose([*WORDS, "launch.devices=1"]))
    whole = directories.write(specs, tmp_path / "whole")
    torch.set_num_threads(1)
    assert all(train.run(d) == "finished" for d in whole.values())
    folders = [tmp_path / "runs" / s.run_id for s in specs]

    def held() -> list[Path]:
        return [d for d in folders if (d / "lock").exists() and records.holder(d)]

    process = panel(tmp_path)
    while len(busy := held()) < 2 or not all((d / "records.jsonl").exists() for d in busy):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert len(busy) == 2  # --pack
    process.kill()
    process.wait()
    limit = time.monotonic() + 20
    while held() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not held()  # nobody left who trains on
    saved = [d for d in folders if (d / "checkpoint.pt").exists()]
    assert len(saved) >= 2  # told of the script's death, they saved

    process = panel(tmp_path, "--minutes", "0.05")
    said = process.communicate()[0]
    assert process.returncode == 75, said
    assert said.count("started") == 2 and "left: " in said, said
    assert records.state(folders[2]) == "waiting", said  # the longest first, and those that had begun: batch 4

    process = panel(tmp_path, "--minutes", "3")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "4 runs: 4 finished, 0 unfinished" in said and "left: " not in said, said
    for run_dir in folders:
        reference = whole[run_dir.name]
        assert rows(run_dir) == rows(reference)
        mine, theirs = (torch.load(d / "checkpoint.pt", weights_only=True)["net"] for d in (run_dir, reference))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_flop_of_vgg16_are_those_of_its_layers() -> None:
    """A convolution is 2 C_in C_out 9 H W forward and twice that backward, without the gradient of the image and, its
    last layer being frozen, of that layer's weights."""
    found = importlib.util.spec_from_file_location("fig1_panel", ROOT / "scripts/fig1_panel.py")
    assert found is not None and found.loader is not None
    script = importlib.util.module_from_spec(found)
    sys.modules["fig1_panel"] = script  # dataclasses look their module up
    found.loader.exec_module(script)
    (spec,) = plan.plan(config.compose(["experiment=fig1_vgg16_adam", "batch=256", "seed=0", "launch.devices=1"]))
    assert spec.science.freeze_last
    layers, last = [], 3
    for side, widths in ((32, [64] * 2), (16, [128] * 2), (8, [256] * 3), (4, [512] * 3), (2, [512] * 3)):
        for width in widths:
            layers.append(2 * 9 * last * width * side**2)
            last = width
    assert script.flop_per_sample(spec) == 3 * sum(layers) - layers[0] + 2 * 2 * 512 * 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["experiment=fig1_vgg61_adam"], "did you mean 'fig1_vgg16_adam'?"),
        (["--pack", "0"], "--pack 0: give a number >= 1"),
        (["--minutes", "0"], "--minutes 0: give a finite number > 0"),
        (["launch=slurm"], "launch=local"),
        (["launch.devices=2"], "a panel runs on one"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, words: list[str], says: str) -> None:
    argv = [sys.executable, str(ROOT / "scripts/fig1_panel.py"), "recipe.micro_batch=1", *words]
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
