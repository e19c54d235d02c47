"""What a run leaves about the machine and the code that it ran on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scaling_exps.records import RunDir
from scaling_exps.train import ranks


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux: the high-water mark of resident memory starts anew
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, else this process's resident high-water mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except OSError:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("scalerun", "torch", "torchvision", "timm", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": versions,
        **code(None),
        "device": name,
        "threads": torch.get_num_threads(),
        "world_size": ranks.world()[0],
    }


@functools.cache
def _tree() -> tuple[str | None, str]:
    """The commit of the code that runs (`-dirty` where the tree is not clean), and the patch of the difference.

    None for code that no repository tracks: installed below somebody else's repository it must not name that one's.
    """

    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parents[1]
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            return ""
        return done.stdout if done.returncode == 0 else ""

    if not git("ls-files", "--error-unmatch", "--", str(Path(__file__).resolve())):
        return None, ""
    commit = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip() or None
    return commit, git("diff", "HEAD", "--", ".") if commit and commit.endswith("-dirty") else ""


def code(run_dir: RunDir | None) -> dict[str, Any]:
    """What ran, for the record; with `run_dir`, the patch of a tree that is not clean is left there."""
    commit, patch = _tree()
    if patch and run_dir is not None:
        run_dir.write_patch(patch)
    return {"commit": commit, "patch": "code.patch"} if patch else {"commit": commit}


def job() -> str | None:
    """The SLURM job that this process belongs to, as squeue names it; None outside of one."""
    e = os.environ
    if "SLURM_STEP_ID" not in e:
        return None
    array = e.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{e['SLURM_ARRAY_TASK_ID']}" if array else e.get("SLURM_JOB_ID")
