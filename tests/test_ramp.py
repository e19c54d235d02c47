"""A batch that changes within the run: its stages, the switch, exact resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from support import prepare, rows, same_run, specs, take_steps, weights, work

from bench.fabricate import fabricate
from scaling_exps import config, plan, report, rules, scale
from scaling_exps.noise import ramp as noise_ramp
from scaling_exps.noise import validity
from scaling_exps.plan import PlanError
from scaling_exps.train import checkpoint, loop
from scaling_exps.train.trainer import Trainer, mean_loss

UP = "ramp=[[0,4],[0.25,16],[0.5,32]]"  # of 256 samples: 16 steps of 4, 4 of 16, 4 of 32


def ramp(*words: str) -> plan.RunSpec:
    (spec,) = specs(*words)
    return spec


def test_a_constant_ramp_is_the_plain_run() -> None:
    for constant in ("ramp=[[0,16]]", "ramp=[[0,16],[0.5,16]]", "ramp={samples:[[0,16]]}"):
        assert ramp(constant).to_json() == ramp("batch=16").to_json()
    assert ramp(UP).run_id != ramp("batch=4").run_id


def test_the_stages_of_a_run() -> None:
    """Hyperparameters by the rule at κ = 1, 4, 8; samples, schedule and marks by the sample clock."""
    s = ramp(UP).science
    assert [(x.step, x.batch, x.micro_batch) for x in s.stages] == [(0, 4, 4), (16, 16, 16), (20, 32, 32)]
    assert s.steps == 24 and [s.samples(k) for k in (0, 16, 20, 24)] == [0, 64, 128, 256]
    base = rules.Hyper(1e-3, (0.99, 0.999), 1e-8, 0.0)
    for stage in s.stages:
        assert stage.hyper == rules.RULES["sqrt"].scale(base, rules.Move(4, stage.batch))
    assert s.clock(18.5) == 64 + 2.5 * 16 and s.steps_to(64 + 2.5 * 16) == 18.5
    assert ramp(UP).arms[0].kappa == 8 and ramp("ramp=[[0,4],[0.5,2]]").arms[0].kappa == 0.5
    uneven = ramp("ramp=[[0,4],[0.3,16]]").science  # 0.3 · 256 = 76.8 samples: 19 steps of 4, then 180/16 = 11
    assert [x.step for x in uneven.stages] == [0, 19] and uneven.steps == 19 + 11


@pytest.mark.parametrize(
    ("word", "stages"),
    [
        ("ramp={samples:[[0,4],[100,8]]}", [(0, 4), (25, 8)]),
        ("ramp=[1/4,1/2,1]", [(0, 8), (11, 16), (16, 32)]),
        ("ramp=[0.5,1]", [(0, 16), (8, 32)]),
        ("ramp=[[0,16],[0.5,4]]", [(0, 16), (8, 4)]),
        ("ramp=seesaw", [(0, 4), (32, 8), (37, 16)]),  # the cosine is at 1/2 half-way, at 1/4 at 2/3: 5 steps on
    ],
)
def test_forms(word: str, stages: list[tuple[int, int]]) -> None:
    words = [word, "recipe.decay=cosine", "recipe.warmup_fraction=0", "ramp.largest=16", "base=none"]
    s = specs(*words, "batch=32")[-1].science
    assert [(x.step, x.batch) for x in s.stages] == stages


def test_tokens_count_sequences() -> None:
    words = ["model=gpt", "model.width=8", "model.layers=1", "model.heads=1", "dataset.context=8", "recipe.samples=64"]
    (spec,) = specs(*words, "ramp={tokens:[[0,2],[256,8]]}")
    assert [(x.step, x.batch, x.micro_batch) for x in spec.science.stages] == [(0, 2, 2), (16, 8, 8)]


REFUSED = {
    "ramp=[2,4]": "is no share of the largest batch",
    "ramp=[[0.1,4]]": "must start at 0",
    "ramp=[[0,4],[0.5,16],[0.25,32]]": "starts must rise",
    "ramp=[[0,4],[0.5,16],[0.5,32]]": "starts must rise",
    "ramp=[[0,4],[1.5,16]]": "the schedule ends at 256",
    "ramp=[[0,4],[10000,16]]": "ramp={samples: ...}",
    "ramp=[[0,4.5]]": "no whole number",
    "ramp=[[0,4,1,1]]": "a stage is [start, batch]",
    "ramp=[]": "a stage is [start, batch]",
    "ramp=[[0,64],[0.5,100]]": "nearest that fit: 64 and 128",
    "ramp=[[0,4],[0.5,4096]]": "The largest legal batch is",
    "ramp=[[0,4],[0.005,16]]": "no whole step",
    "ramp=[[0,4],half]": "mixed",
    "ramp=[half,1]": "no share of the largest batch",
    "ramp={tokens:[[0,4]]}": "has no tokens",
    "ramp=seesaw": "no second stage",
    "ramp=auto": "noise",
}
UNREAD = {
    "ramp=atuo": "ramp='atuo' (did you mean auto?) must be one of [[0,256],[0.1,1024]], {samples:",
    "ramp=256": "ramp=256 must be one of [[0,256]",
    "ramp=[[0,4],[nan,16]]": "must be one of",
    "ramp=[[0,4]],[[0,8]]": "ramp=[[0,4]],[[0,8]]: a list is written",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_refused(word: str) -> None:
    with pytest.raises(PlanError) as refusal:
        specs(word)
    assert REFUSED[word] in str(refusal.value), refusal.value


@pytest.mark.parametrize("word", UNREAD)
def test_what_is_no_ramp(word: str) -> None:
    """The key as it was typed, and its forms by example."""
    with pytest.raises(config.ConfigError) as refusal:
        specs(word)
    assert UNREAD[word] in str(refusal.value) and "ramp.at" not in str(refusal.value), refusal.value


def test_what_does_not_go_together() -> None:
    for words, said in (
        ((UP, "svag=2"), "SVAG is defined for one batch"),
        ((UP, "launch.devices=2", "recipe.micro_batch=4"), "stage 1 (batch 4)"),
        ((UP, "launch.devices=3", "launch.elastic=true", "recipe.micro_batch=4"), "stage 3 (batch 32): launch.devices"),
        (("ramp=[[0,4],[0.5,16]]", "recipe.stop_after=100"), "the run ends at 100"),
    ):
        with pytest.raises(PlanError, match=said.replace("(", r"\(").replace(")", r"\)")):
            specs(*words)


@pytest.mark.parametrize("optimizer", ["adam", "paper_adam", "paper_rmsprop", "sgd"])
def test_a_switch_is_what_scale_does(optimizer: str) -> None:
    """The loop's weights over two switches are those of a plain loop that calls `scale`, to the bit."""
    spec = ramp(UP, f"optimizer={optimizer}")
    s, trainer, plain = spec.science, Trainer(spec), Trainer(spec)
    take_steps(trainer, s.steps)
    for k in range(s.steps):
        stage = s.at(k)
        if k and s.at(k - 1) != stage:
            scale(plain.optimizer, batch=stage.batch, base_batch=s.at(k - 1).batch)
        plain.optimizer.zero_grad()
        mean_loss(plain.net(plain.stream.batch(s.samples(k), s.samples(k + 1))[0]), plain.stream.batch(
            s.samples(k), s.samples(k + 1))[1]).backward()  # fmt: skip
        for group in plain.optimizer.param_groups:
            group["lr"] = stage.hyper.lr * s.schedule.multiplier(s.clock(k + 0.5))
        plain.optimizer.step()
    for a, b in zip(trainer.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


def moved(spec: plan.RunSpec) -> tuple[float, dict[str, Any]]:
    """By what v is multiplied at the first switch, and the group's numbers after it."""
    t = Trainer(spec)
    take_steps(t, spec.science.ramp[0].step)
    (state,) = [t.optimizer.state[t.parameters[0]]]
    before = state["exp_avg_sq"].clone()
    t._switch(spec.science.ramp[0])
    return float((state["exp_avg_sq"] / before).nanmean()), dict(t.optimizer.param_groups[0])


def test_controls_leave_the_state_and_a_measured_noise_scale_moves_v_by_it() -> None:
    """κ = 4 from batch 4: v/4; with B_noise = 12, (1 + 12/16)/(1 + 12/4) = 0.4375; left alone under none, lr_only."""
    assert moved(ramp(UP))[0] == pytest.approx(0.25)
    assert moved(ramp(UP, "noise_scale=12"))[0] == pytest.approx(0.4375)
    assert moved(ramp("ramp=[[0,4],[0.25,16,12]]"))[0] == pytest.approx(0.4375)
    for rule, lr in (("none", 1e-3), ("lr_only", 2e-3)):
        factor, group = moved(ramp(UP, f"rule={rule}"))
        assert factor == 1 and group["lr"] == pytest.approx(lr) and group["betas"] == (0.99, 0.999)


def test_clipping_and_the_average_follow_the_stage() -> None:
    spec = ramp(UP, "recipe.clip=0.1", "clip=rule", "recipe.ema=0.9")
    assert [x.clip for x in spec.science.stages] == pytest.approx([0.1, 0.05, 0.1 / 8**0.5])
    assert [x.ema for x in spec.science.stages] == pytest.approx([0.9, 0.9**4, 0.9**8])


def test_exact_resume_at_every_step(tmp_path: Path) -> None:
    """Stopped after each step in turn, the run ends with the bits of one that never was; records go by samples.

    (Killed at random instants, in one process and in two: tests/test_train.py.)
    """
    spec = ramp("ramp=[[0,8],[0.25,16],[0.5,32]]", "recipe.micro_batch=4", "measure.train_records=7")
    whole, broken = prepare(tmp_path / "whole", spec), prepare(tmp_path / "broken", spec)
    loop.fit(spec, whole, lambda: False)
    train_rows = [r for r in rows(whole) if r["kind"] == "train"]
    assert [r["samples"] for r in rows(whole) if r["kind"] == "eval"] == [128, 256]
    assert sum(r["window"] for r in train_rows) == 256 and {r["batch"] for r in train_rows} == {8, 16, 32}
    for k in range(1, spec.science.steps):
        t = Trainer(spec)
        with broken.writer(checkpoint.restore(t, broken)) as writer:
            take_steps(t, k - t.step)
            checkpoint.save(t, broken, writer)
    loop.fit(spec, broken, lambda: False)
    first, second = weights(whole), weights(broken)
    assert all(torch.equal(first[k], second[k]) for k in first)


DYING = {  # what is put in the place of a part of the switch
    "before": "trainer.carry = die",
    "in": "sys.modules['scaling_exps.rules.scale']._carry = die",
    "behind": "trainer.Trainer.enter = lambda t, stage: die() if t.step else enter(t, stage)",
}


@pytest.mark.parametrize("where", DYING)
def test_killed_at_a_switch(where: str, tmp_path: Path) -> None:
    """SIGKILL before the hyperparameters move, between them and the state, and behind both: the same bits.

    (At random instants: tests/test_train.py; more of them: bench/drill.py --ramp.)
    """
    spec = ramp("ramp=[[0,16],[0.25,32]]", "checkpoint.minutes=1e-9")
    whole, broken = prepare(tmp_path / "whole", spec), prepare(tmp_path, spec)
    loop.fit(spec, whole, lambda: False)
    code = f"""
import os, pathlib, sys
from scaling_exps.train import trainer, work
die, enter = lambda *_: os.kill(os.getpid(), 9), trainer.Trainer.enter
{DYING[where]}
work([pathlib.Path(sys.argv[1])])
"""
    assert forked.run(["-c", code, str(broken)]).returncode == -9
    assert broken.state() == "interrupted"
    work(broken)
    same_run(broken, whole)


GROWS = ("ramp=[[0,32],[0.5,64]]", "recipe.micro_batch=32", "recipe.samples=1280", "measure.train_records=5")


def test_a_ramp_takes_more_processes_when_it_is_started_again(tmp_path: Path) -> None:
    """One process up to the switch, two from behind it on. Fails if they came before the switch, or not at all, or if
    a run whose newer checkpoints are lost began with two at a stage of one micro-batch."""
    (spec,) = specs(*GROWS, "launch.elastic=true", "launch.devices=2")
    assert (spec.placement.world_size, spec.placement.most) == (1, 2) and spec.run_id == specs(*GROWS)[0].run_id
    whole, run_dir, switch = prepare(tmp_path / "whole", spec), prepare(tmp_path, spec), spec.science.ramp[0].step
    loop.fit(spec, whole, lambda: False)
    t = Trainer(spec)
    with run_dir.writer(0) as writer:
        for steps in (switch - 3, 3):
            take_steps(t, steps)
            if t.step == switch:
                writer.write(t.train_record())
            checkpoint.save(t, run_dir, writer, keep=t.step == switch)
            grown = run_dir.prepare(spec, elastic=True).placement
            assert (grown.world_size, grown.accumulation) == ((1, 1) if t.step < switch else (2, 1))
    assert [p.name for p in whole.kept()] == [p.name for p in run_dir.kept()]
    run_dir.newest.unlink()  # the one before it is of the first stage, the kept one of the second
    work(run_dir, 2)
    ((event,), found) = ([r for r in rows(run_dir) if (r["kind"] == "event") == said] for said in (True, False))
    assert (event["step"], event["before"], event["after"]) == (switch, 1, 2)
    theirs = {(r["kind"], r["step"]): r for r in rows(whole)}
    for mine in (r for r in found if r["step"] > switch):
        for key in mine.keys() & {"samples", "loss", "window", "accuracy", "weight_norm", "batch"}:
            assert mine[key] == pytest.approx(theirs[mine["kind"], mine["step"]][key], rel=1e-5), key


THREE = "ramp=[[0,4],[0.25,16],[0.5,64]]"
DEMO = ["model.width=4", "recipe.epochs=null", "recipe.samples=16384", "margin.test_accuracy=0.02"]


def test_the_report_knows_a_ramp_and_its_controls(tmp_path: Path) -> None:
    """A ramp is an arm of its own, judged beside the base, with the controls of the same stages and no others."""
    fabricate(tmp_path, [*DEMO, THREE], batches=(4, 64))
    rows_ = report.compare(report.collect([tmp_path]))
    name = "ramp 4 → 16 → 64 in 1,408 steps"
    by_rule = {(r.rule, r.batch): r for r in rows_}
    assert {(r.rule, r.batch) for r in rows_} == {
        ("base", 4), ("sqrt", 64), ("none", 64), (f"sqrt, {name}", 64), (f"none, {name}", 64)
    }  # fmt: skip
    ramped, moved_nothing = by_rule[f"sqrt, {name}", 64], by_rule[f"none, {name}", 64]
    assert (ramped.role, ramped.verdict) == ("rule", "equivalent")
    assert (moved_nothing.role, moved_nothing.verdict) == ("control", "different")
    assert ramped.power == f"told apart: {f'none, {name}'!r}" and by_rule["sqrt", 64].power == "told apart: 'none'"
    said = report.answer(rows_)
    assert said[1] == f"Safe: sqrt, {name}, at ±2% accuracy, 3 seeds; 66% fewer than the base's 4,096."
    assert "Safe up to batch 64 (κ = 16) under sqrt" in said[0]


def test_what_the_noise_predicts_of_a_ramp(tmp_path: Path) -> None:
    """At B_noise = 400 everywhere it is the mean over the samples of √((1+r)/(1+κr)), r = 0.01, of each stage alone."""
    (spec,) = specs(THREE, "recipe.samples=16384")
    noise = [
        {"kind": "noise", "method": "full", "samples": 1638.4 * (i + 1), "gradient_sq": 1.0, "trace": 400.0}
        for i in range(10)
    ]
    each = [validity.deviation(0.01, k) for k in (1, 4, 16)]
    told = validity.along(spec, noise)
    assert told is not None and told.deviation == pytest.approx(each[0] / 4 + each[1] / 4 + each[2] / 2)
    assert validity.each_stage(spec, noise) == pytest.approx(each)
    assert told.dominated == pytest.approx(0.5)  # κ r = 0.16 in the last half


def test_auto_takes_the_stages_from_the_base_runs_noise(tmp_path: Path) -> None:
    """√((1+r)/(1+κr)) >= 0.9 with r at its upper end: above 16 and below the κ = 24 of B_noise = 400 itself."""
    words = [*DEMO, f"runs_dir={tmp_path}", "ramp=auto", "ramp.tolerance=0.1", "recipe.micro_batch=4"]
    (refused,) = config.compose(words)
    with pytest.raises(noise_ramp.RampError, match="no noise record of the base run"):
        noise_ramp.resolve([refused])
    fabricate(tmp_path, DEMO, batches=(4,), rules=("sqrt",), b_noise=400)
    configs, said = noise_ramp.resolve(config.compose([*words, "seed=[0,1,2]"]))
    ramped = plan.plan(configs)[0].science
    assert len(ramped.stages) <= 4 and 64 <= ramped.stages[-1].batch < 96 and ramped.stages[-1].batch % 4 == 0
    assert all(a.batch < b.batch and b.noise_scale for a, b in zip(ramped.stages, ramped.stages[1:], strict=False))
    typed = said[0].partition(": ")[2]
    same = plan.plan(config.compose([*DEMO, typed, "recipe.micro_batch=4"]))
    assert same[0].run_id == plan.plan(configs)[0].run_id
    small = noise_ramp.resolve(config.compose([*words, "seed=[0,1,2]", "ramp.largest=8"]))[0]
    assert plan.plan(small)[0].science.stages[-1].batch == 8
