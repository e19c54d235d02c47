"""The paper-exact optimizers against the paper's recurrences; the schedules against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from scaling_exps import optim
from scaling_exps.plan import Schedule
from scaling_exps.rules import Hyper

GRADS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drive(optimizer: torch.optim.Optimizer, p: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_paper_rmsprop_is_the_recurrence() -> None:
    """Fails if v were updated before the step, eps sat inside the root, or v were bias-corrected."""
    lr, beta, eps, v0 = 0.1, 0.9, 0.05, 0.3
    p = torch.ones(5, dtype=torch.float64)
    theta, v = p.clone(), torch.full_like(p, v0)
    for g in GRADS:
        theta, v = theta - lr * g / (v.sqrt() + eps), beta * v + (1 - beta) * g * g
    torch.testing.assert_close(
        drive(optim.PaperRMSprop([p], lr, beta, eps, v0=v0), p, GRADS), theta, rtol=1e-13, atol=0
    )


def test_paper_adam_is_the_recurrence() -> None:
    lr, b1, b2, eps = 0.1, 0.8, 0.9, 0.05
    p = torch.ones(5, dtype=torch.float64)
    theta, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
    for k, g in enumerate(GRADS):
        m = b1 * m + (1 - b1) * g
        if k:
            theta = theta - lr * (m / (1 - b1 ** (k + 1))) / ((v / (1 - b2**k)).sqrt() + eps)
        v = b2 * v + (1 - b2) * g * g
    torch.testing.assert_close(drive(optim.PaperAdam([p], lr, (b1, b2), eps), p, GRADS), theta, rtol=1e-13, atol=0)


def test_rmsprop_is_torchs_adam_without_momentum() -> None:
    hyper = Hyper(0.1, (0.0, 0.9), 1e-8, 0.1)
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = optim.build("rmsprop", [p], hyper)
    assert isinstance(optimizer, torch.optim.Adam)
    theta, v = torch.ones(5), torch.zeros(5)
    for k, g in enumerate(GRADS.float()):
        g = g + 0.1 * theta  # L2 inside the gradient
        v = 0.9 * v + 0.1 * g * g
        theta = theta - 0.1 * g / ((v / (1 - 0.9 ** (k + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(drive(optimizer, p, GRADS.float()), theta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "paper_adam", "paper_rmsprop", "sgd"])
def test_state_survives_a_checkpoint(name: str) -> None:
    betas = {"sgd": (0.9,), "paper_rmsprop": (0.9,)}.get(name, (0.8, 0.9))
    hyper = Hyper(0.1, betas, 1e-8, 0.01)
    p = torch.nn.Parameter(torch.ones(5))
    whole = drive(optim.build(name, [p], hyper), p, GRADS.float()).clone()
    q = torch.nn.Parameter(torch.ones(5))
    first = optim.build(name, [q], hyper)
    drive(first, q, GRADS[:3].float())
    second = optim.build(name, [q], hyper)
    second.load_state_dict(first.state_dict())
    assert torch.equal(drive(second, q, GRADS[3:].float()), whole)


def schedule(**changes: object) -> Schedule:
    plain = {
        "total_samples": 1000,
        "warmup_samples": 100.0,
        "warmup": "linear",
        "warmup_from": 0.0,
        "decay": "constant",
    }
    return Schedule(**{**plain, "milestones": (), "gamma": 0.1, **changes})  # type: ignore[arg-type]


def test_schedules() -> None:
    linear, geometric = schedule(), schedule(warmup="geometric", warmup_from=1e-3)
    assert [linear.multiplier(s) for s in (0, 50, 100, 999)] == [0, 0.5, 1, 1]
    assert [geometric.multiplier(s) for s in (0, 50, 100)] == pytest.approx([1e-3, 1e-3**0.5, 1])
    steps = schedule(decay="milestones", milestones=(600.0, 800.0))
    assert [steps.multiplier(s) for s in (599, 600, 799, 800)] == pytest.approx([1, 0.1, 0.1, 0.01])
    cosine = schedule(decay="cosine")
    assert [cosine.multiplier(s) for s in (100, 550, 1000, 1010)] == pytest.approx([1, 0.5, 0, 0])
    line = schedule(decay="linear")
    assert [line.multiplier(s) for s in (100, 550, 1000, 1010)] == pytest.approx([1, 0.5, 0, 0])
    root = schedule(decay="inverse_sqrt")
    assert [root.multiplier(s) for s in (100, 400)] == pytest.approx([1, 0.5])
    root = schedule(decay="inverse_sqrt", warmup_samples=0.25)  # below a sample: still never above the peak
    assert [root.multiplier(s) for s in (0.25, 1)] == pytest.approx([1, 0.5])


def test_a_schedule_in_samples_integrates_alike_at_every_batch_size() -> None:
    """The middle of a step: the learning rate spent on the same samples agrees to second order in the batch."""

    def spent(batch: int) -> float:
        return sum(batch * schedule(decay="cosine").multiplier((k + 0.5) * batch) for k in range(1000 // batch))

    assert math.isclose(spent(5), spent(50), rel_tol=1e-3)


def test_invariant_adam_is_adamw_where_a_step_is_one_micro_batch() -> None:
    """To rounding: torch's divides by √v/√(1 - β2^k), ours by √(v/(1 - β2^k)). Fails if the decay came after the step,
    or if a square were taken of the gradient times its weight."""
    torch.manual_seed(0)
    w = torch.randn(5)
    a, b = (w.clone().requires_grad_() for _ in range(2))
    numbers = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    ours, theirs = optim.InvariantAdam([a], **numbers), torch.optim.AdamW([b], **numbers)
    for _ in range(20):
        for p, o in ((a, ours), (b, theirs)):
            o.zero_grad()
            (p - 1).pow(4).sum().backward()
            o.step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_invariant_adam_squares_each_micro_batch() -> None:
    """Gradients 3 and -1 in one step: m holds their mean 1, v the mean of their squares 5 and not 1. A gradient that is
    only measured (autograd.grad) and one that was given up (zero_grad) are in neither."""
    p = torch.zeros(1, requires_grad=True)
    o = optim.InvariantAdam([p], lr=1e-3, betas=(0.9, 0.99), eps=0.0)
    (7 * p).sum().backward()
    torch.autograd.grad((9 * p).sum(), p)
    o.zero_grad()
    for slope in (3.0, -1.0):
        (slope * p / 2).sum().backward()
    o.step()
    state = o.state[p]
    assert state["exp_avg"].item() == pytest.approx(0.1) and state["exp_avg_sq"].item() == pytest.approx(0.05)
    assert p.item() == pytest.approx(-1e-3 / 5**0.5)
