"""Recipes in and out: never silently wrong. Each case names the trainer's form and what would be wrong without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling_exps import scale
from scaling_exps.convert import Conversion, convert, main, optimizers, report
from scaling_exps.convert.documents import KEYS, Odd, number, open_document, spell
from scaling_exps.convert.forms import FORMS, guess
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
AXOLOTL = """\
base_model: some/model
datasets:
  - {path: some/data, type: alpaca}   # one line
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 3
optimizer: adamw_bnb_8bit
learning_rate: 0.00005
warmup_steps: 40
"""
HF_FLAGS = """\
#!/bin/bash
# --learning_rate 9
LR=1e-4
torchrun --nproc_per_node=4 train.py \\
  --per_device_train_batch_size 16 --gradient_accumulation_steps 2 \\
  --learning_rate $LR --adam_beta2=0.98 --output_dir "a b" \\
  --num_train_epochs 3 --warmup_steps 500   # --warmup_steps 7
"""
ACCELERATE = (
    "accelerate launch --num_processes 8 --mixed_precision=bf16 train.py --train_batch_size=4 --learning_rate=1e-5 "
    "--max_train_steps=8000 --lr_warmup_steps=500 --use_8bit_adam --checkpointing_steps=1000\n"
)
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
TIMM = """\
# ImageNet
torchrun --nproc-per-node=8 train.py /data \\
  --model resnet50 -b 128 \\
  --opt adamw --lr=5e-4 --opt-betas 0.9 0.98 --weight-decay 0.05 \\
  --model-ema --model-ema-decay 0.9998 --warmup-lr 1e-6 --min-lr 0 --epochs 300
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
TITAN_PYTHON = """\
from torchtitan.trainer import Trainer

def llama3_8b():
    return Trainer.Config(
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2000),
        training=TrainingConfig(local_batch_size=8, global_batch_size=256, seq_len=2 * 4096, steps=10_000),
    )
"""
NANOGPT = """\
# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
wandb_log = True
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
weight_decay = 1e-1
"""
MEGATRON = """\
TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 512
    --rampup-batch-size 16 16 5859375
    --train-iters 500000   # of them
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --lr 6.0e-5
    --min-lr 6.0e-6
    --lr-warmup-iters 2000
    --lr-decay-iters 430000
)
torchrun --nproc_per_node 8 pretrain_gpt.py ${TRAINING_ARGS[@]} --tensor-model-parallel-size 2
"""
NEMO = (
    "python megatron_gpt_pretraining.py trainer.devices=8 trainer.num_nodes=1 trainer.max_steps=300000 "
    "model.micro_batch_size=6 model.global_batch_size=192 model.tensor_model_parallel_size=1 "
    "model.optim.name=distributed_fused_adam model.optim.lr=6e-4 model.optim.betas=[0.9,0.95] "
    "model.optim.sched.warmup_steps=500 model.optim.sched.min_lr=6e-5\n"
)
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
DEEPSPEED_AUTO = """\
{"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
 "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
 "zero_optimization": {"stage": 3}}
"""
_ONE_CYCLE = DEEPSPEED.partition('"scheduler"')[0] + (
    '"scheduler": {"type": "OneCycle", '
    '"params": {"cycle_min_lr": 3e-5, "cycle_max_lr": 3e-4, "cycle_momentum": false}}}'
)
PARTNER = """\
{"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0,
 "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.95, 0.98], "weight_decay": 0.1}},
 "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 1e-6, "warmup_max_lr": 1e-4,
   "warmup_num_steps": 500, "total_num_steps": "auto"}}, "zero_optimization": {"stage": 2}}
"""
_MEGATRON_LM = "num_processes: 8\nmegatron_lm_config: {megatron_lm_tp_degree: 2, megatron_lm_pp_degree: 2"
PLAIN = """\
optimizer: adamw
batch: 256
lr: 1.0e-3   # peak
betas: [0.9, 0.999]
weight_decay: 0.1
ema: 0.9999
epochs: 10
"""

_EPOCHS = """\
trainer: {max_epochs: 101, devices: 1}
data: {batch_size: 64}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
lr_scheduler: {class_path: CosineAnnealingLR, init_args: {T_max: 101}}
"""
_LIT = "data: {batch_size: 32}\noptimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}\ntrainer:\n"
_LIT += "  devices: 1\n"
_PASSES = "trainer: {devices: 2, val_check_interval: 500, limit_train_batches: 1000}\ndata: {batch_size: 64}\n"
_PASSES += "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}\n"
_BOLTS = """\
trainer: {max_epochs: 90, devices: 1}
data: {batch_size: 64}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
lr_scheduler: {class_path: LinearWarmupCosineAnnealingLR, init_args: {warmup_epochs: W, max_epochs: M}}
"""
_CALLBACK = _LIT + "  max_steps: 1000\n  callbacks:\n    - class_path: lightning.pytorch.callbacks."
_AXOLOTL = "base_model: x\ndatasets: [{path: a}]\nmicro_batch_size: 2\nnum_epochs: 4\nlearning_rate: 1e-4\n"
_FLAGS = "--per_device_train_batch_size 8 --learning_rate 1e-4 --max_steps 100"
LLAMAFACTORY = """\
model: some/model
train_dataset: data.yaml
micro_batch_size: 1
global_batch_size: 16
optim_config: {name: adamw, lr: 1.0e-4, betas: [0.9, 0.95], weight_decay: 0.01}   # its own names
dist_config: {name: fsdp2}
max_steps: 100
"""
VERL = """\
set -x
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/data/train.parquet \\
    data.train_batch_size=1024 data.max_prompt_length=512 data.truncation='error' \\
    actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40 \\
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=40 \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.n=5 \\
    trainer.critic_warmup=0 trainer.n_gpus_per_node=8 trainer.nnodes=1 \\
    trainer.save_freq=20 trainer.test_freq=-1 trainer.total_epochs=15 $@
"""
VERL_PPO = """\
data: {train_batch_size: 512, max_response_length: 512}
actor_rollout_ref:
  actor:
    strategy: fsdp
    ppo_mini_batch_size: 128   # prompts
    ppo_micro_batch_size_per_gpu: 4
    grad_clip: 1.0
    optim: {lr: 1e-6, betas: [0.9, 0.95], weight_decay: 0.1}
  rollout: {name: vllm, n: 1, tensor_model_parallel_size: 2}
critic:
  ppo_mini_batch_size: ${actor_rollout_ref.actor.ppo_mini_batch_size}
  optim:
    lr: 1e-5
algorithm: {adv_estimator: gae}
trainer: {total_epochs: 15, n_gpus_per_node: 8, nnodes: 1, save_freq: 100, total_training_steps: 400}
"""
OPENRLHF = """\
ray job submit --address="http://127.0.0.1:8265" -- python3 -m openrlhf.cli.train_ppo_ray \\
   --ref_num_nodes 1 --ref_num_gpus_per_node 2 --critic_num_nodes 1 --critic_num_gpus_per_node 4 \\
   --actor_num_nodes 1 --actor_num_gpus_per_node 4 --vllm_num_engines 2 --vllm_tensor_parallel_size 2 \\
   --micro_train_batch_size 8 --train_batch_size 128 \\
   --micro_rollout_batch_size 16 --rollout_batch_size 1024 --n_samples_per_prompt 2 \\
   --max_epochs 1 --num_episodes 1 --zero_stage 3 --bf16 --adam_betas 0.9 0.95 \\
   --actor_learning_rate 5e-7 --critic_learning_rate 9e-6 --save_steps 20 --logging_steps 4 --eval_steps -1
"""

# (text, form, base batch, devices): every form that can be read, in every syntax.
CASES = {
    "hf": (HF, "hf", 64, 1),
    "axolotl": (AXOLOTL, "axolotl", 64, 4),
    "hf flags": (HF_FLAGS, "hf", 128, None),
    "accelerate": (ACCELERATE, "accelerate", 32, None),
    "lightning": (LIGHTNING, "lightning", 64, None),
    "timm": (TIMM, "timm", 1024, None),
    "timm yaml": (TIMM_YAML, "timm", 64, 1),
    "torchtitan": (TITAN, "torchtitan", 64, 64),
    "torchtitan python": (TITAN_PYTHON, "torchtitan", 256, None),
    "nanogpt": (NANOGPT, "nanogpt", 480, None),
    "megatron": (MEGATRON, "megatron", 512, None),
    "nemo": (NEMO, "nemo", 192, None),
    "deepspeed": (DEEPSPEED, "deepspeed", 256, None),
    "plain": (PLAIN, "plain", 256, None),
    "llamafactory": (LLAMAFACTORY, "llamafactory", 16, None),
    "verl": (VERL, "verl", 256, None),
    "verl yaml": (VERL_PPO, "verl", 128, None),
    "openrlhf": (OPENRLHF, "openrlhf", 128, None),
}


def values(text: str) -> dict[str, object]:
    doc = open_document(text, "new")
    return {".".join(map(str, p)): v for p, v in doc.values.items()}


def hold(new: dict[str, object], expected: dict[str, object]) -> None:
    for key, want in expected.items():
        assert new[key] == (want if isinstance(want, str) else pytest.approx(want, rel=1e-12)), key


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_at_the_base(case: str) -> None:
    """κ = 1 is the file itself, to the byte, with the line ends of Windows too; its form is guessed from its keys."""
    text, form, batch, devices = CASES[case]
    for same in (text, text.replace("\n", "\r\n")) if "\\\n" not in text else (text,):
        done = convert(same, batch=batch, devices=devices)
        assert (done.text, done.changes, done.source) == (same, (), form)
        assert done.sentence.endswith(str(batch)) or re.match(rf"base: {batch} (\(|prompts)", done.sentence)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str) -> None:
    """The numbers come back; only what changes differs from the file (a lost comment or key fails here)."""
    text, form, batch, devices = CASES[case]
    there = convert(text, batch=batch * 4, devices=devices)
    back = convert(there.text, form, batch=batch, devices=devices)
    assert back.scaled.batch == there.base.batch
    assert back.scaled.hyper.lr == pytest.approx(there.base.hyper.lr, rel=1e-12)
    assert back.scaled.hyper.betas == pytest.approx(there.base.hyper.betas, rel=1e-12)
    assert back.scaled.steps == there.base.steps
    old, new = values(text), values(there.text)
    named = {c.split(": ", 1)[0].replace("optim_args.", "optim_args") for c in there.changes}
    assert {k for k in {*old, *new} if old.get(k) != new.get(k)} == named
    for comment in re.findall(r"#.*", text):
        assert comment in there.text
    windows = convert(text.replace("\n", "\r\n"), batch=batch * 4, devices=devices).text if "\\\n" not in text else ""
    assert windows in ("", there.text.replace("\n", "\r\n"))


# --- fifteen kinds of files that people have: (text, options, what the file holds then, what is said) ---

