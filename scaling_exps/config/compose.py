"""Hydra's composition of conf/ and the words of a command line. The only module that knows Hydra and OmegaConf."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Any, NoReturn

from scaling_exps.config import schema
from scaling_exps.config.schema import Config, ConfigError, Dataset
from scaling_exps.words import nearest

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())  # in the wheel, or in a checkout

SPLIT = {  # keys that people expect from other trainers -> the keys that hold their numbers here
    "recipe.betas": "recipe.beta1, recipe.beta2, recipe.momentum",
    "recipe.weight_decay": "recipe.l2 (inside the gradient), recipe.decoupled_decay (adamw)",
}


def compose(argv: list[str], flags: Iterable[str] = ()) -> list[Config]:
    """Let Hydra read `argv` (overrides and Hydra's own flags) and return one Config per `-m` combination.

    Flags that only print (`--help`, `--cfg job`, ...) print and return an empty list.

    Args:
        argv: the words.
        flags: those of the command, which it has taken out of `argv`; a misspelt one is told so.

    Raises:
        ConfigError: unknown group, option or key, or a value of the wrong type.
    """
    faults = [fault for word in argv if (fault := _illegal(word))]
    if unknown := _unknown_flag(argv, flags):
        raise _refusal([*faults, unknown])
    theirs = re.compile(r"(model\.options|launch\.sbatch)[.=]|ramp\.at=\{")  # these keys alone may hold new ones
    short = {"margin=auto": "margin.auto=true"}
    argv = [short.get(word, re.sub(r"^ramp=", "ramp.at=", word)) for word in argv]
    words = [f"++{word}" if theirs.match(word) else word for word in argv if not _illegal(word)]
    configs = []
    for raw in _hydra(words, faults):
        try:
            configs.append(schema.build(Config, raw))
        except ConfigError as e:
            faults += str(e).splitlines()
    if faults:
        raise _refusal(faults)
    return configs


def _refusal(faults: list[str]) -> ConfigError:
    return ConfigError("\n".join(dict.fromkeys(faults)).replace("ramp.at=", "ramp="))  # as it was typed


def _illegal(word: str) -> str:
    """Why a word never reaches Hydra; empty if it may."""
    if re.match(r"\+*~*hydra[./=@]", word):
        return f"{word!r}: what Hydra does with its own folders and jobs is not the user's to set; drop it"
    if kind := re.match(r"(model)\.kind=|(dataset)\.(?:kind|name)=|(launch)\.name=", word):
        group = next(filter(None, kind.groups()))
        return f"{word!r}: the group's file says what it is; choose one with {group}=NAME"
    choice = re.match(r"(\w+)=(|\[.*|\{.*)$", word)  # of nothing, a list or a mapping: Hydra's own code fails
    if choice and (CONF / choice[1]).is_dir():
        return _unknown_option(choice[1], choice[2])
    if re.match(r"\+|~", word):
        return f"{word!r}: keys cannot be added or removed here; {_nearest_key(word.lstrip('+~'))}"
    if re.match("-c[pn]|--config-[pn]", word):
        return f"{word!r} is not supported: files of your own are found with --config-dir DIR"
    if word.startswith("--e"):  # --experimental-rerun, also abbreviated: it unpickles a file
        return f"{word!r} is not supported: a run is repeated by its words (`scalerun status` lists runs)"
    return f"{word!r} stands for nothing; drop it" if word in ("", "--") or word.startswith("=") else ""


def _unknown_flag(argv: list[str], flags: Iterable[str]) -> str:
    """Why a word that begins with a dash is no flag of Hydra's; empty if all are."""
    if not any(word.startswith("-") for word in argv):
        return ""
    from hydra._internal.utils import get_args_parser

    theirs = list(get_args_parser()._option_string_actions)
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        long = flag.startswith("--")
        if flag[:1] != "-" or any(t.startswith(flag) if long else len(t) == 2 and flag.startswith(t) for t in theirs):
            continue
        if flag in theirs:  # -sc
            continue
        if hint := nearest(flag, [*flags, *theirs]):
            return f"{flag!r} is no flag{hint}"
        key = flag.strip("-").replace("-", "_")
        known = any(key in (k.name, k.name.split(".")[0]) for k in schema.keys())  # noqa: SIM118 (no dictionary)
        written = f"keys are written without dashes: {key}={value or following or '...'}"
        return f"{flag!r} is no flag; {written if known else _nearest_key(key)}"
    return ""


def _hydra(argv: list[str], faults: list[str]) -> list[dict[str, Any]]:
    """What Hydra composes of `argv`, one mapping a job. Unknown keys are left out and added to `faults`.

    Raises:
        ConfigError: with all faults, where one of them leaves nothing to go on with.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed: list[dict[str, Any]] = []

    def collect(cfg: DictConfig, hydra_config: Any) -> None:
        raw: Any = OmegaConf.to_container(cfg, resolve=True)
        raw["experiment"] = hydra_config.runtime.choices.get("experiment")
        raw["words"] = list(hydra_config.overrides.task)
        composed.append(raw)

    try:
        if any(word.startswith("-") for word in argv):
            _main(argv, collect)
        else:  # hydra.main composes everything twice
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = hydra.compose("config", overrides=argv, return_hydra_config=True)
            OmegaConf.set_struct(cfg, False)
            collect(cfg, cfg.pop("hydra"))
        return composed
    except (HydraException, OmegaConfBaseException, ValueError) as e:  # model=5 is a bare ValueError of Hydra's
        faults.append(_explain(e, argv))
        key = re.search(r"Could not override '([^']+)'", str(e))
        known = [w for w in argv if key is None or w.partition("=")[0] != key[1]]
        if len(known) == len(argv):
            raise _refusal(faults) from e
    return _hydra(known, faults)


def _main(argv: list[str], collect: Callable[[Any, Any], None]) -> None:
    """Hydra's own command line, which knows its flags; it reads the process's arguments, in here they are `argv`."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    saved = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions instead of printed tracebacks
    typed = _parse(argv)
    if typed.help:
        print(_help(typed))
        return
    overrides = typed.overrides
    argv = [word for word in argv if word not in overrides]  # flags first: Hydra takes none behind an override
    with tempfile.TemporaryDirectory() as scratch:  # Hydra insists on output folders; a run leaves its own instead
        folders = [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
        sys.argv = ["scalerun", *argv, "--", *folders, *overrides]  # a flag takes none of these as its value
        try:
            main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
            main(lambda cfg: collect(cfg, HydraConfig.get()))()
        finally:
            sys.argv = saved


def _help(typed: Any) -> str:
    """conf/hydra/help/scalerun.yaml, filled in. Hydra's own way to list the groups takes longer than all the rest."""
    import hydra
    from omegaconf import OmegaConf

    own = [Path(typed.config_dir).absolute()] if typed.config_dir else []
    if not all(folder.is_dir() for folder in own):
        raise ConfigError(f"Additional config directory '{own[0]}' not found")
    search = [f"hydra.searchpath=[{', '.join(json.dumps(f'file://{folder}') for folder in own)}]"]
    overrides = [*typed.overrides, *search, "hydra/help=scalerun"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    template = cfg.hydra.help.template  # before it leaves the configuration that it refers to
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    files = [file.relative_to(folder) for folder in (CONF, *own) for file in folder.rglob("*.yaml")]
    groups = {file.parent.as_posix() for file in files} - {".", "hydra/help"}
    options = {group: sorted({file.stem for file in files if file.parent.as_posix() == group}) for group in groups}
    listed = "".join(f"{group}: {', '.join(options[group])}\n" for group in sorted(groups))
    return Template(template).substitute(GROUPS=listed, KEYS=OmegaConf.to_yaml(cfg, resolve=typed.resolve))


def _parse(argv: list[str]) -> Any:
    """What Hydra's own parser makes of a command line; ConfigError where it would print its usage."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; scalerun --help lists what there is")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)


def dataset(name: str) -> Dataset:
    """The group conf/dataset/NAME.yaml alone.

    Raises:
        ConfigError: there is no such file, or it has a fault.
    """
    import hydra
    from omegaconf import OmegaConf

    if not (CONF / "dataset" / f"{name}.yaml").exists():
        raise ConfigError(_unknown_option("dataset", name))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        raw: Any = OmegaConf.to_container(hydra.compose(f"dataset/{name}"), resolve=True)
    group: Dataset = schema.build(Dataset, raw["dataset"], "dataset")
    return group


def recipes_for(optimizer: str) -> list[str]:
    """The recipes of conf/recipe that have numbers for an optimizer."""
    folder = CONF / "recipe"
    files = [f for f in sorted(folder.rglob("*.yaml")) if optimizer in _optimizers(f)]
    return list(dict.fromkeys(f.relative_to(folder).parts[0].removesuffix(".yaml") for f in files))


def _optimizers(file: Path) -> list[str]:
    """Those that a recipe names, or else the recipe that it begins with."""
    text = file.read_text()
    if names := re.search(r"^optimizers: \[(.*)\]", text, re.MULTILINE):
        return names[1].split(", ")
    base = re.search(r"^  - ([\w-]+)$", text, re.MULTILINE)
    return _optimizers(file.with_name(f"{base[1]}.yaml")) if base and base[1] != "_self_" else []


def _explain(error: Exception, argv: list[str]) -> str:
    from hydra.errors import OverrideParseException

    if isinstance(error, ConfigError):
        return str(error)
    text = str(error).split("\nSee https://")[0].strip() or repr(error)
    if key := re.search(r"Could not override '([^']*)'", text):
        if key[1].partition("@")[2].startswith("experiment."):
            return f"an experiment's file begins with `# @package _global_`, or {key[1]!r} is a key of the experiment"
        typed = any(word.lstrip("+~").startswith(key[1]) for word in argv)
        return f"unknown key {key[1]!r}{'' if typed else ' in the defaults of a file'}; {_nearest_key(key[1])}"
    if group := re.search(r"Could not find '([^/']+)/([^']+)'", text):
        return _unknown_option(group[1], group[2], argv)
    if text.startswith(("Config group override must be", "Error resolving interpolation")):  # model=5, model=[resnet8]
        for word in argv:
            group_name, _, value = word.partition("=")
            if group_name and (CONF / group_name).is_dir() and not (CONF / group_name / f"{value}.yaml").exists():
                return _unknown_option(group_name, value, argv)
    first = text.splitlines()[0]
    if merge := re.search(r"Error merging override \+*([^=]+)=(.*)", first):
        kind = next((k.allowed for k in schema.keys() if k.name == merge[1]), "a group of keys")  # noqa: SIM118
        return f"{merge[1]}={merge[2]} must be {kind}"
    if sweep := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", first):
        return f"{sweep[1]}={sweep[2]}: a list is written {sweep[1]}=[{sweep[2]}]; or sweep with -m"
    if not isinstance(error, OverrideParseException):
        return first
    word = error.override  # what its grammar expected is no help
    if "=" not in word:
        return f"{word!r} is neither key=value nor a command; a command comes first (scalerun --help lists them)"
    return f"{word!r} cannot be read; a list is written key=[1,2], other characters stand in quotes: key='a=b'"


_OWN = {
    "dataset": "; your own: imagefolder or text, with dataset.path=PATH",
    "model": "; your own: model=custom model.factory=package.module:function",
}


def _unknown_option(group: str, name: str, argv: list[str] | None = None) -> str:
    words = " ".join(argv or [])
    folders = [CONF, *map(Path, re.findall(r"(?:--config-dir|-cd)[ =](\S+)", words))]
    options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
    close = "".join(f" (did you mean {o!r}?)" for o in difflib.get_close_matches(name, options, 1))
    if group != "recipe":
        return f"unknown {group} {name!r}{close}; allowed: {', '.join(options)}{_OWN.get(group, '')}"
    asked = name.split("-")  # data set, network or size class
    near = [o for o in options if any(a == b for a, b in zip(asked, o.split("-"), strict=False))]
    close = close if f"recipe={name}" in words else ""  # else it is the one of a data set and a network that were typed
    return (
        f"no recipe {name!r}{close} (data set - network or size class); there are"
        f"{' of this data set or network' if near else ''}: {', '.join(near or options)}. "
        "Choose one of these combinations, or name a recipe of your own with recipe=NAME --config-dir DIR"
    )


def _nearest_key(word: str) -> str:
    key = word.split("=")[0].split("@")[0]
    for old, new in SPLIT.items():
        if key in (old, old.split(".")[1]):
            return f"its numbers have names of their own: {new}"
    known: dict[str, list[str]] = {}  # its name -> the kinds of the group that have it, where not all have
    for k in schema.keys():  # noqa: SIM118 (no dictionary)
        known.setdefault(k.name, []).extend(k.variants)
    if variants := known.get(key):
        return f"the one chosen has it not; only of kind {', '.join(dict.fromkeys(variants))}"
    inside = [k for k in known if k.endswith(f".{key}")]  # lr=0.1 is meant for recipe.lr
    groups = list(dict.fromkeys(k.split(".")[0] for k in known))
    close = inside or difflib.get_close_matches(key, [*groups, *known], 1, 0.5)
    section = key.split(".")[0] + "."
    options = [k for k in known if k.startswith(section)] or groups
    return (f"did you mean {' or '.join(map(repr, close))}? " if close else "") + f"Allowed: {', '.join(options)}"
