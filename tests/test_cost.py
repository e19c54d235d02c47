"""What a plan says of time, memory and FLOPs, where it is from, and what it refuses on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support import ENVIRONMENT, TINY, plan_json, prepare, scalerun, specs

from scaling_exps import cli, config, cost, launch, plan, train
from scaling_exps.records import RunDir
from scaling_exps.report import page
from scaling_exps.sources import DataError


def composed(*words: str) -> config.Config:
    (one,) = config.compose(list(words))
    return one


def finished(root: Path, spec: plan.RunSpec, rate: float, **result: Any) -> RunDir:
    """A folder as a finished run leaves it, as far as the plan reads it."""
    run_dir = prepare(root, spec)
    told = {"samples_per_second": rate, "peak_memory_bytes": 10**9, "device": plan.device(), "threads": 1}
    run_dir.write_result({"status": "finished", "metrics": {}, **told, **result})
    return run_dir


def of(spec: plan.RunSpec, root: Path, *words: str) -> dict[str, Any]:
    return cost.estimate([spec], config.compose([f"runs_dir={root}", *words]))[spec.run_id]


# ---- from finished runs ----


def test_a_real_run_tells_the_next_plan(tmp_path: Path) -> None:
    """Fails if what a run writes were not what the plan reads."""
    (run,) = specs("batch=16")
    run_dir = prepare(tmp_path, run)
    assert train.run(run_dir) == "finished"
    result = run_dir.result() or {}
    (other,) = specs("batch=16", "seed=5", "recipe.samples=2560")
    told = of(other, tmp_path)
    assert told["seconds"] == pytest.approx(2560 / result["samples_per_second"])
    assert told["memory_bytes"] == result["peak_memory_bytes"]
    assert run.run_id in told["time_from"] and "micro-batch 16" in told["time_from"]


def test_the_nearest_run_of_the_same_work_is_taken(tmp_path: Path) -> None:
    """Fails if another network, precision or device counted, or a farther micro-batch."""
    (far,), (near,) = specs("batch=4"), specs("batch=32")
    finished(tmp_path, far, 100.0)
    finished(tmp_path, near, 400.0)
    finished(tmp_path, specs("batch=64", "model.width=8")[0], 1e6)
    finished(tmp_path, specs("batch=64", "precision=bfloat16")[0], 1e6)
    finished(tmp_path, specs("batch=64", "seed=9")[0], 1e6, device="NVIDIA H100 80GB HBM3")
    (target,) = specs("batch=64")
    told = of(target, tmp_path)
    assert near.run_id in told["time_from"] and told["seconds"] == pytest.approx(256 / 400)
    for words in (["cost.device=h100"], ["launch=slurm", "launch.gpus=true"]):
        gpu = of(target, tmp_path, *words)
        assert "NVIDIA H100" in gpu["time_from"], words
    assert "NVIDIA H100" in gpu["time_from"] and gpu["seconds"] == pytest.approx(256 / 1e6)


def test_a_run_of_another_micro_batch_tells_no_gain(tmp_path: Path) -> None:
    """Fails if its speed were taken for this micro-batch's: the gain would always be 1."""
    words = [*TINY, "batch=[4,32]", f"runs_dir={tmp_path}"]
    both = plan.plan(config.compose(words))
    finished(tmp_path, both[0], 100.0)
    base, large = cost.estimate(both, config.compose(words)).values()
    assert base["gain"] == 1 and large["gain"] is None and large["seconds"] and cost.OTHER in large["time_from"]


def test_the_gain_is_the_time_at_the_base_over_the_time_here(tmp_path: Path) -> None:
    words = [*TINY, "batch=[4,32]", f"runs_dir={tmp_path}", "cost.price=3"]
    both = plan.plan(config.compose(words))
    finished(tmp_path, both[0], 100.0)
    finished(tmp_path, both[1], 400.0)
    costs = cost.estimate(both, config.compose(words))
    assert [costs[s.run_id]["gain"] for s in both] == pytest.approx([1, 4])
    assert costs[both[1].run_id]["price"] == pytest.approx(3 * 256 / 400 / 3600)
    single = config.compose([*TINY, "batch=32", f"runs_dir={tmp_path}"])
    (alone,) = plan.plan(single)
    assert cost.estimate([alone], single)[alone.run_id]["gain"] == pytest.approx(4)


