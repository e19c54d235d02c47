"""A plain loop whose batch grows in mid-run: `scale` moves the live optimizer, its state and its scheduler."""

import torch

from scaling_exps import scale

torch.manual_seed(0)
x = torch.randn(4096, 8)
y = x @ torch.randn(8, 1) + 0.5 * torch.randn(4096, 1)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
batch = 32
for step in range(60):
    if step == 40:  # four times the batch from here on: the same path in samples, in a quarter of the steps
        scale(optimizer, base_batch=batch, batch=4 * batch, scheduler=scheduler)
        batch *= 4
    rows = torch.randint(len(x), (batch,))
    loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
group = optimizer.param_groups[0]
print(f"lr {group['lr']:g} betas {group['betas']} eps {group['eps']:g} decay {group['weight_decay']:g} loss {loss:.3f}")
