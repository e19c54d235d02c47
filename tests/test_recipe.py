"""Keys of a recipe that trainers have beside the optimizer's: clipping, averaged weights, early stop, warm start."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from support import prepare, specs, take_steps, weights
from test_train import averages
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scaling_exps import config, data, models, optim, plan, rules, train
from scaling_exps.train import measure, trainer

BOTH = ["recipe.clip=1.5", "recipe.ema=0.9"]


def refusal(*words: str) -> str:
    with pytest.raises((plan.PlanError, config.ConfigError)) as refused:
        specs(*words)
    return str(refused.value)


# ---- against torch ----


def test_clipping_and_averaging_are_torchs_to_the_bit() -> None:
    """A bare loop with clip_grad_norm_ and AveragedModel. Fails if the threshold were applied to each parameter or
    after the step, if the average began elsewhere, if evaluations saw the weights themselves, or if one that raises
    left the average in their place."""
    torch.set_num_threads(1)
    (spec,) = specs("batch=16", "recipe.micro_batch=16", *BOTH, "recipe.samples=320")
    s, ours = spec.science, train.Trainer(spec)
    assert s.clip == 1.5 and s.ema == pytest.approx(0.9**4)
    net = models.build(s.model, s.dataset, s.seed)
    stream = data.stream(s.dataset, None, s.seed, torch.device("cpu"))
    optimizer = optim.build(s.optimizer, net.parameters(), s.hyper)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(s.ema))
    average.update_parameters(net)  # its first call copies
    norms = []
    for k in range(s.steps):
        x, y = stream.batch(16 * k, 16 * (k + 1))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), s.clip)))
        optimizer.param_groups[0]["lr"] = s.hyper.lr * s.schedule.multiplier(16 * (k + 0.5))
        optimizer.step()
        average.update_parameters(net)
        ours.train_step()
        assert ours.train_record()["gradient_norm"] == norms[-1]  # what it was before it was clipped
    assert min(norms) < s.clip < max(norms)
    theirs, own = net.state_dict(), ours.net.state_dict()
    assert all(torch.equal(own[name], v) for name, v in theirs.items())
    assert all(torch.equal(v, dict(average.module.named_parameters())[n]) for n, v in ours.average.items())
    row = measure.evaluate(ours)
    assert all(torch.equal(own[name], v) for name, v in theirs.items())  # the weights are back
    with torch.no_grad():
        x, y = stream.test_batch(0, stream.test_size)
        loss = torch.nn.functional.cross_entropy(average.module.eval()(x), y)
    assert row["loss"] == pytest.approx(float(loss), rel=1e-6)
    with pytest.raises(KeyError), ours.averaged():
        raise KeyError
    assert all(torch.equal(own[name], v) for name, v in theirs.items())


# ---- by the rule ----


def test_what_the_rule_makes_of_them() -> None:
    """Fails if the threshold moved unasked, if one piece of the code were not that of `convert`, or if the rule that
    scales nothing scaled these."""
    for words, clip, ema in (
        (["rule=sqrt"], 1.5, 0.9**16),
        (["rule=sqrt", "clip=rule"], 1.5 / 4, 0.9**16),
        (["rule=none", "clip=rule"], 1.5, 0.9),
        (["batch=4", "clip=rule"], 1.5, 0.9),
    ):
        (spec,) = specs("batch=64", *BOTH, *words)
        assert (spec.science.clip, spec.science.ema) == (pytest.approx(clip), pytest.approx(ema)), words
        assert (spec.arms[0].base.clip, spec.arms[0].base.ema) == (1.5, 0.9)
    (stretched,) = specs("batch=4", "recipe.ema=0.9", "svag=2")
    assert stretched.science.ema == pytest.approx(0.9 ** (1 / 4))  # 4 steps for one
    (spec,) = specs("batch=64", *BOTH)
    assert any("recipe.clip=1.5 is kept" in note and "needs 0.375" in note for note in spec.notes)
    assert rules.RULES["sqrt"].clip(1.0, 16) == 0.25


def test_defaults_are_no_part_of_the_run_id() -> None:
    """The ids of runs of this project's recipes before these keys were there. Each key makes another run."""
    known = {
        "batch=4": "14da482e34c9",
        "batch=16 optimizer=sgd": "efeb599af6c1",
        "model=gpt batch=32 seed=3": "db2e68bf08db",
    }
    for words, run_id in known.items():
        assert plan.plan(config.compose(words.split()))[0].run_id == run_id, words
    (plain,) = specs("batch=16")
    ids = {specs("batch=16", w)[0].run_id for w in ("recipe.clip=1", "recipe.ema=0.9", "recipe.stop_after=128")}
    assert len(ids | {plain.run_id}) == 4
    assert specs("batch=16", "clip=rule")[0].run_id == plain.run_id  # nothing to move
    raw = msgspec.to_builtins(plain.science)
    assert not {"clip", "ema", "start"} & set(raw)


