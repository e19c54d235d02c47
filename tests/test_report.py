"""From directories to the comparison: what is paired with what, what is listed, what a machine reads. No training."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, ROOT, scalerun

from bench.fabricate import fabricate
from scaling_exps import cli, config, plan, report
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
    assert near.power == "told apart: linear_scaled, none"
    assert any("isolates the exponent" in line and "another run" in line for line in report.reading(rows))


@pytest.mark.parametrize(
    ("optimizer", "rules", "tested"),
    [
        ("sgd", ("linear", "linear_momentum", "none"), "linear"),
        ("adamw", ("adamw_sde", "sqrt", "none"), "adamw_sde"),
        ("rmsprop", ("sqrt", "sqrt_without_eps", "linear"), "sqrt"),
    ],
)
def test_only_the_optimizers_own_rule_is_not_a_control(
    optimizer: str, rules: tuple[str, ...], tested: str, tmp_path: Path
) -> None:
    fabricate(tmp_path, [*DEMO, f"optimizer={optimizer}"], batches=(4, 16), rules=rules)
    roles = {r.rule: r.role for r in rows_of(tmp_path) if r.batch == 16}
    assert roles == {r: "rule" if r == tested else "control" for r in rules}


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
        f.write(b'\xff\xfe\n5\n"text"\n{"kind": "train"}\n{"kind": "train", "samples": 1, "loss"')
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
    text = (tmp_path / "report" / "index.html").read_text()
    for gone in ("foreign", "the loss is not finite", by[64, "sqrt", 3].name, "3 record(s) could not be read"):
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
        (["runs", "--json", "--csv"], "choose one"),
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
    with pytest.raises(plan.PlanError, match="margin"):
        plan.plan(config.compose(["margin.train_loss=0"]))
    with pytest.raises(config.ConfigError, match="train_loss"):
        config.compose(["margin.trainloss=0.1"])


def test_runs_that_disagree_on_the_margin_get_the_smallest(tmp_path: Path) -> None:
    specs = fabricate(tmp_path, DEMO, batches=(4, 16))
    one = next(s for s in specs if s.science.batch == 16 and s.arms[0].rule == "sqrt")
    edit(tmp_path / one.run_id / "run.json", lambda r: r["margin"].update(train_loss=1e-4))
    got = row(rows_of(tmp_path), "sqrt", 16)
    assert got.gaps["train_loss"].margin == 1e-4 and got.verdict != "equivalent"
    assert any("different margins" in x for x in got.remarks)


def test_machines_can_read_it(sweep: Path) -> None:
    rows = rows_of(sweep)
    table = json.loads(tables.as_json(rows, []))
    one = next(r for r in table["rows"] if (r["rule"], r["batch"]) == ("none", 64))
    assert one["verdict"] == "different" and one["gaps"]["train_loss"]["n"] == 3
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(rows, []))))
    got = next(x for x in lines if (x["rule"], x["batch"], x["metric"]) == ("none", "64", "train_loss"))
    assert float(got["difference"]) == one["gaps"]["train_loss"]["difference"]
    latex = tables.as_latex(rows, [])
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 1
    assert "linear\\_scaled" in latex and "against the base run: equivalent" in latex
    columns = latex.split("\\begin{tabular}{")[1].split("}")[0]
    body = [x for x in latex.splitlines() if x.endswith("\\\\")]
    assert {x.count("&") + 1 for x in body} == {len(columns)}


def test_every_chart_has_its_arms_and_every_figure_its_file(sweep: Path, tmp_path: Path) -> None:
    """Fails if an arm were missing from a chart of its batch, or a group of charts drew no file."""
    rows = rows_of(sweep)
    made = charts.charts(rows)
    arms = {r.rule for r in rows}
    for chart in made:
        names = {t.arm for t in chart.traces}
        if chart.group in ("curves", "final", "hyper", "cost"):
            assert names == arms, chart.title
        elif chart.group == "gap":
            assert names == arms - {"base"}
        assert all(len(t.x) == len(t.y) for t in chart.traces)
    assert {c.group for c in made} == {"curves", "final", "gap", "hyper", "cost", "paper"}
    files = figures.draw([c for c in made if c.group in ("gap", "cost")], tmp_path, ("png", "pdf"))
    assert [f.name for f in files] == ["gap.png", "gap.pdf", "cost.png", "cost.pdf"]
    assert all(f.read_bytes()[:4] in (b"\x89PNG", b"%PDF") for f in files)


def test_noise_and_svag_have_their_charts(tmp_path: Path) -> None:
    """Noise records become tr Σ / B, signal and κ r = B |g|^2 / tr Σ; SVAG runs overlay the base on t."""
    specs = fabricate(tmp_path, DEMO, batches=(4, 16), rules=("sqrt",))
    fabricate(tmp_path, [*DEMO, "svag=2"], batches=(4,), rules=("sqrt",))
    for spec in specs:
        with open(tmp_path / spec.run_id / "records.jsonl", "a") as f:
            f.write(
                json.dumps({"kind": "noise", "step": 1, "samples": 160, "t": 1e-4, "trace": 8.0, "gradient_sq": 0.5})
                + "\n"
            )
    made = charts.charts(rows_of(tmp_path))
    ratio = next(c for c in made if c.group == "noise" and "κ r" in c.title)
    assert {t.arm: t.y for t in ratio.traces} == {"batch 4": [0.25], "batch 16": [1.0]}
    overlay = next(c for c in made if c.group == "svag")
    assert {t.arm for t in overlay.traces} == {"base", "SVAG ℓ=2"}


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
    assert report.main([root], out, watch=3) == 0
    assert slept == [(3, True), (3, True)]
    assert 'http-equiv="refresh"' not in (out / "index.html").read_text()
    assert "is interrupted: 100% of its steps" in capsys.readouterr().err


def test_the_page_is_one_small_file_without_network(sweep: Path, tmp_path: Path) -> None:
    """Fails if the page linked a script or a font, grew over 5 MB, or let a name from a run break out of the HTML."""
    rows = rows_of(sweep)
    evil = "</script><script>alert(1)</script>"
    missing = [report.Missing(tmp_path / "x", "failed", evil)]
    made = [replace(c, title=evil, setting=evil) for c in charts.charts(rows)]
    path = page.write(rows, missing, made, tmp_path / "out")
    text = path.read_text()
    assert path.stat().st_size < 5_000_000
    assert evil not in text
    head = text.split('<script id="plotly"')[0]
    assert "http:" not in head and "https:" not in head and "src=" not in head
    link = rows[0].runs[0].path
    assert f"{link.parent.name}/{link.name}/records.jsonl" in text


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
