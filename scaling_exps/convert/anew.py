"""A moved recipe as a new file of another trainer's form."""

from __future__ import annotations

import json
from typing import Any

from scaling_exps.convert.documents import Document, Path, Toml, dotted, spell
from scaling_exps.convert.forms import FORMS
from scaling_exps.convert.job import Edit, Recipe, whole
from scaling_exps.convert.yaml import Json, Yaml
from scaling_exps.rules import RuleError


def anew(edit: Edit, target: str, new_devices: int | None) -> tuple[str, Recipe]:
    """The moved recipe in another trainer's words; what it has no words for is noted."""
    form, base, source = FORMS[target], edit.base, edit.layout
    if base.optimizer not in form.optimizers:
        raise RuleError(
            f"no new {target} file is written for {base.optimizer}; there is: {', '.join(form.optimizers) or 'none'}"
        )
    parallel = base.parallel if new_devices is None else new_devices
    micro, accumulation = edit.split(parallel)
    batch = int(edit.move.batch)
    tree: dict[Path, Any] = {form.optimizer_path: form.optimizers[base.optimizer]}
    if target == "lightning":
        tree["data", "batch_size"] = micro or batch
    there = form.read(new_document(_dump(tree, form.syntax), form.syntax))
    packed: list[str] = []
    for name, value in edit.named(there.fields).items():
        path = there.fields[name][0]
        if there.packed and path[:-1] == there.packed:
            packed.append(f"{path[-1]}={value!r}")
        else:
            tree[path] = value
    if packed:
        tree[there.packed] = ",".join(packed)
    for slot, number in (
        (there.micro, micro or batch // (parallel or 1)),
        (there.accumulation, accumulation or 1),
        (there.whole, batch),
    ):
        if slot is not None:
            tree[slot[0]] = number
    steps = None if base.steps is None else edit.by("count", ("the length",), base.steps)
    epochs = None if base.epochs is None or base.epochs <= 0 else whole(base.epochs * edit.move.duration)
    warmup, place, called = base.warmup, there.warmup and there.warmup[0], "the warm-up in steps"
    if warmup is not None and warmup >= 1:
        warmup = edit.by("count", ("the warm-up",), warmup)
    elif warmup:
        place, called = (place, called) if steps else (None, "the warm-up as a share of the run")
        warmup = max(1, round(warmup * steps)) if steps and target != "hf" else warmup
        place = ("warmup_ratio",) if target == "hf" else place
    for called_, value, key in (
        ("the length in epochs", epochs, there.epochs and there.epochs[0]),
        ("the length in steps", steps, there.steps and there.steps[0]),
        (called, warmup or None, place),
    ):
        if value is not None and key:
            tree[key] = value
        elif value is not None:
            edit.notes.append(f"{called_}, {value}, has no place in {target}")
    for path, default, law in source.laws:
        value = edit.by(law, path, source.number((path, default)))
        if law == "ema" and target in ("plain", "timm"):
            tree |= {("ema",): value} if target == "plain" else {("model_ema",): True, ("model_ema_decay",): value}
        else:
            edit.notes.append(f"{dotted(path)}, {value} after the move, has no place in a new {target} file")
    edit.changes = [f"{dotted(p)}: {v}" for p, v in tree.items()]
    return _dump(tree, form.syntax), Recipe(
        base.optimizer, batch, micro, accumulation, parallel, edit.hyper, epochs, steps, warmup
    )


def new_document(text: str, syntax: str) -> Document:
    kinds: dict[str, type[Document]] = {"yaml": Yaml, "toml": Toml, "json": Json}
    return kinds[syntax](text, "what is written")


def _dump(tree: dict[Path, Any], syntax: str) -> str:
    nested: dict[Any, Any] = {}
    for path, value in tree.items():
        at = nested
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value

    def say(value: Any) -> str:
        return json.dumps(value) if isinstance(value, str) else spell(value)

    def yaml(part: dict[Any, Any], indent: str) -> str:
        return "".join(
            f"{indent}{k}:\n{yaml(v, indent + '  ')}" if isinstance(v, dict) else f"{indent}{k}: {say(v)}\n"
            for k, v in part.items()
        )

    if syntax == "json":
        return json.dumps(nested, indent=2) + "\n"
    if syntax == "yaml":
        return yaml(nested, "")
    return "\n".join(
        f"[{s}]\n" + "".join(f"{k} = {say(v)}\n" for k, v in values.items()) for s, values in nested.items()
    )
