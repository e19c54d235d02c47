"""timm's train.py (flags, or the args.yaml that it writes) and Lightning (its CLI, and Hydra's `_target_` style)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import KEYS, Document, Path, dotted, is_number
from scaling_exps.convert.layout import Layout, build, slot_of


def timm(doc: Document) -> Layout:
    """train.py of timm 1.0."""
    name = str(doc.get("opt") or "sgd").lower()
    if doc.get("opt") is None and doc.guessed:
        raise doc.error("no optimizer (opt) is named; if the keys are timm's, whose default is SGD, say --from timm")
    betas = {"betas": "opt_betas=[0.9, 0.99]"} if "lion" in name else {}
    alias = "sgd" if name in ("nesterov", "momentum") else ""
    layout = build(doc, "timm", name=alias, decoupled=None, rows=betas)

    def rate_at(batch: float) -> float:
        """What train.py makes of lr_base where lr is not given: a scaling of its own, by the optimizer's name."""
        base, size = (layout.number(slot_of(doc, text)) for text in ("lr_base=0.1", "lr_base_size=256"))
        how = doc.get("lr_base_scale") or ("sqrt" if "ada" in name else "linear")
        return float(base * ((batch / size) ** 0.5 if how == "sqrt" else batch / size))

    layout.rate_at = rate_at
    if name in ("nadam", "nadamlegacy"):
        layout.notes.append("NAdam's momentum_decay, 0.004 a step, has no key in timm: it stays, and κ times it is due")
    if doc.get("model_ema"):
        layout.law("ema", "model_ema_decay", default=0.9998)
    return layout


def _homes(doc: Document) -> Iterator[tuple[str, str, Path, Path]]:
    """("optimizer" | "scheduler", class, key of the class, where its arguments are) of each that the file builds."""
    for path, value in doc.values.items():
        last, above = path[-1], [str(k) for k in path[-3:-1]]
        if not isinstance(value, str) or "callbacks" in path:
            continue
        if last in ("class_path", "_target_"):
            near = next((k for k in reversed(above) if not k.isdigit()), "")
            args = (*path[:-1], "init_args") if last == "class_path" else path[:-1]
        elif last == 0 and above and doc.has((*path[:-1], 1)):  # a pair: [AdamW, {lr: ...}]
            near, args = above[-1], (*path[:-1], 1)
        else:
            continue
        name = value.rsplit(".", 1)[-1]
        if re.search(r"sched", near, re.I) or re.search(r"(LR|Scheduler|Plateau|WarmRestarts)$", name):
            yield "scheduler", name, path, args
        elif re.search(r"(^|_)optim", near, re.I) or optimizers.bare(value) in optimizers.KNOWN:
            yield "optimizer", name, path, args


_CHOOSERS = {  # callbacks that set what a recipe is made of, along the run or before it
    "GradientAccumulationScheduler": "it changes the accumulation along the run: the batch has no one value",
    "BatchSizeFinder": "it chooses the batch: write out what it found",
    "LearningRateFinder": "it chooses the learning rate: write out what it found",
}


def lightning(doc: Document) -> Layout:
    for path, value in doc.values.items():
        if path[-1] in ("class_path", "_target_") and (why := _CHOOSERS.get(str(value).rsplit(".", 1)[-1])):
            raise doc.error(f"{dotted(path)}={value}: {why}")
    homes = list(_homes(doc))
    built = [home for home in homes if home[0] == "optimizer"]
    if not built:
        raise doc.error(
            "no optimizer is there. Looked for: optimizer.class_path, model.init_args.optimizer.class_path, a pair "
            "[AdamW, {lr: ...}], `_target_: torch.optim....`. If the model builds it in code, use scaling_exps.scale"
        )
    if len(built) > 1:
        names = ", ".join(dotted(home[2]) for home in built)
        raise doc.error(f"it builds {len(built)} optimizers ({names}): one recipe each, please")
    _, name, spot, args = built[0]
    keys, sections = (KEYS["lightning"][k].split() for k in ("batch_keys", "batch_sections"))
    micro, _ = slot_of(doc, "|".join([f"{section}.{key}" for section in sections for key in keys] + keys))
    if doc.get(micro) is None:
        places = f"{', '.join(keys)} in {', '.join(sections)} and the top"
        raise doc.error(f"no batch size is there, and a recipe cannot be scaled without it. Looked for: {places}")
    accumulation = ("trainer", "accumulate_grad_batches")
    if doc.has(accumulation) and accumulation not in doc.values:
        raise doc.error(f"{dotted(accumulation)} changes along the run: the batch has no one value")
    layout = build(doc, "lightning", numbers=args, rows={"optimizer": (spot, None), "micro": (micro, None)})
    for key in ("momentum", "centered"):
        if layout.optimizer == "torch_rmsprop" and doc.get((*args, key)):
            raise doc.error(f"RMSprop with {key}: no rule covers that")
    if optimizers.bare(name) == "nadamw":
        layout.fields["weight_decay"] = ((*args, "weight_decay"), 0.0)
    if optimizers.bare(name) == "nadam":
        layout.law("per_step", (*args, "momentum_decay"), default=4e-3)
    if doc.get((*args, "decoupled_weight_decay")) and layout.optimizer == "adam":
        layout.optimizer = "adamw"
    layout.law("kept", *((*args, key) for key in ("amsgrad", "nesterov", "dampening")))
    schedulers = [home[3] for home in homes if home[0] == "scheduler"]
    for kind, name, spot, where in homes:
        doc.get(spot)
        if kind == "scheduler":
            whole = min((s for s in schedulers if where[: len(s)] == s), key=len)  # the SequentialLR that holds it
            _scheduler(layout, name, where, whole)
    for path, value in doc.values.items():
        last, callback = str(path[-1]), "callbacks" in path
        if callback and re.search(_EVERY, last):
            layout.law("count", path)
        elif (
            isinstance(value, float)
            and 0 < value < 1
            and last in ("ema_decay", "ema_rate", *(["decay"] if callback else []))
        ):
            _average(layout, path)
        elif callback and last in ("class_path", "_target_") and re.search(r"EMA|ExponentialMoving", str(value)):
            _average_by_default(layout, path, str(value))
        elif last == "swa_lrs":
            layout.law("rate", path)
    for key in ("val_check_interval", "limit_train_batches", "overfit_batches"):
        count = doc.get(("trainer", key))
        if is_number(count) and isinstance(count, int) and count > 1:
            layout.law("passes", f"trainer.{key}")
            layout.notes.append(f"trainer.{key} counts micro-batches: it moves only where they or the devices change")
    return layout


