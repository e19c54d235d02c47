"""Read a layout's numbers, move them, write them back, and keep account of every change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from scaling_exps.convert.documents import Path, dotted
from scaling_exps.convert.layout import Layout, Slot, share
from scaling_exps.rules import Hyper, Move, Rule, RuleError

Clip = Literal["keep", "rule"]


@dataclass(frozen=True)
class Recipe:
    """What every form says in its own words. `batch` is global; `micro` examples a device and micro-batch."""

    optimizer: str
    batch: int
    micro: int | None
    accumulation: int | None
    parallel: int | None  # data-parallel degree
    hyper: Hyper
    epochs: float | None
    steps: float | None
    warmup: float | None


def read(layout: Layout, devices: int | None) -> Recipe:
    """The numbers of a layout.

    Args:
        devices: of the base run, all of them, where the file does not say.

    Raises:
        RuleError: what is missing, or no number, or says two things at once.
    """
    where = layout.doc.where
    whole, micro, accumulation = map(layout.whole_number, (layout.whole, layout.micro, layout.accumulation))
    parallel = layout.parallel
    if whole is None and layout.unknown_degree:
        raise RuleError(
            f"{where}: {layout.unknown_degree} does not say how many devices share one replica: write a number"
        )
    if devices is not None and layout.form != "nanogpt" and not layout.unknown_degree:
        given = share(devices, layout)
        if parallel is not None and given != parallel:
            raise RuleError(
                f"{where} says {parallel} data-parallel, and --devices {devices} makes {given}: which one counts?"
            )
        parallel = given
    if whole is None and micro is None:
        named = " or ".join(dotted(s[0]) for s in (layout.whole, layout.micro) if s)
        raise RuleError(
            f"{where} has no batch size, and a recipe cannot be scaled without the one it was tuned at: set {named}"
        )
    if whole is None and parallel is None:
        shared = (
            f", of which {layout.model_parallel} share a replica ({layout.parallel_words.strip(' /')})"
            if layout.model_parallel > 1
            else ""
        )
        raise RuleError(
            f"{where} counts its batch per device ({_key(layout.micro)}={micro}), and the data-parallel degree "
            "is not in "
            f"it: give --devices N, all devices of the base run{shared}"
        )
    batch = whole if whole is not None else (micro or 1) * (accumulation or 1) * (parallel or 1)
    if whole is not None and micro is not None and parallel is not None:
        unit = micro * parallel * (accumulation or 1)
        if batch % unit or (accumulation and unit != batch):
            raise RuleError(
                f"{where}: {_key(layout.whole)}={whole} is not {micro} per device x {parallel} "
                "data-parallel"
                f"{f' x {accumulation} accumulation' if accumulation else ', nor a multiple of it'}"
            )
    fields = dict(layout.fields)
    values = {name: layout.number(slot) for name, slot in fields.items()}
    if values["lr"] is None and layout.rate_at is not None:
        values["lr"] = layout.rate_at(batch)
    if missing := [dotted(fields[n][0]) for n, v in values.items() if v is None]:
        raise RuleError(f"{where} has no {', '.join(missing)}: add what is missing")
    betas = values.get("betas", [values[n] for n in ("beta1", "beta2", "momentum", "alpha") if n in values])
    two = "betas" in values or "beta1" in values
    if (
        not isinstance(betas, list)
        or len(betas) != 1 + two
        or any(isinstance(v, list) for n, v in values.items() if n != "betas")
    ):
        raise RuleError(f"{where}: betas={betas!r}, lr={values['lr']!r}: two betas and single numbers are expected")
    try:
        hyper = Hyper(
            float(values["lr"]), tuple(map(float, betas)), float(values.get("eps", 0)), float(values["weight_decay"])
        )
    except RuleError as e:
        raise RuleError(f"{where}: {e}") from None
    steps, epochs, warmup = map(layout.number, (layout.steps, layout.epochs, layout.warmup))
    steps = steps if steps is not None and steps > 0 else None
    samples = any(layout.doc.get((k,)) for k in ("train_samples", "train_tokens"))
    if layout.needs_length and steps is None and epochs is None and not samples:
        raise RuleError(
            f"{where} has a schedule in steps without its length: set {layout.needs_length}, so that it ends with "
            "the data"
        )
    return Recipe(layout.optimizer, batch, micro, accumulation, parallel, hyper, epochs, steps, warmup)


def sentence(layout: Layout, base: Recipe) -> str:
    """How the base batch came about: "base: 4 per device × 8 data-parallel × 2 accumulation = 64"."""
    words = layout.parallel_words.strip()
    if base.micro is None or base.parallel is None:
        assert layout.whole is not None
        rest = f", {base.micro} per device a micro-batch" if base.micro else ""
        return f"base: {base.batch} ({_key(layout.whole)}{rest})"
    accumulation = base.accumulation or base.batch // (base.micro * base.parallel)
    if layout.form == "nanogpt":
        return f"base: {base.micro} per device × {accumulation} accumulation ({words}) = {base.batch}"
    if layout.model_parallel > 1 and words.startswith("/"):
        words = f"{base.parallel * layout.model_parallel} devices {words}"
    how = f" ({words.strip(' ()')})" if words else ""
    shares = f"{base.micro} per device × {base.parallel} data-parallel{how} × {accumulation} accumulation"
    return f"base: {shares} = {base.batch}"


class Edit:
    """Writes the moved recipe, and keeps account of it."""

    def __init__(self, layout: Layout, base: Recipe, move: Move, rule: Rule, clip: Clip) -> None:
        self.layout, self.base, self.move, self.rule, self.clip = layout, base, move, rule, clip
        self.count = move.duration / move.kappa
        self.hyper = rule.scale(base.hyper, move)
        self.changes: list[str] = []
        self.notes: list[str] = []

    def put(self, slot: Slot, new: Any, why: str = "default") -> None:
        path, default = slot
        if not path:
            if new != default:
                raise RuleError(
                    f"{self.layout.doc.where}: {self.layout.form} has no key for what is {default} by its default, "
                    "and rule "
                    f"{self.rule.name} moves it to {new}: the recipe cannot be written whole. --rule lr_only moves "
                    "lr alone "
                    "(a control)"
                )
            return
        old = self.layout.get(path)
        shown = old if old is not None else default
        if new == shown:
            return
        self.layout.put(path, new)
        was = "(not there)" if shown is None else f"{shown}" + (f" ({why})" if old is None else "")
        self.changes.append(f"{dotted(path)}: {was} -> {new}")

    def in_place(self, new_devices: int | None) -> Recipe:
        layout, base = self.layout, self.base
        fields = layout.fields
        for name, value in self.named(fields).items():
            slot = fields[name]
            if name == "lr" and layout.get(slot[0]) is None and layout.rate_at is not None:
                self.put((slot[0], base.hyper.lr), value, "the trainer's, at this batch")
            else:
                self.put(slot, value)
        parallel = base.parallel if new_devices is None else share(new_devices, layout)
        micro, accumulation = self.split(parallel)
        batch = int(self.move.batch)
        if micro is not None and layout.micro is not None:
            self.put((layout.micro[0], base.micro), micro)
        if (
            accumulation is not None
            and layout.accumulation is not None
            and (base.accumulation or layout.get(layout.accumulation[0]) or not layout.whole)
        ):
            self.put((layout.accumulation[0], base.accumulation), accumulation)
        if layout.whole is not None and (layout.get(layout.whole[0]) not in (None, -1) or layout.accumulation is None):
            self.put((layout.whole[0], base.batch), batch)
        if new_devices is not None and layout.devices is not None:
            self.put(layout.devices, new_devices // layout.nodes)
        elif (
            new_devices is not None
            and layout.form == "torchtitan"
            and layout.parallel is not None
            and parallel != layout.parallel
        ):
            raise RuleError(
                f"{layout.doc.where} names its data-parallel degrees: change those in the file, then convert"
            )
        for path, default, law in layout.laws:
            value = layout.number((path, default))
            self.put((path, default), self.by(law, path, value))
        if layout.group is not None and batch % layout.number(layout.group):
            size = layout.number(layout.group)
            raise RuleError(
                f"batch {batch} is no multiple of {dotted(layout.group[0])}={size}, the completions that share a "
                "prompt; "
                f"nearest: {batch // size * size} and {(batch // size + 1) * size}"
            )
        epochs, steps, warmup = base.epochs, base.steps, base.warmup
        if layout.epochs is not None and epochs is not None and epochs > 0:
            epochs = whole(epochs * self.move.duration)
            self.put(layout.epochs, epochs)
        if layout.steps is not None and steps is not None:
            steps = self.by("count", layout.steps[0], steps)
            self.put(layout.steps, steps)
        if layout.warmup is not None and warmup is not None:
            warmup = self.by("count", layout.warmup[0], warmup)
            self.put(layout.warmup, warmup)
        self._clip()
        moved = Recipe(base.optimizer, batch, micro, accumulation, parallel, self.hyper, epochs, steps, warmup)
        changed = {c.split(": ", 1)[0] for c in self.changes}
        for path, value in layout.doc.wanted.items():
            if dotted(path) not in changed and path != layout.packed:
                self.changes.append(
                    f"{dotted(path)}: {layout.doc.values[path]} -> {value} (the same place in the file)"
                )
        return moved

    def by(self, law: str, path: Path, value: Any) -> Any:
        if isinstance(value, list) and law != "ramp":
            return [self.by(law, path, v) for v in value]
        if law == "rate":
            return value * (self.hyper.lr / self.base.hyper.lr)
        if law == "count":
            return value if value < 1 else self.steps(path, value)
        if law == "samples":
            return whole(value * self.move.duration)
        if law == "ema":
            return self.rule.ema(value, self.move.kappa)
        if law == "per_step":
            return value * self.move.kappa
        if law == "beta":
            try:
                return self.rule.scale(
                    replace(self.base.hyper, betas=(value, *self.base.hyper.betas[1:])), self.move
                ).betas[0]
            except RuleError as e:
                raise RuleError(f"{dotted(path)}: {e}") from None
        if law == "ramp":
            return [self.by("batch", path, v) for v in value[:2]] + value[2:]
        new = value * self.move.kappa
        if abs(new - round(new)) > 1e-9:
            raise RuleError(
                f"{self.layout.doc.where}: {dotted(path)}={value} would become {new:g}, which is no whole number of "
                "examples"
            )
        return round(new)

    def steps(self, path: Path, old: float) -> int:
        exact = old * self.count
        new = max(1, round(exact))
        if abs(exact - new) > 1e-9:
            self.notes.append(f"{dotted(path)}: {old} steps become {exact:.6g}, written {new}")
        return new

    def _clip(self) -> None:
        slot = self.layout.clip
        value = self.layout.number(slot)
        if slot is None or not value or value < 0 or self.move.kappa == 1:
            return
        new = value / math.sqrt(self.move.kappa)
        if self.clip == "rule":
            self.put(slot, new)
        else:
            self.notes.append(
                f"{dotted(slot[0])}={value:g} is kept: clipping is outside the rule. Where noise dominates, the "
                "gradient's norm "
                f"goes as 1/√κ and the same clip rate needs {new:.4g}; --clip rule writes that, as one MLPerf "
                "benchmark prescribes"
            )

    def split(self, parallel: int | None) -> tuple[int | None, int | None]:
        """(micro-batch, accumulation): the micro-batch stays, because a network may normalise over it."""
        layout, base, batch = self.layout, self.base, int(self.move.batch)
        micro = base.micro
        if micro is None or parallel is None:
            unit = micro or 1
            if batch % unit:
                raise RuleError(f"batch {batch} is no multiple of the micro-batch {unit}")
            if base.micro is not None:
                return micro, None
            if layout.micro is None:
                return None, None
            new = (base.accumulation or 1) * self.move.kappa
            if new >= 1 and new == int(new) and layout.accumulation is not None:
                self.put((layout.accumulation[0], 1), int(new))
            else:
                self.notes.append(
                    f"{_key(layout.micro)} is not in the file: the micro-batch changes with the batch; "
                    "a network that normalises over it sees another number of examples"
                )
            return None, None
        if layout.form == "nanogpt":
            parallel = 1
        if layout.accumulation is None and layout.whole is None:  # no word for accumulation: the device takes it
            if batch % parallel:
                raise RuleError(f"batch {batch} is no multiple of {parallel} data-parallel devices")
            if batch // parallel != micro:
                self.notes.append(
                    f"this layout has no accumulation: {_key(layout.micro)} {micro} -> {batch // parallel} per "
                    "device; "
                    "more devices (--new-devices) would leave it"
                )
            return batch // parallel, None
        if batch % (micro * parallel) == 0:
            return micro, batch // (micro * parallel)
        if batch < micro * parallel and batch % parallel == 0:
            self.notes.append(
                f"micro-batch {micro} -> {batch // parallel}: the new batch is smaller than one micro-batch on every "
                "device; "
                "a network that normalises over the micro-batch now sees fewer examples"
            )
            return batch // parallel, 1
        unit = micro * parallel
        low = batch // unit * unit
        raise RuleError(
            f"batch {batch} is no multiple of micro-batch {micro} x {parallel} data-parallel = {unit}; nearest that "
            "fit: " + " and ".join(str(b) for b in (low, low + unit) if b)
        )

    def named(self, fields: dict[str, Slot]) -> dict[str, Any]:
        """The moved hyperparameters by the names of a layout's fields."""
        h = self.hyper
        values: dict[str, Any] = {"lr": h.lr, "eps": h.eps, "weight_decay": h.weight_decay, "betas": list(h.betas)}
        if len(h.betas) == 2:
            values |= {"beta1": h.betas[0], "beta2": h.betas[1]}
        elif h.betas:
            values |= {"momentum": h.betas[0], "alpha": h.betas[0]}
        return {n: values[n] for n in fields}


def _key(slot: Slot | None) -> str:
    return dotted(slot[0]) if slot else ""


def whole(x: float) -> float:
    return int(x) if x == int(x) else x
