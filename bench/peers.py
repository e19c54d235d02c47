"""Our loop beside what people would use instead: same network, data, precision and accumulation, in turn in one run.

    python bench/peers.py [--models resnet8,resnet20,vit,gpt] [--micro 32] [--accumulation 4] [--steps 6] [--rounds 5]

A turn trains on for some optimizer steps; the ratio is taken turn by turn, so that a drifting machine cancels.
Start-up, evaluation and saving are not timed. Each loop logs what it does by default: ours measures the gradient noise.
  bare       by hand: inputs that lie in memory, no augmentation, no records, no checks
  timm       timm's loader, its transforms and the loop of its training script
  trainer    Hugging Face's Trainer
  lightning  Lightning's Trainer
The images of the last three come out of a DataLoader through the usual crop, flip and normalisation, one process; texts
out of a DataLoader of rows of tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from fixture import IMAGES, step, trainer
from loop import bare_step
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scaling_exps.config import TokenDataset
from scaling_exps.train.trainer import Trainer, build_net, mean_loss

Turn = Callable[[int], float]  # optimizer steps -> their seconds


class Pictures(Dataset[tuple[Any, int]]):
    """Images as torchvision's data sets give them: a picture and its label, transformed one by one."""

    def __init__(self, ours: Trainer) -> None:
        from torchvision import transforms as tv

        s, rng = ours.science.dataset, np.random.default_rng(0)
        pixels = rng.integers(0, 256, (IMAGES["train"], 32, 32, 3), dtype=np.uint8)
        self.images, self.labels = [Image.fromarray(x) for x in pixels], rng.integers(0, 10, len(pixels)).tolist()
        crop, flip = tv.RandomCrop(32, padding=4), tv.RandomHorizontalFlip()
        self.transform = tv.Compose([crop, flip, tv.ToTensor(), tv.Normalize(s.mean, s.std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(self.images[i]), self.labels[i]


def rows(ours: Trainer) -> Dataset[Any]:
    """Training examples one by one, as a user's own data set would give them."""
    if not isinstance(ours.science.dataset, TokenDataset):
        return Pictures(ours)
    x, y = ours.stream.batch(0, IMAGES["train"])
    return torch.utils.data.TensorDataset(x, y)


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), 1e-3, fused=True)


def timed(take: Callable[[], object]) -> Turn:
    """A loop that is driven from outside, one optimizer step a call."""

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            take()
        return time.perf_counter() - start

    return turn


class Clock:
    """For a trainer that owns its loop: the seconds from its second step's end to its last step's."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return self.ends[-1] - self.ends[0]


def ours_turn(ours: Trainer) -> Turn:
    return timed(lambda: step(ours))


def bare_turn(ours: Trainer, micro: int, accumulation: int) -> Turn:
    x, y = ours.stream.batch(0, IMAGES["train"])
    net = build_net(ours.spec)
    return timed(bare_step(net, x, y, micro, "float32", accumulation))


def timm_turn(ours: Trainer, micro: int, accumulation: int) -> Turn:
    from timm.data import create_loader
    from timm.utils import AverageMeter

    net, losses = build_net(ours.spec), AverageMeter()
    data, words = rows(ours), {"batch_size": micro, "num_workers": 0}
    if isinstance(data, Pictures):
        augment = {"scale": (0.8, 1.0), "color_jitter": 0.0, "persistent_workers": False, "device": torch.device("cpu")}
        data = create_loader(data, (3, 32, 32), is_training=True, use_prefetcher=False, **words, **augment)  # type: ignore[arg-type]
    else:
        data = DataLoader(data, shuffle=True, **words)  # type: ignore[arg-type]
    batches, adam = forever(data), optimizer(net)

    def take() -> None:
        for _ in range(accumulation):
            x, y = next(batches)
            loss = mean_loss(net(x), y)
            (loss / accumulation).backward()
            losses.update(loss.item() * accumulation, x.size(0))
        adam.step()
        adam.zero_grad()

    return timed(take)


class Wrapped(nn.Module):
    """The network as Hugging Face's Trainer wants it: the loss first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": mean_loss(logits, labels), "logits": logits}


def trainer_turn(ours: Trainer, micro: int, accumulation: int) -> Turn:
    import transformers

    transformers.logging.set_verbosity_error()
    net, data = Wrapped(build_net(ours.spec)), rows(ours)

    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in items]), "labels": torch.stack([torch.as_tensor(y) for _, y in items])}

    def turn(steps: int) -> float:
        clock = Clock()

        class Ticks(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.tick()

        with tempfile.TemporaryDirectory() as folder:
            sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
            quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
            arguments = transformers.TrainingArguments(folder, max_steps=steps + 1, use_cpu=True, **sizes, **quiet)
            adam = optimizer(net)
            constant = torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)
            loop = transformers.Trainer(net, arguments, collate, data, optimizers=(adam, constant), callbacks=[Ticks()])
            loop.remove_callback(transformers.PrinterCallback)
            loop.train()
        return clock.seconds()

    return turn


def lightning_turn(ours: Trainer, micro: int, accumulation: int) -> Turn:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loader = DataLoader(rows(ours), micro, shuffle=True, num_workers=0)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.clock = build_net(ours.spec), Clock()

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            loss = mean_loss(self.net(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.net)

        def on_train_batch_end(self, _o: Any, _b: Any, index: int) -> None:
            if (index + 1) % accumulation == 0:
                self.clock.tick()

    module = Module()

    def turn(steps: int) -> float:
        module.clock = Clock()
        quiet: dict[str, Any] = {
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "logger": False, "barebones": False,
        }  # fmt: skip
        lightning.Trainer(accelerator="cpu", max_steps=steps + 1, accumulate_grad_batches=accumulation, **quiet).fit(
            module, loader
        )
        return module.clock.seconds()

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet8,resnet20,vit,gpt")
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps a turn")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch")
    for model in o.models.split(","):
        batch = o.micro * o.accumulation
        ours = trainer(model, batch, o.micro, "recipe.epochs=null", f"recipe.samples={batch * 10**6}")
        turns = {"ours": ours_turn(ours)} | {
            name: make(ours, o.micro, o.accumulation)
            for name, make in {
                "bare": bare_turn, "timm": timm_turn, "trainer": trainer_turn, "lightning": lightning_turn
            }.items()
        }  # fmt: skip
        for turn in turns.values():
            turn(1)
        seconds = [{name: turn(o.steps) for name, turn in turns.items()} for _ in range(o.rounds)]
        rate = {k: round(o.steps * batch / statistics.median(s[k] for s in seconds), 1) for k in turns}
        ratio = {  # quartiles
            k: [round(q, 3) for q in statistics.quantiles(s[k] / s["ours"] for s in seconds)]
            for k in turns
            if k != "ours"
        }
        row = {
            "model": model,
            "micro_batch": o.micro,
            "accumulation": o.accumulation,
            "threads": torch.get_num_threads(),
        }
        print(
            json.dumps({**row, "rounds": o.rounds, "samples_per_second": rate, "ours_is_faster_by": ratio}), flush=True
        )


if __name__ == "__main__":
    main()
