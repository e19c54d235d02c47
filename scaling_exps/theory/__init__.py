# ruff: noqa: E402 (missing packages are named before the modules that import them fail)

"""The theory laboratory: the paper's SDEs, scaling rule and SVAG as something one runs.

    scalerun theory [NAME ...] [--json] [--seed N] [--out DIR]

Your own oracle, against the SDE on the same Brownian path:

>>> import numpy as np
>>> from scaling_exps.theory import Base, Problem, paired
>>> class Quartic(Base):
...     def f(self, x): return (x**4).sum(1) / 4  # x (N, d)
...     def grad(self, x): return x**3
>>> m = paired(Problem("rmsprop", Quartic(dim=1), x0=1.0), step=1 / 8, times=np.array([1.0]), paths=512, seed=0)
>>> m.names[0], m.delta.shape
('theta[0]', (1, 6))

Quadratic ones have exact moments (`sde_moments`), fused kernels and self-sizing runs (`measure`).
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class MissingPackageError(ImportError, ValueError):
    """A package of the extra `theory` is not installed; a ValueError, so that the command says it in one line."""


if _missing := [p for p in ("matplotlib", "numba", "scipy", "threadpoolctl") if importlib.util.find_spec(p) is None]:
    raise MissingPackageError(f"theory needs {', '.join(_missing)}: pip install 'scalerun[theory]'")

import numba
import numpy
import scipy
import torch

from scaling_exps.theory.checks import CHECKS
from scaling_exps.theory.exact import sde_moments
from scaling_exps.theory.oracles import Base, Condition, Linear, Logistic, Noise, Oracle, Quadratic, TwoWell
from scaling_exps.theory.problem import Chain, Problem, reference
from scaling_exps.theory.result import Measurement, Result, draw, fit, show
from scaling_exps.theory.sde import euler_maruyama, simulate
from scaling_exps.theory.weak import measure, paired
from scaling_exps.words import Parser

__all__ = [
    "CHECKS", "Base", "Chain", "Condition", "Linear", "Logistic", "Measurement", "Noise", "Oracle", "Problem",
    "Quadratic", "Result", "TwoWell", "euler_maruyama", "fit", "main", "measure", "paired", "reference", "run_check",
    "sde_moments", "simulate",
]  # fmt: skip


def _validate(names: Sequence[str], seed: int) -> None:
    if unknown := [name for name in names if name not in CHECKS]:
        given = ", ".join(map(repr, unknown))
        raise ValueError(f"unknown check {given}; allowed: {', '.join(CHECKS)}; leave the name out to run them all")
    if seed < 0:
        raise ValueError(f"seed={seed} was given; allowed: >= 0; seed 0 is a seed")


def run_check(name: str, seed: int = 0) -> Result:
    """Run one named check. Raises ValueError for an unknown name or a negative seed."""
    _validate([name], seed)
    start = time.perf_counter()
    result = CHECKS[name](seed)
    result.seconds = time.perf_counter() - start
    return result


def main(words: Sequence[str] | None = None) -> int:
    """`scalerun theory`: 0 if every prediction holds, 1 if one does not, 2 for a user's error."""
    from rich.console import Console

    parser = Parser(
        prog="scalerun theory",
        description="Measure what the paper predicts: orders of weak error, SVAG, the rule, and where they break.",
        epilog="checks: " + "; ".join(f"{n}: {(f.__doc__ or '').splitlines()[0]}" for n, f in CHECKS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="checks to run (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (0)")
    parser.add_argument("--out", type=Path, default=None, help="write NAME.png and theory.json here")
    args = parser.parse_args(words)
    names = list(dict.fromkeys(args.names)) or list(CHECKS)
    try:
        _validate(names, args.seed)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        print(f"scalerun theory: {e}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 160
    results = []
    for name in names:
        results.append(run_check(name, args.seed))
        if args.out:
            draw(results[-1], args.out / f"{name}.png")
        if not args.json:
            show(results[-1], console)
    text = json.dumps(_report(results, args.seed), ensure_ascii=False)
    if args.out:
        (args.out / "theory.json").write_text(text + "\n")
    if args.json:
        print(text)
    return 0 if all(r.passed for r in results) else 1


def _report(results: Sequence[Result], seed: int) -> Any:
    """The JSON object: `checks`, `rows`, `fits`, and what it was made with; null for a number that is not finite."""
    made_with = {m.__name__: m.__version__ for m in (numpy, scipy, numba, torch)}
    report = {
        "pass": all(r.passed for r in results),
        "seed": seed,
        "seconds": round(sum(r.seconds for r in results), 2),
        "versions": {"python": platform.python_version(), **made_with},
        "checks": [
            {"check": r.check, "claim": r.claim, "pass": r.passed, "seconds": round(r.seconds, 2),
             "conditions": r.conditions, "notes": r.notes}
            for r in results
        ],
        "rows": [vars(row) for r in results for row in r.rows],
        "fits": [{"pass" if k == "passed" else k: v for k, v in vars(f).items()} for r in results for f in r.fits],
    }  # fmt: skip
    return json.loads(json.dumps(report), parse_constant=lambda _: None)
