"""From words to RunSpecs: arithmetic, identity of runs, roles, refusals. What a user types and gets."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ENVIRONMENT, ROOT, plan_json, scalerun, specs, write_pictures

from scaling_exps import cli, config, plan
from scaling_exps.rules import OPTIMIZERS, RULES

EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))


@cache
def planned(*words: str) -> list[plan.RunSpec]:
    return plan.plan(config.compose(list(words)))


@cache
def embedded() -> config.Config:
    """What `scalerun` alone composes."""
    (composed,) = config.compose([])
    return composed


def run_id(*words: str) -> str:
    (spec,) = planned(*words)
    return spec.run_id


def roles(*words: str) -> dict[str, str]:
    """Rule -> role, of the runs away from the base batch."""
    return {a.rule: a.role for s in planned(*words) for a in s.arms if a.kappa != 1}


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    (row,) = plan_json("model=resnet50", "batch=8192", cwd=tmp_path)
    assert (row["rule"], row["role"], row["kappa"]) == ("sqrt", "rule", 32)
    assert (row["base"]["batch"], row["base"]["lr"]) == (256, 1e-3)
    assert row["scaled"]["lr"] == pytest.approx(1e-3 * 32**0.5)
    assert row["scaled"]["betas"] == pytest.approx([1 - 0.032] * 2)
    assert row["scaled"]["eps"] == pytest.approx(1e-8 / 32**0.5)
    assert row["scaled"]["weight_decay"] == 1e-4
    assert row["scaled"]["steps"] == round(500 * 50000 / 8192)
    assert row["scaled"]["warmup_steps"] == pytest.approx(10 * 50000 / 8192, abs=0.01)
    place = row["placement"]
    assert place["world_size"] * place["micro_batch"] * place["accumulation"] == 8192
    assert list(tmp_path.iterdir()) == []  # planning leaves nothing behind


# ---- identity ----


@pytest.mark.parametrize(
    "words",
    [
        "launch.devices=1 launch.compile=true launch.parallel=2",
        "checkpoint.minutes=1 checkpoint.keep=[0.5]",
        "logger=wandb wandb.project=p wandb.tags=[a]",
        "measure.noise=full measure.evaluations=3 measure.train_records=7 measure.noise_records=2",
        "margin.test_accuracy=0.1 noise_scale=100 runs_dir=elsewhere tested=[none]",
        "launch=slurm launch.max_devices=1",
    ],
)
def test_what_decides_no_number_is_not_in_the_run_id(words: str) -> None:
    """Fails if placement, measuring, checkpoints, wandb or a rule's name were part of a run's identity."""
    assert run_id("batch=16", *words.split()) == run_id("batch=16")


def test_what_decides_numbers_is_in_the_run_id() -> None:
    words = [
        "seed=1", "recipe.lr=2e-3", "model.width=8", "precision=bfloat16", "dataset.label_noise=0.1", "batch=32",
        "recipe.micro_batch=8", "recipe.statistics_samples=64", "recipe.freeze_last=true", "svag=2", "duration=2",
        "dataset.train_size=1000", "optimizer=adamw", "rule=none",
    ]  # fmt: skip
    ids = {run_id(*({"batch": "batch=16"} | {w.split("=")[0]: w}).values()) for w in words}
    assert len(ids | {run_id("batch=16")}) == len(words) + 1


@pytest.mark.parametrize(
    ("flags", "precision", "says"),
    [
        ("flags\t: fpu avx512f avx512_bf16 amx_tile", "bfloat16", "bfloat16, this CPU has avx512_bf16"),
        ("flags\t: fpu avx2", "float32", "float32, this CPU has no instructions for bfloat16"),
    ],
)
def test_precision_auto_is_what_the_cpu_has_instructions_for(
    flags: str, precision: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is the one that names the precision. Fails if `auto` stood in its science, or were not told."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(plan.expand, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(plan.expand, "_gpus", lambda: 0)
    (found,) = plan.plan(config.compose(["batch=16", "precision=auto"]))  # `planned` remembers
    assert found.run_id == run_id("batch=16", f"precision={precision}")
    assert any(f"precision=auto: {says}" == note for note in found.notes)
    with pytest.raises(plan.PlanError, match="the jobs run on others: give float32 or bfloat16"):
        planned("precision=auto", "launch=slurm")


def test_content_is_identity_and_its_place_is_not(tmp_path: Path) -> None:
    """Two texts at one place are two runs, one text at two places is one; of cifar10 the name says all."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("one text " * 50)
    text = ["model=gpt", "dataset=text"]
    first = run_id(*text, f"dataset.path={tmp_path}/a/x.txt")
    assert run_id(*text, f"dataset.path={tmp_path}/b/x.txt") == first
    (tmp_path / "a" / "x.txt").write_text("two texts" * 50)
    planned.cache_clear()
    assert run_id(*text, f"dataset.path={tmp_path}/a/x.txt") != first
    assert run_id("model=resnet50", "dataset.path=/a") == run_id("model=resnet50", "dataset.path=/b")


