"""RunSpec, what `run.json` holds.

Its science half is everything that decides the numbers a run produces, and its hash is the run id; placement and
provenance (which rule, from which base) are not in it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from scaling_exps.rules import Hyper

VERSION = 1  # of run.json
UNIT = 16  # examples in one gradient of a full noise measurement, where the network lets examples be independent


class PlanError(ValueError):
    """One or more runs of the list cannot be run as asked; the message lists every fault."""


@dataclass(frozen=True)
class Schedule:
    """Multiplier of the learning rate, in samples of plain training (see `optim.multiplier`)."""

    total_samples: int
    warmup_samples: float
    warmup: str  # geometric | linear
    warmup_from: float  # share of the peak at the first sample
    decay: str  # one of DECAYS
    milestones: tuple[float, ...]  # samples
    gamma: float


@dataclass(frozen=True)
class Measure:
    """What is recorded, and how often."""

    evaluations: int
    train_records: int
    statistics_samples: int
    noise: str  # free | full | none
    noise_records: int
    noise_examples: int  # of each full measurement
    noise_unit: int | None  # examples in each of its gradients; see RunSpec.noise_unit


@dataclass(frozen=True)
class Science:
    """Everything that decides the numbers. Two runs with equal Science are one run."""

    model: dict[str, Any]
    dataset: dict[str, Any]
    optimizer: str
    family: str
    hyper: Hyper  # what is executed: after the rule and after SVAG
    schedule: Schedule
    svag: int
    batch: int
    micro_batch: int
    steps: int
    precision: str
    freeze_last: bool
    measure: Measure
    seed: int


@dataclass(frozen=True)
class Arm:
    """How a recipe led to this run. At kappa = 1 a run is the base of every arm."""

    rule: str
    kappa: float
    base: dict[str, Any]  # batch, lr, betas, eps, weight_decay, steps, warmup_steps, samples
    base_run_id: str


@dataclass(frozen=True)
class Placement:
    world_size: int
    micro_batch: int
    accumulation: int  # micro-batches a process adds up before its step, each draw counted
    compile: bool
    checkpoint_minutes: float


@dataclass(frozen=True)
class RunSpec:
    science: Science
    placement: Placement
    arms: tuple[Arm, ...]
    dataset_path: str | None
    experiment: str | None
    logger: str
    notes: tuple[str, ...]
    margin: dict[str, float] = field(default_factory=dict)  # metric -> largest gap that counts as equal; provenance

    @property
    def run_id(self) -> str:
        return run_id(self.science)

    @property
    def draws(self) -> int:
        """Independent mini-batches a step: 2 under SVAG, else 1."""
        return 1 if self.science.svag == 1 else 2

    @property
    def stretch(self) -> int:
        """Steps for what plain training does in one: SVAG's l^2 (l for SGD)."""
        return self.science.svag ** (2 if self.science.family == "adaptive" else 1)

    def samples(self, step: int) -> int:
        """Samples of the stream consumed after `step` steps."""
        return step * self.science.batch * self.draws

    def clock(self, step: float) -> float:
        """Where the schedule stands after `step` steps: samples of plain training that cover the same time."""
        return step * self.science.batch / self.stretch

    @property
    def noise_unit(self) -> int:
        """Examples in each gradient of a full noise measurement: with BN its batch, the micro-batch."""
        return noise_unit_of(self.science.measure, self.science.model, self.science.micro_batch)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "run_id": self.run_id, **asdict(self)}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> RunSpec:
        """Inverse of `to_json`.

        Raises:
            PlanError: written by another version, or edited: the run id no longer fits the science.
        """
        if raw.get("version") != VERSION:
            raise PlanError(
                f"run.json has version {raw.get('version')!r}, this scalerun reads version {VERSION}: "
                "use the scalerun that wrote it, or another runs_dir"
            )
        try:
            s = dict(raw["science"])
            s["hyper"] = Hyper(**{**s["hyper"], "betas": tuple(s["hyper"]["betas"])})
            s["schedule"] = Schedule(**{**s["schedule"], "milestones": tuple(s["schedule"]["milestones"])})
            s["measure"] = Measure(**s["measure"])
            spec = RunSpec(
                science=Science(**s),
                placement=Placement(**raw["placement"]),
                arms=tuple(Arm(**a) for a in raw["arms"]),
                dataset_path=raw["dataset_path"],
                experiment=raw["experiment"],
                logger=raw["logger"],
                notes=tuple(raw["notes"]),
                margin=dict(raw.get("margin", {})),
            )
        except (KeyError, TypeError) as e:
            raise PlanError(f"run.json is not one that this scalerun wrote ({type(e).__name__}: {e})") from e
        if spec.run_id != raw["run_id"]:
            raise PlanError(
                f"run.json says run id {raw['run_id']} but describes {spec.run_id}: it was edited; plan anew"
            )
        return spec


def run_id(science: Science) -> str:
    """Hash of the science: 12 hexadecimal digits. Floats count to 12 significant digits, so that two ways to
    the same hyperparameters (kappa = 4, or 2 twice) are one run."""
    text = json.dumps(_rounded(asdict(science)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def noise_unit_of(measure: Measure, model: dict[str, Any], micro_batch: int) -> int:
    if measure.noise_unit is not None:
        return measure.noise_unit
    if model.get("norm") == "batch":
        return micro_batch
    return max(u for u in range(1, min(UNIT, micro_batch) + 1) if measure.noise_examples % u == 0)


def summary(science: Science, hyper: Hyper, stretch: int) -> dict[str, Any]:
    warmup = science.schedule.warmup_samples * stretch / science.batch
    draws = 1 if science.svag == 1 else 2
    return {
        "batch": science.batch,
        **asdict(hyper),
        "betas": list(hyper.betas),
        "steps": science.steps,
        "warmup_steps": round(warmup, 2),
        "samples": science.steps * science.batch * draws,
    }
