"""timm's train.py (flags, or the args.yaml that it writes) and Lightning (its CLI, and Hydra's `_target_` style)."""

from __future__ import annotations

import re
from typing import Any

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, Path, dotted, words
from scaling_exps.convert.layout import Layout, Slot, at, one_of, spread
from scaling_exps.rules import OPTIMIZERS, RuleError

# --- timm 1.0 ---

_TIMM = {"nesterov": "sgd", "momentum": "sgd"}


def timm(doc: Document) -> Layout:
    name = doc.get("opt")
    row, note = optimizers.find(
        _TIMM.get(str(name).lower(), name or "sgd"), "opt", decoupled=None, also=("muon", "adagrad")
    )
    if name is None and doc.guessed:
        raise RuleError(
            f"{doc.where} names no optimizer (opt); its keys look like timm's, whose default is SGD: say --from timm "
            "if so"
        )
    if doc.has("opt_kwargs") and doc.get("opt_kwargs"):
        raise RuleError(
            f"{doc.where}: opt_kwargs={doc.get(('opt_kwargs',))} may set the optimizer's numbers: write them as flags"
        )
    if doc.get("update_freq") is not None:
        raise RuleError(f"{doc.where}: update_freq is a fork's accumulation; which of the two counts is not known")
    fields: dict[str, Slot] = {"lr": at("lr"), "weight_decay": at("weight_decay", 2e-5)}
    defaults = {"adam": [0.9, 0.999], "adamw": [0.9, 0.999], "lion": [0.9, 0.99]}
    if row == "sgd":
        fields["momentum"] = at("momentum", 0.9)
    elif row == "torch_rmsprop":
        raise RuleError(f"{doc.where}: opt={name}: timm gives RMSprop a momentum; no rule covers that")
    else:
        fields["betas"] = at("opt_betas", defaults[row])
        if row != "lion":
            fields["eps"] = at("opt_eps", 1e-8)
        doc.get("momentum")

    def rate_at(batch: float) -> float:
        """What train.py makes of lr_base where lr is not given: a scaling of its own, by the optimizer's name."""
        base, size = layout.number(at("lr_base", 0.1)), layout.number(at("lr_base_size", 256))
        how = doc.get("lr_base_scale") or ("sqrt" if "ada" in str(name or "sgd").lower() else "linear")
        return float(base * ((batch / size) ** 0.5 if how == "sqrt" else batch / size))

    layout = Layout(
        doc, "timm", row, fields, micro=at("batch_size"), accumulation=at("grad_accum_steps", 1),
        epochs=at("epochs"), clip=at("clip_grad"), rate_at=rate_at, harmless=words("harmless", "timm"),
        notes=[note] if note else [],
    )  # fmt: skip
    layout.law("rate", "warmup_lr", default=1e-5)
    layout.law("rate", "min_lr")
    layout.law("samples", "warmup_epochs", "decay_epochs", "cooldown_epochs", "patience_epochs")
    if doc.get("model_ema"):
        layout.law("ema", "model_ema_decay", default=0.9998)
        if doc.get("model_ema_warmup"):
            layout.notes.append("model_ema_warmup: the decay's own warm-up counts updates in train.py; it is not moved")
    for key in ("lr_base", "lr_base_size", "lr_base_scale", "model_ema_decay", "opt"):
        doc.get(key)
    spread(layout)
    return layout


# --- Lightning ---

TORCH: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
    "torch_rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0},
    "muon": {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1},
    "lion": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0},
}
_RATES = (
    "max_lr",
    "min_lr",
    "eta_min",
    "base_lr",
    "warmup_start_lr",
    "start_lr",
    "end_lr",
    "warmup_lr",
    "init_lr",
    "final_lr",
)
_STEPS = (
    "total_steps",
    "steps_per_epoch",
    "warmup_steps",
    "num_warmup_steps",
    "num_training_steps",
    "max_steps",
    "step_size_up",
    "step_size_down",
    "training_steps",
    "num_steps",
)
_EITHER = ("T_max", "T_0", "step_size", "milestones", "total_iters", "max_iters", "warmup_iters")
_RELATIVE = (
    "gamma",
    "factor",
    "power",
    "T_mult",
    "pct_start",
    "div_factor",
    "final_div_factor",
    "mode",
    "patience",
    "threshold",
    "cooldown",
    "anneal_strategy",
    "three_phase",
    "start_factor",
    "end_factor",
    "last_epoch",
    "warmup_epochs",
    "max_epochs",
    "monitor",
    "interval",
    "frequency",
    "cycle_momentum",
    "min_lr_ratio",
)


