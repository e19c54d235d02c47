"""Hugging Face's Trainer and those built on it: TRL, LLaMA-Factory, axolotl; and accelerate's own scripts.

Read in: transformers 5.24 TrainingArguments and trainer_optimizer.py; axolotl's and LLaMA-Factory's examples;
diffusers' and transformers' scripts without a Trainer. All take YAML, JSON or flags.
"""

from __future__ import annotations

import re
from typing import Any

from scaling_exps.convert.documents import Document, dotted, words
from scaling_exps.convert.layout import Layout, build, unpack

_TRL = words("hf", "trl")  # keys of its own


def hf(doc: Document, form: str = "hf") -> Layout:
    text = doc.get("lr_scheduler_kwargs")
    if isinstance(text, str) and re.search(r"lr|steps|timescale|T_", text):
        raise doc.error(f"lr_scheduler_kwargs={text!r} is text; write its keys out in YAML, so that they can be read")
    warm_up_as_share = doc.get("warmup_ratio") is not None and not any(
        doc.get(key) for key in ("warmup_steps", "num_warmup_steps", "lr_warmup_steps", "warmup_iters")
    )
    layout = build(doc, form, rows={"warmup": "warmup_ratio=0"} if warm_up_as_share else {})
    _optim_args(layout)
    notes = layout.notes
    if doc.get("learning_rate") is None:
        own = "TRL's trainers have others (2e-5 in SFT, 1e-6 in DPO and GRPO, 1e-4 in Reward)"
        if re.search(r"\btrl\b", doc.text) or any(map(doc.has, _TRL)):
            raise doc.error(f"no learning_rate is there, which is 5e-5 in the Trainer, and {own}: write it")
        notes.append(f"learning_rate is not in the file: 5e-5, the Trainer's default; {own}")
    if doc.syntax == "flags" and form == "hf":
        notes.append("flags are read as TrainingArguments', and a script's own parser may have other defaults")
    if doc.values.get(("num_mini_batches",)) == 1:  # of a rollout
        layout.law("kept", "num_mini_batches")
    if doc.get("loraplus_lr_ratio") and doc.get("loraplus_lr_embedding") is None:
        notes.append("loraplus_lr_embedding is not in the file: its default, an absolute rate (1e-6), stays")
    if doc.get("lr_scheduler_type") == "polynomial" and doc.get("lr_scheduler_kwargs.lr_end") is None:
        notes.append("lr_end of the polynomial schedule is not in the file: its default, 1e-7, stays")
    _timescale(layout)
    _saves(layout)
    if isinstance(doc.get("deepspeed"), str) and not doc.partners:
        notes.append(f"deepspeed={doc.get('deepspeed')} is not read: give it as --with, so that the pair is checked")
    return layout


def _saves(layout: Layout) -> None:
    """Saves that fall on evaluations go on doing so: the Trainer refuses others with load_best_model_at_end."""
    doc, save = layout.doc, ("save_steps",)
    by_steps = "steps" in (doc.get("eval_strategy"), doc.get("evaluation_strategy"))
    by_steps = by_steps and doc.get("save_strategy") in (None, "steps")
    key = next((k for k in ("eval_steps", "logging_steps") if doc.get(k) is not None), "eval_steps")
    if doc.get("load_best_model_at_end") and by_steps and (doc.get(save) is None) != (doc.get(key) is None):
        layout.law("count", save if doc.get(save) is None else key, default=500)
    saves, evals = layout.number((save, 500)), layout.number(((key,), 500))
    if saves >= 1 and evals >= 1 and saves % evals == 0:
        layout.within[save] = (key,), 500


def _timescale(layout: Layout) -> None:
    """Without a warm-up, transformers' inverse_sqrt takes a timescale of 10,000 steps, and with one the warm-up's."""
    doc, form = layout.doc, layout.form
    if "inverse_sqrt" not in (doc.get("lr_scheduler_type"), doc.get("lr_scheduler")) or layout.number(layout.warmup):
        return
    axolotls = form == "axolotl" and layout.warmup and doc.get(layout.warmup[0]) is None  # it has a warm-up by default
    if axolotls or doc.get("lr_scheduler_kwargs.timescale") is not None:
        return
    if doc.syntax == "flags" or form == "accelerate":
        layout.notes.append(
            "timescale of the inverse_sqrt schedule is not in the file: its default, 10000 steps, stays; N = 10000/κ "
            "in its place keeps it in samples"
        )
    else:
        layout.law("count", "lr_scheduler_kwargs.timescale", default=10_000)


