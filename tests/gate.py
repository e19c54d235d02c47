"""A network that waits in the middle of its run until a test lets it go on: model=custom model.factory=gate:net."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from scaling_exps.train import ranks, worker

MICRO_BATCH = 60  # of a process, in which it waits. The ranks poll in the steps 1, 3, 7, 15, 31, 63 at the latest
SCIENCE = [
    "model=custom", "model.factory=gate:net", "model.norm=batch", "batch=64", "recipe.batch=64", "logger=none",
    "recipe.micro_batch=32", "recipe.epochs=null", "recipe.samples=12800", "recipe.statistics_samples=64",
]  # fmt: skip


class Net(torch.nn.Module):
    """Waits in the working folder while a file `hold` lies there and no signal came.

    It leaves a file `held-JOB-RESTART` there, or `held-PROCESS` outside of SLURM.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(4 * 36, classes),
        )  # fmt: skip
        self.micro_batches = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, channels, 8, 8)
        self.micro_batches += int(self.training and torch.is_grad_enabled())
        if self.micro_batches == MICRO_BATCH:
            job = os.environ.get("SLURM_JOB_ID")
            name = f"{job}-{os.environ.get('SLURM_RESTART_COUNT', 0)}" if job else str(os.getpid())
            while Path("hold").exists() and not worker._signals:
                Path(f"held-{name}").touch()
                time.sleep(0.05)
        logits: torch.Tensor = self.layers(x)
        return logits


def net(shape: tuple[int, int, int], classes: int) -> Net:
    return Net(shape[2], classes)


def slow_disk(shape: tuple[int, int, int], classes: int) -> Net:
    """Its first fsync after a signal takes longer than torchrun waits of itself before it kills."""
    fsync, late = os.fsync, [35.0]

    def slow(descriptor: int) -> None:
        time.sleep(late.pop() if worker._signals and late else 0)
        fsync(descriptor)

    os.fsync = slow
    return net(shape, classes)


def deaf(shape: tuple[int, int, int], classes: int) -> Net:
    """The first member of a job array hears no signal, and never ends."""
    if os.environ.get("SLURM_ARRAY_TASK_ID") == "0":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
        time.sleep(3600)
    return net(shape, classes)


def broken(shape: tuple[int, int, int], classes: int) -> Net:
    raise RuntimeError("no network today")


if __name__ == "__main__":  # a worker whose ranks give each other up after so many seconds: gate.py SECONDS RUN_DIR
    ranks.TIMEOUT = timedelta(seconds=float(sys.argv[1]))
    raise SystemExit(worker.work([Path(sys.argv[2])]))
