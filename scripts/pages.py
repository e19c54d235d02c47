"""mkdocs' hook: the pages of the site that are made from the code, and from files that stand elsewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PYTHON = {  # module: its public names; () is its __all__
    "scaling_exps": ("scale",),
    "scaling_exps.rules": (),
    "scaling_exps.rules.laws": ("check",),
    "scaling_exps.noise.estimators": ("full", "unit_gradients", "example_gradients", "Free", "Estimate", "Value"),
    "scaling_exps.noise.validity": ("deviation", "steps_and_samples", "assess"),
    "scaling_exps.records": ("RunDir", "Records"),
    "scaling_exps.theory": (),
}


def on_files(files: Any, config: Any) -> Any:
    made = {
        "index.md": from_root("README.md"),
        "contributing.md": from_root("CONTRIBUTING.md"),
        "changelog.md": from_root("CHANGELOG.md"),
        "commands.md": commands(),
        "python.md": python(),
        "demo/page.html": demo(),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def from_root(name: str) -> str:
    """A page that stands beside docs/: its links are seen from there."""
    return (ROOT / name).read_text().replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")


def commands() -> str:
    """What every command says to --help."""
    from scaling_exps import cli

    general = said("--help")
    out = ["# Commands", "Written by the commands themselves: `scalerun --help`, `scalerun COMMAND --help`.\n"]
    for name in cli.COMMANDS:
        text = said(name, "--help")
        text = "It takes the words of `scalerun`, see below." if text == general else f"```text\n{text}\n```"
        out.append(f"## scalerun {name}\n\n{text}\n")
    return "\n".join([*out, f"## scalerun\n\n```text\n{general}\n```\n"])


def said(*words: str) -> str:
    """What these words print; as wide as a page."""
    from scaling_exps import cli

    out = io.StringIO()
    os.environ["COLUMNS"] = "90"
    try:
        with contextlib.redirect_stdout(out):
            cli.main(list(words))
    finally:
        del os.environ["COLUMNS"]
    return out.getvalue().strip()


def python() -> str:
    """Signature and docstring of each public name."""
    out = ["# Python\n\nWritten from the code. Nothing else is promised to stay.\n"]
    for module, names in PYTHON.items():
        where = importlib.import_module(module)
        out.append(f"## {module}\n\n{prose(where)}")
        for name in names or where.__all__:
            thing = getattr(where, name)
            if inspect.isfunction(thing) or (inspect.isclass(thing) and thing.__doc__):
                out += described(name, thing, "###")
            if inspect.isclass(thing) and not issubclass(thing, Exception):
                own = [n for n in vars(thing) if not n.startswith("_") and inspect.isroutine(getattr(thing, n))]
                out += [
                    line for n in own if prose(getattr(thing, n)) for line in described(n, getattr(thing, n), "####")
                ]
    return "\n".join(out)


def described(name: str, thing: Any, head: str) -> Iterator[str]:
    yield f"{head} {name}\n"
    with contextlib.suppress(ValueError):  # a type without a signature
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))  # annotations are strings
        yield f"```python\n{name}{wrapped(signature) if len(signature) > 80 else signature}\n```\n"
    yield prose(thing) + "\n"


def wrapped(signature: str) -> str:
    """One argument a line."""
    inside, _, returns = signature[1:].rpartition(")")
    return "(\n    " + ",\n    ".join(re.split(r", (?![^\[(]*[\])])", inside)) + f",\n){returns}"


def prose(thing: Any) -> str:
    """The docstring as Markdown: paragraphs stay, what is indented or typed to Python is code."""
    parts = (inspect.getdoc(thing) or "").split("\n\n")
    for i, part in enumerate(parts):
        if ">>>" in part:
            parts[i] = f"```pycon\n{part}\n```"
        elif re.search(r"^ ", part, re.M):
            parts[i] = f"```text\n{part}\n```"
    return "\n\n".join(parts)


@functools.cache
def demo() -> str:
    """The page of `scalerun report` over the records of one `make demo`."""
    from scaling_exps import report

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with tarfile.open(ROOT / "docs" / "demo.tar.xz") as records:
            records.extractall(folder, filter="data")
        report.main([f"{folder}/runs", "--out", f"{folder}/report"])
        return Path(folder, "report", "index.html").read_text()
