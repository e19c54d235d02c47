"""RunSpec, what `run.json` holds.

Its science is everything that decides the numbers a run produces, and the hash of it is the run id. The rest says
where it runs, what is measured, and which recipe led to it.
"""

import hashlib
import json
import math
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from scaling_exps.config import Checkpoint, Dataset, Measure, Model, Wandb
from scaling_exps.rules import OPTIMIZERS, BetaMap, Family, Goal, Hyper

VERSION = 2  # of run.json
UNIT = 16  # examples in one gradient of a full noise measurement, where the network lets examples be independent

Role = Literal["base", "rule", "control"]


class PlanError(ValueError):
    """One or more runs of the list cannot be run as asked; the message lists every fault."""


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Foreign(_Value, frozen=True, tag_field="kind", tag="foreign"):
    """The network of a run that another trainer made: a name, by which runs are compared."""

    name: str
    normalises_over_batch = False


class ForeignData(_Value, frozen=True, tag_field="kind", tag="foreign"):
    """The data of such a run."""

    name: str
    train_size = None


if TYPE_CHECKING:  # what plans, trains and costs meets none of another trainer
    AnyModel = Model
    AnyDataset = Dataset
else:
    AnyModel, AnyDataset = Model | Foreign, Dataset | ForeignData


class Schedule(_Value, frozen=True):
    """Multiplier of the learning rate, in samples of plain training."""

    total_samples: int
    warmup_samples: float
    warmup: str
    warmup_from: float  # share of the peak at the first sample
    decay: str
    milestones: tuple[float, ...]  # samples
    gamma: float

    def multiplier(self, samples: float) -> float:
        """The learning rate at `samples` >= 0 seen, as a share of its peak; a function of nothing else.

        A step asks at the middle of the samples it covers, so that the integral of the rate over the same samples
        agrees between batch sizes to second order.
        """
        if samples < self.warmup_samples:
            share = samples / self.warmup_samples
            if self.warmup == "geometric":
                return float(self.warmup_from ** (1 - share))
            return self.warmup_from + (1 - self.warmup_from) * share
        share = (samples - self.warmup_samples) / max(1.0, self.total_samples - self.warmup_samples)
        match self.decay:
            case "milestones":
                return float(self.gamma ** sum(samples >= m for m in self.milestones))
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
            case "linear":
                return 1 - min(1.0, share)
            case "inverse_sqrt":
                return math.sqrt(self.warmup_samples / samples)
        return 1.0


class Stage(_Value, frozen=True, omit_defaults=True, kw_only=False):
    """What holds from a step of the run on, until the next stage."""

    step: int
    batch: int
    micro_batch: int
    hyper: Hyper
    clip: float | None = None
    ema: float | None = None
    noise_scale: float | None = None  # B_noise by which v is moved at its start; None: as if noise were all of it
    carries: bool = True  # False: v stays as it is


