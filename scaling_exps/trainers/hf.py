"""Hugging Face's Trainer: trainer.add_callback(NoiseCallback(trainer))."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_callback import ProgressCallback

from scaling_exps.noise.estimators import NoiseError
from scaling_exps.noise.probe import NoiseProbe
from scaling_exps.trainers import Asked, ScaledBy, begin


class NoiseCallback(Asked, transformers.TrainerCallback):
    """Measures the gradient noise and, where asked, scales the recipe at the start.

    Args:
        trainer: whose loggers get noise/b_noise, its interval, noise/kappa_r and noise/deviation_BATCH.
        batches: global batches of which one asks how far a run there will stray.
        scaled: the rule to apply before the first step; the plan goes into trainer_state.json and into wandb's config.
        window: steps a record; None: a twentieth of the training, at least 10.
        method: of NoiseProbe.

    Records lie in noise.jsonl in the trainer's output_dir.

    Raises:
        NoiseError, RuleError: as NoiseProbe and ScaledBy, when training begins.
    """

    def __init__(
        self, trainer: transformers.Trainer, *, batches: Sequence[int] = (), scaled: ScaledBy | None = None,
        window: int | None = None, method: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(batches, scaled, window, method)
        if not isinstance(trainer, transformers.Trainer):
            raise NoiseError(f"trainer={trainer!r} must be the Trainer: NoiseCallback(trainer)")
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        known = begin(
            "transformers", batch, kwargs["optimizer"], self.scaled, scheduler=kwargs["lr_scheduler"],
            steps=state.max_steps, seed=args.seed,
        )  # fmt: skip
        state.log_history.append({"step": state.global_step, "scalerun": known})
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        self.probe = NoiseProbe(
            kwargs["model"], kwargs["optimizer"], batch=batch, method=self.method, step=state.global_step,
            window=self.window or max(10, state.max_steps // 20), file=Path(args.output_dir) / "noise.jsonl",
            scaler=getattr(self.trainer.accelerator, "scaler", None),
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        probe = self.probe
        if probe is None or not probe.records or probe.records[-1]["step"] != state.global_step:
            return
        if numbers := probe.log(*self.batches):
            due = control.should_log  # which `log` takes for done: the loss of this step would not be logged
            self.trainer.log(numbers)
            control.should_log = due
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(probe.sentence())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is not None:
            self.probe.detach()
