"""Recipes in and out: only the scaled lines change, the real libraries build exactly our numbers, faults are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from scaling_exps.convert import convert, main
from scaling_exps.convert.documents import Flags, Toml, Yaml, number, spell
from scaling_exps.rules import RULES, Hyper, Move, RuleError

HF = """\
# tuned in March
output_dir: "out"        # where
learning_rate: 1e-4      # YAML 1.1 takes this for a string
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
adam_beta1: 0.95
adam_beta2: 0.98
weight_decay: 0.1
optim: adamw_torch
max_steps: 10000
warmup_steps: 500
eval_steps: 0.1          # a share
save_steps: 1000
use_cpu: true
"""

LIGHTNING = """\
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 2
  accumulate_grad_batches: 1   # none yet
  max_steps: 4000
  gradient_clip_val: 1.0
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 0.001
    betas:
      - 0.9
      - 0.999
    eps: 1.0e-08  # outside the root
data:
  batch_size: 32
"""

TIMM_FLAGS = """\
# ImageNet
torchrun --nproc-per-node=8 train.py /data \\
  --model resnet50 -b 128 \\
  --opt adamw --lr=5e-4 --opt-betas 0.9 0.98 --weight-decay 0.05 \\
  --model-ema --model-ema-decay 0.9998 --warmup-lr 1e-6 --epochs 300
