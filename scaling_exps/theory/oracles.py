# mypy: disable-error-code="no-any-return"

"""Noisy gradient oracles: (f, Sigma, Z_sigma), of which a query at x returns g = grad f(x) + sigma z.

    x        parameters of many paths at once        (N, d) float64
    f, grad  loss and gradient                        (N,), (N, d)
    cov      Sigma(x) = Cov z                         (d, d) where constant, else (N, d, d)
    root     a factor R(x) with R R^T = Sigma(x)      (d, r) where constant, else (N, d, r)
    sigma    noise scale, > 0; a batch of B examples has sigma = 1/sqrt(B)
    xi       the noise in its own coordinates, z = R xi, mean 0, variance 1

Section 2 of the paper (arXiv 2205.10287) asks of an oracle: smooth f and Sigma^(1/2) of polynomial growth, bounded
moments of z, and low skewness, |E z^3| <= K / sigma. `conditions` answers for each, because the checks print it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from scaling_exps.theory.kernels import Gradient
from scaling_exps.theory.keyed import LAWS, MAX_DIM, draws, picks

Array = np.ndarray


class Condition(NamedTuple):
    """One of the paper's conditions on an oracle, whether it holds, and why."""

    name: str
    holds: bool
    reason: str

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}: {self.name} ({self.reason})"


@dataclass(frozen=True)
class Noise:
    """The law of xi: independent coordinates with mean 0 and variance 1.

    Args:
        law: one of `keyed.LAWS`.
        skew: gamma only: K > 0, the skewness is K / sigma.
        dof: student_t only: degrees of freedom, > 2 (the variance must exist).
    """

    law: str = "gaussian"
    skew: float = 1.0
    dof: float = 3.0

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"noise {self.law!r} is unknown; allowed: {', '.join(LAWS)}; choose one of them")
        if self.law == "gamma" and not (math.isfinite(self.skew) and self.skew > 0):
            raise ValueError(f"skew={self.skew} was given; allowed: K > 0 (skewness is K/sigma); pass skew=1.0")
        if self.law == "student_t" and not self.dof > 2:
            raise ValueError(f"dof={self.dof} was given; allowed: dof > 2, else the variance is infinite; pass dof=3")

    def shape(self, sigma: float) -> float:
        """The shape parameter that `keyed.draws` needs at noise scale `sigma`."""
        positive("sigma", sigma)
        return {"gamma": (2 * sigma / self.skew) ** 2, "student_t": self.dof}.get(self.law, 0.0)

    def conditions(self) -> tuple[Condition, Condition]:
        heavy = self.law == "student_t"
        holds, why = {
            "exponential": (False, "E z^3 = 2, it does not shrink as sigma grows"),
            "gamma": (True, f"E z^3 = {self.skew:g}/sigma"),
        }.get(self.law, (True, "symmetric: E z^3 = 0"))
        if heavy and self.dof <= 3:
            holds, why = False, "E|z|^3 infinite"
        moments = f"E|z|^p infinite for p >= {self.dof:g}" if heavy else "all moments"
        return Condition("bounded moments", not heavy, moments), Condition("low skewness", holds, why)


