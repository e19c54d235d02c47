"""Config -> RunSpecs: the product of the lists, batch arithmetic, durations -> steps, the rule applied once."""

from __future__ import annotations

import functools
import glob
import itertools
import math
import os
import platform
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from scaling_exps import config as schema
from scaling_exps import rules, sources
from scaling_exps.config import Config, Dataset, FileDataset, Group, LocalLaunch, SlurmLaunch, TokenDataset
from scaling_exps.plan import checks, ramp
from scaling_exps.plan.spec import Arm, Placement, PlanError, Role, RunSpec, Schedule, Science, Stage, processes, run_id
from scaling_exps.rules import OPTIMIZERS, Hyper, Move, Rule

MOST_BATCH = 2**24  # of the schema
MOST_STEPS = 10**9  # of a run; more is a slip of the finger
UNNAMED_GPU = "GPU"  # one whose driver does not say here what it is
CPU = Path("/proc/cpuinfo")
ROUNDING = 0.01  # share of the samples that rounding to whole steps may change without a word


@dataclass(frozen=True)
class Ramped:
    """In the place of a constant batch: the config's ramp, whose shares of a batch are of this one."""

    largest: int


def plan(configs: list[Config]) -> list[RunSpec]:
    """Expand the lists of every config, apply the rule, and check the whole sweep.

    Runs that turn out to be the same science are one RunSpec with several arms. Order is kept.

    Raises:
        PlanError: with every fault of every run, one a line.
    """
    runs: dict[str, RunSpec] = {}
    one = ("runs_dir", "noise_from", "launch", "cost", "base")  # settings of the command
    faults = _differing([{key: getattr(c, key) for key in one} for c in configs])
    places_of: dict[str, dict[str, None]] = {}  # what is wrong with runs, and with which
    for config in configs:
        values = [getattr(config, key) for key in ("batch", "rule", "svag", "seed")]
        lists = [v if isinstance(v, list) else [v] for v in values]
        held = ""
        try:
            config, held = _counted(config)
        except sources.DataError as e:
            faults.append(str(e))
        faults += checks.faults(config)
        try:
            for duration in (1.0, config.duration):
                checks.samples(config, duration)
            sources.weights(config.recipe.start_from)
            _precision(config)
        except (PlanError, sources.DataError) as e:
            faults.append(str(e))
            continue
        batches: list[int | Ramped] = [b or config.recipe.batch for b in lists[0]]
        if config.ramp.at is not None:  # beside the constant batches that were asked for
            ramped = Ramped(max(b for b in batches if isinstance(b, int)))
            batches = [ramped] if config.batch is None else [*batches, ramped]
        for batch, rule, ell, seed in itertools.product(batches, *lists[1:]):
            try:
                spec = _one(config, held, batch, rule, ell, seed)
            except (PlanError, rules.RuleError) as e:
                where = ("ramp" if isinstance(batch, Ramped) else f"batch={batch}") + (f" rule={rule}" if rule else "")
                where += f" svag={ell}" if ell != 1 else ""
                for line in str(e).splitlines():
                    if line.startswith(("batch=", "svag=", "ramp")):  # it says where itself
                        faults.append(line)
                    else:
                        places_of.setdefault(line, {})[where] = None
                continue
            known = runs.setdefault(spec.run_id, spec)
            # settings that are no part of the run id, and of which a run has one
            beside = ("logger", "margin", "looks", "wandb", "measure", "checkpoint")
            places = {"dataset.path": "dataset_path", "recipe.start_from": "start_from"} | {k: k for k in beside}
            faults += _differing([{key: getattr(s, k) for key, k in places.items()} for s in (known, spec)])
            arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
            runs[spec.run_id] = msgspec.structs.replace(known, arms=arms)
    for fault, (first, *others) in places_of.items():
        faults.append(f"{first}{f' and {len(others)} more' if others else ''}: {fault}")
    if faults:
        raise PlanError("\n".join(dict.fromkeys(faults)))
    return list(runs.values())


