"""What other trainers call their optimizers: a row of the rules' table, or the reason why there is no rule."""

from __future__ import annotations

import re

from scaling_exps.convert.documents import words
from scaling_exps.rules import RuleError

KNOWN: dict[str, tuple[str, str]] = {  # bare name -> (row of rules.OPTIMIZERS, what to say)
    "adamw": ("adamw", ""),
    "adam": ("adam", ""),
    "nadam": ("adam", "NAdam: the rule is Adam's, whose average it reads one step ahead (derived here, not checked)"),
    "nadamw": ("adamw", "NAdamW: the rule is AdamW's, whose average it reads one step ahead (derived here)"),
    "radam": (
        "adam",
        "RAdam: the rule is Adam's and keeps its rectification (derived here) but for the first steps",
    ),
    "rmsprop": ("torch_rmsprop", ""),
    "sgd": ("sgd", ""),
    "lion": ("lion", ""),
    "muon": ("muon", "Muon: contested, and of torch's Muon alone: what it hands to AdamW has a rule of its own"),
}

_NO = "no batch-size rule is known for it"
REFUSED: dict[str, str] = {  # part of a name -> the reason
    "adafactor": "Adafactor clips its update and lets the decay of v grow with the step count: " + _NO,
    "lamb": "LAMB divides each layer's step by its norm: the square-root rule's SDE does not describe it. Known is an "
    "experiment: √κ on lr, with a warm-up that grows by κ in epochs (You et al. 2020), good to 32k on BERT",
    "lars": "LARS divides each layer's step by its norm: the linear rule's SDE does not describe it. Known is an "
    "experiment: κ on lr with a long warm-up (You et al. 2017)",
    "galore": "GaLore keeps its moments in a subspace that it changes every so many steps: " + _NO,
    "apollo": "APOLLO scales the gradient by norms in a random subspace that changes with the steps: " + _NO,
    "badam": "BAdam trains one block of layers for so many steps, then the next: " + _NO,
    "adammini": "Adam-mini shares v over blocks of parameters that the file does not name: " + _NO,
    "ademamix": "AdEMAMix has a second slow average with schedules of its own in steps: " + _NO,
    "lomo": "LOMO updates inside the backward pass and normalises by group: " + _NO,
    "schedulefree": "schedule-free optimizers average the weights by their step count: " + _NO,
    "adamax": "Adamax divides by the largest gradient of the last 1/(1 - β2) steps, which grows with their number: the "
    "square-root rule does not hold",
    "adagrad": "Adagrad sums squares over the whole run; of the rules only √κ on lr follows: none is checked here",
    "rmsproptf": "TensorFlow's RMSprop adds ε inside the root, where its factor is 1/κ: no rule here does that",
    "prodigy": "Prodigy estimates its own learning rate: " + _NO,
    "dadapt": "D-Adaptation estimates its own learning rate: " + _NO,
    "decoupled": "its weight decay is not multiplied by lr, so it needs κ·λ where AdamW's rule has √κ·λ: " + _NO,
    "onebit": "1-bit Adam freezes v after a warm-up in steps: " + _NO,
    "zeroone": "0/1 Adam freezes v by a schedule in steps: " + _NO,
    "muon": "Muon hands part of the parameters to AdamW, two optimizers that move differently, and one learning rate "
    "serves both: only torch's Muon alone has a (contested) rule",
}
REFUSED |= dict.fromkeys(words("optimizers", "unknown"), _NO)

# A key with one of these words, switched on, may choose the optimizer.
SWITCHES = re.compile(f"(^|_)({'|'.join(words('optimizers', 'switches'))})(_|$)", re.I)


def bare(name: str) -> str:
    """A name without its package and its implementation: "bitsandbytes.optim.PagedAdamW8bit" -> "adamw".

    >>> bare("adamw_torch_fused"), bare("torch.optim.RMSprop"), bare("DeepSpeedCPUAdam")
    ('adamw', 'rmsprop', 'adam')
    """
    word = re.sub(r"[^a-z0-9]", "", name.rsplit(".", 1)[-1].lower())
    if word in KNOWN or word in REFUSED:
        return word
    cut = ""
    while cut != word:
        cut = word
        for part in words("optimizers", "wrapping"):
            word = word.removeprefix(part).removesuffix(part) or word
    return word


def find(name: object, at: str, decoupled: bool | None = False) -> tuple[str, str]:
    """(row of rules.OPTIMIZERS, what to say) of the optimizer called `name` at the key `at`.

    Args:
        decoupled: this trainer's "adam" has AdamW's decay. False: only where its implementation has it unless told
            otherwise (FusedAdam of apex and DeepSpeed, DeepSpeed's CPU Adam); None: the trainer tells those otherwise.
            bitsandbytes' Adam has no other decay, whoever calls it; torchao's, of the same names, has torch's.

    Raises:
        RuleError: no rule for it, with the reason; or not known at all.
    """
    word = bare(str(name))
    if word in KNOWN:
        full = str(name).lower()
        fused = decoupled is False and re.search("fused_?adam|cpu_?adam", full)
        if word == "adam" and (decoupled or fused or re.search("^(?!.*torchao).*(bnb|bitsandbytes|8bit|paged)", full)):
            return "adamw", f"{at}={name} has a decoupled weight decay here, so this is AdamW"
        return KNOWN[word]
    for part, reason in REFUSED.items():
        if part in word:
            raise RuleError(f"{at}={name}: {reason}")
    known = f"{', '.join(KNOWN)} and their 8-bit, paged, fused forms"
    raise RuleError(f"unknown optimizer class {name!r} at {at}: no rule is known here; known: {known}")


def switch_reason(key: str) -> str:
    """Why a key that may choose the optimizer stops the conversion."""
    word = re.sub(r"[^a-z0-9]", "", key.lower())
    return next((why for part, why in REFUSED.items() if part in word), "what it does to the optimizer is not known")
