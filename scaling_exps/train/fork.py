"""The fork test: how large may the batch be from here on? Measured, beside what the noise scale predicts.

From one checkpoint, branches at kappa = 1/2, 1, 2, 4, 8 train on for the same number of samples: weights as they are,
hyperparameters by the rule, second moments and step counts carried over by `scale`, learning rate held at its value at
the fork. Every repeat reads a data order of its own, new to the run; within a repeat all branches read the same one,
so that their differences are the batch size's and not the data's. The loss is that of the training distribution on
fixed samples that no branch trains on in this order.

The fork batch is where the mean difference of the loss from the kappa = 1 branch's, linear in log2 kappa between
branches, crosses the tolerance; its interval is where the two ends of the difference's 95% t-interval (paired,
n = repeats) do. (Branching: Merrill et al. 2025, 2505.23971, read second-hand; they reset the optimizer's state and
warm up again.)
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from scipy import stats
from torch import Tensor

from scaling_exps import optim
from scaling_exps.noise import estimators
from scaling_exps.plan import Placement, RunSpec
from scaling_exps.records import RunDir
from scaling_exps.rules import OPTIMIZERS, BetaMap, Hyper, spelled
from scaling_exps.rules.scale import scale
from scaling_exps.train import checkpoint, ranks
from scaling_exps.train.measure import evaluate
from scaling_exps.train.trainer import Trainer, mean_loss

KAPPAS = (0.5, 1.0, 2.0, 4.0, 8.0)
PROBE = 1024  # samples on which the loss is taken
NOISE_BATCHES = 64  # micro-batches of the noise-scale estimate


class ForkError(ValueError):
    """The run cannot be forked as asked; the message says what is needed."""


@dataclass(frozen=True)
class Branch:
    """One batch size: losses over repeats, and the paired difference from kappa = 1."""

    kappa: float
    batch: int
    hyper: Hyper
    losses: tuple[float, ...]
    difference: float  # mean, relative to the base's mean loss
    low: float  # 95% t-interval of it
    high: float
    verdict: str  # within | beyond | undecided


@dataclass(frozen=True)
class Noise:
    """Gradient-noise scale at the fork, in examples: tr(covariance) / |grad f|^2, with a jackknife 95% interval."""

    scale: float | None  # None: not enough data, the mean gradient is not told from zero
    low: float | None
    high: float | None
    batches: int
    micro_batch: int


@dataclass(frozen=True)
class Fork:
    run_id: str
    rule: str
    step: int
    samples_at_fork: int
    samples: int  # of each branch
    repeats: int
    tolerance: float
    branches: tuple[Branch, ...]
    batch: float  # the fork batch
    low: float
    high: float | None  # None: no branch is surely beyond the tolerance
    noise: Noise


def fork(
    run_dir: RunDir,
    *,
    at: Path | None = None,
    kappas: Sequence[float] = KAPPAS,
    repeats: int = 4,
    samples: int | None = None,
    tolerance: float = 0.02,
    rule: str | None = None,
    beta_map: BetaMap = "linear",
) -> Fork:
    """Branch off a checkpoint in `run_dir`, which is only read.

    Args:
        at: the checkpoint; None is the newest.
        kappas: batch sizes as multiples of the run's; 1 is added.
        repeats: data orders, >= 2.
        samples: length of a branch; a multiple of every batch. None is 32 steps of the largest.
        tolerance: of the loss, relative to that of kappa = 1.
        rule: how hyperparameters move; None is the optimizer's own.
        beta_map: as in `scale`.

    Raises:
        ForkError: no checkpoint, a batch that is no whole number, a length that is no multiple of every batch.
        RuleError: the rule refuses one of the batches; nothing has been trained then.
        PlanError, DataError, TrainError: the run, or its data, cannot be read.
    """
    spec = run_dir.spec()
    base_batch = spec.science.batch
    if spec.science.svag != 1:
        raise ForkError(f"{run_dir} is a SVAG run (svag={spec.science.svag}); fork a plain one")
    if repeats < 2:
        raise ForkError(f"repeats={repeats} must be >= 2: an interval needs a spread")
    if not 0 < tolerance < math.inf:
        raise ForkError(f"tolerance={tolerance} must be > 0 (a share of the loss)")
    kappas = sorted({*kappas, 1.0})
    batches = {k: round(k * base_batch) for k in kappas}
    if bad := [k for k in kappas if k <= 0 or batches[k] != k * base_batch]:
        raise ForkError(f"kappa={bad} times batch {base_batch} is no whole batch; choose other multiples")
    longest = math.lcm(*batches.values())
    samples = samples if samples is not None else -(-32 * max(batches.values()) // longest) * longest
    if samples < 1 or samples % longest:
        raise ForkError(
            f"samples={samples} must be a multiple of every batch {sorted(batches.values())}, that is of {longest}"
        )
    device = ranks.device()
    whole = (checkpoint.load(path, device) for path in ([at] if at else [run_dir.newest, run_dir.previous]))
    state = next(filter(None, whole), None)
    if state is None or state.get("run_id") != spec.run_id:
        raise ForkError(f"{at or run_dir} has no checkpoint of run {spec.run_id}: train it first, or let it write one")
    branches = {k: _Branching(spec, state, batches[k], samples, rule, beta_map) for k in kappas}
    noise = noise_scale(branches[1.0].trainer(None, 0))
    losses = {k: [b.loss(noise.scale, r) for r in range(repeats)] for k, b in branches.items()}
    reference = sum(losses[1.0]) / repeats
    table = []
    for k, b in branches.items():
        differences = [x - y for x, y in zip(losses[k], losses[1.0], strict=True)]
        mean, low, high = sum(differences) / repeats / reference, 0.0, 0.0
        if any(differences):
            interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
            low, high = float(interval.low) / reference, float(interval.high) / reference
        verdict = "within" if high <= tolerance else "beyond" if low > tolerance else "undecided"
        s = b.spec.science
        table.append(Branch(k, s.batch, s.hyper, tuple(losses[k]), mean, low, high, verdict))
    sure, crossed = _crossing(table, "low", tolerance)
    return Fork(
        run_id=spec.run_id,
        rule=rule or "the optimizer's own",
        step=state["step"],
        samples_at_fork=spec.science.samples(state["step"]),
        samples=samples,
        repeats=repeats,
        tolerance=tolerance,
        branches=tuple(table),
        batch=_crossing(table, "difference", tolerance)[0],
        low=_crossing(table, "high", tolerance)[0],
        high=sure if crossed else None,
        noise=noise,
    )


class _Branching:
    """One batch size of the fork: what it runs, and how to start it at the checkpoint."""

    def __init__(
        self, spec: RunSpec, state: dict[str, Any], batch: int, samples: int, rule: str | None, beta_map: BetaMap
    ) -> None:
        s = spec.science
        self.base_batch, self.state, self.rule, self.beta_map = s.batch, state, rule, beta_map
        share = optim.multiplier(s.schedule, s.clock(state["step"]))
        if share == 0:
            raise ForkError("the schedule has brought the learning rate to 0 here; fork an earlier checkpoint")
        micro = math.gcd(batch, s.micro_batch) if batch % s.micro_batch else s.micro_batch
        held = replace(s.schedule, warmup_samples=0.0, decay="constant", total_samples=samples)
        science = replace(s, batch=batch, micro_batch=micro, steps=samples // batch, schedule=held)
        science = replace(science, ema=None, start=None)  # of the weights as they are, which the checkpoint has
        placement = Placement(world_size=1, accumulation=batch // micro, compile=False)
        self.spec = replace(spec, science=science, placement=placement, measure=replace(spec.measure, noise="none"))
        optimizer = self.trainer(None, 0).optimizer  # refuses here, before anything is trained
        group, before = optimizer.param_groups[0], state["optimizer"]["param_groups"][0]
        betas = group[OPTIMIZERS[s.optimizer].field]
        hyper = Hyper(
            s.hyper.lr * share * group["lr"] / before["lr"],
            tuple(betas) if isinstance(betas, tuple | list) else (betas,),
            group.get("eps", s.hyper.eps),
            group["weight_decay"],
        )
        self.spec = replace(self.spec, science=replace(science, hyper=hyper))

    def trainer(self, noise: float | None, repeat: int) -> Trainer:
        """Restore the checkpoint and rescale the optimizer to this batch, on the data order of `repeat`."""
        t = Trainer(self.spec)
        t.net.load_state_dict(self.state["net"])
        t.optimizer.load_state_dict(copy.deepcopy(self.state["optimizer"]))  # torch would share the tensors
        s = self.spec.science
        how: dict[str, Any] = {"rule": self.rule, "beta_map": self.beta_map, "noise_scale": noise}
        scale(t.optimizer, batch=s.batch, base_batch=self.base_batch, **how)
        t.stream = t.stream.sibling(s.seed, f"fork/{repeat}")
        return t

    def loss(self, noise: float | None, repeat: int) -> float:
        """Train the branch; the loss at its end."""
        t = self.trainer(noise, repeat)
        while t.step < self.spec.science.steps:
            t.train_step()
        t.check_finite()
        return _probe(t)


def _probe(t: Trainer) -> float:
    """Mean training loss on fixed samples, weights as they are."""
    evaluate(t)  # leaves evaluation statistics where the network has any
    stream = t.stream.sibling(t.science.seed, "fork/probe")
    t.net.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, PROBE, 256):
            x, y = stream.batch(start, start + 256)
            total += 256 * float(mean_loss(t.net(x).float(), y))
    return total / PROBE


def noise_scale(t: Trainer) -> Noise:
    """The gradient-noise scale at the trainer's weights, from NOISE_BATCHES micro-batches (see `estimators.full`)."""
    n, b = NOISE_BATCHES, t.science.micro_batch

    def gradients(units: range) -> Iterator[Tensor]:
        def batch(i: int) -> tuple[Tensor, Tensor]:
            return t.stream.batch(i * b, (i + 1) * b)

        return estimators.unit_gradients(lambda x, y: mean_loss(t.net(x), y), t.parameters, batch, units, [])

    template = torch.cat([p.detach().flatten() for p in t.parameters])
    (estimate,) = estimators.full(gradients, n, b, [None], template)
    if not (estimate.inverse.low > 0 and estimate.trace.low > 0):  # told from 0: it is printed with its interval
        return Noise(None, None, None, n, b)
    inverse = estimate.inverse
    return Noise(1 / inverse.value, 1 / inverse.high, 1 / inverse.low, n, b)


