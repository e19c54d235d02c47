"""What the keys of several groups make wrong together; each group checks itself (`config.schema`)."""

from __future__ import annotations

from scaling_exps import rules
from scaling_exps.config import GPT, Config, Custom, Roberta, TokenDataset
from scaling_exps.plan.spec import PlanError, RunSpec
from scaling_exps.rules import OPTIMIZERS

RECIPE_KEYS = {"beta1", "beta2", "momentum", "l2", "decoupled_decay"}  # that not every optimizer takes


def samples(config: Config, duration: float) -> int:
    """Samples of a run of `duration` times the recipe's length.

    Raises:
        PlanError: the command has no number of samples, or none is left.
    """
    recipe, size = config.recipe, config.dataset.train_size
    if recipe.epochs is not None and size is None:
        raise PlanError("recipe.epochs needs dataset.train_size; or give recipe.epochs=null recipe.samples=N")
    base = recipe.samples if recipe.epochs is None else round(recipe.epochs * (size or 0))
    total = round((base or 0) * duration)
    if total < 1:
        raise PlanError(
            f"recipe.epochs={recipe.epochs} recipe.samples={recipe.samples} duration={duration:g} is no sample: a run "
            "needs one; give a longer duration"
        )
    if recipe.stop_after is not None and recipe.stop_after > total:
        raise PlanError(f"recipe.stop_after={recipe.stop_after} lies beyond the end of the schedule, {total} samples")
    return total


def faults(config: Config) -> list[str]:
    """What the groups of one command make wrong together."""
    optimizer = OPTIMIZERS[config.optimizer]
    lists = {"batch": config.batch, "rule": config.rule, "svag": config.svag, "seed": config.seed}
    wrong = [f"{key}=[] is empty: give at least one value" for key, value in lists.items() if value == []]
    taken = {*optimizer.betas, "decoupled_decay" if optimizer.decoupled else "l2"}
    typed = {word.split("=")[0] for word in config.words}
    takes = ", ".join(sorted(f"recipe.{k}" for k in taken if k))
    for key in sorted(typed & {f"recipe.{k}" for k in RECIPE_KEYS - taken}):
        wrong.append(f"{key} plays no part in optimizer={config.optimizer}, which takes {takes}")
    recipe = config.recipe
    if recipe.decay != "milestones":
        for key in sorted(typed & {"recipe.milestones_fraction", "recipe.gamma"}):
            wrong.append(
                f"{key} plays no part with recipe.decay={recipe.decay}: drop it, or use recipe.decay=milestones"
            )
    if recipe.warmup_fraction == 0:
        for key in sorted(typed & {"recipe.warmup", "recipe.warmup_from"}):
            wrong.append(f"{key} plays no part with recipe.warmup_fraction=0: drop it, or give a warm-up")
    if config.recipe.stop_after is not None and config.duration != 1:
        wrong.append(f"recipe.stop_after ends the schedule early, duration={config.duration:g} moves its end: give one")
    if config.recipe.clip is not None and optimizer.family == "invariant":
        wrong.append(
            f"recipe.clip with optimizer={optimizer.name}: its v hears gradients before they are clipped; use null"
        )
    if config.launch.shard:
        why = "launch.shard=true cuts the weights over the devices, where"
        if config.model.normalises_over_batch:
            wrong.append(f"{why} batch normalisation is not covered: use model.norm=group, or launch.shard=false")
        if optimizer.family == "invariant":
            wrong.append(f"{why} optimizer={optimizer.name} is not covered: use adamw, or launch.shard=false")
        if config.measure.noise in ("free", "full"):
            wrong.append(f"{why} measure.noise={config.measure.noise} is not covered: use auto or none")
    for name in config.tested or []:
        try:
            rules.find(name, optimizer.family)
        except rules.RuleError as e:
            wrong.append(f"tested: {e}")
    model, dataset = config.model, config.dataset
    language, tokens = isinstance(model, GPT | Roberta), isinstance(dataset, TokenDataset)
    if language and config.recipe.freeze_last:
        wrong.append(f"recipe.freeze_last=true: model {model.name} has no last layer of its own; use false")
    if not isinstance(model, Custom) and language != tokens:
        reads, has = ("tokens", "images") if language else ("images", "tokens")
        wrong.append(
            f"model {model.name} reads {reads}, and dataset {dataset.name} has {has}; networks for {has}: "
            + ("gpt, roberta" if tokens else "resnet8, resnet20, resnet50, resnet56, vgg16, vit, timm")
        )
    metric, has = ("test_accuracy", "tokens") if tokens else ("perplexity", "images")
    if getattr(config.margin, metric) is not None:
        wrong.append(
            f"margin.{metric}: no {metric.replace('_', ' ')} is measured of {dataset.name}, which has {has}, so no run "
            f"could be judged by it; use margin.{metric}=null, and another: margin.test_loss"
        )
    if not isinstance(dataset, TokenDataset):
        return wrong
    if isinstance(model, GPT | Roberta) and model.context is not None and dataset.context > model.context:
        wrong.append(
            f"dataset.context={dataset.context}: sequences are longer than the model's model.context={model.context} "
            "positions; lower the one or raise the other"
        )
    if isinstance(model, Roberta) and dataset.mask == 0:
        wrong.append("model roberta sees both sides of a token: give dataset.mask, for example 0.15")
    if isinstance(model, GPT) and dataset.mask > 0:
        wrong.append(f"model gpt predicts the next token and hides none: use dataset.mask=0, not {dataset.mask}")
    return wrong


