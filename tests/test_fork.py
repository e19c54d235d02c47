"""The fork test, run small for real: one digits run, branches off its checkpoint; the noise scale on a known case."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import prepare, specs

from scaling_exps import cli, records, train
from scaling_exps.records import RunDir
from scaling_exps.rules import RULES, Hyper, Move, RuleError
from scaling_exps.train import checkpoint
from scaling_exps.train import fork as module
from scaling_exps.train.branches import Branch, Difference, ForkError, _crossing, fork_test, limit_of
from scaling_exps.train.fork import _Branching, fork, kept_at, noise_scale


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Batch 4, 128 steps on real digits."""
    (spec,) = specs("recipe.samples=512", "measure.evaluations=1", "checkpoint.keep=[0.25,0.5]")
    folder = prepare(tmp_path_factory.mktemp("fork"), spec)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see test_scale
    assert train.run(folder) == "finished"
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PROBE", 512)
    monkeypatch.setattr(module, "NOISE_BATCHES", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def test_fork(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run_dir.path)
    result = fork(run_dir, repeats=2, samples=64)
    assert content(run_dir.path) == before  # it is only read
    assert [b.batch for b in result.branches] == [2, 4, 8, 16, 32]
    base = result.branches[1]
    assert base.equal == Difference(0, 0, 0) != base.later
    assert base.losses[0] != base.losses[1]  # a data order of its own for each repeat
    for b in result.branches:
        want = RULES["sqrt"].scale(base.hyper, Move(1, b.kappa))
        assert (b.hyper.lr, *b.hyper.betas) == pytest.approx((want.lr, *want.betas))
        assert b.hyper.eps == pytest.approx(want.eps)
        for d in (b.equal, b.later):
            assert d.low <= d.mean <= d.high
    for limit in (result.by_tolerance, result.by_steps):
        assert limit.low <= (limit.batch or 32) <= (limit.high or 32)
    assert cli.main(["fork", str(run_dir), "--repeats", "2", "--samples", "64", "--kappa", "2", "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["forks"]
    assert [tuple(b["losses"]) for b in again["branches"]] == [b.losses for b in result.branches[1:3]]  # to the bit
    text = module.render(result)
    assert "largest batch: " in text and "B_noise" in text


@pytest.mark.slow
def test_the_fork_sees_a_missing_rule(run_dir: RunDir) -> None:
    """This early the loss still falls: eight times the batch on an unscaled rate has moved far less."""
    late = {
        rule: fork(run_dir, kappas=[8], repeats=2, samples=512, rule=rule, tolerance=0.01) for rule in ("sqrt", "none")
    }
    difference = {rule: f.branches[-1].equal.mean for rule, f in late.items()}
    print(difference)
    assert difference["none"] > 0.02, difference
    assert difference["sqrt"] < 0.01, difference
    assert (late["none"].by_tolerance.batch or 32) < 32 and late["sqrt"].by_tolerance.batch is None


def test_a_branch_starts_where_the_checkpoint_is(run_dir: RunDir) -> None:
    state = checkpoint.load(run_dir.newest, torch.device("cpu"))
    assert state is not None
    spec = run_dir.spec()
    for batch in (16, 4):  # and the first must leave nothing behind for the second
        t = _Branching(spec, state, batch, 64, None, "linear").trainer(None, 0)
        for name, value in t.net.state_dict().items():
            torch.testing.assert_close(value, state["net"][name], rtol=0, atol=0)
        moved = t.optimizer.state_dict()["state"]
        for i, old in state["optimizer"]["state"].items():
            torch.testing.assert_close(moved[i]["exp_avg_sq"], old["exp_avg_sq"] * 4 / batch, rtol=1e-6, atol=0)
        order = t.stream.indices(0, 64)
    plain = train.Trainer(spec).stream.indices(512, 512 + 64)
    assert not torch.equal(order, plain)  # fresh data


def test_noise_scale_on_a_known_case() -> None:
    """Two classes, weight 0, label 1 only: one example's gradient is -x / 2. x ~ N(mu, I) in 40 dimensions with
    |mu|^2 = 1: the scale is 40. 32 x 32 examples tell it to about 20%."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.zeros(len(x)), x @ self.w], 1)

    def trainer(norm: float, micro: int = 32, seed: int = 0) -> SimpleNamespace:
        def batch(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            g = torch.Generator().manual_seed(start + 10_000 * seed)
            x = torch.randn(stop - start, 40, generator=g)
            x[:, 0] += norm
            return x, torch.ones(stop - start, dtype=torch.long)

        net = Net()
        return SimpleNamespace(
            net=net,
            parameters=list(net.parameters()),
            science=SimpleNamespace(micro_batch=micro),
            stream=SimpleNamespace(batch=batch),
        )

    known = noise_scale(trainer(1.0))
    assert known is not None and known.b_noise_point == pytest.approx(40, rel=0.3)
    assert known.b_noise[0] < 40 < known.b_noise[1] < 3 * known.b_noise[0]
    # 32 x 2 examples tell no number: one that is given there is of a selection (the old criterion's median was 41 of
    # those alone that were told from 0)
    few = [noise_scale(trainer(1.0, 2, seed)) for seed in range(40)]
    assert sum(x is None or x.b_noise_point is None for x in few) > 30
    nothing = noise_scale(trainer(0.0))  # no mean gradient: no number is made up
    assert nothing is None or nothing.b_noise_point is None


def test_kept_checkpoints_are_forked(run_dir: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Fails if the newest checkpoint were taken whatever is asked for, or if a share that was not kept were not named
    with those that are there; several give one curve, one sentence, and the time before."""
    _, half = run_dir.kept()
    words = ["--repeats", "2", "--samples", "16", "--kappa", "2", "--json"]
    assert cli.main(["fork", str(half), *words]) == 0
    assert [f["step"] for f in json.loads(capsys.readouterr().out)["forks"]] == [64]
    assert cli.main(["fork", str(half.with_name("checkpoint-65.pt")), *words]) == 2
    assert "checkpoint-65.pt" in capsys.readouterr().err
    figure = tmp_path / "fork.png"
    assert cli.main(["fork", str(run_dir), "--at", "0.24,1,0.5", "--figure", str(figure), *words]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [(f["step"], f["share"]) for f in told["forks"]] == [(32, 0.25), (128, 1.0), (64, 0.5)]
    assert "--at 0.24: the nearest kept checkpoint is at 0.25" in err and "about 0." in err and err.count("at ") < 6
    assert told["sentence"].count("at 25%") >= 1 and figure.read_bytes().startswith(b"\x89PNG")
    for at, message in (("0.4", "kept in .*: 0.25, 0.5, 1 "), ("0.5,half", "must be numbers")):
        with pytest.raises(ForkError, match=message):
            module.main([str(run_dir), "--at", at])
    with pytest.raises(ForkError, match="is a checkpoint already"):
        module.main([str(half), "--at", "0.5"])
    with pytest.raises(ForkError, match="there is no folder"):
        module.main([str(run_dir), "--figure", str(tmp_path / "none" / "a.png")])


def test_no_fork_where_the_learning_rate_is_zero(tmp_path: Path) -> None:
    """Fails if it were refused after minutes of training at the shares before it."""
    (spec,) = specs("recipe.samples=512", "recipe.decay=linear", "checkpoint.keep=[0.5]")
    run_dir = prepare(tmp_path, spec)
    for path in (run_dir.path / "checkpoint-64.pt", run_dir.newest):
        path.touch()
    run_dir.write_result({"status": "finished", "metrics": {}})
    assert kept_at(run_dir, [0.5]) == [run_dir.path / "checkpoint-64.pt"]
    with pytest.raises(ForkError, match="--at 1: the schedule has brought the learning rate to 0"):
        kept_at(run_dir, [0.5, 1])


def branch(kappa: float, difference: float, half: float, later: float = 0.0) -> Branch:
    h = Hyper(1e-3, (0.9,), 0, 0)
    two = (Difference(x, x - half, x + half) for x in (difference, later))
    return Branch(kappa, round(kappa * 100), h, (1.0,), (1.0,), *two)


def test_the_crossing_is_interpolated_in_the_logarithm() -> None:
    table = [branch(0.5, 0.3, 0.1), branch(1, 0, 0), branch(2, 0.0, 0.01), branch(4, 0.04, 0.01)]
    assert _crossing(table, "equal", "mean", 0.02) == (pytest.approx(100 * 2**1.5), True)
    assert _crossing(table, "equal", "low", 0.02)[0] > _crossing(table, "equal", "high", 0.02)[0]
    assert _crossing(table, "equal", "mean", 0.05) == (400.0, False)
    assert _crossing([branch(1, 0, 0), branch(2, 0.1, 0)], "equal", "mean", 0.02)[0] == pytest.approx(100 * 2**0.2)


def test_the_sentence_names_no_batch_where_nothing_is_decided() -> None:
    """Fails if the summary named the base batch, where the intervals of all branches hold the bound."""

    def made(*table: Branch) -> module.Fork:
        limits = limit_of(list(table), "equal", 0.02), limit_of(list(table), "later", 0.0)
        return module.Fork("0" * 12, "sqrt", 64, 0.5, 256, 160, 2, 0.02, table, *limits, None)

    open_ = made(branch(1, 0, 0, -0.1), branch(2, 0.01, 0.1), branch(4, 0.03, 0.1))
    text = module.sentence([open_])
    assert text.count("undecided (more --repeats or --samples would tell)") == 2 and "100" not in text
    clear = made(branch(1, 0, 0, -0.1), branch(2, 0.0, 0.01, -0.05), branch(4, 0.06, 0.01, 0.05))
    text = module.sentence([open_, clear])
    assert "undecided at 50% of the run, 252 [" in text and "in 20% more steps at most: undecided at 50%" in text
    assert clear.by_steps.batch == pytest.approx(100 * 2**1.5)  # half-way from -5% to +5%
    far = made(branch(1, 0, 0, -0.1), branch(2, 0.0, 0.001, -0.1))
    assert far.by_tolerance.text(200) == far.by_steps.text(200) == "above 200, the largest tried"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 1}, "repeats=1"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"kappas": [0.3]}, "no whole batch"),
        ({"samples": 100}, "a multiple of every batch"),
        ({"kappas": [100]}, 'beta_map="power"'),
        ({"rule": "linear_momentum"}, "allowed here"),
    ],
)
def test_refusals(run_dir: RunDir, settings: dict, message: str) -> None:
    with pytest.raises((ForkError, RuleError), match=message):
        fork(run_dir, **settings)