def test_at_the_base_batch_every_rule_is_one_run() -> None:
    base = planned("batch=4", "rule=[sqrt,none,linear,lr_only,linear_scaled]")
    assert [a.rule for a in base[0].arms] == ["sqrt", "none", "linear", "lr_only", "linear_scaled"]
    assert len(base) == 1
    assert {a.role for a in base[0].arms} == {"base"}
    assert run_id("batch=16", "rule=sqrt") != run_id("batch=16", "rule=none")


def test_equal_science_is_one_run_with_two_arms() -> None:
    runs = planned("batch=[4,16]", "rule=[sqrt,none]", "seed=[0,1]")
    assert len(runs) == 2 + 4
    base = [r for r in runs if r.science.batch == 4]
    assert [sorted(a.rule for a in r.arms) for r in base] == [["none", "sqrt"]] * 2
    for run in runs:
        assert {a.base_run_id for a in run.arms} == {b.run_id for b in base if b.science.seed == run.science.seed}


def test_two_ways_to_the_same_hyperparameters_are_one_run() -> None:
    words = ["optimizer=sgd", "batch=12", "recipe.micro_batch=4", "recipe.epochs=null", "recipe.samples=48"]
    (a,), (b,) = planned(*words, "rule=linear"), planned(*words, "rule=none", f"recipe.lr={0.02 * 3}")
    assert a.science.hyper.lr == pytest.approx(b.science.hyper.lr)
    assert a.run_id == b.run_id


# ---- run.json ----


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plans_and_its_runs_survive_json(experiment: str) -> None:
    """Fails for a field whose type JSON does not give back (a tuple, an int for a float), or for data that planning
    would have to read: nothing but the embedded data sets is needed."""
    for spec in planned(f"experiment={experiment}"):
        assert spec.experiment == experiment
        assert plan.RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@settings(deadline=None, max_examples=100)
@given(
    lr=st.floats(1e-12, 1e3), eps=st.floats(0, 1), epochs=st.floats(1, 100), seed=st.integers(0, 2**31 - 1),
    optimizer=st.sampled_from(["adam", "adamw", "rmsprop", "paper_adam", "paper_rmsprop"]),
    batch=st.sampled_from([4, 16, 64]), svag=st.sampled_from([1, 2]),
)  # fmt: skip
def test_run_json_gives_back_any_spec(lr: float, eps: float, epochs: float, seed: int, **words: Any) -> None:
    """Fails if a float lost a digit on its way, or if the run id depended on what JSON does to a number."""
    decay = 0.0  # SVAG knows no decoupled decay
    recipe = msgspec.structs.replace(embedded().recipe, lr=lr, eps=eps, epochs=epochs, decoupled_decay=decay)
    (spec,) = plan.plan([msgspec.structs.replace(embedded(), recipe=recipe, seed=seed, **words)])
    assert plan.RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "version 1, this scalerun reads version 2: use the scalerun that wrote it, or another"),
        ({"version": None}, "version None"),
        ({"run_id": "0" * 12}, "it was edited; plan anew"),
        ({"science.hyper.lr": 0.5}, "it was edited; plan anew"),
        ({"science.hyper.lr": -1.0}, "not one that this scalerun wrote"),
        ({"science.steps": "many"}, "not one that this scalerun wrote"),
        ({"placement.world_size": "2"}, "not one that this scalerun wrote"),
        ({"placement.world_size": 0}, "not one that this scalerun wrote"),
        ({"arms": []}, "names no arm"),
        ({"extra": 1}, "not one that this scalerun wrote"),
        ({"science": None}, "not one that this scalerun wrote"),
        ({"arms.0.duration": 1e308}, "not one that this scalerun wrote"),
        ({"margin": {"test_loss": math.nan}}, "not one that this scalerun wrote"),
        ({"margin": {"test_loss": math.inf}}, "not one that this scalerun wrote"),
    ],
)
def test_another_or_an_edited_run_json_is_refused(change: dict[str, Any], says: str) -> None:
    raw = json.loads(json.dumps(planned("batch=16")[0].to_json()))
    for path, value in change.items():
        *groups, last = path.split(".")
        node = raw
        for group in groups:
            node = node[int(group) if group.isdigit() else group]
        node[last] = value
    with pytest.raises(plan.PlanError, match=says):
        plan.RunSpec.from_json(raw)


# ---- arithmetic ----