@pytest.mark.parametrize(
    "result",
    [{"samples_per_second": 0.0}, {"samples_per_second": "fast"}, {"peak_memory_bytes": None}, {"device": None}],
)
def test_a_result_that_tells_nothing_is_passed_over(result: dict[str, Any], tmp_path: Path) -> None:
    (spec,) = specs("batch=16")
    finished(tmp_path, spec, **{"rate": 1.0} | result)
    assert of(spec, tmp_path)["seconds"] is None


# ---- FLOPs ----


@pytest.mark.parametrize("model", ["gpt", "roberta"])
def test_a_language_models_flops_are_those_that_torch_counts(model: str) -> None:
    """Within 5%: torch counts every matrix product, and no attention mask. Fails for a forgotten layer."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from scaling_exps.train.trainer import build_net, mean_loss

    (spec,) = plan.plan([composed(f"model={model}")])
    net, tokens = build_net(spec), torch.zeros(2, spec.science.dataset.context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        mean_loss(net(tokens), tokens).backward()
    assert cost.flops(spec) == pytest.approx(counter.get_total_flops() / 2, rel=0.05)


def test_flops_and_a_share_of_a_cards_peak(tmp_path: Path) -> None:
    (spec,) = plan.plan([composed("model=gpt")])
    words = ["model=gpt", "cost.device=h100", "cost.share=0.5"]
    told = of(spec, tmp_path, *words)
    assert told["seconds"] == pytest.approx(told["flops"] / (0.5 * 67e12))
    assert "50% of h100's 67 TFLOP/s (float32)" in told["time_from"] and told["memory_bytes"] is None
    (half,) = plan.plan([composed("model=gpt", "precision=bfloat16")])
    assert of(half, tmp_path, *words)["seconds"] == pytest.approx(told["flops"] / (0.5 * 989e12))
    with pytest.raises(cost.CostError, match="t4 has no bfloat16"):
        of(half, tmp_path, "cost.device=t4")


@pytest.mark.parametrize(
    ("card", "device", "same"),
    [
        ("l4", "NVIDIA L4", True), ("l4", "NVIDIA L40S", False), ("h100", "NVIDIA H100 80GB HBM3", True),
        ("a100", "NVIDIA A100-SXM4-40GB", True), ("rtx4090", "NVIDIA GeForce RTX 4090", True), ("t4", "x86_64", False),
    ],
)  # fmt: skip
def test_a_card_is_found_by_its_name(card: str, device: str, same: bool) -> None:
    assert cost._is_card(card, device) is same


def test_every_card_of_the_schema_has_its_peak() -> None:
    (allowed,) = [k.allowed for k in config.keys() if k.name == "cost.device"]  # noqa: SIM118
    assert all(card in allowed for card in cost.CARDS) and allowed.count(",") == len(cost.CARDS)


# ---- the probe ----


@pytest.mark.slow
def test_a_probe_measures_in_a_process_of_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    rows = plan_json(*TINY, "batch=[4,256]", "cost=probe", cwd=tmp_path)
    for row in rows:
        told = row["cost"]
        assert 0.01 < told["seconds"] < 60 and 10**8 < told["memory_bytes"] < 10**10 and told["flops"] > 10**6
        assert "a probe on this machine" in told["time_from"] and told["memory_from"] == told["time_from"]
        assert told["flops_from"] == "counted by torch in the probe"
    small, large = (row["cost"] for row in rows)
    assert small["flops"] == pytest.approx(large["flops"], rel=0.01)  # of equal samples, to whole steps
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=timm", "model.name=resnet18x", "dataset=digits", "recipe=digits-small"], "resnet18x"),
        (["model=custom", "model.factory=own:broken", "dataset=digits", "recipe=digits-small"], "no such thing"),
        (["recipe.start_from=no.pt"], "holds no weights that can be read"),
    ],
)
def test_a_probe_refuses_what_the_launch_refuses_in_the_same_words(words: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def broken(**options):\n    raise RuntimeError('no such thing')\n")
    (tmp_path / "no.pt").touch()
    planned, launched = scalerun("plan", *words, "cost=probe", cwd=tmp_path), scalerun(*words, cwd=tmp_path)
    assert planned.returncode == launched.returncode == 2
    assert says in planned.stderr and launched.stderr.splitlines()[-1] in planned.stderr
    unchecked = scalerun("plan", *words, cwd=tmp_path)
    assert unchecked.returncode == 0 and "unchecked: " in unchecked.stdout


# ---- launch.compile=auto ----


def probed(spec: plan.RunSpec, seconds: float, start: float, compile_it: bool) -> None:
    """As if a probe had found that the run takes so long."""
    micro = seconds / spec.science.steps / spec.placement.accumulation
    found = {"micro_seconds": micro, "update_seconds": 0.0, "start_seconds": start, "threads": 1}
    cost._PROBED[cost._step(cost._placed(spec, compile_it))] = found


@pytest.mark.parametrize(
    ("eager", "compiled", "start", "on", "says"),
    [
        (100, 60, 30, True, "1.67 min without it, 1 min with it and 30 s to start, so it pays from 960 samples on"),
        (100, 60, 36, False, "so it pays from 1,152 samples on"),  # 4% of its time
        (100, 120, 0.1, False, "1.67 min without it, 2 min with it and 0.1 s to start (probes"),
        (14, 1, 0.1, False, "without it the run takes 14 s, and to start alone takes longer"),
    ],
)
def test_a_run_is_compiled_where_it_then_ends_sooner(
    eager: float, compiled: float, start: float, on: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_PROBED", {})
    words = [*TINY, "launch.compile=auto", "batch=16", "seed=[0,1]", "recipe.samples=1280", f"runs_dir={tmp_path}"]
    runs, (one, *_) = specs(*words), config.compose(words)
    probed(runs[0], eager, 1.0, False)
    probed(runs[0], compiled, start, True)
    decided, (line,) = cost.compiled(runs, one)
    assert [s.placement.compile for s in decided] == [on, on] and says in line
    assert f"resnet8, batch 16: {'on' if on else 'off'}: " in line
    assert [s.run_id for s in decided] == [s.run_id for s in runs]  # no other runs


def test_a_run_that_has_begun_settles_it_for_those_that_are_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More seeds, more batches. Fails if a later probe split the seeds of one arm."""
    monkeypatch.setattr(cost, "_PROBED", {})
    words = [*TINY, "launch.compile=auto", "batch=[16,32]", "seed=[0,1]", f"runs_dir={tmp_path}"]
    runs, (one, *_) = specs(*words), config.compose(words)
    begun = next(s for s in runs if s.science.batch == 16)
    finished(tmp_path, cost._placed(begun, True), 100.0)
    for spec in runs:
        probed(spec, 100.0, 1.0, False)
        probed(spec, 200.0, 1.0, True)
    decided, lines = cost.compiled(runs, one)
    assert {s.science.batch: s.placement.compile for s in decided} == {16: True, 32: False}
    assert len(lines) == 2 and "batch 16: on, as for those that have begun" in lines[0]
    assert cost.compiled(runs, composed(f"runs_dir={tmp_path}", "launch.compile=true")) == (runs, [])


