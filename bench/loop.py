"""Our training loop against a bare hand-written one: same network, precision, micro-batch and resident data.

    python bench/loop.py [--models resnet56,vgg16] [--batch 64] [--rounds 9] [--precision float32]

The two take turns, one step each, and the ratio is taken pair by pair, so a drifting machine cancels.
Also: the share of a step that goes into making its batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from scaling_exps import config, data, plan, train


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare_step(
    net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int, precision: str
) -> Callable[[], None]:
    """What one would write by hand: resident normalised images, no augmentation, no records, no checks."""
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), 1e-3, fused=True)
    counter = iter(range(10**9))

    def step() -> None:
        at = next(counter) * batch % (len(images) - batch)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(net(images[at : at + batch]), labels[at : at + batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="resnet56,vgg16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    for name in options.models.split(","):
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Time one network and print a line of JSON."""
    words = [
        f"model={name}",
        f"batch={options.batch}",
        f"recipe.batch={options.batch}",
        "logger=none",
        f"precision={options.precision}",
    ]
    (spec,) = plan.plan(config.compose([*words, f"recipe.micro_batch={options.batch}"]))
    torch.manual_seed(0)
    fake = data.Images(
        torch.randint(0, 256, (4096, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (4096,)),
        torch.zeros(256, 32, 32, 3, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64),
    )  # fmt: skip
    data.load = lambda *_: fake  # the pixels do not matter to the clock; the path they take does
    ours = train.Trainer(spec, Path("unused"))
    net = train.build_net(spec).to(ours.device)
    images, labels = (
        torch.cat(parts) for parts in zip(*(ours.stream.batch(i, i + 512) for i in range(0, 4096, 512)), strict=True)
    )
    bare = bare_step(net, images, labels, options.batch, options.precision)

    def step(trainer: train.Trainer = ours) -> None:
        trainer.train_step()
        trainer.optimizer.zero_grad(set_to_none=True)

    at = iter(range(0, 10**9, options.batch))
    for _ in range(2):
        step(), bare()
    pairs = [(seconds(step), seconds(bare)) for _ in range(options.rounds)]
    path = [seconds(lambda: ours.stream.batch(s := next(at), s + options.batch)) for _ in range(20)]
    mine = statistics.median(a for a, _ in pairs)
    ratios = sorted(b / a for a, b in pairs)
    row = {
        "model": name,
        "batch": options.batch,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "samples_per_second": round(options.batch / mine, 1),
        "ratio_to_bare": [round(r, 3) for r in (ratios[0], statistics.median(ratios), ratios[-1])],
        "data_path_share": round(statistics.median(path) / mine, 4),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
