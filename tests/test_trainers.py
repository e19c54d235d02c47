"""Other people's trainers, the real ones: measured, scaled at the start, and their runs read back and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from scaling_exps import cli
from scaling_exps.noise import validity
from scaling_exps.records import RunDir
from scaling_exps.rules import RuleError
from scaling_exps.trainers import ScaledBy, apart, begin
from scaling_exps.trainers.foreign import read

BASE = {"batch": 8, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def adamw(**changes: Any) -> torch.optim.AdamW:
    kept = {k: v for k, v in {**BASE, **changes}.items() if k != "batch"}
    groups = [{"params": [torch.zeros(2, requires_grad=True)]}, {"params": [torch.zeros(2, requires_grad=True)]}]
    return torch.optim.AdamW([groups[0], {**groups[1], "weight_decay": 0.0}], **kept)


def test_the_rule_is_applied_once_and_checked() -> None:
    """From the base, and again where it is already done (a resumed run); a group free of decay stays so. Fails if a
    second call scaled twice, or an optimizer of other numbers passed for the base's."""
    optimizer, by = adamw(), ScaledBy("adamw_sde", BASE)
    for _ in range(2):
        plan = by.apply(optimizer, 32)
        assert plan["kappa"] == 4 and plan["scaled"]["lr"] == pytest.approx(2e-3)
        assert not apart(optimizer, plan["scaled"])
        assert [g["weight_decay"] for g in optimizer.param_groups] == [pytest.approx(0.2), 0.0]
    with pytest.raises(RuleError, match=r"group 0 has lr 0.003, not 0.001; group 1 has lr 0.003"):
        by.apply(adamw(lr=3e-3), 32)
    with pytest.raises(RuleError, match="takes 80 steps, and the plan says 20"):
        ScaledBy("adamw_sde", {**BASE, "steps": 80}).apply(adamw(), 32, steps=80)
    with pytest.raises(RuleError, match=r"beta"):
        by.apply(adamw(), 128)


@pytest.mark.parametrize(("steps", "fits"), [(332, False), (333, True), (334, True), (335, False), (None, True)])
def test_the_steps_are_the_plan_s_to_less_than_one(steps: int | None, fits: bool) -> None:
    """1000 steps at 64 are 333.3 at 192. Fails if a run whose κ does not divide them could not begin."""
    by = ScaledBy("adamw_sde", {**BASE, "batch": 64, "steps": 1000})
    if fits:
        by.apply(adamw(), 192, steps=steps)
    else:
        with pytest.raises(RuleError, match=f"takes {steps} steps, and the plan says 333.333"):
            by.apply(adamw(), 192, steps=steps)


def test_a_hurried_call_is_told_at_once() -> None:
    """Not at the first record of a training. Fails if a callback found out in its loop."""
    from scaling_exps.trainers import hf, lightning

    for made, told in (
        (lambda: ScaledBy("sqrt", {"lr": 1e-3}), r"base=\{'lr': 0.001\} must be a dict of what was tuned: batch"),
        (lambda: ScaledBy("sqrt", 8), "base=8 must be a dict"),
        (lambda: lightning.NoiseCallback(batches=1024), r"batches=1024 must be a list of whole numbers >= 1"),
        (lambda: lightning.NoiseCallback(batches=[0.5]), r"batches=\[0.5\] must be a list"),
        (lambda: lightning.NoiseCallback(scaled="sqrt"), r"scaled='sqrt' must be ScaledBy\(rule"),
        (lambda: hf.NoiseCallback("model"), r"trainer='model' must be the Trainer"),
    ):
        with pytest.raises(ValueError, match=told):
            made()


def hugging_face(folder: Path, accumulation: int, steps: int, **how: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from scaling_exps.trainers.hf import NoiseCallback

    set_seed(0)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(32, (256, 16), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir=str(folder), learning_rate=1e-3, adam_beta2=0.99, weight_decay=0.1, max_steps=steps, warmup_steps=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, logging_steps=4, save_steps=8,
        eval_strategy="steps", eval_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": t, "labels": t} for t in tokens]
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:16])
    callback = NoiseCallback(trainer, batches=[64], window=4, **how)
    trainer.add_callback(callback)
    return trainer, callback