class Science(_Value, frozen=True, omit_defaults=True, dict=True):
    """Everything that decides the numbers. Two runs with equal science are one run."""

    model: AnyModel
    dataset: AnyDataset  # its path is None: where the data lies is not what it is
    content: str  # fingerprint of the data, where its name and revision do not fix it
    optimizer: str
    hyper: Hyper  # what is executed: after the rule and after SVAG
    schedule: Schedule
    svag: int
    batch: int
    micro_batch: int
    steps: int
    precision: str
    freeze_last: bool
    statistics_samples: int
    seed: int
    # what a default leaves out of the run id; clip and ema are those that are executed, too
    clip: float | None = None  # threshold on the norm of a step's gradient
    ema: float | None = None  # decay a step of the average of the weights that is evaluated
    start: str | None = None  # content of the file of weights that it begins with
    ramp: tuple[Stage, ...] = ()  # the stages after the first, which the fields above describe

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages; a run without a ramp has one."""
        return Stage(0, self.batch, self.micro_batch, self.hyper, self.clip, self.ema), *self.ramp

    def at(self, step: int) -> Stage:
        """The stage that a step belongs to, counted from 0."""
        return next(stage for stage in reversed(self.stages) if stage.step <= step)

    def shares(self, step: int) -> int:
        """Into how many parts the micro-batches of every step from this one on can be shared out."""
        return math.gcd(*(x.batch // x.micro_batch for x in self.stages if x.step >= self.at(step).step))

    def spent(self, step: float) -> list[tuple[Stage, float]]:
        """The stages that the first `step` steps lie in, and how many lie in each."""
        ends = [*(stage.step for stage in self.ramp), math.inf]
        return [(x, min(step, end) - x.step) for x, end in zip(self.stages, ends, strict=True) if x.step <= step]

    @property
    def batches(self) -> str:
        """The batch as it is printed: 256, or 256 → 1,024."""
        return " → ".join(f"{stage.batch:,}" for stage in self.stages)

    @property
    def family(self) -> Family:
        row = OPTIMIZERS.get(self.optimizer)
        return row.family if row else "adaptive"  # of another trainer, and unknown

    @property
    def draws(self) -> int:
        """Independent mini-batches a step: 2 under SVAG, else 1."""
        return 1 if self.svag == 1 else 2

    @property
    def stretch(self) -> int:
        """Steps for what plain training does in one: SVAG's l^2 (l for SGD)."""
        return self.svag ** (2 if self.family == "adaptive" else 1)

    def samples(self, step: int) -> int:
        """Samples of the stream consumed after `step` steps."""
        return sum(int(n) * stage.batch for stage, n in self.spent(step)) * self.draws

    def clock(self, step: float) -> float:
        """Where the schedule stands after `step` steps: samples of plain training that cover the same time."""
        return sum(n * stage.batch for stage, n in self.spent(step)) / self.stretch

    def steps_to(self, clock: float) -> float:
        """The inverse of `clock`."""
        stage = next(x for x in reversed(self.stages) if self.clock(x.step) <= clock)
        return stage.step + (clock - self.clock(stage.step)) * self.stretch / stage.batch

    def numbers(self) -> "Numbers":
        """What the plan shows of it."""
        warmup = self.steps_to(self.schedule.warmup_samples)
        h = self.hyper
        return Numbers(
            batch=self.batch, lr=h.lr, betas=h.betas, eps=h.eps, weight_decay=h.weight_decay,
            steps=self.steps, warmup_steps=round(warmup, 2), samples=self.samples(self.steps), clip=self.clip,
            ema=self.ema, start=self.start,
        )  # fmt: skip


class Numbers(_Value, frozen=True, omit_defaults=True):
    """The numbers of a recipe at one batch size, as the plan shows them."""

    batch: int
    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    steps: int
    warmup_steps: float
    samples: int
    clip: float | None = None
    ema: float | None = None
    start: str | None = None


Factor = Annotated[float, msgspec.Meta(gt=0, le=10**12)]


class Arm(_Value, frozen=True, omit_defaults=True):
    """How a recipe led to this run. At kappa = 1 a run is the base of every arm."""

    rule: str
    goal: Goal  # of the rule, for this family of optimizers
    role: Role  # in a comparison: base, rule under test, control
    kappa: Factor  # of a ramp: of the stage that is furthest from the base
    duration: Factor  # budget over the base's
    base: Numbers
    base_run_id: str
    beta_map: BetaMap = "linear"

    @property
    def batch(self) -> int:
        """The batch of kappa: of a ramp the largest, as a rule."""
        return round(self.kappa * self.base.batch)


Positive = Annotated[int, msgspec.Meta(ge=1)]


class Placement(_Value, frozen=True, omit_defaults=True):
    """Where it runs; no result depends on it."""

    world_size: Positive
    accumulation: Positive  # micro-batches a process adds up before its step, each draw counted
    compile: bool
    shard: bool = False  # weights, gradients and moments are cut over the processes, where there are several
    most: Positive | None = None  # of a ramp that may grow: processes that it takes as soon as a stage can share them


