"""The loop, run for real: invariances, exact resume, refusals. One and two processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import msgspec
import pytest
import torch
from support import (
    ENVIRONMENT,
    ROOT,
    TINY,
    dataset,
    placed,
    prepare,
    rows,
    same_run,
    scalerun,
    specs,
    take_steps,
    weights,
    work,
    worker,
)

from scaling_exps import config, data, models, rules, train
from scaling_exps.records import BusyError, RunDir
from scaling_exps.train import checkpoint, measure

BN = [
    "model.norm=batch", "model.width=8", "recipe.micro_batch=16", "batch=64", "recipe.batch=64", "recipe.samples=1280",
]  # fmt: skip

BOTH = ["recipe.clip=0.5", "recipe.ema=0.9"]


def averages(run_dir: RunDir) -> dict[str, torch.Tensor]:
    """The averaged weights in the newest checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(run_dir.newest, weights_only=True)["average"]
    return state


@pytest.mark.slow
def test_world_size_and_accumulation_do_not_matter(tmp_path: Path) -> None:
    """20 steps of 4 micro-batches with BN: (1 process x 4), (2 x 2), (4 x 1). Fails if BN's evaluation statistics were
    per rank, if ranks took the same slice, if accumulation summed instead of averaged, if a rank clipped its own
    gradient before the ranks are averaged."""
    (spec,) = specs(*BN, *BOTH, "measure.evaluations=4", "measure.train_records=20")
    assert spec.science.steps == 20
    done = []
    for world in (1, 2, 4):
        run_dir = prepare(tmp_path / str(world), placed(spec, world))
        work(run_dir, world)
        done.append((rows(run_dir), weights(run_dir) | averages(run_dir)))
    assert any(r.get("gradient_norm", 0) > 0.5 for r in done[0][0])
    for other in done[1:]:
        for mine, theirs in zip(done[0][0], other[0], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                if isinstance(mine[key], str):
                    assert theirs[key] == mine[key], key
                elif mine["kind"] == "noise":  # differences of squared norms: rounding counts for more
                    assert theirs[key] == pytest.approx(mine[key], rel=2e-2, abs=1e-3), key
                elif key == "gradient_norm":
                    assert theirs[key] == pytest.approx(mine[key], rel=1e-4)
                else:
                    assert theirs[key] == pytest.approx(mine[key], abs=1e-5), key
        for name, tensor in done[0][1].items():
            torch.testing.assert_close(other[1][name].double(), tensor.double(), rtol=0, atol=1e-5, msg=name)


def test_the_loop_is_the_textbook_loop(tmp_path: Path) -> None:
    """The same run by hand: mean loss over the whole batch, torch's Adam, lr from the schedule. With GroupNorm the
    micro-batches must add up to exactly that."""
    (spec,) = specs("batch=32", "recipe.micro_batch=8", "recipe.samples=320")
    run_dir = prepare(tmp_path, spec)
    work(run_dir)
    s = spec.science
    torch.set_num_threads(1)
    net = models.build(s.model, s.dataset, s.seed)
    stream = data.stream(s.dataset, None, s.seed, torch.device("cpu"))
    optimizer = torch.optim.Adam(net.parameters(), s.hyper.lr, s.hyper.betas, s.hyper.eps)
    for k in range(s.steps):
        x, y = stream.batch(32 * k, 32 * (k + 1))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.param_groups[0]["lr"] = s.hyper.lr * s.schedule.multiplier(32 * (k + 0.5))
        optimizer.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(weights(run_dir)[name], tensor, rtol=0, atol=2e-5)


def test_same_command_same_bits(tmp_path: Path) -> None:
    (spec,) = specs("batch=8", "dataset.label_noise=0.3")
    a, b = prepare(tmp_path / "a", spec), prepare(tmp_path / "b", spec)
    work(a)
    work(b)
    same_run(a, b)


def test_evaluation_does_not_move_the_training(tmp_path: Path) -> None:
    (few,), (many,) = specs(*BN, "measure.evaluations=1"), specs(*BN, "measure.evaluations=20")
    a, b = prepare(tmp_path / "few", few), prepare(tmp_path / "many", many)
    work(a)
    work(b)
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[k], second[k]) for k in first)  # BN's buffers, too: recomputed at the end


