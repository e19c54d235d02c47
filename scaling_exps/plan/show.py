"""A plan for people and for machines."""

from __future__ import annotations

import re
import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from scaling_exps import rules
from scaling_exps.plan.spec import Arm, RunSpec, processes

NONE = "–"
# The columns, as they stand; the number is the order in which a narrow window gives them up, the highest first.
_COLUMNS = {
    "from\nsample": 3.5, "batch": 0, "rule": 1, "svag": 2, "κ": 3, "lr": 4, "betas": 5, "eps": 12, "decay": 15,
    "warm-up\nsteps": 16, "steps": 6, "devices ×\nmicro-batch ×\naccumulation": 11, "most\ndevices": 11.5,
    "predicted\ndeviation": 9,
    "FLOPs": 14, "memory": 10, "time": 7, "device-\nhours": 13, "price": 9.5, "gain": 8,
}  # fmt: skip
_UNITS = {
    "seconds": (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)),
    "bytes": (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)),
}


def print_run(spec: RunSpec) -> None:
    """What one run is: its recipe, every number base -> scaled, its placement, notes."""
    members = [(spec, arm) for arm in (spec.arms if spec.arms[0].kappa != 1 else spec.arms[:1])]
    print_lines(_head([[member] for member in members]))
    for member in members:
        _block([member], None)
    print_lines("  " + note for note in _notes(members))


def describe(spec: RunSpec) -> list[dict[str, Any]]:
    """The contract of `scalerun plan --json`: one object for each arm of the run."""
    science = spec.science
    return [
        {
            "run_id": spec.run_id,
            "rule": arm.rule,
            "role": arm.role,
            "kappa": arm.kappa,
            "svag": science.svag,
            "seed": science.seed,
            "base": msgspec.to_builtins(arm.base),
            "scaled": msgspec.to_builtins(science.numbers()),
            **({"ramp": msgspec.to_builtins(science.stages)} if science.ramp else {}),
            "placement": {
                "world_size": spec.placement.world_size,
                "micro_batch": science.micro_batch,
                "accumulation": spec.placement.accumulation,
                "compile": spec.placement.compile,
            },
            "notes": list(spec.notes),
        }
        for arm in spec.arms
    ]


def print_plan(
    specs: list[RunSpec],
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    validity: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    full: bool = False,
) -> None:
    """A table for each recipe: a head with its numbers and formulas, a row a batch and rule (seeds share it), notes.

    Args:
        costs: by run id, the `cost` objects of `plan --json`.
        validity: by run id, its `validity` objects.
        full: with every number's block, base -> scaled, and every run id.
    """
    width = shutil.get_terminal_size((80, 24)).columns
    recipes: dict[str, dict[str, list[tuple[RunSpec, Arm]]]] = {}
    for spec in specs:
        for arm in spec.arms if spec.arms[0].kappa != 1 else spec.arms[:1]:
            s = spec.science
            recipe = repr((s.model, s.dataset, s.optimizer, arm.base))
            row = repr(msgspec.structs.replace(s, seed=0)) + (arm.rule if arm.kappa != 1 else "")
            recipes.setdefault(recipe, {}).setdefault(row, []).append((spec, arm))
    for rows in recipes.values():
        print()
        for line in _head(list(rows.values())):
            _wrap(line, width)
        _table([members[0] for members in rows.values()], costs or {}, validity or {}, width)
        said = dict.fromkeys(ramp_text(*members[0]) for members in rows.values() if members[0][0].science.ramp)
        for line in [*said, *_sources(rows.values(), costs or {}), *_notes([members[0] for members in rows.values()])]:
            _wrap(line, width, "  ")
        if full:
            for members in rows.values():
                _block(members, (validity or {}).get(members[0][0].run_id, {}).get("text"))
    print(f"\n{len(specs)} run(s)")


