"""Recipes in and out of other trainers: read the base recipe, scale it, write it back.

    scalerun convert in.yaml --from hf --to hf --batch 8192

Where --from and --to agree the file is edited in place of its values: what the rule does not move stays as it was, to
the byte. Where they differ a new file holds what the other trainer has words for. The recipe goes to standard output
(or -o FILE), what was done and what the format cannot express to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from scaling_exps.convert.documents import Path, spell
from scaling_exps.convert.formats import FORMATS, KINDS, Layout
from scaling_exps.rules import BetaMap, Hyper, Move, Rule, RuleError, find


@dataclass(frozen=True)
class Recipe:
    """What every format says in its own words. `batch` is global; `micro` examples a device and micro-batch."""

    optimizer: str
    batch: int
    micro: int | None
    devices: int
    hyper: Hyper
    ema: float | None
    epochs: float | None
    steps: int | None
    warmup: float | None


@dataclass(frozen=True)
class Conversion:
    text: str
    base: Recipe
    scaled: Recipe
    rule: Rule
    changes: tuple[str, ...]  # "optimizer.lr: 0.001 -> 0.002"
    notes: tuple[str, ...]


def convert(
    text: str,
    source: str,
    target: str,
    batch: int,
    *,
    rule: str | None = None,
    devices: int = 1,
    new_devices: int | None = None,
    duration: float = 1.0,
    noise_scale: float | None = None,
    beta_map: BetaMap = "linear",
    where: str = "the recipe",
) -> Conversion:
    """Move the recipe in `text` to the global batch `batch`.

    Args:
        text: a recipe in the form `source`.
        source, target: names of FORMATS.
        batch: new global batch, in examples.
        rule: a rule's name; the optimizer's own where None.
        devices: data-parallel devices of the base, where the file does not say.
        new_devices: those of the new run; None is as many.
        duration, noise_scale, beta_map: as in `scale`.
        where: how messages call the file.

    Raises:
        RuleError: what is missing, unknown, not a number, or refused by the rule.
    """
    for name in (source, target):
        if name not in FORMATS:
            raise RuleError(f"unknown format {name!r}; allowed: {', '.join(FORMATS)}")
    for name, value in (("batch", batch), ("devices", devices), ("new_devices", new_devices or 1)):
        if value < 1:
            raise RuleError(f"{name}={value} must be >= 1")
    layout = FORMATS[source].read(text, where)
    base = _read(layout, devices)
    kind = KINDS[base.optimizer]
    chosen = find(rule or kind.default("match"), kind.family, l2=not kind.decoupled and base.hyper.weight_decay > 0)
    move = Move(base.batch, batch, duration, noise_scale, beta_map)
    kappa = move.kappa
    count = duration / kappa
    scaled = Recipe(
        base.optimizer,
        batch,
        base.micro,
        new_devices or base.devices,
        chosen.scale(base.hyper, move),
        None if base.ema is None else chosen.ema(base.ema, kappa),
        None if base.epochs is None else _whole(base.epochs * duration),
        None if base.steps is None else _round(base.steps * count),
        None if base.warmup is None else _round(base.warmup * count) if base.warmup >= 1 else base.warmup,
    )
    edit = _Edit(layout, base, scaled, count)
    if source == target:
        edit.in_place(new_devices)
        out = edit.layout.doc.render()
    else:
        out = edit.anew(target)
    again = _read(FORMATS[target].read(out, "what was written"), scaled.devices)
    wanted = (scaled.batch, scaled.hyper, scaled.steps if edit.writes_steps else None)
    assert (again.batch, again.hyper, again.steps if edit.writes_steps else None) == wanted, (again, scaled)
    notes = [
        chosen.answers(kind.family),
        f"rule {chosen.name} leaves alone: {chosen.leaves_alone}",
        *layout.notes,
        *edit.notes,
        f"{target} cannot express: {FORMATS[target].cannot}",
    ]
    if duration != 1 and not chosen.moves_duration:
        notes.append(f"rule {chosen.name} does not know of a changed duration; `completed` and `adamw_timescale` do")
    if layout.clipping and (clip := _get(layout, *layout.clipping)):
        name = ".".join(layout.clipping[0])
        notes.append(
            f"{name}={clip:g}: clipping is outside the rule; the same clip rate needs {clip / math.sqrt(kappa):.4g} "
            "where noise dominates the gradient"
        )
    return Conversion(out, base, scaled, chosen, tuple(edit.changes), tuple(notes))


def _get(layout: Layout, path: Path, default: Any = None) -> Any:
    value = layout.doc.get(path)
    value = default if value is None else value
    if isinstance(value, str | bool):
        raise RuleError(
            f"{layout.doc.where}: {'.'.join(path)}={value!r} must be a number"
            + ("; set it in this file, or convert the file that decides it" if value == "auto" else "")
        )
    return value


def _read(layout: Layout, devices: int) -> Recipe:
    devices = layout.devices or devices
    where = layout.doc.where
    micro = None if layout.micro is None else _get(layout, layout.micro)
    whole = None if layout.whole is None else _get(layout, layout.whole)
    accumulation = 1 if layout.accumulation is None else _get(layout, layout.accumulation, 1)
    for value in (micro, whole, accumulation):
        if value is not None and (not isinstance(value, int) or value < 1) and value != -1:
            raise RuleError(f"{where}: a batch size or accumulation of {value!r}; it must be a whole number >= 1")
    if whole in (None, -1) and micro is None:
        named = " or ".join(".".join(p) for p in (layout.whole, layout.micro) if p)
        raise RuleError(
            f"{where} has no batch size, and a recipe cannot be scaled without the one it was tuned at: set {named}"
        )
    batch: int = whole if whole not in (None, -1) else (micro or 0) * accumulation * devices
    if micro is None and layout.micro is not None:  # DeepSpeed works it out
        micro = max(1, batch // (accumulation * devices))
    values = {name: _get(layout, *at) for name, at in layout.fields.items()}
    if values["lr"] is None and layout.rate_at is not None:
        values["lr"] = layout.rate_at(batch)
    missing = [".".join(layout.fields[n][0]) for n, v in values.items() if v is None]
    if missing:
        raise RuleError(f"{where} has no {', '.join(missing)}: add what is missing")
    betas = values.get("betas", [values[n] for n in ("beta1", "beta2", "momentum", "alpha") if n in values])
    if not isinstance(betas, list) or not all(isinstance(b, int | float) for b in betas):
        raise RuleError(f"{where}: betas={betas!r} must be numbers")
    steps, epochs = (None if p is None else _get(layout, p) for p in (layout.steps, layout.epochs))
    steps = steps if steps is not None and steps > 0 else None
    if layout.lengthless and steps is None and epochs is None:
        named = " or ".join(".".join(p) for p in (layout.steps, layout.epochs) if p)
        raise RuleError(
            f"{where} has a schedule in steps without its length: set {named}, so that it ends with the data"
        )
    return Recipe(
        layout.optimizer,
        batch,
        micro,
        devices,
        Hyper(
            float(values["lr"]), tuple(map(float, betas)), float(values.get("eps", 0)), float(values["weight_decay"])
        ),
        values.get("ema"),
        epochs,
        steps,
        None if layout.warmup is None else _get(layout, *layout.warmup),
    )


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def _round(x: float) -> int:
    return max(1, round(x))


class _Edit:
    """Writes the scaled recipe, and keeps account of it."""

    def __init__(self, layout: Layout, base: Recipe, scaled: Recipe, count: float) -> None:
        self.layout, self.base, self.scaled, self.count = layout, base, scaled, count
        self.source = layout.doc.where
        self.changes: list[str] = []
        self.notes: list[str] = []
        self.writes_steps = False

    def _put(self, path: Path, new: Any, default: Any = None) -> None:
        old = self.layout.doc.get(path)
        shown = old if old is not None else default
        if new == shown and (old is not None or default is not None):
            return
        self.layout.doc.set(path, new)
        was = "(not there)" if shown is None else f"{shown}" + (" (default)" if old is None else "")
        self.changes.append(f"{'.'.join(path)}: {was} -> {new}")

    def in_place(self, new_devices: int | None) -> None:
        layout, scaled = self.layout, self.scaled
        for name, value in self._values(scaled).items():
            path, default = layout.fields[name]
            self._put(path, value, default)
        micro, accumulation = self._split()
        if layout.micro is not None:
            self._put(layout.micro, micro, self.base.micro)
            get = layout.doc.get
            if layout.accumulation is not None and not (  # DeepSpeed works it out of the other two
                layout.whole and get(layout.whole) and get(layout.micro) and get(layout.accumulation) is None
            ):
                self._put(layout.accumulation, accumulation, 1)
        if layout.whole is not None and (layout.doc.get(layout.whole) is not None or layout.accumulation is None):
            self._put(layout.whole, scaled.batch, self.base.batch)
        if new_devices is not None and layout.devices is not None and layout.devices_path is not None:
            self._put(layout.devices_path, new_devices)
        for path in layout.rates:
            if (rate := _get(layout, path)) is not None:
                self._put(path, rate * scaled.hyper.lr / self.base.hyper.lr)
        if layout.epochs is not None and self.base.epochs is not None:
            self._put(layout.epochs, scaled.epochs)
        counts = [
            (layout.steps, None),
            *([layout.warmup] if layout.warmup else []),
            *((c, None) for c in layout.counts),
        ]
        for at, default in counts:
            if at is None or (old := _get(layout, at, default)) is None:
                continue
            if isinstance(old, list):
                self._put(at, [self._steps(at, x) for x in old])
            elif old >= 1:
                self._put(at, self._steps(at, old), default)
        self.writes_steps = True

    def _steps(self, path: Path, old: float) -> int:
        exact = old * self.count
        if abs(exact - round(exact)) > 1e-9:
            self.notes.append(f"{'.'.join(path)}: {old} steps become {exact:.6g}, written {_round(exact)}")
        return _round(exact)

    def _split(self) -> tuple[int | None, int]:
        """(micro-batch, accumulation): the micro-batch stays, because a network may normalise over it."""
        batch, devices, micro = self.scaled.batch, self.scaled.devices, self.scaled.micro
        if micro is None:
            return None, 1
        share = batch / devices
        if batch % (micro * devices) == 0:
            return micro, batch // (micro * devices)
        if share < micro and batch % devices == 0:
            self.notes.append(
                f"micro-batch {micro} -> {int(share)}: the new batch is smaller than one micro-batch on every device; "
                "a network that normalises over the micro-batch now sees fewer examples"
            )
            return int(share), 1
        unit = micro * devices
        low = batch // unit * unit
        raise RuleError(
            f"batch {batch} is no multiple of micro-batch {micro} x {devices} devices = {unit}; nearest that fit: "
            + " and ".join(str(b) for b in (low, low + unit) if b)
        )

    def _values(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe's numbers by the names of this layout's fields."""
        h = recipe.hyper
        named: dict[str, Any] = {
            "lr": h.lr,
            "eps": h.eps,
            "weight_decay": h.weight_decay,
            "betas": list(h.betas),
            "ema": recipe.ema,
        }
        if len(h.betas) == 2:
            named |= {"beta1": h.betas[0], "beta2": h.betas[1]}
        elif h.betas:
            named |= {"momentum": h.betas[0], "alpha": h.betas[0]}
        return {n: named[n] for n in self.layout.fields}

    def anew(self, target: str) -> str:
        """The scaled recipe in another trainer's words; what it has no words for is noted."""
        form, scaled = FORMATS[target], self.scaled
        if scaled.optimizer not in form.optimizers:
            raise RuleError(
                f"{target} has no optimizer {scaled.optimizer}; it has: {', '.join(sorted(set(form.optimizers)))}"
            )
        tree: dict[Path, Any] = {form.optimizer_path: form.optimizers[scaled.optimizer]}
        self.layout = there = form.read(_dump(tree, form.syntax), "what is written")
        if there.lengthless and scaled.steps is None:
            raise RuleError(f"{target} counts its length in steps, and {self.source} gives none: set it there in steps")
        if scaled.ema is not None:
            if target == "plain":
                there.fields["ema"] = (("ema",), None)
            elif target == "timm":
                tree["model_ema",] = True
                there.fields["ema"] = (("model_ema_decay",), None)
            else:
                self.notes.append(f"the model average's decay {scaled.ema:.8g} has no place in {target}")
        for name, value in self._values(scaled).items():
            tree[there.fields[name][0]] = value
        if not {"betas", "beta1", "momentum", "alpha"} & set(there.fields) and any(scaled.hyper.betas):
            raise RuleError(f"{target} cannot express the momentum {scaled.hyper.betas[0]:g} of {scaled.optimizer}")
        micro, accumulation = self._split()
        if there.micro is not None:
            tree[there.micro] = micro or scaled.batch // scaled.devices
        if there.accumulation is not None:
            tree[there.accumulation] = accumulation
        if there.whole is not None:
            tree[there.whole] = scaled.batch
        warmup, place, called = scaled.warmup, there.warmup[0] if there.warmup else None, "the warm-up in steps"
        if warmup is not None and 0 < warmup < 1:
            if scaled.steps is None:
                place, called = None, "the warm-up as a share of the run"
            else:
                warmup = _round(warmup * scaled.steps)
        for name, value, path in (
            ("the length in epochs", scaled.epochs, there.epochs),
            ("the length in steps", scaled.steps, there.steps),
            (called, warmup, place),
        ):
            if value is None:
                continue
            if path is None:
                self.notes.append(f"{name}, {value}, has no place in {target}")
            else:
                tree[path] = value
                self.writes_steps |= path == there.steps
        self.changes = [f"{'.'.join(p)}: {v}" for p, v in tree.items()]
        return _dump(tree, form.syntax)


