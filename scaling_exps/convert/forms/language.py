"""Pre-training: torchtitan (TOML of 2024 and 2025, flags, Python registries), nanoGPT, Megatron-LM and NeMo."""

from __future__ import annotations

import re

from scaling_exps.convert.documents import KEYS, Document, Path, dotted
from scaling_exps.convert.layout import Layout, build
from scaling_exps.rules import RuleError

_TOKENS = "num_tokens_per_microbatch_per_dp_rank"  # torchtitan's batch counts tokens since 2026


def _root(doc: Document, section: str, *keys: str) -> Path:
    """Where the one recipe of a file stands: above `section`, which has one of `keys`."""
    roots = {p[:-2] for p in doc.values if p[-2:-1] == (section,) and p[-1] in keys}
    if len(roots) > 1:
        names = ", ".join(map(dotted, sorted(roots, key=str)))
        raise RuleError(f"{doc.where} holds {len(roots)} recipes ({names}): give one")
    return roots.pop() if roots else ()


def torchtitan(doc: Document) -> Layout:
    root = _root(doc, "training", "local_batch_size", "batch_size", "global_batch_size", _TOKENS)
    t, scheduler = (*root, "training"), (*root, "lr_scheduler")
    if doc.has((*root, "optimizer", "param_groups")) or doc.has((*root, "optimizers")):
        raise doc.error("more than one parameter group, or optimizer: one recipe each, please")
    tokens = doc.get((*t, _TOKENS)) is not None
    whole = (*t, "num_tokens_per_train_step" if tokens else "global_batch_size")
    layout = build(doc, "torchtitan", root=root, rows={"whole": (whole, None)})
    given = doc.get(whole)
    if layout.accumulation and doc.get(layout.accumulation[0]) is None:
        layout.accumulation = None
    elif layout.accumulation and given not in (None, -1):
        both = f"{dotted(layout.accumulation[0])}, a fork's, and global_batch_size"
        raise doc.error(f"it has {both}: which one counts?")
    old = doc.get((*t, "batch_size")) is not None  # until the middle of 2025
    if old and not doc.has(scheduler) and doc.get((*t, "warmup_steps")) is None:
        places = "training.warmup_steps first, in lr_scheduler.warmup_steps later"
        raise doc.error(f"no warm-up is in the file, and its default stood in {places}: write it out")
    if layout.accumulation or (old and given is None):
        layout.whole = None
    ramp = [p for p in layout.under(*root) if re.search("batch_?size_?(schedule|ramp|warmup)|ramp", str(p[-2:-1]))]
    for path in layout.sweep(ramp, KEYS["torchtitan"]["batch_ramp"]):
        raise doc.error(f"{dotted(path)} is part of a batch ramp, and what it does is not known")
    if any(law == "batch" for _, _, law in layout.laws):
        layout.notes.append("the batch ramps up: both of its ends are moved by κ, so that the rule holds all along it")
    return layout


def nanogpt(doc: Document) -> Layout:
    """config/*.py or flags of train.py, which divides gradient_accumulation_steps by the number of processes."""
    layout = build(doc, "nanogpt")
    layout.parallel, layout.parallel_words = 1, "all processes together"
    layout.notes.append(
        "gradient_accumulation_steps is read as that of all processes, as train.py has divided it since 2023; in a "
        "copy that does not, multiply it by the processes first"
    )
    return layout


def megatron(doc: Document) -> Layout:
    """Flags of Megatron-LM, or the same names in YAML."""
    coupled = doc.get("decoupled_weight_decay") is False or bool(doc.get("no_decoupled_weight_decay"))
    old = doc.get("batch_size") is not None and doc.get("micro_batch_size") is None
    layout = build(doc, "megatron", decoupled=not coupled, rows={"micro": "batch_size"} if old else {})
    if doc.get("lr_warmup_iters"):
        layout.needs_length = "train_iters, train_samples or train_tokens"
    if (ramp := doc.get("rampup_batch_size")) is not None:
        if not isinstance(ramp, list) or len(ramp) != 3 or not all(isinstance(v, int) for v in ramp):
            raise doc.error(f"rampup_batch_size={ramp!r} must be start, increment and samples")
        layout.law("ramp", "rampup_batch_size")
        layout.notes.append("the batch ramps up: start and increment are moved by κ, its samples stay")
    return layout


def nemo(doc: Document) -> Layout:
    """NeMo's YAML and its Hydra overrides: model.micro_batch_size, model.optim, trainer.max_steps."""
    root = _root(doc, "model", "micro_batch_size", "global_batch_size")
    if doc.get((*root, "trainer", "accumulate_grad_batches")) not in (None, 1):
        raise doc.error("trainer.accumulate_grad_batches must be 1 where global_batch_size decides")
    return build(doc, "nemo", root=root, decoupled=True)
