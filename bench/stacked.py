"""Several seeds of one arm in one process: their networks stacked by torch.func, beside one network after the other.

    OMP_NUM_THREADS=1 python bench/stacked.py [--models resnet8,vit] [--batches 4,64] [--seeds 3,5] [--rounds 15]

A round is one optimizer step of every seed, first in turn, then stacked (`vmap` over `grad`, one fused Adam over the
stacked weights); CPU seconds, so that neighbours on the machine count little. Ratio > 1: stacking is faster. It decides
nothing by itself: the runner trains seeds one by one. transformers' GPT-2 cannot be stacked, since its mask looks at
its values.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from fixture import trainer
from torch.func import functional_call, grad, stack_module_state, vmap

from scaling_exps.train import ranks
from scaling_exps.train.trainer import mean_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet8,resnet20,vit")
    parser.add_argument("--batches", default="4,64")
    parser.add_argument("--seeds", default="3,5")
    parser.add_argument("--rounds", type=int, default=15)
    o = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*batching rule.*")  # attention has none on a CPU, and is looped over
    ranks.keep_memory()
    for model in o.models.split(","):
        for batch in map(int, o.batches.split(",")):
            for seeds in map(int, o.seeds.split(",")):
                print(json.dumps(measure(model, batch, seeds, o.rounds)), flush=True)


def measure(model: str, batch: int, seeds: int, rounds: int) -> dict[str, object]:
    """One row: milliseconds of CPU a round, in turn and stacked, and the quartiles of their ratio."""
    ours = trainer(model, batch, batch)
    data = [ours.stream.batch(k * batch, (k + 1) * batch) for k in range(seeds)]
    nets = [copy.deepcopy(ours.net) for _ in range(seeds)]
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, fused=True) for net in nets]

    def in_turn() -> None:
        for net, optimizer, (x, y) in zip(nets, optimizers, data, strict=True):
            optimizer.zero_grad()
            mean_loss(net(x), y).backward()
            optimizer.step()

    weights, buffers = stack_module_state(nets)
    weights = {name: w.detach() for name, w in weights.items()}
    skeleton = copy.deepcopy(ours.net).to("meta")
    of_all = torch.optim.Adam(list(weights.values()), 1e-3, fused=True)
    xs, ys = (torch.stack(parts) for parts in zip(*data, strict=True))

    def loss(w: dict[str, torch.Tensor], b: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return mean_loss(functional_call(skeleton, (w, b), (x,)), y)

    gradients = vmap(grad(loss))

    def stacked() -> None:
        for name, gradient in gradients(weights, buffers, xs, ys).items():
            weights[name].grad = gradient
        of_all.step()

    for take in (in_turn, stacked):  # allocates, chooses kernels
        take()
    first = [(seconds(in_turn), seconds(stacked)) for _ in range(rounds)]
    ratio = statistics.quantiles(a / b for a, b in first)
    turn, stack = (1e3 * statistics.median(s) for s in zip(*first, strict=True))
    sizes = {"batch": batch, "seeds": seeds, "threads": torch.get_num_threads(), "rounds": rounds}
    times = {"in_turn_ms": round(turn, 1), "stacked_ms": round(stack, 1)}
    return {"model": model, **sizes, **times, "stacked_is_faster_by": [round(r, 3) for r in ratio]}


def seconds(take: Callable[[], None]) -> float:
    start = time.process_time()
    take()
    return time.process_time() - start


if __name__ == "__main__":
    main()
