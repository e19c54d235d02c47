"""What a planned run costs: time, memory, FLOPs, each with the word that says where it is from. Torch-free.

1. A finished run in `runs_dir` of the same network, shape of data and kind of device, the nearest in micro-batch and
   accumulation.
2. `cost=probe`: a few real steps on this machine, in a process of its own (`train.probe`).
3. FLOPs and a share of a card's peak (`cost.device`, `cost.share`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from scaling_exps import plan
from scaling_exps.config import GPT, Config, Cost, LocalLaunch, Roberta, SlurmLaunch, TokenDataset
from scaling_exps.plan import PlanError, RunSpec
from scaling_exps.records import RunDir

# Peak of a card in FLOP/s, dense, at (float32 without tensor cores, bfloat16 with them), as NVIDIA's data sheets of the
# SXM forms give it (recalled, not looked up here). The loop asks for no TF32; cuDNN's convolutions take it all the
# same, so float32 networks of convolutions can be faster than this. None: the card has no bfloat16.
CARDS: dict[str, tuple[float, float | None]] = {
    "a100": (19.5e12, 312e12),
    "h100": (67e12, 989e12),
    "h200": (67e12, 989e12),
    "l4": (30.3e12, 121e12),
    "l40s": (91.6e12, 362e12),
    "rtx4090": (82.6e12, 165e12),
    "t4": (8.1e12, None),
    "v100": (15.7e12, None),
}
WORTH = 0.05  # of a run's time; less than that two probes on a machine that others use do not tell apart
START = 15.0  # seconds; torch.compile takes at least that long, so a run that is no longer is not probed
OTHER = ", of another micro-batch: cost=probe measures this one"  # no gain follows from it
PROBE_SECONDS = 600  # after which a probe is given up


class CostError(ValueError):
    """The probe could not run what is planned, as its launch could not; or the card has no such precision."""


@dataclass(frozen=True)
class _Finished:
    """A finished run, as far as its speed and memory depend on it."""

    spec: RunSpec
    rate: float  # samples a second, all processes
    memory: int  # bytes of one process
    device: str
    threads: int | None

    def text(self) -> str:
        s, place = self.spec.science, self.spec.placement
        threads = f", {self.threads} thread(s)" if self.threads and "nvidia" not in self.device.lower() else ""
        return (
            f"finished run {self.spec.run_id} ({self.device}{threads}; {place.world_size} × micro-batch "
            f"{s.micro_batch} × {place.accumulation})"
        )


def estimate(specs: list[RunSpec], configs: list[Config]) -> dict[str, dict[str, Any]]:
    """Run id -> the `cost` object of `plan --json`; of every value that is not None, `*_from` says where it is from.

    Time is that of training: evaluations, noise records and start-up come on top of it.

    Args:
        configs: the command; its base runs are looked up, too, for the gain: time at base / time here.

    Raises:
        CostError: the probe was refused what the launch would be, or failed.
    """
    config, bases = configs[0], []
    with contextlib.suppress(PlanError):  # a base run that cannot be planned has no time
        bases = plan.base_runs(configs)
    known: dict[str, dict[str, Any]] = {}  # by science without the seed
    of: dict[str, dict[str, Any]] = {}
    here = plan.device()
    finished: dict[str, list[_Finished]] = {}
    for spec in (*bases, *specs):
        key = repr((msgspec.structs.replace(spec.science, seed=0), spec.placement))
        if key not in known:
            shape = repr(_shape(spec))
            if shape not in finished:
                finished[shape] = list(_finished(spec, Path(config.runs_dir), config, here))
            known[key] = _one(spec, finished[shape], config, here)
        of[spec.run_id] = known[key]
    out = {}
    for spec in specs:
        cost, base = of[spec.run_id], of.get(spec.arms[0].base_run_id)
        timed = [c for c in (base, cost) if c and c["seconds"] and OTHER not in c["time_from"]]
        gain = timed[0]["seconds"] / timed[1]["seconds"] if len(timed) == 2 else None
        out[spec.run_id] = {**cost, "gain": gain}
    return out


def _one(spec: RunSpec, finished: list[_Finished], config: Config, here: str) -> dict[str, Any]:
    s, world, cost = spec.science, spec.placement.world_size, config.cost
    samples = s.samples(s.steps)
    probe = _probed(spec, config) if cost.probe else None
    near = [r for r in finished if probe is None or _same_step(r.spec, spec)]
    run = min(near, key=lambda r: _distance(r.spec, spec), default=None)
    per_example, flops_from = flops(spec), "counted from the network's size (6 a parameter and token, and attention)"
    if probe is not None:
        per_example, flops_from = probe["flops"], "counted by torch in the probe"
    seconds = memory = None
    time_from = memory_from = None
    if run is not None:
        scaled = "" if run.spec.placement.world_size == world else f", times {world} processes as if all were as fast"
        seconds = samples / run.rate * run.spec.placement.world_size / world
        other = "" if run.spec.science.micro_batch == s.micro_batch else OTHER
        time_from, memory, memory_from = run.text() + scaled + other, run.memory, run.text() + other
    elif probe is not None and (cost.device is None or _is_card(cost.device, here)):
        seconds = _seconds(spec, probe)
        time_from = memory_from = f"a probe on this machine ({probe['device']}, {probe['threads']} thread(s))"
        memory = probe["memory_bytes"]
        if world > 1:
            time_from += f", as if {world} processes were as fast and their reduction took no time"
    elif cost.device is not None and per_example is not None:
        peak = _peak(cost, s.precision)
        seconds = samples * per_example / (cost.share * peak * world)
        time_from = f"FLOPs at {cost.share:.0%} of {cost.device}'s {peak / 1e12:g} TFLOP/s ({s.precision})"
    total = None if per_example is None else samples * per_example
    hours = None if seconds is None else seconds * world / 3600
    return {
        "flops": total,
        "flops_from": None if total is None else flops_from,
        "seconds": seconds,
        "time_from": time_from,
        "memory_bytes": memory,
        "memory_from": memory_from,
        "device_hours": hours,
        "price": None if hours is None or cost.price is None else hours * cost.price,
    }


def lines(costs: dict[str, dict[str, Any]], config: Config) -> list[str]:
    """What to say of the whole table: what a time is, and what to do where there is none."""
    if any(cost["seconds"] for cost in costs.values()):
        out = ["time is that of training; evaluations, noise records and start-up come on top"]
    else:
        out = []
    if any(cost["seconds"] is None for cost in costs.values()):
        why = f"no finished run of this network under {config.runs_dir}/"
        if config.cost.device is not None:
            why += ", and only a probe counts its FLOPs"
        out.append(f"time and memory are not known ({why}): cost=probe measures a few steps on this machine")
    return out


# ---- finished runs ----


def _shape(spec: RunSpec) -> tuple[Any, ...]:
    """What a step's work depends on, beside its micro-batch and accumulation."""
    s, d = spec.science, spec.science.dataset
    data = (d.vocab, d.context, d.mask > 0) if isinstance(d, TokenDataset) else (tuple(d.shape), d.classes)
    return s.model, type(d).__name__, data, s.precision, s.svag > 1, spec.placement.compile


