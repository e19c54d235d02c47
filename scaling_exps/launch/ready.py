"""What a launch would refuse, as far as that can be told without torch and without a user's code."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from scaling_exps import sources
from scaling_exps.config import Config, Custom, SlurmLaunch, Timm
from scaling_exps.launch import folders
from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import RunSpec


def check(specs: list[RunSpec], config: Config) -> list[str]:
    """Refuse what cannot be launched; returns what stands in its way still, or could not be looked at.

    Raises:
        LaunchError, PlanError, DataError: as a launch, before it starts anything.
    """
    root = Path(config.runs_dir)
    at = root
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise LaunchError(
            f"cannot write runs under {root}: {at} is no folder to write in; choose another with runs_dir="
        )
    folders.unfinished([s for s in specs if (root / s.run_id).exists()], root)  # refuses a run.json that is unreadable
    if isinstance(config.launch, SlurmLaunch):
        return []  # data and networks are those of its nodes
    said = []
    for name, path in dict.fromkeys((s.science.dataset.name, s.dataset_path) for s in specs):
        try:
            if name not in ("digits", "stdlib"):
                sources.raw_folder(name, path)
        except sources.DataError as e:
            if path is not None:
                raise
            said.append(f"not yet: {e}")
    for model in dict.fromkeys(repr(s.science.model) for s in specs):
        network = next(s.science.model for s in specs if repr(s.science.model) == model)
        if isinstance(network, Custom):
            _importable(network.factory or "")
        if isinstance(network, Timm | Custom) and not config.cost.probe:
            what = "that the function works" if isinstance(network, Custom) else f"that timm has {network.name}"
            said.append(f"unchecked: {what} and that its network fits this data; cost=probe builds it")
    for weights in dict.fromkeys(s.start_from for s in specs if s.start_from and not config.cost.probe):
        said.append(f"unchecked: that recipe.start_from={weights} fits the network; cost=probe loads it")
    return said


def _importable(factory: str) -> None:
    """Refuse a factory whose package is not there; its code is not run."""
    package = factory.partition(":")[0].partition(".")[0]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the launch looks, too
    try:
        found = find_spec(package)
    except ValueError:
        found = None
    if found is None:
        raise LaunchError(
            f"model.factory={factory}: there is no module {package!r} here or in {sys.prefix}; give "
            "package.module:function, or start in the folder that holds it"
        )
