"""From directories to the comparison: what is paired with what, what is listed, what a machine reads. No training."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
from support import ENVIRONMENT, ROOT, scalerun

from bench.fabricate import fabricate
from scaling_exps import cli, config, plan, report
from scaling_exps.records import RunDir
from scaling_exps.report import charts, figures, page, runs, tables
from scaling_exps.report.verdict import compare

DEMO = ["experiment=demo"]  # its margins


def rows_of(root: Path, **margins: float) -> list[report.Row]:
    return compare(report.collect([root]), margins or None)


def row(rows: list[report.Row], rule: str, batch: int) -> report.Row:
    return next(r for r in rows if (r.rule, r.batch) == (rule, batch))


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 seeds, batches 4 (base), 16, 64, sqrt and two controls; only to be read."""
    root = tmp_path_factory.mktemp("sweep") / "runs"
    fabricate(root, DEMO, rules=("sqrt", "none", "linear_scaled"))
    return root


def test_pairs_are_the_runs_of_a_seed(sweep: Path) -> None:
    """The seeds differ by 0.05 from each other and the pairs by 0.01: fails if runs were compared across seeds, for
    then the interval were several times as wide, or if the sign were turned (`none` is 0.2 worse at kappa = 4)."""
    rows = rows_of(sweep)
    near, far = row(rows, "sqrt", 16), row(rows, "none", 16)
    assert (near.verdict, far.verdict) == ("equivalent", "different")
    assert near.gaps["train_loss"].n == 3
    assert far.gaps["train_loss"].difference == pytest.approx(0.2, abs=0.03)
    assert near.gaps["train_loss"].sd < 0.03 < row(rows, "base", 4).metrics["train_loss"][1] * 3
    assert row(rows, "linear_scaled", 16).verdict == "different"  # by its weights
    assert [t.metric for t in row(rows, "linear_scaled", 16).tests if t.verdict == "different"] == ["weight_norm"]
    assert near.power == "told apart: 'linear_scaled', 'none'"
    assert any("'linear_scaled' different (weight norm +5.0" in line for line in report.reading(rows))


ADAMW = {"completed": "rule", "adamw_sde": "rule", "sqrt": "rule", "none": "control"}


@pytest.mark.parametrize(
    ("words", "roles"),
    [
        ([], {"sqrt": "rule", "sqrt_without_eps": "control", "linear": "control"}),
        (["optimizer=adamw"], ADAMW),
        (["optimizer=sgd"], {"linear": "rule", "linear_momentum": "rule", "none": "control"}),
        (["noise_scale=300", "goal=best"], {"opt_sign": "rule", "none": "control"}),
        (["tested=[linear]"], {"linear": "rule", "sqrt": "control"}),
    ],
)
def test_the_rules_under_test_are_those_that_answer_the_goal(
    words: list[str], roles: dict[str, str], tmp_path: Path
) -> None:
    """Fails if a role were told by a rule's name: then `completed`, `linear_momentum` and every rule with another goal
    were controls, whose being different counted as power, and nobody read them. Each rule under test is read."""
    fabricate(tmp_path, [*DEMO, *words], batches=(4, 16), rules=list(roles))
    rows = rows_of(tmp_path)
    assert {r.rule: r.role for r in rows if r.batch == 16} == roles
    read = "\n".join(report.reading(rows))
    for rule, role in roles.items():
        assert (f"batch 16: {rule} is" in read) == (role == "rule")


def end(run_dir: Path, **result: Any) -> None:
    """Make a fabricated run one that failed."""
    RunDir(run_dir).write_result({"status": "failed", "reason": "the loss is not finite at step 3", **result})


def arms(root: Path, specs: list[plan.RunSpec], rule: str) -> list[Path]:
    """Folders of an arm beside its base, by seed."""
    return [root / s.run_id for s in specs if s.arms[0].rule == rule and s.science.batch != 4]


def test_an_arm_that_diverges_on_every_seed_is_different(tmp_path: Path) -> None:
    """Fails if divergence were no result: then a control that exploded would leave the rule without power, and the rule
    itself would not be different from a base that trains. A disk that was full is no divergence."""
    specs = fabricate(tmp_path, DEMO, batches=(4, 16), rules=("sqrt", "linear"))
    for run_dir in arms(tmp_path, specs, "linear"):
        end(run_dir, diverged=True)
    rows = rows_of(tmp_path)
    assert row(rows, "linear", 16).verdict == "different"
    assert row(rows, "linear", 16).remarks == ("diverged on every seed (3), where the base runs did not",)
    assert (row(rows, "sqrt", 16).verdict, row(rows, "sqrt", 16).power) == ("equivalent", "told apart: 'linear'")
    read = "\n".join(report.reading(rows))
    assert "'linear' different (diverged on every seed)" in read and "nan" not in read
    for run_dir in arms(tmp_path, specs, "sqrt"):
        end(run_dir, diverged=True)
    assert row(rows_of(tmp_path), "sqrt", 16).verdict == "different"
    for run_dir in arms(tmp_path, specs, "linear"):
        end(run_dir, diverged=False, reason="OSError: no space left on device")
    assert row(rows_of(tmp_path), "linear", 16).verdict == "no result"


def test_two_diverged_seeds_are_too_few(tmp_path: Path) -> None:
    specs = fabricate(tmp_path, DEMO, seeds=(0, 1), batches=(4, 16), rules=("sqrt", "linear"))
    for run_dir in arms(tmp_path, specs, "linear"):
        end(run_dir, diverged=True)
    assert row(rows_of(tmp_path), "linear", 16).verdict == "too few seeds"


