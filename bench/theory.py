"""Paths x steps per second of the RMSprop SDE: this simulator, torchsde, diffrax, a plain torch loop.

    python bench/theory.py [--paths 200000] [--steps 64] [--repeats 5] [--json]

The same SDE (theta, u), the same paths and steps, float64, Euler-Maruyama, all cores of the machine:

    dtheta = -(theta dt + sigma0 dW) / (sigma0 sqrt(u) + eps0),   du = c2 (1 - u) dt

The contestants take turns; the figure is the median of the repeats, and the ratio the median of the ratios
within a turn, so that a busy machine moves all of them together. torchsde and diffrax are timed if they can be
imported (pip install torchsde; pip install jax diffrax); they are no dependencies of this project.
`ours, two-point` is for weak errors only (two-point increments have the same weak order).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

S0, E0, C2, X0, U0 = 1.0, 0.3, 0.5, 1.0, 0.5


def ours(paths: int, steps: int, increments: str = "normal") -> Callable[[int], float]:
    from scaling_exps.theory import Problem, Quadratic, simulate

    p = Problem("rmsprop", Quadratic([1.0]), x0=X0, u0=U0, sigma0=S0, eps0=E0, c2=C2)
    end = np.array([1.0])
    return lambda seed: float(simulate(p, 1 / steps, end, paths=paths, seed=seed, increments=increments)[0, 0].mean())


def torch_loop(paths: int, steps: int) -> Callable[[int], float]:
    import torch

    def go(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        x, u = (torch.full((paths,), a, dtype=torch.float64) for a in (X0, U0))
        dt, z = 1 / steps, torch.empty(paths, dtype=torch.float64)
        for _ in range(steps):
            z.normal_(generator=generator)
            x = x - (x * dt + S0 * dt**0.5 * z) / (S0 * u.sqrt() + E0)
            u = u + C2 * (1 - u) * dt
        return float(x.mean())

    return go


def torchsde_(paths: int, steps: int) -> Callable[[int], float]:
    import torch
    import torchsde

    class RMSprop(torch.nn.Module):
        noise_type, sde_type = "scalar", "ito"  # one Brownian motion a path: half the draws of "diagonal"

        def f(self, t, y):
            x, u = y[:, :1], y[:, 1:]
            return torch.cat([-x / (S0 * u.sqrt() + E0), C2 * (1 - u)], 1)

        def g(self, t, y):
            u = y[:, 1:]
            return torch.stack([-S0 / (S0 * u.sqrt() + E0), torch.zeros_like(u)], 1)  # (paths, 2, 1)

    sde = RMSprop()

    def go(seed: int) -> float:
        y = torch.tensor([[X0, U0]], dtype=torch.float64).repeat(paths, 1)
        bm = torchsde.BrownianInterval(0.0, 1.0, (paths, 1), dtype=torch.float64, entropy=seed)
        with torch.no_grad():
            states = torchsde.sdeint(sde, y, torch.tensor([0.0, 1.0]), bm=bm, method="euler", dt=1 / steps)
        return float(states[-1, :, 0].mean())

    return go


def diffrax_(paths: int, steps: int) -> Callable[[int], float]:
    import jax

    jax.config.update("jax_enable_x64", True)
    import diffrax
    import jax.numpy as jnp

    def drift(t, y, args):
        return jnp.stack([-y[0] / (S0 * jnp.sqrt(y[1]) + E0), C2 * (1 - y[1])])

    def diffusion(t, y, args):
        return jnp.stack([-S0 / (S0 * jnp.sqrt(y[1]) + E0), 0.0])[:, None]

    def one(key):
        noise = diffrax.UnsafeBrownianPath(shape=(1,), key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise))
        start, mode = jnp.array([X0, U0]), diffrax.ForwardMode()
        solution = diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 1.0, 1 / steps, start, adjoint=mode, max_steps=steps + 1
        )
        return solution.ys[0, 0]

    batch = jax.jit(lambda key: jax.vmap(one)(jax.random.split(key, paths)).mean())
    return lambda seed: float(batch(jax.random.key(seed)).block_until_ready())


CONTESTANTS = {
    "ours": ours,
    "ours, two-point": functools.partial(ours, increments="two_point"),
    "torch loop": torch_loop,
    "torchsde": torchsde_,
    "diffrax": diffrax_,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    contestants: dict[str, Callable[[int], float]] = {}
    for name, build in CONTESTANTS.items():
        try:
            go = build(args.paths, args.steps)
            go(0)  # compile, and touch the memory
        except ImportError as e:
            print(f"{name}: left out ({e})", file=sys.stderr)
        else:
            contestants[name] = go
            print(f"{name}: ready", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    means: dict[str, float] = {}
    for turn in range(args.repeats):
        for name, go in contestants.items():
            start = time.perf_counter()
            means[name] = go(turn + 1)
            times[name].append(time.perf_counter() - start)
            print(f"turn {turn + 1}: {name} {times[name][-1]:.3f} s", file=sys.stderr, flush=True)
    work = args.paths * args.steps / 1e6
    rows = {
        name: {
            "million_path_steps_per_second": round(work / statistics.median(t), 1),
            "ours_over_it": round(statistics.median(a / b for a, b in zip(t, times["ours"], strict=True)), 2),
            "mean_theta": round(means[name], 4),
        }
        for name, t in times.items()
    }
    head = {"paths": args.paths, "steps": args.steps, "repeats": args.repeats, "cores": os.cpu_count()}
    if args.json:
        print(json.dumps({**head, "python": platform.python_version(), "rows": rows}))
        return
    print(head)
    for name, row in rows.items():
        print(f"{name:18s}", row)


if __name__ == "__main__":
    main()
