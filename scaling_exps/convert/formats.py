"""Where each trainer keeps what a rule moves, and what its defaults are.

Defaults were read in: transformers 5.24 TrainingArguments, lightning 2.6 with torch 2.14's optimizers, timm 1.0
train.py, torchtitan's TOML job config (2025; it has since moved to Python), deepspeed 0.19. A value that is not in the
file is taken from here, reported as such, and written out when it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scaling_exps.convert.documents import Document, Flags, Path, Toml, Yaml
from scaling_exps.rules import OPTIMIZERS, RuleError

KINDS = {name: row for row in OPTIMIZERS.values() for name in row.classes}


@dataclass
class Layout:
    """One recipe file: its optimizer, where its numbers are, and the default of each that is not there."""

    doc: Document
    optimizer: str  # key of KINDS
    fields: dict[str, tuple[Path, Any]]  # lr, betas | beta1, beta2 | momentum | alpha, eps, weight_decay, ema
    micro: Path | None = None  # examples a device a micro-batch
    accumulation: Path | None = None
    whole: Path | None = None  # the global batch itself
    devices: int | None = None  # what the file itself says
    devices_path: Path | None = None
    rates: tuple[Path, ...] = ()  # learning rates beside lr: they go as lr goes
    epochs: Path | None = None  # the run's length, either way
    steps: Path | None = None
    warmup: tuple[Path, int] | None = None  # in steps, and its default
    counts: tuple[Path, ...] = ()  # other counts of optimizer steps
    lengthless: bool = False  # the schedule in the file counts steps, and needs its length
    rate_at: Callable[[float], float] | None = None  # the learning rate at a batch, where the file gives none
    clipping: tuple[Path, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    read: Callable[[str, str], Layout]
    syntax: str  # yaml | toml | json: what a recipe from another trainer is written in
    optimizers: dict[str, str]  # key of KINDS -> its name there
    optimizer_path: Path
    cannot: str  # what the format cannot express


def _optimizer(doc: Document, path: Path, default: str | None, known: dict[str, str]) -> str:
    name = doc.get(path)
    if name is None and default is None:
        raise RuleError(f"{doc.where} does not name its optimizer: set {'.'.join(path)}; allowed: {', '.join(known)}")
    key = str(default if name is None else name)
    found = known.get(key) or known.get(key.lower())
    if found is None:
        raise RuleError(f"unknown optimizer class {key!r} at {'.'.join(path)}; allowed: {', '.join(known)}")
    return found


def _betas(kind: str, prefix: Path, defaults: dict[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Fields named as torch names them, under `prefix`."""
    beta = KINDS[kind].field
    names = ("lr", beta, "weight_decay", *(("eps",) if KINDS[kind].family == "adaptive" else ()))
    return {n: ((*prefix, n), defaults.get(n)) for n in names}


TORCH: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "AdamW": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "SGD": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
    "RMSprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0},
    "Muon": {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1},
    "Lion": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0},
}

# --- plain: the words of `scale` ---

PLAIN = {k.lower(): k for k in ("AdamW", "Adam", "RMSprop", "SGD", "Lion", "Muon")}


def plain(text: str, where: str) -> Layout:
    doc = Yaml(text, where)
    kind = _optimizer(doc, ("optimizer",), None, PLAIN)
    fields = _betas(kind, (), {"weight_decay": 0.0, "momentum": 0.0, "eps": 1e-8})
    if doc.get(("ema",)) is not None:
        fields["ema"] = (("ema",), None)
    return Layout(
        doc,
        kind,
        fields,
        whole=("batch",),
        epochs=("epochs",),
        steps=("steps",),
        warmup=(("warmup_steps",), 0),
        counts=(("milestones",),),
        lengthless=doc.get(("warmup_steps",)) is not None or doc.get(("milestones",)) is not None,
    )


# --- Hugging Face TrainingArguments ---

