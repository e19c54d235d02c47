"""margin=auto: from the base runs' spread, before anything else starts; never from the gaps."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from bench.fabricate import fabricate
from scaling_exps import cli, config, launch, plan
from scaling_exps.plan.margin import smallest
from scaling_exps.records import RunDir

SWEEP = ["batch=[4,16]", "seed=[0,1,2,3,4]", "rule=[sqrt,none]", "logger=none"]


def specs(*words: str) -> list[plan.RunSpec]:
    return plan.plan(config.compose([*SWEEP, "margin=auto", *words]))


def test_the_margins_are_the_formula_rounded_up(tmp_path: Path) -> None:
    """Fails if the gaps of scaled runs played a part (they are far away and finished, too), if the spread were of pairs
    of one seed, or if a margin were rounded down or below one example of the test set."""
    fabricate(tmp_path, batches=(4,), seeds=range(5))
    gaps = fabricate(tmp_path, batches=(64,), seeds=range(5), rules=("none",))
    assert gaps
    base = [r for d in RunDir.under(tmp_path) if d.spec().science.batch == 4 and (r := d.result())]
    proposal = launch.proposed(specs(), tmp_path)
    assert not proposal.first
    margins = {json.dumps(s.margin, sort_keys=True) for s in proposal.specs}
    assert len(margins) == 1
    margin = proposal.specs[0].margin
    assert set(margin) == {"test_accuracy", "test_loss"}
    for metric, value in margin.items():
        exact = smallest(statistics.stdev(r["metrics"][metric] for r in base), 5, 2)
        assert exact <= value < 2.5 * exact + 1e-9, metric
        assert f"{value / 10 ** math.floor(math.log10(value)):.3g}" in ("1", "2", "5"), metric
    said = "\n".join(proposal.lines)
    assert "m = s√2·(q(1 - α/K, n) + t(0.9, n - 1))/√n" in said and "needs" in said and "5 seeds decide" in said
    for d in RunDir.under(tmp_path):
        value = json.loads((d.path / "result.json").read_text())
        (d.path / "result.json").write_text(json.dumps(value | {"test_examples": 4}))
    assert launch.proposed(specs(), tmp_path).specs[0].margin["test_accuracy"] == 0.5


def test_one_proposal_a_sweep(tmp_path: Path) -> None:
    """A run that has begun carries the margin. Fails if a second launch, with more base seeds, made other margins for
    the rest of the sweep."""
    fabricate(tmp_path, batches=(4,), seeds=range(3))
    begun = launch.proposed(specs(), tmp_path).specs[-1]
    run_dir = RunDir(tmp_path / begun.run_id)
    run_dir.prepare(begun)
    with run_dir.writer(0):
        pass
    fabricate(tmp_path, batches=(4,), seeds=(3, 4, 5, 6), spread=0.1)
    again = launch.proposed(specs(), tmp_path)
    assert {json.dumps(s.margin, sort_keys=True) for s in again.specs} == {json.dumps(begun.margin, sort_keys=True)}
    assert "stay" in again.lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["batch=16"], "add its batch, batch=[4,...]"),
        (["seed=[0,1]"], "give seed=[0,1,2]"),
    ],
)
def test_refused(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(launch.LaunchError, match="margin=auto") as e:
        launch.proposed(specs(*words), tmp_path)
    assert told in str(e.value)


def test_proposed_or_given() -> None:
    with pytest.raises(config.ConfigError, match=r"margin=auto and margin.test_accuracy"):
        config.compose(["margin=auto", "margin.test_accuracy=0.01"])


def test_a_launch_trains_the_base_first_and_fixes_the_margins_before_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing on digits. Fails if a scaled run began without a margin, or if `plan` did not say what comes."""
    monkeypatch.chdir(tmp_path)
    tiny = ["model.width=4", "recipe.epochs=null", "recipe.samples=96", "measure.evaluations=1", "measure.noise=none"]
    words = ["batch=[4,16]", "seed=[0,1,2]", "margin=auto", "logger=none", *tiny]
    assert cli.main(["plan", *words]) == 0
    assert "3 base runs are trained first (batch 4)" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.index("trained first") < said.index("margin.test_accuracy=") < said.index("rule sqrt at κ = 4")
    scaled = [d.spec() for d in RunDir.under(tmp_path / "runs") if d.spec().science.batch == 16]
    assert len(scaled) == 3 and all(s.margin == scaled[0].margin and s.margin for s in scaled)
    assert scaled[0].margin["test_accuracy"] >= 1 / 360
    assert cli.main(["plan", *words]) == 0
    assert "proposed earlier" in capsys.readouterr().out
    assert cli.main(["report", "--markdown"]) == 0
    assert "accuracy and 1 more margin" in capsys.readouterr().out.splitlines()[0]
