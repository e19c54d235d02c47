"""python -m scaling_exps.train.probe: a few real steps of the planned run on standard input; no record is left.

A step of n micro-batches takes update + n · micro; both are measured where the run accumulates much. Prints one
object: those two in seconds, the seconds that the first steps took longer, the peak of memory, FLOPs of one example,
the device; or `refused`, in the words of a launch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Any

import msgspec
import torch
from torch.utils.flop_counter import FlopCounterMode

from scaling_exps.data import TokenStream
from scaling_exps.plan import RunSpec
from scaling_exps.train import loop, measure, provenance, ranks
from scaling_exps.train.trainer import Trainer, mean_loss

SECONDS = 2.0  # of steps at each number of micro-batches
MOST = 4  # micro-batches of a probed step; with two and more the free noise estimator listens, as in the run
FEWEST = 3  # timed steps
NOISE_SECONDS = 4.0  # a full noise measurement that takes longer is not made; its gradients are counted instead


def probe(spec: RunSpec) -> dict[str, Any]:
    """Time, memory and FLOPs of the run's step, in this process, one process of the run.

    Raises:
        DataError, ModelError, TrainError: as a launch.
    """
    draws = spec.science.draws
    own = spec.placement.accumulation // draws  # micro-batches a draw
    most = min(own, MOST)
    trainer, longer, steps, start = _steps(spec, most)
    micro, update = longer / most / draws, 0.0
    if own > most:  # what a step takes once is spread over more of them
        del trainer
        trainer, shorter, more, _ = _steps(spec, most // 2)
        steps += more
        micro = max(0.0, longer - shorter) / (most - most // 2) / draws
        update = max(0.0, longer - micro * most * draws)
    extra = _measurements(trainer, spec, micro)
    memory = provenance.peak_memory(trainer.device) + extra
    return {
        "micro_seconds": micro,
        "update_seconds": update,
        "start_seconds": start,
        "steps": steps,
        "memory_bytes": memory,
        "flops": flops(trainer),
        "device": provenance.environment()["device"],
        "threads": torch.get_num_threads(),
    }


def _steps(spec: RunSpec, micro_batches: int) -> tuple[Trainer, float, int, float]:
    """A trainer after some steps of so many micro-batches a draw, seconds a step, how many were timed, and the seconds
    that the first two took longer than two."""
    s = spec.science
    provenance.reset_peak_memory()
    science = msgspec.structs.replace(s, batch=micro_batches * s.micro_batch, steps=10**9)
    placement = msgspec.structs.replace(spec.placement, world_size=1, accumulation=micro_batches * s.draws)
    trainer = Trainer(msgspec.structs.replace(spec, science=science, placement=placement))
    for _ in range(2):  # the first ones choose kernels, allocate, compile
        trainer.train_step()
    with trainer.paused():
        before, begun = trainer.seconds, trainer.step
    while trainer.step < begun + FEWEST or trainer.seconds < before + SECONDS:
        trainer.train_step()
        with trainer.paused():
            trainer.check_finite()
    each = (trainer.seconds - before) / (trainer.step - begun)
    return trainer, each, trainer.step - begun, max(0.0, before - begun * each)


def _measurements(t: Trainer, spec: RunSpec, micro_seconds: float) -> int:
    """What a run does beside its steps and what its memory must hold; bytes that were not allocated but will be."""
    tokens = isinstance(t.stream, TokenStream)
    at_once = min(spec.science.micro_batch if tokens else measure.EVALUATION_BATCH, t.stream.test_size)
    t.net.eval()
    with torch.no_grad(), t.autocast():
        x, y = t.stream.test_batch(0, at_once)
        mean_loss(t.net(x).float(), y)
    t.net.train()
    if spec.noise != "full":
        return 0
    if 2 * spec.noise_examples / spec.science.micro_batch * micro_seconds < NOISE_SECONDS:
        measure.full_noise(t, 0)
        return 0
    gradients = min(16, spec.noise_examples // spec.noise_unit) + 2
    return gradients * sum(p.numel() * p.element_size() for p in t.parameters)


def flops(t: Trainer) -> float | None:
    """FLOPs of one example, forward and backward; None where torch cannot count them (a compiled or an odd network)."""
    x, y = t.stream.batch(0, t.science.micro_batch)
    try:
        with FlopCounterMode(display=False) as counter:
            mean_loss(t.net(x), y).backward()
    except Exception:  # whatever a network of the user's own does under a mode of torch's
        return None
    count = counter.get_total_flops() / t.science.micro_batch
    return count if count and math.isfinite(count) else None


def main() -> None:
    spec = RunSpec.from_json(json.load(sys.stdin))
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks.keep_memory()
    started = time.monotonic()
    with open(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what a network prints does not stand among the numbers
        try:
            loop.preflight([spec])
            told = probe(spec)
        except ValueError as e:
            if not type(e).__module__.startswith("scaling_exps"):
                raise
            told = {"refused": str(e)}
        print(json.dumps({**told, "seconds": time.monotonic() - started}), file=out, flush=True)
    os._exit(0)  # as `worker._leave`: threads of the data may still run


if __name__ == "__main__":
    main()
