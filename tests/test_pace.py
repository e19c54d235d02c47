"""Time against batch, measured: what is read out of the records, said, drawn, and left out."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.fabricate import fabricate
from scaling_exps import cli, report
from scaling_exps.noise import validity
from scaling_exps.records import RunDir
from scaling_exps.report import charts, pace
from scaling_exps.report.verdict import compare

DEMO = ["experiment=demo"]


def rows_of(root: Path) -> list[report.Row]:
    return compare(report.collect([root]))


def slowed(root: Path, batch: int, factor: float) -> None:
    """Make the arm of this batch need so many times the samples: its records, read at another clock."""
    for run_dir in RunDir.under(root):
        if run_dir.spec().science.batch != batch:
            continue
        curve = [r for r in run_dir.records().rows if r["kind"] == "train"]
        x, y = np.array([r["samples"] for r in curve]), np.array([r["loss"] for r in curve])
        later = np.interp(x / factor, x, y)
        with run_dir.writer(0) as writer:
            for row, loss in zip(curve, later, strict=True):
                writer.write({**row, "loss": float(loss)})


def test_samples_steps_and_time_to_the_same_loss(tmp_path: Path) -> None:
    """The same curve at 16; at 64 one that takes 1.5 times the samples, 1.5^(1/2) a doubling, which is below 4/3; at
    256 twice as many as at 64. Fails if runs were compared across seeds (their losses differ by 0.05, 5% of the
    samples), or if the loss were not one that all reached."""
    fabricate(tmp_path, DEMO, batches=(4, 16, 64, 256), rules=("sqrt",), spread=0.0, records=200)
    slowed(tmp_path, 64, 1.5)
    slowed(tmp_path, 256, 3.0)
    rows = rows_of(tmp_path)
    told = pace.of(rows)
    assert isinstance(told, pace.Pace)
    assert told.loss == pytest.approx(max(r.metrics["train_loss"] for x in rows for r in x.runs), rel=0.02)
    near, middle, far = told.points
    assert (near.rule, near.batch, near.n) == ("sqrt", 16, 3)
    assert near.samples == pytest.approx((1.0, 0.0), abs=0.02) and near.steps[0] == pytest.approx(1 / 4, rel=0.02)
    assert middle.samples[0] == pytest.approx(1.5, rel=0.05) and middle.samples[1] < 0.05
    assert middle.steps[0] == pytest.approx(1.5 / 16, rel=0.05)
    assert middle.time[0] == pytest.approx(middle.samples[0] / 16, rel=1e-6)  # a sample takes 1/κ of the time there
    assert far.samples[0] == pytest.approx(3.0, rel=0.05)
    text = pace.paragraph(rows)
    assert "16 takes 0.25" in text and "Measured: from batch 64 to 256 a doubling no longer pays (+4" in text
    assert "no noise record" in text and "McCandlish" not in text
    names = {t.arm for c in charts.arrange(rows) if c.group == "pace" for t in c.traces}
    assert names == {"sqrt", charts.EVEN}


def test_what_the_noise_predicts_stands_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the terminal, the page, JSON and the figures; the curve is McCandlish's at the pooled B_noise."""
    monkeypatch.chdir(tmp_path)
    fabricate(tmp_path / "runs", DEMO, b_noise=400)
    assert cli.main(["report"]) == 0
    text = next(
        x for x in capsys.readouterr().out.splitlines() if x.startswith("time against batch: to a training loss")
    )
    assert "B_noise 398 [" in text and "From batch 199 on the next doubling no longer pays" in text
    assert "predicted to hold up to batch 32" in text and "sqrt was shown to hold up to batch 64" in text
    assert text in html.unescape((tmp_path / "report" / "index.html").read_text())
    assert (tmp_path / "report" / "pace.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["time_against_batch"]
    assert one["text"] == text and (one["predicted_to_hold"], one["measured_to_hold"]) == (32, {"sqrt": 64})
    assert [p["batch"] for p in one["points"]] == [16, 64] and one["doubling_pays_below"] == one["b_noise"] / 2
    steps = next(c for c in charts.arrange(rows_of(tmp_path / "runs")) if c.title.startswith("steps to"))
    lines: dict[str, Any] = {t.arm: t for t in steps.traces}
    want = [validity.steps_and_samples(b, one["b_noise"])[0] for b in (lines[charts.CURVE].x[-1], 4)]
    assert lines[charts.CURVE].y[-1] == pytest.approx(want[0] / want[1])
    at = {name: lines[name].x for name in (charts.STOP, charts.HOLDS, charts.HELD)}
    assert at == {charts.STOP: pytest.approx([199, 199], abs=1), charts.HOLDS: [32, 32], charts.HELD: [64, 64]}


@pytest.mark.parametrize(
    ("batches", "rules", "why"),
    [((4,), ("sqrt",), "(batch 4)"), ((4, 16), ("none",), "no rule under test has finished beside its base run")],
)
def test_nothing_to_tell_is_one_line_and_no_figure(
    batches: tuple[int, ...], rules: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    fabricate(tmp_path, DEMO, batches=batches, rules=rules)
    rows = rows_of(tmp_path)
    (line,) = pace.paragraphs(rows)
    assert why in line and "\n" not in line and len(line) < 120
    assert not [c for c in charts.arrange(rows) if c.group == "pace"]


def test_one_seed_has_no_spread_and_a_missing_time_is_left_out(tmp_path: Path) -> None:
    """Fails if nan were printed or drawn."""
    for spec in fabricate(tmp_path, DEMO, batches=(4, 16), seeds=(0,), rules=("sqrt",)):
        run_dir = RunDir(tmp_path / spec.run_id)
        run_dir.write_result({k: v for k, v in (run_dir.result() or {}).items() if k != "seconds"})
    rows = rows_of(tmp_path)
    text = pace.paragraph(rows)
    assert "nan" not in text and "±" not in text and "the time" not in text
    drawn = [t for c in charts.arrange(rows) if c.group == "pace" for t in c.traces]
    assert all(math.isfinite(v) for t in drawn for v in (*t.y, *(t.low or ()), *(t.high or ())))
