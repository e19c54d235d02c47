"""Time against batch, from noise records: numbers, words, figure."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from support import prepare, specs

from scaling_exps import cli, plan
from scaling_exps.noise import tradeoff, validity


def record(samples: int, b_noise: float, error: float = 0.1) -> dict[str, Any]:
    """A full record at which tr Σ = 100 and |∇f|² = 100/B_noise, known to so large a share of it."""
    square = 100 / b_noise
    half = error * square
    return {"kind": "noise", "method": "full", "step": samples // 4, "samples": samples, "batch": 4, "t": 0.0,
            "enough": error < 1, "trace": 100.0, "gradient_sq": square, "gradient_sq_low": square - half,
            "gradient_sq_high": square + half, "kappa_r": 4 / b_noise, "kappa_r_high": 4 / b_noise * (1 + error),
            "b_noise": b_noise, "r": 4 / b_noise}  # fmt: skip


def based(root: Path, rows: list[dict[str, Any]], *words: str) -> list[plan.RunSpec]:
    """A plan whose base run has these records."""
    runs = specs("batch=[4,16,64]", "recipe.batch=4", "recipe.samples=1024", *words)
    run_dir = prepare(root, runs[0])
    with run_dir.writer() as writer:
        for row in rows:
            writer.write(row)
    return runs


def test_what_a_doubling_saves_and_adds_is_even_at_half_the_critical_batch() -> None:
    b = 100.0
    (s1, e1), (s2, e2) = (validity.steps_and_samples(x, b) for x in (b / 2, b))
    assert 1 - s2 / s1 == pytest.approx(e2 / e1 - 1) == pytest.approx(1 / 3)


def test_the_paragraph_says_what_follows(tmp_path: Path) -> None:
    runs = based(tmp_path, [record(n, 400.0) for n in (256, 512, 768, 1024)])
    (t,) = tradeoff.of(runs, tmp_path, None)
    text = tradeoff.paragraph(t, [s.science.batch for s in runs])
    assert t.b_noise == pytest.approx(400) and "B_noise 400 [" in text and str(tmp_path) in text
    assert f"16 takes {(1 + 400 / 16) / 101:.2g} × the steps, {1.04 / 1.01:.2f} × the samples" in text
    assert "From batch 200 on the next doubling no longer pays" in text
    within = [b for b in (8, 16, 32, 64) if abs(1 - validity.deviation(0.01, b / 4)) < 0.05]
    assert t.largest == max(within) and f"up to batch {t.largest}," in text


def test_where_noise_dominates_half_of_training_the_rule_is_not_said_to_hold(tmp_path: Path) -> None:
    """A mean change of 1% hides that κr > 0.1 for half of the samples, as `validity.sentence` would not."""
    rows = [record(102 * (i + 1), 73.0 if i < 5 else 1e6, error=0.01) for i in range(10)]
    (t,) = tradeoff.of(based(tmp_path, rows), tmp_path, None)
    at_8 = validity.assess(t.rows, 8, 4)
    assert at_8 is not None and max(1 - at_8.low, at_8.high - 1) < 0.05 and at_8.dominated < 0.6
    assert t.largest == 4 and "At no larger batch" in tradeoff.paragraph(t, [4, 8])


def test_bounds_alone_are_told_as_such(tmp_path: Path) -> None:
    """Fails if an estimate were given, or drawn, where the records only bound it."""
    runs = based(tmp_path, [record(512, 100.0, error=2.0), record(1024, 100.0, error=2.0)])
    (t,) = tradeoff.of(runs, tmp_path, None)
    assert t.b_noise is None
    text = tradeoff.paragraph(t, [4, 16])
    assert "B_noise above " in text and "too uncertain for steps and samples" in text and "takes" not in text
    with pytest.raises(tradeoff.TradeoffError, match="no base run of this plan"):
        tradeoff.draw([t], [4], tmp_path / "a.png")


def test_a_base_run_without_records_has_no_paragraph_and_no_figure(tmp_path: Path) -> None:
    runs = based(tmp_path, [])
    assert tradeoff.of(runs, tmp_path, None) == []
    with pytest.raises(tradeoff.TradeoffError, match="no base run of this plan has noise records"):
        tradeoff.draw([], [4], tmp_path / "a.png")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_plan_without_records_is_printed_and_says_why_it_has_no_figure(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the table were lost with the figure. It is 0: nothing that was typed is wrong."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "batch=[4,16]", "--figure", "a.png", *words]) == 0
    out, err = capsys.readouterr()
    assert ('"run_id"' if words else "base batch 4") in out and not (tmp_path / "a.png").exists()
    assert err.startswith("scalerun: no figure: no base run of this plan has noise records") and err.count("\n") == 1


def test_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = based(tmp_path, [record(n, 400.0) for n in (256, 512, 768, 1024)])
    trades = tradeoff.of(runs, tmp_path, None)
    tradeoff.draw(trades, [4, 16, 64], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(tradeoff.TradeoffError, match="--figure"):
        tradeoff.draw(trades, [4], tmp_path / "nowhere" / "a.png")
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(tradeoff.TradeoffError, match=r"--figure needs matplotlib: pip install 'scalerun\[figures\]'"):
        tradeoff.draw(trades, [4], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("words", "predicted"),
    [
        (["rule=sqrt"], True),
        (["rule=none"], False),
        (["optimizer=sgd", "recipe.momentum=0", "rule=linear"], False),
        (["optimizer=invariant_adam", "rule=invariant"], False),
    ],
)
def test_a_prediction_is_made_for_the_square_root_rule_alone(words: list[str], predicted: bool, tmp_path: Path) -> None:
    """Fails if SGD, an Adam that needs no dominating noise, or a control were given the square-root rule's number."""
    runs = based(tmp_path, [record(n, 400.0) for n in (256, 512, 768, 1024)], *words)
    described = validity.describe(runs, tmp_path, None)
    assert "base batch" in described[runs[0].run_id]["text"]
    for spec in runs[1:]:
        assert ("deviation" in described[spec.run_id]) == predicted
        assert ("no prediction" in described[spec.run_id]["text"]) != predicted
    (t,) = tradeoff.of(runs, tmp_path, None)
    adaptive = runs[0].science.family == "adaptive"
    assert ("predicted to hold" in tradeoff.paragraph(t, [4, 16])) == adaptive
    tradeoff.draw([t], [4, 16], tmp_path / "figure.png")