def test_the_command_names_the_power_map_in_its_own_words(run_dir: RunDir) -> None:
    with pytest.raises(RuleError, match="Use --beta-map power"):
        module.main([str(run_dir.path), "--kappa", "100", "--rule", "sqrt"])
    power = _Branching(run_dir.spec(), checkpoint.load(run_dir.newest, torch.device("cpu")), 400, 400, "sqrt", "power")
    base = run_dir.spec().science.hyper.betas
    assert power.spec.science.hyper.betas == pytest.approx([b**100 for b in base])


def test_the_command_takes_the_beginning_of_an_id(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `show`, `diff`, `rm` and `export` do. Fails if `fork` alone asked for the folder."""
    monkeypatch.setattr(records, "RUNS", run_dir.path.parent)
    assert cli.main(["fork", run_dir.path.name[:6], "--at", "0.123"]) == 2
    assert f"kept in {run_dir}" in capsys.readouterr().err


def test_command_refuses_with_one_message(run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_bytes((run_dir.path / "run.json").read_bytes())
    for argv, message in [
        ([str(tmp_path)], "has no checkpoint"),
        ([str(tmp_path / "none")], "is no run: give a run's folder, or the beginning of a run id"),
        ([str(tmp_path / "none" / "checkpoint.pt")], "is no run: give"),
        ([str(run_dir), "--kappa", "1,big"], "must be numbers"),
    ]:
        assert cli.main(["fork", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_loop_of_ones_own_is_forked() -> None:
    """SGD on a noisy quadratic at a tuned rate, scaled linearly: at 4 times the batch it is the same, at 64 times,
    where the rate is beyond what is stable, the test says beyond. Fails if a branch trained on from another one's
    state, or later losses were taken at equal samples."""

    def make_state(batch: int, repeat: int) -> dict[str, Any]:
        return {"x": 1.0, "batch": batch, "rng": random.Random(repeat), "steps": 0}

    def step(state: dict[str, Any]) -> None:
        noise = sum(state["rng"].gauss(0, 1) for _ in range(state["batch"])) / state["batch"]
        state["x"] -= 0.05 * state["batch"] * (state["x"] + noise)
        state["steps"] += 1

    tested = fork_test(
        make_state, step, lambda s: 1 + s["x"] ** 2 + 0 * s["steps"], base_batch=1, batches=[4, 64], samples=128,
        repeats=6, tolerance=0.5,
    )  # fmt: skip
    assert [b.batch for b in tested.branches] == [1, 4, 64] and tested.branches[0].equal.mean == 0
    assert [b.equal.verdict(0.5) for b in tested.branches] == ["within", "within", "beyond"]
    assert tested.by_tolerance.batch is not None and 4 <= tested.by_tolerance.low <= tested.by_tolerance.batch < 64
    assert all(x != y for b in tested.branches[:2] for x, y in zip(b.losses, b.later_losses, strict=True))
    with pytest.raises(ForkError, match=r"samples=100 must be a multiple of every batch, and is none of \[64\]"):
        fork_test(make_state, step, lambda s: 0.0, base_batch=1, batches=[4, 64], samples=100)
