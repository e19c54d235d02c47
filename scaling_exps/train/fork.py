"""The fork test: how large may the batch be from here on? Measured, beside what the noise scale predicts.

From a checkpoint, branches at kappa = 1/2, 1, 2, 4, 8 train on for the same number of samples: weights as they are,
hyperparameters by the rule, second moments and step counts carried over by `scale`, learning rate held at its value at
the fork. Every repeat reads a data order of its own, new to the run; within a repeat all branches read the same one,
so that their differences are the batch size's and not the data's. The loss is that of the training distribution on
fixed samples that no branch trains on in this order.

What it tells: `branches`. (Branching: Merrill et al. 2025, 2505.23971, read second-hand; they reset the optimizer's
state and warm up again.)
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from rich.console import Console
from torch import Tensor

from scaling_exps.noise import estimators, validity
from scaling_exps.plan import Placement, RunSpec
from scaling_exps.records import RunDir, find
from scaling_exps.rules import OPTIMIZERS, BetaMap, Hyper, spelled
from scaling_exps.rules.scale import scale
from scaling_exps.train import checkpoint, ranks
from scaling_exps.train.branches import MORE, Branch, ForkError, Limit, limit_of, tabled
from scaling_exps.train.measure import evaluate
from scaling_exps.train.trainer import Trainer, mean_loss
from scaling_exps.words import Parser

CONSOLE = Console(stderr=True)
KAPPAS = (0.5, 1.0, 2.0, 4.0, 8.0)
NEAR = 0.02  # of a run: a checkpoint as near is the one that --at asks for
PROBE = 1024  # samples on which the loss is taken
NOISE_BATCHES = 64  # micro-batches of the noise-scale estimate


@dataclass(frozen=True)
class Fork:
    run_id: str
    rule: str
    step: int
    share: float  # of the run, at the fork
    samples_at_fork: int
    samples: int  # of each branch, at which losses are compared
    repeats: int
    tolerance: float
    branches: tuple[Branch, ...]
    by_tolerance: Limit
    by_steps: Limit
    noise: validity.Validity | None  # at the fork; None: nothing can be told


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
    progress: Callable[[float], None] = lambda seconds: None,
) -> Fork:
    """Branch off a checkpoint in `run_dir`, which is only read.

    Args:
        at: the checkpoint; None is the newest.
        kappas: batch sizes as multiples of the run's; 1 is added.
        repeats: data orders, >= 2.
        samples: length of a branch, a fifth of it more is trained; a multiple of every batch. None is 40 steps of the
            largest.
        tolerance: of the loss, relative to that of kappa = 1.
        rule: how hyperparameters move; None is the optimizer's own.
        beta_map: as in `scale`.
        progress: called with seconds: before the start with all that are expected (below 0), then with those of each
            branch.

    Raises:
        ForkError: no checkpoint, a batch that is no whole number, a length that is no multiple of every batch.
        RuleError: the rule refuses one of the batches; nothing has been trained then.
        PlanError, DataError, TrainError: the run, or its data, cannot be read.
    """
    spec = run_dir.spec()
    base_batch = spec.science.batch
    if spec.science.svag != 1:
        raise ForkError(f"{run_dir} is a SVAG run (svag={spec.science.svag}); fork a plain one")
    if spec.science.ramp:
        raise ForkError(f"{run_dir} has a ramp ({spec.science.batches}); fork a run of one batch")
    if repeats < 2:
        raise ForkError(f"repeats={repeats} must be >= 2: an interval needs a spread")
    if not 0 < tolerance < math.inf:
        raise ForkError(f"tolerance={tolerance} must be > 0 (a share of the loss)")
    kappas = sorted({*kappas, 1.0})
    batches = {k: round(k * base_batch) for k in kappas}
    if bad := [k for k in kappas if k <= 0 or batches[k] != k * base_batch]:
        raise ForkError(f"kappa={bad} times batch {base_batch} is no whole batch; choose other multiples")
    longest = math.lcm(*batches.values())
    samples = samples if samples is not None else -(-40 * max(batches.values()) // longest) * longest
    if samples < 1 or samples % longest:
        raise ForkError(
            f"samples={samples} must be a multiple of every batch {sorted(batches.values())}, that is of {longest}"
        )
    device = ranks.device()
    whole = (checkpoint.load(path, device) for path in ([at] if at else [run_dir.newest, run_dir.previous]))
    try:
        state = next(filter(None, whole), None)
    except OSError as e:
        raise ForkError(f"a checkpoint of {run_dir} cannot be read: {e.strerror} ({e.filename})") from e
    if state is None or state.get("run_id") != spec.run_id:
        raise ForkError(f"{at or run_dir} has no checkpoint of run {spec.run_id}: train it first, or let it write one")
    branches = {k: _Branching(spec, state, batches[k], samples, rule, beta_map) for k in kappas}
    pace = state["seconds"] / max(1, state["step"]) / spec.placement.accumulation  # of a micro-batch
    cost = {k: pace * b.spec.science.samples(b.steps) / b.spec.science.micro_batch for k, b in branches.items()}
    progress(-repeats * sum(cost.values()))
    noise = noise_scale(branches[1.0].trainer(None, 0))
    losses: dict[float, list[tuple[float, float]]] = {}
    for k, branch in branches.items():
        for r in range(repeats):
            losses.setdefault(k, []).append(branch.losses(noise.b_noise_point if noise else None, r))
            progress(cost[k])
    table = tabled(losses, base_batch, {k: b.spec.science.hyper for k, b in branches.items()})
    return Fork(
        run_id=spec.run_id,
        rule=rule or "the optimizer's own",
        step=state["step"],
        share=state["step"] / spec.science.steps,
        samples_at_fork=spec.science.samples(state["step"]),
        samples=samples,
        repeats=repeats,
        tolerance=tolerance,
        branches=tuple(table),
        by_tolerance=limit_of(table, "equal", tolerance),
        by_steps=limit_of(table, "later", 0.0),
        noise=noise,
    )


class _Branching:
    """One batch size of the fork: what it runs, and how to start it at the checkpoint."""

    def __init__(
        self, spec: RunSpec, state: dict[str, Any], batch: int, samples: int, rule: str | None, beta_map: BetaMap
    ) -> None:
        s = spec.science
        self.base_batch, self.state, self.rule, self.beta_map = s.batch, state, rule, beta_map
        share = s.schedule.multiplier(s.clock(state["step"]))
        if share == 0:
            raise ForkError("the schedule has brought the learning rate to 0 here; fork an earlier checkpoint")
        micro = math.gcd(batch, s.micro_batch) if batch % s.micro_batch else s.micro_batch
        held = replace(s.schedule, warmup_samples=0.0, decay="constant", total_samples=samples)
        science = replace(s, batch=batch, micro_batch=micro, steps=samples // batch, schedule=held)
        science = replace(science, ema=None, start=None)  # of the weights as they are, which the checkpoint has
        self.steps = math.floor(MORE * samples / batch + 1e-9)  # of the whole branch
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

    def losses(self, noise: float | None, repeat: int) -> tuple[float, float]:
        """Train the branch; the loss after the samples that are compared, and after 20% more."""
        t, found = self.trainer(noise, repeat), []
        for steps in (self.spec.science.steps, self.steps):
            while t.step < steps:
                t.train_step()
            t.check_finite()
            found.append(_probe(t))
        return found[0], found[1]


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


def noise_scale(t: Trainer) -> validity.Validity | None:
    """The noise at the trainer's weights, of NOISE_BATCHES micro-batches, as `noise.validity` reads a record."""
    n, b = NOISE_BATCHES, t.science.micro_batch

    def gradients(units: range) -> Iterator[Tensor]:
        def batch(i: int) -> tuple[Tensor, Tensor]:
            return t.stream.batch(i * b, (i + 1) * b)

        return estimators.unit_gradients(lambda x, y: mean_loss(t.net(x), y), t.parameters, batch, units, [])

    template = torch.cat([p.detach().flatten() for p in t.parameters])
    (estimate,) = estimators.full(gradients, n, b, [None], template)
    row = {"kind": "noise", "method": "full", "samples": n * b, **estimate.record(b)}
    return validity.assess([row], b, b)


