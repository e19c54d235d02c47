"""torchtitan: a Trainer that measures the noise, in place of its own `python -m torchtitan.train`:

    torchrun --nproc-per-node=8 examples/torchtitan_noise.py --module llama3 --config llama3_8b

Written for torchtitan 0.3. Data parallelism only (DDP, FSDP2); --training.disable_cuda_graphs and, for single examples,
no --compile.enable. What is logged goes to its TensorBoard or wandb, noise.jsonl into its dump folder.
"""

from pathlib import Path

from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

from scaling_exps import NoiseProbe


class NoiseTrainer(Trainer):
    probe = None

    def train_step(self, data_iterator):
        if self.probe is None:  # here, for a checkpoint is loaded by now
            t, mesh = self.config.training, self.parallel_dims.get_optional_mesh("batch")
            self.probe = NoiseProbe(
                self.model_parts[0], self.optimizers.optimizers[0], step=self.step - 1, window=100,
                batch=t.local_batch_size * self.gradient_accumulation_steps * (mesh.size() if mesh else 1),
                file=Path(self.config.dump_folder) / "noise.jsonl",
            )  # fmt: skip
        super().train_step(data_iterator)
        if self.step % self.probe.window == 0:
            self.metrics_processor.logger.log(self.probe.log(), self.step)


if __name__ == "__main__":
    init_logger()
    trainer = NoiseTrainer(ConfigManager().parse_args())
    trainer.train()
    if trainer.probe:
        print(trainer.probe.sentence())
    trainer.close()
