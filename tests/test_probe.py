"""NoiseProbe: what it measures is right in every kind of training, and the training does not notice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from forked import ROOT
from support import specs, take_steps
from torch import Tensor, nn
from torch.nn import functional as F

from scaling_exps import NoiseProbe, train
from scaling_exps.noise.estimators import NoiseError
from scaling_exps.noise.examples import ExampleNorms
from scaling_exps.records import read_noise
from scaling_exps.train import measure

Loop = Callable[[nn.Module, torch.optim.Optimizer], list[NoiseProbe]]


def close(mine: dict[str, Any], theirs: dict[str, Any], rel: float) -> None:
    """Two records, to rounding: |∇f|² is a difference of numbers as large as tr Σ / batch."""
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if isinstance(value, float) and not key.startswith("b_noise"):  # its ends are quotients of near nothing
            assert theirs[key] == pytest.approx(value, rel=rel, abs=rel * mine["trace"] / mine["batch"]), key
        elif not isinstance(value, float):
            assert theirs[key] == value, key


# ---- the same as the runner's, on every number of processes ----


def test_the_probe_finds_what_the_runner_records() -> None:
    """On one run, to 1e-6. Fails if the first step were left out, or a part's norm taken after it was accumulated."""
    (spec,) = specs("batch=16", "recipe.batch=16", "recipe.micro_batch=4", "measure.noise=free")
    trainer = train.Trainer(spec)
    probe = NoiseProbe(trainer.net, trainer.optimizer, batch=16)
    take_steps(trainer, 12)
    (runner,) = measure.noise_records(trainer, 1)
    probed = probe.record()
    assert runner["units"] == 12 and probed["method"] == "free"
    close({k: runner[k] for k in runner if k != "t"}, {k: probed[k] for k in runner if k != "t"}, 1e-6)


@pytest.mark.slow
def test_processes_and_sharding_do_not_matter(tmp_path: Path) -> None:
    """One process with accumulation, DDP on two, FSDP2 on two and on four: the same records to 1e-5, of all methods,
    with clipping, a frozen parameter and two groups. Fails if |ĝ|² were of a clipped gradient, of one shard, or of
    what is not reduced yet; if a part's norm were of the reduced gradient; or a rank's examples counted as all."""
    found = []
    for kind, world in (("one", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)):
        script, file = str(ROOT / "tests/probed.py"), tmp_path / f"{kind}{world}"
        start = [script] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--start-method=fork",
                                            f"--nproc-per-node={world}", "--run-path", script]  # fmt: skip
        done = forked.run([*start, kind, str(file)])
        assert done.returncode == 0, done.stderr
        found.append(json.loads(file.read_text()))
    free, examples, moments, preconditioned, sign = found[0]
    assert [len(x) for x in found[0]] == [2] * 5
    assert (free[0]["units"], examples[1]["units"], moments[1]["units"]) == (16, 2, 4)
    for other in found[1:]:
        for i, (mine, theirs) in enumerate(zip(found[0][:4], other, strict=False)):  # sharded ones have no metric
            for a, b in zip(mine, theirs, strict=True):
                close(a, b, 1e-4 if i == 3 else 1e-5)  # where v is nearly 0, P enlarges what rounding makes
    assert preconditioned[1]["preconditioned_trace_low"] > 0 and preconditioned[1]["trace"] == free[1]["trace"]
    ddp = found[1][4][1]  # a rank has fewer degrees of freedom, and so another estimate of the spread
    for name in ("sign_trace", "sign_gradient_sq"):
        assert sign[1][f"{name}_low"] < ddp[name] < sign[1][f"{name}_high"]


# ---- in the optimizer's metric ----


