"""DeepSpeed's JSON, alone or as the partner of a trainer's file; and the words of `scaling_exps.scale`."""

from __future__ import annotations

import math

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, Path, dotted, words
from scaling_exps.convert.forms.vision import TORCH
from scaling_exps.convert.layout import Layout, Slot, at, spread
from scaling_exps.rules import OPTIMIZERS, RuleError

_SECTIONS = words("harmless", "deepspeed")
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def deepspeed(doc: Document) -> Layout:
    if autos := [dotted(p) for p, v in doc.values.items() if v == "auto" and p[0] not in _SECTIONS]:
        raise RuleError(
            f'{doc.where}: {", ".join(autos)} are "auto": the trainer\'s own file decides them. Give that one, and '
            f"this beside it: scalerun convert ARGS --with {doc.where}"
        )
    params: Path = ("optimizer", "params")
    name = doc.get(("optimizer", "type"))
    if name is None:
        raise RuleError(
            f"{doc.where} names no optimizer: set optimizer.type, or give the trainer's file and this as --with"
        )
    mode = doc.get((*params, "adam_w_mode"))
    row, note = optimizers.find(name, "optimizer.type", decoupled=mode is not False, also=("muon", "adagrad"))
    optimizer = OPTIMIZERS[row]
    defaults = {**TORCH[row], **({} if doc.get((*params, "torch_adam")) else {"weight_decay": 0.0})}
    names = ("lr", optimizer.field, "weight_decay", *(("eps",) if optimizer.family == "adaptive" else ()))
    sizes = {s: doc.get(s) for s in _SIZES}
    layout = Layout(
        doc, "deepspeed", row, {n: ((*params, n), defaults[n]) for n in names}, whole=at("train_batch_size"),
        micro=at("train_micro_batch_size_per_gpu"), accumulation=at("gradient_accumulation_steps"),
        clip=at("gradient_clipping"), sections=_SECTIONS, notes=[note] if note else [],
    )  # fmt: skip
    whole, micro, accumulation = sizes.values()
    ints = [v for v in (micro, accumulation) if isinstance(v, int)]
    if isinstance(whole, int) and ints and whole % math.prod(ints):
        raise RuleError(
            f"{doc.where}: train_batch_size={whole} is no multiple of micro-batch x accumulation = {math.prod(ints)}"
        )
    if isinstance(whole, int) and len(ints) == 2:
        layout.parallel = whole // math.prod(ints)  # DeepSpeed insists that they agree
    elif whole is None:
        layout.accumulation = at("gradient_accumulation_steps", 1)
        spread(layout)
    dead = [
        dotted(p)
        for p in doc.values
        if p[0] in ("optimizer", "scheduler") and p[1:2] not in (("type",), ("params",), ("legacy_fusion",))
    ]
    for path in doc.values:
        if dotted(path) in dead:
            doc.get(path)
    if dead:
        layout.notes.append(
            f"DeepSpeed ignores keys beside params: {', '.join(dead)}; what counts is inside params, or its default"
        )
    for section in ("curriculum_learning", "data_efficiency", "progressive_layer_drop", "elasticity"):
        if doc.has(section) and doc.get((section, "enabled")) is not False:
            raise RuleError(
                f"{doc.where}: {section} changes the batch, or counts steps, along the run: not moved here; disable it"
            )
        layout.sections |= {section}
    for key in ("adam_w_mode", "torch_adam", "bias_correction", "amsgrad", "freeze_step"):
        doc.get((*params, key))
    _schedule(layout)
    layout.law("count", "steps_per_print")
    return layout


def _schedule(layout: Layout) -> None:
    doc, s = layout.doc, ("scheduler", "params")
    kind = doc.get(("scheduler", "type"))
    if kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        layout.law("rate", (*s, "warmup_max_lr"), (*s, "warmup_min_lr"))
        layout.steps, layout.warmup = at((*s, "total_num_steps")), at((*s, "warmup_num_steps"), 1000)
        if kind != "WarmupLR":
            layout.needs_length = "scheduler.params.total_num_steps"
        for key in ("warmup_type", "warmup_min_ratio", "cos_min_ratio", "last_batch_iteration"):
            doc.get((*s, key))
    elif kind == "OneCycle":
        layout.law("rate", *((*s, k) for k in ("cycle_min_lr", "cycle_max_lr")))
        layout.law("count", *((*s, k) for k in ("cycle_first_step_size", "cycle_second_step_size", "decay_step_size")))
        layout.law("beta", *((*s, k) for k in ("cycle_min_mom", "cycle_max_mom")))
        for key in (
            "cycle_first_stair_count",
            "cycle_second_stair_count",
            "cycle_momentum",
            "decay_lr_rate",
            "decay_mom_rate",
        ):
            doc.get((*s, key))
    elif kind is not None:
        raise RuleError(
            f"{doc.where}: scheduler {kind!r} counts steps in ways that are not known here; known: WarmupLR, "
            "WarmupDecayLR, WarmupCosineLR, OneCycle, or none"
        )


