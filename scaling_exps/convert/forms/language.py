"""Pre-training: torchtitan (TOML of 2024 and 2025, flags, Python registries), nanoGPT, Megatron-LM and NeMo."""

from __future__ import annotations

import math
import re
from typing import Any

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, Path, dotted, words
from scaling_exps.convert.layout import Layout, Slot, at, data_parallel, degrees, launcher, one_of, spread
from scaling_exps.rules import RuleError

# --- torchtitan ---


_TOKENS = "num_tokens_per_microbatch_per_dp_rank"  # since 2026 the batch counts tokens


def torchtitan(doc: Document) -> Layout:
    tails = tuple(("training", k) for k in ("local_batch_size", "batch_size", "global_batch_size", _TOKENS))
    roots = {p[:-2] for p in doc.values if p[-2:] in tails}
    if len(roots) > 1:
        raise RuleError(
            f"{doc.where} holds {len(roots)} recipes ({', '.join(map(dotted, sorted(roots, key=str)))}): give one"
        )
    root: Path = roots.pop() if roots else ()
    t, o, s, par = (*root, "training"), (*root, "optimizer"), (*root, "lr_scheduler"), (*root, "parallelism")
    if doc.has((*root, "optimizer", "param_groups")) or doc.has((*root, "optimizers")):
        raise RuleError(f"{doc.where}: more than one parameter group, or optimizer: one recipe each, please")
    name = doc.get((*o, "name"))
    row, note = optimizers.find(name or "AdamW", dotted((*o, "name")))
    if row not in ("adam", "adamw"):
        raise RuleError(f"{doc.where}: torchtitan's {row} is a fork's; Adam's and AdamW's numbers have known names")
    old = doc.get((*t, "batch_size")) is not None  # until the middle of 2025
    micro = one_of(doc, (*t, "batch_size"), (*t, "local_batch_size"), (*t, _TOKENS)) or (*t, "local_batch_size")
    accumulation = one_of(
        doc, (*t, "gradient_accumulation_steps"), (*t, "grad_accum_steps"), (*t, "accumulation_steps")
    )
    warm = one_of(doc, (*s, "warmup_steps"), (*t, "warmup_steps"))
    if warm is None and old and not doc.has(s):
        raise RuleError(
            f"{doc.where}: the warm-up is not in the file, and its default stood in training.warmup_steps first, in "
            "lr_scheduler.warmup_steps later: write it where your version keeps it"
        )
    key = "num_tokens_per_train_step" if micro[-1] == _TOKENS else "global_batch_size"
    whole: Slot | None = ((*t, key), None)
    given = doc.get((*t, key))
    if accumulation and given not in (None, -1):
        raise RuleError(
            f"{doc.where} has {dotted(accumulation)} and global_batch_size: a fork's accumulation beside "
            "torchtitan's "
            "own; which one counts?"
        )
    if accumulation or (old and given is None):
        whole = None
    notes = [note] if note else []
    if name is None:
        notes.append("optimizer.name is not in the file: AdamW, torchtitan's default")
    if micro[-1] == _TOKENS:
        notes.append("the batch counts tokens, per device and in all")
    defaults = {"lr": 8e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    layout = Layout(
        doc, "torchtitan", row, {n: at((*o, n), v) for n, v in defaults.items()}, micro=(micro, None),
        whole=whole, accumulation=(accumulation, None) if accumulation else None, steps=at((*t, "steps")),
        warmup=(warm or (*s, "warmup_steps"), 200), needs_length="training.steps", clip=at((*t, "max_norm"), 1.0),
        harmless=words("harmless", "torchtitan"), notes=notes,
    )  # fmt: skip
    if old:
        notes.append(
            "torchtitan of 2024 had betas (0.9, 0.95), eps 1e-8 and weight decay 0.1 in its code: see that your "
            "version reads "
            "those keys of [optimizer]"
        )
    layout.law(
        "count", (*root, "checkpoint", "interval"), (*root, "metrics", "log_freq"), (*root, "validation", "freq"),
        (*root, "checkpoint", "interval_steps"), (*s, "decay_steps"), (*s, "stable_steps"),
    )  # fmt: skip
    for key in ("decay_ratio", "lr_min", "min_lr_factor"):
        doc.get((*s, key))
    minimum = doc.get((*s, "lr_min"))
    if isinstance(minimum, int | float) and minimum:
        notes.append("lr_scheduler.lr_min is a share of lr: it stays")
    _ramp(layout, root)
    named, layout.unknown_degree = degrees(doc)
    parts = {
        k: v for k, v in named.items() if not k.startswith("expert")
    }  # experts are spread over data-parallel ranks
    layout.model_parallel, layout.parallel_words = (
        math.prod(parts.values()),
        "".join(f" / {k} {n}" for k, n in parts.items()),
    )
    shard, replicate = (
        one_of(doc, (*p, f"data_parallel_{w}_degree")) and doc.get((*p, f"data_parallel_{w}_degree"))
        for w, p in (("shard", par if doc.has(par) else t), ("replicate", par if doc.has(par) else t))
    )
    total, layout.devices, layout.nodes = launcher(doc)
    shard = data_parallel(doc) if shard is None else shard  # its name at the beginning of 2024
    if isinstance(shard, int) and shard > 0:
        layout.parallel = shard * (replicate if isinstance(replicate, int) and replicate > 0 else 1)
        layout.parallel_words = ""
        if total is not None and total != layout.parallel * layout.model_parallel:
            raise RuleError(
                f"{doc.where}: {layout.parallel} data-parallel x {layout.model_parallel} is not the {total} devices "
                "started"
            )
    elif total is not None:
        layout.parallel = total // layout.model_parallel
    return layout


def _ramp(layout: Layout, root: Path) -> None:
    """A batch that grows along the run, under a fork's keys: both ends, examples a step, go by κ; samples stay."""
    doc = layout.doc
    for path in list(doc.values):
        if (
            path[: len(root)] != root
            or len(path) < 2
            or not re.search("batch_?size_?(scheduler|schedule|ramp|warmup)|ramp", str(path[-2]))
        ):
            continue
        key = str(path[-1])
        if re.match(r"(start|initial|end|final|max|min)_(global_)?batch(_size)?$|batch_size_increment|increment$", key):
            layout.law("batch", path)
        elif re.search(r"samples|tokens", key):
            layout.law("samples", path)
        elif re.search(r"steps|iters|interval", key):
            layout.law("count", path)
        elif key not in ("enable", "enabled", "type", "name"):
            raise RuleError(f"{doc.where}: {dotted(path)} is part of a batch ramp, and what it does is not known")
        else:
            doc.get(path)
    if any(law == "batch" for _, _, law in layout.laws):
        layout.notes.append("the batch ramps up: both of its ends are moved by κ, so that the rule holds all along it")


# --- nanoGPT ---


def nanogpt(doc: Document) -> Layout:
    """config/*.py or flags of train.py, which divides gradient_accumulation_steps by the number of processes."""
    fields: dict[str, Slot] = {"lr": at("learning_rate", 6e-4), "beta1": at("beta1", 0.9), "beta2": at("beta2", 0.95)}
    fields["weight_decay"] = at("weight_decay", 0.1)
    layout = Layout(
        doc, "nanogpt", "adamw", fields, micro=at("batch_size", 12),
        accumulation=at("gradient_accumulation_steps", 40), parallel=1, steps=at("max_iters", 600000),
        warmup=at("warmup_iters", 2000), clip=at("grad_clip", 1.0), harmless=words("harmless", "nanogpt"),
        notes=[
            "gradient_accumulation_steps is read as that of all processes, as train.py has divided it since 2023; in a "
            "copy that does not, multiply it by the processes first",
            "train.py has no key for eps, which the rule moves to eps/√κ: 1e-8, torch's, stays",
        ],
    )  # fmt: skip
    layout.parallel_words = "all processes together"
    layout.law("count", "lr_decay_iters", default=600000)
    layout.law("rate", "min_lr", default=6e-5)
    layout.law("count", "eval_interval", "log_interval")
    launcher(doc)
    return layout


# --- Megatron-LM, NeMo ---

_MEGATRON = words("harmless", "megatron")


def megatron(doc: Document) -> Layout:
    """Flags of Megatron-LM, or the same names in YAML."""
    word = doc.get("optimizer") or "adam"
    row, note = optimizers.find(word, "optimizer", decoupled=doc.get("decoupled_weight_decay") is not False)
    if doc.get("no_decoupled_weight_decay") and row == "adamw":
        row, note = "adam", ""
    fields: dict[str, Slot] = {"lr": at("lr"), "weight_decay": at("weight_decay", 0.01)}
    if row in ("adam", "adamw"):
        fields |= {"beta1": at("adam_beta1", 0.9), "beta2": at("adam_beta2", 0.999), "eps": at("adam_eps", 1e-8)}
    elif row == "sgd":
        fields["momentum"] = at("sgd_momentum", 0.9)
    else:
        raise RuleError(f"{doc.where}: optimizer={word}: its numbers have no known names in Megatron's flags")
    old = doc.get("batch_size") is not None and doc.get("micro_batch_size") is None
    layout = Layout(
        doc, "megatron", row, fields, micro=(("batch_size" if old else "micro_batch_size",), None),
        whole=at("global_batch_size"), steps=at("train_iters"), warmup=at("lr_warmup_iters"),
        clip=at("clip_grad", 1.0), harmless=_MEGATRON,
        needs_length="train_iters, train_samples or train_tokens" if doc.get("lr_warmup_iters") else "",
        notes=[note] if note else [],
    )  # fmt: skip
    layout.law("rate", "min_lr", "lr_warmup_init", "decoupled_lr", "decoupled_min_lr")
    layout.law(
        "count", "lr_decay_iters", "lr_wsd_decay_iters", "save_interval", "eval_interval",
        "log_interval"
    )  # fmt: skip
    layout.law(
        "samples", "train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples",
        "train_tokens", "lr_decay_tokens", "lr_warmup_tokens",
    )  # fmt: skip
    if any(doc.get(k) for k in ("train_tokens", "lr_decay_tokens", "lr_warmup_tokens")):
        layout.notes.append(
            "clocks in tokens stay; where the sequence length changes along the run, so does the batch in tokens"
        )
    for key in ("start_weight_decay", "end_weight_decay"):
        if doc.get(key) is not None:
            raise RuleError(f"{doc.where}: {key}: a weight decay that changes along the run is not moved here")
    if (ramp := doc.get("rampup_batch_size")) is not None:
        if not isinstance(ramp, list) or len(ramp) != 3 or not all(isinstance(v, int) for v in ramp):
            raise RuleError(f"{doc.where}: rampup_batch_size={ramp!r} must be start, increment and samples")
        layout.laws.append((("rampup_batch_size",), None, "ramp"))
        layout.notes.append("the batch ramps up: start and increment are moved by κ, its samples stay")
    spread(layout, ignore=("expert", "expert_tensor"))
    return layout


def nemo(doc: Document) -> Layout:
    """NeMo's YAML and its Hydra overrides: model.micro_batch_size, model.optim, trainer.max_steps."""
    roots = {p[:-2] for p in doc.values if p[-2:] in (("model", "micro_batch_size"), ("model", "global_batch_size"))}
    if len(roots) != 1:
        raise RuleError(f"{doc.where}: model.micro_batch_size and model.global_batch_size were looked for, once")
    (root,) = roots
    m, trainer = (*root, "model"), (*root, "trainer")
    o = (*m, "optim")
    row, note = optimizers.find(doc.get((*o, "name")) or "fused_adam", dotted((*o, "name")), decoupled=True)
    if row not in ("adam", "adamw"):
        raise RuleError(f"{doc.where}: {row}'s numbers have no known names in NeMo's model.optim; Adam's have")
    defaults: dict[str, Any] = {"lr": None, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    layout = Layout(
        doc, "nemo", row, {n: at((*o, n), v) for n, v in defaults.items()}, micro=at((*m, "micro_batch_size")),
        whole=at((*m, "global_batch_size")), steps=at((*trainer, "max_steps")), epochs=at((*trainer, "max_epochs")),
        warmup=at((*o, "sched", "warmup_steps")), clip=at((*trainer, "gradient_clip_val")), harmless=_MEGATRON,
        notes=[note] if note else [],
    )  # fmt: skip
    if doc.get((*trainer, "accumulate_grad_batches")) not in (None, 1):
        raise RuleError(f"{doc.where}: trainer.accumulate_grad_batches must be 1 where global_batch_size decides")
    if doc.get((*m, "rampup_batch_size")) is not None:
        raise RuleError(f"{doc.where}: model.rampup_batch_size: a ramp is moved in Megatron's own flags only")
    layout.law("rate", (*o, "sched", "min_lr"))
    layout.law(
        "count", (*o, "sched", "constant_steps"), (*o, "sched", "max_steps"), (*trainer, "val_check_interval"),
        (*trainer, "log_every_n_steps"), (*o, "sched", "hold_steps"),
    )  # fmt: skip
    doc.get((*o, "sched", "warmup_ratio"))
    spread(layout, [at((*trainer, "devices"), (*trainer, "num_nodes"))], ignore=("expert", "expert_tensor"))
    return layout