def test_evaluation_statistics_do_not_depend_on_the_batch() -> None:
    """Same weights, batches of 16 and of 64, same micro-batch: the same test loss to the bit."""
    losses = []
    for batch in (16, 64):
        (spec,) = specs(*BN, f"batch={batch}")
        losses.append(measure.evaluate(train.Trainer(spec))["loss"])
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_to_the_same_bits(tmp_path: Path, processes: int) -> None:
    """SIGKILL of the whole group at random instants, until the run ends by itself: weights and records are those of an
    undisturbed run. Fails if any state were missing from the checkpoint, the average of the weights too, or records
    were written twice. The batch grows twice, so that kills fall on both sides of a switch."""
    often = ["measure.train_records=37", "measure.noise_records=5", "measure.evaluations=4"]
    words = ["recipe.samples=19200", "ramp=[[0,64],[0.3,128],[0.5,256]]", "checkpoint.minutes=0.0005", *often]
    spec = specs(*BN, *BOTH, *words)[-1]
    spec = placed(spec, processes)
    whole, broken = prepare(tmp_path / "whole", spec), prepare(tmp_path / "broken", spec)
    work(whole, processes)
    draw, kills = random.Random(processes), 0
    while not broken.result():
        target = last_step(broken) + draw.uniform(40, 120)
        process = forked.start(worker(broken, processes))
        while process.is_alive() and last_step(broken) < target:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.1))
        if process.is_alive():
            kills += 1
            for pid in _family_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.join()
        while broken.holder():  # the kernel has not yet removed them
            time.sleep(0.02)
        assert broken.state() in ("waiting", "interrupted", "finished")
    assert kills > 0
    same_run(broken, whole)
    assert all(torch.equal(averages(broken)[name], v) for name, v in averages(whole).items())


def last_step(run_dir: RunDir) -> int:
    return int((run_dir.newest_record() or {"step": 0})["step"])


def _family_of(pid: int) -> list[int]:
    """The process and all below it (torchrun puts its ranks into sessions of their own)."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(p for child in children for p in _family_of(int(child)))]


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    (spec,) = specs("batch=8")
    run_dir, trainer = prepare(tmp_path, spec), train.Trainer(spec)
    with run_dir.writer(0) as writer:
        take_steps(trainer, 3)
        checkpoint.save(trainer, run_dir, writer)
        take_steps(trainer, 1)
        checkpoint.save(trainer, run_dir, writer)
    whole = run_dir.newest.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        run_dir.newest.write_bytes(damaged)
        fresh = train.Trainer(spec)
        checkpoint.restore(fresh, run_dir)
        assert fresh.step == 3
    run_dir.newest.write_bytes(whole)
    checkpoint.restore(fresh, run_dir)
    assert fresh.step == 4


def test_a_non_finite_loss_stops_the_run_before_the_update(tmp_path: Path) -> None:
    (spec,) = specs("optimizer=sgd", "rule=none", "batch=8", "checkpoint.minutes=1e-9")
    hyper = replace(spec.science.hyper, lr=1e20)
    spec = msgspec.structs.replace(spec, science=msgspec.structs.replace(spec.science, hyper=hyper))
    run_dir = prepare(tmp_path, spec)
    assert train.run(run_dir) == "failed"
    good = torch.load(run_dir.newest, weights_only=True)
    assert f"not finite at step {good['step']} " in run_dir.reason()  # the newest checkpoint is the state just before
    assert all(torch.isfinite(v).all() for v in good["net"].values())


def test_svag_one_step_is_the_weighted_gradient() -> None:
    """The step's gradient at svag = 2 is r1 g1 + r2 g2 of two draws. Fails if they shared samples, or with √(2l-1)."""
    (spec,) = specs("batch=8", "recipe.micro_batch=4", "svag=2")
    trainer = train.Trainer(spec)
    gradients = []
    for start in (0, 8):
        trainer.net.zero_grad()
        x, y = trainer.stream.batch(start, start + 8)
        torch.nn.functional.cross_entropy(trainer.net(x), y).backward()
        gradients.append([p.grad.clone() for p in trainer.net.parameters()])
    trainer.net.zero_grad()
    trainer.train_step()
    r1, r2 = (1 + 7**0.5) / 2, (1 - 7**0.5) / 2
    for p, g1, g2 in zip(trainer.net.parameters(), *gradients, strict=True):
        torch.testing.assert_close(p.grad, r1 * g1 + r2 * g2, rtol=1e-4, atol=1e-6)
    assert rules.svag_weights(2, "adaptive") == (r1, r2)