_EVERY = "every_n_(train_)?steps|update_every(?!.*epoch)|update_starting_at_step"


def _average(layout: Layout, path: Path, default: float | None = None) -> None:
    """A decay counts updates: those between which steps lie that are moved too are less often, and need less."""
    beside = [p for p in layout.under(*path[:-1]) if len(p) == len(path) and "every" in str(p[-1])]
    if any("epoch" in str(p[-1]) for p in beside):
        return
    steps = [p for p in beside if re.search(_EVERY, str(p[-1])) and is_number(layout.doc.get(p))]
    if steps:
        layout.every[path] = steps[0]
    layout.law("ema", path, default=default)


def _average_by_default(layout: Layout, spot: Path, name: str) -> None:
    args = (*spot[:-1], "init_args") if spot[-1] == "class_path" else spot[:-1]
    if any(layout.doc.has((*args, key)) for key in ("decay", "ema_decay", "ema_rate", "avg_fn", "multi_avg_fn")):
        return
    if name.endswith("EMAWeightAveraging"):
        _average(layout, (*args, "decay"), 0.999)
    else:
        layout.notes.append(f"{dotted(spot)}={name}: the decay of its average is not in the file, and stays")


def _either(path: Path) -> bool:
    return re.fullmatch(KEYS["lightning"]["scheduler"]["either"], str(path[-1])) is not None


def _scheduler(layout: Layout, name: str, args: Path, whole: Path) -> None:
    """The laws of a scheduler's arguments; its counts are of steps or of epochs as all in `whole` are."""
    doc, laws = layout.doc, KEYS["lightning"]["scheduler"]
    others = layout.sweep([p for p in layout.under(*args) if len(p) == len(args) + 1], laws)
    if name == "OneCycleLR":
        layout.notes.append("OneCycleLR sets the learning rate from max_lr at every step: lr is overridden by it")
        if doc.get((*args, "cycle_momentum")) is not False and layout.optimizer in ("adam", "adamw", "sgd"):
            layout.law("beta", (*args, "base_momentum"), default=0.85)
            layout.law("beta", (*args, "max_momentum"), default=0.95)
            layout.notes.append(
                "cycle_momentum (true unless set) overrides beta1, or momentum, between base_momentum and "
                "max_momentum: those two are moved as beta1 is; cycle_momentum: false leaves beta1 to the optimizer"
            )
    if name == "CyclicLR":
        raise doc.error("CyclicLR counts calls, and how often it is called the file does not say")
    if name == "ExponentialLR":
        layout.notes.append("ExponentialLR.gamma stays: it is applied once an epoch; once a step it would need gamma^κ")
    epochs, steps = (doc.get(("trainer", key)) or 0 for key in ("max_epochs", "max_steps"))
    counts = [layout.number((path, 0), many=True) for path in layout.under(*whole) if _either(path)]
    largest = max((n for c in counts for n in (c if isinstance(c, list) else [c])), default=0)
    if isinstance(epochs, int) and epochs > 0:
        per_step = largest > 2 * epochs
    else:
        per_step = isinstance(steps, int) and 0 < steps < 20 * largest
    for path in others:
        if not _either(path) or (value := doc.get(path)) is None:
            continue
        layout.law("count" if per_step else "samples", path)
        how = "is read as epochs, as Lightning's CLI steps: where yours steps with the optimizer, divide it by κ"
        if per_step:
            how = "is read as optimizer steps: the schedule is longer than the run has epochs"
        layout.notes.append(f"{dotted(path)}={value} {how}")
