"""What measuring the gradient noise costs.

    python bench/noise.py [--model resnet8] [--batch 128] [--micro 32] [--rounds 9] [--examples 256]
    python bench/noise.py --probe [--model gpt] [--batch 16] [--micro 8] [--rounds 9] [model.width=128 ...]

Free: pairs of steps with and without it, taking turns; the ratio pair by pair, so that a drifting machine cancels.
It may cost at most 3% of a step. Full: one measurement of n examples against n / micro-batch steps of one
micro-batch each, alternating with them; at most 1. And the same per example by vmap, which has no such bound.
--probe: instead, what a NoiseProbe costs, in turns with as many steps without one: of micro-batches, step by step (at
most 2%), and of single examples, where one step of `probe.EVERY` is measured (at most 10%). `of_the_fastest` compares
the fastest of each, which other processes disturb least; `own_calls_share` times the probe's calls alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time

import fixture
import torch
from fixture import step

from scaling_exps import NoiseProbe
from scaling_exps.noise.probe import EVERY
from scaling_exps.train.measure import noise_records
from scaling_exps.train.trainer import Trainer

# CPU time of this thread on a CPU, for others may share the machine
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


seconds = functools.partial(fixture.seconds, clock=CLOCK)


def timed(owner: object, name: str, into: list[float]) -> None:
    """Add the time of every call of `owner.name`, which returns nothing, to `into[0]`."""
    call = getattr(owner, name)

    def wrapped(*arguments: object) -> None:
        start = time.process_time()
        call(*arguments)
        into[0] += time.process_time() - start

    setattr(owner, name, wrapped)


def quartiles(values: list[float]) -> list[float]:
    return [round(v, 4) for v in statistics.quantiles(values, n=4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("words", nargs="*", help="with --probe: settings of the model, as model.width=128")
    options = parser.parse_args()

    def trainer(batch: int, *words: str) -> Trainer:
        return fixture.trainer(options.model, batch, options.micro, *words)

    row = {"model": options.model, "batch": options.batch, "micro_batch": options.micro, "rounds": options.rounds,
           "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip

    inside = [0.0]  # what the estimator's own calls take, told apart from the machine's noise
    if options.probe:
        for name in ("_hear", "_pass", "_after_step"):  # on the class, before any probe hangs its hooks on them
            timed(NoiseProbe, name, inside)
        for method, micro, steps, bound in (("free", options.micro, 2, 0.02), ("examples", options.batch, EVERY, 0.1)):
            t = fixture.trainer(options.model, options.batch, micro, "measure.noise=none", *options.words)
            pairs, shares = [], []
            for i in range(options.rounds + 1):  # the first warms up
                took = {}
                for probed in (i % 2, 1 - i % 2):
                    probe = NoiseProbe(t.net, t.optimizer, batch=options.batch, method=method) if probed else None
                    if method == "free":
                        step(t)  # a probe learns from its first step how many parts one has
                    inside[0] = 0.0
                    took[probed] = seconds(lambda t=t, steps=steps: [step(t) for _ in range(steps)])
                    if probe:
                        probe.detach()
                        covered = probe.covered
                        shares.append(inside[0] / took[True])
                pairs.append((took[0], took[1]))
            row |= {"probe": method, "micro_batch": micro, "covered": covered, "words": options.words}
            row["parameters"] = sum(p.numel() for p in t.net.parameters())
            extra = [probed / bare - 1 for bare, probed in pairs[1:]]
            spread = statistics.stdev(extra) / len(extra) ** 0.5
            bare, probed = map(min, zip(*pairs[1:], strict=True))
            cost = {"extra_share_of_step": quartiles(extra), "mean": round(statistics.mean(extra), 4)}
            cost |= {"standard_error": round(spread, 4), "of_the_fastest": round(probed / bare - 1, 4), "bound": bound}
            if method == "free":  # hooks on layers are no calls of the probe's own
                cost["own_calls_share"] = quartiles(shares[1:])
            print(json.dumps({**row, **cost}), flush=True)
        return

    plain, free = (trainer(options.batch, f"measure.noise={kind}") for kind in ("none", "free"))
    assert free.free is not None and free.free.able
    for t in (plain, free, plain, free):
        step(t)
    ratios = []
    for i in range(options.rounds):
        first, second = (plain, free) if i % 2 else (free, plain)
        a, b = seconds(lambda t=first: step(t)), seconds(lambda t=second: step(t))
        ratios.append((b / a if i % 2 else a / b) - 1)
    for name in ("_hear", "micro_batch", "step"):
        timed(free.free, name, inside)
    alone = min(seconds(lambda: step(plain)) for _ in range(options.rounds))
    shares = []
    for _ in range(options.rounds):
        inside[0] = 0.0
        step(free)
        shares.append(inside[0] / alone)
    reported = seconds(lambda: noise_records(free, 1))
    costs = {"free_extra_share_of_step": quartiles(ratios), "free_own_calls_share": quartiles(shares), "bound": 0.03}
    print(json.dumps({**row, **costs, "seconds_a_record": round(reported, 5)}), flush=True)

    n, steps = options.examples, options.examples // options.micro
    small = trainer(options.micro, "measure.noise=none")
    step(small)
    units = {"full": [], "full_per_example_vmap": ["measure.noise_unit=1"]}
    for name, words in list(units.items())[: 1 if small.science.model.normalises_over_batch else 2]:
        full = trainer(options.micro, "measure.noise=full", f"measure.noise_examples={n}", *words)
        step(full)
        noise_records(full, 0)
        costs = []
        for i in range(max(3, options.rounds // 3)):
            measured = seconds(lambda t=full, i=i: noise_records(t, i + 1))
            stepped = seconds(lambda: [step(small) for _ in range(steps)])
            costs.append(measured / stepped)
        row |= {"examples": n, "examples_a_gradient": full.spec.noise_unit, "bound": None if words else 1.0}
        print(json.dumps({**row, f"{name}_over_{steps}_steps": quartiles(costs)}), flush=True)


if __name__ == "__main__":
    main()
