"""What the tests share: a way to plan and run real, tiny runs, and the real data where it is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling_exps import config, plan, records

ROOT = Path(__file__).resolve().parent.parent
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
TINY = ["model.width=4", "recipe.epochs=null", "recipe.samples=256", "logger=none", "measure.statistics_samples=64"]


def specs(*words: str) -> list[plan.RunSpec]:
    """Planned runs of the embedded default, made tiny; later words win."""
    last = {w.split("=", 1)[0]: w for w in [*TINY, *words]}
    return plan.plan(config.compose(list(last.values())))


def prepare(root: Path, spec: plan.RunSpec) -> Path:
    run_dir = root / spec.run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    records.write_json(run_dir / "run.json", spec.to_json())
    return run_dir


def worker(run_dir: Path, processes: int = 1) -> list[str]:
    """The command that runs a directory; a deterministic single thread a process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, "-m", "scaling_exps.train", str(run_dir)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def work(run_dir: Path, processes: int = 1) -> None:
    done = subprocess.run(worker(run_dir, processes), env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    log = run_dir / "log.txt"
    assert done.returncode == 0, (done.stdout, done.stderr, log.read_text() if log.exists() else "")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The records without their wall-clock field, the only one that two equal runs may differ in."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records.read_records(run_dir)]


def scalerun(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a user gets who types `scalerun ...` in `cwd`."""
    env = {**ENVIRONMENT, **environment}
    return subprocess.run(
        [sys.executable, "-m", "scaling_exps.cli", *words], cwd=cwd, env=env, capture_output=True, text=True
    )


def plan_json(*words: str, cwd: Path) -> list[dict[str, Any]]:
    done = scalerun("plan", "--json", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.fixture(scope="session")
def cifar10() -> str:
    """Folder of the real CIFAR-10 parquet files."""
    folder = Path(os.environ.get("SCALERUN_DATA", "")) / "cifar10"
    if not os.environ.get("SCALERUN_DATA") or not folder.is_dir():
        pytest.skip("set SCALERUN_DATA to a folder that holds cifar10/*.parquet")
    return str(folder)
