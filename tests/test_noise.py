"""Gradient-noise estimators: calibration, agreement, and that measuring changes nothing."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import placed, prepare, rows, specs, take_steps, weights, work

from scaling_exps import config, plan, train
from scaling_exps.noise import estimators, validity
from scaling_exps.noise.state import preconditioners
from scaling_exps.train import checkpoint, measure

UNIT = 4


def gaussian(n: int, seed: int, signal: float = 0.3, skew: bool = False) -> tuple[torch.Tensor, float, float]:
    """n gradients (n, 40) of known mean and covariance; tr Cov and |mean|²."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, 40, dtype=torch.float64)
    z = torch.randn(n, 40, generator=g, dtype=torch.float64)
    if skew:
        z = (z.square() - 1) / math.sqrt(2)  # mean 0, variance 1, skewness 2.8
    return z * scale + signal, float(scale.square().sum()), 40 * signal**2


def full(
    matrix: torch.Tensor, scales: list[torch.Tensor | None] | None = None, **ranks: Any
) -> list[estimators.Estimate]:
    return estimators.full(
        lambda units: [matrix[units.start : units.stop]], len(matrix), UNIT, scales or [None], matrix[0], **ranks
    )


def covers(value: estimators.Value, truth: float) -> bool:
    return value.low <= truth <= value.high


@pytest.mark.parametrize("skew", [False, True])
def test_full_is_calibrated(skew: bool) -> None:
    """500 repeats with 64 gradients of known Σ: means within 4 standard errors, 95% intervals cover in 90-99%. Fails if
    |ḡ|² were not de-biased (its bias is 6% of |∇f|² here, 8 standard errors), or the jackknife's factor were wrong."""
    found = [(full(m)[0], t, u) for m, t, u in (gaussian(64, i, skew=skew) for i in range(500))]
    for name, truth in (("trace", UNIT * found[0][1]), ("gradient_sq", found[0][2])):
        values = [getattr(e, name) for e, _, _ in found]
        mean = torch.tensor([v.value for v in values], dtype=torch.float64)
        assert abs(float(mean.mean()) - truth) < 4 * float(mean.std()) / math.sqrt(500), name
        assert 0.90 <= sum(covers(v, truth) for v in values) / 500 <= 0.99, name
    inverse = found[0][2] / (UNIT * found[0][1])
    assert 0.90 <= sum(covers(e.inverse, inverse) for e, _, _ in found) / 500 <= 0.99