def base_runs(configs: list[Config]) -> list[RunSpec]:
    """The base runs of every recipe of a command: of its seeds, with an arm for each of its rules.

    Raises:
        PlanError: a base run cannot be planned.
    """
    runs: dict[str, RunSpec] = {}
    for config in configs:
        launch, micro_batches = config.launch, config.recipe.batch // _micro_batch(config, config.recipe.batch)
        if launch.devices != "auto":  # the base batch may have fewer micro-batches than the devices asked for
            launch = msgspec.structs.replace(launch, devices=processes(micro_batches, launch.devices))
        constant = msgspec.structs.replace(config.ramp, at=None)
        base = msgspec.structs.replace(
            config, batch=config.recipe.batch, ramp=constant, svag=1, duration=1.0, launch=launch
        )
        for spec in plan([base]):
            known = runs.setdefault(spec.run_id, spec)
            arms = known.arms + tuple(a for a in spec.arms if a not in known.arms)
            runs[spec.run_id] = msgspec.structs.replace(known, arms=arms)
    return list(runs.values())


def lacking(configs: list[Config], specs: list[RunSpec]) -> list[RunSpec]:
    """The base runs that a sweep's runs are compared with and that are not in it; none of a single run and its seeds.

    Args:
        configs: the command; `base=none` asks for none.
        specs: what `plan` made of it.

    Raises:
        PlanError: such a run cannot be planned.
    """
    if not configs or configs[0].base == "none":
        return []
    settings: dict[str, set[str]] = {}  # of the runs that share a base, whatever their seeds
    base_of: dict[str, str] = {}
    for spec in specs:
        recipe = repr((spec.science.model, spec.science.dataset, spec.science.optimizer, spec.arms[0].base))
        settings.setdefault(recipe, set()).add(repr(msgspec.structs.replace(spec.science, seed=0)))
        base_of |= {arm.base_run_id: recipe for arm in spec.arms}
    wanted = {i for i, recipe in base_of.items() if len(settings[recipe]) > 1} - {s.run_id for s in specs}
    try:
        return [spec for spec in base_runs(configs) if spec.run_id in wanted] if wanted else []
    except PlanError as e:
        raise PlanError(f"{e}\nthis is the base run that base=auto adds to the sweep; base=none leaves it out") from e


def _differing(asked: list[dict[str, Any]]) -> list[str]:
    """The keys that have several values where one is used, as faults; groups of one kind are compared key by key."""
    wrong = []
    for key in asked[0] if asked else ():
        given = [a[key] for a in asked]
        if isinstance(given[0], Group) and len({type(g) for g in given}) == 1:
            wrong += _differing([{f"{key}.{k}": v for k, v in msgspec.structs.asdict(g).items()} for g in given])
            continue
        shown = dict.fromkeys(str(g.__struct_config__.tag if isinstance(g, Group) else g) for g in given)
        if len(shown) > 1:
            wrong.append(f"{key}={','.join(shown)}: it does not change the run, so it cannot be swept; give one value")
    return wrong