def _head(rows: list[list[tuple[RunSpec, Arm]]]) -> list[str]:
    """The recipe: what it trains, its numbers at its own batch, and each rule's formulas."""
    spec, arm = rows[0][0]
    science, base = spec.science, arm.base
    seeds = list(dict.fromkeys(str(s.science.seed) for members in rows for s, _ in members))
    numbers = ", ".join(f"{k} {_show(getattr(base, k))}" for k in _moved(arm))
    lines = [
        f"{science.model.name} on {science.dataset.name}, {science.optimizer}, seed{'s' * (len(seeds) > 1)} "
        + ", ".join(seeds),
        f"  base batch {base.batch:,}: {numbers}, {base.steps:,} steps, warm-up {_show(base.warmup_steps)} steps, "
        f"{base.samples:,} samples" + (f", from weights {base.start}" if base.start else ""),
    ]
    for members in rows:
        spec, arm = members[0]
        if arm.kappa != 1 or arm.duration != 1:
            formulas = _formulas(spec, arm)
            moved = ", ".join(f"{k} {formulas[k]}" for k in _moved(arm))
            lines.append(f"  rule {arm.rule}: {moved}; {formulas['steps']}; warm-up: {formulas['warmup_steps']}")
    return list(dict.fromkeys(lines))


def _moved(arm: Arm) -> list[str]:
    """The hyperparameters of the recipe that a rule may move."""
    return ["lr", "betas", "eps", "weight_decay", *(k for k in ("clip", "ema") if getattr(arm.base, k) is not None)]


def _formulas(spec: RunSpec, arm: Arm) -> dict[str, str]:
    """What happens to each number of the base, as text."""
    delta = "δ·" if arm.duration != 1 else ""
    return {
        **rules.find(arm.rule).formulas(arm.beta_map),
        "clip": "c" if spec.science.clip == arm.base.clip else "c/√κ",
        "ema": "ρ" if spec.science.ema == arm.base.ema else "ρ^κ",
        "steps": f"{delta}steps/κ",
        "warmup_steps": f"{delta}samples" if delta else "same samples",
        "samples": f"{delta}samples" if delta else "same",
    }


def _table(
    rows: list[tuple[RunSpec, Arm]],
    costs: Mapping[str, Mapping[str, Any]],
    validity: Mapping[str, Mapping[str, Any]],
    width: int,
) -> None:
    """One line a row, as many columns as fit, no word cut; what is left out is said."""
    cells = [c for s, arm in rows for c in _cells(s, arm, costs.get(s.run_id), validity.get(s.run_id))]
    many = len({arm.rule for _, arm in rows if arm.kappa != 1}) > 1
    idle = {
        "from\nsample": not any(s.science.ramp for s, _ in rows),
        "rule": not many,
        "svag": all(s.science.svag == 1 for s, _ in rows),
    }
    idle |= {"decay": all(a.base.weight_decay == 0 for _, a in rows)}
    idle |= {"price": not any((costs.get(s.run_id) or {}).get("price") for s, _ in rows)}
    for name in ("FLOPs", "memory", "device-\nhours", "gain"):  # the time alone says that nothing is known
        idle[name] = all(row.get(name) == NONE for row in cells)
    print_table(cells, {name: rank for name, rank in _COLUMNS.items() if not idle.get(name)}, width)


def print_table(cells: list[dict[str, str]], columns: Mapping[str, float], width: int) -> None:
    """One line a row, as many columns as fit, no word cut; what is left out is said.

    Args:
        cells: text by column, for each row.
        columns: in their order; the one of the highest number is given up first.
        width: of the window.
    """
    widths = {
        name: max(_width(part) for part in (*name.split("\n"), *(row.get(name, NONE) for row in cells)))
        for name in columns
        if any(name in row for row in cells)
    }
    left_out: set[str] = set()
    while 2 * len(widths) + sum(widths.values()) > width and len(widths) > 2:
        left_out.add(max(widths, key=lambda name: columns[name]))
        widths = {name: w for name, w in widths.items() if name not in left_out}
    heads = [name.split("\n") for name in widths]
    tall = max(map(len, heads), default=0)
    lines = [[(head + [""] * tall)[i] for head in heads] for i in range(tall)]
    for line in [*lines, *([row.get(name, NONE) for name in widths] for row in cells)]:
        padded = (" " * (w - _width(cell)) + cell for w, cell in zip(widths.values(), line, strict=True))
        print(("  " + "  ".join(padded)).rstrip())
    if left_out:
        names = ", ".join(
            name.replace("device-\n", "device-").replace("\n", " ") for name in columns if name in left_out
        )
        _wrap(f"left out at {width} columns: {names}; a wider window or --json shows them", width, "  ")


