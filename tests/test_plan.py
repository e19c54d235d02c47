"""From words to RunSpecs: arithmetic, identity of runs, refusals. What a user types and gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from support import ENVIRONMENT, ROOT, plan_json, scalerun, specs

from scaling_exps import config, plan


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    (row,) = plan_json("model=resnet50", "batch=8192", cwd=tmp_path)
    assert (row["rule"], row["kappa"], row["base"]["batch"], row["base"]["lr"]) == ("sqrt", 32, 256, 1e-3)
    assert row["scaled"]["lr"] == pytest.approx(1e-3 * 32**0.5)
    assert row["scaled"]["betas"] == pytest.approx([1 - 0.032] * 2)
    assert row["scaled"]["eps"] == pytest.approx(1e-8 / 32**0.5)
    assert row["scaled"]["weight_decay"] == 1e-4
    assert row["scaled"]["steps"] == round(500 * 50000 / 8192)
    assert row["scaled"]["warmup_steps"] == pytest.approx(10 * 50000 / 8192, abs=0.01)
    place = row["placement"]
    assert place["world_size"] * place["micro_batch"] * place["accumulation"] == 8192
    assert list(tmp_path.iterdir()) == []  # planning leaves nothing behind


def test_run_id_is_what_is_executed() -> None:
    (a,), (b,) = specs("batch=4", "rule=sqrt"), specs("batch=4", "rule=none")
    assert a.run_id == b.run_id  # kappa = 1: every rule is the same run
    (a,), (b,) = specs("batch=16", "rule=sqrt"), specs("batch=16", "rule=none")
    assert a.run_id != b.run_id
    (c,) = specs("batch=16", "launch.devices=1", "checkpoint.minutes=1", "logger=wandb", "launch.compile=true")
    assert c.run_id == a.run_id  # placement and logging are not science
    ids = {
        s.run_id
        for w in ("seed=1", "recipe.lr=2e-3", "model.width=8", "precision=bfloat16")
        for s in specs("batch=16", w)
    }
    assert len(ids | {a.run_id}) == 5


def test_equal_science_is_one_run_with_two_arms() -> None:
    runs = specs("batch=[4,16]", "rule=[sqrt,none]", "seed=[0,1]")
    assert len(runs) == 2 + 4
    base = [r for r in runs if r.science.batch == 4]
    assert [sorted(a.rule for a in r.arms) for r in base] == [["none", "sqrt"]] * 2
    for run in runs:
        assert {a.base_run_id for a in run.arms} == {b.run_id for b in base if b.science.seed == run.science.seed}


def test_two_ways_to_the_same_hyperparameters_are_one_run() -> None:
    (a,) = specs("optimizer=sgd", "rule=linear", "batch=12", "recipe.micro_batch=4", "recipe.samples=48")
    (b,) = specs(
        "optimizer=sgd", "rule=none", "batch=12", "recipe.micro_batch=4", "recipe.samples=48", f"recipe.lr={0.02 * 3}"
    )
    assert a.science.hyper.lr == pytest.approx(b.science.hyper.lr)
    assert a.run_id == b.run_id


def test_run_json_round_trip() -> None:
    (spec,) = specs("batch=16", "svag=2")
    raw = json.loads(json.dumps(spec.to_json()))
    assert plan.RunSpec.from_json(raw) == spec
    raw["science"]["hyper"]["lr"] *= 2
    with pytest.raises(plan.PlanError, match="was edited"):
        plan.RunSpec.from_json(raw)
    with pytest.raises(plan.PlanError, match="version 999"):
        plan.RunSpec.from_json(raw | {"version": 999})


def test_svag_stretches_steps_and_the_schedule() -> None:
    (one,), (two,) = specs("recipe.samples=400"), specs("recipe.samples=400", "svag=2")
    assert two.science.steps == 4 * one.science.steps
    assert two.samples(two.science.steps) == 8 * one.samples(one.science.steps)  # 2 l^2 batches for one
    assert two.clock(two.science.steps) == one.clock(one.science.steps)
    assert two.science.schedule == one.science.schedule


def test_a_sweep_is_checked_before_it_starts(tmp_path: Path) -> None:
    done = scalerun("batch=[4,16,6400]", "rule=[sqrt,none]", "seed=[0,1]", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1  # the fault, once, though two seeds have it
    assert "kappa < 100 (batch < 400)" in done.stderr
    assert not (tmp_path / "runs").exists()


BAD = [
    ("batch=100", "nearest that fit: 64 and 128"),
    ("batch=0", "batch=0 must lie between 1"),
    ("batch=-4", "batch=-4 must lie between 1"),
    ("batch=99999999999", "must lie between 1"),
    ("batch=abc", "batch='abc' must be"),
    ("batch=[]", "batch=[] is empty"),
    ("batch=4096", "kappa < 100"),
    ("model=resnet5", "did you mean 'resnet56'"),
    ("dataset=mnist", "allowed: cifar10, digits"),
    ("optimizer=adamm", "did you mean 'adam'"),
    ("rule=sqr", "rules: sqrt, linear"),
    ("recipe=nope", "there are: cifar10-custom-adam"),
    ("modle=resnet8", "did you mean 'model'"),
    ("recipe.lrr=1", "did you mean 'recipe.lr'"),
    ("lr=0.1", "did you mean 'recipe.lr'"),
    ("runs_dir=", "give a folder"),
    ("recipe.lr=fast", "must be float"),
    ("recipe.lr=-1", "must be > 0"),
    ("recipe.betas=[0.9]", "takes 2 value(s)"),
    ("recipe.decay=inverse_sqrt recipe.warmup_fraction=0", "give recipe.warmup_fraction > 0"),
    ("recipe.gamma=0", "recipe.gamma=0.0 must lie in (0, 1]"),
    ("recipe.gamma=1.5", "recipe.gamma=1.5 must lie in (0, 1]"),
    ("recipe.samples=100", "give exactly one"),
    ("+foo=1", "keys cannot be added"),
    ("++batch=4", "keys cannot be added"),
    ("~seed", "keys cannot be added"),
    ("model=5", "must be a string"),
    ("seed=-1", "must lie between 0"),
    ("svag=0", "must be an integer >= 1"),
    ("launch.devices=3", "does not divide"),
    ("experiment=fig99", "unknown experiment"),
    ("batch=[4", ""),
    ("just-a-word", "neither key=value nor a command"),
    ("rule=linear,sqrt", "a list is written rule=[linear,sqrt]"),
]


@pytest.mark.parametrize(("word", "says"), BAD)
def test_bad_words_are_refused(word: str, says: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (each kind of refusal is one)
        plan.plan(config.compose(word.split()))
    assert isinstance(refusal.value, config.ConfigError | plan.PlanError)
    assert says in str(refusal.value)
    assert str(refusal.value).strip()


def test_a_refusal_is_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    for words in (
        ["modle=x"],
        ["batch=[4"],
        ["just-a-word"],
        ["plan", "+x=1"],
        ["status", "nowhere"],
        ["report", "nowhere"],
    ):
        done = scalerun(*words, cwd=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()
        assert list(tmp_path.iterdir()) == []


def test_hydras_own_words(tmp_path: Path) -> None:
    helped = scalerun("--help", cwd=tmp_path)
    assert helped.returncode == 0 and "scalerun plan" in helped.stdout and "resnet50" in helped.stdout
    shown = scalerun("--cfg", "job", "batch=16", cwd=tmp_path)
    assert shown.returncode == 0 and "batch: 16" in shown.stdout
    assert scalerun("--info", "defaults", cwd=tmp_path).returncode == 0
    swept = plan_json("-m", "model=resnet56,vgg16", "batch=[256,8192]", cwd=tmp_path)
    assert len(swept) == 4
    assert list(tmp_path.iterdir()) == []


def test_another_text_is_another_run_and_another_place_of_cifar10_is_not() -> None:
    def run_id(*words: str) -> str:
        (spec,) = plan.plan(config.compose(list(words)))
        return spec.run_id

    mine = ["model=gpt", "dataset=text"]
    assert run_id(*mine, "dataset.path=/a.txt") == run_id(*mine, "dataset.path=/b/../a.txt")
    assert run_id(*mine, "dataset.path=/a.txt") != run_id(*mine, "dataset.path=/b.txt")
    assert run_id("model=resnet50", "dataset.path=/a") == run_id("model=resnet50", "dataset.path=/b")


@pytest.mark.parametrize(
    "words",
    [
        ["runs_dir=ra,rb"],
        ["runs_dir=ra,rb", "batch=4,16"],
        ["launch.compile=false,true"],
        ["launch.parallel=1,2"],
        ["launch=local,slurm"],
        ["noise=na,nb"],
        ["logger=none,wandb"],
        ["checkpoint.minutes=1,2"],
        ["margin.train_loss=0.1,0.2"],
        ["dataset.path=a,b"],
    ],
)
def test_a_sweep_over_what_makes_no_other_run_is_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(plan.PlanError) as refusal:
        plan.plan(config.compose(["-m", *words]))
    key, values = words[0].replace(".train_loss", "").split("=")  # margins are told together
    said = str(refusal.value)
    assert said.lower().startswith(f"{key}=") and said.count("\n") == 0, said
    assert all(v in said.lower() for v in values.split(","))
    if key == "runs_dir":
        done = scalerun("-m", *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"scalerun: {said}\n")
        assert list(tmp_path.iterdir()) == []


def test_a_sweep_keeps_what_its_runs_differ_in_beside_the_science() -> None:
    runs = plan.plan(config.compose(["-m", "experiment=demo,fig1_vgg16_adam_small,fig1_ablations_vgg16_adam_small"]))
    assert len({str(r.margin) for r in runs}) == 2  # the last two share runs, and agree about them


def test_every_recipe_and_experiment_plans() -> None:
    for path in sorted((ROOT / "conf" / "recipe").glob("*.yaml")):
        dataset, model, optimizer = path.stem.split("-")
        words = [f"dataset={dataset}", f"model={model}", f"optimizer={optimizer}"]
        words += ["dataset.classes=2"] * (dataset == "imagefolder")
        assert plan.plan(config.compose(words)), path
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        (first, *_) = plan.plan(config.compose([f"experiment={path.stem}"]))
        assert first.experiment == path.stem
        header = path.read_text()
        assert "Command:" in header and "Cost:" in header and "Expected:" in header, path


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from scaling_exps import cli, config, rules, plan, launch, records, report; "
        "cli.main(['plan', '--json', 'batch=16']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_500_runs_by_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed by Hydra once: at 0.1 s a run the product would take minutes (bench/startup.py times it)."""
    composed, main = [], hydra.main
    monkeypatch.setattr(hydra, "main", lambda **words: composed.append(words) or main(**words))
    runs = specs(
        "batch=[8,16,32,64,128]", "rule=[sqrt,none,linear,linear_scaled]", f"seed={list(range(25))}".replace(" ", "")
    )
    assert len(runs) == 500
    assert len(composed) == 1
