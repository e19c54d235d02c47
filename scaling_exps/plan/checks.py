"""What the keys of several groups make wrong together; each group checks itself (`config.schema`)."""

from __future__ import annotations

from scaling_exps.config import GPT, Config, Custom, Roberta, TokenDataset
from scaling_exps.plan.spec import PlanError, RunSpec
from scaling_exps.rules import OPTIMIZERS

RECIPE_KEYS = {"beta1", "beta2", "momentum", "l2", "decoupled_decay"}  # that not every optimizer takes


def faults(config: Config) -> list[str]:
    """Every fault of one command, before its runs are planned."""
    recipe, dataset, optimizer = config.recipe, config.dataset, OPTIMIZERS[config.optimizer]
    wrong = []
    if recipe.epochs is not None and dataset.train_size is None:
        wrong.append(
            "recipe.epochs needs dataset.train_size (examples); or give recipe.epochs=null and recipe.samples=N"
        )
    elif recipe.epochs is not None and dataset.train_size and recipe.epochs * dataset.train_size * config.duration < 1:
        wrong.append(f"recipe.epochs={recipe.epochs}: the duration must be at least one sample")
    taken = {*optimizer.betas, "decoupled_decay" if optimizer.decoupled else "l2"}
    typed = {word.split("=")[0].removeprefix("recipe.") for word in config.words if word.startswith("recipe.")}
    for key in sorted(typed & RECIPE_KEYS - taken):
        wrong.append(
            f"recipe.{key} plays no part in optimizer={config.optimizer}, which takes "
            f"{', '.join(sorted('recipe.' + k for k in taken if k))}"
        )
    return wrong + _token_faults(config)


def _token_faults(config: Config) -> list[str]:
    model, dataset = config.model, config.dataset
    tokens = isinstance(dataset, TokenDataset)
    if not isinstance(model, Custom) and isinstance(model, GPT | Roberta) != tokens:
        reads, has = ("images", "tokens") if tokens else ("tokens", "images")
        return [
            f"model {model.name!r} reads {reads}, and dataset {dataset.name!r} has {has}; networks that read {has}: "
            + ("gpt, roberta" if tokens else "resnet8, resnet20, resnet50, resnet56, vgg16, vit, timm")
        ]
    if not isinstance(dataset, TokenDataset):
        return []
    wrong = []
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


def check_svag(config: Config, batch: int, svag: int) -> None:
    """Refuse SVAG where it is not defined.

    Raises:
        PlanError: too few examples for two draws, a decoupled decay, or SGD with momentum.
    """
    size, recipe, optimizer = config.dataset.train_size, config.recipe, OPTIMIZERS[config.optimizer]
    if size is not None and 2 * batch > size:
        raise PlanError(
            f"svag={svag} draws two independent mini-batches a step, and batch={batch} leaves no second draw in "
            f"{size} training examples; allowed: batch <= {size // 2}, or svag=1"
        )
    if optimizer.decoupled and recipe.decoupled_decay:
        raise PlanError(
            f"svag={svag} with decoupled weight decay {recipe.decoupled_decay:g}: the paper's SVAG does not say "
            "how to scale it; use recipe.decoupled_decay=0, or optimizer=adam (decay inside the gradient)"
        )
    if optimizer.family == "sgd" and recipe.momentum:
        raise PlanError(
            f"svag={svag} with momentum {recipe.momentum}: for SGD it is defined without momentum (lr/l, l times the "
            "steps, momentum unchanged would change the SDE); use recipe.momentum=0"
        )


def check_noise(spec: RunSpec) -> None:
    """Refuse a full noise measurement that has no meaning.

    Raises:
        PlanError: too few examples, or gradients that the micro-batch cannot give.
    """
    s, n, unit = spec.science, spec.noise_examples, spec.noise_unit
    given = f"measure.noise_examples={n}, gradients of {unit} example(s) each"
    low = max(2, n // unit)
    if unit > s.micro_batch:
        raise PlanError(f"measure.noise_unit={unit} must lie between 1 and the micro-batch {s.micro_batch}")
    if s.model.normalises_over_batch and unit != s.micro_batch:
        raise PlanError(
            f"measure.noise_unit={unit}: with batch normalisation a gradient is that of one micro-batch, here "
            f"{s.micro_batch}; leave noise_unit null"
        )
    if n % unit or n // unit < 2:
        raise PlanError(
            f"{given}: a covariance needs a whole number of gradients, at least two; nearest that fit: "
            f"{low * unit} and {(low + 1) * unit}"
        )
    size = s.dataset.train_size
    if size is not None and n > size:
        raise PlanError(f"{given}: only {size} training examples exist")
