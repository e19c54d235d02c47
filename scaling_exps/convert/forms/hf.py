"""Hugging Face's Trainer and those built on it: TRL, LLaMA-Factory, axolotl; and accelerate's own scripts.

Read in: transformers 5.24 TrainingArguments and trainer_optimizer.py; axolotl's and LLaMA-Factory's examples;
diffusers' and transformers' scripts without a Trainer. All take YAML, JSON or flags.
"""

from __future__ import annotations

import re

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, Path, dotted, words
from scaling_exps.convert.layout import Layout, Slot, at, one_of, spread, unpack
from scaling_exps.rules import RuleError

_ARGUMENTS = words("harmless", "hf")


def hf(doc: Document) -> Layout:
    return _trainer(
        doc, "hf", ("per_device_train_batch_size", "per_gpu_train_batch_size"), "num_train_epochs", "optim", 3.0
    )


def axolotl(doc: Document) -> Layout:
    if doc.get("batch_size") is not None:
        raise RuleError(
            f"{doc.where}: batch_size is read as the batch of a device by some versions of axolotl, of all by "
            "others: "
            "write micro_batch_size and gradient_accumulation_steps instead"
        )
    layout = _trainer(doc, "axolotl", ("micro_batch_size",), "num_epochs", "optimizer", None)
    if layout.warmup == at("warmup_steps", 0) and doc.get("warmup_steps") is None:
        layout.notes.append("no warm-up is in the file: axolotl takes 3% of the run, at most 100 steps")
    if doc.get("sample_packing"):
        layout.notes.append("sample_packing: the batch counts packed sequences")
    for path in list(doc.values):
        if path[0] == "lr_groups" and path[-1] == "lr":
            layout.law("rate", path)
    layout.law("rate", "embedding_lr")
    for key in ("embedding_lr_scale", "cosine_min_lr_ratio", "cosine_constant_lr_ratio"):
        doc.get(key)
    shard, replicate = doc.get("dp_shard_size"), doc.get("dp_replicate_size")
    if isinstance(shard, int) and shard > 0:
        layout.parallel = shard * (replicate if isinstance(replicate, int) and replicate > 0 else 1)
    return layout