def test_a_second_launcher_is_told_who_holds_the_run(tmp_path: Path) -> None:
    (spec,) = specs("batch=8")
    run_dir = prepare(tmp_path, spec)
    with run_dir.lock():
        assert run_dir.state() == "running"
        with pytest.raises(BusyError, match=r"is being run by process \d+ on "):
            train.run(run_dir)
    assert run_dir.state() == "waiting"
    assert train.run(run_dir) == "finished"


def test_networks_see_what_their_names_say() -> None:
    for model, count in (
        (config.ResNet(name="resnet56", depth=56, width=16, norm="batch"), 853_018),  # He et al. 2016, table 6: 0.85M
        (config.ResNet50(name="resnet50", norm="batch"), 23_520_842),
        (config.VGG16(name="vgg16", width=64, norm="batch"), 14_724_042),  # no biases before BN
        (config.VGG16(name="vgg16", width=64, norm="group"), 14_724_042),
    ):
        name = model.name
        net = models.build(model, dataset("cifar10"), 0, freeze_last=name == "vgg16")
        assert sum(p.numel() for p in net.parameters()) == count, name
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert models.has_batch_norm(net) == (model.norm == "batch")
        if name == "vgg16":
            last = net[-1].weight
            assert not last.requires_grad and last.std().item() == pytest.approx(0.01, rel=0.05)


def test_initial_weights_are_of_the_seed_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        model = config.ResNet(name="resnet8", depth=8, width=8, norm="group")
        return models.build(model, dataset("digits"), seed).conv.weight  # type: ignore[union-attr, return-value]

    before = torch.random.get_rng_state()
    a = first(0)
    torch.rand(3)
    assert torch.equal(a, first(0)) and not torch.equal(a, first(1))
    torch.random.set_rng_state(before)
    first(5)
    assert torch.equal(before, torch.random.get_rng_state())


# ---- as a user ----