def _noise_text(f: Fork) -> str:
    return "B_noise beyond measure" if f.noise is None else validity.scale_text(f.noise)


def render(f: Fork) -> str:
    """One checkpoint's branches as a table for people."""
    lines = [
        f"fork of run {f.run_id} at {f.share:.0%} (step {f.step:,}, {f.samples_at_fork:,} samples), rule: {f.rule}",
        f"{f.samples:,} samples a branch, {f.repeats} data orders; difference from kappa = 1, 95% interval:",
        f"{'batch':>7} {'kappa':>6} {'loss':>9}   at equal samples; after {MORE - 1:.0%} more",
    ]
    for b in f.branches:
        cells = (
            f"{d.mean:+8.2%} [{d.low:+.2%}, {d.high:+.2%}] {d.verdict(bound)}"
            for d, bound in ((b.equal, f.tolerance), (b.later, 0.0))
        )
        lines.append(f"{b.batch:>7} {b.kappa:>6g} {sum(b.losses) / len(b.losses):>9.5f}   {';  '.join(cells)}")
    top = f.branches[-1].batch
    return "\n".join(
        [*lines, f"largest batch: {f.by_tolerance.text(top)} by tolerance; {f.by_steps.text(top)} by steps; "
         f"{_noise_text(f)}"]
    )  # fmt: skip


