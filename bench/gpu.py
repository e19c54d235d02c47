"""All that one short lease of a card should measure, most needed first: correctness, speed, then a panel of Fig. 1.

    python bench/gpu.py --minutes 25 [--out gpu] [--data FOLDER] [--tiny]

It needs no network. Each finished measurement is written to OUT/gpu.json at once, and OUT/gpu.md is drawn from it; the
same command goes on where the last ended, and runs of Fig. 1 resume. What began is stopped when the minutes are over.
DATA holds cifar10/*.parquet; without it the panel is left out. --tiny is for a test on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from compare_checkouts import differences  # noqa: E402

from scaling_exps import cost  # noqa: E402
from scaling_exps.records import RunDir, write_aside, write_json  # noqa: E402

RUN = [
    "model=resnet8",
    "batch=32",
    "recipe.epochs=null",
    "logger=none",
    "measure.noise=none",
    "checkpoint.minutes=1e-9",
]


class Left(Exception):  # noqa: N818 (no error)
    """Not measured, for a reason that is written down."""


class Lease:
    """The minutes that are left, and the commands that run in them."""

    def __init__(self, out: Path, minutes: float, tiny: bool, data: str | None) -> None:
        self.out, self.end, self.tiny, self.data = out, time.monotonic() + 60 * minutes, tiny, data

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(self, *words: str) -> str:
        """Standard output of `python WORDS`, ended with the lease."""
        command = [sys.executable, *words]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **({"SCALERUN_DATA": self.data} if self.data else {})}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=max(self.left(), 1))
        except subprocess.TimeoutExpired as e:
            raise Left("the minutes were over") from e
        if done.returncode:
            raise Left(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def train(self, name: str, *words: str) -> RunDir:
        """A tiny run of the embedded digits in a folder of its own."""
        self.run("-m", "scaling_exps.cli", *self.words(name, *words))
        return self.found(name)

    def words(self, name: str, *words: str) -> list[str]:
        return [*RUN, f"recipe.samples={640 if self.tiny else 64000}", *words, f"runs_dir={self.out / 'runs' / name}"]

    def found(self, name: str) -> RunDir:
        (run,) = (RunDir(path.parent) for path in (self.out / "runs" / name).glob("*/run.json"))
        return run


def twice(lease: Lease) -> dict[str, Any]:
    """The same run twice: deterministic kernels give the same bits."""
    return {"differences": differences(*(lease.train(name).path for name in ("first", "second")), [])}


def killed(lease: Lease) -> dict[str, Any]:
    """A run killed after its first checkpoint, and gone on with."""
    command = [sys.executable, "-m", "scaling_exps.cli", *lease.words("killed")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((lease.out / "runs/killed").glob("*/checkpoint.pt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = lease.run("-m", "scaling_exps.cli", *lease.words("killed"))
    resumed = lease.found("killed").path
    return {"resumed": "from step" in said, "differences": differences(lease.train("first").path, resumed, [])}


def _losses(lease: Lease, name: str, *words: str) -> dict[str, Any]:
    runs = {"float32": lease.train("first"), name: lease.train(name, *words)}
    return {who: (run.result() or {})["metrics"]["test_loss"] for who, run in runs.items()}


def processes(lease: Lease) -> dict[str, Any]:
    """One process with accumulation against two; NCCL takes one rank a card."""
    if 0 < torch.cuda.device_count() < 2:
        raise Left("one card: NCCL refuses a second rank on it")
    alone, both = ["recipe.micro_batch=16"], ["recipe.micro_batch=16", "launch.devices=2"]
    runs = [lease.train(name, *words) for name, words in (("alone", alone), ("both", both))]
    return {name: (run.result() or {})["metrics"]["test_loss"] for name, run in zip(("1", "2"), runs, strict=True)}


def memory(lease: Lease) -> dict[str, Any]:
    model, batch = ("resnet8", "2") if lease.tiny else ("resnet50", "256")
    row: dict[str, Any] = json.loads(
        lease.run(str(ROOT / "bench/loop.py"), "--models", model, "--batch", batch, "--memory")
    )
    return row


def speed(model: str, precision: str) -> Callable[[Lease], dict[str, Any]]:
    """Samples a second of our loop, against a bare one and against the card's peak."""

    def measure(lease: Lease) -> dict[str, Any]:
        size = ["--batch", "2", "--rounds", "2"] if lease.tiny else ["--batch", "256", "--rounds", "9"]
        words = [str(ROOT / "bench/loop.py"), "--models", model, "--precision", precision, *size]
        row: dict[str, Any] = json.loads(lease.run(*words))
        name = _device().lower().replace(" ", "")
        peak = next((peaks[precision == "bfloat16"] for card, peaks in cost.CARDS.items() if card in name), None)
        if peak and row["flops_a_sample"]:
            row["share_of_peak"] = row["flops_a_sample"] * row["samples_per_second"] / peak
        return row

    return measure