@pytest.mark.parametrize(("ell", "chunks"), [(1, 4), (2, 2), (4, 2)])
def test_free_is_calibrated(ell: int, chunks: int) -> None:
    """500 repeats of 60 steps, plain and with SVAG's weights: as above. Fails if q = Σ w² were taken for 1/n."""
    from scaling_exps.rules import svag_weights

    draws = svag_weights(ell, "adaptive")
    w = torch.tensor([r / (chunks // len(draws)) for r in draws for _ in range(chunks // len(draws))]).double()
    q = float(w.square().sum())
    estimates = []
    for i in range(500):
        m, t, u = gaussian(60 * chunks, i, signal=1.0)
        g = m.view(60, chunks, 40)
        step = (g * w.view(1, -1, 1)).sum(1)
        pairs = torch.stack([g.square().sum(2).mean(1), step.square().sum(1)], 1)
        estimates.append(estimators.two_batch(pairs, q, UNIT, chunks))
    for name, truth in (("trace", UNIT * t), ("gradient_sq", u), ("inverse", u / (UNIT * t))):
        values = [getattr(e, name) for e in estimates]
        mean = torch.tensor([v.value for v in values], dtype=torch.float64)
        if name != "inverse":  # a ratio of averages is unbiased only in the limit
            assert abs(float(mean.mean()) - truth) < 4 * float(mean.std()) / math.sqrt(500), name
        assert 0.90 <= sum(covers(v, truth) for v in values) / 500 <= 0.99, name


def test_preconditioned_is_the_full_one_of_scaled_gradients() -> None:
    """P g measured with `scales` equals g measured after multiplying by P. Fails if P were squared or left out of one
    of the two sums."""
    m, _, _ = gaussian(48, 3)
    p = torch.linspace(0.1, 3, 40, dtype=torch.float64)
    both, direct = full(m, [None, p]), full(m * p)
    assert both[1].trace.value == pytest.approx(direct[0].trace.value, rel=1e-12)
    assert both[1].gradient_sq.high == pytest.approx(direct[0].gradient_sq.high, rel=1e-9)
    assert both[0].trace.value == pytest.approx(full(m)[0].trace.value, rel=1e-12)


def test_many_units_lose_no_bit() -> None:
    """50,000 gradients against the same sums in Python's integers. Fails if n(n - 1), which is beyond 2^24, were formed
    in float32: it was off by 2e-8."""
    n = 50_000
    m = (torch.arange(2 * n, dtype=torch.float64).reshape(n, 2) * 7919 % 101) - 50
    rows = [[int(x) for x in row] for row in m.tolist()]
    squares, total = sum(a * a + b * b for a, b in rows), [sum(c) for c in zip(*rows, strict=True)]
    u = Fraction(sum(x * x for x in total) - squares, n * (n - 1))
    (estimate,) = full(m)
    assert estimate.trace.value == pytest.approx(float(UNIT * (Fraction(squares, n) - u)), rel=1e-13)
    assert estimate.gradient_sq.value == pytest.approx(float(u), rel=1e-12)


def test_too_little_means_nothing() -> None:
    """Two gradients have no interval; no signal is 'not enough data', never a ratio; one gradient is refused."""
    m, _, _ = gaussian(64, 0, signal=0.0)
    for few in (full(m)[0], full(gaussian(2, 0)[0])[0], estimators.two_batch(torch.ones(2, 2).double(), 0.5, 1, 2)):
        assert not few.enough
        record = few.record(32)
        assert "b_noise" not in record
        assert "NaN" not in json.dumps(record)
        assert "Infinity" not in json.dumps(record)
    with pytest.raises(estimators.NoiseError, match="n=1 "):
        full(m[:1])


# ---- on networks ----

BASE = ["batch=16", "recipe.batch=16", "recipe.micro_batch=4", "recipe.samples=320", "measure.noise_records=4"]


def trainer_of(*words: str) -> train.Trainer:
    (spec,) = specs(*words)
    return train.Trainer(spec)


def checked(words: list[str], tmp_path: Path) -> dict[str, torch.Tensor]:
    (spec,) = specs(*words)
    run_dir = prepare(tmp_path, spec)
    assert train.run(run_dir) == "finished"
    state = torch.load(run_dir.newest, weights_only=True)
    moments = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return {**state["net"], **moments}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_measured_run_ends_on_the_bits_of_an_unmeasured_one(norm: str, tmp_path: Path) -> None:
    """Weights, BN buffers and moments. Fails if the measurement touched `.grad`, a buffer (num_batches_tracked) or the
    training stream, or if hooks changed what is accumulated."""
    words = [*BASE, f"model.norm={norm}"]
    unit = [] if norm == "batch" else ["measure.noise_unit=1"]
    states = [
        checked(
            [*words, f"measure.noise={kind}", "measure.noise_examples=16", *(unit if kind == "full" else [])],
            tmp_path / kind,
        )
        for kind in ("none", "free", "full")
    ]
    for other in states[1:]:
        assert all(torch.equal(v, other[k]) for k, v in states[0].items())


def test_units_are_the_gradients_that_training_computes() -> None:
    """vmap's single-example gradients, averaged over a unit, are the unit's gradient by backward; P is Adam's own: one
    step with m = v̂-corrected gradient moves by lr P g."""
    trainer = trainer_of(*BASE)
    trainer.train_step()
    net, stream = trainer.net, trainer.stream.sibling(trainer.science.seed, "noise")
    named = dict(net.named_parameters())
    x, y = stream.batch(0, 8)
    loss = torch.nn.functional.cross_entropy
    (whole,) = estimators.unit_gradients(
        lambda a, b: loss(net(a), b), list(named.values()), lambda i: (x, y), range(1), []
    )
    single = estimators.example_gradients(
        lambda p, a, b: loss(torch.func.functional_call(net, p, (a,)), b),
        named, lambda a, b: (x[a:b], y[a:b]), range(8), [],
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(list(single)).mean(0), whole[0], rtol=1e-3, atol=1e-5)
    state = trainer.optimizer.state
    p = torch.cat([scale.flatten() for _, scale in preconditioners(trainer.optimizer)])
    v = torch.cat([(state[q]["exp_avg_sq"] / (1 - trainer.science.hyper.betas[1])).flatten() for q in named.values()])
    torch.testing.assert_close(p, 1 / (v.sqrt() + 1e-8), rtol=1e-4, atol=0)


def frozen_in_place(*words: str, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Free over `steps` steps and full, at weights that do not move (lr 1e-12)."""
    trainer = trainer_of(*words, "recipe.lr=1e-12", "measure.noise=full", "measure.noise_examples=1024")
    take_steps(trainer, steps)
    free, whole = measure.noise_records(trainer, 1)
    return free, whole


@pytest.mark.parametrize("svag", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_full_and_free_agree(svag: int) -> None:
    """At one θ: the difference lies within its own 99.9% interval (both intervals in quadrature, x 1.7). Fails by many
    intervals if the weight w_i were not divided out, or a trace were per unit instead of per example."""
    words = ["batch=16", "recipe.batch=16", "recipe.micro_batch=4", "recipe.samples=6400", f"svag={svag}"]
    free, whole = frozen_in_place(*words, steps=120)
    assert free["method"] == "free"
    assert whole["method"] == "full"
    for name in ("trace", "gradient_sq"):
        half = math.hypot(*(r[f"{name}_high"] - r[name] for r in (free, whole)))
        assert abs(free[name] - whole[name]) < 1.7 * half, (name, free, whole)
    assert whole["trace_low"] > 0.5 * whole["trace"]  # and the intervals say something
    assert free["trace_low"] > 0.5 * free["trace"]


@pytest.mark.slow
def test_one_process_and_two_ranks_agree(tmp_path: Path) -> None:
    """The same 4 micro-batches a draw on 1 x 4 and 2 x 2, SVAG, free and full: the same records to rounding. Fails if
    norms after the reduction were of the local gradient, or ranks measured the same examples."""
    words = [
        *BASE,
        "measure.noise=full",
        "measure.noise_examples=64",
        "svag=3",
        "recipe.samples=64",
        "measure.evaluations=1",
    ]
    (spec,) = specs(*words)
    done = []
    for world in (1, 2):
        run_dir = prepare(tmp_path / str(world), placed(spec, world))
        work(run_dir, world)
        done.append([r for r in rows(run_dir) if r["kind"] == "noise"])
    assert [r["method"] for r in done[0]] == ["free", "full"] * 4
    for mine, theirs in zip(*done, strict=True):
        for key, value in mine.items():
            if isinstance(value, float):
                assert theirs[key] == pytest.approx(value, rel=2e-2, abs=1e-3 * abs(mine["trace"])), key
            else:
                assert theirs[key] == value, key


# ---- records, summary, plan ----


def test_a_run_says_and_a_plan_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if another seed's base run, or one that was measured otherwise, were not used."""
    words = ["recipe.batch=4", "recipe.samples=1024"]
    (base,) = specs("batch=4", *words, "measure.noise=full", "measure.noise_examples=1024")
    run_dir = prepare(tmp_path, base)
    train.run(run_dir)
    said = capsys.readouterr().out
    assert "noise dominated for " in said
    result = run_dir.result()
    assert result is not None and 0 <= result["noise_dominated"] <= 1
    both = specs("batch=[4,64]", *words)
    rows_of_base, source = validity.of_base(both[1], both, tmp_path, None)
    assert source == str(run_dir)
    assert rows_of_base == [r for r in run_dir.records().rows if r["kind"] == "noise"]
    (other,) = specs("batch=64", *words, "seed=3")
    text = validity.describe([other], Path("nowhere"), str(run_dir))[other.run_id]
    assert text["source"] == str(run_dir)
    assert text["deviation"] < 1
    assert "κr < 0.1 for" in text["text"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipe.lr=2e-3"], "of another recipe: lr 0.001 instead of 0.002"),
        (["optimizer=rmsprop"], "optimizer adam instead of rmsprop"),
        (["recipe.batch=8"], "batch 4 instead of 8"),
        (["recipe.samples=2048"], "samples 1024 instead of 2048"),
    ],
)
def test_a_record_of_another_recipe_is_refused(words: list[str], told: str, tmp_path: Path) -> None:
    (other,) = specs("batch=4", "recipe.batch=4", "recipe.samples=1024")
    run_dir = prepare(tmp_path, other)
    (target,) = specs("batch=64", "recipe.batch=4", "recipe.samples=1024", *words)
    with pytest.raises(plan.PlanError, match="noise_from=") as e:
        validity.of_base(target, [target], Path("nowhere"), str(run_dir))
    assert told in str(e.value)


def row(samples: int, signal: float, half: float = math.inf) -> dict[str, Any]:
    """A record at tr Σ = 1."""
    ends = {"gradient_sq_low": signal - half, "gradient_sq_high": signal + half} if math.isfinite(half) else {}
    return {"kind": "noise", "method": "full", "samples": samples, "batch": 4, "enough": False, "trace": 1.0,
            "gradient_sq": signal, **ends}  # fmt: skip


def test_assess_by_hand() -> None:
    """Ten records of each half of training, r = 0.01 and 0.05 at batch 4, one of each half below zero on its own; to
    4 x the batch. Fails if records that are not significant were left out, or stretches weighed by their records."""
    first = [row(50 * k, 0.0025 + (-1) ** k * 0.004) for k in range(1, 11)]
    second = [row(500 + 50 * k, 0.0125 + (-1) ** k * 0.02) for k in range(1, 11)]
    found = validity.assess([*first, *second], 16, 4)
    assert found is not None
    one, other = math.sqrt(1.01 / 1.04), math.sqrt(1.05 / 1.2)
    assert found.deviation == pytest.approx((one + other) / 2, abs=2e-3)  # five records are odd: r is off a little
    assert found.dominated == 0.5
    assert found.low < found.deviation < found.high <= 1
    assert found.b_noise[0] < 2 / (0.0025 + 0.0125) < found.b_noise[1]


def test_little_is_bounded_by_the_records_own_intervals() -> None:
    """One record: surely below the limit whatever |∇f|² is, or nothing at all where it has no interval."""
    certain = validity.assess([row(100, 1e-4, 1e-3)], 16, 4)
    assert certain is not None and (certain.dominated, certain.measured) == (1, 1)
    assert certain.b_noise_point is None and certain.b_noise == (pytest.approx(1 / 1.1e-3), math.inf)
    assert validity.scale_text(certain) == "B_noise above 909"
    assert validity.assess([row(100, 1e-4)], 16, 4) is None
    assert validity.assess([], 16, 4) is None


def synthetic(b_noise: float, seed: int, kind: str) -> list[dict[str, Any]]:
    """The 10 records of a run at a constant B_noise: 16 gradients of 16 examples each in 40 dimensions, tr Σ = 1.

    mixture: a tenth of the gradients has three times the spread. student: each coordinate has 3 degrees of freedom;
    student norm: the gradient as a whole.
    """
    rng = np.random.default_rng([seed, int(b_noise), kind == "mixture"])
    z = rng.standard_normal((10, 16, 40))
    if kind == "mixture":
        z *= np.where(rng.random((10, 16, 1)) < 0.1, 3, 1 / 3)
    elif kind != "normal":  # z √(3/χ²(3)), of variance 3
        z /= np.sqrt(rng.chisquare(3, (10, 16, 40 if kind == "student" else 1)))
    g = z / math.sqrt(40 * 16) + math.sqrt(1 / b_noise / 40)
    square = (g**2).sum((1, 2))
    u = ((g.sum(1) ** 2).sum(1) - square) / (16 * 15)
    t = 16 * (square / 16 - u)
    return [{**row(1000 * (k + 1), float(u[k])), "trace": float(t[k])} for k in range(10)]


@pytest.mark.parametrize("kind", ["normal", "mixture", "student", "student norm"])
@pytest.mark.parametrize("b_noise", [10, 100, 1000, 10_000])
def test_the_predicted_deviation_is_calibrated(b_noise: int, kind: str) -> None:
    """300 runs, from 32 to 512: the intervals of the deviation and of B_noise cover the truth in 90-99%, the mean of
    the deviation is right, and where a B_noise is printed as a number its interval covers in 80% and more: of those
    with Student's t (3 degrees of freedom; of each coordinate, or of a whole gradient) this is all that can be had.

    Fails if records that are significant alone were selected: at B_noise = 1,000 the deviation then came out at .33
    to .41, or not at all, where it is .174; and at 10,000 the clipping of r at 0 in each stretch covered in 85%.
    """
    truth = validity.deviation(32 / b_noise, 16)
    found = [validity.assess(synthetic(b_noise, i, kind), 512, 32) for i in range(300)]
    told = [v for v in found if v is not None]
    assert len(told) == len(found)
    assert 0.90 <= sum(v.low <= truth <= v.high for v in told) / 300 <= 0.99
    # of 300, and the widest of them holds 99% of many: three more by chance
    assert 0.90 <= sum(v.b_noise[0] <= b_noise <= v.b_noise[1] for v in told) / 300 <= 1.0
    assert sum(v.deviation for v in told) / 300 == pytest.approx(truth, abs=0.015)
    if len(printed := [v for v in told if v.b_noise_point is not None]) > 50:
        assert sum(v.b_noise[0] <= b_noise <= v.b_noise[1] for v in printed) / len(printed) >= (
            0.80 if kind == "student norm" else 0.85
        )
        points = sorted(v.b_noise_point or 0.0 for v in printed)
        assert (0.75 if kind == "student norm" else 0.8) < points[len(points) // 2] / b_noise < 1.25
    else:
        assert b_noise >= 1000 or kind == "mixture"  # where 2,560 examples tell only bounds


def test_a_record_that_is_just_significant_prints_bounds() -> None:
    """|∇f|²/tr Σ = 1.0 ± 0.8 is told from 0, and chance makes such: no number. 1.0 ± 0.4 is one. Fails if `enough`
    were significance alone: at B_noise = 10,000 its median was .08 of the truth."""
    sure = estimators.Value(1.0, 0.9, 1.1)
    just = estimators.Estimate(sure, sure, estimators.Value(1.0, 0.2, 1.8), 16, 256).record(4)
    assert not just["enough"] and "b_noise" not in just
    assert (just["b_noise_low"], just["b_noise_high"]) == (pytest.approx(1 / 1.8), pytest.approx(5.0))
    well = estimators.Estimate(sure, sure, estimators.Value(1.0, 0.6, 1.4), 16, 256).record(4)
    assert well["enough"] and well["b_noise"] == 1.0
    unknown = estimators.Estimate(sure, sure, estimators.Value(0.1, -0.2, 0.4), 16, 256).record(4)
    assert unknown["b_noise_low"] == pytest.approx(2.5) and "b_noise_high" not in unknown


def test_steps_and_samples_against_batch() -> None:
    assert validity.steps_and_samples(1000, 1000) == (2, 2)
    assert validity.steps_and_samples(10, 1000) == (101, 1.01)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["measure.noise=often"], "measure.noise='often'"),
        (["measure.noise_examples=1"], "must be an integer in [2, "),
        (["measure.noise_examples=0"], "must be an integer in [2, "),
        (["measure.noise_unit=5", "measure.noise_examples=8"], "must lie between 1 and the micro-batch 4"),
        (["measure.noise_unit=3", "measure.noise_examples=8"], "nearest that fit: 6 and 9"),
        (["measure.noise_examples=4"], "at least two; nearest that fit: 8 and 12"),
        (["measure.noise_unit=2", "model.norm=batch"], "a gradient is that of one micro-batch"),
        (["measure.noise_examples=2000"], "only 1437 training examples"),
        (["measure.noise_records=0"], "must be an integer in [1, "),
    ],
)
def test_refused_with_the_reason(words: list[str], told: str) -> None:
    with pytest.raises((plan.PlanError, config.ConfigError)) as e:
        specs("batch=4", "recipe.batch=4", "recipe.micro_batch=4", "measure.noise=full", *words)
    assert told in str(e.value)


def test_a_killed_run_s_window_is_in_its_checkpoint(tmp_path: Path) -> None:
    """The free estimator's window survives a restart. Fails if it were not saved: fewer steps in the record."""
    (spec,) = specs(*BASE)
    run_dir, one = prepare(tmp_path, spec), train.Trainer(spec)
    take_steps(one, 3)
    with run_dir.writer(0) as writer:
        checkpoint.save(one, run_dir, writer)
    two = train.Trainer(spec)
    checkpoint.restore(two, run_dir)
    assert measure.noise_records(two, 1) == measure.noise_records(one, 1)


# ---- measuring is not science ----


def test_what_is_measured_is_no_part_of_a_run(tmp_path: Path) -> None:
    """Fails if any key of measure.* changed the run id, or if BN's statistics did not."""
    (plain,) = specs(*BASE, "model.norm=batch")
    words = {
        "measure.evaluations=3", "measure.train_records=7", "measure.noise=full", "measure.noise=none",
        "measure.noise_records=5", "measure.noise_examples=32", "checkpoint.keep=[0.5]", "checkpoint.minutes=1",
    }  # fmt: skip
    for word in words:
        (other,) = specs(*[w for w in BASE if w.split("=")[0] != word.split("=")[0]], "model.norm=batch", word)
        assert other != plain and other.run_id == plain.run_id, word
    (science,) = specs(*BASE, "model.norm=batch", "recipe.statistics_samples=128")
    assert science.run_id != plain.run_id


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["batch=16", "recipe.micro_batch=4"], "free"),
        (["batch=4", "recipe.micro_batch=4"], "full"),
        (["batch=16", "recipe.micro_batch=16"], "full"),
        (["batch=4", "recipe.micro_batch=4", "svag=2"], "free"),  # its two draws are two gradients
        (["batch=16", "recipe.micro_batch=4", "measure.noise=full"], "full"),
        (["batch=4", "recipe.micro_batch=4", "measure.noise=free"], "free"),
        (["batch=4", "recipe.micro_batch=4", "measure.noise=none"], "none"),
    ],
)
def test_auto_measures_what_a_step_cannot_tell(words: list[str], kind: str) -> None:
    """Fails if a step of one gradient, which says nothing of noise, went without a measurement of its own."""
    (spec,) = specs("recipe.batch=4", *words)
    assert spec.noise == kind


