"""`scalerun export`: what other programs load is the network that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import TINY, prepare, specs, weights

from scaling_exps import cli, config, data, models, plan, train
from scaling_exps.records import RunDir
from scaling_exps.train.export import ExportError, export

IMAGES = ["dataset=digits", "recipe=digits-small", "recipe.samples=64"]
TEXTS = ["dataset.context=16", "dataset.test_size=40", "model.width=16", "recipe.samples=64"]
RUNS = {
    "gpt": ["model=gpt", *TEXTS],
    "roberta": ["model=roberta", *TEXTS],
    "vit": ["model=vit", "model.options={img_size:8,patch_size:4,embed_dim:24,depth:2,num_heads:2}", *IMAGES],
    "batch norm": ["model=timm", "model.name=resnet10t", *IMAGES],
    "resnet8": IMAGES,
}
AUTO = {
    "gpt": "AutoModelForCausalLM", "roberta": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification",
    "batch norm": "AutoModelForImageClassification",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    root = tmp_path_factory.mktemp("runs")
    tiny = [w for w in TINY if not w.startswith("model.")]
    run_dirs = {}
    for name, words in RUNS.items():
        (spec,) = plan.plan(config.compose([*tiny, *words, "measure.noise=none"]))
        run_dirs[name] = prepare(root, spec)
    assert train.run_all(list(run_dirs.values()))
    return run_dirs


def ours(run_dir: RunDir) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network as it was trained, and test examples."""
    s = run_dir.spec().science
    net = models.build(s.model, s.dataset, s.seed, s.freeze_last)
    net.load_state_dict(weights(run_dir))
    return net.eval(), data.stream(s.dataset, None, s.seed, torch.device("cpu")).test_batch(0, 8)[0]


@pytest.mark.parametrize("name", AUTO)
def test_transformers_loads_the_network_that_was_trained(name: str, trained: dict[str, RunDir], tmp_path: Path) -> None:
    """Plainly called: fails, too, if RoBERTa's positions began elsewhere, or BatchNorm's statistics were lost."""
    import transformers

    assert cli.main(["export", str(trained[name]), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    theirs = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "out")
    net, x = ours(trained[name])
    with torch.no_grad():
        assert (theirs.eval()(x).logits - net(x)).abs().max() < 1e-6
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", RUNS)
def test_safetensors_hold_every_weight_once(name: str, trained: dict[str, RunDir], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_model

    print(export(trained[name], "safetensors", tmp_path / "out"))
    net, x = ours(trained[name])
    spec = trained[name].spec()
    fresh = models.build(spec.science.model, spec.science.dataset, 7)
    load_model(fresh, tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), net(x))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        said = f.metadata()
        assert sum(f.get_tensor(k).numel() for k in f.keys()) == sum(  # noqa: SIM118
            t.numel() for t in {id(t): t for t in net.state_dict(keep_vars=True).values()}.values()
        )
    assert said["run_id"] == spec.run_id and plan.RunSpec.from_json(json.loads(said["run.json"])) == spec


def test_nothing_is_overwritten_and_refusals_write_nothing(
    trained: dict[str, RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="gpt, roberta and those of timm"):
        export(trained["resnet8"], "hf", out)
    with pytest.raises(ExportError, match="no checkpoint"):
        export(prepare(tmp_path / "runs", specs("seed=5")[0]), "safetensors", out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    assert cli.main(["export", str(trained["gpt"]), "--to", "safetensors", "--out", str(out)]) == 2
    assert "there already" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]
