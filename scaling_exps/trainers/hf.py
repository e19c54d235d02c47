"""Hugging Face's Trainer: trainer.add_callback(NoiseCallback(trainer)), trainer.add_callback(RampCallback(stages))."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_callback import ExportableState, ProgressCallback

from scaling_exps.noise.estimators import NoiseError
from scaling_exps.noise.probe import NoiseProbe
from scaling_exps.rules import RuleError
from scaling_exps.trainers import Asked, ScaledBy, begin
from scaling_exps.trainers.ramp import Ramp


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


class RampCallback(transformers.TrainerCallback, ExportableState):
    """A batch that grows while the Trainer trains: its accumulation, and by `scale` the optimizer, state and schedule.

    The arguments stay those of the first stage: steps, warm-up and schedule go on by samples, and training ends after
    as many as `max_steps` of the first batch have.

    Args:
        stages, how: as `Ramp`.

    Raises:
        RuleError: as `Ramp` and `scale`, when training begins or at a switch; DeepSpeed, which has an accumulation of
            its own; a checkpoint to go on from without ignore_data_skip: the Trainer computes where its data stood from
            one accumulation.
    """

    def __init__(self, stages: Sequence[tuple[int, int]], **how: Any) -> None:
        self.ramp, self.in_epoch = Ramp(stages, **how), 0

    def state(self) -> dict[str, Any]:
        args = {"stages": self.ramp.stages, **self.ramp.how}
        return {"args": args, "attributes": {"place": [self.ramp.seen, self.ramp.at]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed:
            raise RuleError("DeepSpeed keeps the accumulation that it began with: a ramp is a restart a stage there")
        self.ramp.begin(args.train_batch_size * args.world_size, args.gradient_accumulation_steps, state.max_steps)
        if state.global_step:
            if not args.ignore_data_skip:
                raise RuleError(
                    "a ramp that goes on from a checkpoint needs ignore_data_skip=True: the Trainer would skip data by "
                    "its accumulation now; the data of the epoch begin anew"
                )
            stored = state.stateful_callbacks[type(self).__name__]
            self.ramp.seen, self.ramp.at = (stored[0] if isinstance(stored, list) else stored)["attributes"]["place"]
            args.gradient_accumulation_steps = self.ramp.accumulation

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_epoch = 0
        self._follow(args, control, kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_epoch += 1
        self.ramp.seen += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)
        self._follow(args, control, kwargs)

    def _follow(self, args: Any, control: Any, kwargs: dict[str, Any]) -> None:
        scheduler = kwargs["lr_scheduler"]
        self.ramp.follow(kwargs["optimizer"], scheduler, [scheduler], self.in_epoch)
        args.gradient_accumulation_steps = self.ramp.accumulation
        control.should_training_stop |= self.ramp.over
