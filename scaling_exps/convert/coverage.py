"""The keys that nobody asked for: what could change the batch or the optimizer is refused, the rest is named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scaling_exps.convert import optimizers
from scaling_exps.convert.documents import FILE, Document, Odd, Path, dotted, is_number, words
from scaling_exps.convert.layout import Layout


def _any(name: str) -> str:
    return f"({'|'.join(words('patterns', name))})"


def _words(name: str, rest: str = "") -> re.Pattern[str]:
    """A pattern of keys that hold one of the words, between underscores."""
    return re.compile(rf"(^|_){_any(name)}(_|$){rest}", re.I)


_COUNTED = _words("devices")
_BATCH = _words("batch", "|batch_?size|parallel(ism)?_(size|degree)")
_EVALUATION = _words("evaluation")
_CLOCK = _words("clock", "|_lr|lr_|learning_rate")
_RATE = re.compile(r"(^|_)lr(_|$)|learning_rate")
_HARMLESS = re.compile(f"{_any('harmless')}$|{_any('harmless_start')}", re.I)
_COUPLED = re.compile(_any("coupled"), re.I)
_PLACEMENT = words("harmless", "placement")  # where and how, not what
_FILES = (
    "config",
    "config_file",
    "config_path",
    "config_name",
    "cfg",
    "deepspeed_config",
    "deepspeed_config_file",
    "deepspeed",
)


@dataclass(frozen=True)
class Coverage:
    clocks: tuple[str, ...]  # not looked at, and a rate, a clock or an average by its name
    rest: tuple[str, ...]
    kept: tuple[str, ...]  # understood, and left as it is
    harmless: int


def coverage(layout: Layout, keep: Iterable[str] = ()) -> Coverage:
    """What becomes of every key of the file that was not asked for.

    Args:
        keep: keys of which the user says that they decide neither the batch nor the optimizer.

    Raises:
        RuleError: a key that may decide one of those, and is not understood.
    """
    doc, said = layout.doc, set(keep)
    refused, clocks, rest, kept = [], [], [], []
    harmless = 0
    places = {doc.spans[path] for path in doc.read if path in doc.spans}  # one may have two names
    for path, value in doc.values.items():
        last = next((str(k) for k in reversed(path) if isinstance(k, str)), "")
        name = last if path[0] == FILE else dotted(path)
        first = value[0] if isinstance(value, list) and value else value
        if path in doc.wanted:
            continue
        if path in doc.read or doc.spans.get(path) in places:
            kept.append(name)
        elif last in layout.harmless or path[0] in layout.sections:
            harmless += 1
        elif name in said or inactive(value):
            rest.append(name)
        elif reason := _reason(path, last, value, doc):
            shown = str(value)[:60] if path[0] == FILE else f"{name}={str(value)[:60]}"
            refused.append(f"{shown} ({reason})")
        elif (_HARMLESS.match(last) and not _RATE.search(last)) or (_BATCH.search(last) and _EVALUATION.search(last)):
            harmless += 1
        elif _CLOCK.search(last) and (isinstance(value, Odd) or not isinstance(first, str)):
            clocks.append(f"{name}={str(value)[:40]}")
        else:
            rest.append(name)
    if refused:
        raise doc.error(
            f"not understood as {layout.form}, and one wrong number in silence would cost more: "
            f"{'; '.join(refused)}. Where such a key decides neither the batch nor the optimizer, say so with "
            "--keep KEY"
        )
    return Coverage(tuple(clocks), tuple(rest), tuple(kept), harmless)


def inactive(value: Any) -> bool:
    return not value or value in ("none", "null", "false", "no")


def _reason(path: Path, last: str, value: Any, doc: Document) -> str:
    """Why a key that nobody asked for may decide the batch or the optimizer; "" where it cannot."""
    if last in _PLACEMENT:
        return ""
    if _batch(last, value):
        return "it may change the batch"
    if path[0] == FILE and not any(p.endswith(last.rsplit("/", 1)[-1]) for p in doc.partners):
        return "the values in that file count too: convert it, or write them as flags"
    file = value[0] if isinstance(value, list) else value  # `--config_file zero3.yaml train.py`
    named = last in _FILES and isinstance(file, str) and (doc.syntax == "flags" or last == "deepspeed_config")
    if named and path[0] != "model" and not any(p.endswith(file.rsplit("/", 1)[-1]) for p in doc.partners):
        return "the values in that file count too: convert it, or give it as --with"
    family = last.split("_")[0]
    if not optimizers.SWITCHES.search(last) or (
        family != "use" and doc.values.get((*path[:-1], f"use_{family}")) is False
    ):
        return ""
    return optimizers.switch_reason(last)


def _batch(last: str, value: Any) -> bool:
    if not _BATCH.search(last) or _EVALUATION.search(last):
        return False
    counted = _COUNTED.search(last)
    if isinstance(value, bool) or (counted and (value == 1 or isinstance(value, float | Odd))):
        return not counted
    if isinstance(value, str) and not counted and re.search(r"(?<![A-Za-z\d])\d", value):  # "0:256 1B:1024", no "fp32"
        return True
    return is_number(value) or isinstance(value, list | Odd) or value == "auto"


def coupled(doc: Document) -> str | None:
    """The first word of the file that names a loss or a layer in which the examples of a batch meet."""
    for path, value in doc.values.items():
        words = (str(path[-1]), value if isinstance(value, str) else "")
        if not inactive(value) and any(_COUPLED.search(word) and len(word) < 80 for word in words):
            return f"{dotted(path)}={str(value)[:40]}"
    return None
