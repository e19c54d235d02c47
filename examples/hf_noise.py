"""Hugging Face's Trainer, from "how large may my batch be?" to a verdict: python examples/hf_noise.py [SAMPLES]

Five seeds of a small GPT-2 at batch 4 with NoiseCallback: the critical batch, and how far a run at 16 should stray.
Then the same at 16, by the rule and unscaled, and `scalerun import` and `report` on what the Trainer left. Sequences
are of 8 bytes, so that a batch holds few tokens and the critical batch lies above 16: there the rule should hold.
"""

import argparse
import ast
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from scaling_exps import cli
from scaling_exps.trainers import ScaledBy
from scaling_exps.trainers.hf import NoiseCallback

transformers.logging.set_verbosity_error()
samples = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
text = b"".join(Path(module.__file__).read_bytes() for module in (argparse, ast, tempfile))  # of the standard library
blocks = torch.tensor(list(text[: len(text) // 8 * 8])).view(-1, 8)
sequences = [{"input_ids": x, "labels": x} for x in blocks[torch.randperm(len(blocks), generator=torch.Generator())]]
tuned = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def run(folder: Path, seed: int, batch: int, rule: str) -> NoiseCallback:
    transformers.set_seed(seed)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=256, n_positions=8, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, loss_type="ForCausalLM",
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), learning_rate=tuned["lr"], adam_beta2=0.99, lr_scheduler_type="linear",
        per_device_train_batch_size=batch // 2, gradient_accumulation_steps=2, max_steps=samples // batch, seed=seed,
        logging_steps=max(1, samples // batch // 16), eval_strategy="steps", eval_steps=samples // batch,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=sequences[512:], eval_dataset=sequences[:512])
    scaled = ScaledBy(rule, base={"batch": 4, "steps": samples // 4, **tuned})
    callback = NoiseCallback(trainer, batches=[16], scaled=scaled)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_state()
    return callback


with tempfile.TemporaryDirectory() as root:
    out, folders = Path(root), []
    for batch, rule in ((4, "adamw_sde"), (16, "adamw_sde"), (16, "none")):
        for seed in range(5):
            folders.append(out / f"{rule}-{batch}-{seed}")
            noise = run(folders[-1], seed, batch, rule)
            if batch == 4:
                print(f"seed {seed}: {noise.probe.sentence(16)}")
    cli.main(["import", *map(str, folders), "--name", "gpt2", "--out", str(out / "runs")])
    cli.main(["report", str(out / "runs"), "--margin", "test_loss=0.1", "--out", str(out / "report")])
