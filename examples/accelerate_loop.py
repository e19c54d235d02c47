"""accelerate: `scale` looks through the wrapped optimizer, and moves the scheduler that accelerate prepared."""

import torch
from accelerate import Accelerator

from scaling_exps import scale

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
x = torch.randn(1024, 8)
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
model, optimizer, loader, scheduler = accelerator.prepare(
    model, optimizer, torch.utils.data.DataLoader(data, batch_size=16), scheduler
)
base_batch = 16 * accelerator.num_processes  # tuned without accumulation
batch = base_batch * accelerator.gradient_accumulation_steps
scale(optimizer, base_batch=base_batch, batch=batch, scheduler=scheduler)
for inputs, targets in loader:
    with accelerator.accumulate(model):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
group = optimizer.param_groups[0]
print(f"lr {group['lr']:g} betas {group['betas']} eps {group['eps']:g} loss {loss:.3f}")