def sentence(forks: Sequence[Fork]) -> str:
    """What all of it says, in one sentence; where nothing is decided it names no batch."""
    f = forks[0]
    named = ((f"within {f.tolerance:.1%} of the loss at equal samples", "by_tolerance"),
             (f"to the same loss in {MORE - 1:.0%} more steps at most", "by_steps"))  # fmt: skip
    said = []
    for words, which in named:
        limits = [(x, getattr(x, which)) for x in forks]
        if not any(limit.decided for _, limit in limits):
            said.append(f"{words}: undecided (more --repeats or --samples would tell)")
            continue
        where = (f"{limit.text(x.branches[-1].batch)} at {x.share:.0%} of the run" for x, limit in limits)
        said.append(f"{words}: {', '.join(where)}")
    noise = ", ".join(f"{_noise_text(x).removeprefix('B_noise ')} at {x.share:.0%}" for x in forks)
    return f"The largest batch {'; '.join(said)}; beside it B_noise {noise}."


def draw(forks: Sequence[Fork], file: Path) -> None:
    """The two limits and B_noise against the share of the run, with their intervals; ForkError if it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis, f = figure.subplots(), forks[0]
    top, base = f.branches[-1].batch, next(b.batch for b in f.branches if b.kappa == 1)
    series = [
        (f"within {f.tolerance:.1%} at equal samples", "tab:blue", "o", [x.by_tolerance for x in forks]),
        (f"{MORE - 1:.0%} more steps to the same loss", "tab:green", "s", [x.by_steps for x in forks]),
    ]
    shares = [x.share for x in forks]
    for label, colour, marker, limits in series:
        at = [(s, t) for s, t in zip(shares, limits, strict=True) if t.decided]
        y, low, high = ([float(getattr(t, k) or 1.2 * top) for _, t in at] for k in ("batch", "low", "high"))
        axis.plot([s for s, _ in at], y, color=colour, marker=marker, label=label)
        axis.fill_between([s for s, _ in at], low, high, color=colour, alpha=0.15, linewidth=0)
        axis.vlines([s for s, _ in at], low, high, color=colour)
    noise = [(x.share, x.noise.b_noise_point, x.noise.b_noise) for x in forks if x.noise and x.noise.b_noise_point]
    if noise:
        at_share, points, ends = zip(*noise, strict=True)
        axis.plot(at_share, points, "^--", color="black", label="B_noise")
        axis.vlines(at_share, *zip(*ends, strict=True), color="black", lw=1)
    axis.axhline(base, color="grey", lw=0.8, ls=":", label=f"the run's batch, {base:,}")
    axis.axhline(top, color="grey", lw=0.8, ls="--", label=f"largest tried, {top:,}; what lies above is not known")
    axis.set(xlabel="share of the run", ylabel="largest batch", yscale="log")
    axis.set_xticks(shares, [f"{s:.0%}" for s in shares])
    axis.set_yticks([b.batch for b in f.branches], [f"{b.batch:,}" for b in f.branches])
    axis.minorticks_off()
    axis.set_title(f"fork of run {f.run_id}: limits with 95% intervals; none where undecided", fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:  # ValueError: a format that matplotlib does not write
        raise ForkError(f"--figure {file}: {e}") from e


def kept_at(run_dir: RunDir, shares: Sequence[float]) -> list[Path]:
    """The kept checkpoint nearest to each share of the run, or the newest at its end.

    Raises:
        ForkError: none lies near a share (those that are there are named), or its learning rate is 0.
        PlanError: the run cannot be read.
    """
    science = run_dir.spec().science
    there = {int(path.stem.split("-")[1]) / science.steps: path for path in run_dir.kept()}
    if (run_dir.result() or {}).get("status") == "finished" and run_dir.newest.exists():
        there[1.0] = run_dir.newest
    chosen = []
    for share in shares:
        nearest = min(there, key=lambda s: abs(s - share), default=math.inf)
        if not abs(nearest - share) <= NEAR:
            names = ", ".join(f"{s:.3g}" for s in sorted(there)) or "none"
            raise ForkError(
                f"--at {share:g}: no checkpoint was kept there; kept in {run_dir}: {names} (shares of the run). Choose "
                "of them, or train with checkpoint.keep"
            )
        if science.schedule.multiplier(science.clock(round(nearest * science.steps))) == 0:
            raise ForkError(f"--at {share:g}: the schedule has brought the learning rate to 0 there; leave it out")
        chosen.append(there[nearest])
        if abs(nearest - share) * science.steps > 1:
            print(f"--at {share:g}: the nearest kept checkpoint is at {nearest:.3g}", file=sys.stderr)
    return list(dict.fromkeys(chosen))


class _Told:
    """Says how long it will take, then shows a bar on a terminal; of several forks in turn."""

    def __init__(self, forks: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, transient=True, console=CONSOLE, disable=not sys.stderr.isatty())
        self.task, self.left = self.bar.add_task("fork", total=None), forks
        self.forks = forks

    def __call__(self, seconds: float) -> None:
        if seconds < 0:
            if self.left == self.forks:
                expected = -seconds * self.forks
                print(f"about {expected / 60:.1f} min, at the speed at which the run was trained", file=sys.stderr)
                self.bar.update(self.task, total=expected)
            self.left -= 1
        else:
            self.bar.advance(self.task, seconds)


def main(words: list[str]) -> int:
    """`scalerun fork WORDS`: print the result; it raises as `fork` does."""
    parser = Parser(prog="scalerun fork", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run's folder, its id's beginning below runs/, or a checkpoint")
    parser.add_argument("--at", help="kept checkpoints as shares of the run, as 0.1,0.3,1 (default: the newest)")
    parser.add_argument("--kappa", default=",".join(f"{k:g}" for k in KAPPAS), help="multiples of its batch")
    parser.add_argument("--repeats", type=int, default=4, help="data orders (default 4)")
    parser.add_argument(
        "--samples", type=int, help="length of a branch (default: 40 steps of the largest batch); 20%% more is trained"
    )
    parser.add_argument("--tolerance", type=float, default=0.02, help="share of the loss (default 0.02)")
    parser.add_argument("--rule", help="default: the optimizer's own, see docs/rules.md")
    power = "power: β -> β^κ, for every κ; linear (default) ends at κ = 1/(1 - β1)"
    parser.add_argument("--beta-map", choices=["linear", "power"], default="linear", help=power)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the limits against the share of the run")
    parser.add_argument("--json", action="store_true", help="the result, for machines")
    options = vars(parser.parse_args(words))
    path, kappa, share, figure, as_json = (options.pop(name) for name in ("run_dir", "kappa", "at", "figure", "json"))
    kappas, shares = _numbers("--kappa", kappa, "0.5,1,2"), _numbers("--at", share or "", "0.1,0.3,1")
    run_dir, places = find(str(path.parent if path.suffix == ".pt" else path)), list[Path | None]([None])
    if path.suffix == ".pt":
        if shares:
            raise ForkError(f"--at {share} goes with the run's folder; {path} is a checkpoint already")
        places = [path]
    elif shares:
        places = [*kept_at(run_dir, shares)]
    if figure is not None and importlib.util.find_spec("matplotlib") is None:
        raise ForkError("--figure needs matplotlib: pip install 'scalerun[figures]'")
    if figure is not None and not figure.parent.is_dir():
        raise ForkError(f"--figure {figure}: there is no folder {figure.parent}")
    told, forks = _Told(len(places)), []
    with spelled("--beta-map power"), told.bar:
        for at in places:
            forks.append(fork(run_dir, at=at, kappas=kappas, progress=told, **options))
    if as_json:
        print(
            json.dumps(
                {
                    "sentence": sentence(forks),
                    "forks": [{**asdict(f), "noise": f.noise and f.noise.to_json()} for f in forks],
                },
                indent=1,
            )
        )
    else:
        print("\n\n".join([*map(render, forks), sentence(forks)]))
    if figure is not None:
        draw(forks, figure)
    return 0


def _numbers(name: str, given: str, example: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")] if given else []
    except ValueError:
        raise ForkError(f"{name} {given!r} must be numbers with commas between, as {example}") from None
