"""What a reader could run is run, and what is linked exists."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from support import ROOT, prepare, scalerun, specs, work, write_pictures

from scaling_exps import cli, config
from scaling_exps.config import CONF, document

README = (ROOT / "README.md").read_text()
# docs/evidence is left out: it says what was typed at the commit that it names
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
NOT_RUN = {  # lines of shell blocks that begin so are not run by a test, because
    "pip install PATH/TO/CLONE": "it would install over what is tested",
    "pip install 'PATH/TO/CLONE[convert]'": "the same",
    ".venv/bin/pre-commit install": "it would write into this checkout",
    "mkdir scaling ": "the test's folder stands for it",
    'cat "$(python ': "the test's own text stands for Python's sources",
}
HEADS = {
    f: "\n".join(line for line in f.read_text().splitlines() if line.startswith("#"))
    for f in sorted((CONF / "experiment").glob("*.yaml"))
}


def blocks(text: str, language: str) -> dict[str, str]:
    """The fenced blocks of a page by their titles, or by their place."""
    found = re.findall(rf'^```(?:{language})(?: title="(.*?)")?\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    return {title or str(i): code for i, (title, code) in enumerate(found)}


def lines(text: str) -> list[str]:
    """The lines of a page's shell blocks."""
    code = "\n".join(blocks(text, "bash|sh|console").values()).replace("\\\n", " ")
    return [line.strip() for line in code.splitlines() if line.strip()]


def commands_of_a_page(text: str) -> list[str]:
    """What stands after `scalerun` in code: inline, or on a line of a block of code."""
    fenced = [line.removeprefix("scalerun").strip() for line in lines(text) if re.match(r"scalerun( |$)", line)]
    text = text.replace("\\\n", " ")
    inline = re.findall(r"`scalerun(?: ([^`]*))?`", text)
    return [*fenced, *inline, *re.findall(r"^(?: {4,}|\t)scalerun(?: (.*))?$", text, re.MULTILINE)]


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


COMMANDS = sorted({c for text in TEXTS.values() for c in commands_of_a_page(text)})
EXPERIMENTS = sorted({c for head in HEADS.values() for c in commands_of_a_head(head)})


