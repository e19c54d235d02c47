"""Hydra's composition of conf/ and the words of a command line. The only module that knows Hydra and OmegaConf."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from scaling_exps.config import schema
from scaling_exps.config.schema import Config, ConfigError, Dataset

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())  # in the wheel, or in a checkout

SPLIT = {  # keys that people expect from other trainers -> the keys that hold their numbers here
    "recipe.betas": "recipe.beta1, recipe.beta2, recipe.momentum",
    "recipe.weight_decay": "recipe.l2 (inside the gradient), recipe.decoupled_decay (adamw)",
}


def compose(argv: list[str]) -> list[Config]:
    """Let Hydra read `argv` (overrides and Hydra's own flags) and return one Config per `-m` combination.

    Flags that only print (`--help`, `--cfg job`, ...) print and return an empty list.

    Raises:
        ConfigError: unknown group, option or key, or a value of the wrong type.
    """
    for word in argv:
        if re.match(r"\+{1,2}(?!hydra)|~(?!hydra)", word):
            raise ConfigError(f"{word!r}: keys cannot be added or removed here; {_nearest_key(word.lstrip('+~'))}")
    # these hold what timm, the user's factory or sbatch take, so their keys are the only ones that may be new
    argv = [f"++{w}" if re.match(r"(model\.options|launch\.sbatch)[.=]", w) else w for w in argv]
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed: list[dict[str, Any]] = []

    def collect(cfg: DictConfig, runtime: Any) -> None:
        raw: Any = OmegaConf.to_container(cfg, resolve=True)
        raw["experiment"] = runtime.runtime.choices.get("experiment")
        raw["words"] = list(runtime.overrides.task)
        composed.append(raw)

    if not any(word.startswith("-") for word in argv):  # hydra.main composes everything twice
        try:
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = hydra.compose("config", overrides=argv, return_hydra_config=True)
            OmegaConf.set_struct(cfg, False)
            collect(cfg, cfg.pop("hydra"))
        except (HydraException, OmegaConfBaseException, ValueError) as e:  # model=5 is a bare ValueError of Hydra's
            raise ConfigError(_explain(e)) from e
        return [schema.build(Config, raw) for raw in composed]
    if {"--help", "-h"} & set(argv):
        argv = [*argv, "hydra/help=scalerun"]
    saved = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory() as scratch:  # Hydra insists on output folders; a run leaves its own instead
        first = next((i for i, word in enumerate(argv) if "=" in word and not word.startswith("-")), len(argv))
        folders = [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
        sys.argv = ["scalerun", *argv[:first], *folders, *argv[first:]]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions instead of printed tracebacks
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(
                lambda cfg: collect(cfg, HydraConfig.get())
            )()
        except (HydraException, OmegaConfBaseException, ValueError) as e:
            raise ConfigError(_explain(e)) from e
        finally:
            sys.argv = saved[0]
            if saved[1] is None:
                del os.environ["HYDRA_FULL_ERROR"]
            else:
                os.environ["HYDRA_FULL_ERROR"] = saved[1]
    return [schema.build(Config, raw) for raw in composed]


def dataset(name: str) -> Dataset:
    """The group conf/dataset/NAME.yaml alone.

    Raises:
        ConfigError: there is no such file, or it has a fault.
    """
    import hydra

    options = sorted(p.stem for p in (CONF / "dataset").glob("*.yaml"))
    if name not in options:
        raise ConfigError(f"unknown dataset {name!r}; allowed: {', '.join(options)}")
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        raw: Any = OmegaConf.to_container(hydra.compose(f"dataset/{name}"), resolve=True)
    kinds = {str(k.__struct_config__.tag): k for k in get_args(Dataset)}
    group: Dataset = schema.build(kinds[raw["dataset"]["kind"]], raw["dataset"])
    return group


def recipes_for(optimizer: str) -> list[str]:
    """The recipes of conf/recipe that have numbers for an optimizer, whether in their own file or in one beside it."""
    listed = re.compile(rf"^optimizers:.*\b{re.escape(optimizer)}\b", re.MULTILINE)
    files = [f.relative_to(CONF / "recipe") for f in (CONF / "recipe").rglob("*.yaml") if listed.search(f.read_text())]
    return sorted({f.parts[0].removesuffix(".yaml") for f in files})


def _explain(error: Exception) -> str:
    text = str(error).split("\nSee https://")[0].strip()
    if key := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key {key[1]!r}; {_nearest_key(key[1])}"
    if group := re.search(r"Could not find '([^/']+)/([^']+)'", text):
        options = sorted(p.stem for p in (CONF / group[1]).glob("*.yaml"))
        if group[1] == "recipe":
            same = [o for o in options if o.split("-")[0] == group[2].split("-")[0]]  # data set
            return (
                f"no reference point {group[2]!r} (data set - class of networks); there are "
                f"{', '.join(same or options)}. "
                "Choose another model or data set, or a recipe, perhaps your own: recipe=NAME --config-dir DIR"
            )
        close = difflib.get_close_matches(group[2], options, 1)
        return f"unknown {group[1]} {group[2]!r}{_did_you_mean(close)}; allowed: {', '.join(options)}"
    first = text.splitlines()[0] if text else repr(error)
    if sweep := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", first):
        return f"{sweep[1]}={sweep[2]}: a list is written {sweep[1]}=[{sweep[2]}]; or sweep with -m"
    if word := re.search(r"Error parsing override '([^=]*)'$", first):
        return f"{word[1]!r} is neither key=value nor a command; a command comes first (scalerun --help lists them)"
    return first


def _did_you_mean(close: list[str]) -> str:
    return f" (did you mean {close[0]!r}?)" if close else ""


@lru_cache(1)
def _keys() -> list[str]:
    return [key.name for key in schema.keys()]  # noqa: SIM118 (no dictionary)


def _nearest_key(word: str) -> str:
    key = word.split("=")[0].split("@")[0]
    for old, new in SPLIT.items():
        if key in (old, old.split(".")[1]):
            return f"its numbers have names of their own: {new}"
    known = _keys()
    inside = [k for k in known if k.endswith(f".{key}")]  # lr=0.1 is meant for recipe.lr
    close = inside or difflib.get_close_matches(key, known, 1, 0.5)
    section = key.split(".")[0] + "."
    groups = list(dict.fromkeys(k.split(".")[0] for k in known))
    options = [k for k in known if k.startswith(section)] or groups
    return (f"did you mean {' or '.join(map(repr, close))}? " if close else "") + f"Allowed: {', '.join(options)}"
