"""conf/: files that nothing reaches, and the script that compares two checkouts."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import ROOT

from scaling_exps import config
from scaling_exps.config import CONF
from scaling_exps.rules import OPTIMIZERS


def test_every_file_beside_a_recipe_is_reached() -> None:
    """Hydra passes over an optional file of a wrong name. Fails if numbers tuned for an optimizer were left out so."""
    recipes = CONF / "recipe"
    for path in recipes.glob("*/*.yaml"):
        optimizer = path.stem.rpartition("-")[2]
        recipe = (recipes / f"{path.parent.name}.yaml").read_text()
        assert OPTIMIZERS[optimizer].trainable, path
        assert f"optional {path.parent.name}@_here_: " in recipe, path
        assert re.search(rf"^optimizers: .*\b{optimizer}\b", recipe + path.read_text(), re.MULTILINE), path


def test_every_panel_is_reached() -> None:
    """Fails if a panel were named after no experiment or no model, so that its lists would be left out in silence."""
    for path in (CONF / "experiment" / "panel").glob("*.yaml"):
        experiment, _, model = path.stem.rpartition("-")
        assert (CONF / "experiment" / f"{experiment}.yaml").is_file(), path
        assert (CONF / "model" / f"{model}.yaml").is_file(), path
        assert f"model={model} " in (CONF / "experiment" / f"{experiment}.yaml").read_text(), path


@pytest.mark.parametrize(
    ("words", "network", "lr", "milestones"),
    [
        (["optimizer=rmsprop", "model=vgg16", "experiment=fig1"], "vgg16", 1e-3, [0.6, 0.8]),
        (["experiment=fig1", "recipe.lr=0.5", "model=resnet56", "optimizer=adam"], "resnet56", 0.5, [0.6]),
        (["model=resnet20", "experiment=fig1_small", "optimizer=rmsprop"], "resnet20", 7e-4, [0.6, 0.8]),
        (["dataset=imagenet", "model=timm", "optimizer=adamw"], "resnet18", 2.5e-4, []),
    ],
)
def test_words_win_over_an_experiment_in_any_order(
    words: list[str], network: str, lr: float, milestones: list[float]
) -> None:
    """Fails if an experiment's own network or optimizer beat the one that was typed, or numbers that are tuned for an
    optimizer beat a typed number."""
    for order in (words, words[::-1]):
        (composed,) = config.compose(order)
        assert composed.model.name == network and f"optimizer={composed.optimizer}" in words
        assert composed.recipe.lr == lr and composed.recipe.milestones_fraction == milestones


def test_files_that_comments_name_exist() -> None:
    """Fails if a comment sent its reader to a page or a file that is not in the project."""
    for path in CONF.rglob("*.yaml"):
        for comment in re.findall(r"#(.*)", path.read_text()):
            for name in re.findall(r"\b(?:docs|conf|scripts|slurm|scaling_exps)/[\w/.-]+\w", comment):
                assert (ROOT / name).exists(), f"{path} names {name}"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_checkouts", ROOT / "scripts" / "compare_checkouts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_checkouts_are_compared_to_the_last_bit(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the eight runs, this checkout against itself, then with one bit of a weight and of a record altered. Fails
    if a run could differ unseen, or a run that is kept were trained again."""
    case, words = "rmsprop-images-1", ["recipe.statistics_samples=64", "recipe.samples=256", "measure.evaluations=2"]
    words += ["measure.noise=none"]
    argv = [str(ROOT), str(ROOT), "--folder", str(tmp_path), "--cases", case]
    argv += ["--old-words", *words, "--new-words", *words]
    assert script.main(argv) == 0
    assert f"{case}: equal" in capsys.readouterr().out

    (run,) = (tmp_path / "new" / case).iterdir()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    name, weight = next((n, w) for n, w in state["net"].items() if w.is_floating_point())
    weight.view(torch.int32).flatten()[0] ^= 1
    torch.save(state, run / "checkpoint.pt")
    records = (run / "records.jsonl").read_text().splitlines()
    first = json.loads(records[0])
    (run / "records.jsonl").write_text(
        "\n".join([json.dumps(first | {"lr": first["lr"] * (1 + 2**-52)}), *records[1:]])
    )
    assert script.main(argv) == 1
    said = capsys.readouterr().out
    assert f"{case}: DIFFERENT" in said and f"weight {name}" in said and "record at step" in said


def test_a_checkout_that_cannot_run_is_said(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if runs that never finished counted as equal."""
    argv = [
        str(ROOT),
        str(ROOT),
        "--folder",
        str(tmp_path),
        "--cases",
        "adam-images-1",
        "--old-words",
        "recipe.betas=[0]",
    ]
    assert script.main(argv) == 2
    assert "not finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "text", "words", "says"),
    [
        ("recipe", "lr: 0.1", [], ["recipe.batch is missing: an integer in [1, 2^24] (global batch", "recipe.beta2 is",
                                   "recipe.statistics_samples is missing", "defaults: [NAME, _self_]"]),
        ("recipe", "lr: 0.1", ["recipe=mien"], ["no recipe 'mien' (did you mean 'mine'?)"]),
        ("experiment", "# @package _global_\ndefaults:\n  - override /modell: vit\n", [],
         ["unknown key 'modell' in the defaults of a file; did you mean 'model'?"]),
        ("experiment", "# @package _global_\ndefaults:\n  - override /model: vitt\n", [], ["did you mean 'vit'?"]),
        ("experiment", "defaults:\n  - override /model: vit\n", [], ["begins with `# @package _global_`"]),
        ("experiment", "# @package _global_\nbatchh: 4\nrecipe: {lrr: 1}\n", [], ["mean 'batch'", "mean 'recipe.lr'"]),
    ],
)  # fmt: skip
def test_files_of_ones_own_are_told_all_they_lack(
    group: str, text: str, words: list[str], says: list[str], tmp_path: Path
) -> None:
    """Fails if a fault came one at a time, without what the key means, or if files of one's own were not among those
    that could have been meant."""
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(text)
    with pytest.raises(config.ConfigError) as refusal:
        config.compose([*(words or [f"{group}=mine"]), "--config-dir", str(tmp_path)])
    assert all(part in str(refusal.value) for part in says), refusal.value
