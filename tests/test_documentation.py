"""What a reader could run is run, and what is linked exists."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT, scalerun

from scaling_exps import cli, config
from scaling_exps.config import CONF, document

README = (ROOT / "README.md").read_text()
# docs/evidence is left out: it says what was typed at the commit that it names
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("slurm/*.md"))]
HEADS = {
    f: "\n".join(line for line in f.read_text().splitlines() if line.startswith("#"))
    for f in sorted((CONF / "experiment").glob("*.yaml"))
}


def commands_of_a_page(text: str) -> list[str]:
    """What stands after `scalerun` in code: inline, or on a line of a block of code."""
    text = text.replace("\\\n", " ")
    inline = re.findall(r"`scalerun(?: ([^`]*))?`", text)
    return [*inline, *re.findall(r"^(?: {4,}|\t)scalerun(?: (.*))?$", text, re.MULTILINE)]


def commands_of_a_head(head: str) -> list[str]:
    """The commands of an experiment's file: `a|b` stands for two of them, MODEL for each that the head lists."""
    lines = [line.removeprefix("#").strip() for line in head.splitlines()]
    models = [re.split(" {2,}", line)[0] for line in lines if re.match(r"model=\w+( |$)", line)]
    commands = []
    for line in lines:
        if not (typed := re.search(r"(?:Command: |^)scalerun (.*)", line)):
            continue
        words = shlex.split(re.split(r" {2,}", typed[1])[0])
        for choice in itertools.product(*(w.split("|") for w in words)):
            keys = [w.partition("=")[0] for w in words]
            given = [c if "=" in c or "=" not in w else f"{k}={c}" for k, w, c in zip(keys, words, choice, strict=True)]
            text = shlex.join(given)
            commands += [text.replace("model=MODEL", m) for m in models] if "MODEL" in text else [text]
    return commands


COMMANDS = sorted({c for page in PAGES for c in commands_of_a_page(page.read_text())})
EXPERIMENTS = sorted({c for head in HEADS.values() for c in commands_of_a_head(head)})


@pytest.mark.parametrize("command", [*COMMANDS, *EXPERIMENTS])
def test_what_a_page_or_an_experiment_says_to_type_plans(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails for a key, an option, an experiment or a command that is called otherwise now."""
    typed = shlex.split(command.split("&&")[0], comments=True)
    words = [w for w in typed if w not in ("...", "[--json]")]
    (tmp_path / "FILE").write_text("a text of one's own " * 40)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "package").mkdir()  # whose module:function is a network of one's own
    monkeypatch.chdir(tmp_path)
    if "--help" in words or (words and words[0] in cli.COMMANDS and words[0] != "plan"):
        return
    if "--cfg" not in words:
        words = ["plan", *[w for w in words if w != "plan"]]
    assert cli.main(words) == 0, capsys.readouterr().err


def test_there_are_commands() -> None:
    """Fails if the patterns above no longer saw them."""
    assert len(COMMANDS) >= 20 and len(EXPERIMENTS) >= 25
    assert {"experiment=fig1 model=resnet56 optimizer=rmsprop", "-m experiment=fig5 recipe.eps=1e-8,1e-30"} <= set(
        EXPERIMENTS
    )


@pytest.mark.parametrize("file", HEADS, ids=lambda f: f.stem)
def test_an_experiment_says_what_to_type_what_it_costs_and_what_to_expect(file: Path) -> None:
    text = HEADS[file] + "".join(p.read_text() for p in CONF.glob(f"experiment/panel/{file.stem}-*.yaml"))
    assert "Command: " in text
    assert re.search(r"Cost|about \d+ minutes", text), "no cost"
    assert re.search(r"[Ee]xpected", text)


def test_the_page_of_keys_is_what_the_schema_says() -> None:
    """Fails if a key, a range or a default changed without the page."""
    tables = (ROOT / "docs" / "keys.md").read_text().partition(document.START)[2]
    assert tables == document.markdown(config.keys()), "run: python -m scaling_exps.config.document"


def test_every_key_has_a_meaning_and_an_example_of_its_range() -> None:
    keys = config.keys()
    assert len(keys) == len({(k.name, k.meaning, k.variants) for k in keys}) > 90
    assert all(k.meaning and k.allowed for k in keys)
    (width,) = [k for k in keys if k.name == "model.width" and k.variants == ("resnet",)]
    assert width.allowed == "an integer in [1, 65536]"
    (batch,) = [k for k in keys if k.name == "recipe.batch"]
    assert batch.unit == "examples"


def test_the_plan_printed_in_the_readme_is_what_is_printed(tmp_path: Path) -> None:
    printed = scalerun("plan", "model=resnet50", "batch=8192", cwd=tmp_path).stdout
    (shown,) = re.findall(r"```\n(resnet50 on cifar10.*?)```", README, re.S)
    assert shown in printed


def test_links_and_files_exist() -> None:
    """Of pages, and of comments in conf/."""
    for page in [*PAGES, *ROOT.glob("docs/evidence/**/*.md")]:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), (page, link)
        for name in re.findall(r"`((?:scaling_exps|docs|scripts|slurm|conf|bench|tests)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), (page, name)
    named = 0
    for file in CONF.rglob("*.yaml"):
        comments = " ".join(re.findall(r"#(.*)", file.read_text()))
        for name in re.findall(r"\b(?:docs|scripts|bench|tests|examples|conf)/[\w./-]*\w", comments):
            assert (ROOT / name).exists(), (file, name)
            named += 1
        for name in re.findall(
            r"(?<![\w/])((?:recipe|experiment|model|dataset|launch)/[\w/-]*\w)(?:\.yaml)?", comments
        ):
            assert name.endswith("-MODEL") or (CONF / f"{name}.yaml").exists(), (file, name)
            named += 1
    assert named >= 3  # fails if the patterns no longer saw them


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