_HF_ADAMW = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit",
)  # fmt: skip
HF = dict.fromkeys(_HF_ADAMW, "AdamW") | dict.fromkeys(
    ("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), "Lion"
)
HF["sgd"] = "SGD"


def hf(text: str, where: str) -> Layout:
    doc = Yaml(text, where)
    kind = _optimizer(doc, ("optim",), "adamw_torch_fused", HF)
    fields: dict[str, tuple[Path, Any]] = {
        "lr": (("learning_rate",), 5e-5),
        "weight_decay": (("weight_decay",), 0.0),
    }
    if kind != "SGD":  # the Trainer gives its SGD neither momentum nor betas
        fields |= {"beta1": (("adam_beta1",), 0.9), "beta2": (("adam_beta2",), 0.999)}
    if kind == "AdamW":
        fields["eps"] = (("adam_epsilon",), 1e-8)
    counts = [("logging_steps",), ("eval_steps",), ("save_steps",)]  # below 1 they are shares of the run
    warmup = doc.get(("warmup_steps",)) or 0
    ratio = not warmup and doc.get(("warmup_ratio",))  # a share of the run; warmup_steps, if given, goes before it
    notes = []
    if doc.get(("deepspeed",)) is not None:
        notes.append("the DeepSpeed file that `deepspeed` names is not read: convert it too, or keep its values auto")
    if any(p[0] == "lr_scheduler_kwargs" for p in doc.values):
        notes.append(
            "lr_scheduler_kwargs is left as it is: a count of steps or an absolute rate in it is yours to move"
        )
    return Layout(
        doc,
        kind,
        fields,
        micro=("per_device_train_batch_size",),
        accumulation=("gradient_accumulation_steps",),
        epochs=("num_train_epochs",),
        steps=("max_steps",),
        warmup=(("warmup_ratio" if ratio else "warmup_steps",), 0),
        counts=tuple(counts),
        lengthless=isinstance(warmup, int | float) and warmup >= 1,
        clipping=(("max_grad_norm",), 1.0),
        notes=notes,
    )


# --- Lightning's CLI ---

LIGHTNING = {f"torch.optim.{k}": k for k in ("AdamW", "Adam", "RMSprop", "SGD", "Muon")}
LIGHTNING |= {k: k for k in ("AdamW", "Adam", "RMSprop", "SGD", "Muon")}


def lightning(text: str, where: str) -> Layout:
    doc = Yaml(text, where)
    kind = _optimizer(doc, ("optimizer", "class_path"), None, LIGHTNING)
    homes: list[Path] = [("data",), ("data", "init_args"), ("model",), ("model", "init_args")]
    micro = next((p for h in homes if doc.get(p := (*h, "batch_size")) is not None), ("data", "batch_size"))
    devices, nodes = doc.get(("trainer", "devices")), doc.get(("trainer", "num_nodes"))
    known = devices * (nodes or 1) if isinstance(devices, int) and devices > 0 else None
    if isinstance(devices, list):
        known = len(devices) * (nodes or 1)
    notes = []
    if doc.get(("lr_scheduler", "class_path")) is not None:
        notes.append(
            "lr_scheduler is left as it is: the CLI steps it once an epoch, which is a function of samples already; "
            "where your model steps it every optimizer step, its counts are yours to divide"
        )
    return Layout(
        doc,
        kind,
        _betas(kind, ("optimizer", "init_args"), TORCH[kind]),
        micro=micro,
        accumulation=("trainer", "accumulate_grad_batches"),
        devices=known,
        devices_path=("trainer", "devices"),
        epochs=("trainer", "max_epochs"),
        steps=("trainer", "max_steps"),
        clipping=(("trainer", "gradient_clip_val"), None),
        notes=notes,
    )


# --- timm's train.py: flags, or the args.yaml that it writes ---

TIMM = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "nesterov": "SGD", "momentum": "SGD", "lion": "Lion"}


def timm(text: str, where: str) -> Layout:
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    doc: Document = Flags(text, where) if " -" in f" {first}" or first.rstrip().endswith("\\") else Yaml(text, where)
    kind = _optimizer(doc, ("opt",), "sgd", TIMM)
    fields: dict[str, tuple[Path, Any]] = {"lr": (("lr",), None), "weight_decay": (("weight_decay",), 2e-5)}
    if kind == "SGD":
        fields["momentum"] = (("momentum",), 0.9)
    else:
        fields["betas"] = (("opt_betas",), TORCH[kind]["betas"])
    if KINDS[kind].family == "adaptive":
        fields["eps"] = (("opt_eps",), 1e-8)
    if doc.get(("model_ema",)):
        fields["ema"] = (("model_ema_decay",), 0.9998)
    notes = [
        f"{p} is not in the file: its default, an absolute learning rate, stays"
        for p in ("warmup_lr", "min_lr")
        if doc.get((p,)) is None
    ]

    def rate_at(batch: float) -> float:
        """What train.py makes of lr_base where lr is not given: a scaling of its own, by the optimizer's name."""
        base, size = (doc.get(("lr_base",)) or 0.1), (doc.get(("lr_base_size",)) or 256)
        how = doc.get(("lr_base_scale",)) or ("sqrt" if "ada" in str(doc.get(("opt",)) or "sgd").lower() else "linear")
        return float(base * ((batch / size) ** 0.5 if how == "sqrt" else batch / size))

    return Layout(
        doc,
        kind,
        fields,
        rate_at=rate_at,
        micro=("batch_size",),
        accumulation=("grad_accum_steps",),
        rates=(("warmup_lr",), ("min_lr",)),
        epochs=("epochs",),
        clipping=(("clip_grad",), None),
        notes=notes,
    )


# --- torchtitan ---

TITAN = {"AdamW": "AdamW", "Adam": "Adam"}


