"""status, show, diff, rm, completion, the nearest right word: what a person types beside training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, prepare, scalerun, specs

from bench.fabricate import fabricate
from scaling_exps import cli, launch, plan, records
from scaling_exps.records import RunDir


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[plan.RunSpec]]:
    root = tmp_path_factory.mktemp("sweep") / "runs"
    return root, fabricate(root, ["experiment=demo"], seeds=(0, 1), batches=(4, 16, 64), rules=("sqrt", "none"))


@pytest.fixture
def here(sweep: tuple[Path, list[plan.RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sweep, which is what `runs` means."""
    root = shutil.copytree(sweep[0], tmp_path / "runs")
    monkeypatch.setattr(records, "RUNS", root)
    monkeypatch.chdir(tmp_path)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "lock"}


# ---- status ----


def test_status_is_in_the_order_of_the_plan(sweep: tuple[Path, list[plan.RunSpec]]) -> None:
    """Fails if it were by run id, or by batch before the base runs."""
    root, planned = sweep
    rows = launch.status(root)
    assert [r["run_id"] for r in rows] == [s.run_id for s in planned]
    row = rows[2]
    assert (row["batch"], row["kappa"], row["rule"], row["metric"]) == (16, 4, "sqrt", "test_accuracy")
    assert row["samples_per_second"] == 6800 and row["seconds_left"] is None


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_status_fits_the_window_and_cuts_no_word(columns: int, sweep: tuple[Path, list[plan.RunSpec]]) -> None:
    root, planned = sweep
    done = scalerun("status", str(root), cwd=root.parent, COLUMNS=str(columns))
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns and "…" not in done.stdout
    for spec in planned:
        (line,) = [line for line in lines if spec.run_id[:8] in line]
        assert f" {spec.science.batch} " in line and " finished " in line
    assert ("left out" in done.stdout) == (columns == 60)
    assert "resnet8" not in done.stdout  # of all of them
    assert lines[-1] == f"{len(planned)} finished"


def test_a_running_run_has_a_speed_and_a_time_left_and_others_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running, failed = (prepare(tmp_path, spec) for spec in specs("seed=[0,1]"))
    line = {"kind": "train", "step": 16, "samples": 64, "t": 0.1, "loss": 1.5, "window": 4, "seconds": 2.0}
    with running.writer() as writer:
        writer.write(line)
    failed.write_result({"status": "failed", "reason": "the loss is not finite"})
    with running.lock():
        rows = launch.status(tmp_path)
    assert [(r["state"], r["samples_per_second"], r["seconds_left"]) for r in rows] == [
        ("running", 32.0, 6.0), ("failed", None, None),
    ]  # fmt: skip
    assert (rows[0]["metric"], rows[0]["value"]) == ("train_loss", 1.5)
    launch.print_status(rows)
    printed = capsys.readouterr().out
    assert "6 s" in printed and f"failed: the loss is not finite  [{failed.path.name[:8]}]" in printed


