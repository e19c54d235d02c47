"""DeepSpeed's JSON, alone or as the partner of a trainer's file; and the words of `scaling_exps.scale`."""

from __future__ import annotations

import math
from typing import Any

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, Path, dotted, is_number, path_of, words
from scaling_exps.convert.layout import Layout, Mirror, build, check_number, slot_of, spread

_SECTIONS = words("harmless", "deepspeed")
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def deepspeed(doc: Document) -> Layout:
    if autos := [dotted(p) for p, v in doc.values.items() if v == "auto" and p[0] not in _SECTIONS]:
        raise doc.error(
            f'{", ".join(autos)} are "auto": the trainer\'s own file decides them. Give that one, and '
            f"this beside it: scalerun convert ARGS --with {doc.where}"
        )
    if doc.get("optimizer.type") is None:
        raise doc.error("no optimizer is named: set optimizer.type, or give the trainer's file and this as --with")
    params: Path = ("optimizer", "params")
    layout = build(doc, "deepspeed", numbers=params, decoupled=doc.get((*params, "adam_w_mode")) is not False)
    if not doc.get((*params, "torch_adam")):
        layout.fields["weight_decay"] = ((*params, "weight_decay"), 0.0)
    layout.sections = _SECTIONS
    whole, *parts = map(doc.get, _SIZES)
    ints = [v for v in parts if isinstance(v, int)]
    if isinstance(whole, int) and ints and whole % math.prod(ints):
        raise doc.error(f"train_batch_size={whole} is no multiple of micro-batch x accumulation = {math.prod(ints)}")
    if isinstance(whole, int):
        layout.parallel = whole // math.prod(ints) if len(ints) == 2 else None  # DeepSpeed insists that they agree
        layout.devices, layout.parallel_words, layout.model_parallel = None, "", 1
    else:
        layout.accumulation = slot_of(doc, "gradient_accumulation_steps=1")
    known = ("type", "params", "legacy_fusion")
    dead = [p for p in doc.values if p[0] in ("optimizer", "scheduler") and p[1:2] and p[1] not in known]
    if dead:
        layout.law("kept", *dead)
        layout.notes.append(f"DeepSpeed ignores keys beside params: {', '.join(map(dotted, dead))}")
    _refuse_changes_along_the_run(doc)
    layout.sections |= set(_ALONG)
    layout.law("kept", *((*params, k) for k in ("bias_correction", "amsgrad", "freeze_step")))
    kind = doc.get("scheduler.type")
    if kind in ("WarmupLR", "WarmupDecayLR") and doc.get("scheduler.params.warmup_max_lr") is None:
        raise doc.error(
            f"{kind} without scheduler.params.warmup_max_lr: older versions of DeepSpeed take 0.001 there, which "
            "overrides optimizer.params.lr: write it out"
        )
    if kind == "OneCycle":
        if layout.optimizer != "sgd" and doc.get("scheduler.params.cycle_momentum") is not False:
            raise doc.error(
                "OneCycle overrides the betas at every step, unless told otherwise: beta1 between cycle_min_mom and "
                "cycle_max_mom, beta2 with 0.99, for which there is no key: set scheduler.params.cycle_momentum: false"
            )
        if doc.get("scheduler.params.cycle_first_step_size") is None:
            layout.law("count", "scheduler.params.cycle_first_step_size", default=2000)
    if kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        layout.steps = slot_of(doc, "scheduler.params.total_num_steps")
        layout.warmup = slot_of(doc, "scheduler.params.warmup_num_steps=1000")
        layout.needs_length = "" if kind == "WarmupLR" else "scheduler.params.total_num_steps"
    elif kind not in (None, "OneCycle"):
        known_kinds = "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, or none"
        raise doc.error(f"scheduler {kind!r} counts steps in ways that are not known here; known: {known_kinds}")
    return layout


_ALONG = ("curriculum_learning", "data_efficiency", "progressive_layer_drop", "elasticity")


def _refuse_changes_along_the_run(doc: Document) -> None:
    for section in _ALONG:
        if doc.has(section) and doc.get((section, "enabled")) is not False:
            raise doc.error(f"{section} changes the batch, or counts steps, along the run: not moved here; disable it")


