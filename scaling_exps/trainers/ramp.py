"""A batch that grows in another trainer: what the callbacks `hf.RampCallback` and `lightning.RampCallback` share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import index
from typing import Any

from scaling_exps.rules.move import RuleError
from scaling_exps.rules.scale import scale


class Ramp:
    """Where a trainer stands in its stages.

    Args:
        stages: (start, batch) of each: starts in samples that rise from 0, global batches that rise. The first batch
            is the trainer's own, whose numbers, steps and schedule it is given.
        how: rule, noise_scale and beta_map of `scale`.

    Raises:
        RuleError: stages that are none; below, batches that are no whole micro-batches.
    """

    def __init__(self, stages: Sequence[tuple[int, int]], **how: Any) -> None:
        try:
            self.stages = [(index(start), index(batch)) for start, batch in stages]
            (zero, first), *_ = self.stages
            rises = all(a < b for two in itertools.pairwise(self.stages) for a, b in zip(*two, strict=True))
        except (TypeError, ValueError):
            rises = False
        if not rises or zero != 0 or first < 1:
            raise RuleError(
                f"stages={stages!r}: they are (start, batch), starts in samples that rise from 0, batches that rise: "
                "stages=[(0, 256), (1_000_000, 1024)]"
            )
        self.how = how
        self.seen = self.at = 0  # micro-batches, of all devices together; stage

    def begin(self, unit: int, accumulation: int, steps: int) -> None:
        """Take the trainer's own: examples of a micro-batch on all devices, accumulation, steps at the first batch."""
        batches = [batch for _, batch in self.stages]
        if batches[0] != unit * accumulation:
            raise RuleError(f"the ramp begins at batch {batches[0]}, and the trainer takes {unit * accumulation}")
        if wrong := [batch for batch in batches if batch % unit]:
            raise RuleError(f"batch {wrong[0]} of the ramp is no multiple of the {unit} examples of a micro-batch")
        self.unit, self.total = unit, steps * batches[0]

    @property
    def accumulation(self) -> int:
        return self.stages[self.at][1] // self.unit

    @property
    def over(self) -> bool:
        """Whether as many samples were seen as the steps at the first batch have."""
        return 0 < self.total <= self.seen * self.unit

    def follow(self, optimizer: Any, scheduler: Any, clocks: Sequence[Any], in_epoch: int) -> None:
        """After a step: bring schedules to these samples, and go over to the stage that begins here, if one does.

        Args:
            scheduler: the optimizer's, whose base rates move, or None.
            clocks: the schedulers that the trainer moves on once a step: they count steps of the first batch.
            in_epoch: micro-batches of this epoch so far. Trainers count accumulation in these, so a stage begins where
                they are a multiple of its own: late by less than one of its steps.
        """
        samples, before = self.seen * self.unit, self.stages[self.at][1]
        for clock in clocks:
            while clock.last_epoch < samples // self.stages[0][1]:
                clock.step()
        at = max(i for i, (start, _) in enumerate(self.stages) if start <= samples)
        if at > self.at and in_epoch % (self.stages[at][1] // self.unit) == 0:
            scale(optimizer, base_batch=before, batch=self.stages[at][1], scheduler=scheduler, **self.how)
            self.at = at