@pytest.mark.slow
def test_both_ways_are_probed_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real probes; at that length either may win. Fails if the compiled one did not compile: it starts slowly."""
    words = [*TINY, "batch=16", "launch.compile=auto", "recipe.samples=10000000", f"runs_dir={tmp_path / 'runs'}"]
    runs, (one,) = specs(*words), config.compose(words)
    (spec,), (line,) = cost.compiled(runs, one)
    eager, compiled = (cost._probed(cost._placed(spec, c), one) for c in (False, True))
    assert compiled["start_seconds"] > 2 * eager["start_seconds"] and "to start" in line
    shorter = cost._seconds(spec, compiled) + compiled["start_seconds"] < 0.95 * cost._seconds(spec, eager)
    assert spec.placement.compile is shorter and not list(tmp_path.iterdir())


def test_what_is_short_is_not_compiled_and_a_cluster_is_not_probed(tmp_path: Path) -> None:
    (row,) = plan_json(*TINY, "batch=16", "launch.compile=auto", cwd=tmp_path)
    assert row["placement"]["compile"] is False
    refused = scalerun("plan", *TINY, "batch=16", "launch=slurm", "launch.compile=auto", cwd=tmp_path)
    assert refused.returncode == 2 and "launch.compile" in refused.stderr and "true or false" in refused.stderr


def test_what_a_launch_refuses_is_not_probed_first(tmp_path: Path) -> None:
    """Fails if a minute of probes came before the word that nothing can be written there."""
    (tmp_path / "file").touch()
    refused = scalerun(*TINY, "batch=16", "launch.compile=auto", "runs_dir=file/runs", cwd=tmp_path)
    assert refused.returncode == 2 and "is no folder to write in" in refused.stderr and "probe" not in refused.stderr


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    (spec,) = specs("batch=16")
    finished(tmp_path / "runs", spec, 100.0)
    code = "import sys; from scaling_exps import cli; assert cli.main(sys.argv[1:]) == 0; print('torch' in sys.modules)"
    words = ["plan", *TINY, "batch=[4,16]", "cost.device=h100"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


# ---- what a launch refuses ----


def refusal(*words: str) -> str:
    with pytest.raises((launch.LaunchError, plan.PlanError, DataError)) as e:
        launch.check(plan.plan(config.compose(list(words))), composed(*words))
    return str(e.value)


def test_a_plan_refuses_paths_and_factories(tmp_path: Path) -> None:
    assert "dataset.path='/nowhere' does not exist" in refusal("model=resnet50", "dataset.path=/nowhere")
    (tmp_path / "file").touch()
    assert "choose another with runs_dir=" in refusal(f"runs_dir={tmp_path}/file")
    assert "no module 'nopackage'" in refusal("model=custom", "model.factory=nopackage.net:make", "dataset=digits")
    (spec,) = specs("batch=16")
    (tmp_path / spec.run_id).mkdir()
    (tmp_path / spec.run_id / "run.json").write_text("{")
    assert "no readable run.json" in refusal(*TINY, "batch=16", f"runs_dir={tmp_path}")


def test_data_that_is_not_here_yet_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may be made where the data is not; its launch there is refused."""
    monkeypatch.setenv("SCALERUN_DATA", str(tmp_path))
    (said,) = launch.check(plan.plan(config.compose(["model=resnet50"])), composed("model=resnet50"))
    assert said.startswith("not yet: cifar10 is not on this machine")
    assert launch.check(plan.plan(config.compose(["model=resnet50", "launch=slurm"])), composed("launch=slurm")) == []