FIFTEEN: dict[str, tuple[str, dict[str, object], dict[str, object], str]] = {
    "01 an optimizer by flag": (HF + "use_muon: true\n", {}, {}, "use_muon=True .*Muon hands part"),
    "02 RMSprop": (
        "optim: rmsprop\nlearning_rate: 5.0e-7\nper_device_train_batch_size: 4\nnum_train_epochs: 1\n",
        {"devices": 2, "batch": 32},
        {"optim_args": "alpha=0.96,eps=5e-09", "learning_rate": 1e-6},
        "rule sqrt",
    ),
    "02 RMSprop, alpha and eps in one text": (
        "optim: rmsprop\noptim_args: alpha=0.99,eps=1e-6  # both\nlearning_rate: 5.0e-7\n"
        "per_device_train_batch_size: 4\n", {"devices": 1, "batch": 16},
        {"optim_args": "alpha=0.96,eps=5e-07", "learning_rate": 1e-6}, "optim_args.eps: 1e-06 -> 5e-07"),
    "02 RMSprop, alpha alone": (
        "optim: rmsprop\noptim_args: 'alpha=0.99'\nlearning_rate: 5.0e-7\nper_device_train_batch_size: 4\n",
        {"devices": 1, "batch": 16}, {"optim_args": "alpha=0.96,eps=5e-09"}, "optim_args.alpha: 0.99 -> 0.96"),
    "02 RMSprop by flags": (
        "python t.py --optim rmsprop --optim_args 'alpha=0.99, eps=1e-6' --learning_rate 5e-7 "
        "--per_device_train_batch_size 4\n",
        {"devices": 1, "batch": 16}, {"optim_args": "alpha=0.96,eps=5e-07"}, "optim_args.alpha: 0.99 -> 0.96"),
    "03 parallel degrees": (
        "pipeline_model_parallel_size: 4\nexpert_model_parallel_size: 2\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 16\nlearning_rate: 3e-6\n",
        {"devices": 8, "batch": 64},
        {"gradient_accumulation_steps": 64},
        "base: 1 per device × 1 data-parallel .8 devices / pipeline 4 / expert 2. × 16 accumulation = 16",
    ),
    "03 asked for": (HF, {"batch": 256, "devices": None}, {}, "data-parallel degree is not in it: give --devices"),
    "04 axolotl": (
        AXOLOTL,
        {"devices": 1, "batch": 64},
        {"gradient_accumulation_steps": 32, "warmup_steps": 10, "adam_beta1": 0.6, "learning_rate": 1e-4},
        "2 per device × 1 data-parallel × 8 accumulation = 16",
    ),
    "05 flags": (
        HF_FLAGS,
        {"batch": 512, "devices": None},
        {"gradient_accumulation_steps": 8, "warmup_steps": 125, "learning_rate": 2e-4, "adam_beta2": 0.92},
        "16 per device × 4 data-parallel × 2 accumulation = 128",
    ),
    "06 braces": (
        "trainer: {max_epochs: 90, accumulate_grad_batches: 2, devices: auto}\ndata: {init_args: {batch_size: 64}}\n"
        "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}\n"
        "lr_scheduler: {class_path: CosineAnnealingLR, init_args: {T_max: 9000, eta_min: 1.0e-6}}\n",
        {"devices": 1, "batch": 512},
        {"lr_scheduler.init_args.eta_min": 2e-6, "optimizer.init_args.eps": 5e-9, "lr_scheduler.init_args.T_max": 2250},
        "T_max=9000 is read as optimizer steps: the schedule is longer",
    ),
    "07 a pair inside the model": (
        "model:\n  init_args:\n    optimizer: [AdamW, {lr: 0.0005, weight_decay: 0.01}]\n"
        "    lr_scheduler: [ReduceLROnPlateau, {factor: 0.5, min_lr: 1.0e-5}]\n"
        "data: {init_args: {train_batch_size: 32}}\ntrainer:\n  max_steps: 100_000\n",
        {"devices": 1, "batch": 128},
        {"model.init_args.optimizer.1.betas": [0.6, 0.996], "model.init_args.lr_scheduler.1.min_lr": 2e-5},
        "trainer.max_steps: 100000 -> 25000",
    ),
    "07 keys that were looked for": (
        "trainer: {max_steps: 10}\noptimizer: {class_path: AdamW}\ndata: {class_path: D, init_args: {bunch: 32}}\n",
        {},
        {},
        "no batch size.*Looked for: batch_size, train_batch_size",
    ),
    "08 OneCycle": (
        "data: {batch_size: 128}\noptimizer:\n  class_path: torch.optim.Adam\n  init_args: {lr: 1.0e-3}\n"
        "lr_scheduler:\n  class_path: torch.optim.lr_scheduler.OneCycleLR\n  init_args:\n    max_lr: 1.0e-2\n"
        "    total_steps: 20000\n",
        {"devices": 1, "batch": 512},
        {"lr_scheduler.init_args.max_lr": 0.02, "lr_scheduler.init_args.total_steps": 5000,
         "lr_scheduler.init_args.base_momentum": 0.4},
        "cycle_momentum .* overrides beta1",
    ),
    "09 merge keys": (
        "defaults: &base\n  learning_rate: 3.0e-4\n  adam_beta2: 0.95\ntraining:\n  <<: *base\n"
        "per_device_train_batch_size: 8\n<<: *base\nmax_steps: 1000\n",
        {"devices": 1, "batch": 32},
        {"learning_rate": 6e-4, "adam_beta2": 0.8, "defaults.learning_rate": 6e-4},
        "defaults.learning_rate: 0.0003 -> 0.0006 .the same place",
    ),
    "10 keys beside params": (
        '{"train_batch_size": 512, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1},\n'
        ' "optimizer": {"type": "Adam", "params": {"lr": 2e-5}, "eps": 1e-6, "weight_decay": 0.01}}\n',
        {"batch": 2048},
        {"optimizer.params.eps": 5e-9, "optimizer.eps": 1e-6, "gradient_accumulation_steps": 16},
        "DeepSpeed ignores keys beside params: optimizer.eps, optimizer.weight_decay",
    ),
    "11 auto": (DEEPSPEED_AUTO, {}, {}, '"auto": the trainer\'s own file decides them.*--with'),
    "11 auto, as a pair": (
        HF,
        {"batch": 256, "partners": [(DEEPSPEED_AUTO, "ds.json")]},
        {"gradient_accumulation_steps": 16},
        'ds.json: its 6 values "auto" follow this file',
    ),
    "12 torchtitan of 2024": (
        "[optimizer]\nlr = 3e-4\n[training]\nbatch_size = 4\nwarmup_steps = 1000  # linear\nsteps = 20_000\n"
        "data_parallel_shard_degree = 16\ntensor_parallel_degree = 4\n",
        {"batch": 256, "devices": None},
        {"training.warmup_steps": 250, "training.steps": 5000, "training.batch_size": 16},
        "4 per device × 16 data-parallel × 1 accumulation = 64",
    ),
    "13 a fork's accumulation": (
        "[optimizer]\nlr = 8e-4\n[training]\nlocal_batch_size = 8\ngradient_accumulation_steps = 4\nsteps = 12000\n"
        "[lr_scheduler]\nwarmup_steps = 600\n",
        {"devices": 1, "batch": 128},
        {"training.gradient_accumulation_steps": 16},
        "8 per device × 1 data-parallel × 4 accumulation = 32",
    ),
    "13 not understood": (TITAN.replace("steps = 1000", "steps = 1000\nbatch_multiplier = 4"), {}, {},
     "batch_multiplier=4"),
    "14 a ramp": (
        "[optimizer]\nlr = 6e-4\n[training]\nlocal_batch_size = 4\nglobal_batch_size = 256\nsteps = 50000\n"
        "[batch_size_scheduler]\nstart_batch_size = 32\nrampup_samples = 1_000_000\n",
        {"batch": 1024},
        {"batch_size_scheduler.start_batch_size": 128, "batch_size_scheduler.rampup_samples": 1_000_000},
        "both of its ends are moved",
    ),
    "15 LAMB": (TIMM_YAML.replace("opt: sgd", "opt: lamb"), {}, {}, "LAMB divides each layer's step.*You et al. 2020"),
    "15 AdamW": (
        TIMM_YAML.replace("opt: sgd", "opt: adamw\nmodel_ema: true\nmodel_ema_decay: 0.9998\nwarmup_epochs: 20"),
        {"batch": 256},
        {"lr": 0.1, "warmup_lr": 2e-5, "min_lr": 0, "model_ema_decay": 0.9998**4, "lr_base": 0.1, "warmup_epochs": 20},
        "the trainer's, at this batch",
    ),
}  # fmt: skip


def test_known_pair() -> None:
    """A public recipe at 240 sequences, which its author took to 2,160: 5,650 steps and 1,130 of warm-up."""
    text = "global_batch_size: 240\ntrain_iters: 50862\nlr_warmup_iters: 10172\nlr: 1e-4\nadam_beta1: 0.9\n"
    done = convert(text, "megatron", batch=2160)
    new = yaml.safe_load(done.text)
    assert abs(new["train_iters"] - 5650) <= 2 and abs(new["lr_warmup_iters"] - 1130) <= 1
    assert any("beside the clocks" in n and "lr √κ·η; betas 1 - κ·(1 - β)" in n for n in done.notes)


# --- every number that differs is named, and every named number differs ---

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?(?![\w])")


def numbers(text: str) -> set[float]:
    return {float(x.replace("_", "")) for x in _NUMBER.findall(text)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from(sorted(CASES)),
    lr=st.sampled_from([1.37e-4, 2.9e-3, 7.7e-5]),
    kappa=st.sampled_from([2, 3, 4]),
    clip=st.sampled_from(["keep", "rule"]),
    beta_map=st.sampled_from(["linear", "power"]),
    warmup=st.integers(100, 999),
)
def test_every_number_is_named(case: str, lr: float, kappa: int, clip: str, beta_map: str, warmup: int) -> None:
    text, _, batch, devices = CASES[case]
    text = re.sub(r"((?:learning_rate|\blr)(?:\"?\s*[:=]\s*| ))([\d.]+(?:e-\d+)?)",
                  rf"\g<1>{lr}", text)  # fmt: skip
    text = re.sub(r"((?:warmup_steps|warmup-iters|warmup_num_steps)(?:\"?\s*[:=]\s*| ))(\d+)", rf"\g<1>{warmup}", text)
    done = convert(text, batch=batch * kappa, devices=devices, clip=clip, beta_map=beta_map)
    fresh = numbers(done.text) - numbers(text)
    named = {x for c in done.changes for x in numbers(c.rpartition("->")[2].split(" (the same")[0])}
    assert fresh <= named, fresh - named
    assert named <= numbers(done.text), named - numbers(done.text)


# --- forms ---