def positive(name: str, value: float) -> float:
    """`value` if it is a finite number > 0; ValueError otherwise."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} was given; allowed: a finite number > 0; pass a positive {name}")
    return value


class Oracle(Protocol):
    """What a problem must offer; subclass `Base` to get `draw` and `conditions` for a new f."""

    dim: int
    noise: Noise

    def f(self, x: Array) -> Array: ...
    def grad(self, x: Array) -> Array: ...
    def cov(self, x: Array) -> Array: ...
    def root(self, x: Array) -> Array: ...
    def draw(self, x: Array, sigma: float, seed: int, first: int, index: int) -> Array: ...
    def conditions(self) -> tuple[Condition, ...]: ...


class Base:
    """f and grad from the subclass; constant covariance, and noise z = root xi.

    >>> class Quartic(Base):
    ...     def f(self, x): return (x**4).sum(1) / 4
    ...     def grad(self, x): return x**3
    >>> Quartic(dim=2).draw(np.ones((3, 2)), sigma=1e-9, seed=0, first=0, index=0).round(6).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]

    Args:
        dim: number of coordinates, 1 .. 256.
        cov: (d, d) covariance of z, positive semi-definite; the identity if left out.
        noise: the law of xi.

    Raises:
        ValueError: a covariance of another shape, not symmetric or not positive semi-definite.
    """

    smooth = Condition("smooth f and Sigma^(1/2)", True, "f smooth, Sigma constant")

    def __init__(self, dim: int, cov: ArrayLike | None = None, noise: Noise | None = None) -> None:
        if not 1 <= dim <= MAX_DIM:
            raise ValueError(f"dim={dim} was given; allowed: 1 .. {MAX_DIM}; use fewer coordinates")
        self.dim = dim
        self.noise = noise or Noise()
        self._cov = np.eye(dim) if cov is None else np.asarray(cov, float)
        advice = "pass R @ R.T of some real matrix R"
        if self._cov.shape != (dim, dim) or not np.allclose(self._cov, self._cov.T):
            raise ValueError(
                f"cov of shape {self._cov.shape} was given; allowed: a symmetric ({dim}, {dim}) matrix; {advice}"
            )
        values, vectors = np.linalg.eigh(self._cov)
        if values[0] < -1e-12 * max(1.0, abs(values[-1])):
            raise ValueError(
                f"cov has eigenvalue {values[0]:.4g}; allowed: a positive semi-definite matrix (all >= 0); {advice}"
            )
        self._root = np.asarray((vectors * np.sqrt(values.clip(0))) @ vectors.T)

    def f(self, x: Array) -> Array:
        raise NotImplementedError

    def grad(self, x: Array) -> Array:
        raise NotImplementedError

    def cov(self, x: Array) -> Array:
        return self._cov

    def root(self, x: Array) -> Array:
        return self._root

    def draw(self, x: Array, sigma: float, seed: int, first: int, index: int) -> Array:
        """g of paths first .. first+N-1 at draw number `index`, at the points x (N, d): (N, d)."""
        R = self.root(x)
        xi = draws(self.noise.law, self.noise.shape(sigma), seed, first, len(x), R.shape[-1], index)
        return self.grad(x) + apply(R, sigma * xi)

    def conditions(self) -> tuple[Condition, ...]:
        return (self.smooth, *self.noise.conditions())


class Quadratic(Base):
    """f(x) = x.Hx/2 + b.x, with constant Sigma: the SDE's moments are known exactly, and kernels are fused.

    Args:
        hessian: (d, d) symmetric, any spectrum; or (d,) its diagonal.
        cov: (d, d), positive semi-definite, with positive diagonal for the adaptive SDEs.
        slope: (d,) the vector b.
        noise: the law of xi.
    """

    def __init__(
        self, hessian: ArrayLike, cov: ArrayLike | None = None, slope: ArrayLike | None = None,
        noise: Noise | None = None,
    ) -> None:  # fmt: skip
        H = np.asarray(hessian, float)
        self.H = np.diag(H) if H.ndim == 1 else H
        super().__init__(len(self.H), cov, noise)
        if self.H.shape != (self.dim, self.dim) or not np.allclose(self.H, self.H.T):
            raise ValueError(f"hessian of shape {H.shape} was given; allowed: symmetric (d, d) or (d,); symmetrise it")
        self.b = np.zeros(self.dim) if slope is None else np.asarray(slope, float).reshape(self.dim)
        self.arrays = Gradient(*(np.ascontiguousarray(a) for a in (self.H, self.b, self._root)))  # for the kernels

    def f(self, x: Array) -> Array:
        return 0.5 * np.einsum("ni,ij,nj->n", x, self.H, x) + x @ self.b

    def grad(self, x: Array) -> Array:
        return x @ self.H + self.b


class Linear(Quadratic):
    """f(x) = b.x: the gradient never changes, so signal against noise is the only thing left (section 5)."""

    def __init__(self, slope: ArrayLike, cov: ArrayLike | None = None, noise: Noise | None = None) -> None:
        b = np.atleast_1d(np.asarray(slope, float))
        super().__init__(np.zeros((len(b), len(b))), cov, b, noise)


class TwoWell(Base):
    """f(x) = sum_i height (x_i^2 - 1)^2 / 4: two minima at +-1 in each coordinate, a barrier at 0.

    grad is not globally Lipschitz (cubic), which the paper asks; paths of bounded size do not notice.
    """

    smooth = Condition("smooth f and Sigma^(1/2)", False, "smooth, but the gradient grows like x^3 (not Lipschitz)")

    def __init__(
        self, dim: int = 1, height: float = 1.0, cov: ArrayLike | None = None, noise: Noise | None = None
    ) -> None:
        super().__init__(dim, cov, noise)
        self.height = positive("height", height)

    def f(self, x: Array) -> Array:
        return np.asarray(self.height * ((x * x - 1) ** 2).sum(1) / 4)

    def grad(self, x: Array) -> Array:
        return self.height * x * (x * x - 1)


class Logistic:
    """Logistic regression, digit `positive` against digit `negative`, on the real `digits` images.

    A draw is a real mini-batch: `round(1/sigma^2)` examples drawn with replacement by the key, so
    sigma = 1/sqrt(B) and z = sqrt(B) (mean of per-example gradients - grad f). Sigma(x) is the covariance of the
    per-example gradients at x. The images are projected on their first `features` principal axes.
    """

    def __init__(self, features: int = 4, digits: tuple[int, int] = (3, 8), l2: float = 0.01) -> None:
        from scaling_exps.data.images import DIGITS

        with np.load(DIGITS) as file:
            images, labels = file["images"].reshape(-1, 64).astype(float), file["labels"].astype(int)
        keep = np.isin(labels, digits)
        A = (images[keep] - images[keep].mean(0)) / 16.0
        if not 1 <= features <= A.shape[1]:
            raise ValueError(f"features={features} was given; allowed: 1 .. {A.shape[1]}; pass fewer")
        axes = np.linalg.svd(A, full_matrices=False)[2]
        self.A: Array = A @ axes[:features].T  # (n, d)
        self.y: Array = np.where(labels[keep] == digits[1], 1.0, -1.0)
        self.l2, self.dim, self.noise = l2, features, Noise()

    def f(self, x: Array) -> Array:
        return np.logaddexp(0, -(x @ self.A.T) * self.y).mean(1) + 0.5 * self.l2 * (x * x).sum(1)

    def _weights(self, x: Array) -> Array:
        """Per-example dloss/dlogit: (N, n)."""
        return -self.y * expit(-(x @ self.A.T) * self.y)

    def grad(self, x: Array) -> Array:
        return self._weights(x) @ self.A / len(self.A) + self.l2 * x

    def root(self, x: Array) -> Array:
        """(N, d, n): the centred per-example gradients over sqrt(n), an exact factor of Sigma(x)."""
        G = self._weights(x)[:, None, :] * self.A.T  # (N, d, n)
        return np.asarray((G - G.mean(2, keepdims=True)) / math.sqrt(len(self.A)))

    def cov(self, x: Array) -> Array:
        R = self.root(x)
        return R @ R.swapaxes(1, 2)

    def batch(self, sigma: float) -> int:
        """The batch size of noise scale sigma; ValueError unless 1/sigma^2 is (nearly) a whole number."""
        size = 1 / positive("sigma", sigma) ** 2
        whole = max(1, round(size))
        if abs(size - whole) > 1e-6 * size:
            raise ValueError(
                f"sigma={sigma} was given; allowed: 1/sqrt(B) for a whole batch size B; nearest: "
                f"{1 / math.sqrt(whole):.6g} (B={whole})"
            )
        return whole

    def draw(self, x: Array, sigma: float, seed: int, first: int, index: int) -> Array:
        B = self.batch(sigma)
        chosen = picks(seed, first, len(x), index, B, len(self.A))  # (N, B)
        A, y = self.A[chosen], self.y[chosen]  # (N, B, d), (N, B)
        weights = -y * expit(-np.einsum("nbd,nd->nb", A, x) * y)
        return np.einsum("nb,nbd->nd", weights, A) / B + self.l2 * x

    def conditions(self) -> tuple[Condition, ...]:
        skewness = "mean of B examples: E z^3 = O(1/sqrt(B)), small in practice for sigma < 1"
        return (
            Condition("smooth f and Sigma^(1/2)", True, "smooth; Sigma(x) from per-example gradients"),
            Condition("bounded moments", True, "finitely many examples"),
            Condition("low skewness", True, skewness),
        )


def apply(R: Array, w: Array) -> Array:
    """R w for every path: R (d, r) or (N, d, r), w (N, r) -> (N, d)."""
    return w @ R.T if R.ndim == 2 else np.einsum("ndr,nr->nd", R, w)


def describe(oracle: Oracle, of: str = "") -> list[str]:
    """The oracle's conditions as lines of text, each after `of`."""
    return [f"{of}{c}" for c in oracle.conditions()]