def test_hugging_face(tmp_path: Path) -> None:
    """Its loggers get the noise; the rule moves optimizer and scheduler; a run that goes on from a checkpoint keeps
    records and scale. Two runs are imported as base and arm.
    Fails if the noise were logged instead of a step's loss."""
    trainer, callback = hugging_face(tmp_path / "base", 2, 16)
    trainer.train()
    log = json.loads((tmp_path / "base/checkpoint-16/trainer_state.json").read_text())["log_history"]
    assert [r["step"] for r in log if "noise/b_noise_low" in r and "noise/deviation_64" in r] == [4, 8, 12, 16]
    assert [r["method"] for r in callback.probe.records] == ["free"] * 4
    assert all(r["kappa_r_low"] < r["kappa_r"] < r["kappa_r_high"] for r in callback.probe.records)
    assert not any(p._backward_hooks for p in trainer.model.parameters())

    scaled = ScaledBy("adamw_sde", {**BASE, "steps": 32})
    trainer, callback = hugging_face(tmp_path / "scaled", 4, 16, scaled=scaled)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert group["initial_lr"] == pytest.approx(1e-3 * 2**0.5) and group["betas"] == (pytest.approx(0.8), 0.98)
    again, resumed = hugging_face(tmp_path / "scaled", 4, 16, scaled=scaled)
    again.train(resume_from_checkpoint=str(tmp_path / "scaled/checkpoint-8"))
    assert again.optimizer.param_groups[0]["betas"] == group["betas"]
    assert [r["step"] for r in resumed.probe.records] == [4, 8, 12, 16]
    assert resumed.probe.records[:2] == callback.probe.records[:2]

    words = [str(tmp_path / "base"), str(tmp_path / "scaled"), "--name", "tiny", "--out", str(tmp_path / "runs")]
    assert cli.main(["import", *words]) == 0
    specs = {d.spec().science.batch: d.spec() for d in RunDir.under(tmp_path / "runs")}
    assert specs[16].arms[0].base_run_id == specs[8].run_id and specs[16].arms[0].role == "rule"
    found = read(tmp_path / "scaled")
    assert found.known["batch"] == 16 and found.known["scaled"]["eps"] == pytest.approx(1e-8 / 2**0.5)
    assert len(found.noise) == 4


def test_what_a_probe_wrote_is_read_by_plan_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B_noise 100, by sure records. Fails if a file of another trainer were held against the recipe."""
    sure = {"kind": "noise", "method": "free", "batch": 8, "enough": True, "kappa_r": 0.08, "b_noise": 100.0}
    rows = [
        {**sure, "step": i, "samples": 8 * i, "trace": 1 + 0.01 * (i % 2), "gradient_sq": 0.01} for i in range(1, 9)
    ]
    file = tmp_path / "noise.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"kind": "noise"}\n')
    assert validity.noise_scale(file) == validity.noise_scale(tmp_path) == pytest.approx(100, rel=0.02)
    assert cli.main(["plan", "batch=[4,64]", "recipe.batch=4", f"noise_from={tmp_path}", "--json"]) == 0
    (told,) = [r["validity"] for r in json.loads(capsys.readouterr().out) if r["scaled"]["batch"] == 64]
    assert told["deviation"] == pytest.approx(validity.deviation(0.04, 16), rel=0.02)
    assert "of another trainer" in told["source"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1.0e-3\nper_device_train_batch_size: 8\nadam_beta1: 0.95\nmax_steps: 400\n")
    words = ["convert", str(recipe), "--batch", "32", "--devices", "1", "--rule", "opt_sign", "--noise-from"]
    assert cli.main([*words, str(file)]) == 0
    assert "learning_rate: 0.00" in capsys.readouterr().out
    assert cli.main([*words, str(recipe)]) == 2
    assert "has no noise records that say anything" in capsys.readouterr().err


def test_lightning_and_its_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last backward pass of a step is inside the optimizer's step there. Three seeds at batch 8 and at 32 by the
    rule are imported from CSV logs, paired by seed and judged. Fails if the last micro-batch were missed."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    from scaling_exps.trainers.lightning import NoiseCallback

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

        def training_step(self, batch: Any, _: int) -> Any:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)

    folders = []
    for seed in (0, 1, 2):
        for parts in (2, 8):
            lightning.seed_everything(seed, verbose=False)
            x = torch.randn(512, 6)
            data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(512, 1))
            loader = torch.utils.data.DataLoader(data, batch_size=4)
            logger = CSVLogger(tmp_path / f"{seed}-{parts}")
            callback = NoiseCallback(batches=[32], scaled=ScaledBy("adamw_sde", BASE), window=4)
            trainer = lightning.Trainer(
                max_epochs=1, accumulate_grad_batches=parts, accelerator="cpu", devices=1, logger=logger,
                callbacks=[callback], enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=2,
                enable_checkpointing=False, gradient_clip_val=0.5,
            )  # fmt: skip
            trainer.fit(Regression(), loader, loader)
            folders.append(Path(logger.log_dir))
            assert callback.probe is not None and callback.probe.batch == 4 * parts
            assert {(r["method"], r["units"]) for r in callback.probe.records} == {("free", 4)}
            assert len(callback.probe.records) == 512 // (4 * parts) // 4
    out = tmp_path / "runs"
    for seed, pair in enumerate(zip(folders[::2], folders[1::2], strict=True)):
        words = [str(f) for f in pair]
        assert cli.main(["import", *words, "--seed", str(seed), "--name", "regression", "--out", str(out)]) == 0
    assert ", unknown: data, schedule, precision" in capsys.readouterr().out
    assert cli.main(["show", str(next(iter(out.iterdir())))]) == 0
    assert "regression on another trainer's data, adamw, seed" in capsys.readouterr().out
    assert cli.main(["plan", f"noise_from={next(iter(out.iterdir()))}"]) == 2
    assert "is of another trainer; give the noise.jsonl that it wrote" in capsys.readouterr().err
    specs = [d.spec() for d in RunDir.under(out)]
    assert sorted((s.science.batch, s.science.seed, s.arms[0].role) for s in specs) == [
        *((8, i, "base") for i in range(3)), *((32, i, "rule") for i in range(3))
    ]  # fmt: skip
    assert cli.main(["report", str(out), "--json", "--margin", "test_loss=5"]) == 0
    rows = {r["batch"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert rows[32]["verdict"] == "equivalent" and len(rows[32]["seeds"]) == 3
    assert cli.main(["status", str(out)]) == 0


@pytest.mark.parametrize("how", [{"max_epochs": -1}, {"max_epochs": 1}])
def test_lightning_without_an_end(how: dict[str, int], tmp_path: Path) -> None:
    """No limit, and an epoch of unknown length: the estimate of the steps is inf, or -1. Fails if that were held
    against the plan's 20, or a callback could not begin."""
    import lightning
    from lightning.pytorch.demos.boring_classes import BoringModel

    from scaling_exps.trainers.lightning import NoiseCallback

    class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.randn(80, 32))

    class Stopped(BoringModel):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.trainer.global_step == 20

    scaled = ScaledBy("linear", {"batch": 2, "lr": 0.05, "momentum": 0.0, "steps": 40})
    callback = NoiseCallback(scaled=scaled)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[callback], default_root_dir=tmp_path, **how,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Stopped(), torch.utils.data.DataLoader(Stream(), batch_size=4))
    assert trainer.global_step == 20 and callback.probe is not None


