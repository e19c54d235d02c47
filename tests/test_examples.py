"""The examples run as they stand, with the real libraries, and end with the numbers of the rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST = {  # the last line of each: κ = 4, or 2 for accelerate, from numbers that stand in the example
    "plain_loop": "lr 0.002 betas (0.6, 0.96) eps 5e-09 decay 0.2",  # the scheduler has not undone the new lr
    "hf_trainer": "steps 4 betas (0.6, 0.996) eps 5e-09 decay 0.2",  # 16 steps of 8 examples
    "lightning_module": "steps 16 lr 0.002 betas (0.6, 0.96) decay 0.2",
    "accelerate_loop": "lr 0.00141421 betas (0.8, 0.98) eps 7.07107e-09",  # through AcceleratedOptimizer
    "torchtitan_form": "steps 16 warmup 2 accumulation 16 betas (0.6, 0.8)",
    "hf_noise": "figure: ",  # of the report on the imported runs; in between it says the critical batch
    "nanogpt_form": "iters 16 warmup 2 min_lr 0.00012 beta1 0.6",
}
SMALL = {"hf_noise": ["512"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_example(name: str) -> None:
    """A change of `scale`, of `convert`, or of the library that breaks what a reader would copy fails here."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *filter(None, sys.path)])}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(EXAMPLES / f"{name}.py"), *SMALL.get(name, [])]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith(LAST[name])
    if name == "hf_noise":  # two arms of three seeds, judged
        assert "noise at batch 8: B_noise " in done.stdout and "adamw_sde is " in done.stdout
