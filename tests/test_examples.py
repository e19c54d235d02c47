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
    "accelerate_noise": "records 4 of free",  # 128 steps of two micro-batches
    "torchtitan_noise": "noise at batch 8: B_noise ",
    "hf_noise": "figure: ",  # of the report on the imported runs; in between it says the critical batch
    "nanogpt_form": "iters 16 warmup 2 min_lr 0.00012 beta1 0.6",
}
SMALL = {"hf_noise": ["512"]}
# torchtitan needs an accelerator: what the example takes of 0.3's Trainer, by the same names, around a real loop
TORCHTITAN = """
import types
import torch

class Trainer:
    def __init__(self, config):
        self.config = config
        self.parallel_dims = types.SimpleNamespace(get_optional_mesh=lambda name: None)
        self.model_parts, self.gradient_accumulation_steps, self.step = [torch.nn.Linear(4, 1)], 4, 0
        self.optimizers = types.SimpleNamespace(optimizers=[torch.optim.AdamW(self.model_parts[0].parameters())])
        self.logged = {}
        logger = types.SimpleNamespace(log=lambda metrics, step: self.logged.update({step: metrics}))
        self.metrics_processor = types.SimpleNamespace(logger=logger)

    def train_step(self, data_iterator):
        for _ in range(4):
            ((self.model_parts[0](next(data_iterator)) - 1).square().mean() / 4).backward()
        for optimizer in self.optimizers.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def train(self):
        for self.step in range(1, 201):
            self.train_step(iter(lambda: torch.randn(2, 4), None))

    def close(self):
        assert list(self.logged) == [100, 200] and "noise/b_noise_low" in self.logged[200]

class ConfigManager:
    def parse_args(self):
        return types.SimpleNamespace(training=types.SimpleNamespace(local_batch_size=2), dump_folder=".")

def init_logger():
    torch.manual_seed(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    """A change of `scale`, of `convert`, or of the library that breaks what a reader would copy fails here."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *filter(None, sys.path)])}
    if name == "torchtitan_noise":
        for module in ("config", "tools/logging", "trainer"):
            file = tmp_path / f"torchtitan/{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(TORCHTITAN)
        env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(EXAMPLES / f"{name}.py"), *SMALL.get(name, [])]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith(LAST[name])
    if name == "hf_noise":  # two arms of five seeds, judged
        assert "seed 4: noise at batch 4: B_noise " in done.stdout and "adamw_sde is " in done.stdout
