"""Lightning: Trainer(callbacks=[NoiseCallback()]), Trainer(callbacks=[RampCallback(stages)])."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning

from scaling_exps.noise.estimators import NoiseError
from scaling_exps.noise.probe import NoiseProbe
from scaling_exps.rules import RuleError
from scaling_exps.trainers import Asked, ScaledBy, begin
from scaling_exps.trainers.ramp import Ramp


class NoiseCallback(Asked, lightning.Callback):
    """Measures the gradient noise and, where asked, scales the recipe at the start.

    Args:
        batch: global batch; None: the loader's, times accumulation and devices.
        batches: global batches of which one asks how far a run there will stray.
        scaled: the rule to apply before the first step; the plan goes into the loggers' hyperparameters.
        window: steps a record; None: a twentieth of the training, at least 10; 10 where its length is not known.
        method: of NoiseProbe.

    The trainer's loggers get noise/b_noise, its interval, noise/kappa_r and noise/deviation_BATCH. Records lie in
    noise.jsonl beside the first logger's files, else in the trainer's default_root_dir.

    Raises:
        NoiseError, RuleError: as NoiseProbe and ScaledBy, when training begins; several optimizers; no batch size.
    """

    def __init__(
        self, *, batch: int | None = None, batches: Sequence[int] = (), scaled: ScaledBy | None = None,
        window: int | None = None, method: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(batches, scaled, window, method)
        self.batch = batch

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise NoiseError(f"the module has {len(trainer.optimizers)} optimizers: the probe listens to one")
        own: Any = getattr(trainer.train_dataloader, "batch_size", None)
        if own is None and self.batch is None:
            raise NoiseError("the loader has no batch_size: give NoiseCallback(batch=N), over devices and accumulation")
        batch = self.batch or own * trainer.accumulate_grad_batches * trainer.world_size
        optimizer, estimate = trainer.optimizers[0], trainer.estimated_stepping_batches
        steps = int(estimate) if 0 < estimate < math.inf else None  # inf or -1: nothing says beforehand when it ends
        scheduler = next((c.scheduler for c in trainer.lr_scheduler_configs), None)
        known = begin("lightning", batch, optimizer, self.scaled, scheduler=scheduler, steps=steps)
        for logger in trainer.loggers:
            logger.log_hyperparams({"scalerun": known})
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.probe = NoiseProbe(
            pl_module, optimizer, batch=batch, method=self.method, step=trainer.global_step,
            window=self.window or max(10, (steps or 0) // 20), file=folder / "noise.jsonl",
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )  # fmt: skip

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        probe = self.probe
        if probe is None or not probe.records or probe.records[-1]["step"] != trainer.global_step:
            return
        if (numbers := probe.log(*self.batches)) and len(probe.records) != self._told:
            self._told = len(probe.records)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    _told = 0

    def on_train_end(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.detach()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class RampCallback(lightning.Callback):
    """A batch that grows while the Trainer trains: its accumulation, and by `scale` the optimizer, state and schedule.

    Trainer and schedule stay those of the first stage: a schedule of interval "step" goes on by samples, and training
    ends after as many as `max_steps` of the first batch have. A checkpoint holds where the ramp stands.

    Args:
        stages, how: as `Ramp`.
        batch: examples of a micro-batch on all devices; None: the loader's, times devices.

    Raises:
        RuleError: as `Ramp` and `scale`, when training begins or at a switch; several optimizers, manual optimization,
            a strategy that accumulates by itself, a schedule of another frequency than 1, no batch size.
    """

    def __init__(self, stages: Sequence[tuple[int, int]], *, batch: int | None = None, **how: Any) -> None:
        self.ramp, self.batch = Ramp(stages, **how), batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.ramp.seen, "at": self.ramp.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ramp.seen, self.ramp.at = state_dict["seen"], state_dict["at"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        own: Any = getattr(trainer.train_dataloader, "batch_size", None)
        unit = self.batch or (own or 0) * trainer.world_size
        configs = trainer.lr_scheduler_configs
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization or not unit:
            raise RuleError("a ramp needs one optimizer, automatic optimization, and a loader's batch_size (or batch=)")
        if trainer.strategy.handles_gradient_accumulation or any(c.frequency != 1 for c in configs):
            raise RuleError("a ramp needs Lightning's own accumulation, and a schedule of frequency 1")
        self.ramp.begin(unit, trainer.accumulate_grad_batches, max(0, trainer.max_steps))
        trainer.accumulate_grad_batches = self.ramp.accumulation

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
        clocks = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step"]
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.ramp.follow(trainer.optimizers[0], next(iter(schedulers), None), clocks, batch_idx)
            trainer.accumulate_grad_batches = self.ramp.accumulation

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.ramp.seen += 1
        trainer.should_stop |= self.ramp.over