def test_the_formulas_are_those_of_the_beta_map() -> None:
    """Fails if β^κ were written and 1 - κ·(1 - β) said."""
    told = [" ".join(convert(HF, batch=256, devices=1, beta_map=m).notes) for m in ("linear", "power")]
    assert "betas 1 - κ·(1 - β)" in told[0] and "betas β^κ" in told[1]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (MEGATRON, {"batch": 2048}, {"rampup_batch_size": [64, 64, 5859375], "train_iters": 125000, "min_lr": 1.2e-5}),
        (NEMO, {"batch": 768}, {"model.optim.betas": [0.6, 0.8], "model.optim.sched.warmup_steps": 125,
         "model.optim.eps": 5e-9}),
        (NANOGPT, {"batch": 1920}, {"gradient_accumulation_steps": 160, "warmup_iters": 500, "min_lr": 1.2e-4}),
        (TITAN_PYTHON, {"batch": 1024}, {"optimizer.beta1": 0.6, "training.steps": 2500,
         "training.global_batch_size": 1024}),
        (ACCELERATE, {"batch": 128}, {"gradient_accumulation_steps": 4, "lr_warmup_steps": 125,
         "adam_weight_decay": 0.02}),
        (_ONE_CYCLE, {"batch": 1024}, {"scheduler.params.cycle_first_step_size": 500,
         "scheduler.params.cycle_max_lr": 6e-4}),
        (LIGHTNING, {"batch": 256, "new_devices": 4}, {"trainer.devices": 4, "trainer.accumulate_grad_batches": 2}),
        (TIMM, {"batch": 4096, "clip": "rule"}, {"grad_accum_steps": 4, "model_ema_decay": 0.9998**4,
         "warmup_lr": 2e-6}),
        (HF, {"batch": 256, "devices": 1, "clip": "rule"}, {"max_grad_norm": 0.5, "eval_steps": 0.1,
         "save_steps": 250}),
        (HF, {"batch": 1024, "devices": 1, "beta_map": "power"}, {"adam_beta1": 0.95**16}),
        (HF + "num_generations: 8\nsteps_per_generation: 4\n", {"batch": 256, "devices": 1},
         {"steps_per_generation": 16}),
        (HF + "lr_scheduler_kwargs:\n  min_lr: 1.0e-6\n", {"batch": 256, "devices": 1},
         {"lr_scheduler_kwargs.min_lr": 2e-6}),
        (AXOLOTL + "lr_groups:\n  - {name: a, lr: 1.0e-5}\n", {"batch": 256, "devices": 4}, {"lr_groups.0.lr": 2e-5}),
        (HF + "data_parallel_size: 4\n", {"batch": 1024}, {"gradient_accumulation_steps": 16}),
        (HF, {"batch": 1024, "partners": [("distributed_type: MULTI_GPU\nnum_processes: 4\n", "a.yaml")]},
         {"max_steps": 2500}),
        (HF.replace("adamw_torch", "sgd\noptim_args: momentum=0.9"), {"batch": 256, "devices": 1},
         {"learning_rate": 4e-4}),
        (VERL, {"batch": 1024}, {"data.train_batch_size": 4096, "trainer.save_freq": 5, "trainer.test_freq": -1,
         "actor_rollout_ref.actor.ppo_mini_batch_size": 1024,
         "actor_rollout_ref.actor.optim.betas": [0.6, 0.996], "actor_rollout_ref.actor.optim.weight_decay": 0.02,
         "actor_rollout_ref.actor.optim.override_optimizer_config.eps": 5e-9, "actor_rollout_ref.rollout.n": 5}),
        (VERL_PPO, {"batch": 512, "clip": "rule"}, {"critic.optim.lr": 2e-5, "critic.optim.betas": [0.6, 0.996],
         "critic.optim.weight_decay": 0.02, "critic.optim.override_optimizer_config.eps": 5e-9,
         "actor_rollout_ref.actor.optim.lr": 2e-6, "actor_rollout_ref.actor.optim.betas": [0.6, 0.8],
         "actor_rollout_ref.actor.grad_clip": 0.5, "trainer.total_training_steps": 100,
         "data.train_batch_size": 2048}),
        (OPENRLHF, {"batch": 512}, {"actor_learning_rate": 1e-6, "critic_learning_rate": 1.8e-5,
         "adam_betas": [0.6, 0.8],
         "rollout_batch_size": 4096, "train_batch_size": 512, "micro_train_batch_size": 8, "save_steps": 5,
         "logging_steps": 1, "eval_steps": -1, "n_samples_per_prompt": 2}),
        (OPENRLHF.replace("--critic_learning_rate 9e-6", "--enable_ema --ema_beta 0.99"), {"batch": 512},
         {"critic_learning_rate": 1.8e-5, "ema_beta": 0.99**4}),
        (LLAMAFACTORY, {"batch": 64}, {"optim_config.betas": [0.6, 0.8], "optim_config.eps": 5e-9, "max_steps": 25,
         "optim_config.lr": 2e-4, "optim_config.weight_decay": 0.02}),
        ("optimizer: nadam\nbatch: 8\nlr: 1e-3\nbetas: [0.9, 0.999]\n", {"batch": 32}, {"betas": [0.6, 0.996]}),
        # what counts micro-batches of one device goes with them and with the devices
        (HF + "steps_per_generation: 8\n", {"batch": 256, "devices": 1, "new_devices": 4},
         {"steps_per_generation": 8}),
        (HF.replace("steps: 4\n", "steps: 1\n") + "steps_per_generation: 4\n", {"batch": 8, "devices": 4},
         {"per_device_train_batch_size": 2, "steps_per_generation": 4}),
        (_PASSES, {"batch": 512, "new_devices": 8}, {"trainer.val_check_interval": 125,
         "trainer.limit_train_batches": 250}),
        (_PASSES, {"batch": 512}, {"trainer.val_check_interval": 500, "trainer.limit_train_batches": 1000}),
        (_PASSES, {"batch": 32}, {"data.batch_size": 16, "trainer.val_check_interval": 2000,
         "trainer.limit_train_batches": 4000}),
        (MEGATRON.replace("--train-iters", "--exit-interval 2000 --train-iters"), {"batch": 2048},
         {"exit_interval": 500}),
        (_BOLTS.replace("W,", "500,").replace(" M", " 20000"), {"batch": 256},
         {"lr_scheduler.init_args.warmup_epochs": 125,
         "lr_scheduler.init_args.max_epochs": 5000}),
        (_BOLTS.replace("W,", "5,").replace(" M", " 90"), {"batch": 256, "duration": 2.0},
         {"lr_scheduler.init_args.warmup_epochs": 10,
         "lr_scheduler.init_args.max_epochs": 180}),
        (_BOLTS.replace("warmup_epochs: W, max_epochs: M", "lr_min: 1.0e-6, warmup_lr_init: 1.0e-7, warmup_t: 500, "
         "t_initial: 20000"), {"batch": 256}, {"lr_scheduler.init_args.lr_min": 4e-6,
         "lr_scheduler.init_args.warmup_lr_init": 4e-7, "lr_scheduler.init_args.t_initial": 5000,
         "lr_scheduler.init_args.warmup_t": 125}),
        (TIMM_YAML + "sched: multistep\ndecay_milestones: [30, 60]\nmixup_off_epoch: 80\n",
         {"batch": 4096, "devices": 8, "duration": 2.0}, {"decay_milestones": [60, 120], "mixup_off_epoch": 160,
         "warmup_epochs": 10}),
        # what only generates has devices of its own
        (AXOLOTL + "vllm:\n  tensor_parallel_size: 2\n  data_parallel_size: 2\n", {"batch": 256, "devices": 4},
         {"gradient_accumulation_steps": 32}),
        (HF + "vllm_tensor_parallel_size: 2\n", {"batch": 1024, "devices": 4}, {"gradient_accumulation_steps": 16}),
        # one place in the file under several names
        ("bs: 32\nlr: 1e-3\ntrainer: {devices: 2, max_steps: 1000}\ndata: {batch_size: '${bs}'}\n"
         "optimizer: {_target_: torch.optim.AdamW, lr: '${lr}', betas: [0.95, 0.98]}\n"
         "scheduler: {_target_: transformers.get_cosine_schedule, num_training_steps: '${trainer.max_steps}'}\n",
         {"batch": 256}, {"lr": 2e-3, "trainer.max_steps": 250, "trainer.accumulate_grad_batches": 4,
         "scheduler.num_training_steps": 250, "data.batch_size": 32}),
        (HF.replace("max_steps: 10000", "max_steps: &end 10000\neval_delay: *end"), {"batch": 256, "devices": 1},
         {"max_steps": 2500, "eval_delay": 2500}),
        # the launcher's own count beside the trainer's; --num_processes counts those of all machines
        ("torchrun --nproc_per_node=2 t.py trainer._target_=lightning.Trainer trainer.devices=2 data.batch_size=32 "
         "optimizer._target_=torch.optim.AdamW optimizer.lr=1e-3 optimizer.betas=[0.95,0.98]\n", {"batch": 256},
         {"optimizer.lr": 2e-3}),
        ("accelerate launch --num_machines 2 --num_processes 16 t.py --learning_rate 1e-4 --adam_beta1 0.95 "
         "--per_device_train_batch_size 2\n", {"batch": 128},
         {"learning_rate": 2e-4, "gradient_accumulation_steps": 4}),
        ("accelerate launch --num_processes 4 t.py --train_batch_size=16 --num_epochs=100 --learning_rate=1e-4 "
         "--lr_warmup_steps=500 --sample_batch_size 4\n", {"batch": 256}, {"adam_beta1": 0.8, "lr_warmup_steps": 125,
         "adam_weight_decay": 2e-6}),
    ],
)  # fmt: skip
def test_what_goes_with_the_batch(text: str, options: dict[str, object], expected: dict[str, object]) -> None:
    new = values(convert(text, **options).text)
    hold(new, expected)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("EMAWeightAveraging", "{decay: 0.999, update_every_n_steps: 40}",
         {"decay": 0.999, "update_every_n_steps": 10}),
        ("EMAWeightAveraging", "{decay: 0.999, update_every_n_steps: 3}", {"decay": 0.999 ** (4 / 3)}),
        ("EMAWeightAveraging", "{decay: 0.999}", {"decay": 0.999**4}),
        ("EMAWeightAveraging", "{use_buffers: true, update_starting_at_step: 400}",
         {"decay": 0.999**4, "update_starting_at_step": 100}),
        ("EMAWeightAveraging", "{update_every_n_steps: 40}", {"update_every_n_steps": 10}),
        ("MyEMA", "{decay: 0.5, update_every_n_epochs: 2}", {"decay": 0.5, "update_every_n_epochs": 2}),
    ],
)  # fmt: skip
def test_an_average_keeps_its_half_life_however_often_it_is_updated(
    name: str, args: str, expected: dict[str, object]
) -> None:
    """Updated every n steps instead of every n0, its decay has the exponent κ·n/n0 (Busbridge et al. 2023)."""
    new = values(convert(_CALLBACK + f"{name}\n      init_args: {args}\n", batch=128).text)
    hold(new, {f"trainer.callbacks.0.init_args.{k}": v for k, v in expected.items()})


_INVERSE = "learning_rate: 1e-4\nper_device_train_batch_size: 64\nlr_scheduler_type: inverse_sqrt\n"


@pytest.mark.parametrize(
    ("text", "timescale", "stays"),
    [
        (_INVERSE, 2500, False),
        (_INVERSE + "lr_scheduler_kwargs: {timescale: 400}\n", 100, False),
        (_INVERSE + "warmup_steps: 400\n", None, False),
        (_AXOLOTL + "lr_scheduler: inverse_sqrt\nwarmup_steps: 0\n", 2500, False),
        (_AXOLOTL + "lr_scheduler: inverse_sqrt\n", None, False),
        (f"python t.py {_FLAGS} --lr_scheduler_type inverse_sqrt\n", None, True),
        (ACCELERATE.replace("=500", "=0").strip() + " --lr_scheduler_type=inverse_sqrt\n", None, True),
    ],
)
def test_inverse_sqrt_decays_in_samples(text: str, timescale: int | None, stays: bool) -> None:
    base = convert(text, batch=64, rule="lr_only", devices=None if "processes" in text else 1).base.batch
    done = convert(text, batch=base * 4, devices=None if "processes" in text else 1)
    assert values(done.text).get("lr_scheduler_kwargs.timescale") == timescale
    assert any("10000 steps, stays" in note for note in done.notes) == stays