def _optim_args(layout: Layout) -> None:
    """SGD and RMSprop have no keys of their own for momentum, alpha and eps: they stand in the text `optim_args`."""
    doc, row = layout.doc, layout.optimizer
    args: dict[str, Any] = {str(p[-1]): doc.get(p) for p in layout.under("optim_args")}
    args = args or unpack(doc, ("optim_args",))
    if row not in ("sgd", "torch_rmsprop"):
        if wrong := {"lr", "learning_rate", "beta1", "beta2", "betas", "eps", "weight_decay"} & set(args):
            names = ", ".join(sorted(wrong))
            raise doc.error(f"optim_args holds {names}; write what is meant in its own key")
        return
    layout.packed = ("optim_args",)
    if row == "torch_rmsprop":
        if any("bnb" in str(doc.get(key)) for key in ("optim", "optimizer")):
            raise doc.error("the Trainer hands optim_args to bitsandbytes' RMSprop as text: alpha cannot be set")
        if args.get("momentum") or str(args.get("centered", "")).lower() in ("true", "1", "yes"):
            raise doc.error("RMSprop with momentum or centered: no rule covers that")
        layout.fields["eps"] = (("optim_args", "eps"), 1e-8)
        layout.notes.append(
            "RMSprop: torch's, with alpha 0.99 and eps 1e-8 unless optim_args says otherwise "
            "(transformers before 5 ignores optim_args here)"
        )


def axolotl(doc: Document) -> Layout:
    layout = hf(doc, "axolotl")
    if doc.get("lr_scheduler") == "one_cycle" and doc.get("lr_scheduler_kwargs.cycle_momentum") is not False:
        raise doc.error(
            "lr_scheduler=one_cycle: torch's OneCycleLR overrides beta1 at every step, between 0.85 and 0.95 unless "
            "told otherwise: set lr_scheduler_kwargs: {cycle_momentum: false}, so that adam_beta1 counts"
        )
    if layout.warmup and doc.get(layout.warmup[0]) is None:
        layout.notes.append("no warm-up is in the file: axolotl takes 3% of the run, at most 100 steps")
    return layout


def accelerate(doc: Document) -> Layout:
    """Scripts around accelerate without a Trainer: diffusers' examples, transformers' `no_trainer` scripts."""
    diffusers = any(doc.get(k) is not None for k in ("lr_warmup_steps", "train_batch_size", "adam_weight_decay"))
    rows = {"weight_decay": "adam_weight_decay|weight_decay=1e-2", "warmup": "lr_warmup_steps|num_warmup_steps=500"}
    if doc.get("num_epochs") is not None:  # train_unconditional.py
        rows |= {"beta1": "adam_beta1=0.95", "weight_decay": "adam_weight_decay=1e-6"}
    layout = build(doc, "accelerate", rows=rows if diffusers else {})
    _timescale(layout)
    absent = [dotted(slot[0]) for name, slot in layout.fields.items() if name != "lr" and doc.get(slot[0]) is None]
    if absent:
        layout.notes.append(
            f"{', '.join(absent)} are not in the file: most scripts' defaults are taken, and some have others "
            "(adam_weight_decay is 1e-2 in train_text_to_image.py and 1e-4 in train_dreambooth_lora_sdxl.py): see yours"
        )
    if not diffusers:
        layout.notes.append("adam_beta1, adam_beta2, adam_epsilon are written as flags that your script must take")
    return layout


def llamafactory(doc: Document) -> Layout:
    """The second generation of LLaMA-Factory (v1): torch's AdamW by learning_rate alone, or by an optim_config."""
    section, rows = "optim_config", {}
    if doc.has(section):
        if doc.get(f"{section}.name") is None:
            raise doc.error(f"{section} is there without its name, which decides the optimizer: set {section}.name")
        if doc.get(f"{section}.lr") is None:
            raise doc.error(
                f"{section} has no lr, and whether learning_rate or 1e-4 counts then depends on the version: write it"
            )
        defaults = {"lr": "", "betas": "=[0.9, 0.999]", "eps": "=1e-8", "weight_decay": "=0.0"}
        rows = {"optimizer": f"{section}.name"} | {k: f"{section}.{k}{v}" for k, v in defaults.items()}
    layout = build(doc, "llamafactory", rows=rows)
    if not rows:
        layout.hint = "or name it, where your version reads optim_config: {name: adamw, lr, betas, eps, weight_decay}"
    if rows and doc.get("learning_rate") is not None:
        layout.notes.append(f"learning_rate stays: beside {section}.lr it sets nothing")
    if "dynamic" in str(doc.get("batching_strategy")):
        layout.notes.append(
            "batching_strategy is dynamic: the batch counts tokens, cutoff_len an example; κ is the same"
        )
    return layout
