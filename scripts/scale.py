"""Write docs/scale.md's table: what a step sends and how long that takes, from 8 devices to 4,096.

    python scripts/scale.py [PAGE]

Placement is the plan's own, parameters and FLOPs are counted on the networks without memory for them (torch's meta
device). Peaks and bandwidths are of data sheets, and the share of the peak is an assumption that the page states.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from scaling_exps import config, cost, plan
from scaling_exps.config import TokenDataset
from scaling_exps.plan import RunSpec
from scaling_exps.train.trainer import build_net, mean_loss

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
MARKS = ("<!-- scale -->", "<!-- end of scale -->")
PEAK = cost.CARDS["h100"][1] or 0.0  # FLOP/s, dense bfloat16
SHARE = 0.4  # of the peak: assumed
WITHIN, BETWEEN = 450e9, 50e9  # bytes/s a card sends: NVLink 4 within a node of 8; 400 Gb/s a card between nodes
GPT_7B = (
    "model=gpt model.layers=32 model.width=4096 model.heads=32 dataset=text dataset.path=README.md dataset.context=2048"
)
NETWORKS = {  # words -> examples a device and step
    "model=vgg16": 256,
    "model=resnet56": 256,
    "model=resnet50 dataset=imagenet": 256,
    "model=vit_small": 256,
    "model=roberta_base": 8,
    GPT_7B: 1,
}
WORLDS = (8, 64, 512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    page = parser.parse_args().page
    heads = ["network", "parameters", "GFLOP a sample", "micro-batch", "all-reduce", "compute a step"]
    heads += [f"{world:,} devices" for world in WORLDS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(row(*item) for item in NETWORKS.items())]
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + rest.partition(MARKS[1])[2]]))


def row(words: str, micro: int) -> str:
    parameters, flops = count(specify(words, micro, WORLDS[0]))
    sent = 4 * parameters  # bytes of one copy of the gradient, float32
    compute = flops * micro / (SHARE * PEAK)  # seconds
    shares = []
    for world in WORLDS:
        placement = specify(words, micro, world).placement
        t = 2 * (world - 1) / world * sent / (WITHIN if world <= 8 else BETWEEN)  # a ring
        shares.append(f"{t / (t + compute * placement.accumulation):.0%}")
    name = "a GPT of 32 layers, width 4,096" if words == GPT_7B else words.replace("model=", "").replace("dataset=", "")
    cells = [name, f"{parameters / 1e6:,.1f} M", f"{flops / 1e9:,.3g}", str(micro), f"{2 * sent / 2**20:,.0f} MiB"]
    return f"| {' | '.join([*cells, f'{1e3 * compute:.3g} ms', *shares])} |"


def specify(words: str, micro: int, world: int) -> RunSpec:
    """The run of one micro-batch a device, as `scalerun plan` places it."""
    batch = micro * world
    more = [f"recipe.micro_batch={micro}", f"batch={batch}", f"recipe.batch={batch}", f"launch.devices={world}"]
    (spec,) = plan.plan(config.compose([*words.split(), "launch=slurm", "precision=bfloat16", *more]))
    return spec


def count(spec: RunSpec) -> tuple[int, float]:
    """Parameters, and FLOPs of training on one example; a multiplication and an addition are two."""
    data = spec.science.dataset
    with torch.device("meta"):
        net = build_net(spec)
        parameters = sum(p.numel() for p in net.parameters())
        if isinstance(data, TokenDataset):
            return parameters, cost.flops(spec) or 0.0
        height, width, channels = data.shape
        with FlopCounterMode(display=False) as counter:
            mean_loss(net(torch.zeros(1, channels, height, width)), torch.zeros(1, dtype=torch.long)).backward()
    return parameters, float(counter.get_total_flops())


if __name__ == "__main__":
    main()
