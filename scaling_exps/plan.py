"""Config -> RunSpec: batch arithmetic, durations -> steps, the rule applied once, the run id.

A RunSpec is what `run.json` holds. Its science half is everything that decides the numbers a run
produces, and its hash is the run id; placement and provenance (which rule, from which base) are not in it.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scaling_exps import rules
from scaling_exps.config import Config, Dataset, FileDataset, ImageDataset, Launch, SlurmLaunch, TokenDataset
from scaling_exps.rules import Hyper

VERSION = 1  # of run.json
BETAS = {"adam": 2, "adamw": 2, "rmsprop": 2, "paper_adam": 2, "paper_rmsprop": 1, "sgd": 1}
WARMUPS = ("geometric", "linear")
DECAYS = ("constant", "milestones", "cosine", "linear", "inverse_sqrt")
NOISES = ("free", "full", "none")
UNIT = 16  # examples in one gradient of a full noise measurement, where the network lets examples be independent
PRECISIONS = ("float32", "bfloat16")
MAX_BATCH = 2**24


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
        return _noise_unit(self.science.measure, self.science.model, self.science.micro_batch)

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


def plan(configs: list[Config]) -> list[RunSpec]:
    """Expand the lists of every config, apply the rule, and check the whole sweep.

    Runs that turn out to be the same science are one RunSpec with several arms. Order is kept.

    Raises:
        PlanError: with every fault of every run, one a line.
    """
    runs: dict[str, RunSpec] = {}
    faults: dict[str, None] = {}  # an ordered set: a fault shared by several seeds is told once
    for config in configs:
        batches = config.batch if isinstance(config.batch, list) else [config.batch]
        seeds = config.seed if isinstance(config.seed, list) else [config.seed]
        names = config.rule if isinstance(config.rule, list) else [config.rule]
        ells = config.svag if isinstance(config.svag, list) else [config.svag]
        for key, values in (("batch", batches), ("seed", seeds), ("rule", names), ("svag", ells)):
            if not values:
                faults[f"{key}=[] is empty: give at least one value"] = None
        for batch, rule, ell, seed in itertools.product(batches, names, ells, seeds):
            try:
                spec = plan_one(replace(config, svag=ell), config.recipe.batch if batch is None else batch, rule, seed)
            except (PlanError, rules.RuleError) as e:
                faults[f"batch={batch} rule={rule}" + (f" svag={ell}" if ell != 1 else "") + f": {e}"] = None
                continue
            known = runs.get(spec.run_id)
            if known is not None:
                arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
                spec = replace(known, arms=arms)
            runs[spec.run_id] = spec
    if faults:
        raise PlanError("\n".join(faults))
    return list(runs.values())


def plan_one(config: Config, batch: int, rule_name: str, seed: int) -> RunSpec:
    """One run at one batch size, rule and seed; PlanError or RuleError if it cannot be."""
    _check(config, batch, seed)
    ell = config.svag
    assert isinstance(ell, int)  # `plan` takes the product
    r, o = config.recipe, config.optimizer
    family: rules.Family = "adaptive" if o.family == "adaptive" else "sgd"
    rule = rules.find(rule_name, family, l2=not o.decoupled and r.weight_decay > 0)
    base = Hyper(r.lr, tuple(r.betas), r.eps, r.weight_decay)
    kappa = batch / r.batch
    beta_map: rules.BetaMap = "power" if config.beta_map == "power" else "linear"
    scaled = rule.scale(
        base,
        kappa,
        base_batch=r.batch,
        duration=config.duration,
        noise_scale=config.noise_scale,
        beta_map=beta_map,
    )

    def science(hyper: Hyper, batch: int, svag: int, duration: float) -> Science:
        hyper, stretch = rules.svag(hyper, svag, family)
        total = r.samples if r.samples is not None else round((r.epochs or 0) * (config.dataset.train_size or 0))
        total = round(total * duration)
        dataset = asdict(config.dataset)
        del dataset["path"]  # where the data lies is not what it is
        return Science(
            model=config.model,
            dataset=dataset,
            optimizer=o.name,
            family=family,
            hyper=hyper,
            schedule=Schedule(
                total, r.warmup_fraction * total, r.warmup, r.warmup_from, r.decay,
                tuple(m * total for m in r.milestones_fraction), r.gamma,
            ),
            svag=svag,
            batch=batch,
            micro_batch=min(r.micro_batch, batch),
            steps=max(1, round(total / batch)) * stretch,
            precision=config.precision,
            freeze_last=r.freeze_last,
            measure=Measure(**asdict(config.measure)),
            seed=seed,
        )  # fmt: skip

    mine, base_run = science(scaled, batch, ell, config.duration), science(base, r.batch, 1, 1.0)
    micro = mine.micro_batch
    if batch % micro:
        low = batch // micro * micro
        raise PlanError(
            f"batch={batch} is no multiple of the micro-batch {micro}; nearest that fit: {low} and {low + micro}"
            + (
                " (the network normalises over the micro-batch, so it is part of the recipe)"
                if _batch_norm(config)
                else ""
            )
        )
    if ell > 1:
        _check_svag(config, batch)
    if config.measure.noise == "full":
        _check_noise(mine)
    world = _world_size(config.launch, batch // micro)
    draws = 1 if ell == 1 else 2
    return RunSpec(
        science=mine,
        placement=Placement(
            world, micro, batch // micro // world * draws, config.launch.compile, config.checkpoint.minutes
        ),
        arms=(Arm(rule_name, kappa, _summary(base_run, base, 1), run_id(base_run)),),
        dataset_path=config.dataset.path,
        experiment=config.experiment,
        logger=config.logger,
        notes=tuple(_notes(config, rule, base, scaled, batch)),
        margin={k: v for k, v in asdict(config.margin).items() if v is not None},
    )


def describe(spec: RunSpec) -> list[dict[str, Any]]:
    """The contract of `scalerun plan --json`: one object for each arm of the run."""
    s = spec.science
    return [
        {
            "run_id": spec.run_id,
            "rule": arm.rule,
            "kappa": arm.kappa,
            "svag": s.svag,
            "seed": s.seed,
            "base": arm.base,
            "scaled": _summary(s, s.hyper, spec.stretch),
            "placement": {
                "world_size": spec.placement.world_size,
                "micro_batch": s.micro_batch,
                "accumulation": spec.placement.accumulation,
            },
            "notes": list(spec.notes),
        }
        for arm in spec.arms
    ]


def _summary(science: Science, hyper: Hyper, stretch: int) -> dict[str, Any]:
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


def _check(c: Config, batch: int, seed: int) -> None:
    """Refuse what no rule could make sense of, all faults at once."""
    r, m = c.recipe, c.measure
    given = (r.epochs is not None) + (r.samples is not None)
    size = c.dataset.train_size
    duration = r.samples if r.samples is not None else (r.epochs or 0) * (size or 1)
    wrong = [
        (not 1 <= batch <= MAX_BATCH, f"batch={batch} must lie between 1 and {MAX_BATCH}"),
        (r.batch < 1, f"recipe.batch={r.batch} must be >= 1"),
        (r.micro_batch < 1, f"recipe.micro_batch={r.micro_batch} must be >= 1"),
        (not 0 <= seed < 2**31, f"seed={seed} must lie between 0 and 2147483647"),
        (c.beta_map not in ("linear", "power"), f"beta_map={c.beta_map!r}; allowed: linear, power"),
        (not 0 < c.duration < math.inf, f"duration={c.duration} must be > 0 (a multiple of the recipe's)"),
        (
            c.noise_scale is not None and not 0 < c.noise_scale < math.inf,
            f"noise_scale={c.noise_scale} must be > 0 (examples)",
        ),
        (not isinstance(c.svag, int) or c.svag < 1, f"svag={c.svag} must be an integer >= 1 (1 is plain training)"),
        (given != 1, f"recipe.epochs={r.epochs}, recipe.samples={r.samples}: give exactly one, the other null"),
        (given == 1 and not (math.isfinite(duration) and duration >= 1), "the duration must be at least one sample"),
        (c.optimizer.name not in BETAS, f"unknown optimizer {c.optimizer.name!r}; allowed: {', '.join(BETAS)}"),
        (
            len(r.betas) != BETAS.get(c.optimizer.name, len(r.betas)),
            f"recipe.betas={r.betas}: optimizer {c.optimizer.name!r} takes {BETAS.get(c.optimizer.name)} value(s)",
        ),
        (r.warmup not in WARMUPS, f"recipe.warmup={r.warmup!r}; allowed: {', '.join(WARMUPS)}"),
        (
            not 0 <= r.warmup_from <= 1 or (r.warmup == "geometric" and r.warmup_from == 0),
            f"recipe.warmup_from={r.warmup_from} must lie in [0, 1], above 0 for a geometric warm-up",
        ),
        (not 0 <= r.warmup_fraction <= 1, f"recipe.warmup_fraction={r.warmup_fraction} must lie in [0, 1]"),
        (r.decay not in DECAYS, f"recipe.decay={r.decay!r}; allowed: {', '.join(DECAYS)}"),
        (not all(0 <= x <= 1 for x in r.milestones_fraction), "recipe.milestones_fraction: each must lie in [0, 1]"),
        (c.precision not in PRECISIONS, f"precision={c.precision!r}; allowed: {', '.join(PRECISIONS)}"),
        (c.logger not in ("wandb", "none"), f"logger={c.logger!r}; allowed: wandb, none"),
        (m.evaluations < 1 or m.train_records < 1, "measure.evaluations and measure.train_records must be >= 1"),
        (m.noise not in NOISES, f"measure.noise={m.noise!r}; allowed: {', '.join(NOISES)}"),
        (m.noise_records < 1, f"measure.noise_records={m.noise_records} must be >= 1 (or measure.noise=none)"),
        (m.statistics_samples < 1, f"measure.statistics_samples={m.statistics_samples} must be >= 1"),
        (
            not all(v is None or (math.isfinite(v) and v > 0) for v in asdict(c.margin).values()),
            f"margin={ {k: v for k, v in asdict(c.margin).items() if v is not None} }: each must be > 0, or null",
        ),
        (not c.checkpoint.minutes > 0, f"checkpoint.minutes={c.checkpoint.minutes} must be > 0"),
        *_slurm_faults(c.launch),
        (c.launch.parallel < 1, f"launch.parallel={c.launch.parallel} must be >= 1"),
        (
            any(n is not None and n < 1 for n in (size, c.dataset.test_size)),
            "dataset.train_size and dataset.test_size must be >= 1",
        ),
        (
            r.epochs is not None and size is None,
            "recipe.epochs needs dataset.train_size (examples); or give recipe.epochs=null and recipe.samples",
        ),
        *_dataset_faults(c.dataset, c.model),
    ]  # fmt: skip
    if found := [text for bad, text in wrong if bad]:
        raise PlanError("; ".join(found))


def _dataset_faults(d: Dataset, model: dict[str, Any]) -> list[tuple[bool, str]]:
    if isinstance(d, ImageDataset):
        return [
            (d.train_size is None or d.test_size is None, f"dataset {d.name} needs dataset.train_size and test_size"),
            (not 0 <= d.label_noise <= 1, f"dataset.label_noise={d.label_noise} must lie in [0, 1]"),
        ]
    if isinstance(d, FileDataset):
        return [
            (len(d.shape) != 3 or d.shape[-1] != 3, f"dataset.shape={d.shape} must be [height, width, 3]: RGB"),
            (d.classes < 2, f"dataset.classes={d.classes}: give the number of classes, dataset.classes=N"),
            (
                len(d.area) != 2 or not 0 < d.area[0] <= d.area[1] <= 1,
                f"dataset.area={d.area} must be [smallest, largest] share of an image, in (0, 1]",
            ),
            (d.resize < max(d.shape[:2]), f"dataset.resize={d.resize} must be >= the image size {d.shape[:2]}"),
        ]
    if not isinstance(d, TokenDataset):
        return [(True, f"dataset.kind={d.kind!r}; allowed: images, files, tokens")]
    positions, masked = model.get("context"), model["name"] == "roberta"
    return [
        (d.context < 2, f"dataset.context={d.context} must be >= 2 tokens"),
        (d.vocab < 2, f"dataset.vocab={d.vocab} must be >= 2"),
        (not 0 <= d.mask < 1, f"dataset.mask={d.mask} must lie in [0, 1)"),
        (d.mask > 0 and round(d.mask * d.context) < 1, f"dataset.mask={d.mask} hides no token of {d.context}"),
        (
            isinstance(positions, int) and d.context > positions,
            f"dataset.context={d.context}: sequences are longer than the model's model.context={positions} positions; "
            "lower the one or raise the other",
        ),
        (masked and d.mask == 0, "model roberta sees both sides of a token: give dataset.mask, for example 0.15"),
        (
            model["name"] == "gpt" and d.mask > 0,
            f"model gpt predicts the next token and hides none: use dataset.mask=0, not {d.mask}",
        ),
    ]


def _check_svag(c: Config, batch: int) -> None:
    if c.dataset.train_size is not None and 2 * batch > c.dataset.train_size:
        raise PlanError(
            f"svag={c.svag} draws two independent mini-batches a step, and batch={batch} leaves no second draw in "
            f"{c.dataset.train_size} training examples; allowed: batch <= {c.dataset.train_size // 2}, or svag=1"
        )
    if c.optimizer.decoupled and c.recipe.weight_decay:
        raise PlanError(
            f"svag={c.svag} with decoupled weight decay {c.recipe.weight_decay:g}: the paper's SVAG does not say "
            "how to scale it; use recipe.weight_decay=0, or optimizer=adam (decay inside the gradient)"
        )
    if c.optimizer.family == "sgd" and any(c.recipe.betas):
        raise PlanError(
            f"svag={c.svag} with momentum {c.recipe.betas}: for SGD it is defined without momentum (lr/l, l times the "
            "steps, momentum unchanged would change the SDE); use recipe.betas=[0]"
        )


def _noise_unit(measure: Measure, model: dict[str, Any], micro_batch: int) -> int:
    if measure.noise_unit is not None:
        return measure.noise_unit
    if model.get("norm") == "batch":
        return micro_batch
    return max(u for u in range(1, min(UNIT, micro_batch) + 1) if measure.noise_examples % u == 0)


def _check_noise(s: Science) -> None:
    """Refuse a full noise measurement that has no meaning."""
    n, size = s.measure.noise_examples, s.dataset["train_size"]
    if n < 2:
        raise PlanError(f"measure.noise_examples={n} must be >= 2: a covariance needs two gradients")
    unit = _noise_unit(s.measure, s.model, s.micro_batch)
    given = f"measure.noise_examples={n}, gradients of {unit} example(s) each"
    if not 1 <= unit <= s.micro_batch:
        raise PlanError(f"measure.noise_unit={unit} must lie between 1 and the micro-batch {s.micro_batch}")
    if s.model.get("norm") == "batch" and unit != s.micro_batch:
        raise PlanError(
            f"measure.noise_unit={unit}: with batch normalisation a gradient is that of one micro-batch, here "
            f"{s.micro_batch}; leave noise_unit null"
        )
    if n % unit:
        raise PlanError(f"{given}: not a whole number of gradients; nearest that fit: {_multiples(n, unit)}")
    if n // unit < 2:
        raise PlanError(f"{given}: a covariance needs two gradients, so at least {2 * unit} examples")
    if size is not None and n > size:
        raise PlanError(f"{given}: there are only {size} training examples")


def _multiples(n: int, unit: int) -> str:
    low = max(2, n // unit)
    return f"{low * unit} and {(low + 1) * unit}"


def _slurm_faults(launch: Launch) -> list[tuple[bool, str]]:
    if not isinstance(launch, SlurmLaunch):
        return []
    positive = ("max_devices", "devices_per_node", "cpus_per_task", "minutes", "array_parallelism")
    return [
        *((getattr(launch, k) < 1, f"launch.{k}={getattr(launch, k)} must be >= 1") for k in positive),
        (launch.requeues < 0, f"launch.requeues={launch.requeues} must be >= 0"),
        (
            not 1 <= launch.signal_seconds < 60 * launch.minutes,
            f"launch.signal_seconds={launch.signal_seconds} must lie between 1 and the time limit (60 launch.minutes)",
        ),
        (
            launch.memory_gb is not None and not launch.memory_gb > 0,
            f"launch.memory_gb={launch.memory_gb} must be > 0, or null",
        ),
    ]


def _world_size(launch: Launch, micro_batches: int) -> int:
    devices = launch.devices
    if devices == "auto" and isinstance(launch, SlurmLaunch):  # the machine that submits is not the one that runs
        return max(d for d in range(1, min(launch.max_devices, micro_batches) + 1) if micro_batches % d == 0)
    if devices == "auto":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = (
            len(glob.glob("/dev/nvidia[0-9]*"))
            if visible is None
            else len([v for v in visible.split(",") if v.strip()])
        )
        return max(d for d in range(1, max(1, min(count, micro_batches)) + 1) if micro_batches % d == 0)
    if not isinstance(devices, int) or devices < 1:
        raise PlanError(f"launch.devices={devices!r} must be a number >= 1, or auto")
    if micro_batches % devices:
        fit = [d for d in range(1, micro_batches + 1) if micro_batches % d == 0][:12]
        raise PlanError(
            f"launch.devices={devices} does not divide the {micro_batches} micro-batches of a step; allowed: {fit}"
        )
    return devices


def _batch_norm(config: Config) -> bool:
    return config.model.get("norm") == "batch"


def _notes(c: Config, rule: rules.Rule, base: Hyper, scaled: Hyper, batch: int) -> list[str]:
    r, kappa = c.recipe, batch / c.recipe.batch
    notes = []
    if kappa != 1:
        notes.append(f"rule {rule.name} ({rule.evidence}) answers goal={rule.goal}: {rules.QUESTIONS[rule.goal]}")
        notes.append(f"rule {rule.name} leaves alone: {rule.leaves_alone}")
        if c.optimizer.decoupled and r.weight_decay and not rule.decoupled:
            shrink = scaled.lr * scaled.weight_decay / (base.lr * base.weight_decay)  # of a step
            notes.append(
                f"decoupled weight decay {r.weight_decay:g} is not covered by rule {rule.name}: per sample it now "
                f"shrinks weights by {shrink / kappa:.3g} times what the base does"
            )
    if batch < r.micro_batch:
        seen = " and the network normalises over fewer examples than the recipe's" if _batch_norm(c) else ""
        notes.append(
            f"batch {batch} is below the recipe's micro-batch {r.micro_batch}: it runs as one micro-batch{seen}"
        )
    if _batch_norm(c):
        notes.append(f"normalisation batch: {min(r.micro_batch, batch)} examples (the micro-batch), whatever the batch")
    if c.duration != 1 and not rule.moves_duration:
        notes.append(f"duration={c.duration:g} is not covered by rule {rule.name}; completed and adamw_timescale do")
    if c.beta_map == "power" and scaled.betas != base.betas:
        notes.append("beta_map=power: β -> β^κ in place of 1 - κ·(1 - β)")
    smallest = min((b for b in r.betas if b > 0), default=1.0)
    if kappa > 1 and smallest < 1 and (low := 1 - kappa * (1 - smallest)) < 0.8 and round(low, 15) in scaled.betas:
        limit = 1 / (1 - smallest)
        notes.append(f"smallest scaled beta is {low:.3g}: the rule is near its limit kappa < {limit:.4g}")
    return notes


def print_plan(specs: list[RunSpec]) -> None:
    """base -> scaled with the formula, for each arm and batch (seeds share a table); the batch arithmetic; notes."""
    groups: dict[str, list[tuple[RunSpec, Arm]]] = {}
    for spec in specs:
        for arm in spec.arms if spec.science.batch != arm_batch(spec.arms[0]) else spec.arms[:1]:
            twin = asdict(replace(spec.science, seed=0))
            groups.setdefault(json.dumps([twin, arm.rule], sort_keys=True), []).append((spec, arm))
    for members in groups.values():
        spec, arm = members[0]
        s, p = spec.science, spec.placement
        rule = rules.find(arm.rule)
        base, scaled = arm.base, _summary(s, s.hyper, spec.stretch)
        print(
            f"\n{s.model['name']} on {s.dataset['name']}, {s.optimizer}: "
            f"batch {base['batch']} -> {s.batch}, κ = {arm.kappa:g}, rule {'(any)' if arm.kappa == 1 else arm.rule}"
            + (f", SVAG ℓ = {s.svag}" if s.svag > 1 else "")
        )
        longer = "" if s.svag > 1 or abs(scaled["samples"] / base["samples"] - 1) < 0.5 / s.steps else "δ·"
        formulas = {
            **rule.formulas(),
            "steps": f"{longer}steps/κ",
            "warmup_steps": "same samples" if not longer else "δ·samples",
            "samples": "δ·samples" if longer else "same",
        }
        for key in ("lr", "betas", "eps", "weight_decay", "steps", "warmup_steps", "samples"):
            then = formulas[key] if arm.kappa != 1 else ""
            print(f"  {key:<13} {_show(base[key]):>20} -> {_show(scaled[key]):<26} {then}".rstrip())
        print(
            f"  batch {s.batch} = micro-batch {s.micro_batch} × accumulation {p.accumulation // spec.draws} "
            f"× world size {p.world_size}" + (f", {spec.draws} draws a step" if spec.draws > 1 else "")
        )
        for note in spec.notes:
            print(f"  note: {note}")
        print("  runs: " + ", ".join(f"{m.run_id} (seed {m.science.seed})" for m, _ in members))
    print(f"\n{len(specs)} run(s)")


def arm_batch(arm: Arm) -> int:
    return int(arm.base["batch"])


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
