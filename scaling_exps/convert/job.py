"""Read a layout's numbers, move them, write them back, and keep account of every change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from scaling_exps.convert.documents import Path, dotted
from scaling_exps.convert.layout import Layout, Slot, share
from scaling_exps.rules import CLIP_KEPT, OPTIMIZERS, Clip, Hyper, Move, Rule, RuleError

_NORMALISE = "a network that normalises over the micro-batch sees another number of examples"


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
    error = layout.doc.error
    whole, micro, accumulation = map(layout.whole_number, (layout.whole, layout.micro, layout.accumulation))
    parallel = layout.parallel
    if whole is None and layout.unknown_degree:
        raise error(f"{layout.unknown_degree} does not say how many devices share one replica: write a number")
    if devices is not None and not layout.together and not layout.unknown_degree:
        given = share(devices, layout)
        if parallel not in (None, given):
            raise error(f"it says {parallel} data-parallel, and --devices {devices} makes {given}: which one counts?")
        parallel = given
    unit = (micro or 1) * (accumulation or 1) * (parallel or 1)
    if whole is None and micro is None:
        named = " or ".join(_key(s) for s in (layout.whole, layout.micro) if s)
        raise error(f"no batch size is there, and the rule starts from the one it was tuned at: set {named}")
    if whole is None and parallel is None:
        shared = f", of which {layout.model_parallel} share a replica ({layout.parallel_words.strip(' /')})"
        raise error(
            f"the batch counts per device ({_key(layout.micro)}={micro}), and the data-parallel degree is not in it: "
            f"give --devices N, all devices of the base run{shared if layout.model_parallel > 1 else ''}"
        )
    if whole is not None and micro and parallel and (whole % unit or (accumulation and unit != whole)):
        times = f" x {accumulation} accumulation" if accumulation else ", nor a multiple of it"
        raise error(f"{_key(layout.whole)}={whole} is not {micro} per device x {parallel} data-parallel{times}")
    batch = whole or unit
    if layout.rate_at is not None and layout.number(layout.fields["lr"]) is None:
        layout.fields["lr"] = key, rate = layout.fields["lr"][0], layout.rate_at(batch)
        layout.notes.append(f"{dotted(key)} is not in the file: {rate:g} is the trainer's, at this batch")
    values = {name: layout.number(slot, many=name == "betas") for name, slot in layout.fields.items()}
    if missing := [_key(layout.fields[n]) for n, v in values.items() if v is None]:
        raise error(f"no {', '.join(missing)} is there: add what is missing")
    adaptive = OPTIMIZERS[layout.optimizer].family == "adaptive"
    values = {"eps": 1e-8 if adaptive else 0, **values}  # torch's and DeepSpeed's, where the trainer has no key for it
    lr, eps, decay = (float(values.pop(name, 0)) for name in ("lr", "eps", "weight_decay"))
    betas = values.get("betas", list(values.values()))
    if "betas" in values and (not isinstance(betas, list) or len(betas) != 2):
        raise error(f"betas={betas!r}: two betas are expected")
    try:
        hyper = Hyper(lr, tuple(map(float, betas)), eps, decay)
    except RuleError as e:
        raise error(str(e)) from None
    steps, epochs, warmup = map(layout.number, (layout.steps, layout.epochs, layout.warmup))
    steps, epochs = (v if v and v > 0 else None for v in (steps, epochs))
    samples = any(layout.doc.get(key) for key in ("train_samples", "train_tokens"))
    if layout.needs_length and steps is None and epochs is None and not samples:
        raise error(f"a schedule in steps is there without its length: set {layout.needs_length}")
    return Recipe(layout.optimizer, batch, micro, accumulation, parallel, hyper, epochs, steps, warmup)


def agree(layout: Layout, base: Recipe) -> None:
    """Trainer and partner must say the same of what both hold.

    Raises:
        RuleError: they do not.
    """
    clip = layout.number(layout.clip)
    for m in layout.mirrors:
        said: Any = vars(base).get(m.what, clip if m.what == "clip" else vars(base.hyper).get(m.what))
        said = list(said) if isinstance(said, tuple) else said
        if m.what == "rate" or (m.what in ("steps", "warmup") and (said is None or 0 < said < 1)):
            continue
        if m.what == "warmup" and layout.warmup and layout.warmup[0] == ("warmup_ratio",) and said == 0:
            continue
        if said is not None and said != m.value:
            how = "" if m.there else " (not there: DeepSpeed's own default)"
            raise m.doc.error(
                f"{dotted(m.path)}={m.value}{how} is not {said}, as {layout.doc.where} has it: which one counts? "
                'Set it to "auto" where the trainer\'s file decides'
            )


def sentence(layout: Layout, base: Recipe) -> str:
    """How the base batch came about: "base: 4 per device × 8 data-parallel × 2 accumulation = 64"."""
    if layout.unit:
        return f"base: {base.batch} {layout.unit}"
    if base.micro is None or base.parallel is None:
        rest = f", {base.micro} per device a micro-batch" if base.micro else ""
        return f"base: {base.batch} ({_key(layout.whole)}{rest})"
    words = layout.parallel_words.strip()
    if layout.model_parallel > 1 and words.startswith("/"):
        words = f"{base.parallel * layout.model_parallel} devices {words}"
    how = f" ({words})" if words else ""
    accumulation = f"{base.accumulation or base.batch // (base.micro * base.parallel)} accumulation"
    parts = [accumulation + how] if layout.together else [f"{base.parallel} data-parallel{how}", accumulation]
    return " × ".join((f"base: {base.micro} per device", *parts)) + f" = {base.batch}"


class Edit:
    """Moves a recipe, writes it in place, and keeps account of it."""

    def __init__(self, layout: Layout, base: Recipe, move: Move, rule: Rule, clip: Clip) -> None:
        self.layout, self.base, self.move, self.rule, self.clip = layout, base, move, rule, clip
        self.hyper = rule.scale(base.hyper, move)
        self.passes = 1.0  # new/old: how many micro-batches of one device make as many examples as before
        self.changes: list[str] = []
        self.notes: list[str] = []

    def moved(self, new_devices: int | None) -> Recipe:
        layout, base, batch = self.layout, self.base, int(self.move.batch)
        parallel = base.parallel if new_devices is None else share(new_devices, layout)
        micro, accumulation = self._split(parallel)
        self.passes = (base.micro or 1) * (base.parallel or 1) / ((micro or base.micro or 1) * (parallel or 1))
        size = layout.number(layout.group)
        if layout.group is not None and batch % size:
            raise RuleError(
                f"batch {batch} is no multiple of {_key(layout.group)}={size}, the completions that share a prompt; "
                f"nearest: {batch // size * size} and {(batch // size + 1) * size}"
            )

        if batch % layout.multiple[0]:
            unit, why = layout.multiple
            near = " and ".join(str(b) for b in (batch // unit * unit, (batch // unit + 1) * unit) if b)
            raise RuleError(f"batch {batch} is no multiple of {unit}: {why}; nearest: {near}")

        def length(law: str, slot: Slot | None, value: float | None) -> Any:
            return value if slot is None or value is None or value <= 0 else self.by(law, slot[0], value)

        epochs = length("samples", layout.epochs, base.epochs)
        steps = length("count", layout.steps, base.steps)
        warmup = length("count", layout.warmup, base.warmup)
        return Recipe(base.optimizer, batch, micro, accumulation, parallel, self.hyper, epochs, steps, warmup)

    def in_place(self, new_devices: int | None) -> Recipe:
        layout, base, eps = self.layout, self.base, self.hyper.eps
        if "eps" not in layout.fields and eps != base.hyper.eps:
            self.hyper = replace(self.hyper, eps=base.hyper.eps)
            self.notes.append(
                f"{layout.form} has no key for eps, which the rule moves to {eps:g}: {base.hyper.eps:g} stays"
            )
        moved = self.moved(new_devices)
        for name, value in self.named(layout.fields).items():
            self.put(layout.fields[name], value)
        count, whole = layout.accumulation, layout.whole
        if layout.micro and moved.micro is not None:
            self.put((layout.micro[0], base.micro), moved.micro)
        said = count and (base.accumulation or layout.get(count[0]) or not whole or not base.micro)
        if count and said and moved.accumulation is not None:
            self.put((count[0], base.accumulation or 1), moved.accumulation)
        if whole and (layout.get(whole[0]) not in (None, -1) or count is None):
            self.put((whole[0], base.batch), moved.batch)
        if new_devices is not None and layout.devices is not None:
            each, rest = divmod(new_devices, layout.nodes)
            if rest:
                near = " or ".join(str(n * layout.nodes) for n in (each, each + 1) if n)
                raise layout.doc.error(
                    f"--new-devices {new_devices} is no multiple of the {layout.nodes} nodes that it names: give {near}"
                    f", or change the nodes in the file; {_key(layout.devices)} counts those of one node"
                )
            self.put(layout.devices, each)
        elif layout.parallel_fixed and moved.parallel != layout.parallel:
            raise layout.doc.error("it names its data-parallel degrees: change those in the file, then convert")
        for path, default, law in layout.laws:
            held = layout.number((path, default), many=True)
            if path in layout.doc.wanted:  # set already where another key names the same place
                held = layout.doc.values.get(path, default)
            self.put((path, default), self.by(law, path, held))
        for name in ("epochs", "steps", "warmup"):
            if getattr(layout, name) is not None and getattr(moved, name) is not None:
                self.put(getattr(layout, name), getattr(moved, name))
        if layout.clip and (clip := self.clipped()) is not None:
            self.put(layout.clip, clip)
        self._mirrors(moved)
        changed, doc = {c.split(": ", 1)[0] for c in self.changes}, layout.doc
        for path, value in doc.wanted.items():
            if dotted(path) not in changed and path != layout.packed:
                self.changes.append(f"{dotted(path)}: {doc.values[path]} -> {value} (the same place in the file)")
        return moved

    def put(self, slot: Slot, new: Any) -> None:
        path, default = slot
        old = self.layout.get(path) if path else None
        shown = default if old is None else old
        if new == shown:
            return
        if not path:
            hint = f"; {self.layout.hint}" if self.layout.hint else ""
            raise self.layout.doc.error(
                f"{self.layout.form} has no key for what is {default} by its default, and {self.rule.name} moves it to "
                f"{new}: the recipe cannot be written whole. --rule lr_only moves lr alone (a control){hint}"
            )
        self.layout.put(path, new)
        was = "(not there)" if shown is None else f"{shown}" + (" (default)" if old is None else "")
        self.changes.append(f"{dotted(path)}: {was} -> {new}")

    def by(self, law: str, path: Path, value: Any) -> Any:
        """`value`, or a list of them, moved by one of layout.LAWS."""
        kappa, base = self.move.kappa, self.base.hyper
        if law == "ramp":
            return [self.by("batch", path, v) for v in value[:2]] + value[2:]
        if law == "as_betas":
            return list(self.rule.scale(replace(base, betas=tuple(value)), self.move).betas)
        if isinstance(value, list):
            return [self.by(law, path, v) for v in value]
        if law == "rate":
            return value * (self.hyper.lr / base.lr)
        if law in ("as_eps", "as_decay"):
            other = replace(base, eps=value) if law == "as_eps" else replace(base, weight_decay=value)
            moved = self.rule.scale(other, self.move)
            return moved.eps if law == "as_eps" else moved.weight_decay
        if law == "samples":
            new = value * self.move.duration
            if isinstance(value, int) and value > 0 and not self.layout.fractions:
                return self.whole(path, value, new)
            return int(new) if new == int(new) else new
        if law == "ema":
            if path not in self.layout.every:
                return self.rule.ema(value, kappa)
            between = self.layout.doc.values[self.layout.every[path]]
            return self.rule.ema(value, kappa * max(1, round(between * self.move.duration / kappa)) / between)
        if law == "per_step":
            return value * kappa
        if law == "beta":
            try:
                return self.rule.scale(replace(base, betas=(value, *base.betas[1:])), self.move).betas[0]
            except RuleError as e:
                raise RuleError(f"{dotted(path)}: {e}") from None
        if law == "count":
            exact = value * self.move.duration / kappa
            if value < 1:  # a share of the run
                return value
            return self.whole(path, value, exact, " steps", self.unit(path))
        if law == "passes":
            return self.whole(path, value, value * self.passes, " micro-batches")
        new = value * kappa * (self.passes if law == "per_batch" else 1)
        if abs(new - round(new)) > 1e-9:
            raise self.layout.doc.error(f"{dotted(path)}={value} would become {new:g}, no whole number of examples")
        return round(new)

    def unit(self, path: Path) -> int:
        """The new count of which that at `path` stays a multiple; 1 for most."""
        key, default = self.layout.within.get(path, ((), None))
        old = self.layout.doc.values.get(key) or default  # not what is already written there
        return max(1, round(old * self.move.duration / self.move.kappa)) if old else 1

    def whole(self, path: Path, value: float, exact: float, unit: str = "", of: int = 1) -> int:
        new = max(1, round(exact / of)) * of
        if abs(exact - new) > 1e-9 * max(1, exact):
            self.notes.append(f"{dotted(path)}: {value}{unit} become {exact:.6g}, written {new}")
        return new

    def _mirrors(self, moved: Recipe) -> None:
        """Write to the partners what they hold of the numbers that have moved."""
        clip = self.layout.number(self.layout.clip)
        for m in self.layout.mirrors:
            key, value = dotted(m.path), m.value
            if m.what == "rate":
                new = self.by("rate", m.path, value)
            elif m.what == "clip":
                new = clip
            elif hasattr(moved, m.what) and (new := getattr(moved, m.what)) is not None and new >= 1:
                pass
            elif m.what in ("steps", "warmup"):  # the trainer's file has epochs, or a share
                new = self.by("count", m.path, value)
            else:
                new = getattr(self.hyper, m.what)
            new = list(new) if isinstance(new, tuple) else new
            if new != value:
                m.doc.set(m.path, new)
                was = f"{value}" if m.there else f"{value} (DeepSpeed's default)"
                self.changes.append(f"{m.doc.where}: {key}: {was} -> {new}")

    def clipped(self) -> float | None:
        """The clipping threshold after the move; None where nothing is clipped."""
        slot = self.layout.clip
        value: float | None = self.layout.number(slot)
        if slot is None or not value or value < 0:
            return None
        new = self.rule.clip(value, self.move.kappa)
        if self.clip == "rule" or new == value:
            return new
        self.notes.append(
            f"{_key(slot)}={value:g} is kept: {CLIP_KEPT.format(new)}; "
            "--clip rule writes it, as one MLPerf benchmark does"
        )
        return value

    def _split(self, parallel: int | None) -> tuple[int | None, int | None]:
        """(micro-batch, accumulation): the micro-batch stays, because a network may normalise over it."""
        layout, micro, batch, name = self.layout, self.base.micro, int(self.move.batch), _key(self.layout.micro)
        if micro is None:
            accumulation = (self.base.accumulation or 1) * self.move.kappa
            if layout.micro and layout.accumulation and accumulation >= 1 and accumulation == int(accumulation):
                return None, int(accumulation)
            if layout.micro:
                self.notes.append(f"{name} is not in the file: the micro-batch changes with the batch; {_NORMALISE}")
            return None, None
        if parallel is None:
            if batch % micro:
                raise RuleError(f"batch {batch} is no multiple of the micro-batch {micro}")
            return micro, None
        parallel = 1 if layout.together else parallel
        unit = micro * parallel
        if layout.accumulation is None and layout.whole is None:  # no word for accumulation: the device takes it
            if batch % parallel:
                raise RuleError(f"batch {batch} is no multiple of {parallel} data-parallel devices")
            if batch != unit:
                change = f"{name} {micro} -> {batch // parallel} per device"
                self.notes.append(f"no accumulation is known: {change}; more devices (--new-devices) would leave it")
            return batch // parallel, None
        if batch % unit == 0:
            return micro, batch // unit
        if batch < unit and batch % parallel == 0:
            change = f"micro-batch {micro} -> {batch // parallel}"
            self.notes.append(f"{change}: the new batch is smaller than one of them on every device; {_NORMALISE}")
            return batch // parallel, 1
        nearest = " and ".join(str(b) for b in (batch // unit * unit, (batch // unit + 1) * unit) if b)
        shape = f"micro-batch {micro} x {parallel} data-parallel = {unit}"
        raise RuleError(f"batch {batch} is no multiple of {shape}; nearest that fit: {nearest}")

    def named(self, fields: dict[str, Slot]) -> dict[str, Any]:
        """The moved hyperparameters by the names of a layout's fields."""
        betas = list(self.hyper.betas)
        values = {**vars(self.hyper), "betas": betas}
        values |= {"beta1": betas[0], "momentum": betas[0], "beta2": betas[-1], "alpha": betas[-1]}
        return {n: values[n] for n in fields}


def _key(slot: Slot | None) -> str:
    return dotted(slot[0]) if slot else ""