@pytest.mark.parametrize(
    ("length", "warmup", "rest", "kappa"), [("max_steps: 100000", 1000, 99000, 4), ("max_epochs: 100", 5, 95, 1)]
)
def test_one_schedule_counts_steps_or_epochs_and_not_both(length: str, warmup: int, rest: int, kappa: int) -> None:
    text = f"""
trainer: {{{length}, devices: 1}}
data: {{batch_size: 64}}
optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.SequentialLR
  init_args:
    schedulers:
      - {{class_path: torch.optim.lr_scheduler.LinearLR, init_args: {{total_iters: {warmup}}}}}
      - {{class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {{T_max: {rest}}}}}
    milestones: [{warmup}]
"""
    at = "lr_scheduler.init_args."
    expected = {at + "schedulers.0.init_args.total_iters": warmup / kappa, at + "milestones": [warmup / kappa],
                at + "schedulers.1.init_args.T_max": rest / kappa}  # fmt: skip
    hold(values(convert(text, batch=256).text), expected)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("eval_steps: 100\nsave_steps: 300\n", {"eval_steps": 12, "save_steps": 36}),
        ("save_steps: 1000\n", {"eval_steps": 62, "save_steps": 124}),
        ("eval_steps: 100\n", {"eval_steps": 12, "save_steps": 60}),
        ("logging_steps: 100\nsave_steps: 300\n", {"logging_steps": 12, "save_steps": 36}),
    ],
)
def test_saves_stay_on_evaluations(tmp_path: Path, lines: str, expected: dict[str, object]) -> None:
    """Rounded apart, the Trainer refuses them: load_best_model_at_end needs every save to be evaluated."""
    text = f"output_dir: {tmp_path}\nlearning_rate: 1e-4\nper_device_train_batch_size: 8\nadam_beta1: 0.95\n"
    text += f"load_best_model_at_end: true\neval_strategy: steps\nuse_cpu: true\n{lines}"
    new = convert(text, batch=64, devices=1).text
    hold(values(new), expected)
    pytest.importorskip("accelerate", reason="transformers builds TrainingArguments only with accelerate installed")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "new.yaml").write_text(new)
    transformers.HfArgumentParser(transformers.TrainingArguments).parse_yaml_file(str(tmp_path / "new.yaml"))