# ---- the base runs of a sweep ----


def added(*words: str) -> list[tuple[int, int, int]]:
    configs = config.compose(list(words))
    bases = plan.lacking(configs, plan.plan(configs))
    return [(s.science.batch, s.science.seed, len(s.arms)) for s in bases]


def test_a_sweep_gets_the_base_runs_that_it_is_compared_with() -> None:
    assert added("batch=[32,256]", "seed=[0,1]") == [(4, 0, 1), (4, 1, 1)]
    assert added("batch=64", "rule=[sqrt,none]") == [(4, 0, 2)]
    assert added("batch=[4,64]", "duration=2") == [(4, 0, 1)]
    assert added("svag=[2,4]", "rule=none") == [(4, 0, 1)]
    assert added("-m", "batch=32,256") == [(4, 0, 1)]
    assert added("batch=[32,256]", "base=none") == []
    assert added("batch=[4,32,256]") == []
    assert added("batch=64") == added("batch=64", "seed=[0,1]") == []


def test_a_base_run_that_cannot_be_is_refused_in_a_sweep_and_no_matter_to_one_run(tmp_path: Path) -> None:
    words = ["measure.noise=full", "measure.noise_unit=8"]  # the base batch is 4
    with pytest.raises(plan.PlanError, match="base=none leaves it out"):
        added("batch=[16,32]", *words)
    assert len(plan_json("batch=16", *words, cwd=tmp_path)) == 1