def panel(lease: Lease) -> dict[str, Any]:
    """As much of a panel of Fig. 1 as fits; it is never finished here but by the report."""
    if lease.data is None:
        raise Left("no --data")
    minutes = max(lease.left() / 60 - 1, 0.05)
    words = ["experiment=fig1", "model=vgg16", "precision=bfloat16", "logger=none", f"launch.minutes={minutes:.2f}"]
    if lease.tiny:
        words += ["model.width=1", "batch=256", "seed=0", "rule=sqrt", "recipe.epochs=null", "recipe.samples=512"]
    runs = lease.out / "fig1"
    try:
        lease.run("-m", "scaling_exps.cli", *words, "launch.parallel=4", f"runs_dir={runs}")
    except Left:
        if lease.left() > 60:  # else its minutes were over, as they should
            raise
    states = [RunDir(path.parent).state() for path in runs.glob("*/run.json")]
    return {"runs": len(states), "finished": states.count("finished")}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def measurements(tiny: bool) -> dict[str, Callable[[Lease], dict[str, Any]]]:
    models = ["resnet8"] if tiny else ["resnet56", "vgg16", "resnet50", "vit_small", "gpt_small"]
    return {
        "the same run twice": twice,
        "killed and resumed": killed,
        "bfloat16": lambda lease: _losses(lease, "bfloat16", "precision=bfloat16"),
        "torch.compile": lambda lease: _losses(lease, "compiled", "launch.compile=true"),
        "two processes": processes,
        "memory": memory,
        **{f"speed of {m}, {p}": speed(m, p) for m in models for p in ("bfloat16", "float32")},
        "a panel of Fig. 1": panel,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--data", default=os.environ.get("SCALERUN_DATA"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    file, lease = o.out / "gpu.json", Lease(o.out.resolve(), o.minutes, o.tiny, o.data)
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, measure in measurements(o.tiny).items():
        if name in done and "left" not in done[name] and name != "a panel of Fig. 1":
            continue
        if lease.left() < 5:
            break
        start = time.monotonic()
        try:
            row = measure(lease)
        except Left as e:
            row = {"left": str(e)}
        done[name] = {
            **row,
            "seconds": round(time.monotonic() - start, 1),
            "device": _device(),
            "torch": torch.__version__,
        }
        print(name, json.dumps(done[name]), flush=True)
        write_json(file, done)
        write_aside(o.out / "gpu.md", page(done))


def page(done: dict[str, Any]) -> str:
    lines = ["# What one lease of a card measured", "", "| what | result | seconds | device |", "|---|---|---|---|"]
    for name, row in done.items():
        rest = {k: v for k, v in row.items() if k not in ("seconds", "device", "torch")}
        lines.append(
            f"| {name} | {json.dumps(rest)[1:-1]} | {row['seconds']} | {row['device']}, torch {row['torch']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