def torchtitan(text: str, where: str) -> Layout:
    doc = Toml(text, where)
    kind = _optimizer(doc, ("optimizer", "name"), "AdamW", TITAN)
    o = "optimizer"
    local = "batch_size" if doc.get(("training", "batch_size")) is not None else "local_batch_size"  # until mid 2025
    return Layout(
        doc,
        kind,
        {
            "lr": ((o, "lr"), 8e-4),
            "beta1": ((o, "beta1"), 0.9),
            "beta2": ((o, "beta2"), 0.95),
            "eps": ((o, "eps"), 1e-8),
            "weight_decay": ((o, "weight_decay"), 0.1),
        },
        micro=("training", local),
        whole=("training", "global_batch_size"),
        steps=("training", "steps"),
        warmup=(("lr_scheduler", "warmup_steps"), 200),
        counts=(("checkpoint", "interval"), ("metrics", "log_freq"), ("validation", "freq")),
        lengthless=True,  # it counts nothing but steps, and warms up over 200 unless told otherwise
        clipping=(("training", "max_norm"), 1.0),
    )


# --- DeepSpeed ---

DEEPSPEED = {"AdamW": "AdamW", "Adam": "Adam", "SGD": "SGD", "Lion": "Lion"}
DEEPSPEED |= {k.lower(): v for k, v in DEEPSPEED.items()}


def deepspeed(text: str, where: str) -> Layout:
    doc = Yaml(text, where)
    params: Path = ("optimizer", "params")
    kind = _optimizer(doc, ("optimizer", "type"), None, DEEPSPEED)
    adam_w_mode, torch_adam = doc.get((*params, "adam_w_mode")), doc.get((*params, "torch_adam"))
    notes = []
    if kind == "Adam" and adam_w_mode is not False:
        kind = "AdamW"
        notes.append('type "Adam" has adam_w_mode true unless told otherwise: its decay is decoupled, so this is AdamW')
    defaults = {**TORCH[kind], **({} if torch_adam else {"weight_decay": 0.0})}
    s: Path = ("scheduler", "params")
    scheduler = doc.get(("scheduler", "type"))
    if scheduler not in (None, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        raise RuleError(
            f"{where}: scheduler {scheduler!r} counts steps in ways that are not known here; allowed: WarmupLR, "
            "WarmupDecayLR, WarmupCosineLR, or none"
        )
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, micro, accumulation = (doc.get((p,)) for p in sizes)
    unit = (micro if isinstance(micro, int) else 1) * (accumulation if isinstance(accumulation, int) else 1)
    if isinstance(whole, int) and unit > 0 and whole % unit:
        raise RuleError(f"{where}: train_batch_size={whole} is no multiple of micro-batch x accumulation = {unit}")
    all_three = isinstance(whole, int) and isinstance(micro, int) and isinstance(accumulation, int) and unit > 0
    return Layout(
        doc,
        kind,
        _betas(kind, params, defaults),
        micro=("train_micro_batch_size_per_gpu",),
        accumulation=("gradient_accumulation_steps",),
        whole=("train_batch_size",),
        devices=whole // unit if all_three else None,  # DeepSpeed insists that they agree
        rates=((*s, "warmup_max_lr"), (*s, "warmup_min_lr")),
        steps=(*s, "total_num_steps") if scheduler else None,
        warmup=((*s, "warmup_num_steps"), 1000) if scheduler else None,
        counts=(("steps_per_print",),),
        lengthless=scheduler in ("WarmupDecayLR", "WarmupCosineLR"),
        clipping=(("gradient_clipping",), None),
        notes=notes,
    )


def _names(known: dict[str, str]) -> dict[str, str]:
    return {kind: name for name, kind in reversed(known.items())}


FORMATS = {
    "plain": Format(
        plain, "yaml", _names(PLAIN), ("optimizer",), "micro-batch, devices, clipping; more than one parameter group"
    ),
    "hf": Format(
        hf,
        "yaml",
        _names(HF) | {"AdamW": "adamw_torch"},
        ("optim",),
        "the global batch (it is per device x accumulation x devices, and the devices are the launcher's); a model "
        "average; momentum of SGD; betas of a single parameter group",
    ),
    "lightning": Format(
        lightning,
        "yaml",
        {k: f"torch.optim.{k}" for k in LIGHTNING.values()},
        ("optimizer", "class_path"),
        "the global batch (it is batch_size x accumulate_grad_batches x devices); warm-up; a model average",
    ),
    "timm": Format(
        timm,
        "yaml",
        _names(TIMM),
        ("opt",),
        "the global batch (it is batch_size x grad_accum_steps x devices); lengths and warm-up in steps",
    ),
    "torchtitan": Format(
        torchtitan, "toml", _names(TITAN), ("optimizer", "name"), "lengths in epochs; a model average; SGD"
    ),
    "deepspeed": Format(
        deepspeed,
        "json",
        {k: k for k in DEEPSPEED.values()},
        ("optimizer", "type"),
        "the length of the run without a scheduler; a model average",
    ),
}