def svag(config: Config, batch: int, svag: int) -> list[str]:
    """Where SVAG is not defined: too few examples for two draws, a decoupled decay, SGD with momentum."""
    size, recipe, optimizer = config.dataset.train_size, config.recipe, OPTIMIZERS[config.optimizer]
    if svag == 1:
        return []
    wrong = []
    if size is not None and 2 * batch > size:
        wrong.append(
            f"svag={svag} draws two independent mini-batches a step, and batch={batch} leaves no second draw in "
            f"{size} training examples; allowed: batch <= {size // 2}, or svag=1"
        )
    if recipe.clip is not None:
        wrong.append(f"svag={svag}: SVAG is not defined for clipped gradients; use recipe.clip=null, or svag=1")
    if optimizer.family == "invariant":
        wrong.append(
            f"svag={svag}: SVAG is not defined for {optimizer.name}, whose v knows each micro-batch; use svag=1"
        )
    elif optimizer.decoupled and recipe.decoupled_decay:
        wrong.append(
            f"svag={svag} with decoupled weight decay {recipe.decoupled_decay:g}: the paper's SVAG does not say "
            "how to scale it; use recipe.decoupled_decay=0, or optimizer=adam (decay inside the gradient)"
        )
    if optimizer.family == "sgd" and recipe.momentum:
        wrong.append(
            f"svag={svag} with momentum {recipe.momentum}: for SGD it is defined without momentum (lr/l, l times the "
            "steps, momentum unchanged would change the SDE); use recipe.momentum=0"
        )
    return wrong


def check_noise(spec: RunSpec) -> None:
    """Refuse a full noise measurement that has no meaning.

    Raises:
        PlanError: too few examples, or gradients that the micro-batch cannot give.
    """
    s, n, unit = spec.science, spec.noise_examples, spec.noise_unit
    given = f"measure.noise_examples={n}, gradients of {unit} example(s) each"
    if unit > s.micro_batch:
        raise PlanError(f"measure.noise_unit={unit} must lie between 1 and the micro-batch {s.micro_batch}")
    if s.model.normalises_over_batch and unit != s.micro_batch:
        raise PlanError(
            f"measure.noise_unit={unit}: with batch normalisation a gradient is that of one micro-batch, here "
            f"{s.micro_batch}; leave noise_unit null"
        )
    if n % unit or n // unit < 2:
        low = max(2, n // unit)
        raise PlanError(
            f"{given}: a covariance needs a whole number of gradients, at least two; nearest that fit: "
            f"{low * unit} and {(low + 1) * unit}"
        )
    if s.dataset.train_size is not None and n > s.dataset.train_size:
        raise PlanError(f"{given}: only {s.dataset.train_size} training examples exist")