def test_a_seed_whose_base_failed_rules_out_equivalent(tmp_path: Path) -> None:
    """Fails if the pair were dropped in silence: the three that are left are equivalent."""
    specs = fabricate(tmp_path, DEMO, seeds=(0, 1, 2, 3), batches=(4, 16), spread=0.001)
    base = next(s for s in specs if s.science.batch == 4 and s.science.seed == 3)
    end(tmp_path / base.run_id, diverged=True)
    sqrt = row(rows_of(tmp_path), "sqrt", 16)
    assert sqrt.verdict == "inconclusive" and "seed 3: base run failed, not compared" in sqrt.remarks
    assert sqrt.gaps["train_loss"].n == 3


def test_the_reading_says_what_the_verdicts_say(tmp_path: Path) -> None:
    """A rule that is different beside an equivalent control. Fails if the reading called the control another run from
    a ratio of two means, or said of the rule that nothing could have lost."""
    fabricate(tmp_path, [*DEMO, "tested=[linear]"], batches=(4, 16), rules=("linear", "linear_scaled"))
    rows = rows_of(tmp_path, train_loss=0.06, weight_norm=30.0)
    assert [row(rows, r, 16).verdict for r in ("linear", "linear_scaled")] == ["different", "equivalent"]
    line, displacement = report.reading(rows)
    assert "measured" in displacement
    assert "batch 16: linear is different (final train loss +0.1" in line and "'linear_scaled' equivalent" in line
    assert "another run" not in line


def test_runs_with_other_records_are_compared(tmp_path: Path) -> None:
    """Measuring is no science. Fails if the base run that `plan` asks for (measure.noise=full) were another run."""
    fabricate(tmp_path, [*DEMO, "measure.noise=full"], batches=(4,), rules=("sqrt",), records=60)
    fabricate(tmp_path, DEMO, batches=(16,), rules=("sqrt",))
    assert row(rows_of(tmp_path), "sqrt", 16).gaps["train_loss"].n == 3


def test_the_trajectory_is_exact_for_unequal_records(tmp_path: Path) -> None:
    """Two runs whose losses differ by 0.25 throughout, recorded at other places: the mean difference is 0.25. Fails if
    records were compared by their number instead of by samples, or interpolated as points instead of as means."""
    specs = fabricate(tmp_path, DEMO, seeds=(0,), batches=(4, 16), rules=("sqrt",))
    for spec, marks in zip(specs, ([100, 200, 400, 800, 1000], [250, 500, 1000]), strict=True):
        lines, before = [], 0
        for samples in marks:
            loss = 1.0 + (0.25 if spec.science.batch == 16 else 0.0)
            clock = {"step": samples // spec.science.batch, "samples": samples, "t": samples * 1e-6}
            lines.append({"kind": "train", **clock, "loss": loss, "window": samples - before})
            before = samples
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / spec.run_id / "records.jsonl").write_text(text)
    gap = row(rows_of(tmp_path), "sqrt", 16).gaps["trajectory"]
    assert gap.difference == pytest.approx(0.25, abs=1e-12)


def test_the_final_train_loss_is_the_mean_of_the_last_tenth() -> None:
    """Loss 5 until 90% of the samples and 1 after: the mean of the last tenth is 1. The last record alone
    would say 0.5, the one before it 1.5."""
    import numpy as np

    x = np.array([0.0, 900.0, 950.0, 1000.0])
    total = np.array([0.0, 4500.0, 4575.0, 4600.0])
    assert runs._last((x, total)) == pytest.approx(1.0)


def test_mixed_experiments_are_kept_apart(tmp_path: Path) -> None:
    """Two base learning rates under the same names in one folder. Fails if settings were keyed by names alone: then six
    runs would be averaged in one row."""
    fabricate(tmp_path, DEMO, batches=(4, 16))
    fabricate(tmp_path, [*DEMO, "recipe.lr=0.0013"], batches=(4, 16))
    rows = rows_of(tmp_path)
    assert sorted({r.setting for r in rows}) == [
        "resnet8 on digits, adam (lr 0.001)",
        "resnet8 on digits, adam (lr 0.0013)",
    ]
    assert all(len(r.seeds) == 3 for r in rows)