LINES = [
    '{"kind": "eval", "step": 1, "samples": 2, "loss": 3}', '{"kind": "eval", "step": 1, "samples": 2, "loss": NaN}',
    '{"kind": "event", "step": 1, "samples": 2, "x": 9223372036854775808}', "", "[1]", "{}", "x",
    '{"kind": "event", "step": 1, "samples": 2, "x": -1e400}', '{"kind": "eval", "step": 1.5, "samples": 2, "loss": 3}',
    '{"kind": "event", "step": 1, "samples": 2, "x": "\\ud800"}', '{"kind": "eval", "step": 1, "samples": 2}',
    '{"kind": "event", "step": 1, "samples": 2} {"kind": "event", "step": 1, "samples": 2}',
    '{"kind": "event", "step": 1, "samples": 2, "x": {"y": [99999999999999999999]}}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_records_that_are_read_at_once_are_those_that_are_read_by_line(line: str, tmp_path: Path) -> None:
    """A bad line among good ones. Fails if it hid them, or got in."""
    good = '{"kind": "event", "step": 0, "samples": 0}'
    (tmp_path / "records.jsonl").write_text(f"{good}\n{line}\n{good}\n" + '{"kind": "ev')
    known = [r for text in (good, line, good) if (r := records._record(text)) is not None]
    read = RunDir(tmp_path).records()
    assert repr(read.rows) == repr(known) and len(read.lines) == len(known) == 3 - read.damaged
    assert repr(list(RunDir(tmp_path).newest_records())) == repr(known[::-1])


# ---- show, diff ----


def test_show_tells_a_run_by_the_beginning_of_its_id(
    here: Path, sweep: tuple[Path, list[plan.RunSpec]], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = next(s for s in sweep[1] if s.arms[0].rule == "sqrt" and s.science.batch == 64)
    assert cli.main(["show", spec.run_id[:9]]) == 0
    printed = capsys.readouterr().out
    for part in (
        "rule sqrt: lr √κ·η",
        "0.001 -> 0.004",
        "finished, 100%",
        "test_accuracy 0.9",
        "last eval: ",
        "records.jsonl",
    ):
        assert part in printed, part
    assert cli.main(["show", str(here / spec.run_id)]) == 0
    assert capsys.readouterr().out == printed.replace("in runs/", f"in {here}/")
    assert cli.main(["show", "zz"]) == 2 and "scalerun status lists them" in capsys.readouterr().err
    shutil.copytree(here / spec.run_id, here / "more" / spec.run_id)
    assert cli.main(["show", spec.run_id]) == 2 and "means 2 runs" in capsys.readouterr().err


def test_diff_begins_with_the_science(
    here: Path, sweep: tuple[Path, list[plan.RunSpec]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, sqrt = (next(s for s in sweep[1] if s.science.batch == b) for b in (4, 64))
    result = RunDir(here / sqrt.run_id).result() or {}
    RunDir(here / sqrt.run_id).write_result({**result, "versions": {"scalerun": "0", "torch": "9"}})
    assert cli.main(["diff", base.run_id, sqrt.run_id]) == 0
    parts = capsys.readouterr().out.split("\n")
    at = [
        parts.index(title)
        for title in ("science", "recipe and rule", "settings", "machine, code and how it ended", "metrics")
    ]
    assert at == sorted(at)
    assert {"  batch: 4 -> 64", "  hyper.lr: 0.001 -> 0.004"} <= set(parts[at[0] : at[1]])
    assert "  versions.torch: 0 -> 9" in parts[at[3] : at[4]]
    assert any(line.startswith("  test_accuracy: 0.") and line.endswith(")") for line in parts[at[4] :])
    assert cli.main(["diff", base.run_id, str(here / base.run_id)]) == 0
    assert "they are one run" in capsys.readouterr().out


# ---- rm ----


def test_rm_refuses_what_runs_is_queued_or_is_no_run_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each beside a good one. Fails if any file went."""
    good, other, *_ = RunDir.under(here)
    (here / "link").symlink_to(good.path)
    (here / "linked").mkdir()
    (here / "linked" / "run.json").symlink_to(good.path / "run.json")
    (here / "mine").mkdir()
    before = contents(here)
    for word in ("link", "link/", "linked", "mine", "nothing", str(here)):
        assert cli.main(["rm", "--yes", str(good), str(here / word)]) == 2, word
    with other.lock():
        assert cli.main(["rm", "--yes", str(good), str(other)]) == 2
    assert "is running" in capsys.readouterr().err
    (here / "squeue").write_text("#!/bin/sh\necho '7|PENDING|Priority'\n")
    (here / "squeue").chmod(0o700)
    (here / "mine" / "squeue").symlink_to(here / "squeue")
    other.append_event({"event": "submitted", "job": "7"})
    other.clear_result()
    with monkeypatch.context() as m:
        m.setenv("PATH", f"{here / 'mine'}:{os.environ['PATH']}")
        assert cli.main(["rm", "--yes", str(good), str(other)]) == 2
    assert "is queued" in capsys.readouterr().err
    (good.path / "more").mkdir()
    assert cli.main(["rm", "--yes", str(good)]) == 2
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    (good.path / "more").rmdir()
    assert cli.main(["rm", str(good)]) == 2 and "give --yes" in capsys.readouterr().err
    assert before.items() - contents(here).items() == {
        (k, v) for k, v in before.items() if k == str(other.path / "result.json")
    }


def test_rm_removes_links_and_not_what_they_point_to(here: Path, tmp_path: Path) -> None:
    first, second, *rest = RunDir.under(here)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (first.path / "link").symlink_to(outside)
    (second.path / "run.json").write_text("{}")  # unreadable, and a run folder all the same
    assert cli.main(["rm", "--yes", first.path.name[:9], str(second)]) == 0
    assert RunDir.under(here) == rest and not first.path.exists() and outside.read_text() == "mine"


# ---- words ----


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("help", 0, "Examples"), ("-h", 0, "Examples"), ("--help", 0, "Examples"), ("help plan", 0, "--figure FILE"),
        ("plan --help", 0, "docs/keys.md"), ("status -h", 0, "--json"), ("pln", 2, "did you mean plan?"),
        ("statsu", 2, "did you mean status?"), ("help statsu", 2, "did you mean status?"), ("seed 3", 2, "seed=..."),
        ("--seed 3", 2, "keys are written without dashes: seed=3"), ("--recipe.lr=3", 2, "dashes: recipe.lr=3"),
        ("modle=resnet50", 2, "did you mean 'model'?"), ("status --jsno", 2, "did you mean --json?"),
        ("plan --fll", 2, "did you mean --full?"), ("--confg-dir x", 2, "did you mean --config-dir?"),
        ("rm", 2, "scalerun rm --help"), ("completion ksh", 2, "zsh"), ("report --oot x", 2, "did you mean --out?"),
    ],
)  # fmt: skip
def test_the_nearest_right_word(
    words: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One message, nothing written. Fails for argparse's or Hydra's usage text."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)
    assert "usage" not in printed.err and len(printed.err.splitlines()) == (code == 2)
    assert not list(tmp_path.iterdir())


COMPLETED = {
    "scalerun sta": ["status"], "scalerun plan optimi": ["optimizer="], "scalerun model=vit": ["vit", "vit_small"],
    "scalerun batch=4 recipe.warmup_f": ["recipe.warmup_from=", "recipe.warmup_fraction="], "scalerun wan": ["wandb."],
    "scalerun plan logger=t": ["tensorboard"], "scalerun status mod": [],
    "scalerun rule=sqrt_without_e": ["sqrt_without_eps"],
}  # fmt: skip


def test_bash_completes_commands_keys_and_options(tmp_path: Path) -> None:
    """In a real bash, as readline calls it. Fails for anything on stderr, or if python ran at a Tab."""
    done = scalerun("completion", "bash", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    typed = "\n".join(
        f"COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; _scalerun; echo ${{COMPREPLY[*]}}" for line in COMPLETED
    )
    shell = ["bash", "--norc", "-c", f"{done.stdout}\nPATH=\ncomplete -p scalerun >/dev/null\n{typed}"]
    said = subprocess.run(shell, capture_output=True, text=True)
    assert not said.stderr
    found = [sorted(set(line.split())) for line in said.stdout.split("\n")[:-1]]
    assert found == [sorted(words) for words in COMPLETED.values()]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_the_same_words(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(
        f" {w} " in script.replace("(", " ").replace("'", " ") for w in ("status", "export", "model=gpt", "batch=")
    )


def test_tools_import_nothing_heavy(here: Path) -> None:
    first, second, *_ = (d.path.name for d in RunDir.under(here))
    for words in (["show", first], ["diff", first, second], ["rm", "--yes", first], ["completion", "bash"], ["pln"]):
        code = f"import sys; from scaling_exps import cli; cli.main({words})\n"
        code += (
            "heavy = {'torch', 'transformers', 'wandb', 'numpy', 'hydra'} & set(sys.modules)\nassert not heavy, heavy"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=ENVIRONMENT, cwd=here.parent, capture_output=True, text=True
        )
        assert "heavy" not in done.stderr and done.returncode == 0, done.stderr
    assert not (here / first).exists()


def test_a_dry_run_prints_job_scripts_where_no_slurm_is(tmp_path: Path) -> None:
    """Fails if it asked a command of SLURM's, or wrote anything."""
    words = ["launch=slurm", "launch.dry_run=true", "launch.node_local=[]", "batch=[4,16]", "launch.cpus_per_task=3"]
    done = scalerun(*words, cwd=tmp_path, PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-1%2" in done.stdout and "#SBATCH --cpus-per-task=3" in done.stdout
    assert "nothing is submitted" in done.stderr and not list(tmp_path.iterdir())
    assert json.loads(scalerun("plan", "--json", *words, cwd=tmp_path, PATH="/nonexistent").stdout)