LATER = ["batch=4", "recipe.batch=4", "recipe.samples=1024", "checkpoint.keep=[0.5,1]", "measure.noise_examples=64"]


def test_a_finished_run_is_measured_afterwards_and_not_trained(tmp_path: Path) -> None:
    """Full noise asked of a finished run comes from its kept checkpoints, and equals what the run itself would have
    recorded there. Fails if the run were trained anew, if its result or weights changed, if the checkpoints of [0.5, 1]
    were not kept, or if the measurement were done twice."""
    (plain,) = specs(*LATER, "measure.noise=none")
    (asked,) = specs(*LATER, "measure.noise=full")
    run_dir, throughout = prepare(tmp_path, plain), prepare(tmp_path / "throughout", asked)
    assert train.run(run_dir) == train.run(throughout) == "finished"
    assert [p.name for p in run_dir.kept()] == ["checkpoint-128.pt", "checkpoint-256.pt"]
    before, net, result, written = rows(run_dir), weights(run_dir), run_dir.result(), run_dir.newest.stat()
    assert run_dir.lacks_noise(asked) and not run_dir.lacks_noise(plain)

    prepare(tmp_path, asked)
    assert train.run_all([run_dir])
    after = rows(run_dir)
    assert after[: len(before)] == before
    measured = [r for r in rows(throughout) if r["kind"] == "noise" and r["step"] in (128, 256)]
    assert after[len(before) :] == measured and len(measured) == 2
    assert run_dir.newest.stat() == written and all(torch.equal(v, net[k]) for k, v in weights(run_dir).items())
    assert result is not None
    changed = run_dir.result()
    assert changed is not None and changed["metrics"] == result["metrics"] and "noise_dominated" in changed
    assert changed["records_checksum"] == run_dir.records_checksum((run_dir.path / "records.jsonl").stat().st_size)
    assert train.run_all([run_dir]) and rows(run_dir) == after  # once