def _cells(
    spec: RunSpec, arm: Arm, cost: Mapping[str, Any] | None, validity: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """A row; of a ramp one a stage."""
    science = spec.science
    n = science.numbers()
    row = {
        "batch": f"{n.batch:,}",
        "rule": "base" if arm.role == "base" else arm.rule,
        "svag": str(science.svag),
        "κ": f"{arm.kappa:g}",
        "lr": f"{n.lr:.4g}",
        "betas": ", ".join(f"{b:.5g}" for b in n.betas),
        "eps": f"{n.eps:.3g}",
        "decay": f"{n.weight_decay:.3g}",
        "warm-up\nsteps": f"{n.warmup_steps:,g}",
        "steps": f"{n.steps:,}",
        "devices ×\nmicro-batch ×\naccumulation": f"{spec.placement.world_size} × {science.micro_batch} × "
        f"{spec.placement.accumulation}",
    }
    if validity is not None:
        known = validity.get("deviation")
        row["predicted\ndeviation"] = (
            "base" if arm.kappa == 1
            else NONE if not validity.get("applies", True)
            else _deviation(known, validity.get("deviation_low"), validity.get("deviation_high")) if known is not None
            else "no record" if validity.get("source") is None
            else "not told"
        )  # fmt: skip
    if cost is not None:
        row |= {
            "FLOPs": NONE if cost["flops"] is None else f"{cost['flops']:.2g}",
            "memory": amount(cost["memory_bytes"], "bytes"),
            "time": amount(cost["seconds"], "seconds"),
            "device-\nhours": NONE if cost["device_hours"] is None else f"{cost['device_hours']:.3g}",
            "price": NONE if cost["price"] is None else f"{cost['price']:,.4g}",
            "gain": NONE if cost["gain"] is None else f"× {cost['gain']:.2g}",
        }
    if not science.ramp:
        return [row]
    place = spec.placement
    worlds = [processes(science.shares(x.step), place.most or place.world_size) for x in science.stages]
    blank = dict.fromkeys([k for k in row if k not in ("svag", "rule")], "")
    of_stages = [
        {
            "from\nsample": f"{science.samples(stage.step):,}",
            "batch": f"{stage.batch:,}",
            "κ": f"{stage.batch / arm.base.batch:g}",
            "lr": f"{stage.hyper.lr:.4g}",
            "betas": ", ".join(f"{b:.5g}" for b in stage.hyper.betas),
            "eps": f"{stage.hyper.eps:.3g}",
            "decay": f"{stage.hyper.weight_decay:.3g}",
            "steps": f"{taken:,}",
            "devices ×\nmicro-batch ×\naccumulation": f"{world} × {stage.micro_batch} × "
            f"{stage.batch // stage.micro_batch // world}",
            "most\ndevices": f"{science.shares(stage.step):,}",
        }
        for (stage, taken), world in zip(science.spent(science.steps), worlds, strict=True)
    ]
    for cells, change in zip(of_stages, (validity or {}).get("stages") or (), strict=False):
        cells["predicted\ndeviation"] = NONE if change is None else _deviation(change, None, None)
    return [{**(blank if i else row), **stage, "rule": row["rule"]} for i, stage in enumerate(of_stages)]


def ramp_text(spec: RunSpec, arm: Arm) -> str:
    """How many steps a ramp takes, beside the base at the same samples."""
    steps, base, place = spec.science.steps, arm.base.steps * arm.duration, spec.placement
    change = f"{abs(1 - steps / base):.0%} {'fewer' if steps < base else 'more'} than"
    grows = f"; begins with {place.world_size} device(s), and takes up to {place.most} when it is started again"
    return f"ramp {spec.science.batches}: {steps:,} steps, {change} the base's {base:,.0f}" + grows * bool(place.most)


def _deviation(value: float, low: float | None, high: float | None) -> str:
    """The predicted change of the displacement with its interval, in percent.

    >>> _deviation(0.83, 0.7, 0.9)
    '-17 [-30, -10] %'
    """
    ends = "" if low is None or high is None else f" [{100 * (low - 1):.0f}, {100 * (high - 1):.0f}]"
    return f"{100 * (value - 1):.0f}{ends} %".replace("-0 ", "0 ").replace("-0]", "0]").replace("-0,", "0,")


def amount(value: float | None, kind: str) -> str:
    """A number of seconds or bytes in the largest unit of which it has one; a dash for None.

    >>> amount(5400, "seconds"), amount(90, "seconds"), amount(3 * 2**30, "bytes"), amount(None, "bytes")
    ('1.5 h', '1.5 min', '3 GiB', '–')
    """
    if value is None:
        return NONE
    unit, size = next((u for u in _UNITS[kind] if value >= u[1]), _UNITS[kind][-1])
    return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"


def _sources(rows: Any, costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where each number of the cost is from, each source once with its batches."""
    by: dict[str, list[str]] = {}
    for members in rows:
        spec, _ = members[0]
        cost = costs.get(spec.run_id) or {}
        for name, key in (("time", "time_from"), ("memory", "memory_from"), ("FLOPs", "flops_from")):
            if cost.get(key):
                by.setdefault(f"{name}\0{cost[key]}", []).append(f"{spec.science.batch:,}")
    every = len({members[0][0].science.batch for members in rows})
    out: dict[tuple[str, str], list[str]] = {}
    for key, batches in by.items():
        name, _, source = key.partition("\0")
        batches = list(dict.fromkeys(batches))
        which = "" if len(batches) == every else f" of batch {', '.join(batches)}"
        out.setdefault((which, source), []).append(name)
    return [f"{', '.join(names)}{which}: {source}" for (which, source), names in out.items()]


def _notes(rows: list[tuple[RunSpec, Arm]]) -> list[str]:
    """Every note once; of what rows it holds, where it is not all that move."""
    by: dict[str, list[RunSpec]] = {}
    for spec, _ in rows:
        for note in spec.notes:
            by.setdefault(note, []).append(spec)
    moved = {spec.run_id for spec, arm in rows if arm.kappa != 1} or {spec.run_id for spec, _ in rows}
    out = []
    for note, specs in by.items():
        batches = dict.fromkeys(spec.science.batches for spec in specs)
        everywhere = moved <= {spec.run_id for spec in specs} or note.startswith("rule ")
        everywhere |= note.startswith("batch ")  # which names its own
        out.append("note: " + note if everywhere else f"note, batch {', '.join(batches)}: {note}")
    return out


def _block(members: list[tuple[RunSpec, Arm]], validity: str | None) -> None:
    """base -> scaled with the formula, the batch arithmetic, the runs."""
    spec, arm = members[0]
    science, placement = spec.science, spec.placement
    scaled, formulas = science.numbers(), _formulas(spec, arm)
    print(
        f"\n  batch {arm.base.batch} -> {science.batches}, κ = {arm.kappa:g}, "
        f"rule {'(any)' if arm.kappa == 1 else arm.rule}" + (f", SVAG ℓ = {science.svag}" if science.svag > 1 else "")
    )
    if scaled.samples != round(arm.duration * arm.base.samples) and science.svag == 1:
        formulas["samples"] += ", to whole steps"
    for key in (*_moved(arm), "steps", "warmup_steps", "samples"):
        formula = formulas[key] if arm.kappa != 1 or arm.duration != 1 else ""
        before, after = _show(getattr(arm.base, key)), _show(getattr(scaled, key))
        print(f"    {key:<13} {before:>20} -> {after:<26} {formula}".rstrip())
    print(
        f"    batch {science.batch} = micro-batch {science.micro_batch} × accumulation "
        f"{placement.accumulation // science.draws} × world size {placement.world_size}"
        + (f", {science.draws} draws a step" if science.draws > 1 else "")
    )
    if validity:
        print(f"    {validity}")
    print("    runs: " + ", ".join(f"{m.run_id} (seed {m.science.seed})" for m, _ in members))


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _width(text: str) -> int:
    """Columns of a terminal that the text takes; colours take none."""
    text = re.sub("\033\\[\\d*m", "", text) if "\033" in text else text
    return (
        len(text)
        if text.isascii()
        else sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    )


def _wrap(text: str, width: int, indent: str = "") -> None:
    """Print it on lines of at most `width`, broken between words only."""
    inner = len(text) - len(text.lstrip())
    first, rest = indent + " " * inner, indent + " " * (inner + 2)
    lines = textwrap.wrap(
        text.strip(), width, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    print("\n".join(lines))


def added(bases: list[RunSpec]) -> list[str]:
    """What to say of base runs that were added to a sweep."""
    if not bases:
        return []
    batches = ", ".join(dict.fromkeys(f"{s.science.batch:,}" for s in bases))
    return [
        f"base=auto adds {len(bases)} base run(s) at batch {batches}, which the others are compared with; base=none "
        "leaves them out"
    ]


def print_lines(lines: Iterable[str]) -> None:
    """Lines beside the table, at the window's width."""
    for line in lines:
        _wrap(line, shutil.get_terminal_size((80, 24)).columns)
