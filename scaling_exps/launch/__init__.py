"""Starting RunSpecs, and saying how they stand. A job is a folder; what is finished is skipped."""

from __future__ import annotations

from pathlib import Path

from scaling_exps.config import Config, SlurmLaunch
from scaling_exps.launch import local, margins, slurm
from scaling_exps.launch.folders import LaunchError
from scaling_exps.launch.inspect import diff, remove, show
from scaling_exps.launch.margins import proposed
from scaling_exps.launch.overview import print_status, status
from scaling_exps.launch.ready import check
from scaling_exps.launch.slurm import cancel
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir

__all__ = ["LaunchError", "cancel", "check", "diff", "launch", "print_status", "proposed", "remove", "show", "status"]


def launch(specs: list[RunSpec], config: Config) -> bool:
    """Bring every run of the list to its end, or hand it to SLURM; finished runs are skipped.

    Args:
        specs: the planned list, checked as a whole.
        config: its `launch` group and `runs_dir` say where and how; they are the same for the whole list.

    Returns:
        Whether all of them are finished (SLURM without `launch.wait`: submitted).

    Raises:
        LaunchError, PlanError: the run folder or the cluster cannot be used; nothing was started.
        DataError, ModelError: a data set or a network of the list cannot be had here; nothing was started.
            (A job on a cluster finds out where it runs: its run fails, with the reason in its record.)
    """
    root = Path(config.runs_dir)
    if config.margin.auto:
        proposal = margins.proposed(specs, root)
        if proposal.first:
            print(*proposal.lines, sep="\n", flush=True)
            done = _start(proposal.first, config)
            if not all(RunDir(root / s.run_id).state() == "finished" for s in proposal.first):
                print("margin=auto: when the base runs have finished, the same command goes on with the others")
                return done
            proposal = margins.proposed(specs, root)
        print(*proposal.lines, sep="\n", flush=True)
        specs = proposal.specs
    return _start(specs, config)


def _start(specs: list[RunSpec], config: Config) -> bool:
    """Seed after seed: where a sweep is cut short, the seeds that are through have every batch and rule."""
    place = {seed: i for i, seed in enumerate(dict.fromkeys(spec.science.seed for spec in specs))}
    specs = sorted(specs, key=lambda spec: place[spec.science.seed])
    if isinstance(config.launch, SlurmLaunch):
        return slurm.launch(specs, Path(config.runs_dir), config.launch)
    return local.launch(specs, Path(config.runs_dir), config.launch)