def test_a_measurement_that_fails_leaves_the_run_finished(tmp_path: Path) -> None:
    """Fails if a finished run without checkpoints were called failed (and trained anew), or its want passed for met."""
    (plain,) = specs(*LATER, "measure.noise=none")
    (asked,) = specs(*LATER, "measure.noise=full")
    run_dir = prepare(tmp_path, plain)
    assert train.run(run_dir) == "finished"
    before, result = rows(run_dir), run_dir.result()
    for path in (*run_dir.kept(), run_dir.newest, run_dir.previous):
        path.unlink(missing_ok=True)
    prepare(tmp_path, asked)
    assert not train.run_all([run_dir])
    assert (run_dir.state(), run_dir.result(), rows(run_dir)) == ("finished", result, before)
    assert run_dir.lacks_noise(asked)


def test_records_do_not_depend_on_the_base_a_run_was_reached_from() -> None:
    """One run id, two bases: at κ = 2 and at κ = 4. Fails if a record held the ratio at one of them."""
    words = ["batch=16", "rule=none", "recipe.micro_batch=4", "recipe.samples=64", "measure.noise=free"]
    found = []
    for base in (4, 8):
        (spec,) = specs(*words, f"recipe.batch={base}")
        trainer = train.Trainer(spec)
        take_steps(trainer, 4)
        found.append((spec.run_id, spec.arms[0].kappa, measure.noise_records(trainer, 1)))
    (one, four, first), (other, two, second) = found
    assert (one, four, two) == (other, 4, 2) and first == second
