"""Words that a command does not know, and the nearest that it does."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn


class UsageError(ValueError):
    """A word of the command line that nothing takes; the message names the nearest that is taken."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A question to be put behind the word; empty where nothing is near.

    >>> nearest("pln", ["plan", "status"])
    ' (did you mean plan?)'
    """
    return "".join(f" (did you mean {k}?)" for k in difflib.get_close_matches(word, list(known), 1))


class Parser(argparse.ArgumentParser):
    """The options of one command; raises UsageError where argparse would print and exit."""

    @property
    def flags(self) -> list[str]:
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        given = re.match("unrecognized arguments: ([^ =]+)", message)
        hint = nearest(given[1], self.flags) if given else ""
        raise UsageError(f"{message}{hint}; {self.prog} --help lists what it takes")
