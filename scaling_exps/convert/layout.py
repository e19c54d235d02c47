"""One recipe as a form reads it: where its numbers are, how each goes with the batch, which keys nobody looked at."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import Document, Odd, Path, as_path, dotted, number, words
from scaling_exps.rules import RuleError

Slot = tuple[Path, Any]  # a key, and its default where it is not in the file

# How a number beside the optimizer's goes with the batch, at κ and duration δ:
#   rate      as lr goes                          count    steps: δ/κ, rounded
#   samples   epochs, samples, tokens: δ          batch    examples in a step: κ, whole
#   ema       decay a step: the rule's ema        beta     as beta1 goes
#   per_step  a clock that ticks once a step: κ
LAWS = ("rate", "count", "samples", "batch", "ema", "beta", "per_step")


@dataclass
class Layout:
    doc: Document
    form: str
    optimizer: str  # row of rules.OPTIMIZERS
    fields: dict[str, Slot]  # lr, betas | beta1, beta2 | momentum | alpha, eps, weight_decay
    micro: Slot | None = None  # examples a device a micro-batch
    accumulation: Slot | None = None
    whole: Slot | None = None  # the global batch itself
    devices: Slot | None = None  # the key that --new-devices changes
    nodes: int = 1  # by which it is multiplied
    parallel: int | None = None  # data-parallel degree, where the file says it
    parallel_words: str = ""  # how it came about
    model_parallel: int = 1  # devices that hold one replica
    unknown_degree: str = ""  # the key of a parallel degree that is no number
    laws: list[tuple[Path, Any, str]] = field(default_factory=list)
    steps: Slot | None = None
    epochs: Slot | None = None
    warmup: Slot | None = None
    needs_length: str = ""  # keys of which one must be there, because the schedule counts steps
    clip: Slot | None = None
    packed: Path = ()  # a string "alpha=0.9,eps=1e-8" that holds some of the fields
    rate_at: Callable[[float], float] | None = None  # the learning rate at a batch, where the file gives none
    harmless: frozenset[str] = frozenset()  # last keys known to decide nothing
    sections: frozenset[str] = frozenset()  # first keys of which the same is known
    group: Slot | None = None  # samples that belong together (GRPO)
    notes: list[str] = field(default_factory=list)

    def get(self, path: Path) -> Any:
        if self.packed and path[:-1] == self.packed:
            return unpack(self.doc, self.packed).get(str(path[-1]))
        return self.doc.get(path)

    def put(self, path: Path, value: Any) -> Path:
        """Set it; return the key that changes."""
        if self.packed and path[:-1] == self.packed:
            held = {**unpack(self.doc, self.packed), str(path[-1]): value}
            self.doc.set(
                self.packed, ",".join(f"{k}={v!r}" if isinstance(v, float) else f"{k}={v}" for k, v in held.items())
            )
            return self.packed
        self.doc.set(path, value)
        return path

    def number(self, slot: Slot | None) -> Any:
        """The number there, its default, or None.

        Raises:
            RuleError: something else is there.
        """
        if slot is None:
            return None
        if not slot[0]:  # the trainer has no key for it
            return slot[1]
        value = self.get(slot[0])
        if value is None and not self.packed and self.doc.has(slot[0]) and slot[0] not in self.doc.values:
            raise RuleError(f"{self.doc.where}: {dotted(slot[0])} holds keys or lists; it must be a number")
        return slot[1] if value is None else check_number(value, self.doc.where, slot[0])

    def whole_number(self, slot: Slot | None) -> int | None:
        value = self.number(slot)
        if value is None or value == -1:
            return None
        if isinstance(value, list) or value != int(value) or value < 1:
            raise RuleError(f"{self.doc.where}: {dotted(slot[0])}={value!r} must be a whole number >= 1")  # type: ignore[index]
        return int(value)

    def law(self, law: str, *keys: Path | str, default: Any = None) -> None:
        """Each of `keys` that is in the file, or has a default, goes by `law`."""
        assert law in LAWS
        for key in map(as_path, keys):
            if self.doc.get(key) is not None or default is not None:
                self.laws.append((key, default, law))


def check_number(value: Any, where: str, path: Path) -> Any:
    many: list[Any] = value if isinstance(value, list) else [value]
    for v in many:
        if isinstance(v, Odd):
            raise RuleError(f"{where}: {dotted(path)} is {v[:80]}; it must be a number written out")
        if isinstance(v, bool) or not isinstance(v, int | float):
            hint = ""
            if v == "auto":
                hint = "; set it in this file, or give the trainer's own file and this one as --with"
            elif isinstance(v, str) and ("$" in v or "{" in v):
                hint = "; it is filled in later: write the value out"
            raise RuleError(f"{where}: {dotted(path)}={str(v)[:80]!r} must be a number{hint}")
        if not math.isfinite(v) or abs(v) > 1e15:
            raise RuleError(f"{where}: {dotted(path)} is a number of {len(str(int(v)))} digits; that cannot be meant")
    return value


def unpack(doc: Document, path: Path) -> dict[str, Any]:
    text = doc.get(path)
    if text in (None, ""):
        return {}
    if not isinstance(text, str) or not all("=" in part for part in text.split(",")):
        raise RuleError(f"{doc.where}: {dotted(path)}={text!r} must be name=value,name=value")
    return {k.strip(): number(v.strip()) for k, v in (part.split("=", 1) for part in text.split(","))}


def at(key: Path | str, default: Any = None) -> Slot:
    """A key and its default."""
    return as_path(key), default


def one_of(doc: Document, *paths: Path | str) -> Path | None:
    """The one of several names that the file uses.

    Raises:
        RuleError: it uses two.
    """
    there = [p for p in map(as_path, paths) if doc.get(p) is not None]
    if len(there) > 1:
        raise RuleError(f"{doc.where} has {' and '.join(map(dotted, there))}: which one counts? Take the other out")
    return there[0] if there else None


# --- devices ---

_PARALLEL = re.compile(
    r"(tensor|pipeline|context|expert_tensor|expert|sequence|ulysses_sequence|ulysses|ring_attention|tp|pp|cp|ep|sp)"
    r"(_model)?(_parallel(ism)?)?(_size|_degree|_world_size)?$"
)
_COUNTS = (  # (processes on a node | in all, nodes)
    ("nproc_per_node", "nnodes"),
    ("NPROC_PER_NODE", "NNODES"),
    ("NGPU", "NNODE"),
    ("num_gpus", "num_nodes"),
    ("num_processes", None),
    ("world_size", None),
)


def degrees(doc: Document) -> tuple[dict[str, int], str]:
    """(devices that share one replica, by the kind of parallelism that the file names; the key that does not say)."""
    found: dict[str, int] = {}
    unknown = ""
    for path, value in list(doc.values.items()):
        key = str(path[-1])
        hit = _PARALLEL.match(key)
        if not hit or not (hit[3] or hit[5]) or isinstance(value, bool):
            continue
        doc.get(path)
        if value in (None, 0, -1, 1):
            continue
        if not isinstance(value, int):
            unknown = f"{dotted(path)}={value}"
            continue
        kind = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "sp": "sequence"}.get(hit[1], hit[1])
        if found.setdefault(kind, value) != value:
            unknown = f"{dotted(path)}={value}, and elsewhere {found[kind]}"
    return found, unknown


def launcher(doc: Document, extra: Iterable[tuple[Path, Path | None]] = ()) -> tuple[int | None, Slot | None, int]:
    """(devices of the run, the key that says so, nodes); None where the file does not say."""
    pairs = [*extra, *(((a,), (b,) if b else None) for a, b in _COUNTS)]
    for each, nodes in pairs:
        count, number_of_nodes = doc.get(each), doc.get(nodes) if nodes else 1
        if isinstance(count, list) and each[-1] == "devices":  # Lightning's list of indices
            return len(count) * int(number_of_nodes or 1), None, 1
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            if number_of_nodes is None:
                number_of_nodes = 1
            if not isinstance(number_of_nodes, int):
                return None, None, 1
            return count * number_of_nodes, (each, None), number_of_nodes
    return None, None, 1


def spread(layout: Layout, extra: Iterable[tuple[Path, Path | None]] = (), ignore: tuple[str, ...] = ()) -> None:
    """Fill in the data-parallel degree from launcher counts and parallel degrees in the file."""
    named, layout.unknown_degree = degrees(layout.doc)
    parts = {k: v for k, v in named.items() if k not in ignore}
    layout.model_parallel = math.prod(parts.values())
    layout.parallel_words = "".join(f" / {kind} {n}" for kind, n in parts.items())
    total, layout.devices, layout.nodes = launcher(layout.doc, extra)
    said = data_parallel(layout.doc)
    if said is not None and total is not None and share(total, layout) != said:
        raise RuleError(f"{layout.doc.where}: {said} data-parallel, but {total} devices{layout.parallel_words}")
    if said is not None:
        layout.parallel, layout.parallel_words, layout.unknown_degree = said, "", ""
    elif total is not None and not layout.unknown_degree:
        layout.parallel = share(total, layout)


def data_parallel(doc: Document) -> int | None:
    """The data-parallel degree, where a key says it outright."""
    for path, value in list(doc.values.items()):
        if re.match(r"(data_parallel|dp)(_size|_degree|_world_size)$", str(path[-1])) and isinstance(
            doc.get(path), int
        ):
            return int(value) if value > 0 else None
    return None


def share(total: int, layout: Layout) -> int:
    if total < 1 or total % layout.model_parallel:
        raise RuleError(
            f"{layout.doc.where}: {total} devices cannot be shared by replicas of {layout.model_parallel} each "
            f"({layout.parallel_words.strip(' /')})"
        )
    return total // layout.model_parallel


# --- keys that nobody asked for ---

_BATCH = re.compile(
    r"(^|_)(batch|batches|batchsize|bs|bsz|mbs|gbs|minibatch\w*|microbatch\w*|accum\w*|ramp|rampup|replicas?|dp|"
    r"update_freq|iter_size|n?gpus?|nproc\w*|nodes|nnodes|machines|processes|world_size|devices)(_|$)"
    r"|batch_?size|parallel(ism)?_(size|degree)",
    re.I,
)
_COUNTED = re.compile(
    r"(^|_)(n?gpus?|nproc\w*|nodes|nnodes|machines|processes|world_size|devices|replicas?|dp)(_|$)", re.I
)
_EVALUATION = re.compile(
    r"(^|_)(eval|evaluation|val|valid|validation|test|predict|prediction|infer|inference)(_|$)", re.I
)
_CLOCK = re.compile(
    r"(^|_)(lr|lrs|rate|warm\w*|decay\w*|steps?|iters?|iterations?|updates?|interval|every|freq\w*|frequency|epochs?|"
    r"beta\d?|betas|momentum|ema\w*|half_?life|tau|gamma|cooldown|milestones|clip\w*|max_norm|duration|tokens|samples|"
    r"optim\w*|eta|eps|epsilon|sched\w*|total)(_|$)|_lr|lr_|learning_rate",
    re.I,
)
_HARMLESS = re.compile(
    r"(seed|bf16|fp16|tf32|fp8|fp32|dtype|torch_dtype|precision|amp|device|accelerator|compile|verbose|debug|resume\w*|"
    r"output|name|run_name|project|notes|tags|logger|log_dir|path|workers|num_workers|pin_mem\w*|shuffle|drop_last|"
    r"class_path|_target_|_partial_|type|id|local_rank|node_rank|rank|dropout|dropout_rate|drop_path|drop_path_rate|drop_rate|"
    r"sample_rate|master_addr|master_port|rdzv_\w+|standalone|foreach|fused|capturable|differentiable|maximize|amsgrad|"
    r"do_train|do_eval|do_predict|trust_remote_code|sync_batchnorm|sync_bn|deterministic|benchmark)$"
    r"|(wandb|hub|push_to_hub|mlflow|trackio|swanlab|comet|tensorboard|dataloader|dataset|datasets|data_path|tokenizer|"
    r"model_name|model_type|base_model|save_total|gradient_checkpointing|activation_checkpoint\w*|torch_compile|ddp|"
    r"report_to|logging_dir|logging_first|log_level|output_dir|load_best|metric_for|greater_is|remove_unused|"
    r"attn|flash|liger|lora|qlora|peft|rope|bnb|quantization|load_in|vllm|overwrite|cache_dir|hf_|wrap_)",
    re.I,
)


def inactive(value: Any) -> bool:
    return value is None or value is False or value in ("", "none", "null", "false", "no") or value == [] or value == 0


@dataclass(frozen=True)
class Coverage:
    refused: tuple[str, ...]
    clocks: tuple[str, ...]  # not looked at, and a rate, a clock or an average by its name
    rest: tuple[str, ...]
    kept: tuple[str, ...]  # understood, and left as it is
    harmless: int


def coverage(layout: Layout, keep: Iterable[str] = ()) -> Coverage:
    """What becomes of every key of the file that was not asked for.

    Args:
        keep: keys of which the user says that they decide neither the batch nor the optimizer.
    """
    doc, said = layout.doc, set(keep)
    refused, clocks, rest, kept = [], [], [], []
    harmless = 0
    for path, value in doc.values.items():
        name, last = dotted(path), next((str(k) for k in reversed(path) if isinstance(k, str)), "")
        if path in doc.wanted:
            continue
        if path in doc.read:
            kept.append(name)
        elif last in layout.harmless or path[0] in layout.sections:
            harmless += 1
        elif name in said or inactive(value):
            rest.append(name)
        elif _matters(path, last, value, doc):
            refused.append(f"{name}={str(value)[:60]} ({_reason(last, value)})")
        elif _HARMLESS.match(last) or (_BATCH.search(last) and _EVALUATION.search(last)):
            harmless += 1
        elif _CLOCK.search(last) and (
            isinstance(value, Odd) or not isinstance(value[0] if isinstance(value, list) else value, str)
        ):
            clocks.append(f"{name}={str(value)[:40]}")
        else:
            rest.append(name)
    return Coverage(tuple(refused), tuple(clocks), tuple(rest), tuple(kept), harmless)


def _batch(last: str, value: Any) -> bool:
    if not _BATCH.search(last) or _EVALUATION.search(last):
        return False
    if isinstance(value, bool):
        return not _COUNTED.search(last)
    if _COUNTED.search(last) and (value == 1 or isinstance(value, float | Odd)):
        return False
    return isinstance(value, int | float | list | Odd) or value == "auto"


_PLACEMENT = words("harmless", "placement")  # where and how, not what
_FILES = ("config", "config_file", "config_path", "config_name", "cfg", "deepspeed_config", "deepspeed")


def _names_a_file(path: Path, last: str, value: Any, doc: Document) -> bool:
    """A file whose values count beside, or before, those of this one."""
    value = value[0] if isinstance(value, list) else value  # `--config_file zero3.yaml train.py`
    if last not in _FILES or not isinstance(value, str) or (doc.syntax != "flags" and last != "deepspeed_config"):
        return False
    return path[0] != "model" and not any(name.endswith(value.rsplit("/", 1)[-1]) for name in doc.partners)


def _matters(path: Path, last: str, value: Any, doc: Document) -> bool:
    if last in _PLACEMENT:
        return False
    if _batch(last, value) or _names_a_file(path, last, value, doc):
        return True
    if not optimizers.SWITCHES.search(last):
        return False
    family = last.split("_")[0]
    return not (family != "use" and doc.values.get((*path[:-1], f"use_{family}")) is False)


def _reason(last: str, value: Any) -> str:
    if _batch(last, value):
        return "it may change the batch"
    if last in _FILES:
        return "the values in that file count too: convert it, or give it as --with"
    return optimizers.switch_reason(last)


_COUPLED = re.compile(
    r"contrastive|infonce|info_nce|simclr|moco|nt_?xent|triplet|(^|[^a-z])in_?batch|multiplenegatives|siglip|clip_loss|"
    r"barlow|vicreg|byol|swav|dino|supcon|batch_?norm|sync_?bn",
    re.I,
)


def coupled(doc: Document) -> str | None:
    """The first word of the file that names a loss or a layer in which the examples of a batch meet."""
    for path, value in doc.values.items():
        for word in (str(path[-1]), value if isinstance(value, str) else ""):
            if _COUPLED.search(word) and not inactive(value) and len(word) < 80:
                return f"{dotted(path)}={str(value)[:40]}"
    return None