def test_svag_stretches_steps_and_the_schedule() -> None:
    (one,), (two,) = specs("recipe.samples=400"), specs("recipe.samples=400", "svag=2")
    a, b = one.science, two.science
    assert b.steps == 4 * a.steps
    assert b.samples(b.steps) == 8 * a.samples(a.steps)  # 2 l^2 batches for one
    assert b.clock(b.steps) == a.clock(a.steps)
    assert b.schedule == a.schedule
    assert two.chunks == 2 * one.chunks


@pytest.mark.parametrize(
    ("words", "formula", "noted"),
    [
        (["batch=64", "recipe.samples=90"], "same, to whole steps", True),  # 88 -> 64 of 90
        (["batch=64", "recipe.samples=40"], "same, to whole steps", True),
        (["batch=64", "recipe.samples=6400"], "same", False),
        (["batch=64", "recipe.samples=6400", "duration=2"], "δ·samples", False),
        (["batch=4", "recipe.samples=6400", "duration=2"], "δ·samples", False),
        (["batch=64", "recipe.samples=6420"], "same, to whole steps", False),  # 6,420 -> 6,400, by 0.3%
    ],
)
def test_samples_that_rounding_changes_are_told(
    words: list[str], formula: str, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the plan said "same" of fewer samples, or spoke of δ where no duration was given (defect 8)."""
    runs = planned("recipe.epochs=null", "recipe.micro_batch=4", *words)
    plan.print_plan(runs, full=True)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("samples ")]
    assert line.split("  ")[-1].strip() == formula
    assert ("whole steps of" in printed) == noted


def test_noise_auto_is_full_where_a_step_has_one_gradient() -> None:
    assert planned("batch=4")[0].noise == "full"
    assert planned("batch=128")[0].noise == "free"  # two micro-batches of 64
    assert planned("batch=4", "measure.noise=none")[0].noise == "none"
    assert planned("batch=4", "dataset.train_size=4", "recipe.epochs=500")[0].noise == "free"  # too few for full


@pytest.mark.parametrize(("cuda", "world"), [("None", 1), ("'13.0'", 2)])
def test_devices_auto_counts_cards_only_with_a_torch_that_can_use_them(cuda: str, world: int, tmp_path: Path) -> None:
    """Fails if a CPU build of torch on a machine with cards were given a process a card (defect 19)."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('planning imports no torch')")
    (tmp_path / "torch" / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda}\n")
    (row,) = plan_json_with(tmp_path, CUDA_VISIBLE_DEVICES="0,1,-1,2")
    assert row["placement"]["world_size"] == world


def test_more_processes_than_cards_are_refused_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if only the launch said so. Without a card a process is one of the CPU, and SLURM's are elsewhere."""
    two = ["batch=128", "launch.devices=2"]
    monkeypatch.setattr("scaling_exps.plan.expand._gpus", lambda: 1)
    with pytest.raises(plan.PlanError, match=r"launch.devices=2, and this machine shows 1 GPU\(s\); allowed: 1 to 1"):
        planned(*two)
    assert planned("launch=slurm", *two)[0].placement.world_size == 2
    monkeypatch.setattr("scaling_exps.plan.expand._gpus", lambda: 0)
    assert planned(*two)[0].placement.world_size == 2


def plan_json_with(path: Path, **environment: str) -> list[dict[str, Any]]:
    """`scalerun plan --json batch=128` (two micro-batches), with `path` before the installed packages."""
    env = {**ENVIRONMENT, **environment, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    code = "from scaling_exps import config, plan; import json, sys; specs = plan.plan(config.compose(['batch=128'])); "
    code += "print(json.dumps([row for s in specs for row in plan.describe(s)]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


# ---- roles ----


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ("rule=sqrt", "rule"),
        ("rule=linear", "control"),
        ("rule=linear optimizer=sgd", "rule"),
        ("rule=linear_momentum optimizer=sgd", "rule"),
        ("rule=completed optimizer=adamw", "rule"),
        ("rule=adamw_timescale optimizer=adamw", "rule"),
        ("goal=best noise_scale=100", "rule"),
        ("goal=best noise_scale=100 optimizer=sgd", "rule"),
        ("rule=none", "control"),
        ("rule=sqrt_without_eps", "control"),
        ("rule=none tested=[none]", "rule"),
        ("rule=sqrt tested=[none]", "control"),
    ],
)
def test_the_role_of_an_arm_follows_from_goal_and_experiment(words: str, role: str) -> None:
    """Fails if a role hung on a rule's name: `completed`, `linear_momentum` and goal=best rules were controls once."""
    assert list(roles("batch=16", *words.split()).values()) == [role]


def test_every_default_rule_answers_its_goal() -> None:
    for optimizer in OPTIMIZERS.values():
        for goal in ("match", "best"):
            if (name := getattr(optimizer, goal)) is not None:
                assert RULES[name].goals[optimizer.family] == goal, (optimizer.name, name)


