"""accelerate: NoiseProbe on what `prepare` returned; the trackers get the noise, noise.jsonl goes to `plan`."""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from scaling_exps import NoiseProbe
from scaling_exps.records import read_noise

folder = Path(tempfile.mkdtemp())
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)  # log_with="wandb" to see it there
accelerator.init_trackers("noise")
torch.manual_seed(0)
x = torch.randn(4096, 8)
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(4096, 1))
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(data, batch_size=16)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

batch = 16 * accelerator.gradient_accumulation_steps * accelerator.num_processes
probe = NoiseProbe(
    model, optimizer, batch=batch, window=32, file=folder / "noise.jsonl", scaler=accelerator.scaler
)  # fmt: skip
for inputs, targets in loader:
    with accelerator.accumulate(model):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and probe.step % probe.window == 0:
        accelerator.log(probe.log(128), step=probe.step)
probe.detach()
accelerator.end_training()
print(probe.sentence(128))
print(f"records {len(read_noise(folder / 'noise.jsonl'))} of {probe.records[-1]['method']}")
