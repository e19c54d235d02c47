"""A moved recipe as a new file of another trainer's form."""

from __future__ import annotations

import json
from typing import Any

from scaling_exps.convert.documents import KEYS, Document, Path, dotted, library, open_document, path_of, spell
from scaling_exps.convert.forms import FORMS
from scaling_exps.convert.job import Edit, Recipe
from scaling_exps.convert.layout import Layout, slot_of
from scaling_exps.rules import RuleError


def anew(edit: Edit, target: str, new_devices: int | None) -> tuple[Document, Recipe]:
    """The moved recipe in another trainer's words; what it has no words for is noted."""
    base, new = edit.base, KEYS[target]["new"]
    if base.optimizer not in new["optimizers"]:
        allowed = ", ".join(new["optimizers"]) or "none"
        raise RuleError(f"no new {target} file is written for {base.optimizer}; there is: {allowed}")
    moved = edit.moved(new_devices)
    optimizer = path_of(KEYS[target]["optimizer"].partition("=")[0])
    tree: dict[Path, Any] = {optimizer: new["optimizers"][base.optimizer]}
    micro = moved.micro or moved.batch // (moved.parallel or 1)
    if target == "lightning":
        tree["data", "batch_size"] = micro
    there = FORMS[target](open_document(_dump(tree, new["syntax"]), "what is written"))
    named = {there.fields[name][0]: value for name, value in edit.named(there.fields).items()}
    if there.packed:
        packed = {p[-1]: named.pop(p) for p in list(named) if p[:-1] == there.packed}
        named[there.packed] = ",".join(f"{k}={v!r}" for k, v in packed.items())
    tree |= named
    accumulation = (moved.micro and moved.accumulation) or 1
    sizes = ((there.micro, micro), (there.accumulation, accumulation), (there.whole, moved.batch))
    tree |= {slot[0]: number for slot, number in sizes if slot}
    warmup, place, called, note = moved.warmup, there.warmup, "the warm-up in steps", edit.notes.append
    if warmup and warmup < 1 and target == "hf":
        place = slot_of(there.doc, "warmup_ratio")
    elif warmup and warmup < 1 and moved.steps:
        warmup = max(1, round(warmup * moved.steps))
    elif warmup and warmup < 1:
        place, called = None, "the warm-up as a share of the run"
    if not warmup and "warmup" in new:
        place = slot_of(there.doc, new["warmup"])
    warmup = warmup or None
    if warmup is None and place and place[1]:
        warmup = 0
        note(f"the old file has no warm-up in steps: 0 is written, because {target}'s own is {place[1]}")
    epochs = moved.epochs
    if epochs and moved.steps:
        if edit.layout.epochs and edit.layout.get(edit.layout.epochs[0]) is not None:
            note(f"the length in epochs, {epochs}, is left out: there is one in steps")
        epochs = None
    elif epochs and not there.fractions:
        epochs = max(1, round(epochs))
        if epochs != moved.epochs:
            note(f"the length in epochs, {moved.epochs}, is written as {epochs}: {target} counts whole ones")
    how = edit.layout.doc.get("clip_mode") or edit.layout.doc.get("trainer.gradient_clip_algorithm") or "norm"
    clip = edit.clipped()
    if clip and how != "norm":
        note(f"clipping by {how}, {clip}, has no place in {target}: it clips the norm")
        clip = None
    if clip is None and there.clip and there.clip[1]:
        clip = new["no_clip"]
        note(f"the old file clips no norm: {clip} is written, because {target} clips at {there.clip[1]} by its default")
    for name, value, slot in (
        ("the length in epochs", epochs, there.epochs),
        ("the length in steps", moved.steps, there.steps),
        (called, warmup, place),
        ("the clipping threshold", clip, there.clip),
    ):
        if value is not None and slot:
            tree[slot[0]] = value
        elif value is not None:
            note(f"{name}, {value}, has no place in {target}")
    for path, default, law in edit.layout.laws:
        value = edit.by(law, path, edit.layout.number((path, default), many=True))
        if law == "ema" and target in ("plain", "timm"):
            tree |= {("ema",): value} if target == "plain" else {("model_ema",): True, ("model_ema_decay",): value}
        else:
            note(f"{dotted(path)}, {value} after the move, has no place in a new {target} file")
    if there.whole is None and moved.parallel:
        note(f"the new file is meant for {moved.parallel} data-parallel")
    note(f"{target} cannot express: {new['cannot']}")
    if edit.layout.form == "timm" and base.optimizer == "sgd" and edit.layout.get(edit.layout.named) != "momentum":
        note("timm's SGD has Nesterov's momentum, and the new file asks for none")
    left = _left(edit.layout)
    note("the schedule of the rate is not written" + f"; nor are {', '.join(left)}" * bool(left))
    edit.changes = [f"{dotted(p)}: {v}" for p, v in tree.items()]
    return open_document(_dump(tree, new["syntax"]), "what is written"), moved


def _left(layout: Layout) -> list[str]:
    """The keys of the old file, with their values, of which nothing else is said."""
    slots = [layout.micro, layout.accumulation, layout.whole, layout.devices, layout.steps, layout.epochs]
    slots += [layout.warmup, layout.clip, *layout.fields.values()]
    said = {layout.named, layout.packed, *(slot[0] for slot in slots if slot), *(path for path, _, _ in layout.laws)}
    values = layout.doc.values.items()
    return [f"{dotted(path)}={str(v)[:40]}" for path, v in values if path not in said and v not in (None, "")]


def _dump(tree: dict[Path, Any], syntax: str) -> str:
    nested: dict[Any, Any] = {}
    for path, value in tree.items():
        at = nested
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value

    def yaml(part: dict[Any, Any], indent: str) -> str:
        return "".join(
            f"{indent}{k}:\n{yaml(v, indent + '  ')}"
            if isinstance(v, dict)
            else f"{indent}{k}: {json.dumps(v) if isinstance(v, str) else spell(v)}\n"
            for k, v in part.items()
        )

    if syntax == "toml":
        return str(library("tomlkit").dumps(nested))
    return yaml(nested, "") if syntax == "yaml" else json.dumps(nested, indent=2) + "\n"