def test_a_sweep_as_a_user_runs_it(tmp_path: Path) -> None:
    words = [
        "model.norm=batch", "model.width=8", "recipe.micro_batch=16", "recipe.batch=32", "recipe.epochs=null",
        "recipe.samples=640", "batch=[32,64]", "rule=[sqrt,none]", "launch.parallel=2",
    ]  # fmt: skip
    done = scalerun(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 3  # kappa = 1 once
    for run in runs:
        assert {"run.json", "records.jsonl", "result.json", "checkpoint.pt"} <= {p.name for p in run.iterdir()}
        assert (run.stat().st_mode & 0o077) == 0  # private to the user
        result = json.loads((run / "result.json").read_text())
        assert result["status"] == "finished" and result["versions"]["torch"] == torch.__version__.split("+")[0]
    again = scalerun(*words, cwd=tmp_path)
    assert again.returncode == 0 and "3 finished already" in again.stdout
    rows_json = json.loads(scalerun("status", "--json", cwd=tmp_path).stdout)
    assert [r["state"] for r in rows_json] == ["finished"] * 3
    table = json.loads(scalerun("report", "--json", cwd=tmp_path).stdout)
    assert (table["rows"][0]["rule"], table["rows"][0]["batch"]) == ("base", 32)
    drawn = scalerun("report", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "report" / "curves.png").stat().st_size > 20_000


@pytest.mark.slow
def test_two_devices_as_a_user_runs_them(tmp_path: Path) -> None:
    done = scalerun(
        "batch=64",
        "recipe.batch=64",
        "recipe.micro_batch=32",
        "recipe.epochs=null",
        "recipe.samples=256",
        "launch.devices=2",
        "logger=none",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_finished_run_is_not_aborted_at_the_interpreters_shutdown(tmp_path: Path) -> None:
    """gloo's threads outlive their group and sometimes abort the process while the interpreter shuts down; a finalizer
    that runs there does so always. A worker must be gone before."""
    (spec,) = specs("batch=32", "recipe.micro_batch=16", "recipe.samples=64")
    run_dir = prepare(tmp_path, placed(spec, 2))
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom scaling_exps.train import work\n\n\n"
        "class Late:\n    def __del__(self, abort=os.abort):\n        abort()\n\n\nlate = Late()\n"
        "sys.exit(work([Path(sys.argv[1])]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, script, run_dir.path], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert run_dir.state() == "finished"


def test_what_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    for words, says in (
        (["dataset=cifar10", "dataset.path=nowhere"], "does not exist"),
        (["model.width=6"], "multiple of 4"),
        (["dataset.train_size=5000"], "there are only 1437"),
        (["runs_dir=/proc/runs"], "cannot write runs under /proc/runs"),
    ):
        done = scalerun(*words, cwd=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert says in done.stderr and "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_directory_of_another_version_is_refused(tmp_path: Path) -> None:
    (spec,) = specs("batch=8")
    run_dir = prepare(tmp_path / "runs", spec)
    file = run_dir.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 1}))
    done = scalerun("batch=8", *TINY, cwd=tmp_path)
    assert done.returncode == 2 and "version 1" in done.stderr and "another runs_dir" in done.stderr, done.stderr
    assert [p.name for p in run_dir.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_the_same_command_goes_on(parallel: int, tmp_path: Path) -> None:
    words = [*TINY, "batch=4", "seed=[0,1]", "recipe.samples=40000", f"launch.parallel={parallel}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "scaling_exps.cli", *words], env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip
    while len(list((tmp_path / "runs").glob("*/records.jsonl"))) < parallel:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said and "goes on from the newest checkpoint" in said
    begun = [d for d in RunDir.under(tmp_path / "runs") if (d.path / "records.jsonl").exists()]
    assert begun and all(d.state() == "interrupted" and d.begun for d in begun)


def test_records_past_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    """A run that goes on from its last but one checkpoint, with all later records already written."""
    (spec,) = specs("batch=8", "checkpoint.minutes=1e-9")
    run_dir = prepare(tmp_path, spec)
    assert train.run(run_dir) == "finished"
    before, final = rows(run_dir), weights(run_dir)
    with open(run_dir.path / "records.jsonl", "a") as f:
        f.write('{"kind": "tr')  # and the line that the crash cut
    run_dir.clear_result()
    os.replace(run_dir.previous, run_dir.newest)
    assert train.run(run_dir) == "finished"
    assert rows(run_dir) == before
    assert all(torch.equal(final[k], v) for k, v in weights(run_dir).items())


def test_a_margin_is_fixed_before_the_run(tmp_path: Path) -> None:
    """Typed again with another margin, a run that has begun keeps its own; one that has not takes the new one."""
    (narrow,), (wide,) = specs("batch=8", "margin.train_loss=0.01"), specs("batch=8", "margin.train_loss=1")
    assert narrow.run_id == wide.run_id
    run_dir = prepare(tmp_path, wide)
    prepare(tmp_path, narrow)
    assert run_dir.spec().margin == {"train_loss": 0.01}
    assert train.run(run_dir) == "finished"
    prepare(tmp_path, wide)
    assert run_dir.spec().margin == {"train_loss": 0.01}


def test_invariant_adam_in_one_process_and_two(tmp_path: Path) -> None:
    """v is the mean over micro-batches of all ranks. Fails if a rank kept the squares of its own alone, or if what
    the network's evaluation or a noise measurement computes went into v."""
    words = ["optimizer=invariant_adam", "rule=invariant", "batch=16", "recipe.micro_batch=2", "recipe.samples=96"]
    done = []
    for world, noise in ((1, "full"), (2, "none")):
        (spec,) = specs(*words, f"measure.noise={noise}", "measure.noise_examples=16")
        assert spec.science.micro_batch * spec.placement.accumulation == 16
        run_dir = prepare(tmp_path / str(world), placed(spec, world))
        work(run_dir, world)
        done.append(weights(run_dir))
    for key, tensor in done[0].items():
        torch.testing.assert_close(done[1][key], tensor, rtol=1e-4, atol=1e-5)