def _one(config: Config, held: str, given: int | Ramped, rule_name: str | None, svag: int, seed: int) -> RunSpec:
    """One run at one batch size (or its ramp), rule, ell and seed; `held` is the fingerprint of the data.

    Raises:
        PlanError: it cannot be; with every fault, one a line.
    """
    recipe, optimizer = config.recipe, OPTIMIZERS[config.optimizer]
    base = base_hyper(config)
    rule = _rule(config, rule_name)
    total = checks.samples(config, config.duration)
    stages: ramp.Stages
    if isinstance(given, int):
        stages = [(0, given, None)]
    else:
        stages = ramp.stages(config, given.largest, _schedule(config, total), batch_limit(config))
    wrong = checks.svag(config, stages[0][1], svag)
    if svag > 1 and len(stages) > 1:
        wrong.append(f"svag={svag} with ramp={config.ramp.at}: SVAG is defined for one batch; use svag=1, or no ramp")
    smallest = min(batch for _, batch, _ in stages)
    built: list[Stage] = []
    step = seen = 0
    for i, (start, batch, noise_scale) in enumerate(stages):
        where = f"ramp, stage {i + 1} (batch {batch:,}): " if len(stages) > 1 else ""
        micro = _micro_batch(config, smallest if config.model.normalises_over_batch else batch)
        try:
            if faults := _placement_faults(config, batch, micro, grows=config.launch.elastic and i + 1 < len(stages)):
                raise PlanError("\n".join(faults))
            move = Move(recipe.batch, batch, config.duration, config.noise_scale, config.beta_map)
            hyper = rule.scale(base, move)
        except (PlanError, rules.RuleError) as e:
            wrong += [where + line for line in str(e).splitlines()]
            continue
        if built:
            taken = round((start - seen) / built[-1].batch)
            if taken < 1:
                wrong.append(f"{where}the stage before it has no whole step of {built[-1].batch}: let it start later")
            step, seen = step + taken, seen + taken * built[-1].batch
        clip = recipe.clip if recipe.clip is None or config.clip == "keep" else rule.clip(recipe.clip, move.kappa)
        ema = None if recipe.ema is None else rule.ema(recipe.ema, move.kappa)
        scale = (noise_scale or config.noise_scale) if i and rule.carries else None
        carries = not i or rule.carries
        built.append(Stage(step, batch, micro, hyper, clip, ema, scale, carries))
    end = recipe.stop_after or total
    if stages[-1][0] >= end:
        wrong.append(f"ramp: its last stage starts at {stages[-1][0]:,} samples, and the run ends at {end:,}")
    if wrong:
        raise PlanError("\n".join(wrong))
    science = _science(config, held, built, step + max(1, round((end - seen) / batch)), svag, config.duration, seed)
    own = Stage(0, recipe.batch, _micro_batch(config, recipe.batch), base, recipe.clip, recipe.ema)
    base_steps = max(1, round((recipe.stop_after or checks.samples(config, 1.0)) / recipe.batch))
    base_science = _science(config, held, [own], base_steps, 1, 1.0, seed)
    if science.steps > MOST_STEPS:
        raise PlanError(
            f"{science.steps:,} steps are more than any run is meant to have ({MOST_STEPS:,}): give a shorter "
            "duration (recipe.epochs, recipe.samples, duration), a larger batch, or a smaller svag"
        )
    most = _most_processes(config.launch)
    world = processes(science.shares(0), most)
    accumulation = built[0].batch // built[0].micro_batch // world * science.draws
    grows = config.launch.elastic and science.ramp and processes(science.shares(science.steps), most) > world
    base_id, goal = run_id(base_science), rule.goals[optimizer.family]
    tested = rule.name in config.tested if config.tested is not None else goal != "control"
    far = max(built, key=lambda x: abs(math.log(x.batch / recipe.batch)))
    move = Move(recipe.batch, far.batch)
    tested |= svag > 1 and move.kappa == 1  # SVAG at the base batch tests the SDE, whatever the rule
    role: Role = "base" if run_id(science) == base_id else "rule" if tested else "control"
    arm = Arm(
        rule=rule.name, goal=goal, role=role, kappa=move.kappa, duration=config.duration, base=base_science.numbers(),
        base_run_id=base_id, beta_map="linear" if move.kappa == 1 else config.beta_map,
    )  # fmt: skip
    placement = Placement(
        world_size=world,
        accumulation=accumulation,
        compile=config.launch.compile is True,  # auto is decided by `cost.compiled`
        shard=config.launch.shard,
        most=most if grows else None,
    )
    spec = RunSpec(
        science=science,
        measure=config.measure,
        placement=placement,
        arms=(arm,),
        dataset_path=config.dataset.path,
        start_from=recipe.start_from,
        experiment=config.experiment,
        logger=config.logger if isinstance(config.logger, str) else tuple(config.logger),
        wandb=config.wandb,
        checkpoint=config.checkpoint,
        notes=tuple(_notes(config, rule, move, base, science, far.hyper)),
        margin=config.margin.numbers(),
        looks=tuple(config.looks or ()),
    )
    if spec.noise == "full":
        checks.check_noise(spec)
    return spec