def _trainer(
    doc: Document, form: str, micro: tuple[str, ...], epochs: str, optim: str, default_epochs: float | None
) -> Layout:
    if doc.get("adafactor"):
        raise RuleError(f"{doc.where}: adafactor=True: {optimizers.REFUSED['adafactor']}")
    name = doc.get(optim)
    row, note = optimizers.find("adamw_torch" if name is None else name, optim, also=("adagrad",))
    fields: dict[str, Slot] = {
        "lr": at("learning_rate", 5e-5 if form == "hf" else None),
        "weight_decay": at("weight_decay", 0.0),
    }
    notes = [note] if note else []
    if name is None:
        notes.append(f"{optim} is not in the file: AdamW, the Trainer's default")
    if doc.syntax == "flags" and form == "hf":
        notes.append(
            "flags are read as TrainingArguments': a script with a parser of its own may have other defaults, or "
            "lack them"
        )
    if row == "torch_rmsprop" and "bnb" in str(name):
        raise RuleError(
            f"{doc.where}: {optim}={name}: the Trainer hands optim_args to it as text, so alpha cannot be set"
        )
    packed: Path = ()
    args = (
        {k: v for k, v in unpack(doc, ("optim_args",)).items()}
        if not doc.has("optim_args") or isinstance(doc.get("optim_args"), str | None)
        else {str(p[-1]): doc.get(p) for p in doc.values if p[0] == "optim_args"}
    )
    if row in ("sgd", "torch_rmsprop"):
        packed = ("optim_args",)
        if row == "sgd":
            fields["momentum"] = (("optim_args", "momentum"), 0.0)
        else:
            if args.get("momentum") or str(args.get("centered", "")).lower() in ("true", "1", "yes"):
                raise RuleError(f"{doc.where}: RMSprop with momentum or centered: no rule covers that")
            fields |= {"alpha": (("optim_args", "alpha"), 0.99), "eps": (("optim_args", "eps"), 1e-8)}
            notes.append(
                "RMSprop: torch's, with alpha 0.99 and eps 1e-8 unless optim_args says otherwise "
                "(transformers before 5 ignores optim_args here)"
            )
    else:
        if wrong := {"lr", "learning_rate", "beta1", "beta2", "betas", "eps", "weight_decay"} & set(args):
            raise RuleError(
                f"{doc.where}: optim_args holds {', '.join(sorted(wrong))}; write what is meant in its own key"
            )
        fields |= {"beta1": at("adam_beta1", 0.9), "beta2": at("adam_beta2", 0.999)}
        if row in ("adam", "adamw"):
            fields["eps"] = (one_of(doc, "adam_epsilon", "adam_eps") or ("adam_epsilon",), 1e-8)
    warm = one_of(doc, "warmup_steps", "num_warmup_steps", "lr_warmup_steps", "warmup_iters")
    if doc.get("warmup_ratio") is not None and not (warm and doc.get(warm)):
        warm = ("warmup_ratio",)
    layout = Layout(
        doc, form, row, fields, micro=(one_of(doc, *((m,) for m in micro)) or (micro[0],), None),
        accumulation=at("gradient_accumulation_steps", 1), epochs=((epochs,), default_epochs),
        steps=at("max_steps"), warmup=(warm or ("warmup_steps",), 0), clip=at("max_grad_norm", 1.0),
        packed=packed, harmless=_ARGUMENTS, notes=notes,
    )  # fmt: skip
    _kwargs(layout)
    layout.law(
        "count", "logging_steps", "eval_steps", "save_steps", "eval_delay", "ref_model_sync_steps"
    )  # fmt: skip
    layout.law("rate", "loraplus_lr_embedding", "embedding_learning_rate")
    if doc.get("loraplus_lr_ratio") is not None:
        notes.append("loraplus_lr_ratio is relative to the learning rate: it stays")
        if doc.get("loraplus_lr_embedding") is None:
            notes.append("loraplus_lr_embedding is not in the file: its default, an absolute rate (1e-6), stays")
    if isinstance(doc.get("deepspeed"), str) and not doc.partners:
        notes.append(f"deepspeed={doc.get(('deepspeed',))} is not read: give it as --with, so that the pair is checked")
    if doc.get("auto_find_batch_size"):
        raise RuleError(f"{doc.where}: auto_find_batch_size=True lets the Trainer choose the batch: set it to false")
    _groups(layout)
    spread(layout)
    return layout


def _kwargs(layout: Layout) -> None:
    doc, key = layout.doc, "lr_scheduler_kwargs"
    text = doc.get(key)
    if isinstance(text, str) and re.search(r"lr|steps|timescale|T_", text):
        raise RuleError(f"{doc.where}: {key}={text!r} is text; write its keys out in YAML, so that they can be read")
    for path in list(doc.values):
        if path[0] == key and len(path) > 1:
            last = str(path[-1])
            if last in ("min_lr", "lr_end", "eta_min", "warmup_lr"):
                layout.law("rate", path)
            elif re.search(r"steps|timescale|T_max|T_0|patience|cooldown", last):
                layout.law("count", path)
            elif last in (
                "min_lr_rate",
                "min_lr_ratio",
                "num_cycles",
                "power",
                "decay_type",
                "warmup_type",
                "factor",
                "mode",
            ):
                doc.get(path)
    if doc.get("lr_scheduler_type") == "polynomial" and doc.get((key, "lr_end")) is None:
        layout.notes.append("lr_end of the polynomial schedule is not in the file: its default, 1e-7, stays")


def _groups(layout: Layout) -> None:
    """RL counts completions: `num_generations` of them share a prompt, and are compared with each other."""
    doc = layout.doc
    for path in at("num_generations", ("trl", "num_generations")):
        if doc.get(path) is not None:
            layout.group = (path, None)
            layout.notes.append(
                "the batch counts completions; advantages are taken within a group of num_generations, which stays: "
                "no "
                "rule for the optimizer makes groups of another size, or another number of prompts a step, equal"
            )
    layout.law("batch", "generation_batch_size", "steps_per_generation")


