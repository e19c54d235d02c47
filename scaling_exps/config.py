"""The configuration: its schema, and its composition by Hydra. The only module that knows Hydra and OmegaConf."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
CONF = next(p for p in (_HERE / "conf", _HERE.parent / "conf") if p.is_dir())  # in the wheel, or in a checkout


class ConfigError(ValueError):
    """What the user typed cannot be composed; the message says what is allowed."""


@dataclass
class Optimizer:
    name: str
    family: str  # adaptive | sgd: which rules fit, and what one step's continuous time is
    match: str  # the default rule of goal=match
    best: str  # that of goal=best
    decoupled: bool  # weight decay outside the gradient


@dataclass
class Dataset:
    """What every kind has; `kind` says which of the classes below it is."""

    kind: str
    name: str
    path: str | None
    train_size: int | None  # examples (the first so many); null is all, where only the data knows how many
    test_size: int | None


@dataclass
class ImageDataset(Dataset):
    """Images that are held in memory."""

    shape: list[int]  # height, width, channels
    classes: int
    mean: list[float]
    std: list[float]
    shift: int  # pixels of the padded crop
    flip: bool
    label_noise: float


@dataclass
class FileDataset(Dataset):
    """Images that are decoded as they are needed."""

    shape: list[int]  # height, width, channels of what the network sees
    classes: int
    mean: list[float]
    std: list[float]
    area: list[float]  # smallest and largest share of the image that a random crop takes
    resize: int  # shorter side of a test image before its central crop
    flip: bool


@dataclass
class TokenDataset(Dataset):
    """Texts, as sequences of tokens; an example is a sequence."""

    tokenizer: str  # bytes, bpe (trained on the corpus), or a tokenizer of the hub or of a folder
    vocab: int
    context: int  # tokens of a sequence
    mask: float  # share of tokens that are hidden and predicted; 0 is next-token prediction


@dataclass
class Recipe:
    """The tuned reference point. Exactly one of `epochs` and `samples`; fractions are of that duration."""

    batch: int
    micro_batch: int
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    epochs: float | None
    samples: int | None
    warmup_fraction: float
    warmup: str
    warmup_from: float
    decay: str
    milestones_fraction: list[float]
    gamma: float
    freeze_last: bool


@dataclass
class Launch:
    name: str
    devices: int | str
    parallel: int
    compile: bool


@dataclass
class SlurmLaunch(Launch):
    """What `launch=slurm` adds. null leaves a setting to the site's defaults."""

    max_devices: int  # how many processes `devices: auto` may take for one run
    devices_per_node: int
    gpus: bool  # a GPU for each process
    cpus_per_task: int
    memory_gb: float | None  # of a node
    minutes: int
    signal_seconds: int  # how long before the time limit a run is told to save and requeue
    requeues: int  # restarts up to which a run whose process was killed is requeued
    array_parallelism: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    setup: list[str]  # lines of the job script, before srun
    container: list[str]  # words put before python
    python: str | None
    node_local: list[str]  # folders that each node has for itself: code and runs must not lie there
    wait: bool


@dataclass
class Measure:
    evaluations: int
    train_records: int
    statistics_samples: int
    noise: str
    noise_records: int
    noise_examples: int
    noise_unit: int | None


@dataclass
class Margin:
    """The largest gap to the base run that still counts as the same run; null is not judged. See docs/comparison.md."""

    test_accuracy: float | None
    test_loss: float | None
    train_loss: float | None
    trajectory: float | None
    weight_norm: float | None
    perplexity: float | None


@dataclass
class Checkpoint:
    minutes: float


@dataclass
class Config:
    model: dict[str, Any]  # name and the options of that network
    dataset: Dataset
    optimizer: Optimizer
    recipe: Recipe
    launch: Launch
    measure: Measure
    margin: Margin
    checkpoint: Checkpoint
    batch: int | list[int] | None
    seed: int | list[int]
    goal: str  # match | best: the question that the default rule answers
    rule: str | list[str]
    beta_map: str
    noise_scale: float | None
    duration: float
    svag: int | list[int]
    precision: str
    logger: str
    runs_dir: str
    noise: str | None  # where `plan` finds the base run's noise record
    experiment: str | None = None


