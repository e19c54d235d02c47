"""One recipe as a form reads it: where its numbers are, and how each goes with the batch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import KEYS, Document, Odd, Path, dotted, is_number, number, path_of, words
from scaling_exps.rules import OPTIMIZERS, RuleError

Slot = tuple[Path, Any]  # a key, and its default where it is not in the file; () is a number without a key

# How a number beside the optimizer's goes with the batch, at κ and duration δ:
#   rate      as lr goes                          count    steps: δ/κ, rounded
#   samples   epochs, samples, tokens: δ          batch    examples in a step: κ, whole
#   ema       decay a step: the rule's ema        beta     as beta1 goes
#   per_step  a clock that ticks once a step: κ   ramp     [batch, batch, samples]
#   passes    micro-batches of one device: as examples in one of all devices, inversely
#   per_batch micro-batches of one device in a batch, or in several: κ, and as passes; whole
#   as_betas, as_eps, as_decay: of a second optimizer, as the first's go                kept     stays
LAWS = (
    "rate",
    "count",
    "samples",
    "batch",
    "ema",
    "beta",
    "per_step",
    "ramp",
    "passes",
    "per_batch",
    "as_betas",
    "as_eps",
    "as_decay",
    "kept",
)
_SLOTS = ("micro", "accumulation", "whole", "steps", "epochs", "warmup", "clip", "group")


@dataclass(frozen=True)
class Mirror:
    """A number of the trainer's file that its partner holds too."""

    doc: Document
    path: Path
    what: str  # a field of Recipe or of Hyper, "clip", or "rate"
    there: bool  # in the partner; else `value` is DeepSpeed's default
    value: Any


@dataclass
class Layout:
    doc: Document
    form: str
    optimizer: str  # row of rules.OPTIMIZERS
    fields: dict[str, Slot]  # lr, betas | beta1, beta2 | momentum | alpha, eps, weight_decay
    notes: list[str]
    named: Path = ()  # the key that names the optimizer
    micro: Slot | None = None  # examples a device a micro-batch
    accumulation: Slot | None = None
    whole: Slot | None = None  # the global batch itself
    together: bool = False  # accumulation counts that of all processes
    devices: Slot | None = None  # the key that --new-devices changes
    nodes: int = 1  # by which it is multiplied
    parallel: int | None = None  # data-parallel degree, where the file says it
    parallel_fixed: bool = False  # it says so by keys that are not written
    parallel_words: str = ""  # how it came about
    model_parallel: int = 1  # devices that hold one replica
    unknown_degree: str = ""  # the key of a parallel degree that is no number
    laws: list[tuple[Path, Any, str]] = field(default_factory=list)
    within: dict[Path, Slot] = field(default_factory=dict)  # a count that must be a multiple of another: that one
    every: dict[Path, Path] = field(default_factory=dict)  # an average's decay: the key of the steps between updates
    steps: Slot | None = None
    epochs: Slot | None = None
    warmup: Slot | None = None
    fractions: bool = False  # whether the trainer takes a fraction of an epoch
    needs_length: str = ""  # keys of which one must be there, because the schedule counts steps
    clip: Slot | None = None
    group: Slot | None = None  # samples that belong together (GRPO)
    hint: str = ""  # how a number without a key gets one
    unit: str = ""  # what the batch counts, where that is not examples
    multiple: tuple[int, str] = (1, "")  # the batch must be one of it, and why
    partners: list[Document] = field(default_factory=list)  # DeepSpeed's and accelerate's files beside it
    mirrors: list[Mirror] = field(default_factory=list)
    packed: Path = ()  # a string "alpha=0.9,eps=1e-8" that holds some of the fields
    rate_at: Callable[[float], float] | None = None  # the learning rate at a batch, where the file gives none
    harmless: frozenset[str] = frozenset()  # last keys known to decide nothing
    sections: frozenset[str] = frozenset()  # first keys of which the same is known

    def get(self, path: Path) -> Any:
        if self.packed and path[:-1] == self.packed:
            return unpack(self.doc, self.packed).get(str(path[-1]))
        return self.doc.get(path)

    def put(self, path: Path, value: Any) -> None:
        if self.packed and path[:-1] == self.packed:
            held = {**unpack(self.doc, self.packed), str(path[-1]): value}
            path, value = self.packed, ",".join(f"{k}={v}" for k, v in held.items())
        self.doc.set(path, value)

    def number(self, slot: Slot | None, many: bool = False) -> Any:
        """The number there (or a list of `many`), its default, or None.

        Raises:
            RuleError: something else is there.
        """
        path, default = slot or ((), None)
        value = self.get(path) if path else None
        if path and value is None and not self.packed and self.doc.has(path) and path not in self.doc.values:
            raise self.doc.error(f"{dotted(path)} holds keys or lists; it must be a number")
        if isinstance(value, list) and not many:
            raise self.doc.error(f"{dotted(path)} is a list; single numbers are expected")
        for v in value if isinstance(value, list) else [] if value is None else [value]:
            check_number(self.doc, path, v)
        return default if value is None else value

    def whole_number(self, slot: Slot | None) -> int | None:
        value = self.number(slot)
        if slot is None or value is None or value == -1:
            return None
        if value != int(value) or value < 1:
            raise self.doc.error(f"{dotted(slot[0])}={value!r} must be a whole number >= 1")
        return int(value)

    def law(self, law: str, *keys: Path | str, default: Any = None) -> None:
        """Each of `keys` that is in the file, or has a default, goes by `law`."""
        assert law in LAWS
        for key in map(path_of, keys):
            if (self.doc.get(key) is not None or default is not None) and law != "kept":
                self.laws.append((key, default, law))

    def sweep(self, paths: Iterable[Path], laws: Mapping[str, str]) -> list[Path]:
        """Each of `paths` goes by the law whose pattern its last key fits; return the others."""
        found = {p: [law for law in LAWS if law in laws and re.fullmatch(laws[law], str(p[-1]))] for p in paths}
        for path, fit in found.items():
            if fit:
                self.law(fit[0], path)
        return [path for path, fit in found.items() if not fit]

    def under(self, *section: str | int) -> list[Path]:
        return [p for p in self.doc.values if p[: len(section)] == section and len(p) > len(section)]