def left(folder: Path, batch: int, base: dict[str, Any], rule: str = "adamw_sde", kind: Any = torch.optim.AdamW) -> str:
    """A folder as Hugging Face's Trainer with NoiseCallback(scaled=...) leaves it, without the hours."""
    optimizer = kind([torch.zeros(2, 2, requires_grad=True)], **{k: v for k, v in base.items() if k != "batch"})
    known = begin("transformers", batch, optimizer, ScaledBy(rule, base), scheduler=None, steps=None, seed=1)
    log = [{"step": 0, "scalerun": known}, *({"step": s, "loss": 3.0 - s / 100} for s in range(10, 60, 10))]
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return str(folder)


@pytest.mark.parametrize(
    ("batches", "commands"),
    [
        ((2000, 16_000), ["arm", "base"]),
        ((2000, 16_000), ["arm", "base", "arm"]),
        ((2000, 16_000), ["base", "arm"]),
        ((2000, 16_000), ["arm base"]),
        ((240, 2000), ["arm base"]),  # 2000 / (2000 / 240) is not 240
        ((224, 576), ["base", "arm"]),
    ],
)
def test_a_run_meets_its_base_whichever_is_imported_first(
    batches: tuple[int, int], commands: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An arm whose base is not there is no base of its own; with it, it is judged. Fails if the arm kept what its first
    import said."""
    tuned = {**BASE, "batch": batches[0], "betas": (0.95, 0.99)}
    folders = {n: left(tmp_path / n, b, tuned) for n, b in zip(("base", "arm"), batches, strict=True)}
    out = tmp_path / "runs"

    def rows() -> dict[int, Any]:
        assert cli.main(["report", str(out), "--json", "--margin", "train_loss=1"]) == 0
        return {r["batch"]: r for r in json.loads(capsys.readouterr().out)["rows"]}

    for i, command in enumerate(commands):
        assert cli.main(["import", *(folders[n] for n in command.split()), "--out", str(out)]) == 0
        alone = i == 0 and command == "arm"
        assert (f"base run of batch {batches[0]} not imported yet" in capsys.readouterr().out) == alone
        if alone:
            (row,) = rows().values()
            assert (row["rule"], row["verdict"]) == ("adamw_sde", "no result")
            assert "seed 1: base run not found, not compared" in row["remarks"]
    specs = {d.spec().science.batch: d.spec() for d in RunDir.under(out)}
    (arm,) = specs[batches[1]].arms
    assert (arm.base_run_id, arm.base) == (specs[batches[0]].run_id, specs[batches[0]].science.numbers())
    run_dir, own = RunDir(out / specs[batches[1]].run_id), specs[batches[1]].run_id
    run_dir.put_arms((msgspec.structs.replace(arm, base_run_id=own),))  # as older versions wrote it
    assert cli.main(["import", folders["arm"], "--out", str(out)]) == 0
    assert run_dir.spec().arms == (arm,)
    capsys.readouterr()
    assert {b: (r["rule"], r["verdict"]) for b, r in rows().items()} == {
        batches[0]: ("base", "base"), batches[1]: ("adamw_sde", "too few seeds")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rule", "base", "role"),
    [
        (torch.optim.SGD, "linear", {"momentum": 0.9}, "rule"),
        (torch.optim.SGD, "linear_momentum", {"momentum": 0.9}, "rule"),
        (torch.optim.Adam, "linear", {"betas": (0.9, 0.99)}, "control"),
        (torch.optim.Muon, "muon", {"momentum": 0.95, "weight_decay": 0.1}, "rule"),
    ],
)
def test_a_rule_is_what_it_is_for_the_optimizer_of_the_run(
    kind: Any, rule: str, base: dict[str, Any], role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if every optimizer passed for an Adam: `linear` was a control for SGD, and `muon` refused."""
    tuned, out = {"batch": 8, "lr": 1e-3, **base}, tmp_path / "runs"
    folders = [left(tmp_path / str(b), b, tuned, rule, kind) for b in (8, 16)]
    assert cli.main(["import", *folders, "--out", str(out)]) == 0
    assert sorted(d.spec().arms[0].role for d in RunDir.under(out)) == sorted(["base", role])
    assert cli.main(["report", str(out), "--margin", "train_loss=1"]) == 0
    assert ("No rule was under test" in capsys.readouterr().out) == (role == "control")


@pytest.mark.parametrize(
    ("rule", "optimizer", "role"),
    [
        ("linear_momentum", None, "rule"),
        ("none", None, "control"),
        ("linear", "sgd", "rule"),
        ("linear", "adamw", "control"),
        ("linear", None, None),
        ("sqrt", None, None),
    ],
)
def test_a_rule_for_an_optimizer_that_the_run_does_not_tell(
    rule: str, optimizer: str | None, role: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command tells it, where the rule depends on it. Fails if an SGD were taken for an Adam."""
    file = tmp_path / "metrics.csv"
    file.write_text("step,train_loss,lr\n1,1.0,1e-3\n2,0.9,1e-3\n")
    told = ["--batch", "16", "--base-batch", "8", "--rule", rule, *(["--optimizer", optimizer] if optimizer else [])]
    assert cli.main(["import", str(file), *told, "--out", str(tmp_path / "runs")]) == (0 if role else 2)
    runs = RunDir.under(tmp_path / "runs")
    assert [d.spec().arms[0].role for d in runs] == ([role] if role else [])
    assert ("nobody tells the optimizer" in capsys.readouterr().err) == (role is None)


def test_wandb_s_offline_folder(tmp_path: Path) -> None:
    """A run as `wandb` itself writes it. Fails if the plan in its config, or its history, were lost."""
    import wandb

    run = wandb.init(project="x", mode="offline", dir=tmp_path, reinit=True)
    optimizer = torch.optim.Adagrad([torch.zeros(2, requires_grad=True)])
    begin("mine", 8, optimizer, None, scheduler=None, steps=None, seed=3)
    for step in range(1, 5):
        run.log({"train/loss": 1 / step, "train/global_step": 10 * step, "train/learning_rate": 1e-3})
    run.log({"eval/loss": 0.5, "eval/accuracy": 0.25, "train/global_step": 40})
    run.finish()
    wandb.teardown()  # the file is whole when its service has ended
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    found = read(folder)
    known = {"batch": 8, "seed": 3, "trainer": "mine", "optimizer": "Adagrad"}
    assert ([s for s, _ in found.rows], found.known) == ([10, 20, 30, 40, 40], known)
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "runs")]) == 0
    (run_dir,) = RunDir.under(tmp_path / "runs")
    result = run_dir.result()
    assert result is not None and result["metrics"] == {"train_loss": 0.25, "test_loss": 0.5, "test_accuracy": 0.25}
    assert run_dir.spec().notes[1].startswith("unknown: betas, eps, data")


def test_lightning_s_steps_in_wandb(tmp_path: Path) -> None:
    """It counts them from 0, for wandb as in its CSV. Fails if a run of 6 steps came in as one of 5."""
    import lightning
    import wandb
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

    class Logged(BoringModel):
        def training_step(self, batch: Any, i: int) -> Any:
            self.log("train_loss", (loss := super().training_step(batch, i)["loss"]))
            return loss

    loggers = [CSVLogger(tmp_path / "csv"), WandbLogger(project="x", save_dir=tmp_path, offline=True)]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=loggers, max_steps=6, limit_val_batches=0, log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Logged())
    wandb.finish()
    wandb.teardown()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    for left_by in (Path(loggers[0].log_dir or ""), folder):
        assert [s for s, row in read(left_by).rows if "train_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize(
    ("option", "recorded", "other"),
    [("batch", 16, 250), ("base-batch", 8, 4), ("rule", "adamw_sde", "none"), ("seed", 1, 0)],
)
def test_an_option_does_not_contradict_the_run(
    option: str, recorded: Any, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ScaledBy recorded is so. Fails if a run at 16 could be imported as one at 250."""
    words = ["import", left(tmp_path / "run", 16, BASE), "--out", str(tmp_path / "runs"), f"--{option}"]
    assert cli.main([*words, str(other)]) == 2
    assert f"--{option} {other} contradicts what its trainer recorded there, {recorded}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert cli.main([*words, str(recorded)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "losses"),
    [
        (
            "trainer_state.json",
            json.dumps({"log_history": [
                {"step": 500, "loss": 2.0, "learning_rate": 1e-3}, {"step": 1000, "loss": 1.0, "learning_rate": 1e-4},
                {"step": 1200, "train_loss": 3.0, "train_runtime": 60.0, "total_flos": 1.0},
            ]}),
            {500: 2.0, 1000: 1.0},
        ),
        ("metrics.csv", "step,train_loss_epoch,train_loss_step,lr\n9,,2.0,1e-3\n14,7.0,,\n19,,1.0,1e-3\n29,5.0,,\n",
         {10: 2.0, 20: 1.0}),
        ("metrics.csv", "step,train_loss_epoch,lr\n14,7.0,1e-3\n29,5.0,1e-3\n", {15: 7.0, 30: 5.0}),
        ("a.csv", "_step,train/global_step,train/loss,lr\n1,10,2.0,1e-3\n2,20,1.0,1e-3\n3,,,\n", {10: 2.0, 20: 1.0}),
        ("b.csv", "train/loss,lr,_step\n2.0,1e-3,1\n1.0,1e-3,2\n", {1: 2.0, 2: 1.0}),
    ],
)  # fmt: skip
def test_which_column_is_the_loss_and_which_the_step(
    name: str, content: str, losses: dict[int, float], tmp_path: Path
) -> None:
    """Fails if a mean over an epoch, or over the run, passed for the loss of a window, or calls of log for steps."""
    (tmp_path / name).write_text(content)
    assert cli.main(["import", str(tmp_path / name), "--batch", "8", "--out", str(tmp_path / "runs")]) == 0
    (run_dir,) = RunDir.under(tmp_path / "runs")
    assert {r["step"]: r["loss"] for r in run_dir.records().rows} == losses
    result = run_dir.result()
    assert result is not None and result["metrics"] == {"train_loss": list(losses.values())[-1]}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none", None, "no run of another trainer; allowed: a folder or file of trainer_state.json"),
        ("trainer_state.json", "{", "cannot be read: JSONDecodeError"),
        ("trainer_state.json", '{"log_history": []}', "the global batch is not told: give --batch N"),
        ("metrics.csv", "epoch,loss\n0,1\n", "has no column of steps"),
        ("x.csv", "_step,learning_rate\n1,1e-3\n", "no train loss among"),
        ("y.csv", "_step,loss\n1,1\n", "a batch is at least 1 example"),
        ("w.csv", "_step,loss\n1,1\n", "no learning rate among _step, loss; log it, or add a column lr"),
        ("z.csv", "_step,loss,lr\n1,1,1e-3\n", "unknown rule 'sqr'"),
    ],
)
def test_what_is_no_run_is_refused(
    name: str, content: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2, one message, and nothing written."""
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    more = {
        "x.csv": "--batch 8",
        "w.csv": "--batch 8",
        "y.csv": "--batch 0",
        "z.csv": "--batch 8 --base-batch 4 --rule sqr",
    }.get(name, "")
    assert cli.main(["import", str(file), *more.split(), "--out", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