def _crossing(table: list[Branch], which: str, tolerance: float) -> tuple[float, bool]:
    """(batch, whether it crossed): where `which` first exceeds the tolerance beyond kappa = 1; else the largest."""
    upward = [b for b in table if b.kappa >= 1]
    for near, far in itertools.pairwise(upward):
        a, z = getattr(near, which), getattr(far, which)
        if z > tolerance:
            share = (tolerance - a) / (z - a) if z > a else 0.0
            return near.batch * (far.batch / near.batch) ** min(1.0, max(0.0, share)), True
    return float(upward[-1].batch), False


def render(f: Fork) -> str:
    """The result as a table for people."""
    lines = [
        f"fork of run {f.run_id} at step {f.step} ({f.samples_at_fork:,} samples), rule: {f.rule}; "
        f"{f.samples:,} samples a branch, {f.repeats} data orders",
        f"{'batch':>7} {'kappa':>6} {'loss':>9}   difference from kappa = 1, 95% interval",
    ]
    for b in f.branches:
        loss = sum(b.losses) / len(b.losses)
        difference = f"{b.difference:+8.2%}  [{b.low:+.2%}, {b.high:+.2%}]"
        lines.append(f"{b.batch:>7} {b.kappa:>6g} {loss:>9.5f}   {difference}  {b.verdict}")
    top = f.branches[-1].batch
    high = f"{f.high:.0f}" if f.high is not None else f"more than {top}"
    lines.append(f"largest batch within {f.tolerance:.1%} of the loss: {f.batch:.0f}, interval {f.low:.0f} to {high}")
    n = f.noise
    if n.scale is None or n.low is None or n.high is None:
        lines.append(f"gradient-noise scale: not enough data in {n.batches} micro-batches of {n.micro_batch}")
    else:
        lines.append(f"gradient-noise scale at the fork: {n.scale:.0f} examples, interval {n.low:.0f} to {n.high:.0f}")
        apart = n.low > (f.high or math.inf) or n.high < f.low
        lines.append("the two " + ("DISAGREE: their intervals are apart" if apart else "do not contradict each other"))
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """`scalerun fork WORDS`: print the result; it raises as `fork` does."""
    parser = argparse.ArgumentParser(prog="scalerun fork", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="folder of a run, or one of its checkpoints; it is only read")
    parser.add_argument("--kappa", default=",".join(f"{k:g}" for k in KAPPAS), help="multiples of its batch")
    parser.add_argument("--repeats", type=int, default=4, help="data orders (default 4)")
    parser.add_argument("--samples", type=int, help="length of a branch (default: 32 steps of the largest batch)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="share of the loss (default 0.02)")
    parser.add_argument("--rule", help="default: the optimizer's own, see docs/rules.md")
    power = "power: β -> β^κ, for every κ; linear (default) ends at κ = 1/(1 - β1)"
    parser.add_argument("--beta-map", choices=["linear", "power"], default="linear", help=power)
    parser.add_argument("--json", action="store_true", help="the result, for machines")
    options = vars(parser.parse_args(words))
    path, kappa, as_json = (options.pop(name) for name in ("run_dir", "kappa", "json"))
    try:
        kappas = [float(k) for k in kappa.split(",")]
    except ValueError:
        raise ForkError(f"--kappa {kappa!r} must be numbers with commas between, as 0.5,1,2") from None
    at = path if path.suffix == ".pt" else None
    with spelled("--beta-map power"):
        result = fork(RunDir(path.parent if at else path), at=at, kappas=kappas, **options)
    print(json.dumps(asdict(result), indent=1) if as_json else render(result))
    return 0