@pytest.mark.parametrize("metric", ["preconditioned", "sign", "spectral"])
def test_the_noise_in_a_metric_is_the_known_one(metric: str) -> None:
    """Gradients of a 5 x 8 matrix with known spread and mean, B_noise 20 in the metric: the intervals hold the truth in
    90% of 40 windows or more, and reach less than fourfold. Fails if P were left out of one of the sums, a spread were
    that of a part, or ‖ĝ‖ of a window were taken for ‖∇f‖."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.full((5, 8), 0.5) if metric == "spectral" else torch.linspace(0.2, 2, 40).view(5, 8)
    mean, v = torch.randn(2, 5, 8, generator=generator)
    scale = 1 / (v.abs() + 0.1)
    noise, norm = {
        "preconditioned": ((scale * spread).square().sum(), (scale * mean).norm()),
        "sign": (spread.sum() ** 2, mean.abs().sum()),
        "spectral": (25 * 8 * spread[0, 0] ** 2, torch.linalg.svdvals(mean).sum()),
    }[metric]
    truth = {"trace": float(noise), "gradient_sq": float(noise) / 20, "inverse": 1 / 20}
    mean *= math.sqrt(truth["gradient_sq"]) / norm
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(5, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-12, betas=(0.5, 0.9))
    probe = NoiseProbe(model, optimizer, batch=16, metric=metric, window=10**9)
    inside = []
    for step in range(41 * 24):
        for _ in range(4):
            x = mean + spread * torch.randn(4, 5, 8, generator=generator)
            ((model.weight * x).sum((1, 2)).mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[model.weight]
        state["exp_avg_sq"], state["step"] = (v.abs() + 0.1 - 1e-8).square(), torch.tensor(1e4)
        if step % 24 == 23:
            e = probe.estimate(metric=True)
            inside.append([getattr(e, k).low <= x <= getattr(e, k).high for k, x in truth.items()])
            probe.record()
    first, *_, record = probe.records
    assert torch.tensor(inside[1:]).float().mean(0).min() >= 0.9
    assert math.isfinite(record["trace_low"]) and record[f"{metric}_b_noise_high"] < 4 * record[f"{metric}_b_noise_low"]
    assert probe.log()[f"noise/{metric}_b_noise_high"] > 0
    assert metric == "preconditioned" or f"{metric}_b_noise_low" not in first  # no direction yet


# ---- single examples ----


class Layers(nn.Module):
    """One of each kind that is covered, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, 8, padding_idx=0), nn.Embedding(6, 8)
        self.first = nn.Parameter(torch.randn(1, 6, 8))
        self.norm, self.rms, self.wide = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 40)
        self.line = nn.Conv1d(40, 8, 3, padding=1, stride=2)
        self.image = nn.Conv2d(1, 6, 3, padding=1, dilation=2, bias=False)
        self.depth = nn.Conv2d(6, 6, (1, 3), padding=1, groups=3)
        self.group, self.twice, self.head = nn.GroupNorm(2, 6), nn.Linear(8, 8), nn.Linear(8, 13, bias=False)
        self.head.weight, self.flat = self.words.weight, nn.Linear(6, 8)
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:  # (B, 6) -> (B, 13)
        h = self.words(x) + self.places(torch.arange(6)[None]) + self.first
        h = self.rms(self.twice(self.twice(self.norm(h)))) + self.head(h)[..., :8]
        h = self.line(self.wide(h).relu().mT).relu_().mT  # (B, 3, 8)
        images = self.group(self.depth(self.image(h.unsqueeze(1))))
        return self.head(self.flat(images.mean((2, 3)))) + h.sum()


def test_norms_of_single_examples_are_those_of_their_gradients() -> None:
    """Against a backward pass for each example, layer by layer in one sum: exact to float32, in-place activation,
    padding, groups, dilation and stride included; what is called twice, broadcast over the batch, frozen or outside of
    layers is not covered, and a weight that Embedding and Linear share is only while each is called once."""
    torch.manual_seed(0)
    net, x = Layers(), torch.randint(13, (5, 6))
    x[0, :3] = 0
    for tied in (False, True):
        if tied:  # one call of the head: then the shared weight is covered, too

            class Once(Layers):
                def forward(self, x: Tensor) -> Tensor:
                    return self.head(self.norm(self.words(x)).mean(1))

            net = Once()
        heard = ExampleNorms(net, lambda: None)
        for _ in range(2):  # the first pass tells what is covered
            F.cross_entropy(net(x), x[:, 0]).backward()
            examples, total = heard.take()
        assert examples == 5 and total is not None
        names = {n for n, p in net.named_parameters() if any(p is q for q in heard.params)}
        assert names == (
            {"words.weight", "norm.weight"} if tied else
            {f"{m}.{n}" for m in ("wide", "line", "depth", "group", "flat") for n in ("weight", "bias")}
            | {"norm.weight", "rms.weight", "image.weight"}
        )  # fmt: skip
        truth = 0.0
        for i in range(5):
            loss = F.cross_entropy(net(x[i : i + 1]), x[i : i + 1, 0]) / 5
            truth += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, heard.params))
        for handle in heard.handles:
            handle.remove()
        assert float(total) == pytest.approx(truth, rel=1e-5)