def check_number(doc: Document, path: Path, value: Any) -> None:
    if isinstance(value, Odd):
        raise doc.error(f"{dotted(path)} is {value[:80]}; it must be a number written out")
    if not is_number(value):
        hint = "; it is filled in later: write the value out" if re.search("[${]", str(value)) else ""
        if value == "auto":
            hint = "; set it in this file, or give the trainer's own file and this one as --with"
        raise doc.error(f"{dotted(path)}={str(value)[:80]!r} must be a number{hint}")
    if abs(value) > 1e15:
        raise doc.error(f"{dotted(path)} is a number of {len(str(int(value)))} digits; that cannot be meant")


def unpack(doc: Document, path: Path) -> dict[str, Any]:
    text = doc.get(path)
    if text in (None, ""):
        return {}
    if not isinstance(text, str) or not all("=" in part for part in text.split(",")):
        raise doc.error(f"{dotted(path)}={text!r} must be name=value,name=value")
    return {k.strip(): number(v.strip()) for k, v in (part.split("=", 1) for part in text.split(","))}


def slot_of(doc: Document, text: str | Slot, root: Path = ()) -> Slot:
    """The slot "key|another name=default" of keys.toml: the name that the file uses, or the first.

    Raises:
        RuleError: it uses two.
    """
    if not isinstance(text, str):
        doc.get(text[0])
        return text
    names, _, default = text.partition("=")
    paths = [(*root, *path_of(name)) for name in names.split("|")] if names else [()]
    there = [p for p in paths if doc.get(p) is not None]
    if there and len({doc.spans.get(p, p) for p in there}) == 1:  # one place in the file, which the others name
        there = there[:1]
    if len(there) > 1:
        raise RuleError(f"{doc.where} has {' and '.join(map(dotted, there))}: which one counts? Take the other out")
    try:
        return (there or paths)[0], json.loads(default) if default else None
    except ValueError:
        return (there or paths)[0], default


def table_of(form: str) -> dict[str, Any]:
    """The rows of a form, with those of the form that it is like."""
    table: dict[str, Any] = KEYS[form]
    base = table_of(table["like"]) if "like" in table else {}
    return {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in table.items()}}


