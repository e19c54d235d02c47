"""The forms: how each is read. `keys.toml` holds the keys that it is known by, and what a new file of it needs."""

from __future__ import annotations

from collections.abc import Callable

from scaling_exps.convert.documents import Document, dotted, words
from scaling_exps.convert.forms import hf, language, own, rl, vision
from scaling_exps.convert.layout import Layout
from scaling_exps.rules import RuleError

_TRAINERS = (own.plain, hf.hf, hf.axolotl, hf.llamafactory, hf.accelerate, vision.lightning, vision.timm)
_SCRIPTS = (
    language.torchtitan,
    language.nanogpt,
    language.megatron,
    language.nemo,
    own.deepspeed,
    rl.openrlhf,
    rl.verl,
)
FORMS: dict[str, Callable[[Document], Layout]] = {read.__name__: read for read in (*_TRAINERS, *_SCRIPTS)}


def guess(doc: Document) -> str:
    """The form whose keys the file has.

    Raises:
        RuleError: none, or two as well as each other; the message lists what was looked for.
    """
    ends = {dotted(p[i:]) for p in doc.values for i in range(len(p))}
    first = {str(p[0]) for p in doc.values}

    def score(name: str) -> int:
        return sum(2 * (sign in ends) if "." in sign else (sign in first) for sign in words(name, "signs"))

    scores = sorted(((score(name), name) for name in FORMS), reverse=True)
    (best, name), (second, other) = scores[:2]
    if best < 2:
        looked = "; ".join(f"{n}: {', '.join(sorted(words(n, 'signs')))[:100]}" for n in FORMS)
        raise doc.error(f"no known form of recipe. Say which with --from; looked for {looked}")
    if best == second:
        raise RuleError(f"{doc.where} could be {name} or {other}: say which with --from")
    return name