def batch_limit(config: Config) -> float:
    """The largest batch, in doublings of the recipe's, that each of the command's rules and `ramp.largest` allow.

    Raises:
        PlanError, rules.RuleError: no numbers for the optimizer, an unknown rule.
    """
    base, limit = base_hyper(config), config.ramp.largest or MOST_BATCH
    for rule in (_rule(config, name) for name in (config.rule if isinstance(config.rule, list) else [config.rule])):
        batch = config.recipe.batch
        while 2 * batch <= limit:
            move = Move(config.recipe.batch, 2 * batch, config.duration, config.noise_scale, config.beta_map)
            try:
                rule.scale(base, move)
            except rules.RuleError:
                limit = batch
            batch *= 2
    return limit


def _rule(config: Config, name: str | None) -> Rule:
    optimizer = OPTIMIZERS[config.optimizer]
    l2 = not optimizer.decoupled and base_hyper(config).weight_decay > 0
    return rules.find(name or optimizer.default(config.goal), optimizer.family, l2=l2)


def base_hyper(config: Config) -> Hyper:
    """The recipe's numbers for the optimizer; a PlanError if it has none."""
    recipe, optimizer = config.recipe, OPTIMIZERS[config.optimizer]
    values = [0.0 if name is None else getattr(recipe, name) for name in optimizer.betas]
    lacking = [f"recipe.{n}" for n, v in zip(optimizer.betas, values, strict=True) if v is None]
    if config.optimizer not in recipe.optimizers or lacking:
        raise PlanError(
            f"no reference point for optimizer={config.optimizer} with model={config.model.name} on "
            f"dataset={config.dataset.name}: the recipe is for {', '.join(recipe.optimizers)}. Choose one of these, or "
            f"another model; recipes for {config.optimizer}: {', '.join(schema.recipes_for(config.optimizer))}. "
            "Or give numbers of your own: recipe=NAME --config-dir DIR"
            + (f" (with {', '.join(lacking)})" if lacking else "")
        )
    decay = recipe.decoupled_decay if optimizer.decoupled else recipe.l2
    return Hyper(recipe.lr, tuple(values), recipe.eps, decay)


def _schedule(config: Config, total: int) -> Schedule:
    recipe = config.recipe
    return Schedule(
        total_samples=total, warmup_samples=recipe.warmup_fraction * total, warmup=recipe.warmup,
        warmup_from=recipe.warmup_from, decay=recipe.decay,
        milestones=tuple(m * total for m in recipe.milestones_fraction), gamma=recipe.gamma,
    )  # fmt: skip


def _science(
    config: Config, held: str, stages: list[Stage], steps: int, svag: int, duration: float, seed: int
) -> Science:
    recipe, (first, *later) = config.recipe, stages
    hyper, stretch = rules.svag(first.hyper, svag, OPTIMIZERS[config.optimizer].family)
    return Science(
        model=config.model,
        dataset=msgspec.structs.replace(config.dataset, path=None),
        content=held,
        optimizer=config.optimizer,
        hyper=hyper,
        schedule=_schedule(config, checks.samples(config, duration)),
        svag=svag,
        batch=first.batch,
        micro_batch=first.micro_batch,
        steps=steps * stretch,
        precision=_precision(config),
        freeze_last=recipe.freeze_last,
        statistics_samples=recipe.statistics_samples,
        seed=seed,
        clip=first.clip,
        ema=None if first.ema is None else first.ema ** (1 / stretch),
        start=sources.weights(recipe.start_from),
        ramp=tuple(later),
    )