# ---- any training ----


def regression(net: nn.Module, optimizer: torch.optim.Optimizer, parts: int = 1, steps: int = 40, **how: Any) -> None:
    """Steps of 8 examples in so many parts, on data of its own."""
    scaler, probe = how.get("scaler"), how.get("probe")
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        batches = x.chunk(parts) if probe is None else probe.split((x, {"x": x}), parts)
        for part in batches:
            loss = (net(part[0] if probe else part) - 1).square().mean() / parts
            (scaler.scale(loss) if scaler else loss).backward()
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        optimizer.zero_grad()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))


@pytest.mark.parametrize(("model", "parts"), [("gpt", 1), ("gpt", 2), ("resnet8", 1), ("resnet8", 2)])
def test_a_probed_run_ends_on_the_same_bits_and_keeps_no_trace(model: str, parts: int) -> None:
    """Weights and moments, under every method at once; after `detach` no hook is left. Fails if a hook changed what
    flows, drew a random number, or stayed."""
    states = []
    words = ["model=gpt", "model.layers=1", "model.width=32"] if model == "gpt" else []
    for probed in (False, True):
        (spec,) = specs(*words, f"batch={4 * parts}", f"recipe.batch={4 * parts}", "recipe.micro_batch=4",
                        "measure.noise=none")  # fmt: skip
        trainer = train.Trainer(spec)
        probes = [
            NoiseProbe(trainer.net, trainer.optimizer, batch=4 * parts, method=m, window=2)
            for m in ("auto", "free", "examples", "moments") if probed
        ]  # fmt: skip
        take_steps(trainer, 5)
        for probe in probes:
            probe.detach()
        moments = [m for s in trainer.optimizer.state.values() for m in s.values()]
        states.append([*trainer.net.state_dict().values(), *moments])
        assert not any(p._backward_hooks for p in trainer.net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.net.modules())
        assert not trainer.optimizer._optimizer_step_pre_hooks and not trainer.optimizer._optimizer_step_post_hooks
        take_steps(trainer, 1)
    assert all(map(torch.equal, *states))


def test_scalers_compilers_and_clipping_do_not_matter() -> None:
    """A GradScaler, a compiled network, a loss that is not divided: B_noise is the plain loop's, and with the scaler
    given so is tr Σ. Fails if the parts were in the scaler's units and their mean was not."""

    def measured(parts: int = 4, scaler: Any = None, given: bool = False, compiled: bool = False) -> dict[str, Any]:
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        model: Any = torch.compile(net, backend="aot_eager") if compiled else net
        probe = NoiseProbe(model, optimizer, batch=8, scaler=scaler if given else None, window=1000)
        regression(model, optimizer, parts, scaler=scaler)
        return probe.record()

    plain = measured()
    close(plain, measured(compiled=True), 1e-4)
    for given in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaled = measured(scaler=scaler, given=given)
        assert scaled["kappa_r"] == pytest.approx(plain["kappa_r"], rel=1e-4)
        assert (scaled["trace"] == pytest.approx(plain["trace"], rel=1e-4)) == given
    assert measured(parts=1, compiled=True)["method"] == "moments"


