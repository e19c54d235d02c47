"""A batch that grows in Hugging Face's Trainer and in Lightning's, the real ones, held against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scaling_exps import scale
from scaling_exps.rules import RuleError
from scaling_exps.trainers.ramp import Ramp

MICRO, STAGES = 4, [(0, 8), (40, 16), (100, 32)]
# micro-batches of 64 examples an epoch: 16 begins at 12 of them, a multiple of its 4; 32 at the second epoch's end
TAKEN = [8] * 6 + [16] * 5 + [32] * 2
STEPS, WARM_UP = 24, 4  # of batch 8: 192 samples, three epochs
HOW = {"rule": "adamw_sde", "noise_scale": 20.0}
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x)[:, 0] - labels).square().mean()}


def multiplier(step: int) -> float:
    return step / WARM_UP if step < WARM_UP else (STEPS - step) / (STEPS - WARM_UP)


def examples() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.sum()} for row in x]


def groups(net: torch.nn.Module) -> list[dict[str, Any]]:
    """As Hugging Face groups them: no decay of biases."""
    decayed, free = ([p for p in net.parameters() if (p.dim() > 1) == kept] for kept in (True, False))
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


def plain(micro_batches: list[dict[str, torch.Tensor]]) -> torch.optim.AdamW:
    """A loop of one's own over the same data: `scale` at each switch, the schedule at the samples of each step."""
    net, done = Net(), 0
    optimizer = torch.optim.AdamW(groups(net), **ADAM)
    for batch, before in zip(TAKEN, [8, *TAKEN], strict=False):
        if batch != before:
            scale(optimizer, base_batch=before, batch=batch, **HOW)
        peak = 1e-2 * (batch / 8) ** 0.5
        for group in optimizer.param_groups:
            group["lr"] = peak * multiplier(done * MICRO // 8)
        optimizer.zero_grad()
        for _ in range(batch // MICRO):
            (net(**micro_batches[done])["loss"] / (batch // MICRO)).backward()
            done += 1
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = peak
    return optimizer


def agree(found: Any, optimizer: torch.optim.AdamW) -> None:
    """Hyperparameters, weights and moments."""
    for mine, theirs in zip(found.param_groups, optimizer.param_groups, strict=True):
        for name in ("betas", "eps", "weight_decay"):
            assert mine[name] == pytest.approx(theirs[name]), name
        for a, b in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            for name, value in optimizer.state[b].items():
                torch.testing.assert_close(found.state[a][name], value, rtol=1e-4, atol=1e-9)


def hugging_face(folder: Path, **words: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    from transformers import Trainer, TrainingArguments

    from scaling_exps.trainers.hf import RampCallback

    seen: list[dict[str, torch.Tensor]] = []

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        seen.append({k: torch.stack([row[k] for row in rows]) for k in rows[0]})
        return seen[-1]

    args = TrainingArguments(
        output_dir=str(folder), learning_rate=1e-2, adam_beta2=0.99, weight_decay=0.1, max_steps=STEPS,
        warmup_steps=WARM_UP, per_device_train_batch_size=MICRO, gradient_accumulation_steps=2, logging_steps=1,
        save_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, **words,
    )  # fmt: skip
    trainer = Trainer(Net(), args, train_dataset=examples(), data_collator=collate)
    trainer.add_callback(RampCallback(STAGES, **HOW))
    return trainer, seen


def test_hugging_face_follows_a_ramp(tmp_path: Path) -> None:
    """Fails if a step had other micro-batches than its stage, if the schedule counted steps, if state or rates were
    not moved, or if it trained on past the samples of its steps."""
    trainer, seen = hugging_face(tmp_path)
    trainer.train()
    assert trainer.state.global_step == len(TAKEN)
    agree(trainer.optimizer, plain(seen))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    done = [sum(TAKEN[:i]) // 8 for i in range(len(TAKEN))]
    wanted = [1e-2 * (b / 8) ** 0.5 * multiplier(k) for b, k in zip(TAKEN, done, strict=True)]
    assert rates == pytest.approx(wanted)

    again, _ = hugging_face(tmp_path, ignore_data_skip=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.state.global_step == len(TAKEN) and again.args.gradient_accumulation_steps == 8
    assert [g["betas"] for g in again.optimizer.param_groups] == [g["betas"] for g in trainer.optimizer.param_groups]
    refused, _ = hugging_face(tmp_path)
    with pytest.raises(RuleError, match="needs ignore_data_skip=True"):
        refused.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_lightning_follows_a_ramp(tmp_path: Path) -> None:
    """As above; and a run that goes on from a checkpoint at an epoch's end ends with the same numbers."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from scaling_exps.trainers.lightning import RampCallback

    seen: list[dict[str, torch.Tensor]] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> Any:
            seen.append(batch)
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(groups(self.net), **ADAM)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(start: Path | None = None, **words: Any) -> lightning.Trainer:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        how = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
        given = {"max_steps": STEPS, "accumulate_grad_batches": 2, "logger": False, **how, **words}
        trainer = lightning.Trainer(callbacks=[RampCallback(STAGES, **HOW), keep], default_root_dir=tmp_path, **given)
        trainer.fit(Module(), torch.utils.data.DataLoader(examples(), batch_size=MICRO), ckpt_path=start)
        return trainer

    trainer = fit()
    assert trainer.global_step == len(TAKEN)
    optimizer = plain(seen)
    agree(trainer.optimizers[0], optimizer)
    again = fit(tmp_path / "step=7.ckpt")
    assert again.global_step == len(TAKEN)
    agree(again.optimizers[0], optimizer)
    with pytest.raises(RuleError, match="begins at batch 8, and the trainer takes 16"):
        fit(accumulate_grad_batches=4)


@pytest.mark.parametrize(
    "stages", [[], [(1, 8)], [(0, 8), (4, 8)], [(0, 8), (4, 4)], [(0, 8), (0, 16)], [0, 8], "8", [(0, 8, 1)]]
)
def test_stages_that_are_none(stages: Any) -> None:
    with pytest.raises(RuleError, match="batches that rise"):
        Ramp(stages)


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(RuleError, match="no multiple of the 3 examples"):
        Ramp([(0, 6), (9, 8)]).begin(3, 2, 10)