def _homes(doc: Document, what: str) -> list[tuple[str, Path, Path]]:
    """(class, key of the class, where its arguments are) of every optimizer, or scheduler, that the file builds."""
    homes: list[tuple[str, Path, Path]] = []
    for path, value in list(doc.values.items()):
        if not isinstance(value, str):
            continue
        name, last = value.rsplit(".", 1)[-1], path[-1]
        if last in ("class_path", "_target_"):
            near = (
                str(path[-2]) if len(path) > 1 and isinstance(path[-2], str) else str(path[-3]) if len(path) > 2 else ""
            )
            args = (*path[:-1], "init_args") if last == "class_path" else path[:-1]
        elif last == 0 and len(path) > 1 and doc.has((*path[:-1], 1)):  # a pair: [AdamW, {lr: ...}]
            near, args = str(path[-2]), (*path[:-1], 1)
        else:
            continue
        scheduler = re.search(r"sched", near, re.I) or re.search(r"(LR|Scheduler|Plateau|WarmRestarts)$", name)
        optimizer = not scheduler and (
            re.search(r"(^|_)optim", near, re.I) or optimizers.bare(value) in optimizers.KNOWN
        )
        if (optimizer if what == "optimizer" else scheduler) and "callbacks" not in path:
            homes.append((value, path, args))
    return homes


def lightning(doc: Document) -> Layout:
    built = _homes(doc, "optimizer")
    if not built:
        raise RuleError(
            f"{doc.where} names no optimizer. Looked for: optimizer.class_path, "
            "model.init_args.optimizer.class_path, a pair "
            "[AdamW, {lr: ...}], `_target_: torch.optim....`. Where the model builds it in code, give its numbers to "
            "`scaling_exps.scale` there"
        )
    if len(built) > 1:
        raise RuleError(
            f"{doc.where} builds {len(built)} optimizers ({', '.join(dotted(p) for _, p, _ in built)}): one recipe "
            "each, please"
        )
    name, spot, args = built[0]
    doc.get(spot)
    row, note = optimizers.find(name, dotted(spot), also=("adagrad",))
    optimizer = OPTIMIZERS[row]
    names = ("lr", optimizer.field, "weight_decay", *(("eps",) if optimizer.family == "adaptive" else ()))
    fields: dict[str, Slot] = {n: ((*args, n), TORCH[row][n]) for n in names}
    if optimizers.bare(name) == "nadamw":
        fields["weight_decay"] = at((*args, "weight_decay"), 0.0)
    for key in ("momentum", "centered"):
        if row == "torch_rmsprop" and doc.get((*args, key)):
            raise RuleError(f"{doc.where}: RMSprop with {key}: no rule covers that")
    if doc.get((*args, "decoupled_weight_decay")) and row == "adam":
        row = "adamw"
    batch_keys = (
        "batch_size",
        "train_batch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        "batch_size_per_device",
    )
    roots: list[Path] = [("data",), ("data", "init_args"), ("datamodule",), ("model",), ("model", "init_args"), ()]
    micro = one_of(doc, *((*r, k) for r in roots for k in batch_keys))
    if micro is None:
        raise RuleError(
            f"{doc.where} has no batch size, and a recipe cannot be scaled without the one it was tuned at. Looked "
            "for: "
            f"{', '.join(batch_keys)} in data, data.init_args, datamodule, model, model.init_args and the top"
        )
    if doc.has(("trainer", "accumulate_grad_batches", 0)) or any(
        p[:2] == ("trainer", "accumulate_grad_batches") and len(p) > 2 for p in doc.values
    ):
        raise RuleError(
            f"{doc.where}: trainer.accumulate_grad_batches changes along the run: the batch has no one value"
        )
    steps, epochs = doc.get(("trainer", "max_steps")), doc.get(("trainer", "max_epochs"))
    layout = Layout(
        doc, "lightning", row, fields, micro=(micro, None), accumulation=(("trainer", "accumulate_grad_batches"), 1),
        epochs=(("trainer", "max_epochs"), None), steps=(("trainer", "max_steps"), None), clip=(("trainer",
        "gradient_clip_val"), None), harmless=words("harmless", "lightning"), notes=[note] if note else [],
    )  # fmt: skip
    if optimizers.bare(name) == "nadam":
        layout.law("per_step", (*args, "momentum_decay"), default=4e-3)
    for key in ("amsgrad", "nesterov", "dampening"):
        doc.get((*args, key))
    for scheduler, spot, where in _homes(doc, "scheduler"):
        doc.get(spot)
        _scheduler(layout, scheduler.rsplit(".", 1)[-1], where, epochs, steps)
    for path, value in list(doc.values.items()):
        if "callbacks" in path and re.search(r"every_n_train_steps|every_n_steps|update_every", str(path[-1])):
            layout.law("count", path)
        elif ("callbacks" in path and str(path[-1]) in ("decay", "ema_decay") and isinstance(value, float)) or (
            str(path[-1]) in ("ema_decay", "ema_rate") and isinstance(value, float) and 0.5 < value < 1
        ):
            layout.law("ema", path)
    layout.law("count", ("trainer", "log_every_n_steps"), ("trainer", "min_steps"))
    check = doc.get(("trainer", "val_check_interval"))
    if isinstance(check, int) and not isinstance(check, bool) and check > 1:
        layout.notes.append("trainer.val_check_interval counts micro-batches, which do not change: it stays")
    spread(
        layout, [(("trainer", "devices"), ("trainer", "num_nodes")), (("trainer", "gpus"), ("trainer", "num_nodes"))]
    )
    return layout