def test_combinations_without_a_meaning_are_refused() -> None:
    assert "SVAG is not defined for clipped gradients" in refusal("svag=2", "recipe.clip=1")
    assert "before they are clipped" in refusal("optimizer=invariant_adam", "rule=invariant", "recipe.clip=1")
    assert "beyond the end of the schedule, 256 samples" in refusal("recipe.stop_after=257")
    assert "duration=2 moves its end" in refusal("recipe.stop_after=100", "duration=2")
    assert "clip=1 must be one of keep, rule" in refusal("clip=1")
    assert "there is no file 'nowhere'" in refusal("recipe.start_from=nowhere")


def test_a_norm_beyond_float32_stops_the_run() -> None:
    """Each gradient is finite and their norm is not: torch's clip would make them all zero without a word."""
    (spec,) = specs("batch=8", "recipe.clip=1")
    run = train.Trainer(spec)
    for p in run.parameters:
        p.register_hook(lambda g: torch.full_like(g, 1e38))
    with pytest.raises(trainer.DivergedError, match="not finite at step 0"):
        run.train_step()


# ---- early stop, warm start ----


def test_an_early_stop_is_the_beginning_of_the_whole_run(tmp_path: Path) -> None:
    """Fails if the schedule were squeezed into what is left, which its learning rates would show."""
    (whole,), (short,) = (specs("batch=8", "measure.noise=none", *w) for w in ([], ["recipe.stop_after=128"]))
    assert short.run_id != whole.run_id and short.science.steps == 16 and whole.science.steps == 32
    assert any("ends after 128 of its schedule's 256 samples" in note for note in short.notes)
    run_dir = prepare(tmp_path, short)
    assert train.run(run_dir) == "finished"
    other = train.Trainer(whole)
    take_steps(other, 16)
    assert all(torch.equal(other.net.state_dict()[name], v) for name, v in weights(run_dir).items())


def test_a_warm_start(tmp_path: Path) -> None:
    """From a run's folder, and from safetensors of the same weights: the averaged ones, which evaluations saw. Fails
    if the weights were not loaded, if displacement were from the seed's weights, or if the content were not the id."""
    tiny = ["recipe.samples=64", "measure.noise=none", "batch=8"]
    first = prepare(tmp_path, specs(*tiny, "recipe.ema=0.5")[0])
    assert train.run(first) == "finished"
    begun = {name: v.contiguous() for name, v in {**weights(first), **averages(first)}.items()}
    save_file(begun, tmp_path / "begun.safetensors")
    places = (first, first.newest, tmp_path / "begun.safetensors")
    ids = [specs(*tiny, f"recipe.start_from={place}")[0].run_id for place in places]
    assert ids[0] == ids[1] != ids[2]
    for place in (first, places[2]):
        second = prepare(tmp_path, specs(*tiny, f"recipe.start_from={place}", "recipe.lr=1e-12")[0])
        assert train.run(second) == "finished"
        for name, tensor in weights(second).items():  # so small a rate moves nothing
            torch.testing.assert_close(tensor, begun[name], rtol=0, atol=1e-8, msg=name)
        assert second.records().rows[-1]["displacement"] < 1e-6
    (tmp_path / "noise.pt").write_bytes(b"no archive")
    for words, says in (
        (
            ["model.width=8", f"recipe.start_from={first}"],
            "of another shape: conv.weight (4, 1, 3, 3) in the file, (8, 1",
        ),
        (
            ["model=resnet20", "dataset=digits", "recipe=digits-small", f"recipe.start_from={first}"],
            "not in the file: ",
        ),
        ([f"recipe.start_from={tmp_path / 'noise.pt'}"], "holds no weights that can be read"),
    ):
        with pytest.raises(models.ModelError) as refused:
            train.preflight(specs(*tiny, *words))
        assert says in str(refused.value)


def test_weights_that_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    (plain,) = specs("batch=8")
    file = tmp_path / "w.pt"
    torch.save(train.Trainer(plain).net.state_dict(), file)
    (spec,) = specs("batch=8", f"recipe.start_from={file}")
    run_dir = prepare(tmp_path, spec)
    torch.save({k: v + 1 for k, v in torch.load(file, weights_only=True).items()}, file)
    assert train.run(run_dir) == "failed"
    assert "is not what the run was planned with" in run_dir.reason()
