"""Lightning: the module is given the numbers of the base and the batch it runs at, and `scale` does the rest."""

import logging

import lightning
import torch

from scaling_exps import scale

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(lightning.LightningModule):
    def __init__(self, batch: int, base_batch: int = 32, base_steps: int = 64):
        super().__init__()
        recipe = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        clock = {"steps": base_steps, "warmup_steps": 8}
        self.recipe = scale({**recipe, **clock}, base_batch=base_batch, batch=batch, rule="adamw_sde")
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, examples, _):
        x, y = examples
        return torch.nn.functional.mse_loss(self.layer(x), y)

    def configure_optimizers(self):
        names = ("lr", "betas", "eps", "weight_decay")
        optimizer = torch.optim.AdamW(self.parameters(), **{n: self.recipe[n] for n in names})
        warmup = self.recipe["warmup_steps"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


torch.manual_seed(0)
x = torch.randn(2048, 8)
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
batch, devices, micro = 128, 1, 32
module = Regression(batch)
trainer = lightning.Trainer(
    max_steps=module.recipe["steps"], accumulate_grad_batches=batch // (micro * devices), devices=devices,
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=micro))
group = trainer.optimizers[0].param_groups[0]
print(f"steps {trainer.global_step} lr {group['lr']:g} betas {group['betas']} decay {group['weight_decay']:g}")
