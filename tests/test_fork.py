"""The fork test, run small for real: one digits run, branches off its checkpoint; the noise scale on a known case."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import prepare, specs

from scaling_exps import cli, train
from scaling_exps.records import RunDir
from scaling_exps.rules import RULES, Hyper, Move, RuleError
from scaling_exps.train import checkpoint
from scaling_exps.train import fork as module
from scaling_exps.train.fork import Branch, ForkError, _Branching, _crossing, fork, noise_scale


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Batch 4, 128 steps on real digits."""
    (spec,) = specs("recipe.samples=512", "measure.evaluations=1", "checkpoint.keep=[0.5]")
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
    assert (base.difference, base.low, base.high) == (0, 0, 0)
    assert base.losses[0] != base.losses[1]  # a data order of its own for each repeat
    for b in result.branches:
        want = RULES["sqrt"].scale(base.hyper, Move(1, b.kappa))
        assert (b.hyper.lr, *b.hyper.betas) == pytest.approx((want.lr, *want.betas))
        assert b.hyper.eps == pytest.approx(want.eps)
        assert b.low <= b.difference <= b.high
    assert result.low <= result.batch <= (result.high or 32)
    assert cli.main(["fork", str(run_dir), "--repeats", "2", "--samples", "64", "--kappa", "2", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [tuple(b["losses"]) for b in again["branches"]] == [b.losses for b in result.branches[1:3]]  # to the bit
    text = module.render(result)
    assert "largest batch within" in text
    assert "gradient-noise scale" in text


def test_the_fork_sees_a_missing_rule(run_dir: RunDir) -> None:
    """This early the loss still falls: eight times the batch on an unscaled rate has moved far less."""
    late = {
        rule: fork(run_dir, kappas=[8], repeats=2, samples=512, rule=rule, tolerance=0.01) for rule in ("sqrt", "none")
    }
    difference = {rule: f.branches[-1].difference for rule, f in late.items()}
    print(difference)
    assert difference["none"] > 0.02, difference
    assert difference["sqrt"] < 0.01, difference
    assert late["none"].batch < late["sqrt"].batch == 32


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
    assert known.scale == pytest.approx(40, rel=0.3)
    assert known.low < 40 < known.high
    assert known.high / known.low < 3
    # 32 x 2 examples: without the correction of |g|^2 the median would be 25
    few = sorted(x for seed in range(40) if (x := noise_scale(trainer(1.0, 2, seed)).scale) is not None)
    assert 32 < few[len(few) // 2] < 52, few
    nothing = noise_scale(trainer(0.0))  # no mean gradient: no number is made up
    assert nothing.scale is None or nothing.high > 1000


def test_a_kept_checkpoint_is_forked(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the newest checkpoint were taken whatever is asked for, or another run's were."""
    (kept,) = run_dir.kept()
    words = ["--repeats", "2", "--samples", "16", "--kappa", "2", "--json"]
    assert cli.main(["fork", str(kept), *words]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 64
    assert cli.main(["fork", str(kept.with_name("checkpoint-65.pt")), *words]) == 2
    assert "checkpoint-65.pt" in capsys.readouterr().err


def branch(kappa: float, difference: float, half: float) -> Branch:
    h = Hyper(1e-3, (0.9,), 0, 0)
    return Branch(kappa, round(kappa * 100), h, (), difference, difference - half, difference + half, "")


def test_the_crossing_is_interpolated_in_the_logarithm() -> None:
    table = [branch(0.5, 0.3, 0.1), branch(1, 0, 0), branch(2, 0.0, 0.01), branch(4, 0.04, 0.01)]
    assert _crossing(table, "difference", 0.02) == (pytest.approx(100 * 2**1.5), True)
    assert _crossing(table, "low", 0.02)[0] > _crossing(table, "high", 0.02)[0]
    assert _crossing(table, "difference", 0.05) == (400.0, False)
    assert _crossing([branch(1, 0, 0), branch(2, 0.1, 0)], "difference", 0.02)[0] == pytest.approx(100 * 2**0.2)


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


def test_command_refuses_with_one_message(run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_bytes((run_dir.path / "run.json").read_bytes())
    for argv, message in [
        ([str(tmp_path)], "has no checkpoint"),
        ([str(tmp_path / "none")], "no readable run.json"),
        ([str(run_dir), "--kappa", "1,big"], "must be numbers"),
    ]:
        assert cli.main(["fork", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