_STAY = {  # keys of a DeepSpeed file that do not change, with the Trainer's name of each and its default
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", None),
    "gradient_clipping": ("max_grad_norm", 1.0),
}


def pair(layout: Layout, partner: Document) -> None:
    """Check the partner of a trainer's file: a DeepSpeed JSON or an accelerate YAML; nothing in it may need a change.

    Raises:
        RuleError: it decides a number itself that must change, or an optimizer of another kind.
    """
    doc = layout.doc
    if any(p[0] in ("distributed_type", "num_processes", "deepspeed_config", "fsdp_config") for p in partner.values):
        processes = partner.get("num_processes")
        if isinstance(processes, int) and layout.parallel is None:
            layout.parallel = processes // layout.model_parallel
            layout.parallel_words = f"{layout.parallel_words} (num_processes={processes} in {partner.where})"
        held = partner.get(("deepspeed_config", "gradient_accumulation_steps"))
        if held is not None and layout.accumulation and held not in ("auto", doc.get(layout.accumulation[0]) or 1):
            raise RuleError(
                f"{partner.where}: deepspeed_config.gradient_accumulation_steps={held} is not what {doc.where} says"
            )
        if held not in (None, "auto", 1):
            raise RuleError(
                f"{partner.where}: deepspeed_config.gradient_accumulation_steps={held} would have to change: "
                'set it to "auto"'
            )
        layout.notes.append(f"{partner.where} was read for its processes; nothing in it changes")
        return
    if not any(
        str(p[0]) in (*_SIZES, "zero_optimization", "optimizer", "scheduler", "fp16", "bf16") for p in partner.values
    ):
        raise RuleError(
            f"{partner.where} is neither a DeepSpeed file nor an accelerate one: looked for zero_optimization, "
            "train_micro_batch_size_per_gpu, optimizer.type, num_processes, distributed_type"
        )
    name = partner.get(("optimizer", "type"))
    if name is not None:
        mode = partner.get(("optimizer", "params", "adam_w_mode"))
        row, note = optimizers.find(name, f"{partner.where}: optimizer.type", decoupled=mode is not False)
        if {row, layout.optimizer} - {"adam", "adamw"} and row != layout.optimizer:
            raise RuleError(
                f"{partner.where}: optimizer.type={name}, and {doc.where} says {layout.optimizer}: which one counts?"
            )
        layout.optimizer = row
        layout.notes += [note] if note else []
    fixed, wrong = [], []
    for path, value in partner.values.items():
        number = isinstance(value, int | float | list) and not isinstance(value, bool)
        if path[0] in _STAY and value != "auto":
            key, default = _STAY[str(path[0])]
            if value != (doc.get(key) if doc.get(key) is not None else default):
                wrong.append(f"{dotted(path)}={value}")
        elif number and value and (path[0] in _SIZES or path[1:2] == ("params",)):
            fixed.append(f"{dotted(path)}={value}")
    if fixed:
        raise RuleError(
            f'{partner.where} decides itself what has to change ({", ".join(fixed)}): set those to "auto", so that '
            f"{doc.where} decides them"
        )
    if wrong:
        raise RuleError(f"{partner.where}: {', '.join(wrong)} is not what {doc.where} says: which one counts?")
    autos = sum(v == "auto" for v in partner.values.values())
    layout.notes.append(f'{partner.where}: its {autos} values "auto" follow this file; nothing in it changes')


# --- plain ---


def plain(doc: Document) -> Layout:
    name = doc.get("optimizer")
    if name is None:
        raise RuleError(
            f"{doc.where} does not name its optimizer: set optimizer to one of {', '.join(optimizers.KNOWN)}"
        )
    row, note = optimizers.find(name, "optimizer")
    optimizer = OPTIMIZERS[row]
    fields: dict[str, Slot] = {
        "lr": at("lr"),
        optimizer.field: ((optimizer.field,), 0.0 if optimizer.field == "momentum" else None),
        "weight_decay": at("weight_decay", 0.0),
    }
    if optimizer.family == "adaptive":
        fields["eps"] = at("eps", 1e-8)
    layout = Layout(
        doc, "plain", row, fields, whole=at("batch"), epochs=at("epochs"), steps=at("steps"),
        warmup=at("warmup_steps", 0), notes=[note] if note else [],
        needs_length="steps or epochs" if doc.get("warmup_steps") or doc.get("milestones") else "",
    )  # fmt: skip
    layout.law("ema", "ema")
    layout.law("count", "milestones")
    return layout