def pair(layout: Layout, partner: Document) -> None:
    """Read the partner of a trainer's file: a DeepSpeed JSON or an accelerate YAML. Its numbers become mirrors.

    Raises:
        RuleError: it decides a number that has no like in the trainer's file, or an optimizer of another kind.
    """
    doc, first = layout.doc, {p[0] for p in partner.values}
    layout.partners.append(partner)
    spread(layout)
    if first & {"distributed_type", "num_processes", "deepspeed_config", "fsdp_config"}:
        if (count := partner.get("megatron_lm_config.megatron_lm_num_micro_batches")) not in (None, 1):
            both = f"megatron_lm_num_micro_batches={count} accumulates beside gradient_accumulation_steps"
            raise partner.error(f"{both}, and how the two meet is not known: set it to 1")
        for key, what in (("gradient_accumulation_steps", "accumulation"), ("gradient_clipping", "clip")):
            _mirror(layout, partner, ("deepspeed_config", key), what)
        held = ", and for ".join(["its processes", *(dotted(m.path) for m in layout.mirrors if m.doc is partner)])
        layout.notes.append(f"{partner.where} was read for {held}")
        return
    if not first & {*_SIZES, "zero_optimization", "optimizer", "scheduler", "fp16", "bf16"}:
        raise partner.error("neither DeepSpeed's file nor accelerate's: no zero_optimization, optimizer, num_processes")
    _refuse_changes_along_the_run(partner)
    if (name := partner.get("optimizer.type")) is not None:
        mode = partner.get("optimizer.params.adam_w_mode")
        row, note = optimizers.find(name, f"{partner.where}: optimizer.type", decoupled=mode is not False)
        if row != layout.optimizer and not {row, layout.optimizer} <= {"adam", "adamw"}:
            raise partner.error(f"optimizer.type={name}, and {doc.where} says {layout.optimizer}: which one counts?")
        layout.optimizer = row
        layout.notes += [note] if note else []
    if layout.optimizer in ("adam", "adamw"):
        for key, default in _DEFAULTS.items() if name is not None else ():
            _mirror(layout, partner, ("optimizer", "params", key), key, default)
    for key, what in _MIRRORS.items():
        _mirror(layout, partner, path_of(key), what)
    known, fixed = {m.path for m in layout.mirrors if m.doc is partner}, []
    for path, value in partner.values.items():
        if path not in known and value and (path[0] in _SIZES or path[1:2] == ("params",)):
            fixed += [f"{dotted(path)}={value}"] if is_number(value) or isinstance(value, list) else []
    if fixed:
        raise partner.error(f'decides itself what has to change ({", ".join(fixed)}): set those to "auto"')
    autos = sum(v == "auto" for v in partner.values.values())
    held = f"; its {len(known)} numbers move with it" if known else ""
    layout.notes.append(f'{partner.where}: its {autos} values "auto" follow this file{held}')


# What DeepSpeed takes where optimizer.params does not say, and what other numbers of its file are in the trainer's.
_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
_MIRRORS = {
    "train_micro_batch_size_per_gpu": "micro",
    "gradient_accumulation_steps": "accumulation",
    "train_batch_size": "batch",
    "gradient_clipping": "clip",
    "scheduler.params.warmup_max_lr": "lr",
    "scheduler.params.warmup_min_lr": "rate",
    "scheduler.params.warmup_num_steps": "warmup",
    "scheduler.params.total_num_steps": "steps",
}


def _mirror(layout: Layout, partner: Document, path: Path, what: str, default: Any = None) -> None:
    value = partner.get(path)
    if (value is None and default is None) or value == "auto":
        return
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        check_number(partner, path, one)
    layout.mirrors.append(Mirror(partner, path, what, value is not None, default if value is None else value))


def plain(doc: Document) -> Layout:
    layout = build(doc, "plain")
    if doc.get("warmup_steps") or doc.get("milestones"):
        layout.needs_length = "steps or epochs"
    return layout