def _counted(config: Config) -> tuple[Config, str]:
    """The command with what an image folder says of its own size, and the fingerprint of the data.

    Raises:
        DataError: it is not there, not readable, or not what the command says of it.
    """
    dataset, recipe = config.dataset, config.recipe
    if not isinstance(dataset, FileDataset) or dataset.name != "imagefolder":
        return config, content(dataset, dataset.path)
    folder = sources.image_folder(dataset.path)
    given = {"classes": dataset.classes or folder.classes, "train_size": dataset.train_size or 0}
    given["test_size"] = dataset.test_size or 0
    there = {"classes": folder.classes, "train_size": folder.train, "test_size": folder.test}
    if wrong := [f"dataset.{k}={v}" for k, v in given.items() if v > there[k] or (k == "classes" and v != there[k])]:
        has = ", ".join(f"{k}={v}" for k, v in there.items())
        raise sources.DataError(f"{', '.join(wrong)}: the folder has {has}; drop what is wrong and it is counted")
    if recipe.epochs is not None and dataset.train_size is None:
        recipe = msgspec.structs.replace(recipe, epochs=None, samples=round(recipe.epochs * folder.train))
    dataset = msgspec.structs.replace(dataset, classes=folder.classes)
    return msgspec.structs.replace(config, dataset=dataset, recipe=recipe), folder.content


def content(dataset: Dataset, path: str | None) -> str:
    """Fingerprint of the data at `path`, see `sources.fingerprint`."""
    words = (dataset.tokenizer, dataset.tokenizer_revision) if isinstance(dataset, TokenDataset) else (None, None)
    return sources.fingerprint(dataset.name, path, *words)


def _micro_batch(config: Config, batch: int) -> int:
    """What one backward pass takes. Where v knows the micro-batch it is the base's, whatever the batch."""
    invariant = OPTIMIZERS[config.optimizer].family == "invariant"
    return min(config.recipe.micro_batch, config.recipe.batch if invariant else batch)


def _placement_faults(config: Config, batch: int, micro: int, grows: bool) -> list[str]:
    """Why the batch cannot be cut into micro-batches, or these be shared out (later stages may take more devices)."""
    devices = config.launch.devices
    if isinstance(config.launch, LocalLaunch) and devices != "auto" and 0 < (gpus := _gpus()) < devices:
        return [f"launch.devices={devices}, and this machine shows {gpus} GPU(s); allowed: 1 to {gpus}, auto"]
    if batch % micro:
        low = batch // micro * micro
        near = " and ".join(str(b) for b in (low, low + micro) if b)
        why = " (the network normalises over the micro-batch, so it is part of the recipe)"
        return [
            f"batch={batch} is no multiple of the micro-batch {micro}; nearest that fit: {near}"
            + (why if config.model.normalises_over_batch else "")
        ]
    if devices != "auto" and not grows and batch // micro % devices:
        fit = [d for d in range(1, batch // micro + 1) if batch // micro % d == 0][:12]
        return [
            f"launch.devices={devices} does not divide the {batch // micro} micro-batches of a step; allowed: "
            + ", ".join(map(str, fit))
        ]
    return []


def _most_processes(launch: LocalLaunch | SlurmLaunch) -> int:
    """Processes of a run, where its micro-batches can be shared out among them."""
    if launch.devices != "auto":
        return launch.devices
    # under SLURM the machine that submits is not the one that runs
    return launch.max_devices if isinstance(launch, SlurmLaunch) else max(1, _gpus())


@functools.cache
def _gpus() -> int:
    """GPUs that a worker will see, without importing torch: none where torch is a build for CPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = glob.glob("/dev/nvidia[0-9]*")
    if visible is not None:  # CUDA hides all from the first that is empty or negative
        devices = list(itertools.takewhile(lambda v: v.strip() and not v.strip().startswith("-"), visible.split(",")))
    torch = find_spec("torch") if devices else None
    if torch is None or torch.origin is None:
        return 0
    version = Path(torch.origin).with_name("version.py").read_text()
    return 0 if re.search(r"^cuda\b.*= None$", version, re.MULTILINE) else len(devices)


def device() -> str:
    """What workers on this machine will report as their device, without importing torch."""
    if not _gpus():
        return platform.processor() or platform.machine()
    told = [Path(p).read_text() for p in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information"))]
    models = [m[1].strip() for text in told if (m := re.search(r"^Model:(.*)$", text, re.MULTILINE))]
    return models[0] if models else UNNAMED_GPU


def _precision(config: Config) -> Literal["float32", "bfloat16"]:
    """Raises PlanError where this machine cannot tell."""
    if config.precision != "auto":
        return config.precision
    if isinstance(config.launch, SlurmLaunch) or _gpus():
        where = "the jobs run on others" if isinstance(config.launch, SlurmLaunch) else "and the run is on its GPU"
        raise PlanError(f"precision=auto looks at this machine's CPU, {where}: give float32 or bfloat16")
    return "bfloat16" if _bfloat16() else "float32"


def _bfloat16() -> str:
    """What Linux calls the CPU's instructions for it; empty where it has none."""
    flags = CPU.read_text().split() if CPU.exists() else []
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), "")