def test_what_is_wrong_is_said_and_the_rest_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-written run, foreign JSON, NaN, a failed run, a running one, torn records, all in one folder."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    specs = fabricate(root, DEMO, seeds=(0, 1, 2, 3), batches=(4, 16, 64))
    by = {(s.science.batch, s.arms[0].rule, s.science.seed): root / s.run_id for s in specs}
    (by[16, "sqrt", 0] / "result.json").write_text('{"status": "finished"')  # half-written
    edit(by[16, "none", 1] / "result.json", lambda r: r.update(status="failed", reason="the loss is not finite"))
    edit(by[16, "none", 2] / "result.json", lambda r: r["metrics"].update(test_accuracy=math.nan))
    (by[64, "sqrt", 3] / "result.json").unlink()  # still running
    (by[64, "none", 0] / "result.json").write_text('["status"]')
    with open(by[64, "none", 1] / "records.jsonl", "ab") as f:
        f.write(
            b'\xff\xfe\n5\n"text"\n{"kind": "train"}\n{"kind": "train", "step": 1, "samples": 9, "loss": null}\n{"kin'
        )
    (by[64, "none", 2] / "records.jsonl").write_text("")
    for name, text in (("foreign", '{"name": "npm"}'), ("list", "[1, 2]"), ("torn", '{"version": 1')):
        (root / name).mkdir()
        (root / name / "run.json").write_text(text)
    edit_to = root / "no-arms"
    edit_to.mkdir()
    (edit_to / "run.json").write_text((by[4, "sqrt", 0] / "run.json").read_text())
    edit(edit_to / "run.json", lambda r: r.update(arms=[]))

    assert cli.main(["report", "runs"]) == 0
    said = capsys.readouterr()
    for word in ("foreign", "list", "torn", "no-arms", "is failed: the loss is not finite", "half-written"):
        assert word in said.err, word
    rows = rows_of(root)
    sqrt, none = row(rows, "sqrt", 16), row(rows, "none", 16)
    assert sqrt.seeds == (1, 2, 3) and any("seed 0" in x for x in sqrt.remarks)
    assert none.gaps["train_loss"].n == 3 and none.gaps["test_accuracy"].n == 2
    assert any("not a number: test_accuracy" in x for x in none.remarks)
    assert row(rows, "none", 64).gaps["train_loss"].n == 2
    text = html.unescape((tmp_path / "report" / "index.html").read_text())
    for gone in ("foreign", "the loss is not finite", by[64, "sqrt", 3].name, "5 record(s) could not be read"):
        assert gone in text, gone
    table = json.loads(tables.as_json(rows, report.collect([root]).missing))  # strict JSON: NaN is null
    assert len(table["not_finished"]) == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "no finished run under empty"),
        (["nowhere"], "no folder 'nowhere'"),
        (["runs", "--margin", "speed=1"], "one of test_accuracy"),
        (["runs", "--margin", "train_loss"], "METRIC=VALUE"),
        (["runs", "--margin", "train_loss=-1"], "must be > 0"),
        (["runs", "--margin", "test_accuracy=3"], "must be > 0, and below 1 for test_accuracy"),
        (["runs", "--watch", "0"], "seconds > 0"),
    ],
)
def test_refusals(
    words: list[str], said: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").symlink_to(sweep)
    assert cli.main(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_one_seed_and_a_missing_base(tmp_path: Path) -> None:
    """Fails if one seed got a verdict, or if an arm without its base vanished."""
    specs = fabricate(tmp_path, DEMO, seeds=(0,), batches=(4, 16))
    assert row(rows_of(tmp_path), "sqrt", 16).verdict == "too few seeds"
    assert "NaN" not in tables.as_json(rows_of(tmp_path), [])  # which has no spread to tell
    base = next(s for s in specs if s.science.batch == 4)
    (tmp_path / base.run_id).rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    alone = row(rows_of(tmp_path), "sqrt", 16)
    assert alone.verdict == "no result" and "base run not found" in alone.remarks[0]


def test_a_failed_seed_is_never_equivalent_and_a_missing_one_is_named(tmp_path: Path) -> None:
    specs = fabricate(tmp_path, DEMO, seeds=(0, 1, 2, 3), batches=(4, 16), spread=0.001)
    assert row(rows_of(tmp_path), "sqrt", 16).verdict == "equivalent"
    gone = next(s for s in specs if s.science.batch == 16 and s.arms[0].rule == "sqrt" and s.science.seed == 3)
    edit(tmp_path / gone.run_id / "result.json", lambda r: r.update(status="failed", reason="diverged"))
    assert row(rows_of(tmp_path), "sqrt", 16).verdict == "inconclusive"
    for path in (tmp_path / gone.run_id).iterdir():
        path.unlink()
    (tmp_path / gone.run_id).rmdir()
    after = row(rows_of(tmp_path), "sqrt", 16)
    assert after.verdict == "equivalent" and after.remarks == ("seed 3 not run",)


def test_no_power_where_nothing_lost(tmp_path: Path) -> None:
    """Fails if an equivalence were shown bare where no control was run, or where none was told apart."""
    fabricate(tmp_path / "a", DEMO, batches=(4, 16), rules=("sqrt",))
    assert row(rows_of(tmp_path / "a"), "sqrt", 16).power == "no power: no control was run"
    fabricate(tmp_path / "b", DEMO, batches=(4, 16), rules=("sqrt", "none"))
    wide = {"train_loss": 9.0, "trajectory": 9.0}
    assert row(rows_of(tmp_path / "b", **wide), "sqrt", 16).power == "no power: no control was told apart"


def test_margins_travel_beside_the_science() -> None:
    """Fails if a margin moved the run id (the same run would be trained twice), or were lost on the way to run.json."""
    one, two = (
        plan.plan(config.compose(["experiment=demo", "seed=0", "batch=16", "rule=sqrt", *words]))[0]
        for words in ([], ["margin.train_loss=0.5"])
    )
    assert one.run_id == two.run_id
    assert one.margin["train_loss"] == 0.06 and two.margin["train_loss"] == 0.5
    assert plan.RunSpec.from_json(json.loads(json.dumps(two.to_json()))) == two
    with pytest.raises(config.ConfigError, match="margin"):
        config.compose(["margin.train_loss=0"])
    with pytest.raises(config.ConfigError, match="train_loss"):
        config.compose(["margin.trainloss=0.1"])


def test_runs_that_disagree_on_the_margin_get_the_smallest(tmp_path: Path) -> None:
    specs = fabricate(tmp_path, DEMO, batches=(4, 16))
    one = next(s for s in specs if s.science.batch == 16 and s.arms[0].rule == "sqrt")
    edit(tmp_path / one.run_id / "run.json", lambda r: r["margin"].update(train_loss=1e-4))
    got = row(rows_of(tmp_path), "sqrt", 16)
    assert got.gaps["train_loss"].margin == 1e-4 and got.verdict != "equivalent"
    assert any("different margins" in x for x in got.remarks)


def test_margins_are_known_before_the_runs_end(tmp_path: Path) -> None:
    """A sweep whose base runs alone have finished. Fails if it says that no margin was fixed."""
    for spec in fabricate(tmp_path, [*DEMO, "looks=[3,6]"], batches=(4, 16)):
        if spec.science.batch == 16:
            (tmp_path / spec.run_id / "result.json").unlink()
    got = row(rows_of(tmp_path), "sqrt", 16)
    assert got.verdict == "no result" and got.gaps["train_loss"].margin and got.looks == (3, 6)
    (said,) = report.answer(rows_of(tmp_path))
    assert "at ±" in said and "16 has no result" in said


def test_machines_and_papers_can_read_it(sweep: Path) -> None:
    rows = rows_of(sweep)
    table = json.loads(tables.as_json(rows, []))
    one = next(r for r in table["rows"] if (r["rule"], r["batch"]) == ("none", 64))
    assert one["verdict"] == "different" and one["gaps"]["train_loss"]["n"] == 3
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(rows))))
    got = next(x for x in lines if (x["rule"], x["batch"], x["metric"]) == ("none", "64", "train_loss"))
    assert float(got["difference"]) == one["gaps"]["train_loss"]["difference"]
    latex, markdown = tables.as_latex(rows), tables.as_markdown(rows)
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 1
    columns = latex.split("\\begin{tabular}{")[1].split("}")[0]
    body = [x for x in latex.splitlines() if x.endswith("\\\\")]
    assert {x.count("&") + 1 for x in body} == {len(columns)} and len(body) == len(rows) + 1
    assert any("linear\\_scaled (control)" in x for x in body)
    table = [x for x in markdown.splitlines() if x.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", x)) for x in table} == {len(columns) + 1} and len(table) == len(rows) + 2
    gap = one["gaps"]["train_loss"]
    assert f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" in markdown


@pytest.mark.parametrize("width", [*range(64, 130, 3), 170])
def test_the_table_fits_and_cuts_no_word(
    width: int, sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a column were squeezed until `equivalent` breaks, or if what has no room were not named."""
    monkeypatch.setenv("COLUMNS", str(width))
    rows = rows_of(sweep)
    tables.show(rows)
    printed = capsys.readouterr().out
    table = [x for x in printed.splitlines() if x[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= width
    words = set(re.split(r"[\s│┃]+", "\n".join(table)))
    (grid,) = tables.grids(rows)
    said = " ".join(printed.split("too narrow for: ", 1)[1].split()) if "too narrow for" in printed else ""
    left_out = [tables.DISPLACEMENT, *said.split(" (all")[0].split(", ")]
    shown = [i for i, name in enumerate(grid.heads) if name not in left_out]
    assert len(shown) >= (5 if width < 80 else 7 if width < 120 else 9)
    for i in shown:
        for text in (grid.heads[i], *(part for line in grid.cells for part in line[i])):
            assert set(text.split()) <= words, text


def test_columns_without_a_margin_go_before_an_interval_is_broken(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the table were crowded again: at 120 columns the test loss, which has no margin, would break the
    intervals of the rest; and without any margin no interval is broken at any width. No line of prose is cut."""
    monkeypatch.setenv("COLUMNS", "120")
    tables.show(rows_of(sweep))
    tables.say(["word " * 40])
    printed = capsys.readouterr().out
    assert "too narrow for: Δ test loss" in printed and max(map(len, printed.splitlines())) <= 120
    assert re.search(r"│ \[[-+.\d%]+, [-+.\d%]+\] +│ \[[-+.\d]+, [-+.\d]+\] +│", printed)
    fabricate(tmp_path / "runs", without_margins())
    for width in range(60, 170, 5):
        monkeypatch.setenv("COLUMNS", str(width))
        tables.show(rows_of(tmp_path / "runs"))
        assert not re.search(r"\[[-+.\d%]+,? *│", capsys.readouterr().out), width


def test_every_chart_has_its_arms_and_every_figure_its_file(sweep: Path, tmp_path: Path) -> None:
    """Fails if an arm were missing from a chart of its batch, or a group of charts drew no file."""
    rows = rows_of(sweep)
    drawn = charts.arrange(rows)
    arms = {r.rule for r in rows}
    for chart in drawn:
        names = {t.arm for t in chart.traces}
        if chart.group in ("curves", "final", "hyper", "cost"):
            assert names == arms, chart.title
        elif chart.group == "gap":
            assert names == arms - {"base"}
        assert all(len(t.x) == len(t.y) for t in chart.traces)
    assert {c.group for c in drawn} == {"curves", "pace", "final", "gap", "hyper", "cost", "paper"}
    files = figures.draw([c for c in drawn if c.group in ("gap", "cost")], tmp_path, ("png", "pdf"))
    assert [f.name for f in files] == ["gap.png", "gap.pdf", "cost.png", "cost.pdf"]
    assert all(f.read_bytes()[:4] in (b"\x89PNG", b"%PDF") for f in files)


def test_arms_at_one_batch_are_drawn_at_one_batch(sweep: Path, tmp_path: Path) -> None:
    """Fails if arms were set side by side on an axis of batches, where each would look like a batch of its own; with
    one target batch the axis names the arms."""
    for chart in (c for c in charts.arrange(rows_of(sweep)) if c.ticks and c.group != "pace"):
        assert {x for t in chart.traces for x in t.x} <= {4, 16, 64}
    fabricate(tmp_path, DEMO, batches=(4, 64), rules=("sqrt", "none"))
    drawn = [c for c in charts.arrange(rows_of(tmp_path)) if c.group in ("final", "gap", "cost")]
    assert {c.group for c in drawn} == {"final", "gap", "cost"}
    for chart in drawn:
        names = (*(["base (4)"] if chart.group != "gap" else []), "sqrt", "none")
        assert (chart.x, chart.log_x, chart.ticks) == ("batch 64", False, tuple(enumerate(names)))
        assert [t.x for t in chart.traces] == [[float(i)] for i in range(len(names))]


def noise(run_dir: Path, samples: int, trace: float, signal: float, method: str = "full") -> None:
    record = {"kind": "noise", "step": 1, "samples": samples, "t": 1e-4, "trace": trace, "gradient_sq": signal}
    record |= {"batch": 4, "enough": False}
    with open(run_dir / "records.jsonl", "a") as f:
        f.write(json.dumps(record | {"method": method}) + "\n")


def test_noise_and_svag_have_their_charts(tmp_path: Path) -> None:
    """Two records of each of three seeds at 100 samples, of which one came out below zero, and one at 900. Ratios are
    of means: tr Σ = 8, |g|² = (5·1 - 2)/6 = 0.5, so B_noise = 16 and κ r = B/16. Fails if records with a signal below 0
    were left out (|g|² = 1), if ratios were averaged, or if the free estimate were mixed into the full one."""
    specs = fabricate(tmp_path, DEMO, batches=(4, 16), rules=("sqrt",))
    fabricate(tmp_path, [*DEMO, "svag=2"], batches=(4,), rules=("sqrt",))
    for spec in specs:
        run_dir = tmp_path / spec.run_id
        noise(run_dir, 100, 8.0, 1.0)
        noise(run_dir, 100, 8.0, -2.0 if spec.science.seed == 0 else 1.0)
        noise(run_dir, 900, 8.0, 0.01)
        noise(run_dir, 900, 80.0, 80.0, "free")
    drawn = charts.arrange(rows_of(tmp_path))
    by_title = {c.title: c for c in drawn if c.group == "noise"}
    scale = by_title["B_noise, examples"]
    assert {t.arm: t.y for t in scale.traces} == {
        "batch 4": pytest.approx([16, 800]),
        "batch 16": pytest.approx([16, 800]),
    }
    ratio = by_title["κ r = B ‖∇f‖² / tr Σ"]
    assert {t.arm: t.y for t in ratio.traces} == {
        "batch 4": pytest.approx([0.25, 0.005]), "batch 16": pytest.approx([1.0, 0.02]),
    }  # fmt: skip
    share = by_title["share of training with κ r < 0.1"]
    assert {t.arm: t.y for t in share.traces} == {"base": [0.5], "sqrt": [0.5]}
    steps = by_title["base, batch 4: a step"]
    assert {t.arm: t.y[0] for t in steps.traces} == {
        charts.NOISE: pytest.approx(math.sqrt(2)), charts.SIGNAL: pytest.approx(math.sqrt(0.5)),
    }  # fmt: skip
    overlay = {c.title: c for c in drawn if c.group == "svag"}
    assert {"train loss", "test loss", "test accuracy", "weight norm"} <= set(overlay)
    assert {t.arm for t in overlay["train loss"].traces} == {"base", "SVAG ℓ=2"}


def add_to_losses(run_dir: Path, kind: str, added: Any) -> None:
    """Change the losses of one kind of record by what `added` says of it."""
    file = run_dir / "records.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    moved = [{**x, "loss": x["loss"] + added(x)} if x["kind"] == kind else x for x in lines]
    file.write_text("".join(json.dumps(x) + "\n" for x in moved))


def test_the_reading_says_whether_the_gap_arose_early(tmp_path: Path) -> None:
    """Without noise the runs at 16 are the base runs, but for 0.3 in the first 4 of 40 records and -0.1 in the last 4.
    Fails if signs were lost, if seeds were not paired, or if a tenth were another share of the samples."""
    for spec in fabricate(tmp_path, DEMO, batches=(4, 16), rules=("sqrt",), spread=0.0):
        if spec.science.batch == 16:
            end = spec.science.samples(spec.science.steps)
            add_to_losses(
                tmp_path / spec.run_id, "train",
                lambda x, end=end: 0.3 if x["samples"] <= end / 10 else -0.1 if x["samples"] > end * 0.9 else 0.0,
            )  # fmt: skip
    (said,) = [x for x in report.reading(rows_of(tmp_path)) if "batch 16: sqrt" in x]
    assert "0.0400 from the base's on average (+0.3000 in the first tenth, -0.1000 in the last)" in said


def test_svag_s_curves_are_compared_in_the_order_of_l(tmp_path: Path) -> None:
    """The runs of a seed are alike but for what is added to their test loss: 0.4 at ℓ = 2 and 0.5 at ℓ = 4, and by seed
    -0.1, 0, 0.1 more at ℓ = 4. So the distances are 0.4 and 0.1, chance has a part in the second alone (sd 0.1 over
    three seeds: 0.1 √(2 / 3π)), and weights do not differ. Fails if each ℓ were compared with 1, if seeds were not
    paired, or if chance were the spread of one ℓ."""
    for ell in (1, 2, 4):
        for spec in fabricate(tmp_path, [*DEMO, f"svag={ell}"], batches=(4,), rules=("sqrt",)):
            if spec.science.svag == ell > 1:
                added = {2: 0.4, 4: 0.5 + 0.1 * (spec.science.seed - 1)}[ell]
                add_to_losses(tmp_path / spec.run_id, "eval", lambda x, added=added: added)
    lines = [x for x in report.reading(rows_of(tmp_path)) if "SVAG" in x]
    said = {
        name: line for name in ("train loss", "test loss", "weight norm") for line in lines if f"SVAG, {name}:" in line
    }
    assert "ℓ 1 → 2 0.4 (chance" in said["test loss"]
    assert f"2 → 4 0.1 (chance {0.1 * math.sqrt(2 / 3 / math.pi):.2g})" in said["test loss"]
    assert "are further apart than that" in said["test loss"]
    assert "overlay within that" in said["weight norm"]


def test_a_report_amid_svag_s_runs(tmp_path: Path) -> None:
    """Of ℓ = 2 nothing has finished, and of ℓ = 1 nothing but runs at another batch. Fails if a row without runs, or a
    setting without two ℓ, ended the report."""
    fabricate(tmp_path / "a", DEMO, batches=(4,), rules=("sqrt",))
    for spec in fabricate(tmp_path / "a", [*DEMO, "svag=2"], batches=(4,), rules=("sqrt",)):
        if spec.science.svag == 2:
            (tmp_path / "a" / spec.run_id / "result.json").unlink()
    fabricate(tmp_path / "b", [*DEMO, "svag=2"], batches=(16,), rules=("sqrt",))
    for folder in ("a", "b"):
        rows = rows_of(tmp_path / folder)
        assert not [x for x in report.reading(rows) if "SVAG, " in x]
        charts.arrange(rows)


# ---- the first line ----


def test_a_batch_between_needs_no_control_and_the_last_one_does(tmp_path: Path) -> None:
    """sqrt at 16 has no control beside it, at 64 `none` is told apart, at 256 nothing is beside it again. Fails if the
    lack of a control at 16 hid what was shown at 64, or if 256 were called safe without one."""
    fabricate(tmp_path, DEMO, batches=(4, 64), rules=("sqrt", "none"))
    fabricate(tmp_path, DEMO, batches=(16, 256), rules=("sqrt",))
    (said,) = report.answer(rows_of(tmp_path))
    assert said.startswith("Safe up to batch 64 (κ = 16) under sqrt")
    assert "256 is within the margins without power (no control was run)" in said


def without_margins() -> list[str]:
    return [*DEMO, *(f"margin.{m}=null" for m in ("test_accuracy", "train_loss", "trajectory", "weight_norm"))]


def make(root: Path, batches: tuple[int, ...], rules: tuple[str, ...] = ("sqrt", "none"), **more: Any) -> None:
    fabricate(root, more.pop("words", DEMO), batches=batches, rules=rules, **more)


def test_the_first_line_is_the_answer_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sqrt holds at 16 and is another run at 256, where its runs are those of `linear`. Fails if the largest
    equivalent batch were called safe past one that is not, or if a form of the report lacked the sentence."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs", (4, 16, 256))
    for run_dir in RunDir.under(tmp_path / "runs"):
        spec = run_dir.spec()
        if spec.science.batch == 256 and spec.arms[0].rule == "sqrt":
            edit(run_dir.path / "result.json", lambda r: r["metrics"].update(test_accuracy=0.1))
    first = (
        "Safe up to batch 16 (κ = 4) under sqrt, at ±3% accuracy and 3 more margins, 3 seeds; 256 is not; nothing "
        "between was run."
    )
    assert cli.main(["report"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first
    for form, begins in (("--markdown", f"**{first}**"), ("--latex", f"% {first}")):
        assert cli.main(["report", form]) == 0
        assert capsys.readouterr().out.splitlines()[0] == begins
    assert cli.main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == [first]
    page_text = html.unescape((tmp_path / "report" / "index.html").read_text())
    assert f'<p class="answer">{first}</p>' in page_text
    assert cli.main(["dashboard", "--offline"]) == 0
    assert first in json.dumps(json.loads((tmp_path / "report" / "wandb.json").read_text()), ensure_ascii=False)


@pytest.mark.parametrize(
    ("batches", "more", "said"),
    [
        ((4, 16, 64), {}, ["Safe up to batch 64 (κ = 16) under sqrt", "3 seeds; nothing larger was run."]),
        ((4, 16), {"rules": ("sqrt",)}, ["Not shown safe beyond the base batch 4", "16 is within the margins without"]),
        ((4, 16), {"spread": 0.05}, ["Not shown safe", "16 is undecided (", "seeds would decide)"]),
        ((4, 16), {"seeds": (0, 1)}, ["Not shown safe", "16 has too few seeds (2)"]),
        ((4, 16), {"words": [*DEMO, "tested=[]"]}, ["No rule was under test", "'none' at 16 is not"]),
        ((4,), {}, ["only base runs have finished"]),
        ((4,), {"words": [*DEMO, "svag=2"], "rules": ("sqrt",)}, ["how far SVAG's curves lie apart"]),
        ((4, 16), {"words": without_margins()}, ["add margin=auto or margin.test_", "sqrt at 16 -0.19% ["]),
    ],
)  # fmt: skip
def test_what_the_first_line_says(
    batches: tuple[int, ...], more: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    """Fails if a batch were safe without power, undecided or with too few seeds, or if no margin were an empty line."""
    make(tmp_path, batches, **more)
    line = report.answer(rows_of(tmp_path))[0]
    assert all(part in line for part in said), line
    assert line.startswith("Safe") == said[0].startswith("Safe")


def test_arms_without_a_margin_are_ranked_by_their_effect(tmp_path: Path) -> None:
    """sqrt moves accuracy by nothing, `none` by 5% at 16 and 10% at 64. Fails if the order were that of the table."""
    make(tmp_path, (4, 16, 64), words=without_margins())
    (line,) = report.answer(rows_of(tmp_path))
    places = [line.index(arm) for arm in ("sqrt at 64", "sqrt at 16", "none at 16", "none at 64")]
    assert places == sorted(places)


def test_equivalent_without_power_is_not_green(tmp_path: Path) -> None:
    """Fails if terminal or page drew it as they draw one that a control stands beside."""
    make(tmp_path / "a", (4, 16), ("sqrt",))
    make(tmp_path / "b", (4, 16))
    for name, colour in (("a", "unproven"), ("b", "equivalent")):
        rows = rows_of(tmp_path / name)
        assert (row(rows, "sqrt", 16).verdict, row(rows, "sqrt", 16).colour) == ("equivalent", colour)
        (grid,) = tables.grids(rows)
        assert ("equivalent", colour) in grid.verdicts and (colour in tables._STYLE) == (name == "b")
        text = page.write(rows, [], [], tmp_path / name / "out").read_text()
        assert f'class="verdict {colour}"' in text
        assert ("1 equivalent without power" in text) == (name == "a")


# ---- looks ----


def test_looks_are_counted_and_undeclared_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict at 3 seeds, then two more seeds and another. Fails if the second report did not know of the first, if
    a repeated report counted as a look, or if a declared look were named as one that was not."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs", (4, 16))
    for _ in range(2):
        assert cli.main(["report", "--markdown"]) == 0
        assert "Looked at" not in capsys.readouterr().out
    written = (tmp_path / "runs" / "looks.jsonl").read_text().splitlines()
    assert sorted((json.loads(x)["rule"], json.loads(x)["seeds"]) for x in written) == [("none", 3), ("sqrt", 3)]
    make(tmp_path / "runs", (4, 16), seeds=(3, 4))
    assert cli.main(["report", "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "Looked at with 3, 5 seeds, and no looks were declared: the 5% of error become up to 10%" in said
    for run_dir in RunDir.under(tmp_path / "runs"):
        edit(run_dir.path / "run.json", lambda r: r.update(looks=[3, 5]))
    assert cli.main(["report", "--markdown"]) == 0
    assert "Looked at" not in capsys.readouterr().out
    for run_dir in RunDir.under(tmp_path / "runs"):
        edit(run_dir.path / "run.json", lambda r: r.update(looks=[5, 10]))
    assert cli.main(["report", "--markdown"]) == 0
    assert "Looked at with 3 seeds, and the looks that were declared are 5, 10" in capsys.readouterr().out


def test_a_control_with_fewer_seeds_is_no_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DEMO, "looks=[3,5]"]
    make(tmp_path, (4, 16), seeds=range(4), words=words)
    make(tmp_path, (4, 16), ("sqrt",), seeds=(4,), words=words)
    assert cli.main(["report", str(tmp_path), "--markdown"]) == 0
    assert "Looked at" not in capsys.readouterr().out


def test_declared_looks_are_tested_at_their_share(tmp_path: Path) -> None:
    """At 5 of looks [5, 10] alpha is 2.5%: a wider interval, of 95%. Before the first look there is no verdict."""
    make(tmp_path / "a", (4, 16), seeds=range(5), words=[*DEMO, "looks=[5,10]"])
    rows = rows_of(tmp_path / "a")
    assert row(rows, "sqrt", 16).gaps["train_loss"].alpha == 0.025 and tables.level_of_intervals(rows) == "95%"
    assert "shares of alpha: 5 (0.025), 10 (0.025)" in tables.as_markdown(rows)
    make(tmp_path / "b", (4, 16), seeds=range(4), words=[*DEMO, "looks=[5,10]"])
    early = row(rows_of(tmp_path / "b"), "sqrt", 16)
    assert early.verdict == "too few seeds" and "the first look was declared at 5 seeds" in early.remarks
    with pytest.raises(config.ConfigError, match="must rise"):
        config.compose(["looks=[5,3]"])
    with pytest.raises(config.ConfigError, match="looks"):
        config.compose(["looks=[2,5]"])


# ---- predicted and measured ----


def test_predicted_stands_beside_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At B_noise 200 from batch 4: r = 0.02, so √(1.02/1.08) - 1 = -2.8% at 16, √(1.02/1.32) - 1 = -12.1% at 64, and
    half of each was made. Fails if a control were given the rule's prediction, or a form lacked the two."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs", (4, 16, 64), b_noise=200)
    rows = rows_of(tmp_path / "runs")
    far = row(rows, "sqrt", 64)
    assert far.predicted and far.measured
    assert far.predicted.deviation - 1 == pytest.approx(-0.121, abs=0.005)
    assert far.measured.value - 1 == pytest.approx(-0.0605, abs=0.01)
    assert far.measured.low < far.measured.value < far.measured.high
    assert row(rows, "none", 64).predicted is None and row(rows, "none", 64).measured
    (drawn,) = [c for c in charts.arrange(rows) if c.group == "gap" and "θ₀" in c.title]
    told, rule = (next(t for t in drawn.traces if t.arm == arm) for arm in (charts.CURVE, "sqrt"))
    assert told.x == rule.x == [16, 64] and {t.arm for t in drawn.traces} == {charts.CURVE, "sqrt"}
    assert (told.y[1], rule.y[1]) == (far.predicted.deviation - 1, far.measured.value - 1)
    assert cli.main(["report"]) == 0
    said = capsys.readouterr().out
    assert "predicted -12.1% [" in said and "measured -6." in said and "ordinal" in said
    got = json.loads(tables.as_json(rows, []))
    one = next(r for r in got["rows"] if (r["rule"], r["batch"]) == ("sqrt", 64))["displacement"]
    assert one["predicted"]["deviation"] == far.predicted.deviation and one["measured"]["n"] == 3
    text = html.unescape((tmp_path / "report" / "index.html").read_text())
    assert re.search(r"-12\.1%\s*<div class=\"small interval\">\[.*\n?.*measured</div>\s*-6\.", text)
    assert (tmp_path / "report" / "prediction.png").stat().st_size > 5000


def test_the_calibration_is_of_all_sweeps(tmp_path: Path) -> None:
    """Three sweeps of other B_noise: measured is half of predicted throughout, in order. One line with the rank
    correlation, which calls it ordinal, and one figure with a point an arm. Fails if settings were kept apart."""
    for i, b_noise in enumerate((50, 200, 1000)):
        words = [*DEMO, f"recipe.lr={0.001 + 0.0002 * i}"]
        make(tmp_path, (4, 16, 64), words=words, b_noise=b_noise, spread=0.001)
    rows = rows_of(tmp_path)
    (line,) = [x for x in report.reading(rows) if x.startswith("prediction of")]
    assert "over 6 arm(s) of 3 setting(s)" in line and "rank correlation 0.94 [" in line
    assert "measured shrinkage is 0.50 of the predicted" in line and "ordinal: it orders arms" in line
    (chart,) = [c for c in charts.arrange(rows) if c.group == "prediction"]
    assert chart.setting == "3 settings" and chart.scatter
    (points,) = [t for t in chart.traces if t.arm == "sqrt"]
    assert len(points.x) == len(points.y) == len(points.x_low or []) == 6


def test_runs_without_displacement_say_so(tmp_path: Path) -> None:
    """Runs of an older version. Fails if they broke the report, or stood in the calibration."""
    make(tmp_path, (4, 16), b_noise=200)
    for run_dir in RunDir.under(tmp_path):
        edit(run_dir.path / "result.json", lambda r: r["metrics"].pop("displacement"))
    rows = rows_of(tmp_path)
    assert row(rows, "sqrt", 16).measured is None
    read = "\n".join(report.reading(rows))
    assert "measured not (older runs)" in read and "prediction of the displacement over" not in read


def test_watching_ends_with_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The last run finishes during the second sleep. Fails if watching stopped early, never, or read a stale result."""
    root, out = tmp_path / "runs", tmp_path / "out"
    specs = fabricate(root, DEMO, batches=(4, 16), rules=("sqrt",))
    result = root / specs[-1].run_id / "result.json"
    text, slept = result.read_text(), []
    result.unlink()

    def sleep(seconds: float) -> None:
        slept.append((seconds, 'http-equiv="refresh"' in (out / "index.html").read_text()))
        if len(slept) == 2:
            result.write_text(text)

    monkeypatch.setattr(report.time, "sleep", sleep)
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    assert report.main([str(root), "--out", str(out), "--watch", "3"]) == 0
    assert slept == [(3, True), (3, True)]
    assert 'http-equiv="refresh"' not in (out / "index.html").read_text()
    assert "is interrupted: 100% of its steps" in capsys.readouterr().err


def test_the_page_is_one_small_file_without_network(sweep: Path, tmp_path: Path) -> None:
    """Fails if the page linked a script or a font, grew over 5 MB, or let a name from a run break out of the HTML."""
    rows = rows_of(sweep)
    evil = "</script><script>alert(1)</script>"
    missing = [report.Missing(tmp_path / "x", "failed", evil)]
    drawn = [replace(c, title=evil, setting=evil) for c in charts.arrange(rows)]
    path = page.write(rows, missing, drawn, tmp_path / "out")
    text = path.read_text()
    assert path.stat().st_size < 5_000_000
    assert evil not in text
    head = text.split('<script id="plotly"')[0]
    assert "http:" not in head and "https:" not in head and "src=" not in head
    link = rows[0].runs[0].path
    assert f"{link.parent.name}/{link.name}/records.jsonl" in text


def test_without_matplotlib_there_are_table_and_page(sweep: Path, tmp_path: Path) -> None:
    """matplotlib is the extra `figures`. Fails if it were imported before it is needed, or its lack were an error."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; from scaling_exps import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    done = forked.run(["-c", code, "report", str(sweep), "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "equivalent" in done.stdout and "pip install 'scalerun[figures]'" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_the_dashboard_writes_its_specification_offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panels for loss by batch at equal samples, final metric and gap against batch, throughput, noise. Fails if a
    panel went missing or plotted over steps, at which runs of different batch sizes cannot be compared."""
    monkeypatch.chdir(tmp_path)
    specs = fabricate(tmp_path / "runs", DEMO)
    noise(tmp_path / "runs" / specs[0].run_id, 9, 2.0, 0.1)
    assert cli.main(["dashboard", "--offline", "--project", "p", "--entity", "e"]) == 0
    said = capsys.readouterr().out
    assert "specification: report/wandb.json" in said and "wandb login" in said
    specification = json.loads((tmp_path / "report" / "wandb.json").read_text())
    view = specification["workspace"]
    assert (view["entity"], view["project"]) == ("e", "p")
    sections = {s["name"]: s["panels"] for s in view["spec"]["section"]["panelBankConfig"]["sections"]}
    lines = [p["config"] for name in ("Batch sizes at equal samples", "Rules at equal samples") for p in sections[name]]
    assert lines and all(c["xAxis"] == "samples" for c in lines)
    assert {c["metrics"][0] for c in lines} == {"train/loss", "eval/accuracy"}
    finals = [p["config"] for p in sections["Final metrics against batch"]]
    assert {c["xAxis"] for c in finals} == {"config:batch.value"}
    assert {c["yAxis"] for c in finals} >= {"summary:final/test_accuracy", "summary:final/train_loss"}
    assert {"Gap to the base run of the same seed", "Throughput", "Noise"} <= set(sections)
    text = json.dumps(specification["report"])
    assert "Is the scaled run the base run?" in text and "batch 64" in text and "equivalent" in text


@pytest.mark.parametrize("words", [["report"], ["dashboard", "--offline"]])
def test_a_folder_that_cannot_be_written_is_refused(words: list[str], sweep: Path, tmp_path: Path) -> None:
    """`/proc` takes no folder from anybody, root included."""
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/in/it", "/proc/report"):
        done = scalerun(*words, str(sweep), "--out", out, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"scalerun: cannot write to the folder {out}: ") and done.stderr.count("\n") == 1
        assert (tmp_path / "file").read_text() == "mine"


def test_report_needs_no_torch() -> None:
    code = "import sys; from scaling_exps.report import dashboard, figures, page; from scaling_exps import records; "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, check=True)
