"""`python -m scaling_exps.config.document` writes the tables of docs/keys.md, out of the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling_exps.config.compose import CONF
from scaling_exps.config.schema import Key, keys

START = "<!-- From here on written by `python -m scaling_exps.config.document`; a test keeps it so. -->\n\n"
_TABLE = "| key | allowed | unit | meaning | default |\n|---|---|---|---|---|"


def markdown(rows: list[Key]) -> str:
    """The tables of these keys, one for each group.

    >>> "| `demo` | text |  | a key |  |" in markdown([Key("demo", "text", "", "a key")])
    True
    """
    from omegaconf import OmegaConf

    defaults: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    groups = dict.fromkeys(key.name.rpartition(".")[0] for key in rows)
    out = []
    for group in sorted(groups, key=bool):  # the keys of no group first
        out.append(f"## {group or 'The command'}\n\n{_TABLE}")
        for key in rows:
            of, _, name = key.name.rpartition(".")
            if of == group:
                meaning = key.meaning + (f" (only {', '.join(key.variants)})" if key.variants else "")
                node = defaults.get(of) or {} if of else defaults
                # as written: `${oc.env:...}` is not resolved
                default = f"`{node[name]}`".replace("`None`", "`null`") if name in node else ""
                cells = (f"`{key.name}`", key.allowed, key.unit, meaning, default)
                out.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        out.append("")
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "keys.md"
    page.write_text(page.read_text().partition(START)[0] + START + markdown(keys()))