def build(
    doc: Document,
    form: str,
    *,
    name: str = "",
    root: Path = (),
    numbers: Path | None = None,
    decoupled: bool | None = False,
    rows: Mapping[str, str | Slot] | None = None,
) -> Layout:
    """The layout that keys.toml says, with what the file says of devices.

    Args:
        name: the optimizer's, where the trainer's own word for it is another.
        root: the section in which the recipe stands.
        numbers: the section with the optimizer's numbers, where they have torch's names and defaults.
        decoupled: as in `optimizers.find`.
        rows: of the table, in place of its own.

    Raises:
        RuleError: an optimizer without a rule, or without names for its numbers; a key that stops the conversion.
    """
    table: dict[str, Any] = {**table_of(form), **(rows or {})}
    for key, why in table.get("refused", {}).items():
        if value := doc.get((*root, *path_of(key))):
            raise doc.error(f"{key}={value}: {why}")
    row, key = "adamw", path_of(())
    notes = [note for key, note in table.get("notes", {}).items() if doc.get(slot_of(doc, key, root)[0])]
    if "optimizer" in table:
        key, default = slot_of(doc, table["optimizer"], root)
        given = doc.get(key)
        if given is None and default is None:
            raise doc.error(f"no optimizer is named: set {dotted(key)} to one of {', '.join(optimizers.KNOWN)}")
        row, note = optimizers.find(name or given or default, dotted(key), decoupled)
        if given is None:
            notes.append(f"{dotted(key)} is not in the file: {default}, the trainer's default")
        notes += [note] if note else []
    if numbers is not None:
        own = "adam" if not decoupled and optimizers.bare(str(name or given)) == "adam" else row  # with its decay of 0
        table |= {n: ((*numbers, n), default) for n, default in KEYS["torch"][own].items()}
    optimizer = OPTIMIZERS[row]
    betas = ("betas",) if "betas" in table else ("beta1", "beta2")
    names = {"lr", "weight_decay", *(betas if optimizer.field == "betas" else (optimizer.field,))}
    if row == "muon" and form not in ("plain", "lightning"):
        raise doc.error(f"{dotted(key)}={given}: {optimizers.REFUSED['muon']}")
    if row not in table.get("only", row).split() or not names <= set(table):
        raise doc.error(f"{form} has no known names for the numbers of {row}: {', '.join(sorted(names))}")
    names |= {"eps"} if optimizer.family == "adaptive" else set()
    fields = {n: slot_of(doc, text, root) for n, text in table.items() if n in names}
    layout = Layout(doc, form, row, fields, notes, harmless=words("harmless", table.get("harmless", form)))
    layout.named = key
    for n in _SLOTS:
        setattr(layout, n, slot_of(doc, table[n], root) if n in table else None)
    layout.needs_length, layout.together = table.get("needs_length", ""), table.get("together", False)
    layout.fractions = table.get("fractions", False)
    if layout.group and doc.get(layout.group[0]) is None:
        layout.group = None
    for law in LAWS:
        for text in table.get(law, "").split():
            key, default = slot_of(doc, text, root)
            layout.law(law, key, default=default)
    for section, laws in table.get("under", {}).items():
        layout.sweep(layout.under(*path_of(section)), laws)
    counts = [[(*root, *path_of(k)) for k in pair.split("*")] for pair in table.get("devices", "").split()]
    spread(layout, counts, table.get("spread_experts", False))
    return layout


# --- devices ---