def _scheduler(layout: Layout, name: str, args: Path, epochs: Any, steps: Any) -> None:
    doc = layout.doc
    for key in _RATES:
        layout.law("rate", (*args, key))
    for key in _STEPS:
        layout.law("count", (*args, key))
    for key in _RELATIVE:
        doc.get((*args, key))
    if name == "OneCycleLR":
        layout.notes.append("OneCycleLR sets the learning rate from max_lr at every step: lr is overridden by it")
        if doc.get((*args, "cycle_momentum")) is not False and layout.optimizer in ("adam", "adamw", "sgd"):
            layout.law("beta", (*args, "base_momentum"), default=0.85)
            layout.law("beta", (*args, "max_momentum"), default=0.95)
            layout.notes.append(
                "cycle_momentum (true unless set) overrides beta1, or momentum, between base_momentum and "
                "max_momentum: those "
                "two are moved as beta1 is; cycle_momentum: false leaves beta1 to the optimizer"
            )
    if name == "CyclicLR":
        raise RuleError(
            f"{doc.where}: CyclicLR cycles lr and momentum by a count of calls: how often it is called the file does "
            "not say"
        )
    if name == "ExponentialLR":
        layout.notes.append("ExponentialLR.gamma stays: it is applied once an epoch; once a step it would need gamma^κ")
    for key in _EITHER:
        path = (*args, key)
        value = doc.get(path)
        if value is None:
            continue
        largest = max(value) if isinstance(value, list) else layout.number((path, None))
        per_step = isinstance(steps, int) and steps > 0 and largest * 20 > steps and not isinstance(epochs, int)
        if isinstance(epochs, int) and epochs > 0 and largest > 2 * epochs:
            per_step = True
        if per_step:
            layout.law("count", path)
            layout.notes.append(f"{dotted(path)}={value} is more than the run has epochs: read as optimizer steps")
        else:
            layout.law("samples", path)
            layout.notes.append(
                f"{dotted(path)}={value} is read as epochs, because Lightning's CLI steps a scheduler once an epoch: "
                "where "
                "yours steps at every optimizer step, divide it by κ"
            )