def test_a_step_of_one_part_has_an_estimate_with_its_name() -> None:
    """One process, no accumulation. `auto` takes examples; where the network normalises over the batch, moments; where
    the user cuts the batch, halves. `free` says nothing there, and divides by no zero. A batch that is cut off and one
    that is not finite are left out."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    probes = {m: NoiseProbe(net, optimizer, batch=8, method=m, window=400) for m in ("auto", "free", "moments")}
    regression(net, optimizer, steps=400)
    records = {m: p.records[0] for m, p in probes.items()}
    assert [r["method"] for r in records.values()] == ["examples", "free", "moments"]
    assert [r["units"] for r in records.values()] == [
        50,
        0,
        18,
    ]  # every eighth step; blocks of 20 steps but the first 2
    assert "trace" not in records["free"] and records["auto"]["trace_low"] > 0
    assert records["auto"]["covered"] == 1.0
    for p in probes.values():
        p.detach()
    halves = NoiseProbe(net, optimizer, batch=8, window=400)
    regression(net, optimizer, 2, steps=20, probe=halves)
    net(torch.ones(4, 6)).sum().backward()
    optimizer.step()  # a step that ends early
    optimizer.zero_grad()
    regression(net, optimizer, 2, steps=2, probe=halves)
    assert halves.record()["method"] == "halves" and halves.records[0]["units"] == 22
    with pytest.raises(NoiseError, match="5 examples do not make 2 equal parts"):
        next(halves.split(torch.ones(5, 2)))
    normed = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    for optimizer, method, left_out in (
        (torch.optim.SGD(normed.parameters(), lr=0.01, momentum=0.9), "moments", ""),
        (torch.optim.SGD(normed.parameters(), lr=0.01), "auto", "no moments: SGD keeps no average"),
    ):
        with NoiseProbe(normed, optimizer, batch=8) as probe:
            regression(normed, optimizer, steps=200)
        assert probe.method == method and left_out in probe.sentence()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"method": "half"}, "method='half' must be one of auto, free, examples, moments"),
        ({"batch": 0}, "batch=0 must be a whole number >= 1"),
        ({"step": -1}, "step=-1 must be a whole number >= 0"),
        ({"file": "."}, "file='.' must be a file, as noise.jsonl"),
        ({"file": "none/noise.jsonl"}, "in a folder that is there"),
        ({"batch": 8.0}, "batch=8.0 must be a whole number >= 1"),
        ({"window": True}, "window=True must be a whole number >= 1"),
        ({"metric": "adam"}, "metric='adam' must be one of preconditioned, sign, spectral"),
        ({"metric": "sign", "method": "moments"}, "metric=sign: method=moments has no parts"),
        ({"metric": "sign", "scaler": object()}, "metric=sign: a scaler's units change"),
        ({"metric": "preconditioned"}, "metric=preconditioned: SGD has no second moment"),
        ({"method": "moments"}, "method=moments: SGD keeps no average of the gradient"),
        ({"method": "examples"}, "method=examples: the model normalises over the batch"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(how: dict[str, Any], told: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    with pytest.raises(NoiseError, match=told):
        NoiseProbe(net, torch.optim.SGD(net.parameters(), lr=0.01), **{"batch": 8, **how})
    with pytest.raises(NoiseError, match=r"NoiseProbe\(SGD, Sequential\) takes an nn.Module and its torch optimizer"):
        NoiseProbe(torch.optim.SGD(net.parameters()), net, batch=8)
    with pytest.raises(NoiseError, match="the optimizer has none of the model's parameters"):
        NoiseProbe(net, torch.optim.SGD(network().parameters()), batch=8)
    assert not any(m._forward_hooks for m in net.modules())


# ---- what it says ----


def test_records_lie_in_a_file_and_tell_what_to_expect(tmp_path: Path) -> None:
    """A resumed training goes on in its file, from its step. Fails if records beyond the step were kept twice."""
    file, net = tmp_path / "noise.jsonl", network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    with NoiseProbe(net, optimizer, batch=8, window=20, file=file) as probe:
        regression(net, optimizer, 4, steps=80)
    assert read_noise(file) == probe.records and [r["step"] for r in probe.records] == [20, 40, 60, 80]
    told = probe.log(32)
    assert math.isfinite(told["noise/b_noise_low"]) and told["noise/deviation_32"] < 1
    assert "noise at batch 8: B_noise " in probe.sentence(32)
    assert "; at 32 the displacement changes by -" in probe.sentence(32)
    with NoiseProbe(net, optimizer, batch=8, window=20, file=file, step=40) as probe:
        regression(net, optimizer, 4, steps=20)
    assert [r["step"] for r in read_noise(file)] == [20, 40, 60]