VARIANTS: dict[type, tuple[str, dict[str, type]]] = {  # a field whose value decides the class
    Launch: ("name", {"slurm": SlurmLaunch}),
    Dataset: ("kind", {"images": ImageDataset, "files": FileDataset, "tokens": TokenDataset}),
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
        if word.startswith("goal=") and not {*word[5:].split(",")} <= {"match", "best"}:  # it names a key of optimizer
            raise ConfigError(f"{word}; allowed: match, best")
    # `options` holds whatever timm or the user's factory takes, so its keys are the only ones that may be new
    argv = [f"++{w}" if re.match(r"model\.options[.=]", w) else w for w in argv]
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed: list[dict[str, Any]] = []

    def collect(cfg: DictConfig) -> None:
        raw: Any = OmegaConf.to_container(cfg, resolve=True)
        raw["experiment"] = HydraConfig.get().runtime.choices.get("experiment")
        composed.append(raw)

    saved = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory() as scratch:  # Hydra insists on output folders; a run leaves its own instead
        first = next((i for i, word in enumerate(argv) if "=" in word and not word.startswith("-")), len(argv))
        folders = [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
        sys.argv = ["scalerun", *argv[:first], *folders, *argv[first:]]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions instead of printed tracebacks
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(collect)()
        except (HydraException, OmegaConfBaseException, ValueError) as e:  # model=5 is a bare ValueError of Hydra's
            raise ConfigError(_explain(e)) from e
        finally:
            sys.argv = saved[0]
            if saved[1] is None:
                del os.environ["HYDRA_FULL_ERROR"]
            else:
                os.environ["HYDRA_FULL_ERROR"] = saved[1]
    for raw in composed:
        _check_options(raw["model"])
    return [_typed(Config, raw, "") for raw in composed]


def _check_options(model: dict[str, Any]) -> None:
    options = model.get("options", {})
    if "options" in model and not {"library", "factory"} & set(model):
        allowed = ", ".join(f"model.{k}" for k in model if k not in ("name", "options"))
        raise ConfigError(f"unknown key 'model.options'; model {model['name']} has {allowed}")
    if not isinstance(options, dict):
        raise ConfigError(f"model.options={options!r} must be keywords: model.options={{KEY:VALUE}}")


def _explain(error: Exception) -> str:
    text = str(error).split("\nSee https://")[0].strip()
    if key := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key {key[1]!r}; {_nearest_key(key[1])}"
    if group := re.search(r"Could not find '([^/']+)/([^']+)'", text):
        folder = CONF / group[1]
        options = sorted(p.stem for p in folder.glob("*.yaml"))
        if group[1] == "recipe":
            asked = group[2].split("-")[:2]  # dataset, model
            near = [o for o in options if any(a == b for a, b in zip(asked, o.split("-"), strict=False))]
            which = "of this data set or model" if near else ""
            return (
                f"no recipe {group[2]!r} (dataset-model-optimizer); there are{which and ' '}{which}: "
                f"{', '.join(near or options)}. "
                "Choose one of these combinations, or name a recipe of your own with recipe=NAME --config-dir DIR"
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


def _nearest_key(word: str) -> str:
    key = word.split("=")[0].split("@")[0]
    hints = {f.name: f.type for f in fields(Config)}
    kinds = {n: globals()[str(t)] for n, t in hints.items() if str(t) in globals()}
    for name, kind in kinds.items():
        if kind in VARIANTS:  # every key that some variant has
            every = {f.name: f for c in (kind, *VARIANTS[kind][1].values()) for f in fields(c)}
            kinds[name] = make_dataclass(name, [(f, Any) for f in every])
    sub = {n: [f"{n}.{f.name}" for f in fields(kind)] for n, kind in kinds.items()}
    known = [*hints, *(k for keys in sub.values() for k in keys)]
    inside = [k for k in known if k.endswith(f".{key}")]  # lr=0.1 is meant for recipe.lr
    close = inside or difflib.get_close_matches(key, known, 1, 0.5)
    section = key.split(".")[0]
    allowed = sub.get(section, list(hints))
    return (f"did you mean {' or '.join(map(repr, close))}? " if close else "") + f"Allowed: {', '.join(allowed)}"


def _typed(kind: Any, raw: dict[str, Any], where: str) -> Any:
    """Build the dataclass `kind` from plain values, refusing unknown keys, missing ones and wrong types."""
    import typing

    hints = typing.get_type_hints(kind)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        close = difflib.get_close_matches(unknown[0], hints, 1)
        raise ConfigError(f"unknown key {where + unknown[0]!r}{_did_you_mean(close)}; allowed: {', '.join(hints)}")
    missing = [f.name for f in fields(kind) if f.name not in raw]
    if missing:
        raise ConfigError(f"missing key {where + missing[0]!r}")
    return kind(**{k: _value(hints[k], raw[k], where + k) for k in hints})


def _value(kind: Any, value: Any, key: str) -> Any:
    import types
    import typing

    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} must be a group of keys, or the name of an option of the group {key!r}")
        if kind in VARIANTS:
            by, classes = VARIANTS[kind]
            kind = classes.get(str(value.get(by)), kind)
        return _typed(kind, value, key + ".")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _value(option, value, key)
            except ConfigError:
                continue
    elif origin is list:
        if isinstance(value, list):
            return [_value(args[0], v, key) for v in value]
    elif kind is type(None):
        if value is None:
            return None
    elif kind is bool or origin is dict:
        if isinstance(value, origin or kind):
            return value
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not isinstance(value, bool):
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ConfigError(f"{key}={value!r} must be {name}")