def accelerate(doc: Document) -> Layout:
    """Scripts around accelerate without a Trainer: diffusers' examples, transformers' `no_trainer` scripts."""
    if doc.get("scale_lr"):
        raise RuleError(
            f"{doc.where}: scale_lr multiplies the learning rate by the batch itself: write the product into "
            "learning_rate and take scale_lr out"
        )
    for path, value in doc.values.items():
        if re.match(r"use_(?!8bit_adam)\w*(adam|prodigy|lion|came|adafactor)\w*$", str(path[-1])) and value:
            raise RuleError(f"{doc.where}: {dotted(path)}={value}: {optimizers.switch_reason(str(path[-1]))}")
    optimizer = one_of(doc, "optimizer", "optimizer_type")
    row, note = optimizers.find(doc.get(optimizer) if optimizer else "adamw", dotted(optimizer or ("optimizer",)))
    if row not in ("adam", "adamw"):
        raise RuleError(f"{doc.where}: {row}'s numbers have no known names in these scripts; Adam and AdamW have")
    doc.get("use_8bit_adam")
    diffusers = any(doc.get(k) is not None for k in ("lr_warmup_steps", "train_batch_size", "adam_weight_decay"))
    decay = one_of(doc, "adam_weight_decay", "weight_decay") or (
        ("adam_weight_decay" if diffusers else "weight_decay"),
    )
    warm = one_of(doc, "lr_warmup_steps", "num_warmup_steps") or (
        ("lr_warmup_steps" if diffusers else "num_warmup_steps"),
    )
    micro = one_of(doc, "train_batch_size", "per_device_train_batch_size")
    fields: dict[str, Slot] = {
        "lr": at("learning_rate"),
        "beta1": at("adam_beta1", 0.9),
        "beta2": at("adam_beta2", 0.999),
    }
    fields |= {"eps": at("adam_epsilon", 1e-8), "weight_decay": (decay, 1e-2 if diffusers else 0.0)}
    layout = Layout(
        doc, "accelerate", row, fields, micro=at(micro or "train_batch_size"),
        accumulation=at("gradient_accumulation_steps", 1), epochs=at("num_train_epochs"),
        steps=at("max_train_steps"), warmup=(warm, 500 if diffusers else 0),
        needs_length="max_train_steps or num_train_epochs", clip=at("max_grad_norm", 1.0), harmless=_ARGUMENTS,
        notes=[
            *([note] if note else []),
            "counts are read as optimizer steps: a scheduler prepared by accelerate ticks once a process, and a script "
            "that does not multiply its counts by num_processes goes through them that much faster",
        ],
    )  # fmt: skip
    if not diffusers:
        layout.notes.append("adam_beta1, adam_beta2, adam_epsilon are written as flags that your script must take")
    if doc.get("use_ema"):
        layout.notes.append(
            "use_ema: the decay of the model average stands in the script, and needs rho -> rho^κ there"
        )
    layout.law(
        "count", "checkpointing_steps", "validation_steps", "logging_steps", "save_steps",
        "eval_steps"
    )  # fmt: skip
    doc.get("snr_gamma")
    doc.get("lr_num_cycles")
    doc.get("lr_power")
    spread(layout)
    return layout


def llamafactory(doc: Document) -> Layout:
    """The second generation of LLaMA-Factory: micro_batch_size, global_batch_size, optim_config."""
    if (name := doc.get(("optim_config", "name"))) is not None:
        optimizers.find(name, "optim_config.name", also=("muon",))
        raise RuleError(f"{doc.where}: optim_config.name={name}: what its keys are is not known here")
    schedule = ("lr_scheduler_config",)
    layout = Layout(
        doc,
        "llamafactory",
        "adamw",  # torch's, of which this generation sets lr alone
        {"lr": at("learning_rate", 1e-4), "betas": ((), [0.9, 0.999]), "eps": ((), 1e-8), "weight_decay": ((), 0.01)},
        micro=at("micro_batch_size"),
        whole=at("global_batch_size"),
        epochs=at("num_train_epochs", 3),
        steps=at("max_steps"),
        warmup=(
            one_of(doc, (*schedule, "num_warmup_steps"), (*schedule, "warmup_steps"))
            or (*schedule, "num_warmup_steps"),
            0,
        ),
        clip=at("max_grad_norm", 1.0),
        harmless=_ARGUMENTS | {"batching_strategy", "batching_workers"},
    )
    for key in ("warmup_ratio", "name", "min_lr_ratio", "min_lr_rate"):
        doc.get((*schedule, key))
    layout.law("rate", (*schedule, "min_lr"))
    layout.law("count", "logging_steps", "save_steps", "eval_steps")
    spread(layout)
    return layout
