"""SVAG training: the identity at l = 1, exactly the rules' numbers at l > 1, one clock, refusals."""

from __future__ import annotations

import pytest
import torch
from support import specs, take_steps
from torch.nn import functional as F

from scaling_exps import config, data, models, optim, plan, rules, theory, train
from scaling_exps.train import measure

OPTIMIZERS = ["adam", "rmsprop", "paper_adam", "paper_rmsprop", "sgd"]
TORCH = {"adam": torch.optim.Adam, "rmsprop": torch.optim.Adam}


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_hand(
    spec: plan.RunSpec, steps: int, draws: tuple[float, ...], hyper: rules.Hyper, stretch: int
) -> torch.nn.Module:
    """`steps` steps written out: whole draws, no micro-batches, no trainer."""
    s = spec.science
    net = models.build(s.model, s.dataset, s.seed)
    stream = data.stream(s.dataset, None, s.seed, torch.device("cpu"))
    if s.optimizer in TORCH:
        optimizer = TORCH[s.optimizer](net.parameters(), hyper.lr, hyper.betas, hyper.eps, fused=True)
    else:
        optimizer = optim.build(s.optimizer, net.parameters(), hyper)
    at = 0
    for k in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for weight in draws:
            x, y = stream.batch(at, at + s.batch)
            loss = F.cross_entropy(net(x), y)
            (loss if len(draws) == 1 else loss * weight).backward()
            at += s.batch
        share = s.schedule.multiplier((k + 0.5) * s.batch / stretch)
        optimizer.param_groups[0]["lr"] = hyper.lr * share
        optimizer.step()
    return net


def trained(spec: plan.RunSpec, steps: int) -> train.Trainer:
    trainer = train.Trainer(spec)
    take_steps(trainer, steps)
    return trainer


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_l_1_is_the_plain_run_bit_for_bit_over_50_steps(optimizer: str) -> None:
    """Against a loop that has never heard of SVAG. Fails if l = 1 took two draws, half or twice the steps (the authors'
    script does), or multiplied anything by a weight that is not exactly 1."""
    words = [f"optimizer={optimizer}", "recipe.samples=400", "batch=8", "recipe.batch=8", "svag=1"]
    if optimizer == "sgd":
        words.append("recipe.momentum=0")
    (spec,) = specs(*words)
    assert spec.science.steps == 50
    trainer = trained(spec, 50)
    assert spec.science.samples(trainer.step) == 400
    assert same_bits(trainer.net, by_hand(spec, 50, (1.0,), spec.science.hyper, 1))


LABORATORY = [("adam", "adaptive"), ("paper_adam", "adaptive"), ("paper_rmsprop", "adaptive"), ("sgd", "sgd")]


@pytest.mark.parametrize(("optimizer", "family"), LABORATORY)
def test_l_2_on_a_network_is_the_laboratory_s_l_2(optimizer: str, family: rules.Family) -> None:
    """What the theory laboratory executes at l = 2 drives a loop by hand; the trainer must end on its bits. Fails for
    any other weight, beta, eps, lr, step count or schedule, or if a draw read the other's examples."""
    more = ["recipe.momentum=0"] if family == "sgd" else []
    (base,) = specs(f"optimizer={optimizer}", "batch=8", "recipe.batch=8", "recipe.samples=48", *more)
    (spec,) = specs(f"optimizer={optimizer}", "batch=8", "recipe.batch=8", "recipe.samples=48", "svag=2", *more)
    laboratory = theory.Chain(base.science.hyper, 1.0, 1.0, base.science.steps, family).svag(2)
    hyper, weights, steps = laboratory.hyper, laboratory.weights, laboratory.steps
    stretch = steps // base.science.steps
    assert (spec.science.hyper, spec.science.steps) == (hyper, steps)
    trainer = trained(spec, steps)
    assert spec.science.samples(steps) == 2 * stretch * 48  # what is read, said honestly
    assert same_bits(trainer.net, by_hand(spec, steps, weights, hyper, stretch))


def test_weights_keep_the_mean_and_multiply_the_covariance() -> None:
    """r1 + r2 = 1; r1² + r2² = l² (adaptive), l (SGD): the covariance of a step."""
    for ell in (2, 4, 8):
        for family, times in (("adaptive", ell**2), ("sgd", ell)):
            weights = rules.svag_weights(ell, family)  # type: ignore[arg-type]
            assert sum(weights) == pytest.approx(1, abs=1e-15)
            assert sum(w * w for w in weights) == pytest.approx(times, rel=1e-14)


def test_one_clock_for_every_l() -> None:
    """Records lie at the same t, and the learning rate has the same share of its peak. Fails if marks were counted
    in stretched steps (a record up to a plain step early) or the schedule in samples read."""
    runs = specs("batch=8", "recipe.batch=8", "recipe.samples=296", "svag=[1,2,4]", "recipe.warmup_fraction=0.3")
    assert [r.science.svag for r in runs] == [1, 2, 4]
    times, shares = [], []
    for spec in runs:
        s = spec.science
        marks = [k for k in range(1, s.steps + 1) if measure.crosses(spec, k, 10)]
        times.append([rules.continuous_time(s.hyper, k, "adaptive") for k in marks])
        shares.append([s.schedule.multiplier(s.clock(k)) for k in marks])
        assert s.clock(s.steps) == 296
    assert len(times[0]) == 10
    for t, share in zip(times[1:], shares[1:], strict=True):
        assert t == pytest.approx(times[0], rel=1e-12)
        assert share == shares[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["svag=0"], "svag=0 must be an integer in [1, 1000]"),
        (["svag=[1,-2]"], "svag=[1, -2] must be an integer in [1, 1000], or a list"),
        (["svag=1.5"], "svag=1.5 must be an integer in [1, 1000]"),
        (["svag=[]"], "svag=[] is empty"),
        (
            ["svag=2", "batch=1024", "recipe.batch=1024"],
            "leaves no second draw in 1437 training examples; allowed: batch <= 718",
        ),
        (["svag=2", "optimizer=adamw"], "decoupled weight decay"),
        (["svag=2", "optimizer=sgd"], "momentum"),
    ],
)
def test_refused_with_the_reason(words: list[str], told: str) -> None:
    with pytest.raises((plan.PlanError, config.ConfigError)) as e:
        specs(*words)
    assert told in str(e.value)
