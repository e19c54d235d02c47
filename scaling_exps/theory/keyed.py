# mypy: disable-error-code="no-untyped-def,no-any-return"

"""Random numbers that are functions of (seed, purpose, path, index), and a Brownian path made of them.

Nothing here has a state. A draw is a hash (splitmix64 in counter form): 64 bits at
`mix(key(seed, purpose, path) + counter * GOLDEN)`. Paths i and i + HALF of a block share one hash and take the two
halves of a Box-Muller pair, so a path's numbers do not depend on which or how many other paths are drawn.

The hash has 32 bits for the radius of a normal, so |normal| <= 6.76 (probability beyond: 1e-11).

Why log, sin and cos are written out: the loop then vectorises. Million normals a second on the same two cores: 405;
with math.log, cos and sin 84, numpy's Philox streams 97 and SFC64 128 (two threads), numba's np.random 37.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

LANES = 256  # paths that a kernel carries together: its arrays stay in the first-level cache
HALF = LANES // 2
LAWS = ("gaussian", "rademacher", "exponential", "gamma", "student_t")
DRAW, BROWNIAN, TWO_POINT, PICK = 1, 2, 3, 4  # purposes
MAX_LEVEL, MAX_DIM = 23, 256

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_C1, _C2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _S52 = (np.uint64(s) for s in (27, 30, 31, 32, 52))
_LOW30, _ONE = np.uint64((1 << 30) - 1), np.uint64(1)
_MANTISSA, _EXP0 = np.uint64((1 << 52) - 1), np.uint64(0x3FE0000000000000)
_LN2, _SQRT_HALF = math.log(2.0), math.sqrt(0.5)


@njit(inline="always", error_model="numpy")
def mix(z):
    z = (z ^ (z >> _S30)) * _C1
    z = (z ^ (z >> _S27)) * _C2
    return z ^ (z >> _S31)


@njit(error_model="numpy")
def path_key(seed, purpose, pair):
    """The 64-bit key of paths 2*pair' and 2*pair'+1 (here `pair` numbers the shared hash)."""
    k = mix(np.uint64(seed) * _GOLDEN + np.uint64(purpose) + _ONE)
    return mix(k + np.uint64(pair) * _GOLDEN + _ONE)


@njit(error_model="numpy")
def block_keys(seed, purpose, block):
    """The keys of the LANES paths of a block: (HALF,)."""
    return np.array([path_key(seed, purpose, block * HALF + i) for i in range(HALF)])


@njit(inline="always", error_model="numpy")
def _log(x):
    """ln x for x in (0, 1), relative error below 1e-14, without a call so that loops vectorise."""
    b = np.float64(x).view(np.uint64)
    m = np.uint64((b & _MANTISSA) | _EXP0).view(np.float64)  # [1/2, 1)
    e = float(np.int64(b >> _S52) - 1022)
    low = m < _SQRT_HALF
    m = 2.0 * m if low else m
    e = e - 1.0 if low else e
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    p = 1 / 17.0 + q * (1 / 19.0)
    p = 1 / 9.0 + q * (1 / 11.0 + q * (1 / 13.0 + q * (1 / 15.0 + q * p)))
    return e * _LN2 + 2.0 * s * (1.0 + q * (1 / 3.0 + q * (1 / 5.0 + q * (1 / 7.0 + q * p))))


@njit(fastmath={"contract"}, error_model="numpy")
def normals(keys, counter, out):
    """out (LANES,) <- standard normals at `counter`: lanes i and i + HALF are one Box-Muller pair."""
    shift = np.uint64(counter) * _GOLDEN
    for i in range(HALF):
        h = mix(keys[i] + shift)
        u = (float(np.int64(h >> _S32)) + 0.5) * 2.0**-32
        r = math.sqrt(-_log(u))  # sqrt(-2 ln u) / sqrt(2): the 1/sqrt(2) of the rotation below
        a = (float(np.int64(h & _LOW30)) + 0.5) * 2.0**-30 - 0.5
        a *= 0.5 * math.pi  # angle - pi/4, in [-pi/4, pi/4); two spare bits are the signs
        q = a * a
        s = a * (1 + q * (-1 / 6.0 + q * (1 / 120.0 + q * (-1 / 5040.0 + q * (1 / 362880.0 + q * (-1 / 39916800.0))))))
        c = 1 + q * (
            -0.5 + q * (1 / 24.0 + q * (-1 / 720.0 + q * (1 / 40320.0 + q * (-1 / 3628800.0 + q / 479001600.0))))
        )
        s1 = 1.0 - 2.0 * float(np.int64((h >> _S30) & _ONE))
        s2 = 1.0 - 2.0 * float(np.int64((h >> _S31) & _ONE))
        out[i] = s1 * r * (c - s)
        out[i + HALF] = s2 * r * (c + s)


@njit(fastmath={"contract"}, error_model="numpy")
def signs(keys, counter, out):
    """out (LANES,) <- +-1; 64 counters share one hash, so the bits cost almost nothing."""
    shift = np.uint64(2 * (counter >> 5)) * _GOLDEN
    b1 = np.uint64(counter & 31)
    b2 = b1 + _S32
    for i in range(HALF):
        h = mix(keys[i] + shift)
        out[i] = 1.0 - 2.0 * float(np.int64((h >> b1) & _ONE))
        out[i + HALF] = 1.0 - 2.0 * float(np.int64((h >> b2) & _ONE))


@njit(error_model="numpy")
def _uniform(key, counter):
    return (float(np.int64(mix(key + np.uint64(counter) * _GOLDEN) >> np.uint64(12))) + 0.5) * 2.0**-52


@njit(error_model="numpy")
def _gamma(key, shape):
    """One Gamma(shape, 1) variate (Marsaglia & Tsang 2000); `key` is consumed by counters 0, 1, 2, ..."""
    boost, n = 1.0, 0
    a = shape
    if a < 1.0:
        boost = _uniform(key, 0) ** (1.0 / a)
        a += 1.0
        n = 1
    d = a - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = math.sqrt(-2.0 * math.log(_uniform(key, n))) * math.cos(2.0 * math.pi * _uniform(key, n + 1))
        u = _uniform(key, n + 2)
        n += 3
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(u) < 0.5 * x * x + d - d * v + d * math.log(v):
            return d * v * boost


@njit(error_model="numpy")
def noise(law, shape, keys, counter, out):
    """out (LANES,) <- xi of `LAWS[law]`, mean 0 and variance 1.

    exponential: Exp(1) - 1, skewness 2. gamma: (Gamma(shape) - shape)/sqrt(shape), skewness 2/sqrt(shape).
    student_t: t with `shape` > 2 degrees of freedom, scaled to variance 1.
    """
    if law == 0:
        normals(keys, counter, out)
    elif law == 1:
        signs(keys, counter, out)
    elif law == 2:
        shift = np.uint64(counter) * _GOLDEN
        for i in range(HALF):
            h = mix(keys[i] + shift)
            out[i] = -_log((float(np.int64(h >> _S32)) + 0.5) * 2.0**-32) - 1.0
            out[i + HALF] = -_log((float(np.int64(h & np.uint64(0xFFFFFFFF))) + 0.5) * 2.0**-32) - 1.0
    else:
        if law == 4:
            normals(keys, counter, out)
        for lane in range(LANES):
            key = mix(keys[lane % HALF] + np.uint64(2 * counter + lane // HALF) * _C1 + _ONE)
            if law == 3:
                out[lane] = (_gamma(key, shape) - shape) / math.sqrt(shape)
            else:
                out[lane] *= math.sqrt((shape - 2.0) / (2.0 * _gamma(key, 0.5 * shape)))


@njit(fastmath={"contract"}, error_model="numpy")
def increment(keys, leaf, level, coordinate, depth, right, out, z):
    """out (LANES,) <- W((leaf+1) 2^-level) - W(leaf 2^-level), walking down the Brownian tree from `depth`.

    A bridge: a node's increment D over 2^-j is split into halves D/2 +- 2^(-j/2-1) z. Node 0 is the unit interval,
    2^j + i a split. `right` (level + 1, LANES) keeps the right halves: a walk from `depth` > 0 starts at one.
    """
    i, interval = leaf & ((1 << level) - 1), leaf >> level
    if depth == 0:
        normals(keys, (interval << 32) | coordinate, out)
    else:
        out[:] = right[depth]
    while depth < level:
        below = i >> (level - depth - 1)
        normals(keys, (interval << 32) | (((1 << depth) | (below >> 1)) << 8) | coordinate, z)
        half = 0.5 * 2.0 ** (-0.5 * depth)
        depth += 1
        for k in range(LANES):
            left = 0.5 * out[k] + half * z[k]
            right[depth, k] = out[k] - left
            out[k] = right[depth, k] if below & 1 else left


@njit(error_model="numpy")
def branching(leaf, level):
    """The depth at which a leaf begins a right half: leaves taken in order cost one normal each from there."""
    depth = level
    while depth and leaf & ((1 << (level - depth + 1)) - 1) == 0:
        depth -= 1
    return depth


@njit(parallel=True, cache=True, error_model="numpy")
def _fill(purpose, law, shape, seed, first, level, index, out):
    for block in prange(out.shape[0] // LANES):
        keys = block_keys(seed, purpose, first + block)
        right, x, z = np.empty((level + 1, LANES)), np.empty(LANES), np.empty(LANES)
        for c in range(out.shape[1]):
            if purpose == BROWNIAN:
                increment(keys, index, level, c, 0, right, x, z)
            else:
                noise(law, shape, keys, (index << 8) | c, x)
            out[block * LANES : (block + 1) * LANES, c] = x


def _paths(purpose: int, law: int, shape: float, seed: int, first: int, n: int, dim: int, level: int, index: int):
    start, skip = divmod(first, LANES)
    out = np.empty((-(-(skip + n) // LANES) * LANES, dim))
    _fill(purpose, law, shape, seed, start, level, index, out)
    return out[skip : skip + n]


def brownian(seed: int, first: int, n: int, dim: int, level: int, leaf: int) -> np.ndarray:
    """W((leaf+1) 2^-level) - W(leaf 2^-level) of paths first .. first+n-1: (n, dim), variance 2^-level.

    A function of its arguments: the sum of two neighbours at level+1 is (to rounding) the one at `level`.
    """
    if not (0 <= level <= MAX_LEVEL and 1 <= dim <= MAX_DIM and leaf >= 0):
        raise ValueError(
            f"brownian(level={level}, dim={dim}, leaf={leaf}): needs 0 <= level <= {MAX_LEVEL}, "
            f"1 <= dim <= {MAX_DIM}, leaf >= 0; coarsen the step or split the problem"
        )
    return _paths(BROWNIAN, 0, 0.0, seed, first, n, dim, level, leaf)


def dyadic_level(step: float) -> int:
    """L with step = 2^-L, 0 <= L; ValueError otherwise."""
    level = round(-np.log2(step)) if step > 0 else -1
    if level < 0 or 2.0**-level != step:
        raise ValueError(f"step={step} was given; allowed: 1, 1/2, 1/4, ... (the Brownian tree is dyadic); nearest one")
    return level


def draws(law: str, shape: float, seed: int, first: int, n: int, dim: int, index: int) -> np.ndarray:
    """xi of `law` for paths first .. first+n-1 at draw number `index`: (n, dim), mean 0, variance 1."""
    return _paths(DRAW, LAWS.index(law), shape, seed, first, n, dim, 0, index)


@njit(cache=True, error_model="numpy")
def picks(seed, first, paths, index, batch, n):
    """Examples drawn with replacement from 0 .. n-1 for a mini-batch: (paths, batch) integers."""
    out = np.empty((paths, batch), np.int64)
    for i in range(paths):
        key = path_key(seed, PICK, first + i)
        for j in range(batch):
            out[i, j] = np.int64((mix(key + np.uint64((index << 20) | j) * _GOLDEN) >> _S32) * np.uint64(n) >> _S32)
    return out