def threads(processes: int) -> str:
    """What OMP_NUM_THREADS says, or the share of this machine's cores that each of so many processes gets."""
    return os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _notes(config: Config, rule: Rule, move: Move, base: Hyper, science: Science, scaled: Hyper) -> list[str]:
    recipe, optimizer, kappa = config.recipe, OPTIMIZERS[config.optimizer], move.kappa
    batch_norm, notes = config.model.normalises_over_batch, []
    if kappa != 1:
        notes.append(rule.answers(optimizer.family))
        notes.append(f"rule {rule.name} leaves alone: {rule.leaves_alone}")
        if optimizer.decoupled and base.weight_decay and not rule.decoupled:
            shrink = scaled.lr * scaled.weight_decay / (base.lr * base.weight_decay)  # of a step
            notes.append(
                f"decoupled weight decay {base.weight_decay:g} is not covered by rule {rule.name}: per sample it now "
                f"shrinks weights by {shrink / kappa:.3g} times what the base does"
            )
    if config.precision == "auto":
        notes.append(
            f"precision=auto: {science.precision}, this CPU has {_bfloat16() or 'no instructions for bfloat16'}"
        )
    if recipe.clip is not None and kappa != 1 and (moved := rule.clip(recipe.clip, kappa)) != recipe.clip:
        kept = f"recipe.clip={recipe.clip:g} is kept: {rules.CLIP_KEPT.format(moved)}; clip=rule sets it"
        notes.append(kept if config.clip == "keep" else f"clip=rule moves the threshold, too: c/√κ = {moved:.4g}")
    if recipe.stop_after is not None:
        notes.append(f"ends after {recipe.stop_after:,} of its schedule's {science.schedule.total_samples:,} samples")
    total, trained = recipe.stop_after or science.schedule.total_samples, science.clock(science.steps)
    if abs(trained / total - 1) > ROUNDING:
        notes.append(
            f"whole steps of {science.batches} make {trained:,.0f} samples of the {total:,} asked for "
            f"({trained / total - 1:+.0%}): give a duration that is a multiple of the batch"
        )
    if science.batch < recipe.micro_batch:
        seen = " and the network normalises over fewer examples than the recipe's" if batch_norm else ""
        notes.append(
            f"batch {science.batch} is below the recipe's micro-batch {recipe.micro_batch}: it runs as one "
            f"micro-batch{seen}"
        )
    if batch_norm:
        notes.append(f"normalisation batch: {science.micro_batch} examples (the micro-batch), whatever the batch")
    if config.duration != 1 and not rule.moves_duration:
        notes.append(
            f"duration={config.duration:g} is not covered by rule {rule.name}; completed and adamw_timescale do"
        )
    if config.beta_map == "power" and scaled.betas != base.betas:
        notes.append("beta_map=power: β -> β^κ in place of 1 - κ·(1 - β)")
    if config.launch.shard:
        notes.append("launch.shard=true on several devices: the gradient noise is not measured")
    smallest = min((b for b in base.betas if b > 0), default=1.0)
    low = 1 - kappa * (1 - smallest)
    if kappa > 1 and smallest < 1 and low < 0.8 and round(low, 15) in scaled.betas:
        limit = 1 / (1 - smallest)
        notes.append(f"smallest scaled beta is {low:.3g}: the rule is near its limit kappa < {limit:.4g}")
    return notes
