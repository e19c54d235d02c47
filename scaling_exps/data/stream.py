"""The endless training stream that every kind of data set has in common.

Sample i belongs to epoch i // N, and everything about it is a hash of (seed, purpose, i). Batch size, world size,
micro-batch and restarts only decide who asks for which slice.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor


def key(seed: int, purpose: str) -> int:
    """64 signed bits out of (seed, purpose)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little", signed=True)


def random_bits(seed: int, purpose: str, index: Tensor) -> Tensor:
    """62 random bits for each index: int64 in [0, 2^62), a function of (seed, purpose, index) alone.

    Integer arithmetic (two rounds of the splitmix64 finaliser), hence the same on every device.
    """
    k = key(seed, purpose)
    x = _mix(index * _signed(0x9E3779B97F4A7C15) + k)
    return (_mix(x ^ k) >> 2) & (2**62 - 1)


def uniform(bits: Tensor) -> Tensor:
    """float64 in [0, 1) out of random bits."""
    return (bits >> 9).double() * 2.0**-53


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)  # >> is arithmetic: mask the sign
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Stream:
    """The training stream of one seed, and the test set beside it.

    Args:
        size: training examples, N.
        test_size: test examples.
        seed: of the run.
        device: where batches are made.
    """

    fingerprint = ""  # of the data, where the config alone does not fix it

    def __init__(self, size: int, test_size: int, seed: int, device: torch.device) -> None:
        self.size, self.test_size, self.seed, self.device, self.purpose = size, test_size, seed, device, "train"
        self._epoch = lru_cache(2)(self._make_epoch)

    def sibling(self, seed: int, purpose: str) -> Self:
        """Another stream over the same data, which it shares; streams of different purposes are independent."""
        other = copy.copy(self)
        other.seed, other.purpose = seed, purpose
        other._epoch = lru_cache(2)(other._make_epoch)
        return other

    def draw(self, what: str, i: Tensor) -> Tensor:
        """Random bits of samples i for one use."""
        return random_bits(self.seed, f"{self.purpose}/{what}", i)

    def _order(self, i: Tensor) -> Tensor:
        """Which example each sample of one whole epoch is."""
        return torch.argsort(self.draw("order", i), stable=True)

    def _make_epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """For every sample of one epoch: the example, and what else a kind of data decides by the epoch; (N,) each."""
        i = torch.arange(epoch * self.size, (epoch + 1) * self.size, device=self.device)
        return (self._order(i),)

    def _slice(self, start: int, stop: int) -> list[Tensor]:
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.size)
            count = min(stop - start, self.size - first)
            parts.append([t[first : first + count] for t in self._epoch(epoch)])
            start += count
        return [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)]

    def indices(self, start: int, stop: int) -> Tensor:
        """Which training examples samples start..stop-1 of the stream are; int64 (stop - start,)."""
        return self._slice(start, stop)[0]

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples start..stop-1, ready for the network."""
        raise NotImplementedError

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of test examples start..stop-1; shorter at the end."""
        raise NotImplementedError

    def prefetch(self, start: int, stop: int) -> None:
        """Told that `batch(start, stop)` comes next; for data that takes time to decode."""