def _dump(tree: dict[Path, Any], syntax: str) -> str:
    nested: dict[str, Any] = {}
    for path, value in tree.items():
        here = nested
        for key in path[:-1]:
            here = here.setdefault(key, {})
        here[path[-1]] = value
    if syntax == "json":
        return json.dumps(nested, indent=2) + "\n"
    if syntax == "yaml":
        return _yaml(nested, "")
    return "\n".join(
        f"[{section}]\n" + "".join(f"{k} = {_spell(v)}\n" for k, v in values.items())
        for section, values in nested.items()
    )


def _yaml(nested: dict[str, Any], indent: str) -> str:
    return "".join(
        f"{indent}{k}:\n{_yaml(v, indent + '  ')}" if isinstance(v, dict) else f"{indent}{k}: {_spell(v)}\n"
        for k, v in nested.items()
    )


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_spell, value)) + "]"
    return spell(value) if isinstance(value, float) else json.dumps(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scalerun convert", description="Move a recipe of this or another trainer to another batch size."
    )
    parser.add_argument("file", help="the base recipe; - is standard input")
    parser.add_argument("--from", dest="source", required=True, choices=list(FORMATS))
    parser.add_argument("--to", dest="target", choices=list(FORMATS), help="default: as --from")
    parser.add_argument("--batch", type=int, required=True, help="new global batch, in examples")
    parser.add_argument("--rule", help="default: the optimizer's own, see docs/rules.md")
    parser.add_argument("--devices", type=int, default=1, help="data-parallel devices of the base (default 1)")
    parser.add_argument("--new-devices", type=int, help="those of the new run (default: as many)")
    parser.add_argument("--duration", type=float, default=1.0, help="new budget / base budget in samples (default 1)")
    parser.add_argument("--noise-scale", type=float, help="measured gradient-noise scale, in examples")
    parser.add_argument("--beta-map", choices=["linear", "power"], default="linear")
    parser.add_argument("-o", "--output", help="file to write (default: standard output)")
    return parser


def main(argv: Sequence[str]) -> int:
    """`scalerun convert`: 0, or 2 with one message where the recipe or the request is at fault."""
    try:
        a = _parser().parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    try:
        text = sys.stdin.read() if a.file == "-" else File(a.file).read_text()
        done = convert(
            text,
            a.source,
            a.target or a.source,
            a.batch,
            rule=a.rule,
            devices=a.devices,
            new_devices=a.new_devices,
            duration=a.duration,
            noise_scale=a.noise_scale,
            beta_map=a.beta_map,
            where=a.file,
        )
        if a.output:
            File(a.output).write_text(done.text)
        else:
            sys.stdout.write(done.text)
    except (RuleError, OSError, UnicodeDecodeError) as e:
        print(f"scalerun convert: {e}", file=sys.stderr)
        return 2
    print(
        f"{a.file}: batch {done.base.batch} on {done.base.devices} device(s) -> {done.scaled.batch} on "
        f"{done.scaled.devices}, κ = {done.scaled.batch / done.base.batch:g}, rule {done.rule.name}",
        *(f"  {c}" for c in done.changes),
        *(f"note: {n}" for n in done.notes),
        sep="\n",
        file=sys.stderr,
    )
    return 0