def test_svag_at_the_base_batch_tests_the_sde() -> None:
    (run,) = planned("svag=2", "rule=none")
    assert [a.role for a in run.arms] == ["rule"]
    assert roles("svag=2", "batch=16", "rule=none") == {"none": "control"}


def test_linear_is_a_control_for_adam_in_the_plan_and_in_the_rules_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the plan again called it the answer to goal=match for Adam (defect 5)."""
    plan.print_plan(planned("batch=16", "rule=linear"))
    assert "rule linear is a control for adaptive optimizers" in capsys.readouterr().out
    plan.print_plan(planned("batch=16", "rule=linear", "optimizer=sgd"))
    assert "rule linear (settled) answers goal=match" in capsys.readouterr().out
    section = (ROOT / "docs" / "rules.md").read_text().split("\n## linear\n")[1].split("\n## ")[0]
    assert "For adaptive, invariant, sign optimizers it answers `control`" in section
    assert "For sgd optimizers it answers `match`" in section


def test_a_rule_of_another_package_is_under_test(tmp_path: Path) -> None:
    """A real distribution on the path names it by entry point. Fails if only scalerun's own rules could be tested."""
    (tmp_path / "cubic.py").write_text(
        "from scaling_exps.rules import Powers\n"
        "rule = Powers(name='cubic', goals={'adaptive': 'best'}, evidence='experimental', because='a test',\n"
        "              source='a test', conditions='none', leaves_alone='the betas', lr=1 / 3)\n"
    )
    info = tmp_path / "cubic-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cubic\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[scalerun.rules]\ncubic = cubic:rule\n")
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = scalerun("plan", "--json", "batch=32", "rule=[cubic,none]", "base=none", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    cubic, none = json.loads(done.stdout)
    assert (cubic["rule"], cubic["role"], none["role"]) == ("cubic", "rule", "control")
    assert cubic["scaled"]["lr"] == pytest.approx(1e-3 * 2)


# ---- refusals ----

REFUSED: list[tuple[str, list[str]]] = [
    # one value of the wrong type or range: given, allowed
    ("batch=0", ["batch=0 must be an integer in [1, 2^24], or a list"]),
    ("batch=-4", ["batch=-4 must be"]),
    ("batch=99999999999", ["batch=99999999999 must be"]),
    ("batch=1e20", ["batch=1e+20 must be an integer"]),
    ("batch=16.5", ["batch=16.5 must be an integer"]),
    ("batch=true", ["batch=True must be"]),
    ("batch=abc", ["batch='abc' must be"]),
    ("batch=", ["batch='' must be"]),
    ("batch=[]", ["batch=[] is empty: give at least one value"]),
    ("""'batch="[4,16]"'""", ["batch='[4,16]' must be", "without the inner quotes it is a list"]),
    ("seed=-1", ["seed=-1 must be an integer in [0, 2^31)"]),
    ("seed=0.5", ["seed=0.5 must be"]),
    ("seed=null", ["seed=None must be"]),
    ("svag=0", ["svag=0 must be an integer in [1, 1000]"]),
    ("rule=", ["rule='' must be text that is not empty"]),
    ("rule=[5]", ["rule=[5] must be"]),
    ("tested=sqrt", ["tested='sqrt' must be a list"]),
    ("goal=fastest", ["must be one of match, best"]),
    ("beta_map=log", ["must be one of linear, power"]),
    ("precision=[float32]", ["must be one of float32, bfloat16"]),
    ("runs_dir=", ["runs_dir='' must be text that is not empty"]),
    ("noise_scale=-1", ["noise_scale=-1 must be a number in (0, 10^15]"]),
    ("noise_scale=nan", ["noise_scale=nan must be"]),
    ("duration=0", ["duration=0 must be a number in (0, 10^6]"]),
    ("duration=1e300", ["duration=1e+300 must be a number in (0, 10^6]"]),
    ("duration=nan", ["duration=nan must be"]),
    ("recipe.lr=fast", ["recipe.lr='fast' must be a number"]),
    ("recipe.lr=-1", ["recipe.lr=-1 must be a number in (0, 10^6]"]),
    ("recipe.lr=1e300", ["recipe.lr=1e+300 must be"]),
    ("recipe.lr=inf", ["recipe.lr=inf must be"]),
    ("recipe.lr=[1,2]", ["recipe.lr=[1, 2] must be a number"]),
    ("recipe.batch=[4]", ["recipe.batch=[4] must be an integer"]),
    ("recipe.beta1=1", ["recipe.beta1=1 must be a number in [0, 1), or null"]),
    ("recipe.gamma=0", ["recipe.gamma=0 must be a number in (0, 1]"]),
    ("recipe.optimizers=[adam,lion]", ["must be a list of at least one, each one of adam, adamw"]),
    ("model.width=abc", ["model.width='abc' must be an integer in [1, 65536]"]),
    ("model.width=", ["model.width='' must be an integer"]),
    ("model.width=1e20", ["model.width=1e+20 must be an integer"]),
    ("model.width=99999999999999999999", ["must be an integer in [1, 65536]"]),
    ("model.depth=9", ["model.depth=9 must be 6n + 2: 8, 14, 20"]),
    ("model=gpt model.layers=two", ["model.layers='two' must be an integer in [1, 10000]"]),
    ("model=gpt model.dropout=high", ["model.dropout='high' must be a number in [0, 1)"]),
    ("model=gpt model.heads=5", ["model.width=64 must be a multiple of model.heads=5"]),
    ("model=resnet20 dataset=digits recipe=digits-small model.norm=group model.width=18",
     ["model.width=18 must be a multiple of 4"]),
    ("model=timm model.options=[1]", ["model.options=[1] must be keywords {KEY:VALUE}"]),
    ("model=timm model.options={a:nan}", ["model.options={'a': nan} must be"]),
    ("model=custom model.factory=nope", ["model.factory='nope' must be package.module:function"]),
    ("dataset.std=[.nan]", ["dataset.std=['.nan'] must be a list"]),
    ("dataset.std=[nan]", ["dataset.std=[nan] must be a list"]),
    ("dataset.mean=[0.1,0.2]", ["must have 1 values each (channels)"]),
    ("dataset=imagefolder dataset.classes=1", ["dataset.classes=1 must be >= 2"]),
    ("measure.evaluations=0", ["measure.evaluations=0 must be"]),
    ("measure=5", ["measure=5 must be given by its keys: measure.evaluations"]),
    ("margin=auot", ["margin='auot' must be given by its keys: margin.auto, margin.test_accuracy"]),
    ("margin.trajectory=0", ["margin.trajectory=0 must be"]),
    ("checkpoint.minutes=1e300", ["checkpoint.minutes=1e+300 must be a number in (0, 10^6]"]),
    ("checkpoint.keep=[2]", ["checkpoint.keep=[2] must be a list, each number in (0, 1]"]),
    ("wandb.tags=a", ["wandb.tags='a' must be a list, each text"]),
    ("launch.devices=two", ["launch.devices='two' must be an integer", "or auto"]),
    ("launch.parallel=0", ["launch.parallel=0 must be"]),
    ("launch=slurm launch.minutes=1 launch.signal_seconds=60", ["must be below the time limit, 60 s"]),
    # keys and options that do not exist, and what was meant
    ("modle=resnet8", ["unknown key 'modle'; did you mean 'model'?"]),
    ("lr=0.1", ["unknown key 'lr'; did you mean 'recipe.lr'?"]),
    ("recipe.lrr=1", ["did you mean 'recipe.lr'?"]),
    ("recipe.betas=[0.9]", ["unknown key 'recipe.betas'", "recipe.beta1, recipe.beta2, recipe.momentum"]),
    ("recipe.weight_decay=0.1", ["recipe.l2 (inside the gradient), recipe.decoupled_decay (adamw)"]),
    ("weight_decay=0.1", ["recipe.l2 (inside the gradient), recipe.decoupled_decay (adamw)"]),
    ("model.widht=4", ["did you mean 'model.width'?"]),
    ("dataset.shfit=1", ["did you mean 'dataset.shift'?"]),
    ("measure.noise_recrods=1", ["did you mean 'measure.noise_records'?"]),
    ("margin.accuracy=1", ["did you mean 'margin.test_accuracy'?"]),
    ("checkpoint.minute=1", ["did you mean 'checkpoint.minutes'?"]),
    ("wandb.projekt=1", ["did you mean 'wandb.project'?"]),
    ("launch.device=1", ["did you mean 'launch.devices'?"]),
    ("words=[a]", ["unknown key 'words'"]),
    ("=", ["stands for nothing"]),
    ("model=resnet5", ["did you mean 'resnet56'", "allowed: custom, gpt"]),
    ("model=5", ["unknown model '5'; allowed: custom"]),
    ("model=null", ["unknown model 'null'; allowed: custom"]),
    ("model=[resnet8]", ["unknown model '[resnet8]'"]),
    ("dataset=mnist", ["allowed: cifar10, digits"]),
    ("optimizer=adamm", ["did you mean 'adam'"]),
    ("model=vit model.width=4", ["unknown key 'model.width'", "only of kind resnet, vgg16, gpt, roberta"]),
    ("recipe=nope", ["no recipe 'nope'", "cifar10-resnet", "--config-dir DIR"]),
    ("model=resnet20 dataset=digits", ["no recipe 'digits-resnet'", "digits-small"]),
    ("experiment=fig99", ["unknown experiment 'fig99'", "allowed: beta1_small, breaking_invariant_mid"]),
    ("model.kind=gpt", ["choose one with model=NAME"]),
    ("dataset.name=cifar10", ["choose one with dataset=NAME"]),
    ("launch.name=slurm", ["choose one with launch=NAME"]),
    ("rule=sqr", ["rules: sqrt, linear"]),
    ("tested=[sqr]", ["tested: unknown rule 'sqr'; rules: sqrt"]),
    # Hydra's grammar
    ("+foo=1", ["'+foo=1': keys cannot be added"]),
    ("++batch=4", ["keys cannot be added"]),
    ("~seed", ["keys cannot be added or removed"]),
    ("batch=[4", ["'batch=[4' cannot be read", "a list is written key=[1,2]"]),
    ("rule=\"'x\"", ["cannot be read", "in quotes"]),
    ("just-a-word", ["neither key=value nor a command"]),
    ("batch=256,512", ["a list is written batch=[256,512]; or sweep with -m"]),
    ("--", ["'--' stands for nothing"]),
    ("batch=4 :", ["':' is neither key=value nor a command"]),
    ("batch=4 weak/", ["'weak/' is neither key=value nor a command"]),
    ("optimizer=[adam,1]", ["unknown optimizer '[adam,1]' (did you mean 'adam'?); allowed: adam, "]),
    ("launch=[local,1.5]", ["unknown launch '[local,1.5]' (did you mean 'local'?); allowed: local, slurm"]),
    ("model={a:1}", ["unknown model '{a:1}'; allowed: custom, "]),
    ("model=", ["unknown model ''; allowed: custom, "]),
    ("-- batch=16", ["'--' stands for nothing"]),
    ("--experimental-rerun job.pickle", ["'--experimental-rerun' is not supported"]),
    ("--exp=job.pickle", ["is not supported"]),
    ("hydra.run.dir=elsewhere", ["'hydra.run.dir=elsewhere'", "not the user's to set"]),
    ("-m hydra.sweep.dir=elsewhere", ["not the user's to set"]),
    ("hydra.output_subdir=x hydra.job.chdir=true hydra/launcher=basic +hydra.x=1", ["hydra.job.chdir=true"]),
    # what several keys make wrong together
    ("batch=100", ["no multiple of the micro-batch 64; nearest that fit: 64 and 128"]),
    ("batch=4096", ["kappa < 100 (batch < 400)", "The largest legal batch is 399"]),
    ("launch.devices=3", ["launch.devices=3 does not divide the 1 micro-batches of a step; allowed: 1"]),
    ("recipe.samples=100", ["give exactly one, the other null"]),
    ("recipe.epochs=null", ["give exactly one, the other null"]),
    ("recipe.epochs=1e-9", ["is no sample", "give a longer duration"]),
    ("duration=1e-9", ["is no sample", "give a longer duration"]),
    ("recipe.epochs=1e6 duration=1e6", ["steps are more than any run is meant to have"]),
    ("svag=1000", ["steps are more than any run is meant to have", "a smaller svag"]),
    ("dataset.train_size=null", ["dataset.train_size=null: digits needs a number"]),
    ("recipe.decay=inverse_sqrt recipe.warmup_fraction=0", ["give recipe.warmup_fraction > 0"]),
    ("goal=best batch=16", ["needs noise_scale"]),
    ("rule=adamw_sde recipe.l2=0.1 batch=16", ["inside the gradient"]),
    ("rule=opt_sgd", ["rule 'opt_sgd' is not for adaptive optimizers; allowed here: sqrt"]),
    ("recipe.momentum=0.5", ["recipe.momentum plays no part in optimizer=adam, which takes recipe.beta1"]),
    ("optimizer=adamw recipe.l2=0.5", ["recipe.l2 plays no part in optimizer=adamw"]),
    ("recipe.decay=cosine recipe.gamma=0.5", ["recipe.gamma plays no part with recipe.decay=cosine"]),
    ("recipe.decay=cosine recipe.milestones_fraction=[0.5]", ["recipe.milestones_fraction plays no part with"]),
    ("recipe.warmup_fraction=0 recipe.warmup=linear", ["recipe.warmup plays no part with recipe.warmup_fraction=0"]),
    ("margin.test_accuracy=3", ["margin.test_accuracy=3 must be a number in (0, 1), or null (share of the test set)"]),
    ("margin.perplexity=0.5", ["margin.perplexity: no perplexity is measured of digits, which has images"]),
    ("model=gpt margin.test_accuracy=0.5", ["no test accuracy is measured of stdlib, which has tokens", "test_loss"]),
    ("optimizer=sgd model=gpt", ["no reference point for optimizer=sgd", "recipes for sgd: cifar10-resnet"]),
    ("model=gpt recipe.freeze_last=true", ["model gpt has no last layer of its own; use false"]),
    ("model=gpt dataset=digits", ["model gpt reads tokens, and dataset digits has images"]),
    ("model=gpt dataset.context=128 model.context=64", ["sequences are longer than the model's model.context=64"]),
    ("model=roberta dataset.mask=0", ["give dataset.mask, for example 0.15"]),
    ("model=gpt dataset=text", ["dataset=text needs dataset.path=FILE"]),
    ("model=gpt dataset=text dataset.path=nowhere.txt", ["dataset.path='nowhere.txt' does not exist"]),
    ("dataset.path=x", ["digits is embedded and takes no path"]),
    ("measure.noise=full measure.noise_unit=5", ["measure.noise_unit=5 must lie between 1 and the micro-batch 4"]),
    ("svag=2 batch=1024", ["batch=1024 leaves no second draw in 1437"]),
    ("svag=2 optimizer=adamw", ["use recipe.decoupled_decay=0"]),
    ("svag=2 optimizer=sgd", ["use recipe.momentum=0"]),
    # all faults of one command at once
    ("model.width=abc recipe.lrr=1 modle=x recipe.lr=-1 +a=b batch=1e20",
     ["'+a=b'", "'recipe.lrr'", "'modle'", "model.width='abc'", "recipe.lr=-1", "batch=1e+20"]),
    ("batch=[100,130] rule=[sqr,sqrt] tested=[nope] recipe.momentum=0.3 launch.devices=3",
     ["batch=100", "batch=130", "unknown rule 'sqr'", "tested: unknown rule 'nope'", "recipe.momentum plays no part"]),
    ("model=gpt recipe.freeze_last=true dataset=text svag=2 batch=12",
     ["freeze_last", "dataset.path=FILE", "batch=12 is no multiple"]),
    # the other commands
    ("plan +x=1", ["keys cannot be added"]),
    ("status nowhere", ["nowhere"]),
    ("report nowhere", ["nowhere"]),
    ("cancel nowhere", ["nowhere"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_done_is_refused(
    words: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, a line a fault, nothing written. A traceback, or a run that starts, fails here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALERUN_RUNS", "runs")
    assert cli.main(shlex.split(words)) == 2
    printed = capsys.readouterr()
    for text in says:
        assert text in printed.err
    lines = printed.err.strip().splitlines()
    assert lines and all(line.startswith("scalerun: ") for line in lines)
    assert len(set(lines)) == len(lines)  # each fault once
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_null_byte_is_refused() -> None:
    """The operating system keeps it out of a command line, a file of the user's may hold it."""
    for word in ('runs_dir="a\0b"', 'dataset.path="a\0b"', 'model.name="a\0b"'):
        with pytest.raises(config.ConfigError, match="must be text"):
            config.compose([word])


def test_flags_that_do_not_exist_end_with_code_2(tmp_path: Path) -> None:
    for words in (["--nonsense"], ["-x"], ["status", "--nonsense"], ["batch=[4"]):
        done = scalerun(*words, cwd=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.strip()
        assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_checked_before_it_starts(tmp_path: Path) -> None:
    done = scalerun("batch=[4,16,6400]", "rule=[sqrt,none]", "seed=[0,1]", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1  # the fault, once, though two seeds have it
    assert "kappa < 100 (batch < 400)" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["runs_dir=ra,rb"], ["runs_dir=ra,rb", "batch=4,16"], ["launch.compile=false,true"], ["launch.parallel=1,2"],
        ["launch=local,slurm"], ["noise_from=na,nb"], ["logger=none,wandb"], ["checkpoint.minutes=1,2"],
        ["margin.train_loss=0.1,0.2"], ["dataset.path=a,b", "model=resnet50"], ["measure.noise=free,full"],
        ["wandb.project=pa,pb"],
    ],
)  # fmt: skip
def test_a_sweep_over_what_makes_no_other_run_is_refused(words: list[str]) -> None:
    """Fails if one of two values were dropped without a word."""
    with pytest.raises(plan.PlanError) as refusal:
        plan.plan(config.compose(["-m", *words]))
    key, values = words[0].replace(".train_loss", "").split("=")  # margins are told together
    said = str(refusal.value)
    assert said.lower().startswith(f"{key}=") and said.count("\n") == 0, said
    assert all(v in said.lower() for v in values.split(","))


def test_a_sweep_keeps_what_its_runs_differ_in_beside_the_science() -> None:
    runs = planned("-m", "experiment=demo,fig1_small,fig1_ablations_small")
    assert len({str(r.margin) for r in runs}) == 2  # the last two share runs, and agree about them


def test_limits_keep_every_number_finite() -> None:
    """The schema's largest legal numbers plan or are refused in words: nothing overflows on the way."""
    for words in (
        ["recipe.lr=1e6", "recipe.eps=1e6", "recipe.l2=1e6"], ["noise_scale=1e15", "goal=best"], ["svag=1000"],
        ["recipe.epochs=1e6", "duration=1e6"], ["recipe.batch=16777216"], ["batch=16777216", "rule=none"],
    ):  # fmt: skip
        try:
            runs = plan.plan(config.compose(words))
        except plan.PlanError:
            continue
        assert all(math.isfinite(s.science.hyper.lr) for s in runs)


# ---- Hydra's own words, start-up ----


def test_hydras_own_words(tmp_path: Path) -> None:
    helped = scalerun("--help", cwd=tmp_path)
    assert helped.returncode == 0 and "scalerun plan" in helped.stdout and "resnet50" in helped.stdout
    own = tmp_path / "it's mine, all" / "model"
    own.mkdir(parents=True)
    (own / "wide.yaml").write_text("kind: resnet\n")
    chosen = scalerun("batch=16", "--help", "--config-dir", str(own.parent), cwd=tmp_path).stdout
    assert "batch: 16\n" in chosen and ", vit_small, wide\n" in chosen and "hydra/" not in chosen
    for words, wrong in ([["modl=x"], "unknown key 'modl'"], [["--config-dir", "nowhere"], "nowhere' not found"]):
        refused = scalerun("--help", *words, cwd=tmp_path)
        assert refused.returncode == 2 and wrong in refused.stderr
    shutil.rmtree(own.parent)
    shown = scalerun("--cfg", "job", "batch=16", cwd=tmp_path)
    assert shown.returncode == 0 and "batch: 16" in shown.stdout
    assert scalerun("--info", "defaults", cwd=tmp_path).returncode == 0
    assert "Config search path" in scalerun("--info", cwd=tmp_path).stdout  # which takes no word of ours as its value
    swept = plan_json("-m", "model=resnet56,vgg16", "batch=[256,8192]", cwd=tmp_path)
    assert len(swept) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "conf" / "recipe").glob("*.yaml")))
def test_every_recipe_has_numbers_for_its_optimizers(recipe: str) -> None:
    """Fails for a recipe that names an optimizer and lacks, say, its momentum."""
    dataset = recipe.split("-")[0]
    words = [f"recipe={recipe}", f"dataset={dataset}", *["dataset.classes=2"] * (dataset == "imagefolder")]
    words += [
        "model=gpt" if (ROOT / "conf" / "dataset" / f"{dataset}.yaml").read_text().count("vocab") else "model=resnet8"
    ]
    (composed,) = config.compose(words)
    for optimizer in composed.recipe.optimizers:
        (one,) = config.compose([*words, f"optimizer={optimizer}"]) if optimizer != "adam" else (composed,)
        assert plan.expand.base_hyper(one).lr > 0


def test_500_runs_by_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed by Hydra once: at 0.1 s a run the product would take minutes (bench/startup.py times it)."""
    composed, compose = [], hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *a, **k: composed.append(a) or compose(*a, **k))
    runs = specs(
        "batch=[8,16,32,64,128]", "rule=[sqrt,none,linear,linear_scaled]", f"seed={list(range(25))}".replace(" ", "")
    )
    assert len(runs) == 500
    assert len(composed) == 1


def test_your_own_data_is_looked_at_once_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each of a sweep's runs walked the folder of images again (minutes for ImageNet)."""
    write_pictures(tmp_path, {"train": 1, "val": 1})
    walked, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: walked.append(a) or walk(*a, **k))
    words = ["model=resnet50", "dataset=imagefolder", f"dataset.path={tmp_path}", "seed=[0,1,2]"]
    assert len(plan.plan(config.compose(words))) == 3
    assert len([w for w in walked if Path(w[0]) == tmp_path]) == 1


def test_what_is_wrong_with_every_run_is_said_once() -> None:
    """Four rules at two batches lack a recipe for the optimizer, for one reason. Fails if it were said eight times, or
    if a fault of one run alone were said of more."""
    with pytest.raises(plan.PlanError) as refused:
        planned("experiment=fig1_noise_mid", "optimizer=adamw")
    assert str(refused.value).count("no reference point") == 1
    assert str(refused.value).startswith("batch=1 rule=sqrt and 7 more: no reference point")
    with pytest.raises(plan.PlanError) as refused:
        planned("batch=[32,2048]", "rule=[sqrt,none]")
    assert str(refused.value).startswith("batch=2048 rule=sqrt: ")
