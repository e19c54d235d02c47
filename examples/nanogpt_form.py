"""nanoGPT's config.py: `convert` moves the assignments, min_lr and the clocks with them; a tiny train.py runs it."""

import math

import torch

from scaling_exps.convert import convert

CONFIG = """\
# 8 sequences: 2 of a micro-batch, 4 of them over all processes
batch_size = 2
block_size = 16
gradient_accumulation_steps = 4 * 1
learning_rate = 6e-4
min_lr = 6e-5
beta2 = 0.95
weight_decay = 1e-1
grad_clip = 1.0
warmup_iters = 8
max_iters = 64
lr_decay_iters = max_iters
"""

done = convert(CONFIG, batch=32)
print(done.sentence)
c: dict = {"beta1": 0.9}
exec(done.text, c)  # as nanoGPT's configurator does
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))
optimizer = torch.optim.AdamW(
    model.parameters(), lr=c["learning_rate"], betas=(c["beta1"], c["beta2"]), weight_decay=c["weight_decay"]
)


def rate(step: int) -> float:
    if step < c["warmup_iters"]:
        return c["learning_rate"] * (step + 1) / (c["warmup_iters"] + 1)
    done = (step - c["warmup_iters"]) / (c["lr_decay_iters"] - c["warmup_iters"])
    return c["min_lr"] + 0.5 * (1 + math.cos(math.pi * done)) * (c["learning_rate"] - c["min_lr"])


for step in range(c["max_iters"]):
    optimizer.param_groups[0]["lr"] = rate(step)
    for _ in range(c["gradient_accumulation_steps"]):
        tokens = torch.randint(32, (c["batch_size"], c["block_size"]))
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        (loss / c["gradient_accumulation_steps"]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c["grad_clip"])
    optimizer.step()
    optimizer.zero_grad()
print(f"iters {c['max_iters']} warmup {c['warmup_iters']} min_lr {c['min_lr']:g} beta1 {c['beta1']:g}")
