"""What a reader could run is run, and what is linked exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT, scalerun

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    {c for c in re.findall(r"`scalerun ([^`]*)`", README) if "=" in c and "..." not in c and "DIR" not in c}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_plan(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    done = scalerun("plan", *(words[1:] if words[0] == "plan" else words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


def test_the_plan_printed_in_the_readme_is_what_is_printed(tmp_path: Path) -> None:
    printed = scalerun("plan", "model=resnet50", "batch=8192", cwd=tmp_path).stdout
    (shown,) = re.findall(r"```\n(resnet50 on cifar10.*?)```", README, re.S)
    assert shown in printed


def test_links_and_files_exist() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("slurm/*.md")]:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), (page, link)
        for name in re.findall(r"`((?:scaling_exps|docs|scripts|slurm|conf|bench|tests)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), (page, name)


def test_an_installed_scalerun_works_outside_a_checkout(tmp_path: Path) -> None:
    """The wheel carries conf/. Fails if a file were left out of it, or were looked for in the checkout only."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    build = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    for words in (["model=resnet50", "batch=8192"], ["experiment=demo"]):
        done = scalerun("plan", *words, cwd=tmp_path, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "from scaling_exps.config import CONF; print(CONF)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.strip() == str(site / "scaling_exps" / "conf")
