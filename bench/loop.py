"""Our training loop against a bare hand-written one: same network, precision, micro-batch and resident data.

    python bench/loop.py [--models resnet56,vgg16,gpt,vit] [--batch 64] [--rounds 9] [--precision float32]

The two take turns, one step each, and the ratio is taken pair by pair, so a drifting machine cancels.
Also: the share of a step that goes into making its batch; and, with --memory, the peak resident memory of one step
at the batch and at 16 times the batch, each in a process of its own. And, with --allocator, what a worker gains by
keeping the memory it frees: processes in turn, the median step of each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from fixture import seconds, step, trainer
from torch import Tensor
from torch.nn import functional as F

from scaling_exps.train import probe, provenance, ranks
from scaling_exps.train.trainer import build_net

KEPT = 2048  # examples that the bare loop goes round in, made beforehand


def bare_step(
    net: torch.nn.Module, inputs: Tensor, targets: Tensor, micro: int, precision: str, accumulation: int = 1
) -> Callable[[], None]:
    """What one would write by hand: resident inputs, no augmentation, no records, no checks."""
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), 1e-3, fused=True)
    counter = iter(range(10**9))

    def step() -> None:
        for _ in range(accumulation):
            at = next(counter) * micro % (len(inputs) - micro + 1)
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = net(inputs[at : at + micro])
                loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets[at : at + micro].reshape(-1))
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet56,vgg16,gpt,vit")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--memory", action="store_true", help="peak memory of one step, also at 16 times the batch")
    parser.add_argument("--allocator", action="store_true", help="what it saves to keep freed memory")
    parser.add_argument("--median-step", choices=["kept", "returned"], help=argparse.SUPPRESS)
    parser.add_argument("--one-step", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.models.split(","):
        if options.one_step:
            step(trainer(name, options.one_step, options.batch, f"precision={options.precision}"))
            print(provenance.peak_memory(ranks.device()))
        elif options.memory:
            memory(name, options)
        elif options.median_step:
            if options.median_step == "kept":
                ranks.keep_memory()
            ours = trainer(name, options.batch, options.batch, f"precision={options.precision}")
            step(ours)
            pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            took = statistics.median(seconds(lambda t=ours: step(t)) for _ in range(20))
            pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages
            peak = provenance.peak_memory(ours.device) >> 20
            print(json.dumps({"seconds": took, "pages_a_step": pages // 20, "peak_mib": peak}))
        elif options.allocator:
            allocator(name, options)
        else:
            measure(name, options)


def memory(name: str, options: argparse.Namespace) -> None:
    """Print the peak of one step at two batch sizes, same micro-batch."""
    words = ["--models", name, "--batch", str(options.batch), "--precision", options.precision]
    peaks = {
        batch: int(subprocess.check_output([sys.executable, __file__, *words, "--one-step", str(batch)]))
        for batch in (options.batch, 16 * options.batch)
    }
    small, large = peaks.values()
    mib = {batch: round(peak / 2**20) for batch, peak in peaks.items()}
    print(json.dumps({"model": name, "micro_batch": options.batch, "peak_mib": mib, "ratio": round(large / small, 3)}))


def allocator(name: str, options: argparse.Namespace) -> None:
    """Print how much longer a step takes where freed memory goes back to the system."""
    words = ["--models", name, "--batch", str(options.batch), "--precision", options.precision, "--median-step"]
    turns = [
        {w: json.loads(subprocess.check_output([sys.executable, __file__, *words, w])) for w in ("kept", "returned")}
        for _ in range(options.rounds)
    ]
    ratios = statistics.quantiles((t["returned"]["seconds"] / t["kept"]["seconds"] for t in turns), n=4)
    row = {"model": name, "batch": options.batch, "returned_over_kept": [round(r, 3) for r in ratios]}
    for what in ("pages_a_step", "peak_mib"):
        row[what] = {way: round(statistics.median(t[way][what] for t in turns)) for way in ("kept", "returned")}
    print(json.dumps(row))


def measure(name: str, options: argparse.Namespace) -> None:
    """Time one network and print a line of JSON."""
    ours = trainer(name, options.batch, options.batch, f"precision={options.precision}")
    net = build_net(ours.spec).to(ours.device)
    inputs, targets = (
        torch.cat(parts) for parts in zip(*(ours.stream.batch(i, i + 256) for i in range(0, KEPT, 256)), strict=True)
    )
    bare = bare_step(net, inputs, targets, options.batch, options.precision)
    at = iter(range(0, 10**9, options.batch))
    for _ in range(3):
        step(ours), bare()
    pairs = [(seconds(lambda: step(ours)), seconds(bare)) for _ in range(options.rounds)]
    path = [seconds(lambda: ours.stream.batch(s := next(at), s + options.batch)) for _ in range(20)]
    own = statistics.median(a for a, _ in pairs)
    row = {
        "model": name,
        "batch": options.batch,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "samples_per_second": round(options.batch / own, 1),
        "ratio_to_bare": [round(r, 3) for r in statistics.quantiles(b / a for a, b in pairs)],  # quartiles
        "flops_a_sample": probe.flops(ours),
        "data_path_share": round(statistics.median(path) / own, 4),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