def test_an_average_without_its_decay_is_named() -> None:
    assert any("MyEMA: the decay of its average" in n for n in convert(_CALLBACK + "MyEMA\n", batch=128).notes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_EPOCHS, {"trainer.max_epochs": 50, "lr_scheduler.init_args.T_max": 50}),
        (TIMM_YAML.replace("90", "101") + "warmup_epochs: 5\n", {"epochs": 50, "warmup_epochs": 2}),
        (MEGATRON.replace("--train-iters 500000", "--train-samples 1000001"), {"train_samples": 500000}),
        (HF.replace("max_steps: 10000", "num_train_epochs: 3"), {"num_train_epochs": 1.5}),
        (AXOLOTL, {"num_epochs": 1.5}),
    ],
)
def test_half_the_run_is_whole_where_the_trainer_counts_in_whole(text: str, expected: dict[str, object]) -> None:
    """Lightning's CLI refuses 50.5 epochs, timm's range() and Megatron's parser too; the Trainer takes 1.5."""
    layout = {"devices": 1} if "nproc" not in text else {"devices": None}
    batch = convert(text, batch=256, rule="lr_only", **layout).base.batch
    done = convert(text, batch=batch, duration=0.5, rule="lr_only", **layout)
    new = values(done.text)
    for key, want in expected.items():
        assert (new[key], type(new[key])) == (want, type(want))
        assert any(n.startswith(f"{key}: ") and f"written {want}" in n for n in done.notes) == isinstance(want, int), (
            key
        )


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (HF.replace("optim: adamw_torch", "optim: adafactor"), {}, "optim=adafactor: Adafactor clips its update"),
        (HF.replace("optim: adamw_torch", "optim: galore_adamw"), {}, "GaLore keeps its moments"),
        (HF.replace("optim: adamw_torch", "optim: mystery"), {}, "unknown optimizer class 'mystery'.*known: adamw"),
        (HF + "num_generations: 24\n", {}, "no multiple of num_generations=24.*nearest: 240 and 264"),
        (HF + "effective_batch_size: 512\n", {}, "effective_batch_size=512 .it may change the batch"),
        (HF + "accelerator_config: {split_batches: true}\n", {}, "split_batches=True"),
        (HF + "auto_find_batch_size: true\n", {}, "auto_find_batch_size"),
        (HF, {"batch": 64 * 32}, r"The largest legal batch is 1279.*Use beta_map=power"),
        (VERL, {"batch": 272}, r"batch 272 is no multiple of 64: 5 completions each must .*nearest: 256 and 320"),
        (VERL.replace("data.train_batch_size=1024", "data.train_batch_size=1000"), {}, "no multiple of ppo_mini_batch"),
        (VERL_PPO.replace("fsdp", "megatron"), {"batch": 512}, "strategy=megatron"),
        (VERL_PPO.replace("ppo_mini_batch_size: $" + "{actor_rollout_ref.actor.ppo_mini_batch_size}",
         "ppo_mini_batch_size: 64"), {"batch": 512}, "critic.ppo_mini_batch_size=64 is not the actor's"),
        (VERL_PPO.replace("lr: 1e-5", "lr: 1e-5\n    optimizer: Muon"), {"batch": 512}, "critic.optim.optimizer is"),
        (OPENRLHF.replace("1024", "1000"), {"batch": 512}, "a rollout makes 1000 prompts × 2 completions = 2000, no"),
        (OPENRLHF + " --use_dynamic_batch", {"batch": 512}, "use_dynamic_batch"),
        (LLAMAFACTORY.replace("adamw", "muon"), {}, "optim_config.name=muon: Muon hands part"),
        (LLAMAFACTORY.replace("name: adamw, ", ""), {}, "optim_config is there without its name"),
        (LLAMAFACTORY.replace("lr: 1.0e-4, ", ""), {}, "whether learning_rate or 1e-4 counts"),
        (LLAMAFACTORY.replace("optim_config", "#"), {"batch": 64}, "no key for what is .*optim_config: .name: adamw"),
        *((HF + f"{flag}: true\n", {}, f"{flag}=True .*{word}") for flag, word in (
            ("use_galore", "GaLore"), ("use_apollo", "APOLLO"), ("use_badam", "BAdam"), ("use_muon", "Muon"),
            ("use_adam_mini", "Adam-mini"), ("use_lomo", "LOMO"), ("galore_layerwise", "GaLore"))),
        (HF, {"batch": 250}, "nearest that fit: 240 and 256"),
        (HF.replace("16", "sixteen"), {}, "'sixteen' must be a number"),
        (HF, {"partners": [(DEEPSPEED, "ds.json")]}, "ds.json: optimizer.params.lr=0.0003 is not 0.0001, as"),
        (HF, {"partners": [(PARTNER.replace('"betas": [0.95, 0.98], ', ""), "ds.json")]},
         r"params.betas=\[0.9, 0.999\] .not there: DeepSpeed's own default. is not \[0.95, 0.98\]"),
        (HF, {"partners": [(PARTNER.replace('"warmup_num_steps"', '"cycle_first_step_size"'), "ds.json")]},
         "ds.json: decides itself what has to change .scheduler.params.cycle_first_step_size=500"),
        (HF, {"partners": [(PARTNER.replace('"zero', '"curriculum_learning": {"enabled": true}, "zero'), "ds.json")]},
         "ds.json: curriculum_learning changes the batch"),
        (HF, {"partners": [("num_processes: 1\ndeepspeed_config: {gradient_accumulation_steps: 1}\n", "a.yaml")]},
         "a.yaml: deepspeed_config.gradient_accumulation_steps=1 is not 4"),
        (HF, {"devices": None, "partners": [("num_processes: 9\nparallelism_config: {parallelism_config_tp_size: 2}\n",
         "a.yaml")]}, r"9 devices cannot be shared by replicas of 2 each .tensor 2 in a\.yaml"),
        (HF, {"devices": None, "partners": [(_MEGATRON_LM + ", megatron_lm_num_micro_batches: 2}\n", "a.yaml")]},
         "a.yaml: megatron_lm_num_micro_batches=2 accumulates beside"),
        (LIGHTNING.replace("AdamW", "LBFGS"), {"devices": None}, "torch.optim.LBFGS: no batch-size rule"),
        (LIGHTNING, {"devices": 4}, "says 2 data-parallel, and --devices 4 makes 4"),
        (HF_FLAGS.replace("=4", "=8 --nnodes=4"), {"devices": None, "batch": 2048, "new_devices": 2},
         "--new-devices 2 is no multiple of the 4 nodes that it names: give 4, or change"),
        (HF_FLAGS.replace("=4", "=8 --nnodes=4"), {"devices": None, "batch": 1920, "new_devices": 10},
         "--new-devices 10 is no multiple of the 4 nodes that it names: give 8 or 12, or change"),
        (TITAN.replace("steps = 1000", ""), {"devices": 64}, "without its length: set training.steps"),
        (DEEPSPEED.replace("256", "250"), {"devices": None}, "no multiple"),
        (DEEPSPEED.replace('"AdamW"', '"OneBitAdam"'), {"devices": None}, "1-bit Adam freezes v"),
        (DEEPSPEED.replace('"warmup_max_lr": 3e-4, ', ""), {"devices": None}, "WarmupDecayLR without .*take 0.001"),
        (_ONE_CYCLE.replace(', "cycle_momentum": false', ""), {"devices": None}, "OneCycle overrides the betas"),
        (MEGATRON.replace("512", "$GBS"), {"devices": None, "batch": 2048}, "GBS, which is not set in this file"),
        (MEGATRON.replace("--nproc_per_node 8", "--nproc_per_node 9"), {"devices": None}, "9 devices cannot be shared"),
        (NANOGPT + "other = max_iters // 10\n", {"devices": None, "batch": 1920}, "other would become .* computes it"),
        (HF.replace("adamw_torch", "rmsprop\noptim_args: momentum=0.9"), {}, "RMSprop with momentum"),
        ("accelerate launch --config_file zero3.yaml t.py --per_device_train_batch_size 2 --learning_rate 1e-5 \n",
         {}, "config_file=.*the values in that file count too"),
        ("trainer: {devices: 1}\ndata: {batch_size: 32}\nmodel: {opt: [Adam, {lr: 1}], opt2: [SGD, {lr: 1}]}\n",
         {"devices": None}, "builds 2 optimizers"),
        (ACCELERATE.replace("--use_8bit_adam", "--scale_lr"), {"devices": None}, "scale_lr=True: it multiplies"),
        ("lr: &lr 3e-4\nlearning_rate: *lr\nper_device_train_batch_size: 8\nmax_steps: 10\n", {"batch": 32},
         "one place in the file"),
        (TITAN.replace("[training]", "[training]\nwarmup_steps = 7"), {"devices": 64}, "which one counts"),
        ("a: 1\nb: 2\n", {}, "no known form of recipe.*looked for"),
        (HF.replace("adamw_torch", "muon"), {}, "Muon hands part of the parameters"),
        (AXOLOTL + "dp_shard_size: 4\n", {"devices": None, "new_devices": 8}, "names its data-parallel degrees"),
        (ACCELERATE.replace("--use_8bit_adam", "--optimizer lion"), {"devices": None}, "no known names"),
        (HF, {"source": "keras"}, "unknown form"),
        (HF, {"batch": 0}, "batch=0"),
    ],
)  # fmt: skip
def test_refusals(text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        convert(text, **{"batch": 256, "devices": 1, **options})


def test_keys_that_nobody_looked_at_are_named() -> None:
    done = convert(HF + "ema_halflife: 500\nmystery: 3\nworld: x\n", batch=256, devices=1)
    assert done.coverage.clocks == ("ema_halflife=500",)
    assert {"mystery", "world"} <= set(done.coverage.rest)
    assert "optim" in done.coverage.kept
    text = HF + "rollout_batch_size: 5\n"
    with pytest.raises(RuleError, match=r"rollout_batch_size=5.*--keep"):
        convert(text, batch=256, devices=1)
    assert "rollout_batch_size" in convert(text, batch=256, devices=1, keep=["rollout_batch_size"]).coverage.rest


def test_a_file_without_a_flag_can_be_kept_by_its_name() -> None:
    text = f"python train.py data/train.json {_FLAGS}\n"
    with pytest.raises(RuleError, match=r"more: data/train.json .the values in that file count too"):
        convert(text, batch=32, devices=1)
    assert "data/train.json" in convert(text, batch=32, devices=1, keep=["data/train.json"]).coverage.rest


@pytest.mark.parametrize(
    ("script", "refused", "unknown"),
    [
        ("CONFIG=conf/a.yaml\npython train.py $CONFIG {}\n", "conf/a.yaml (the", ""),
        ('python train.py "$CONFIG" {}\n', "$CONFIG, which is not set in this file (the", ""),
        ('python train.py "${{CFG_FILE}}" {}\n', "${CFG_FILE}, which is not set in this file (the", ""),
        ('python train.py {} "$@"\n', "", "$@"),
        ("$PYTHON train.py {} ${{EXTRA_ARGS}}\n", "", "${EXTRA_ARGS}"),
        ('DATA=/data\nMORE=(--weight_decay 0.1)\npython train.py {} "${{MORE[@]}}"\npython b.py $DATA\n', "", ""),
    ],
)
def test_a_variable_that_follows_no_flag(script: str, refused: str, unknown: str) -> None:
    """It may name the trainer's file, or bring flags. Fails if what stands there were passed over without a word."""
    text = script.format(_FLAGS)
    if refused:
        with pytest.raises(RuleError, match=re.escape(f"cost more: {refused} values in that file count too")):
            convert(text, batch=32, devices=1)
        return
    head = "what it adds is not looked at: "
    notes = [n.removeprefix(head) for n in convert(text, batch=32, devices=1).notes if n.startswith(head)]
    assert [n.split(", which")[0] for n in notes] == ([unknown] if unknown else [])


def test_losses_that_couple_examples_are_warned_of() -> None:
    assert any("warning: loss=infonce" in n for n in convert(HF + "loss: infonce\n", batch=256, devices=1).notes)
    assert not any("warning" in n for n in convert(HF, batch=256, devices=1).notes)


def test_names_of_optimizers() -> None:
    for name, row in [("torch.optim.AdamW", "adamw"), ("paged_adamw_8bit", "adamw"), ("adamw_torch_fused", "adamw"),
                      ("bitsandbytes.optim.PagedAdamW32bit", "adamw"), ("FusedAdam", "adamw"), ("torch.optim.Adam",
                       "adam"),
                      ("rmsprop_bnb_8bit", "torch_rmsprop"), ("NAdam", "adam"), ("paged_lion_8bit", "lion"),
                      ("bitsandbytes.optim.Adam", "adamw"), ("PagedAdam32bit", "adamw"), ("bnbadam", "adamw"),
                      ("torchao.optim.Adam8bit", "adam")]:  # fmt: skip
        assert optimizers.find(name, "optim")[0] == row, name
    for name in ("adamax", "Adafactor", "LAMB", "schedule_free_adamw", "galore_adamw_8bit", "apollo_adamw", "ademamix",
                 "stable_adamw", "rmsproptf", "adam_mini", "lomo", "prodigy", "nmuon", "decoupled_adamw"):  # fmt: skip
        with pytest.raises(RuleError, match="rule"):
            optimizers.find(name, "optim")


@pytest.mark.parametrize("target", [n for n in FORMS if "new" in KEYS[n]])
def test_into_every_other_form(target: str) -> None:
    """One recipe, six languages: each is read back as the same batch and hyperparameters."""
    done = convert(HF, "hf", target, batch=512, devices=1)
    again = convert(done.text, target, batch=512, devices=1)
    assert (again.base.hyper, again.base.batch) == (done.scaled.hyper, 512)
    if target in ("plain", "lightning", "torchtitan"):
        assert again.base.steps == 1250


@pytest.mark.parametrize(("text", "batch", "devices"), [(NANOGPT, 1920, None), (OPENRLHF, 512, None)])
def test_eps_of_a_trainer_without_a_key_for_it(text: str, batch: int, devices: int | None) -> None:
    """It is 1e-8 in the code: a new file holds it moved, and the old form says that it stays."""
    done = convert(text, target="hf", batch=batch, devices=devices)
    assert values(done.text)["adam_epsilon"] == pytest.approx(5e-9) and not any("1e-08 stays" in n for n in done.notes)
    assert any(
        "no key for eps, which the rule moves to 5e-09: 1e-08 stays" in n for n in convert(text, batch=batch).notes
    )


_SHORT = "learning_rate: 1e-4\nper_device_train_batch_size: 64\nlr_scheduler_type: cosine\n"


@pytest.mark.parametrize(
    ("text", "target", "expected", "absent", "said"),
    [
        (_SHORT + "max_grad_norm: 0.3\nmax_steps: 1000\n", "torchtitan",
         {"training.max_norm": 0.3, "lr_scheduler.warmup_steps": 0, "training.steps": 250}, "",
         "torchtitan's own is 200.*not written; nor are lr_scheduler_type=cosine"),
        (_SHORT + "max_grad_norm: 0.3\nmax_steps: 1000\n", "lightning",
         {"trainer.gradient_clip_val": 0.3, "trainer.max_steps": 250}, "max_epochs", "nor are lr_scheduler_type=cos"),
        (_SHORT + "max_steps: 1000\nnum_train_epochs: 2\n", "timm", {"warmup_epochs": 0, "clip_grad": 1.0},
         "\nepochs", "in epochs, 2, is left out.*steps, 250, has no place in timm"),
        (_SHORT + "num_train_epochs: 2.5\n", "lightning", {"trainer.max_epochs": 2}, "", "2.5, is written as 2"),
        (_SHORT + "max_grad_norm: 0.3\n", "plain", {"epochs": 3}, "", "threshold, 0.3, has no place in plain"),
        (LIGHTNING.replace("  gradient_clip_val: 1.0\n", ""), "hf", {"max_grad_norm": 0.0}, "", "clips at 1.0 by"),
        (LIGHTNING.replace("_val: 1.0", "_val: 0.5\n  gradient_clip_algorithm: value"), "torchtitan",
         {"training.max_norm": 1e9}, "", "clipping by value, 0.5, has no place"),
        ("optimizer: sgd\nbatch: 64\nlr: 0.1\nmomentum: 0.9\nsteps: 100\n", "timm", {"opt": "momentum"}, "", ""),
        (TIMM_YAML, "lightning", {"trainer.max_epochs": 90}, "", "Nesterov"),
    ],
)  # fmt: skip
def test_a_new_file_loses_and_contradicts_nothing_in_silence(
    text: str, target: str, expected: dict[str, object], absent: str, said: str
) -> None:
    done = convert(text, target=target, batch=256, devices=None if "devices" in text else 1)
    hold(values(done.text), expected)
    assert not absent or absent not in done.text
    lines = report(done, "f")
    assert re.search(said, "\n".join(lines), re.S) and not any("understood, and kept" in line for line in lines)


def test_a_new_file_counts_by_the_degree_of_the_old() -> None:
    """8 devices of which 2 share a replica are 4 data-parallel, also for a form without such degrees."""
    done = convert(MEGATRON, "megatron", "hf", batch=2048)
    assert values(done.text)["gradient_accumulation_steps"] == 2048 // (4 * 4)
    assert "the new file is meant for 4 data-parallel" in done.notes
    text, partner = AXOLOTL, ('{"train_micro_batch_size_per_gpu": 2, "fp16": {"enabled": true}}', "ds.json")
    assert convert(text, batch=128, devices=4, partners=[partner]).base.batch == 64


# --- hostile files: a refusal within two seconds, nothing written, no traceback ---

BASE = "per_device_train_batch_size: 8\nlearning_rate: 1e-4\nmax_steps: 100\n"
_MAPS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{p: *{chr(97 + i)}, q: *{chr(97 + i)}, r: *{chr(97 + i)}}}\n" for i in range(12)
)
_MERGES = "a: &m0 {x: 1}\n" + "".join(f"b{i}: &m{i + 1}\n  <<: [{', '.join([f'*m{i}'] * 9)}]\n" for i in range(9))
HOSTILE = {
    "alias.yaml": ("a: &a\n  b: *a\n" + BASE, "holds itself"),
    "twice.yaml": (BASE + "learning_rate: 2e-4\n", "stands there twice"),
    "twice.json": ('{"train_batch_size": 1, "train_batch_size": 2}', "stands there twice"),
    "date.yaml": (BASE.replace("1e-4", "2020-01-01"), "the date"),
    "date.toml": ("[optimizer]\nlr = 1979-05-27\n[training]\nlocal_batch_size = 8\nsteps = 10\n", "a date"),
    "tag.yaml": (BASE.replace("1e-4", "!!python/object/apply:os.system ['ls']"), "tag"),
    "tag2.yaml": (BASE.replace("1e-4", "!foo 3"), "tag !foo"),
    "list.yaml": (BASE.replace("1e-4", "[1, 2]"), "single numbers"),
    "map.yaml": (BASE.replace("1e-4", "{a: 1}"), "holds keys or lists"),
    "digits.yaml": (BASE.replace("1e-4", "9" * 400), "beyond all ranges"),
    "digits.json": ('{"train_batch_size": ' + "9" * 400 + ', "optimizer": {"type": "Adam"}}', "beyond all ranges"),
    "more.json": ('{"train_batch_size": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    "octal.yaml": (BASE.replace("8", "010"), "octal"),
    "maps.yaml": (_MAPS + BASE, "more than"),
    "merges.yaml": (_MERGES + BASE, "merge keys"),
    "hollow.yaml": (_MAPS.replace("{x: 1, y: 2}", "{}") + BASE, "more than"),
    "merge.yaml": ("<<: word\n" + BASE, "must name a mapping"),
    "steps.yaml": (BASE.replace("100", "[1, 2]"), "is a list"),
    "deep.yaml": ("a: " + "[" * 5000, "nested"),
    "deep.json": ('{"a":' * 9000, "nested"),
    "deep.toml": ("a = " + "[" * 9000, "nested"),
    "deep.py": ("a = " + "(" * 9000, "nested"),
    "big.yaml": ("# x\n" * 1_300_000, "longer than 64 kB"),
    "long.yaml": (BASE + "k: 1\n" * 4000, "1500 lines"),
    "two.yaml": (BASE + "---\n" + BASE, "single document"),
    "power.py": ("learning_rate = 10**10**10\nbatch_size = 8\nmax_iters = 10\n", "a power beyond all ranges"),
    "quote.sh": ("python t.py --lr 'x\n", "a quote that does not end"),
    "tables.toml": ("[[optimizer]]\nlr = 1\n[training]\nlocal_batch_size = 8\nsteps = 10\n", "no place"),
    "empty.yaml": ("", "is empty"),
}


@pytest.mark.parametrize("name", [*HOSTILE, "/dev/zero", "fifo", "binary"])
def test_hostile(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, message = tmp_path / name, "is not a regular file"
    if name in HOSTILE:
        file.write_text(HOSTILE[name][0])
        message = HOSTILE[name][1]
    elif name == "fifo":
        os.mkfifo(file)
    elif name == "binary":
        file.write_bytes(b"\xff\xfe\x00")
        message = "not a text file"
    start = time.monotonic()
    assert main([str(file), "--batch", "32", "--devices", "1", "-o", str(tmp_path / "out")]) == 2
    assert time.monotonic() - start < 4  # two seconds on a machine that does nothing else
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(HF)
    assert main([str(base), "--batch", "512", "--devices", "1"]) == 0
    out = capsys.readouterr()
    assert out.out == convert(HF, batch=512, devices=1).text
    assert out.err.startswith("base: 16 per device × 1 data-parallel × 4 accumulation = 64\n")
    assert "adam_epsilon: 1e-08 (default) -> " in out.err
    assert main([str(base), "--batch", "512", "--devices", "1", "-o", str(tmp_path / "new.yaml")]) == 0
    assert (tmp_path / "new.yaml").read_text() == out.out
    capsys.readouterr()
    for argv, message in [
        ([str(tmp_path / "none.yaml"), "--batch", "512"], "No such file"),
        ([str(base), "--from", "keras", "--batch", "512"], "invalid choice"),
        ([str(base), "--batch", "512", "--devices", "1", "--rule", "sqroot"], "unknown rule"),
        ([str(base), "--batch", "2048", "--devices", "1"], "Use --beta-map power (beta -> beta^kappa)"),
    ]:
        assert main(argv) == 2
        assert message in capsys.readouterr().err


def test_the_end_of_the_linear_map_is_said_where_people_look_first(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    readme, page = (root / "README.md").read_text(), (root / "docs" / "convert.md").read_text()
    main(["--help"])
    for text in (
        readme.partition("## In your own trainer")[2].partition("\n## ")[0],
        page.partition("\n## ")[0],
        capsys.readouterr().out,
    ):
        text = " ".join(text.split())
        assert re.search(r"κ < 1/\(1 [-−] β1\)", text) and "10" in text and "retune" in text
        assert "--beta-map power" in text


def test_one_spelling_of_the_power_map_works_in_both_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(PLAIN)
    assert main([str(tmp_path / "a.yaml"), "--batch", "8192", "--beta-map", "power"]) == 0
    written = yaml.safe_load(capsys.readouterr().out)["betas"]
    recipe = {"batch": 256, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    assert tuple(written) == scale(recipe, batch=8192, rule="adamw_sde", beta_map="power")["betas"]
    with pytest.raises(RuleError, match=r'Use beta_map="power" \(beta -> beta\^kappa\)'):
        scale(recipe, batch=8192, rule="adamw_sde")


# --- recipes as people write them: (text, options, what the file holds then, what is said) ---

RECIPES: dict[str, tuple[str, dict[str, object], dict[str, object], str]] = {
    "accumulation by a callback": (
        _CALLBACK + "GradientAccumulationScheduler\n      init_args: {scheduling: {0: 8, 4: 4}}\n", {}, {},
        "GradientAccumulationScheduler: it changes the accumulation along the run"),
    "a callback that chooses the batch": (_CALLBACK + "BatchSizeFinder\n", {}, {}, "it chooses the batch"),
    "a callback that chooses lr": (_CALLBACK + "LearningRateFinder\n", {}, {}, "it chooses the learning rate"),
    "auto_lr_find": (_LIT + "  auto_lr_find: true\n", {}, {}, "trainer.auto_lr_find=True: it lets the Trainer choose"),
    "auto_scale_batch_size": (_LIT + "  auto_scale_batch_size: power\n", {}, {}, "auto_scale_batch_size=power"),
    "SWA's absolute rate": (
        _CALLBACK + "StochasticWeightAveraging\n      init_args: {swa_lrs: 1e-2}\n", {"batch": 128},
        {"trainer.callbacks.0.init_args.swa_lrs": 2e-2}, "swa_lrs: 0.01 -> 0.02"),
    "axolotl's one_cycle": (_AXOLOTL + "lr_scheduler: one_cycle\n", {}, {}, "OneCycleLR overrides beta1"),
    "axolotl's one_cycle, told": (
        _AXOLOTL + "lr_scheduler: one_cycle\nlr_scheduler_kwargs: {cycle_momentum: false}\n", {"batch": 8},
        {"adam_beta1": 0.6}, "adam_beta1"),
    "axolotl's restarts": (
        _AXOLOTL + "relora_steps: 160\njagged_restart_warmup_steps: 12\nlisa_step_interval: 20\n", {"batch": 8},
        {"relora_steps": 40, "jagged_restart_warmup_steps": 3, "lisa_step_interval": 5}, "relora_steps: 160 -> 40"),
    "axolotl, anchors and an own average": (
        "common: &c {learning_rate: 2e-4, weight_decay: 0.01}\n<<: *c\n" + _AXOLOTL.replace("learning_rate: 1e-4\n", "")
        + "embedding_lr: 1e-5\nema_decay: 0.999\n", {"batch": 8},
        {"learning_rate": 4e-4, "common.weight_decay": 0.02, "embedding_lr": 2e-5}, "yours to check: ema_decay=0.999"),
    "a configuration without a flag": (
        "torchrun --nproc_per_node=4 train.py config/train_gpt2.py --batch_size=8 --learning_rate=3e-4 "
        "--max_iters=1000 --gradient_accumulation_steps=16\n", {"devices": None}, {},
        "config/train_gpt2.py.*the values in that file count too"),
    "a YAML without a flag": (
        f"llamafactory-cli train examples/sft.yaml {_FLAGS}\n", {}, {}, "examples/sft.yaml.*the values in that file"),
    "accelerate's deepspeed_config_file": (
        f"accelerate launch --deepspeed_config_file s3.conf train.py {_FLAGS}\n", {}, {}, "deepspeed_config_file="),
    "NNODES that the flags use": (
        "GPUS_PER_NODE=8\nNNODES=1\nARGS=(--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES)\nGBS=256\n"
        "torchrun ${ARGS[@]} pretrain_gpt.py --micro-batch-size 4 --global-batch-size $GBS --lr 1.5e-4 \\\n"
        "  --train-samples 1000000 --lr-warmup-samples 10000 --min-lr 1.0e-5\n", {"batch": 1024, "devices": None},
        {"min_lr": 2e-5, "lr_warmup_samples": 10000, "global_batch_size": 1024}, "4 per device × 8 data-parallel"),
    "NNODES that no flag uses": (
        f"export NPROC_PER_NODE=4\nexport NNODES=2\nllamafactory-cli train {_FLAGS}\n", {"devices": None},
        {"learning_rate": 2e-4}, "8 per device × 8 data-parallel"),
    "groups with rates of their own": (
        "learning_rate: 1e-4\nvision_tower_lr: 2e-6\nmm_projector_lr: 2e-5\nper_device_train_batch_size: 64\n", {},
        {"vision_tower_lr": 4e-6, "mm_projector_lr": 4e-5}, "mm_projector_lr: 2e-05 -> 4e-05"),
    "a text encoder's rate, and defaults": (
        "accelerate launch --num_processes=2 dreambooth.py --train_batch_size=1 --optimizer=AdamW --learning_rate=1e-4 "
        "--text_encoder_lr=5e-6 --max_train_steps=500 --lr_warmup_steps=0\n", {"batch": 8, "devices": None},
        {"text_encoder_lr": 1e-5, "max_train_steps": 125}, "adam_weight_decay are not in the file.*see yours"),
    "kohya's optimizer_args": (
        "accelerate launch --num_processes=1 train_network.py --train_batch_size=4 --learning_rate=1e-4 "
        '--optimizer_type AdamW8bit --optimizer_args "betas=0.9,0.99" --max_train_steps=10\n', {}, {},
        "optimizer_args=betas=0.9,0.99"),
    "verl, overrides in quotes": (
        VERL.replace("actor_rollout_ref.actor.optim.lr=1e-6", '"actor_rollout_ref.actor.optim.lr=5e-6" '
        "'actor_rollout_ref.actor.optim.betas=[0.95, 0.99]'"), {"batch": 512, "devices": None},
        {"actor_rollout_ref.actor.optim.lr": 5e-6 * 2**0.5, "actor_rollout_ref.actor.optim.betas": [0.9, 0.98]},
        r"optim.lr: 5e-06 -> .*\n.*betas: .0.95, 0.99. -> "),
    "flags in quotes": (
        'LR=1e-4\nARGS=(\n "--learning_rate=$LR"\n "--per_device_train_batch_size" 8\n)\n'
        "python train.py ${ARGS[@]} '--adam_beta2=0.98'\n", {"batch": 32},
        {"learning_rate": 2e-4, "adam_beta2": 0.92}, r"learning_rate: 0.0001 -> 0.0002"),
    "a command in quotes": (f"bash -c 'cd x && python train.py {_FLAGS}'\n", {}, {}, "is in quotes, and what it sets"),
    "a name in quotes": (f'python t.py {_FLAGS} "optim"=sgd\n', {}, {}, '"optim"=sgd is in quotes, and what it sets'),
    "a file in quotes": (f'python train.py "examples/sft.yaml" {_FLAGS}\n', {}, {}, "examples/sft.yaml.*the values in"),
    "overrides after a flag, in a variable": (
        "MORE='model.optim.lr=3e-4 model.optim.name=fused_adam'\ntorchrun --standalone train.py model.global_batch_size"
        "=256 trainer.max_steps=100 $MORE\n", {"batch": 1024, "devices": None},
        {"model.optim.lr": 6e-4, "trainer.max_steps": 25}, "256 -> 1024"),
    "what a script says": (
        f'echo "learning_rate=9" --max_steps 7\ncd "$(dirname "$0" --x)"\npython train.py {_FLAGS}\n', {"batch": 32},
        {"learning_rate": 2e-4, "max_steps": 25}, "max_steps: 100 -> 25"),
    "bitsandbytes' Adam is AdamW": (
        _LIT.replace("torch.optim.AdamW", "bitsandbytes.optim.Adam8bit").replace("1e-3", "1e-3, weight_decay: 0.1"),
        {"batch": 128}, {"optimizer.init_args.weight_decay": 0.2}, "rule adamw_sde"),
    "bitsandbytes' Adam, and the decay that it begins with": (
        _LIT.replace("torch.optim.AdamW", "bitsandbytes.optim.Adam8bit"), {"batch": 128},
        {"optimizer.init_args.lr": 2e-3}, r"(?s)rule adamw_sde(?!.*weight_decay: 0)"),
    "Megatron's ramp in stages": (
        'python pretrain_gpt.py --micro-batch-size 4 --lr 3e-4 --train-samples 1000 --lr-decay-iters 9 '
        '--step-batch-size-schedule "0:256 250M:1024"\n', {}, {},
        "step_batch_size_schedule=0:256 250M:1024: the recipe ramps its batch already"),
    "a batch in words": (HF + "batch_size_schedule: 0:256 1B:1024\n", {}, {}, "schedule=0:256 .*may change the batch"),
    "a batch in no number": (
        HF + "batch_sampler: random\ngrad_accum_dtype: fp32\nn_gpus: 'a100:8'\n", {}, {"learning_rate": 2e-4},
        "not looked at: .*batch_sampler, grad_accum_dtype, n_gpus"),
    "accelerate's own degrees, by flags": (
        f"accelerate launch --num_processes 8 --use_fsdp --parallelism_config_tp_size 2 "
        f"--parallelism_config_dp_shard_size 4 train.py {_FLAGS}\n", {"devices": None, "batch": 64},
        {"learning_rate": 2**0.5 * 1e-4}, "8 per device × 4 data-parallel"),
    "Megatron-LM's degrees in accelerate, by flags": (
        f"accelerate launch --num_processes 8 --megatron_lm_tp_degree 2 --megatron_lm_pp_degree 2 train.py {_FLAGS}\n",
        {"devices": None, "batch": 64}, {"learning_rate": 2e-4}, "2 data-parallel .8 devices / tensor 2 / pipeline 2."),
    "DeepSpeed's autotp_size": (
        '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "tensor_parallel": {"autotp_size": 4},\n'
        ' "train_micro_batch_size_per_gpu": 4}\n', {"devices": 8, "batch": 32}, {"optimizer.params.lr": 2e-4},
        "4 per device × 2 data-parallel .8 devices / tensor 4."),
    "plateau counts evaluations": (
        "learning_rate: 1e-4\nper_device_train_batch_size: 64\nlr_scheduler_type: reduce_lr_on_plateau\n"
        "lr_scheduler_kwargs: {patience: 5, min_lr: 1e-6}\n", {},
        {"lr_scheduler_kwargs.patience": 5, "lr_scheduler_kwargs.min_lr": 2e-6}, "kept: .*kwargs.patience"),
    "torchtitan's replica groups": (
        TITAN + "[fault_tolerance]\nenable = true\ngroup_size = 2\n", {}, {}, "replica groups multiply the batch"),
    "torchtitan's second rate": (TITAN.replace("eps = ", "muon_lr = 0.02\neps = "), {}, {}, "optimizer.muon_lr=0.02"),
    "torchtitan by flags": (
        "torchrun --nproc_per_node=8 -m torchtitan.train --optimizer.lr 3e-4 --training.local_batch_size 4 "
        "--training.steps=2000 --lr_scheduler.warmup_steps=100\n", {"batch": 128, "devices": None},
        {"training.steps": 500, "training.global_batch_size": 128, "optimizer.beta1": 0.6}, "8 data-parallel"),
    "NeMo's average": (
        "trainer: {devices: 8, num_nodes: 1, max_steps: 1000}\nexp_manager:\n  ema: {enable: true, decay: 0.999}\n"
        "  checkpoint_callback_params: {every_n_train_steps: 100}\nmodel:\n  micro_batch_size: 4\n"
        "  global_batch_size: 64\n  optim: {name: fused_adam, lr: 2e-4, betas: [0.9, 0.98]}\n", {"devices": None},
        {"exp_manager.ema.decay": 0.999**4, "exp_manager.checkpoint_callback_params.every_n_train_steps": 25}, "nemo"),
    "timm's lookahead": (TIMM_YAML.replace("opt: sgd", "opt: lookahead_adamw"), {}, {}, "unknown optimizer"),
    "two commands": (f"python train.py {_FLAGS}\npython train.py {_FLAGS}\n", {}, {}, "stands there twice"),
    "a loop over rates": (
        f"for LR in 1e-4 2e-4; do\npython t.py {_FLAGS.replace('1e-4', '$LR')}\ndone\n", {}, {}, "LR, which is not"),
    "the old names, -- and =": (
        'export BS=64\nLR="3e-5"\npython run_glue.py --per_gpu_train_batch_size=${BS} --learning_rate=$LR '
        "--num_train_epochs=4 --warmup_proportion=0.1 --save_steps=500\n", {},
        {"learning_rate": 6e-5, "save_steps": 125}, "yours to check: warmup_proportion=0.1"),
    "TRL's own rate": (
        "per_device_train_batch_size: 8\nmax_steps: 9\nnum_generations: 8\n", {}, {}, "TRL's trainers have"),
    "a rate that TRL's script takes": (
        "trl dpo --per_device_train_batch_size 8 --max_steps 9 --output_dir out\n", {}, {}, "write it"),
    "the Trainer's own rate": (
        "per_device_train_batch_size: 64\nmax_steps: 100\n", {}, {"learning_rate": 1e-4}, "5e-5, the Trainer's"),
    "accelerate's accumulation": (
        "learning_rate: 1e-4\nper_device_train_batch_size: 8\nmax_steps: 9\naccelerator_config: "
        "{gradient_accumulation_kwargs: {num_steps: 4}}\n", {}, {}, "write it into gradient_accumulation_steps"),
    "TRL's rollouts": (
        "learning_rate: 3e-6\nper_device_train_batch_size: 64\nnum_mini_batches: 1\n"
        "local_rollout_forward_batch_size: 8\n", {}, {"learning_rate": 6e-6}, "kept: .*num_mini_batches"),
    "a rate under a harmless name": (
        "learning_rate: 3e-6\nper_device_train_batch_size: 64\nlora_lr: 1e-4\n", {}, {"lora_lr": 1e-4},
        "yours to check: lora_lr"),
    "timm's NAdam": (
        "opt: nadam\nlr: 1e-3\nbatch_size: 64\nepochs: 9\n", {}, {"lr": 2e-3}, "momentum_decay, 0.004 a step"),
    "DeiT's": (
        "python main.py --opt adamw --lr 5e-4 --batch-size 64 --data-path /d\n", {}, {"lr": 1e-3}, "by batch/512"),
    "TRL's mini-batches": (
        "learning_rate: 3e-6\nper_device_train_batch_size: 8\nnum_mini_batches: 4\n", {}, {}, "num_mini_batches=4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*FIFTEEN, *RECIPES])
def test_recipes_as_people_write_them(kind: str) -> None:
    """Of the fifteen, each was silently wrong, or refused without need, at ff94cb4."""
    text, options, expected, said = (FIFTEEN | RECIPES)[kind]
    options = {"devices": 1, "batch": 256, **options}
    if not expected:
        with pytest.raises(RuleError, match=said):
            convert(text, **options)
        return
    done = convert(text, **options)
    hold(values(done.text), expected)
    assert re.search(said, "\n".join(report(done, "f")))
    assert report(done, "f")[0] == done.sentence  # the first line says where the base batch comes from


# --- a pair of files ---


def test_numbers_in_both_files_of_a_pair_move_in_both() -> None:
    done = convert(HF, batch=256, devices=1, clip="rule", partners=[(PARTNER, "ds.json")])
    hold(
        values(done.partners[0][0]),
        {"gradient_accumulation_steps": 16, "train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0.5,
         "optimizer.params.lr": 2e-4, "optimizer.params.betas": [0.8, 0.92], "optimizer.params.weight_decay": 0.2,
         "optimizer.params.eps": 5e-9, "scheduler.params.warmup_max_lr": 2e-4, "scheduler.params.warmup_min_lr": 2e-6,
         "scheduler.params.warmup_num_steps": 125, "scheduler.params.total_num_steps": "auto"},
    )  # fmt: skip
    assert "ds.json: scheduler.params.warmup_num_steps: 500 -> 125" in done.changes
    assert "ds.json: optimizer.params.eps: 1e-08 (DeepSpeed's default) -> 5e-09" in done.changes
    assert any("ds.json changes with it" in note for note in done.notes)
    again = convert(done.text, batch=64, devices=1, partners=[(done.partners[0][0], "ds.json")])
    assert values(again.partners[0][0])["scheduler.params.warmup_num_steps"] == 500
    same = convert(HF, batch=64, devices=1, partners=[(PARTNER, "ds.json")])
    assert (same.text, same.partners) == (HF, ((PARTNER, "ds.json"),))
    held = "num_processes: 2\ndeepspeed_config: {gradient_accumulation_steps: 4, zero_stage: 2}\n"
    done = convert(HF, batch=256, partners=[(held, "a.yaml")])
    assert done.partners[0][0] == held.replace("steps: 4", "steps: 8")


@pytest.mark.parametrize(
    ("partners", "base"),
    [
        (["num_processes: 8\na: {parallelism_config_tp_size: 2, parallelism_config_dp_shard_size: 4}\n"],
         "16 per device × 4 data-parallel × 4 accumulation = 256"),
        (["num_processes: 8\na: {parallelism_config_cp_size: 4, parallelism_config_dp_shard_size: 1}\n"],
         "× 2 data-parallel (8 devices / context 4 in 0.yaml) ×"),
        ([_MEGATRON_LM + "}\n"],
         "× 2 data-parallel (8 devices / tensor 2 / pipeline 2 in 0.yaml) × 4 accumulation = 128"),
        ([_MEGATRON_LM + "}\n", DEEPSPEED_AUTO], "× 2 data-parallel (8 devices / tensor 2 / pipeline 2 in 0.yaml) ×"),
        (["num_processes: 8\n", DEEPSPEED_AUTO.replace("{", '{"tensor_parallel": {"autotp_size": 4}, ', 1)],
         "× 2 data-parallel (8 devices / tensor 4 in 0.yaml) ×"),
        (["num_processes: 8\n"], "× 8 data-parallel (in 0.yaml) ×"),
    ],
)  # fmt: skip
def test_the_degrees_of_every_partner_are_divided_out(partners: list[str], base: str) -> None:
    """The base batch would be too large by them, and with it every number."""
    done = convert(HF, batch=1024, partners=[(text, f"{i}.yaml") for i, text in enumerate(partners)])
    assert base in done.sentence


def test_a_pair_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, ds, out, beside = (tmp_path / n for n in ("a.yaml", "ds.json", "new.yaml", "new.json"))
    args.write_text(HF)
    ds.write_text(PARTNER)
    command = [str(args), "--with", str(ds), "--batch", "256", "--devices", "1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    done = convert(HF, batch=256, devices=1, partners=[(PARTNER, "ds.json")])
    assert shown == f"==> {args} <==\n{done.text}\n==> {ds} <==\n{done.partners[0][0]}"
    for more, message in (
        (["--out", str(out)], "changes too: give --out-with FILE"),
        (["--out", str(out), "--out-with", str(out)], "--out and --out-with are one file"),
        (["--out", str(out), "--out-with", str(beside), "--out-with", str(beside)], "2 --out-with for 1 --with"),
        (["--out", str(out), "--out-with", str(tmp_path / "none" / "ds.json")], "No such file"),
        (["--out", str(out), "--out-with", str(tmp_path)], "is not a regular file"),
        (["--with", str(ds)], "one file is given twice"),
    ):
        assert main(command + more) == 2
        assert message in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.yaml", "ds.json"]
    assert main([*command, "--out", str(out), "--out-with", str(beside)]) == 0
    assert (out.read_text(), beside.read_text()) == (done.text, done.partners[0][0])
    out.write_text("old")
    beside.unlink()
    replace, calls = os.replace, []

    def fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert main([*command, "--out", str(out), "--out-with", str(beside)]) == 2
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.yaml", "ds.json", "new.yaml"]


def test_a_missing_library_is_one_sentence(tmp_path: Path) -> None:
    """And nothing of convert, nor torch, is loaded before it is used."""
    (tmp_path / "a.yaml").write_text(HF)
    code = (
        "import sys; sys.modules['ruamel.yaml'] = None; from scaling_exps import cli\n"
        "assert not {'torch', 'tomlkit', 'yaml'} & set(sys.modules)\n"
        f"sys.exit(cli.main(['convert', {str(tmp_path / 'a.yaml')!r}, '--batch', '8']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install 'scalerun[convert]'" in done.stderr


def test_documents() -> None:
    assert [number(x) for x in ("1e-3", "8", "x")] == [0.001, 8, "x"]
    assert isinstance(number("010"), Odd) and isinstance(number("9" * 400), Odd)
    assert yaml.safe_load(f"x: {spell(5e-09)}") == {"x": 5e-09} == tomllib.loads(f"x = {spell(5e-09)}")
    doc = open_document("a: &x 1\nb: *x\nc: {d: 1,e:  2}  # f\ng:\n", "f")
    doc.set(("c", "h"), 5e-9)
    doc.set(("g",), [1, 2])
    assert doc.render() == "a: &x 1\nb: *x\nc: {d: 1,e:  2, h: 5.0e-09}  # f\ng: [1, 2]\n"
    doc.set(("a",), 2)
    with pytest.raises(RuleError, match="a and b are one place in the file"):
        doc.render()
    doc = open_document("a: &m {k: 1}\nb: {<<: *m}\n", "f")
    for value in (2, 3):  # what is set twice is overwritten, and what is another's is not
        doc.set(("a", "k"), value)
    assert doc.render() == "a: &m {k: 3}\nb: {<<: *m}\n"
    with pytest.raises(RuleError, match=r"one place in the file is read as b\.k and as a\.k"):
        doc.set(("b", "k"), 4)
    doc = open_document("a = 3 # y\n\n[s]\nk = [1, 2]\n", "f.toml")
    doc.set(("s", "k"), [4, 5])
    doc.set(("new", "k"), 1e-9)
    assert doc.render() == "a = 3 # y\n\n[s]\nk = [4, 5]\n\n[new]\nk = 1e-09\n"
    for text, form in ((text, form) for text, form, _, _ in CASES.values()):
        assert guess(open_document(text, "f")) == form


# --- through the real libraries ---


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(Path.cwd()), *sys.path) if p)}


def group_of(optimizer) -> tuple[float, ...]:
    g = optimizer.param_groups[0]
    return (g["lr"], *g["betas"], g["eps"], g["weight_decay"])


def ours(h: Hyper) -> tuple[float, ...]:
    return (h.lr, *h.betas, h.eps, h.weight_decay)


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_transformers_builds_our_optimizer(tmp_path: Path, optim: str) -> None:
    pytest.importorskip("accelerate", reason="transformers builds TrainingArguments only with accelerate installed")
    transformers = pytest.importorskip("transformers")
    import torch

    text = HF.replace('"out"', str(tmp_path)).replace("adamw_torch", optim)
    done = convert(text, batch=512, devices=1)
    (tmp_path / "new.yaml").write_text(done.text)
    (args,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_yaml_file(str(tmp_path / "new.yaml"))
    optimizer = transformers.Trainer(model=torch.nn.Linear(2, 2), args=args).create_optimizer()
    if optim == "rmsprop":
        g = optimizer.param_groups[0]
        assert (g["lr"], g["alpha"], g["eps"]) == (
            done.scaled.hyper.lr,
            *done.scaled.hyper.betas,
            done.scaled.hyper.eps,
        )
    else:
        assert group_of(optimizer) == ours(done.scaled.hyper)
    assert args.train_batch_size * args.gradient_accumulation_steps == 512
    assert (args.max_steps, args.get_warmup_steps(args.max_steps)) == (1250, 62)


@pytest.mark.parametrize("text", [TIMM, TIMM_YAML])
def test_timm_builds_our_optimizer(text: str) -> None:
    """train.py is no part of the wheel: its parsing is redone here, the optimizer is timm's own."""
    factory = pytest.importorskip("timm.optim")
    import torch

    done = convert(text, batch=4096 if text is TIMM else 512, devices=None if text is TIMM else 1)
    new = values(done.text)
    args = Namespace(**{"momentum": 0.9, "opt_eps": None, "opt_betas": None, **new})
    optimizer = factory.create_optimizer(args, torch.nn.Linear(2, 2))
    h = done.scaled.hyper
    decayed = next(g for g in optimizer.param_groups if g["weight_decay"])
    assert (decayed["lr"], decayed["weight_decay"]) == (h.lr, h.weight_decay)
    if text is TIMM:
        assert (tuple(decayed["betas"]), decayed["eps"]) == (h.betas, h.eps)
    else:
        assert decayed["momentum"] == h.betas[0]


@pytest.mark.slow
def test_lightning_builds_our_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: its CLI cannot be asked")
    pytest.importorskip("jsonargparse", reason="lightning's CLI needs jsonargparse")
    done = convert(LIGHTNING, batch=256)
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
        [sys.executable, "app.py", "--config", "new.yaml"], cwd=tmp_path, capture_output=True, text=True, env=_env()
    )
    line = next((x for x in out.stdout.splitlines() if x.startswith("OURS")), out.stdout + out.stderr)
    assert line == f"OURS {ours(done.scaled.hyper)!r} 32 4 1000"


def test_torchtitan_reads_our_numbers(tmp_path: Path) -> None:
    pytest.importorskip("torchtitan.config", reason="torchtitan <= 0.2 (with TOML) and tyro are not installed")
    from torchtitan.config import ConfigManager

    done = convert(TITAN, batch=256, devices=64)
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

    done = convert(DEEPSPEED, batch=1024)
    (tmp_path / "ds.json").write_text(done.text)
    config = DeepSpeedConfig(str(tmp_path / "ds.json"))
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (1024, 8)
    p = config.optimizer_params
    assert (p["lr"], *p["betas"], p["eps"], p["weight_decay"]) == ours(done.scaled.hyper)
    assert config.scheduler_params["total_num_steps"] == 250


def test_the_rule_is_the_rules_own() -> None:
    """Not a number here is computed by convert: they are what `rule.scale` says."""
    done: Conversion = convert(HF, batch=512, devices=1)
    assert done.scaled.hyper == RULES["adamw_sde"].scale(Hyper(1e-4, (0.95, 0.98), 1e-8, 0.1), Move(64, 512))
    adam = json.loads(convert(DEEPSPEED.replace('"AdamW"', '"Adam"'), batch=512).text)["optimizer"]["params"]
    assert adam["weight_decay"] == pytest.approx(0.1 * 2**0.5)  # DeepSpeed's Adam is AdamW
    l2 = DEEPSPEED.replace('"AdamW"', '"Adam"').replace('"lr": 3e-4', '"adam_w_mode": false, "lr": 3e-4', 1)
    assert convert(l2, batch=512).rule.name == "sqrt"
    with pytest.raises(RuleError, match="inside the gradient"):
        convert(PLAIN.replace("adamw", "adam"), batch=512, rule="adamw_sde")


def test_a_ramp_for_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own words, and the numbers of each stage by the rule: √κ at κ = 4 doubles the rate, halves eps."""
    script = "torchrun pretrain_gpt.py --micro-batch-size 4 --global-batch-size 256 --lr 3e-4 --adam-beta1 0.95 "
    script += "--adam-beta2 0.99 --adam-eps 1e-8 --weight-decay 0.1 --train-samples 1000 --optimizer adam\n"
    (file := tmp_path / "run.sh").write_text(script)
    command = [str(file), "--batch", "256", "--devices", "8", "--ramp"]
    assert main([*command, "0:256 1.5B:1024"]) == 0
    out, err = capsys.readouterr()
    assert out == script and '--step-batch-size-schedule "0:256 1.5B:1024"\n  in place of --global-batch-size' in err
    assert "from 1.5B tokens: batch 1024, lr 0.0006, betas 0.8, 0.96, eps 5e-09, weight decay 0.2" in err
    for bad, said in (
        ("", "rise from 0"), ("0:256 2B", "rise from 0"), ("1M:256", "rise from 0"), ("0:256 1B:512 1M:1024", "rise"),
        ("0:512", "begins at batch 512"), ("0:256 1B:8192", "largest legal batch"),
    ):  # fmt: skip
        assert main([*command, bad]) == 2
        out, err = capsys.readouterr()
        assert said in err and not out, bad


@pytest.mark.parametrize("more", [["--rule", "completed", "--duration", "2"], ["--rule", "opt_sign"]])
def test_the_first_stage_of_a_ramp_is_what_the_file_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """It is moved by the same duration and noise scale."""
    (file := tmp_path / "run.sh").write_text(MEGATRON.replace("--adam-beta1 0.9\n", "--adam-beta1 0.95\n"))
    assert main([str(file), "--batch", "1024", "--noise-scale", "5000", *more, "--ramp", "0:1024 1B:2048"]) == 0
    out, err = capsys.readouterr()
    assert f"from 0 tokens: batch 1024, lr {float(values(out)['lr']):.6g}, " in err


@pytest.mark.parametrize(("text", "more"), [(HF, ["--devices", "1"]), (MEGATRON, ["--to", "hf"])])
def test_a_ramp_goes_with_forms_that_have_words_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, more: list[str]
) -> None:
    (file := tmp_path / "a").write_text(text)
    assert main([str(file), "--batch", "1024", *more, "--beta-map", "power", "--ramp", "0:1024 1B:2048"]) == 2
    assert "--ramp goes with megatron and torchtitan; this is hf" in capsys.readouterr().err


def test_a_ramp_for_a_fork_of_torchtitan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its section says the stages, read as that fork does: start + ⌊samples / (ramp-up / increments)⌋ · increment."""
    (file := tmp_path / "train.toml").write_text(TITAN)
    command = [str(file), "--batch", "64", "--devices", "64", "--beta-map", "power", "--ramp"]
    for ramp, starts, batches in (
        ("0:64 1B:256", [0, 1e9 / 8192], [64, 256]),
        ("0:64 16384K:128 32768K:192", [0, 2000, 4000], [64, 128, 192]),
    ):
        assert main([*command, ramp]) == 0
        said = capsys.readouterr().err
        section = tomllib.loads(said[said.index("[batch_size_scheduler]") : said.index("  from 0 tokens")])
        got, end = section["batch_size_scheduler"], section["training"]["global_batch_size"]
        span = got["rampup_samples"] / ((end - got["start_batch_size"]) // got["increment"])
        for i, (start, batch) in enumerate(zip(starts, batches, strict=True)):
            for at, wanted in ((start + 1, batch), (start - 1, batches[max(0, i - 1)])):
                now = got["start_batch_size"] + int(max(0, at) / span) * got["increment"]
                assert min(now, end) == wanted, (ramp, at)
        assert "torchtitan keeps rate" in said
    assert main([*command, "0:64 1B:256 4B:512"]) == 0
    assert "give it two stages, or set" in capsys.readouterr().err
    for length in ("", 'seq_len = "8k"', "seq_len = 0"):
        file.write_text(TITAN.replace("seq_len = 8_192", length))
        assert main([*command, "0:64 1B:256"]) == 2
        assert "must say training.seq_len" in capsys.readouterr().err
