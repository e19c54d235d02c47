"""Reinforcement learning of language models: OpenRLHF's flags, verl's YAML and its Hydra overrides.

Read in: OpenRLHF 0.8 train_ppo_ray.py, train_sft.py; verl 0.2 to 0.6, its actor, critic and optim configs (FSDP).
"""

from __future__ import annotations

import math

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, is_number
from scaling_exps.convert.layout import Layout, build

_ACTOR = "actor_rollout_ref.actor"


def openrlhf(doc: Document) -> Layout:
    """Every trainer of OpenRLHF: DeepSpeed's AdamW, `train_batch_size` completions (or examples) a step."""
    rollouts = any(doc.get(k) for k in ("actor_learning_rate", "rollout_batch_size", "n_samples_per_prompt"))
    critic = rollouts and doc.get("advantage_estimator") in (None, "gae")
    rows = {"lr": "actor_learning_rate|learning_rate"} if rollouts else {"lr": "learning_rate"}
    layout = build(doc, "openrlhf", rows=rows)
    if doc.get("micro_train_batch_size") is None:
        layout.micro = None
    if rollouts:
        prompts, each = (layout.number((key, d)) for key, d in ((("rollout_batch_size",), 1024),
                                                                (("n_samples_per_prompt",), 1)))  # fmt: skip
        layout.law("batch", "rollout_batch_size", default=1024)
        made, step = prompts * each, layout.number(layout.whole)
        if made % step:
            raise doc.error(
                f"a rollout makes {prompts} prompts × {each} completions = {made}, no multiple of train_batch_size="
                f"{step}: the last step of each is smaller, and the batch has no one value"
            )
        layout.notes.append(
            f"the batch counts completions; rollout_batch_size counts prompts, {each} completions each, and goes with "
            "it, so that a rollout stays as many steps. Groups keep their size: no rule for the optimizer makes "
            "another number of prompts a step equal"
        )
    if critic:
        layout.law("rate", "critic_learning_rate", default=9e-6)
        layout.notes.append(
            "the critic has the actor's betas and l2, and a learning rate of its own: it is moved as lr"
        )
    else:
        layout.law("kept", "critic_learning_rate")
    if doc.get("enable_ema"):
        layout.law("ema", "ema_beta", default=0.992)
    return layout


def verl(doc: Document) -> Layout:
    """verl's PPO and GRPO with FSDP: batches count prompts, each with `rollout.n` completions."""
    if "megatron" in (doc.get(f"{_ACTOR}.strategy"), doc.get("model_engine")):
        raise doc.error("strategy=megatron: Megatron's optimizer has keys of its own in verl, which are not known here")
    if not any(p[0] == "actor_rollout_ref" for p in doc.values):
        raise doc.error(f"no {_ACTOR} is there: of verl, its PPO trainer's recipe is known here, and no other")
    layout = build(doc, "verl")
    layout.model_parallel, layout.parallel_words, layout.unknown_degree = 1, "", ""  # those found are the rollout's
    kept = (
        "micro_batch_size micro_batch_size_per_gpu ppo_micro_batch_size ppo_micro_batch_size_per_gpu use_dynamic_bsz "
    )
    kept += (
        "log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu log_prob_use_dynamic_bsz nnodes n_gpus_per_node "
    )
    kept += "forward_micro_batch_size forward_micro_batch_size_per_gpu"
    layout.law("kept", *(p for p in doc.values if p[-1] in kept.split()))
    mini, each = (
        layout.whole_number(layout.whole) or 256,
        layout.whole_number((("actor_rollout_ref", "rollout", "n"), 1)),
    )
    assert each is not None
    prompts = layout.whole_number((("data", "train_batch_size"), 1024)) or 1024
    if prompts % mini:
        raise doc.error(
            f"data.train_batch_size={prompts} is no multiple of ppo_mini_batch_size={mini}: which one counts?"
        )
    layout.unit = f"prompts ({_ACTOR}.ppo_mini_batch_size) × {each} completions a prompt = {mini * each} a step"
    layout.notes += [
        f"--batch counts prompts here, as ppo_mini_batch_size does; data.train_batch_size goes with it, so that a "
        f"rollout stays {prompts // mini} steps",
        "eps is written into optim.override_optimizer_config, which verl reads since 0.6; earlier it stays at 1e-8",
    ]
    layout.law("batch", "data.train_batch_size", default=1024)
    if is_number(doc.get("data.gen_batch_size")):
        layout.law("batch", "data.gen_batch_size")
    micro = doc.get(f"{_ACTOR}.ppo_micro_batch_size_per_gpu")
    counts = doc.get("trainer.n_gpus_per_node"), doc.get("trainer.nnodes") or 1
    sharing = doc.get(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1
    known = all(isinstance(n, int) for n in (micro, sharing, *counts))
    if known and (devices := counts[0] * counts[1] // sharing) and not doc.get(f"{_ACTOR}.use_dynamic_bsz"):
        unit = micro * devices
        why = f"{each} completions each must fill {devices} data-parallel × {micro} (ppo_micro_batch_size_per_gpu)"
        layout.multiple = (unit // math.gcd(unit, each), why)
    if doc.get("algorithm.adv_estimator") in (None, "gae") or doc.get("critic.enable"):
        _critic(layout)
    else:
        layout.sections |= {"critic"}
        layout.notes.append("no critic is trained with this adv_estimator: its keys stay")
    if layout.clip and doc.get(layout.clip[0]) is None:
        layout.notes.append(
            "the clipping threshold is not in the file (1.0, under a key that differs by version): it stays"
        )
    return layout


def _critic(layout: Layout) -> None:
    """The critic's optimizer moves as the actor's does, each of its numbers by its own value."""
    doc, at = layout.doc, "critic.optim"
    row, _ = optimizers.find(doc.get(f"{at}.optimizer") or "AdamW", f"{at}.optimizer")
    if row != layout.optimizer:
        raise doc.error(f"{at}.optimizer is {row}, and the actor's is {layout.optimizer}: one rule for both is wanted")
    layout.law("rate", f"{at}.lr", default=1e-5)
    layout.law("as_betas", f"{at}.betas", default=[0.9, 0.999])
    layout.law("as_decay", f"{at}.weight_decay", default=0.01)
    layout.law("as_eps", f"{at}.override_optimizer_config.eps", default=1e-8)
    layout.law("count", f"{at}.lr_warmup_steps", f"{at}.total_training_steps")
    layout.law("kept", f"{at}.lr_warmup_steps_ratio", f"{at}.min_lr_ratio", f"{at}.warmup_style", "critic.ppo_epochs")
    size = doc.get("critic.ppo_mini_batch_size")
    if is_number(size) and size != layout.number(layout.whole):
        raise doc.error(f"critic.ppo_mini_batch_size={size} is not the actor's: two batches, and --batch is one")
    if is_number(size):
        layout.law("batch", "critic.ppo_mini_batch_size")
    layout.notes.append("the critic's lr, betas, eps and weight decay move as the actor's, each from its own value")