class RunSpec(_Value, frozen=True, dict=True):
    science: Science
    measure: Measure
    placement: Placement
    arms: tuple[Arm, ...]
    dataset_path: str | None
    experiment: str | None
    logger: str | tuple[str, ...]
    wandb: Wandb
    checkpoint: Checkpoint
    notes: tuple[str, ...]
    margin: dict[str, float]  # metric -> largest gap that counts as equal
    start_from: str | None = None  # where the file of weights lies
    looks: tuple[int, ...] = ()  # seeds at which the report may judge; none: once, at the end

    @cached_property
    def run_id(self) -> str:
        return run_id(self.science)

    @property
    def loggers(self) -> tuple[str, ...]:
        return (self.logger,) if isinstance(self.logger, str) else self.logger

    @property
    def chunks(self) -> int:
        """Gradients that one step (of a ramp its first) averages, over draws, ranks and accumulation."""
        return self.science.batch // self.science.micro_batch * self.science.draws

    @property
    def noise(self) -> str:
        """How the gradient noise is measured: free, full or none. `auto` is full where a step has one gradient."""
        if self.placement.shard and self.placement.world_size > 1:
            return "none"
        if self.measure.noise != "auto":
            return self.measure.noise
        size = self.science.dataset.train_size
        able = size is None or size >= 2 * self.noise_unit
        return "full" if self.chunks == 1 and able else "free"

    @property
    def noise_unit(self) -> int:
        """Examples in each gradient of a full noise measurement: with BN its batch, the micro-batch."""
        micro = self.science.micro_batch
        if self.measure.noise_unit is not None:
            return self.measure.noise_unit
        if self.science.model.normalises_over_batch:
            return micro
        return max(u for u in range(1, min(UNIT, micro) + 1) if (self.measure.noise_examples or 256) % u == 0)

    @property
    def noise_examples(self) -> int:
        """Training examples of a full noise measurement."""
        if self.measure.noise_examples is not None:
            return self.measure.noise_examples
        unit, size = self.noise_unit, self.science.dataset.train_size
        wanted = max(256, 8 * unit)
        return (wanted if size is None else min(wanted, size)) // unit * unit

    def from_step(self, step: int) -> "RunSpec":
        """The run with as many processes as it may have from this step on."""
        if self.placement.most is None:
            return self
        stage, world = self.science.at(step), processes(self.science.shares(step), self.placement.most)
        accumulation = stage.batch // stage.micro_batch // world
        placement = msgspec.structs.replace(self.placement, world_size=world, accumulation=accumulation)
        return msgspec.structs.replace(self, placement=placement)

    def to_json(self) -> dict[str, Any]:
        """What run.json holds; `from_json` is its inverse."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {"version": VERSION, "run_id": self.run_id, **fields}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "RunSpec":
        """Inverse of `to_json`.

        Raises:
            PlanError: written by another version, or edited: the run id no longer fits the science.
        """
        fields = dict(raw)
        version, identity = fields.pop("version", None), fields.pop("run_id", None)
        if version != VERSION:
            raise PlanError(
                f"run.json has version {version!r}, this scalerun reads version {VERSION}: "
                "use the scalerun that wrote it, or another runs_dir"
            )
        try:
            json.dumps(fields, allow_nan=False)  # Python reads NaN and 1e999; no plan holds such a number
            spec = msgspec.convert(fields, RunSpec)
            described = spec.run_id
        except (ValueError, RecursionError) as e:
            raise PlanError(f"run.json is not one that this scalerun wrote: {e}") from e
        if described != identity:
            raise PlanError(f"run.json says run id {identity} but describes {described}: it was edited; plan anew")
        if not spec.arms:
            raise PlanError("run.json names no arm; plan anew")
        return spec


def processes(shares: int, most: int) -> int:
    """The largest number, at most `most`, that divides the shares."""
    return max(d for d in range(1, min(most, shares) + 1) if shares % d == 0)


def run_id(science: Science) -> str:
    """Hash of the science: 12 hexadecimal digits. Floats count to 12 significant digits, so that two ways to
    the same hyperparameters (kappa = 4, or 2 twice) are one run."""
    return _digest(msgspec.json.encode(science))


@lru_cache(maxsize=1024)  # a sweep asks several times for each run, and for its base run
def _digest(science: bytes) -> str:
    rounded = json.loads(science, parse_float=lambda digits: float(f"{float(digits):.12g}"))
    text = json.dumps(rounded, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
