"""Hugging Face's Trainer: `convert` moves the recipe file, the Trainer reads it. No network, a tiny random GPT-2."""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

from scaling_exps.convert import convert

RECIPE = """\
output_dir: {out}
learning_rate: 3.0e-4      # tuned at batch 8
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
weight_decay: 0.1
max_steps: 16
warmup_steps: 4
save_strategy: "no"
report_to: none
use_cpu: true
"""

with tempfile.TemporaryDirectory() as folder:
    done = convert(RECIPE.format(out=folder), batch=32, devices=1)
    print(done.sentence)
    (Path(folder) / "recipe.yaml").write_text(done.text)
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(Path(folder) / "recipe.yaml"))
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    tokens = torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    print(
        f"steps {trainer.state.global_step} betas {group['betas']} eps {group['eps']:g} decay {group['weight_decay']:g}"
    )