def _finished(spec: RunSpec, runs_dir: Path, config: Config, here: str) -> Iterable[_Finished]:
    """The finished runs of the same work on the kind of device that is planned for."""
    wanted = _shape(spec)
    for run_dir in RunDir.under(runs_dir):
        result = run_dir.result() or {}
        rate, memory, device = (result.get(k) for k in ("samples_per_second", "peak_memory_bytes", "device"))
        if result.get("status") != "finished" or not isinstance(device, str):
            continue
        if not isinstance(rate, int | float) or not 0 < rate < math.inf or not isinstance(memory, int):
            continue
        if config.cost.device is not None:
            alike = _is_card(config.cost.device, device)
        else:  # a cluster's cards are not known here, nor is one without a name: any is taken, and named
            gpus = config.launch.gpus if isinstance(config.launch, SlurmLaunch) else here == plan.UNNAMED_GPU
            any_like = gpus or isinstance(config.launch, SlurmLaunch)
            alike = _is_gpu(device) == gpus if any_like else device == here
        if not alike:
            continue
        try:
            other = run_dir.spec()
        except PlanError:
            continue
        if _shape(other) == wanted:
            threads = result.get("threads")
            yield _Finished(other, float(rate), memory, device, threads if isinstance(threads, int) else None)


def _is_gpu(device: str) -> bool:
    return re.search(r"nvidia|tesla|geforce|amd instinct", device, re.IGNORECASE) is not None


def _is_card(card: str, device: str) -> bool:
    """Whether a device's name is that of the card: 'NVIDIA L4' is an l4, 'NVIDIA L40S' is not."""
    return re.search(rf"\b{card}\b", device.lower().replace("rtx ", "rtx")) is not None


def _same_step(one: RunSpec, other: RunSpec) -> bool:
    """Whether a process's step is the same but for how often it accumulates, beyond once."""
    a, b = one.placement, other.placement
    same = (a.accumulation > 1) == (b.accumulation > 1) and a.world_size == b.world_size
    return same and one.science.micro_batch == other.science.micro_batch


def _distance(one: RunSpec, other: RunSpec) -> tuple[float, ...]:
    a, b = one.placement, other.placement
    return (
        abs(math.log(one.science.micro_batch / other.science.micro_batch)),
        abs(math.log(a.world_size / b.world_size)),
        abs(math.log(a.accumulation / b.accumulation)),
        one.science.optimizer != other.science.optimizer,
    )


# ---- the probe ----


_PROBED: dict[str, dict[str, Any]] = {}  # by `_step`, as long as this process lives


def _step(spec: RunSpec) -> str:
    """What a probe's answer depends on: network, micro-batch, optimizer, what is measured, the way to accumulate."""
    s = spec.science
    several = spec.placement.accumulation > s.draws
    return repr((_shape(spec), s.optimizer, s.micro_batch, several, spec.noise, s.svag > 1, s.freeze_last))


