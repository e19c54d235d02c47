"""torchtitan's TOML: `convert` moves the file; the loop below reads the same keys at a tiny size."""

import tomllib

import torch

from scaling_exps.convert import convert

RECIPE = """\
[optimizer]
name = "AdamW"
lr = 8e-4
beta2 = 0.95

[lr_scheduler]
warmup_steps = 8     # of 64

[training]
local_batch_size = 2
global_batch_size = 8
seq_len = 16
steps = 64
max_norm = 1.0
"""

done = convert(RECIPE, batch=32)
print(done.sentence)
config = tomllib.loads(done.text)
o, t = config["optimizer"], config["training"]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))
optimizer = torch.optim.AdamW(
    model.parameters(), lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], weight_decay=o["weight_decay"]
)
warmup = config["lr_scheduler"]["warmup_steps"]
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
accumulation = t["global_batch_size"] // t["local_batch_size"]  # one device
for _ in range(t["steps"]):
    for _ in range(accumulation):
        tokens = torch.randint(32, (t["local_batch_size"], t["seq_len"]))
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        (loss / accumulation).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), t["max_norm"])
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
print(f"steps {t['steps']} warmup {warmup} accumulation {accumulation} betas {optimizer.param_groups[0]['betas']}")