"""

TIMM_YAML = """\
batch_size: 64
epochs: 90
grad_accum_steps: 1
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
min_lr: 0
momentum: 0.9
opt: sgd
opt_betas: null
warmup_lr: 1.0e-05
weight_decay: 2.0e-05
"""

TITAN = """\
# 64 GPUs
[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 200  # lr scheduler warm up

[training]
local_batch_size = 1
seq_len = 8_192
max_norm = 1.0  # grad norm clipping
steps = 1000

[checkpoint]
interval = 500
"""

DEEPSPEED = """\
{
\t"train_batch_size": 256,
\t"train_micro_batch_size_per_gpu": 8,
\t"optimizer": {
\t\t"type": "AdamW",
\t\t"params": {"lr": 3e-4, "betas": [0.95, 0.99], "eps": 1e-8, "weight_decay": 0.1}
\t},
\t"scheduler": {
\t\t"type": "WarmupDecayLR",
\t\t"params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 100, "total_num_steps": 1000}
\t},
\t"zero_optimization": {"stage": 2}
}
"""

PLAIN = """\
optimizer: adamw
batch: 256
lr: 1.0e-3   # peak
betas: [0.9, 0.999]
weight_decay: 0.1
ema: 0.9999
epochs: 10
"""


def changed(before: str, after: str) -> list[str]:
    """Keys of the lines that differ; lines are only changed or added, never lost or moved."""
    a, b = before.splitlines(), after.splitlines()
    keys, i = [], 0
    for line in b:
        if i < len(a) and line == a[i]:
            i += 1
            continue
        key = re.split(r"[:=]", line)[0].strip(' "')
        item = line.lstrip().startswith("- ")
        keys.append(key)
        if i < len(a) and (item or re.split(r"[:=]", a[i])[0] == re.split(r"[:=]", line)[0]):
            i += 1
    assert i == len(a), (a[i:], b)
    return keys


def test_hf_changes_only_its_lines() -> None:
    done = convert(HF, "hf", "hf", 512)
    assert changed(HF, done.text) == [
        "learning_rate", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "weight_decay",
        "max_steps", "warmup_steps", "save_steps", "adam_epsilon",
    ]  # fmt: skip
    new = yaml.safe_load(done.text)
    want = RULES["adamw_sde"].scale(Hyper(1e-4, (0.95, 0.98), 1e-8, 0.1), Move(1, 8))
    assert (new["learning_rate"], new["adam_beta1"], new["adam_beta2"]) == (want.lr, *want.betas)
    assert (new["adam_epsilon"], new["weight_decay"]) == (want.eps, want.weight_decay)
    assert (new["max_steps"], new["warmup_steps"], new["save_steps"], new["eval_steps"]) == (1250, 62, 125, 0.1)
    assert new["gradient_accumulation_steps"] == 32
    assert "# YAML 1.1 takes this for a string" in done.text
    assert any("62.5, written 62" in n for n in done.notes)
    assert any("hf cannot express" in n for n in done.notes)


def test_lightning_changes_only_its_lines() -> None:
    done = convert(LIGHTNING, "lightning", "lightning", 256, new_devices=4)
    assert changed(LIGHTNING, done.text) == [
        "devices", "accumulate_grad_batches", "max_steps", "lr", "- 0.6", "- 0.996", "eps", "weight_decay",
    ]  # fmt: skip
    new = yaml.safe_load(done.text)
    assert new["optimizer"]["init_args"] == {
        "lr": 2e-3, "betas": [0.6, 0.996], "eps": 5e-9, "weight_decay": 0.02,
    }  # fmt: skip
    assert (new["trainer"]["devices"], new["trainer"]["accumulate_grad_batches"]) == (4, 2)
    assert new["trainer"]["max_steps"] == 1000


def test_timm_flags_change_only_their_words() -> None:
    done = convert(TIMM_FLAGS, "timm", "timm", 4096, devices=8)
    old, new = TIMM_FLAGS.split(), done.text.split()
    assert new[: len(old)] == [
        {"--lr=5e-4": "--lr=0.001", "0.9": "0.6", "0.98": "0.92", "0.05": "0.1", "1e-6": "2.0e-06"}.get(w, w)
        if w != "0.9998" else str(0.9998**4) for w in old
    ]  # fmt: skip
    assert new[len(old) :] == ["--opt-eps", "5.0e-09", "--grad-accum-steps", "4"]
    assert any("min_lr is not in the file" in n for n in done.notes)


def test_timm_rate_of_its_own_is_resolved_at_the_base() -> None:
    """lr null: train.py would scale lr_base to the NEW batch. SGD at 64 of 256: 0.025; then the rule, once."""
    done = convert(TIMM_YAML, "timm", "timm", 512)
    new = yaml.safe_load(done.text)
    assert (new["lr"], new["grad_accum_steps"]) == (0.2, 8)
    assert new["warmup_lr"] == pytest.approx(8e-5)
    assert changed(TIMM_YAML, done.text) == ["grad_accum_steps", "lr", "warmup_lr"]


def test_torchtitan_changes_only_its_lines() -> None:
    done = convert(TITAN, "torchtitan", "torchtitan", 256, devices=64)
    assert changed(TITAN, done.text) == [
        "lr", "eps", "beta1", "beta2", "weight_decay", "warmup_steps", "steps", "global_batch_size", "interval",
    ]  # fmt: skip
    new = tomllib.loads(done.text)
    assert new["optimizer"] == {
        "name": "AdamW", "lr": 6e-4, "eps": 5e-9, "beta1": 0.6, "beta2": 0.8, "weight_decay": 0.2,
    }  # fmt: skip
    assert new["training"] == {
        "local_batch_size": 1, "seq_len": 8192, "max_norm": 1.0, "steps": 250, "global_batch_size": 256,
    }  # fmt: skip
    assert (new["lr_scheduler"]["warmup_steps"], new["checkpoint"]["interval"]) == (50, 125)


def test_deepspeed_changes_only_its_lines() -> None:
    done = convert(DEEPSPEED, "deepspeed", "deepspeed", 1024)
    new = json.loads(done.text)
    assert new["train_batch_size"] == 1024
    assert new["optimizer"]["params"] == {"lr": 6e-4, "betas": [0.8, 0.96], "eps": 5e-9, "weight_decay": 0.2}
    assert new["scheduler"]["params"] == {
        "warmup_min_lr": 0, "warmup_max_lr": 6e-4, "warmup_num_steps": 25, "total_num_steps": 250,
    }  # fmt: skip
    assert "gradient_accumulation_steps" not in new  # DeepSpeed works it out of the devices it finds
    assert done.text.count("\t") == DEEPSPEED.count("\t")


def test_plain() -> None:
    done = convert(PLAIN, "plain", "plain", 1024)
    assert changed(PLAIN, done.text) == ["batch", "lr", "betas", "weight_decay", "ema", "eps"]
    assert yaml.safe_load(done.text)["ema"] == 0.9999**4


def test_nothing_changes_at_the_base() -> None:
    for text, form, batch, devices in CASES:
        if text is TIMM_YAML:
            continue  # there the learning rate is written out
        assert convert(text, form, form, batch, devices=devices).text == text


CASES = [
    (HF, "hf", 64, 1),
    (LIGHTNING, "lightning", 64, 1),
    (TIMM_FLAGS, "timm", 1024, 8),
    (TIMM_YAML, "timm", 64, 1),
    (TITAN, "torchtitan", 64, 64),
    (DEEPSPEED, "deepspeed", 256, 1),
    (PLAIN, "plain", 256, 1),
]


@pytest.mark.parametrize(("text", "form", "batch", "devices"), CASES)
def test_there_and_back(text: str, form: str, batch: int, devices: int) -> None:
    """The numbers come back; counts that had to be rounded are within one of the step they stand for."""
    there = convert(text, form, form, batch * 4, devices=devices)
    back = convert(there.text, form, form, batch, devices=devices)
    assert back.scaled.batch == there.base.batch
    assert back.scaled.hyper.lr == pytest.approx(there.base.hyper.lr, rel=1e-12)
    assert back.scaled.hyper.betas == pytest.approx(there.base.hyper.betas, rel=1e-12)
    assert back.scaled.steps == there.base.steps


@pytest.mark.parametrize("target", ["plain", "hf", "lightning", "timm", "torchtitan", "deepspeed"])
def test_into_every_other_format(target: str) -> None:
    """One recipe, six languages: each is read back as the same batch and hyperparameters."""
    done = convert(HF, "hf", target, 512)
    again = convert(done.text, target, "plain", 512)
    assert again.base.hyper == done.scaled.hyper
    assert again.base.batch == 512
    if target in ("plain", "lightning", "torchtitan"):
        assert again.base.steps == 1250


def test_what_has_no_place_is_said() -> None:
    notes = convert(PLAIN, "plain", "hf", 1024).notes
    assert any("model average's decay" in n for n in notes)
    with pytest.raises(RuleError, match="no optimizer SGD"):
        convert("optimizer: sgd\nbatch: 64\nlr: 0.1\nmomentum: 0.9\n", "plain", "torchtitan", 128)
    with pytest.raises(RuleError, match=r"momentum 0\.9"):
        convert("optimizer: sgd\nbatch: 64\nlr: 0.1\nmomentum: 0.9\n", "plain", "hf", 128)


# --- through the real libraries ---


def group_of(optimizer) -> tuple[float, ...]:
    g = optimizer.param_groups[0]
    return (g["lr"], *g["betas"], g["eps"], g["weight_decay"])


def ours(h: Hyper) -> tuple[float, ...]:
    return (h.lr, *h.betas, h.eps, h.weight_decay)


def test_transformers_builds_our_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers builds TrainingArguments only with accelerate installed")
    transformers = pytest.importorskip("transformers")
    import torch

    done = convert(HF.replace('"out"', str(tmp_path)), "hf", "hf", 512)
    (tmp_path / "new.yaml").write_text(done.text)
    (args,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_yaml_file(str(tmp_path / "new.yaml"))
    trainer = transformers.Trainer(model=torch.nn.Linear(2, 2), args=args)
    optimizer = trainer.create_optimizer()
    assert group_of(optimizer) == ours(done.scaled.hyper)
    assert args.train_batch_size * args.gradient_accumulation_steps == 512
    assert (args.max_steps, args.get_warmup_steps(args.max_steps)) == (1250, 62)


@pytest.mark.parametrize("text", [TIMM_FLAGS, TIMM_YAML])
def test_timm_builds_our_optimizer(text: str) -> None:
    """train.py is no part of the wheel: its parsing is redone here, the optimizer is timm's own."""
    factory = pytest.importorskip("timm.optim")
    import torch

    devices = 8 if text is TIMM_FLAGS else 1
    done = convert(text, "timm", "timm", 512 * devices, devices=devices)
    if text is TIMM_YAML:
        values = yaml.safe_load(done.text)
    else:
        values = {p[0]: v for p, v in Flags(done.text, "new").values.items() if len(p) == 1}
    args = Namespace(**{"momentum": 0.9, "opt_eps": None, "opt_betas": None, **values})
    optimizer = factory.create_optimizer(args, torch.nn.Linear(2, 2))
    h = done.scaled.hyper
    decayed = next(g for g in optimizer.param_groups if g["weight_decay"])
    assert (decayed["lr"], decayed["weight_decay"]) == (h.lr, h.weight_decay)
    if text is TIMM_FLAGS:
        assert (tuple(decayed["betas"]), decayed["eps"]) == (h.betas, h.eps)
    else:
        assert decayed["momentum"] == h.betas[0]


def test_lightning_builds_our_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: its CLI cannot be asked")
    pytest.importorskip("jsonargparse", reason="lightning's CLI needs jsonargparse")
    done = convert(LIGHTNING, "lightning", "lightning", 256)
    (tmp_path / "new.yaml").write_text(done.text)
    (tmp_path / "app.py").write_text(
        "import torch, lightning as L\n"
        "from lightning.pytorch.cli import LightningCLI\n"
        "class M(L.LightningModule):\n"
        "    def __init__(self):\n        super().__init__(); self.l = torch.nn.Linear(2, 2)\n"
        "class D(L.LightningDataModule):\n"
        "    def __init__(self, batch_size: int = 1):\n        super().__init__(); self.batch_size = batch_size\n"
        "cli = LightningCLI(M, D, run=False, auto_configure_optimizers=True)\n"
        "o = cli.model.configure_optimizers()\n"
        "g = o.param_groups[0]\n"
        "print('OURS', repr((g['lr'], *g['betas'], g['eps'], g['weight_decay'])), cli.datamodule.batch_size,"
        " cli.trainer.accumulate_grad_batches, cli.trainer.max_steps)\n"
    )
    out = subprocess.run(
        [sys.executable, "app.py", "--config", "new.yaml"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    line = next((x for x in out.stdout.splitlines() if x.startswith("OURS")), out.stdout + out.stderr)
    assert line == f"OURS {ours(done.scaled.hyper)!r} 32 4 1000"


def test_torchtitan_reads_our_numbers(tmp_path: Path) -> None:
    pytest.importorskip("torchtitan.config", reason="torchtitan <= 0.2 (with TOML) and tyro are not installed")
    from torchtitan.config import ConfigManager

    done = convert(TITAN, "torchtitan", "torchtitan", 256, devices=64)
    (tmp_path / "new.toml").write_text(done.text)
    config = ConfigManager().parse_args(["--job.config_file", str(tmp_path / "new.toml")])
    o = config.optimizer
    assert (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay) == ours(done.scaled.hyper)
    assert (config.training.global_batch_size, config.training.steps, config.lr_scheduler.warmup_steps) == (
        256,
        250,
        50,
    )


def test_deepspeed_reads_our_numbers(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: its schema cannot be asked")
    from deepspeed.runtime.config import DeepSpeedConfig

    done = convert(DEEPSPEED, "deepspeed", "deepspeed", 1024)

    (tmp_path / "ds.json").write_text(done.text)
    config = DeepSpeedConfig(str(tmp_path / "ds.json"))
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (1024, 8)
    assert config.gradient_accumulation_steps == 128  # worked out by DeepSpeed: one device here
    p = config.optimizer_params
    assert (p["lr"], *p["betas"], p["eps"], p["weight_decay"]) == ours(done.scaled.hyper)
    assert config.scheduler_params["total_num_steps"] == 250


# --- faults ---


def without(text: str, *keys: str) -> str:
    return "".join(x for x in text.splitlines(keepends=True) if not any(k in x for k in keys))


@pytest.mark.parametrize(
    ("text", "form", "batch", "message"),
    [
        (without(HF, "per_device"), "hf", 512, "no batch size.*per_device_train_batch_size"),
        (without(PLAIN, "batch"), "plain", 512, "no batch size.*set batch"),
        (without(TITAN, "local_batch"), "torchtitan", 512, "training.global_batch_size or training.local_batch_size"),
        (without(LIGHTNING, "batch_size"), "lightning", 512, "data.batch_size"),
        (HF, "hf", 64 * 32, "The largest legal batch is 1279"),
        (
            HF.replace("adamw_torch", "adafactor"),
            "hf",
            512,
            "unknown optimizer class 'adafactor' at optim; allowed: ad",
        ),
        (LIGHTNING.replace("AdamW", "LBFGS"), "lightning", 512, "torch.optim.LBFGS.*allowed"),
        (without(LIGHTNING, "class_path"), "lightning", 512, "does not name its optimizer"),
        (DEEPSPEED.replace('"AdamW"', '"OneBitAdam"'), "deepspeed", 512, "OneBitAdam"),
        (without(HF, "max_steps"), "hf", 512, "schedule in steps without its length: set max_steps or num_train"),
        (without(TITAN, "steps = 1000"), "torchtitan", 512, "without its length: set training.steps"),
        (DEEPSPEED.replace(', "total_num_steps": 1000', ""), "deepspeed", 512, "without its length"),
        (DEEPSPEED.replace("3e-4", '"auto"'), "deepspeed", 512, "'auto' must be a number; set it in this file"),
        (DEEPSPEED.replace("256", "250"), "deepspeed", 512, "no multiple"),
        (HF, "hf", 500, "nearest that fit: 496 and 512"),
        (HF.replace("16", "sixteen"), "hf", 512, "'sixteen' must be a number"),
        (without(PLAIN, "lr"), "plain", 512, "has no lr"),
        (without(PLAIN, "betas"), "plain", 512, "has no betas"),
        ("[1, 2]", "plain", 512, "keys and values"),
        ("a: [", "plain", 512, "cannot be read as YAML"),
        ("[optimizer", "torchtitan", 512, "cannot be read as TOML"),
        ("{", "deepspeed", 512, "cannot be read as JSON"),
        (HF, "keras", 512, "unknown format"),
        (HF, "hf", 0, "batch=0"),
    ],
)
def test_faults(text: str, form: str, batch: int, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        convert(text, form, form, batch, where="base.yaml")


def test_l2_is_not_given_to_a_decoupled_rule() -> None:
    text = PLAIN.replace("adamw", "adam")
    with pytest.raises(RuleError, match="inside the gradient"):
        convert(text, "plain", "plain", 512, rule="adamw_sde")
    assert yaml.safe_load(convert(text, "plain", "plain", 512).text)["weight_decay"] == 0.1  # Adam: sqrt, L2 stays


def test_deepspeed_adam_is_adamw() -> None:
    text = DEEPSPEED.replace('"AdamW"', '"Adam"')
    assert convert(text, "deepspeed", "deepspeed", 512).rule.name == "adamw_sde"
    l2 = text.replace('"lr": 3e-4', '"adam_w_mode": false, "lr": 3e-4', 1)
    assert convert(l2, "deepspeed", "deepspeed", 512).rule.name == "sqrt"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(HF)
    assert main([str(base), "--from", "hf", "--to", "hf", "--batch", "512"]) == 0
    out = capsys.readouterr()
    assert out.out == convert(HF, "hf", "hf", 512).text
    assert "learning_rate: 0.0001 -> 0.000282842712474619" in out.err
    assert "adam_epsilon: 1e-08 (default) -> " in out.err
    assert main([str(base), "--from", "hf", "--batch", "512", "-o", str(tmp_path / "new.yaml")]) == 0
    assert (tmp_path / "new.yaml").read_text() == out.out
    capsys.readouterr()
    for argv, message in [
        ([str(base), "--from", "hf", "--batch", "2048"], "beta_map=power"),
        ([str(tmp_path / "none.yaml"), "--from", "hf", "--batch", "512"], "No such file"),
        ([str(base), "--from", "keras", "--batch", "512"], "invalid choice"),
        ([str(base), "--from", "hf", "--batch", "512", "--rule", "sqroot"], "unknown rule"),
    ]:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "Traceback" not in err


def test_documents() -> None:
    assert number("1e-3") == 0.001
    assert number("8") == 8
    assert number("0x10") == "0x10"
    assert yaml.safe_load(f"x: {spell(5e-09)}") == {"x": 5e-09}
    assert tomllib.loads(f"x = {spell(5e-09)}") == {"x": 5e-09}
    y = Yaml("a: &x 1\nb: *x\n", "f")
    y.set(("a",), 2)
    with pytest.raises(RuleError, match="alias"):
        y.set(("b",), 3)
    t = Toml('a = "x # y"  # z\n[s]\nk = [1, 2]\n', "f")
    t.set(("a",), 3)
    t.set(("s", "k"), [4, 5])
    t.set(("new", "k"), 1e-9)
    assert t.render() == "a = 3  # z\n[s]\nk = [4, 5]\n\n[new]\nk = 1.0e-09\n"


@pytest.mark.parametrize(
    ("target", "said"),
    [("hf", "warmup_ratio: 0.1"), ("plain", "warmup_steps: 25"), ("torchtitan", "warmup_steps = 25")],
)
def test_a_warm_up_that_is_a_share_of_the_run_stays_one(target: str, said: str) -> None:
    text = "learning_rate: 0.0003\nwarmup_ratio: 0.1\nmax_steps: 1000\nper_device_train_batch_size: 32\n"
    assert said in convert(text, "hf", target, 128).text