def _probed(spec: RunSpec, config: Config) -> dict[str, Any]:
    key = _step(spec)
    if key not in _PROBED:
        side_by_side = config.launch.parallel if isinstance(config.launch, LocalLaunch) else 1
        _PROBED[key] = _probe(spec, plan.threads(side_by_side * spec.placement.world_size))
    return _PROBED[key]


def _seconds(spec: RunSpec, probe: dict[str, Any]) -> float:
    """Of training a run as fast as the probe."""
    s = spec.science
    micro_batches = s.samples(s.steps) / s.micro_batch / spec.placement.world_size
    return float(s.steps * probe["update_seconds"] + micro_batches * probe["micro_seconds"])


def _probe(spec: RunSpec, threads: str) -> dict[str, Any]:
    s, how = spec.science, ", compiled" if spec.placement.compile else ""
    print(f"probe: {s.model.name}, micro-batch {s.micro_batch}{how} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "scaling_exps.train.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(spec.to_json()), env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True, text=True, timeout=PROBE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise CostError(f"the probe of {s.model.name} took over {PROBE_SECONDS} s: plan without cost=probe") from e
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise CostError(
            f"the probe of {s.model.name} at micro-batch {s.micro_batch} failed: {reason}. The launch would, too; or "
            "plan without cost=probe"
        )
    told: dict[str, Any] = json.loads(last)
    if "refused" in told:
        raise CostError(told["refused"])
    return told


# ---- launch.compile=auto ----


def compiled(specs: list[RunSpec], config: Config) -> tuple[list[RunSpec], list[str]]:
    """The specs, each with `launch.compile=auto` decided, and how that came about.

    A run is compiled where two probes on this machine, one of them compiled, say that it ends sooner, its start
    included. What was decided for a run that has begun in `runs_dir` holds for all that are like it.

    Raises:
        CostError: the probe without torch.compile was refused what the launch would be, or failed.
    """
    if config.launch.compile != "auto":
        return specs, []
    decided: dict[str, bool] = {}  # by `_alike`
    for run_dir in RunDir.under(Path(config.runs_dir)):
        with contextlib.suppress(PlanError):
            if run_dir.state() != "waiting":
                begun = run_dir.spec()
                decided.setdefault(_alike(begun), begun.placement.compile)
    out, lines = [], dict.fromkeys(
        f"launch.compile=auto: {_named(s)}: {'on' if decided[_alike(s)] else 'off'}, as for those that have begun"
        for s in specs if _alike(s) in decided
    )  # fmt: skip
    for spec in specs:
        key = _alike(spec)
        if key not in decided:
            decided[key], why = _decide(spec, config)
            lines[f"launch.compile=auto: {_named(spec)}: {'on' if decided[key] else 'off'}: {why}"] = None
        out.append(_placed(spec, decided[key]))
    return out, list(lines)


def _decide(spec: RunSpec, config: Config) -> tuple[bool, str]:
    """Whether a run is to be compiled, and why."""
    eager = _seconds(spec, _probed(spec, config))
    took = plan.amount(eager, "seconds")
    if eager < START:
        return False, f"without it the run takes {took}, and to start alone takes longer"
    try:
        probe = _probed(_placed(spec, True), config)
    except CostError as e:
        return False, f"it does not work here ({e})"
    with_it, start = _seconds(spec, probe), probe["start_seconds"]
    why = f"{took} without it, {plan.amount(with_it, 'seconds')} with it and {plan.amount(start, 'seconds')} to start"
    if with_it < eager:
        samples = spec.science.samples(spec.science.steps)
        why += f", so it pays from {start / (eager - with_it) * samples:,.0f} samples on"
    return with_it + start < (1 - WORTH) * eager, f"{why} (probes on this machine, {probe['threads']} thread(s))"


def _alike(spec: RunSpec) -> str:
    return f"{_step(_placed(spec, False))} {spec.science.steps} {spec.placement.world_size}"


def _named(spec: RunSpec) -> str:
    return f"{spec.science.model.name}, batch {spec.science.batch:,}"


def _placed(spec: RunSpec, compile_it: bool) -> RunSpec:
    return msgspec.structs.replace(spec, placement=msgspec.structs.replace(spec.placement, compile=compile_it))


# ---- FLOPs ----


def flops(spec: RunSpec) -> float | None:
    """FLOPs of training on one example, from the sizes of a language model; None for what only torch can count.

    A multiplication and an addition are two; forward, and twice that backward.
    """
    m, d = spec.science.model, spec.science.dataset
    if not isinstance(m, GPT | Roberta) or not isinstance(d, TokenDataset):
        return None
    width, tokens = m.width, d.context
    vocab = d.vocab + (d.mask > 0)
    weights = 12 * m.layers * width**2 + vocab * width + (width**2 if isinstance(m, Roberta) else 0)
    return float(tokens * (6 * weights + 12 * m.layers * tokens * width))


def _peak(cost: Cost, precision: str) -> float:
    assert cost.device is not None
    peak = CARDS[cost.device][precision == "bfloat16"]
    if peak is None:
        able = ", ".join(name for name, (_, bfloat16) in CARDS.items() if bfloat16)
        raise CostError(f"cost.device={cost.device} has no bfloat16: use precision=float32, or one of {able}")
    return peak
