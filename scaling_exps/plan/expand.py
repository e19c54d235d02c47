"""Config -> RunSpecs: the product of the lists, batch arithmetic, durations -> steps, the rule applied once."""

from __future__ import annotations

import glob
import itertools
import os
from dataclasses import asdict, replace
from typing import Any

from scaling_exps import rules
from scaling_exps.config import Config, Launch, SlurmLaunch
from scaling_exps.plan import checks
from scaling_exps.plan.spec import Arm, Measure, Placement, PlanError, RunSpec, Schedule, Science, run_id, summary
from scaling_exps.rules import Hyper

OWN = ("text", "imagefolder")  # data sets of the user: their place is their identity


def plan(configs: list[Config]) -> list[RunSpec]:
    """Expand the lists of every config, apply the rule, and check the whole sweep.

    Runs that turn out to be the same science are one RunSpec with several arms. Order is kept.

    Raises:
        PlanError: with every fault of every run, one a line.
    """
    runs: dict[str, RunSpec] = {}
    faults = dict.fromkeys(_differing([_whole_list(c) for c in configs]))  # an ordered set: each is told once
    for config in configs:
        batches = config.batch if isinstance(config.batch, list) else [config.batch]
        seeds = config.seed if isinstance(config.seed, list) else [config.seed]
        names = config.rule if isinstance(config.rule, list) else [config.rule]
        ells = config.svag if isinstance(config.svag, list) else [config.svag]
        for key, values in (("batch", batches), ("seed", seeds), ("rule", names), ("svag", ells)):
            if not values:
                faults[f"{key}=[] is empty: give at least one value"] = None
        for batch, rule, ell, seed in itertools.product(batches, names, ells, seeds):
            batch = config.recipe.batch if batch is None else batch
            try:
                spec = plan_one(replace(config, svag=ell), batch, rule, seed)
            except (PlanError, rules.RuleError) as e:
                faults[f"batch={batch} rule={rule}" + (f" svag={ell}" if ell != 1 else "") + f": {e}"] = None
                continue
            known = runs.get(spec.run_id)
            if known is not None:
                faults.update(dict.fromkeys(_differing([_beside_science(known), _beside_science(spec)])))
                arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
                spec = replace(known, arms=arms)
            runs[spec.run_id] = spec
    if faults:
        raise PlanError("\n".join(faults))
    return list(runs.values())


def _whole_list(c: Config) -> dict[str, Any]:
    """What one command takes once, for all of its runs."""
    launch = asdict(c.launch)
    return {"runs_dir": c.runs_dir, "noise": c.noise, "launch": launch.pop("name")} | {
        f"launch.{k}": v for k, v in launch.items()
    }


def _beside_science(s: RunSpec) -> dict[str, Any]:
    """What two askings for the same run may differ in, and one run cannot: it is trained once."""
    return {
        "dataset.path": s.dataset_path,
        "logger": s.logger,
        "checkpoint.minutes": s.placement.checkpoint_minutes,
        "margin": s.margin,
    }


def _differing(asked: list[dict[str, Any]]) -> list[str]:
    """The keys that have several values where one is used, as faults."""
    first = asked[0] if asked else {}
    values = {key: list(dict.fromkeys(str(a[key]) for a in asked if key in a)) for key in first}
    return [
        f"{key}={','.join(several)}: it makes no other run, so that only the first value would count; "
        "give one, or a command for each"
        for key, several in values.items()
        if len(several) > 1
    ]


def plan_one(config: Config, batch: int, rule_name: str, seed: int) -> RunSpec:
    """One run at one batch size, rule and seed; PlanError or RuleError if it cannot be."""
    checks.check(config, batch, seed)
    ell = config.svag
    assert isinstance(ell, int)  # `plan` takes the product
    r, o = config.recipe, config.optimizer
    family: rules.Family = "adaptive" if o.family == "adaptive" else "sgd"
    rule = rules.find(rule_name, family, l2=not o.decoupled and r.weight_decay > 0)
    base = Hyper(r.lr, tuple(r.betas), r.eps, r.weight_decay)
    beta_map: rules.BetaMap = "power" if config.beta_map == "power" else "linear"
    move = rules.Move(r.batch, batch, config.duration, config.noise_scale, beta_map)
    scaled, kappa = rule.scale(base, move), move.kappa

    def science(hyper: Hyper, batch: int, svag: int, duration: float) -> Science:
        hyper, stretch = rules.svag(hyper, svag, family)
        total = r.samples if r.samples is not None else round((r.epochs or 0) * (config.dataset.train_size or 0))
        total = round(total * duration)
        dataset = asdict(config.dataset)
        path = dataset.pop("path")  # where the data lies is not what it is,
        if dataset["name"] in OWN and path is not None:  # unless nothing else says so
            dataset["path"] = os.path.realpath(path)
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
        checks.check_svag(config, batch)
    if config.measure.noise == "full":
        checks.check_noise(mine)
    world = _world_size(config.launch, batch // micro)
    draws = 1 if ell == 1 else 2
    return RunSpec(
        science=mine,
        placement=Placement(
            world, micro, batch // micro // world * draws, config.launch.compile, config.checkpoint.minutes
        ),
        arms=(Arm(rule_name, kappa, summary(base_run, base, 1), run_id(base_run)),),
        dataset_path=config.dataset.path,
        experiment=config.experiment,
        logger=config.logger,
        notes=tuple(_notes(config, rule, base, scaled, batch)),
        margin={k: v for k, v in asdict(config.margin).items() if v is not None},
    )


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
        notes.append(rule.answers("adaptive" if c.optimizer.family == "adaptive" else "sgd"))
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
