"""What no rule could make sense of: refused before anything is planned, all faults at once."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from scaling_exps.config import Config, Dataset, FileDataset, ImageDataset, Launch, SlurmLaunch, TokenDataset
from scaling_exps.plan.spec import PlanError, Science, noise_unit_of

BETAS = {"adam": 2, "adamw": 2, "rmsprop": 2, "paper_adam": 2, "paper_rmsprop": 1, "sgd": 1}
WARMUPS = ("geometric", "linear")
DECAYS = ("constant", "milestones", "cosine", "linear", "inverse_sqrt")
NOISES = ("free", "full", "none")
PRECISIONS = ("float32", "bfloat16")
MAX_BATCH = 2**24


def check(c: Config, batch: int, seed: int) -> None:
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
        (
            r.decay == "inverse_sqrt" and r.warmup_fraction == 0,  # its peak would be that of the first step
            "recipe.decay=inverse_sqrt falls from the end of the warm-up: give recipe.warmup_fraction > 0",
        ),
        (not 0 < r.gamma <= 1, f"recipe.gamma={r.gamma} must lie in (0, 1]: what a milestone multiplies the rate by"),
        (not all(0 <= x <= 1 for x in r.milestones_fraction), "recipe.milestones_fraction: each must lie in [0, 1]"),
        (c.precision not in PRECISIONS, f"precision={c.precision!r}; allowed: {', '.join(PRECISIONS)}"),
        (not c.runs_dir, "runs_dir= is empty: give a folder"),
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


def check_svag(c: Config, batch: int) -> None:
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


def check_noise(s: Science) -> None:
    """Refuse a full noise measurement that has no meaning."""
    n, size = s.measure.noise_examples, s.dataset["train_size"]
    if n < 2:
        raise PlanError(f"measure.noise_examples={n} must be >= 2: a covariance needs two gradients")
    unit = noise_unit_of(s.measure, s.model, s.micro_batch)
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
