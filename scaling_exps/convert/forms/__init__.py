"""The forms: how each is read, and what a new file of it needs. `keys.toml` holds the keys it is known by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scaling_exps.convert.documents import Document, Path, dotted, words
from scaling_exps.convert.forms import hf, language, own, vision
from scaling_exps.convert.layout import Layout
from scaling_exps.rules import RuleError


@dataclass(frozen=True)
class Form:
    read: Callable[[Document], Layout]
    cannot: str  # what the form has no words for
    syntax: str = ""  # of a new file; "" where none is written from another form's
    optimizers: dict[str, str] = field(default_factory=dict)  # row of rules.OPTIMIZERS -> its name there
    optimizer_path: Path = ()


_TORCH = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "torch_rmsprop": "RMSprop", "muon": "Muon"}
_PLAIN = {"adam": "adam", "adamw": "adamw", "torch_rmsprop": "rmsprop", "sgd": "sgd", "lion": "lion", "muon": "muon"}
_HF = {"adamw": "adamw_torch", "lion": "lion_32bit", "sgd": "sgd", "torch_rmsprop": "rmsprop"}
_TIMM = {n: n for n in ("adam", "adamw", "sgd", "lion")}
_PER_DEVICE = (
    "the global batch (it is the batch per device x accumulation x devices, and the devices are the launcher's)"
)

FORMS: dict[str, Form] = {
    "plain": Form(own.plain, "micro-batch, devices, clipping; parameter groups", "yaml", _PLAIN, ("optimizer",)),
    "hf": Form(hf.hf, f"{_PER_DEVICE}; a model average", "yaml", _HF, ("optim",)),
    "axolotl": Form(hf.axolotl, _PER_DEVICE),
    "llamafactory": Form(hf.llamafactory, "betas, eps and weight decay of AdamW"),
    "accelerate": Form(hf.accelerate, _PER_DEVICE),
    "lightning": Form(
        vision.lightning, f"{_PER_DEVICE}; warm-up; a model average", "yaml",
        {row: f"torch.optim.{name}" for row, name in _TORCH.items()}, ("optimizer", "class_path"),
    ),
    "timm": Form(vision.timm, f"{_PER_DEVICE}; lengths and warm-up in steps", "yaml", _TIMM, ("opt",)),
    "torchtitan": Form(
        language.torchtitan, "lengths in epochs; a model average; SGD", "toml",
        {"adam": "Adam", "adamw": "AdamW"}, ("optimizer", "name"),
    ),
    "nanogpt": Form(language.nanogpt, "eps; lengths in epochs"),
    "megatron": Form(language.megatron, "lengths in epochs; a model average"),
    "nemo": Form(language.nemo, "a model average"),
    "deepspeed": Form(
        own.deepspeed, "the length of the run without a scheduler; a model average", "json",
        {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "lion": "Lion"}, ("optimizer", "type"),
    ),
}  # fmt: skip


def guess(doc: Document) -> str:
    """The form whose keys the file has.

    Raises:
        RuleError: none, or two as well as each other; the message lists what was looked for.
    """
    ends = {dotted(p[i:]) for p in doc.values for i in range(len(p))}
    first = {str(p[0]) for p in doc.values}

    def score(name: str) -> int:
        return sum(2 * (sign in ends) if "." in sign else (sign in first) for sign in words("signs", name))

    scores = sorted(((score(name), name) for name in FORMS), reverse=True)
    (best, name), (second, other) = scores[:2]
    if best < 2:
        looked = "; ".join(f"{n}: {', '.join(sorted(words('signs', n)))[:100]}" for n in FORMS)
        raise RuleError(f"{doc.where}: no known form of recipe. Say which with --from; looked for {looked}")
    if best == second:
        raise RuleError(f"{doc.where} could be {name} or {other}: say which with --from")
    return name