_PARALLEL = re.compile(
    r"(?:ds_|parallelism_config_|megatron_lm_)?(tensor|pipeline|context|expert_tensor|expert|sequence"
    r"|ulysses_sequence|ulysses|ring_attention|ring_attn|autotp|tp|pp|cp|ep|sp)"
    r"(_model)?(_parallel(ism)?)?(_size|_degree|_world_size)?$"
)
_KINDS = {"autotp": "tensor", "tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "sp": "sequence"}
_ENGINE = re.compile(r"(vllm|sglang|rollout|generation|inference)(_\w+)?$")  # a section of what only generates
_COUNTS = "nproc_per_node*nnodes NPROC_PER_NODE*NNODES NGPU*NNODE num_gpus*num_nodes num_processes world_size"


def _generates(path: Path) -> bool:
    return any(_ENGINE.match(str(key)) for key in path[:-1])


def _degrees(docs: Iterable[Document]) -> tuple[dict[str, int], str]:
    """(devices that share one replica, by the kind of parallelism that the file names; the key that does not say)."""
    found: dict[str, int] = {}
    unknown = ""
    for doc, path, value in ((d, *item) for d in docs for item in d.values.items()):
        hit = _PARALLEL.match(str(path[-1]))
        if not hit or not (hit[3] or hit[5]) or isinstance(value, bool):
            continue
        doc.get(path)
        kind = _KINDS.get(hit[1], hit[1])
        if value in (None, 0, -1, 1) or _generates(path):
            continue
        if not isinstance(value, int):
            unknown = f"{dotted(path)}={value}"
        elif found.setdefault(kind, value) != value:
            unknown = f"{dotted(path)}={value}, and elsewhere {found[kind]}"
    return found, unknown


def _launcher(doc: Document, counts: list[list[Path]]) -> tuple[int | None, Slot | None, int]:
    """(devices of the run, the key that says so, nodes); None where the file does not say."""
    for each, *by in counts:
        count, nodes = doc.get(each), doc.get(by[0]) if by else None
        nodes = 1 if nodes is None else nodes
        if isinstance(count, list) and each[-1] == "devices":  # Lightning's list of indices
            return len(count) * int(nodes), None, 1
        if is_number(count) and isinstance(count, int) and count > 0:
            for pair in counts:  # torchrun's word beside the trainer's
                for key, same in zip(pair, (count, nodes), strict=False):
                    if doc.values.get(key) == same:
                        doc.get(key)
            if each == ("num_processes",):  # on all machines
                doc.get("num_machines")
            return (count * nodes, (each, None), nodes) if isinstance(nodes, int) else (None, None, 1)
    return None, None, 1


def _data_parallel(docs: Iterable[Document]) -> int | None:
    """The data-parallel degree, where keys say it outright."""
    found: dict[str | None, int] = {}
    for doc, path in ((d, path) for d in docs for path in d.values):
        key = r"(parallelism_config_)?(?:data_parallel|dp)_?(shard|replicate)?_(size|degree|world_size)$"
        if hit := re.match(key, str(path[-1])):
            value = doc.get(path)
            # accelerate reads its default, 1, as no word
            if isinstance(value, int) and value > (1 if hit[1] else 0) and not _generates(path):
                found[hit[2]] = value
    return found["shard"] * found.get("replicate", 1) if "shard" in found else found.get(None)


def spread(layout: Layout, counts: Iterable[list[Path]] = (), spread_experts: bool = False) -> None:
    """Fill in the data-parallel degree from launcher counts and parallel degrees in the file and its partners."""
    docs = [layout.doc, *layout.partners]
    parts, unknown = _degrees(docs)
    if spread_experts:  # over data-parallel ranks
        parts = {k: v for k, v in parts.items() if k not in ("expert", "expert_tensor")}
    layout.model_parallel = math.prod(parts.values())
    words = "".join(f" / {kind} {n}" for kind, n in parts.items())
    counts = [*counts, *([path_of(k) for k in pair.split("*")] for pair in _COUNTS.split())]
    launchers = [(doc, *_launcher(doc, counts)) for doc in docs]
    doc, total, devices, nodes = next((found for found in launchers if found[1] is not None), launchers[0])
    if doc is not layout.doc:
        words += f" in {doc.where}"
        devices, nodes, layout.parallel_fixed = None, 1, True  # its partner's count is not written
    layout.parallel_words, layout.unknown_degree, layout.devices, layout.nodes = words, unknown, devices, nodes
    said = _data_parallel(docs)
    if said is not None:
        if total is not None and share(total, layout) != said:
            raise layout.doc.error(f"{said} data-parallel, but {total} devices{words}")
        layout.parallel, layout.parallel_fixed, layout.parallel_words, layout.unknown_degree = said, True, "", ""
    elif total is not None and not unknown:
        layout.parallel = share(total, layout)


def share(total: int, layout: Layout) -> int:
    if total % layout.model_parallel:
        size, words = layout.model_parallel, layout.parallel_words.strip(" /")
        raise layout.doc.error(f"{total} devices cannot be shared by replicas of {size} each ({words})")
    return total // layout.model_parallel
