"""Sequences of tokens: next-token prediction, or masked tokens.

An epoch cuts the corpus into N sequences of T = `context` tokens, from an offset of its own, and visits them in an
order of its own. Masking hides exactly round(mask · T) positions of every sequence, so that the mean over a
micro-batch is a mean over its sequences, and a step's gradient does not depend on how it was cut up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scaling_exps.config import TokenDataset
from scaling_exps.data.corpora import Tokens
from scaling_exps.data.stream import Stream, random_bits, uniform

IGNORE = -100  # target of a position that is not predicted: torch's cross_entropy leaves it out


class TokenStream(Stream):
    """A stream over a memory-mapped corpus."""

    def __init__(self, tokens: Tokens, dataset: TokenDataset, seed: int, device: torch.device) -> None:
        t = self.context = dataset.context
        whole = (len(tokens.train) - t - 1) // t  # so that every offset below T leaves room
        size, test_size = dataset.train_size or whole, dataset.test_size or (len(tokens.test) - 1) // t
        super().__init__(size, test_size, seed, device)
        self.tokens, self.vocab, self.fingerprint = tokens, tokens.vocab, tokens.fingerprint
        self.hidden = round(dataset.mask * t)  # positions of each sequence
        self.bytes_per_token = tokens.bytes_per_token

    def _make_epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """For every sample of one epoch, on the host: its sequence, and the token at which it begins; (N,) each."""
        i = torch.arange(epoch * self.size, (epoch + 1) * self.size)
        sequence = self._order(i)
        offset = self.draw("offset", torch.tensor([epoch])) % self.context
        return sequence, sequence * self.context + offset

    def _read(self, part: np.ndarray, first: Tensor) -> Tensor:
        """(n, T + 1) tokens from each of the positions `first`."""
        where = first.numpy()[:, None] + np.arange(self.context + 1)
        return torch.from_numpy(part[np.minimum(where, len(part) - 1)].astype(np.int64))

    def _pair(self, tokens: Tensor, seed: int, purpose: str, i: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (n, T): the next token, or the hidden ones."""
        if not self.hidden:
            x, y = tokens[:, :-1], tokens[:, 1:]
        else:  # of the hidden 80% show the mask's id, 10% a random one, 10% their own (Devlin et al. 2019)
            tokens = tokens[:, :-1]
            at = i[:, None] * self.context + torch.arange(self.context)  # one index for each position

            def draw(what: str) -> Tensor:
                return random_bits(seed, f"{purpose}/{what}", at)

            chosen = torch.argsort(draw("hide"), 1)[:, : self.hidden]
            y = torch.full_like(tokens, IGNORE).scatter(1, chosen, tokens.gather(1, chosen))
            how = uniform(draw("how"))
            shown = torch.where(how < 0.8, self.vocab, torch.where(how < 0.9, draw("token") % self.vocab, tokens))
            x = torch.where(y == IGNORE, tokens, shown)
        if self.device.type != "cpu":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (n, T), of samples start..stop-1."""
        _, first = self._slice(start, stop)
        i = torch.arange(start, stop)
        return self._pair(self._read(self.tokens.train, first), self.seed, self.purpose, i)

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of test sequences start..stop-1, hidden at the same places in every run."""
        i = torch.arange(start, min(stop, self.test_size))
        return self._pair(self._read(self.tokens.test, i * self.context), 0, "test", i)