@pytest.mark.parametrize("command", [*COMMANDS, *EXPERIMENTS])
def test_what_a_page_or_an_experiment_says_to_type_plans(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails for a key, an option, an experiment or a command that is called otherwise now."""
    typed = shlex.split(re.split(r"&&| {2,}", command)[0], comments=True)
    words = [w for w in typed if w not in ("...", "[--json]")]
    write_files(tmp_path)
    (tmp_path / "docs" / "evidence").mkdir(parents=True)
    for folder in ("slurm", "docs/evidence/start"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "package").mkdir()  # whose module:function is a network of one's own
    monkeypatch.chdir(tmp_path)
    if "--help" in words or "--version" in words or (len(words) == 1 and words[0] in cli.COMMANDS):
        return  # a command is named
    if words and words[0] in cli.COMMANDS and words[0] != "plan":
        if words[0] != "convert" or not Path(words[1]).exists():
            words_are_parsed(words, monkeypatch)
            return
        assert cli.main(words) == 0, capsys.readouterr().err
        return
    if "--cfg" not in words:
        words = ["plan", *[w for w in words if w != "plan"]]
    assert cli.main(words) == 0, capsys.readouterr().err


def write_files(folder: Path) -> None:
    """What the pages say to save, and what stands for a reader's own."""
    for text in TEXTS.values():
        for name, code in blocks(text, "python|yaml").items():
            if "." in name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(code)
    for name in ("FILE", "text.txt"):
        (folder / name).write_text("a text of one's own " * 400)
    (folder / "noise.jsonl").write_text(noise_records())
    write_pictures(folder / "FOLDER", {"train": 2, "val": 1})


@functools.cache
def noise_records() -> str:
    """What a NoiseProbe writes."""
    import torch

    from scaling_exps import NoiseProbe

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        NoiseProbe(model, optimizer, batch=32, window=20, file=f"{folder}/noise.jsonl")
        for _ in range(100):
            for x in torch.randn(2, 16, 8):
                ((model(x) - 1).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return Path(folder, "noise.jsonl").read_text()


def words_are_parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own parser takes them; it goes no further."""
    parse = argparse.ArgumentParser.parse_args

    class ParsedError(Exception):
        pass

    def stop(self: argparse.ArgumentParser, *given: object) -> None:
        parse(self, *given)  # type: ignore[call-overload]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(ParsedError):
        cli.main(words)


@pytest.mark.parametrize("page", TEXTS)
def test_other_lines_of_shell_blocks_are_known(page: str) -> None:
    """Fails for a target or an extra that is not there, and for a line that nobody has thought about."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for line in lines(TEXTS[page]):
        if line.startswith("make "):
            assert set(line.split("#")[0].split()[1:]) <= set(targets), line
        elif extra := re.match(r"pip install 'scalerun\[(\w+)\]'", line):
            assert extra[1] in extras, line
        else:
            assert re.match(r"scalerun( |$)", line) or line.startswith(tuple(NOT_RUN)), line


@pytest.mark.parametrize(
    ("page", "code"), [(p, c) for p, text in TEXTS.items() for c in blocks(text, "python").values()]
)
def test_python_of_a_page_runs(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "page"})


@pytest.mark.slow
def test_the_tutorial_leads_to_an_answer(tmp_path: Path) -> None:
    """Its files and its commands as they stand, at a hundredth of the samples and one seed."""
    write_files(tmp_path)
    tiny = ["recipe.samples=8192", "seed=0", "logger=none", "measure.noise=none", "measure.evaluations=1"]
    for command in [line for line in lines(TEXTS["tutorial.md"]) if line.startswith("scalerun")]:
        words = shlex.split(command)[1:]
        done = scalerun(*words, *(["--json"] if words == ["report"] else tiny), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    arms = json.loads(done.stdout)["rows"]
    assert {(row["batch"], row["rule"]) for row in arms if row["batch"] != 256} == {
        (b, rule) for b in (1024, 4096) for rule in ("sqrt", "none")
    }


def test_the_page_of_records_names_every_field(tmp_path: Path) -> None:
    """Of a real run, whose weights are measured too."""
    (spec,) = specs("measure.noise=full")
    run_dir = prepare(tmp_path, spec)
    work(run_dir)
    named: dict[str, set[str]] = {}
    kind = ""
    for first, fields in re.findall(r"^\| ([^|]*?) ?\| ([^|]*?) \|", TEXTS["records.md"], re.MULTILINE):
        kind = first.strip("`") or kind
        named.setdefault(kind, set()).update(re.findall(r"`(\w+)`", fields))
    for row in run_dir.records().rows:
        plain = {re.sub(r"^preconditioned_|_(low|high)$", "", re.sub(r"_(low|high)$", "", k)) for k in row}
        assert plain - {"kind", "step", "samples", "t"} <= named[row["kind"]], row["kind"]
    assert {row["kind"] for row in run_dir.records().rows} == {"train", "eval", "noise"}


def test_a_diff_of_contributing_fits_the_tree() -> None:
    """What it takes away stands in the file that it names, and no diff has 40 lines."""
    diffs = blocks(TEXTS["CONTRIBUTING.md"], "diff").values()
    assert len(diffs) == 4
    for diff in diffs:
        assert len(diff.splitlines()) < 40
        for name, rest in re.findall(r"^\+\+\+ b/(\S+)\n((?:[+-](?!\+\+ b/).*\n|\+\n)*)", diff, re.MULTILINE):
            for line in re.findall(r"^-(.*)", rest, re.MULTILINE):
                assert line in (ROOT / name).read_text(), name


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
    made = set(re.findall(r'"([\w/]+\.\w+)": \w+\(', (ROOT / "scripts" / "pages.py").read_text()))  # with the site
    assert "demo/page.html" in made
    for page in [*PAGES, *ROOT.glob("docs/evidence/**/*.md")]:
        text = page.read_text()
        for link in set(re.findall(r"\]\((?!https?:)([^)#]+)", text)) - made:
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