def test_a_base_batch_with_fewer_micro_batches_than_devices_runs_on_fewer() -> None:
    """Fails if `launch.devices`, meant for the large batch, refused the base run."""
    words = ["batch=[256,384]", "recipe.micro_batch=32", "launch=slurm", "launch.devices=4"]
    configs = config.compose(words)
    (base,) = plan.lacking(configs, plan.plan(configs))
    assert base.placement.world_size == 1


@pytest.mark.slow
def test_what_is_added_is_said_and_run(tmp_path: Path) -> None:
    words = [*TINY, "batch=[16,32]", "recipe.samples=64", "measure.noise=none"]
    done = scalerun(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "base=auto adds 1 base run(s) at batch 4" in done.stdout
    assert sorted(d.spec().science.batch for d in RunDir.under(tmp_path / "runs")) == [4, 16, 32]
    assert "base run not found" not in scalerun("report", cwd=tmp_path).stdout


# ---- the table ----


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_table_is_no_wider_than_its_window_and_cuts_no_word(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    words = ["model=gpt", "batch=[2,16,64]", "rule=[sqrt,none,linear]", "cost.device=h100", "cost.price=2.5"]
    assert cli.main(["plan", *words]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= width
    rows = [line.split() for line in narrow.splitlines() if line.split()[:2] in (["16", "sqrt"], ["64", "linear"])]
    assert len(rows) == 2 and [row[2] for row in rows] == ["8", "32"]
    assert ("left out at" in narrow) == (width < 200)
    monkeypatch.setenv("COLUMNS", "500")
    assert cli.main(["plan", *words]) == 0
    wide = set(capsys.readouterr().out.split())
    cut = set(narrow.split()) - wide - set(f"left out at {width} columns: a wider window or --json shows them".split())
    assert {w.rstrip(",;") for w in cut} <= {w.rstrip(",;") for w in wide} | {"device-hours", "warm-up", "columns:"}


def test_notes_of_all_rows_are_printed_once_and_blocks_only_with_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", "batch=[16,32,64]", "seed=[0,1]"]) == 0
    short = capsys.readouterr().out
    assert short.count("rule sqrt leaves alone") == 1 and "runs: " not in short and "8 run(s)" in short
    assert "cost=probe" in short and "–" in short
    assert cli.main(["plan", "batch=[16,32,64]", "seed=[0,1]", "--full"]) == 0
    assert capsys.readouterr().out.count("    runs: ") == 4


def test_the_formulas_are_those_of_the_beta_map(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if β^κ ran and 1 - κ·(1 - β) were shown."""
    power = plan.plan(config.compose(["batch=16", "beta_map=power"]))
    plan.print_plan(power, full=True)
    shown = capsys.readouterr().out
    assert "betas β^κ" in shown and "1 - κ·(1 - β);" not in shown
    row: Any = SimpleNamespace(runs=[SimpleNamespace(spec=power[0])], arm=power[0].arms[0], role="rule")
    assert {name: formula for name, _, _, formula in page._recipe(row)[1]}["betas"] == "β^κ"
    raw = power[0].to_json()
    assert raw["arms"][0]["beta_map"] == "power" and plan.RunSpec.from_json(raw) == power[0]
    linear = plan.plan(config.compose(["batch=16"]))[0]
    assert "beta_map" not in linear.to_json()["arms"][0]  # as every run.json before it
    assert plan.RunSpec.from_json(json.loads(json.dumps(linear.to_json()))) == linear
    assert msgspec.structs.replace(linear.arms[0]).beta_map == "linear"
