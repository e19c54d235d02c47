"""Language models, by name: transformers' own from a config, tokens (B, T) -> logits (B, T, vocabulary).

Attention goes through torch's scaled_dot_product_attention; the output layer shares the embedding's weights, as in
the published models. The vocabulary has one id more than the tokenizer where tokens are hidden: that of the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scaling_exps.models.contract import ModelError


class _Logits(nn.Module):
    """transformers' network without its output record; positions count from 0, for no sequence of ours is padded."""

    positions: Tensor

    def __init__(self, net: nn.Module, context: int, **always: Any) -> None:
        super().__init__()
        self.net, self.always = net, always
        self.register_buffer("positions", torch.arange(context)[None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        where = self.positions[:, : tokens.shape[1]]
        logits: Tensor = self.net(input_ids=tokens, position_ids=where, return_dict=True, **self.always).logits
        return logits


def _gpt(vocab: int, context: int, layers: int, width: int, heads: int, dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab, n_positions=context, n_layer=layers, n_embd=width, n_head=heads,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _Logits(GPT2LMHeadModel(config), context, use_cache=False)


def _roberta(vocab: int, context: int, layers: int, width: int, heads: int, dropout: float) -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=vocab, max_position_embeddings=context, num_hidden_layers=layers, hidden_size=width,
        num_attention_heads=heads, intermediate_size=4 * width, type_vocab_size=1,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _Logits(RobertaForMaskedLM(config), context)


def network(name: str, vocab: int, options: dict[str, Any]) -> nn.Module:
    """A language model.

    Args:
        name: gpt or roberta.
        vocab: token ids, the mask's included.
        options: context (positions), layers, width, heads, dropout.

    Raises:
        ModelError: sizes that do not fit each other.
    """
    if options["width"] % options["heads"]:
        raise ModelError(f"model.width={options['width']} is no multiple of model.heads={options['heads']}")
    for size in ("context", "layers", "width", "heads"):
        if options[size] < 1:
            raise ModelError(f"model.{size}={options[size]} must be >= 1")
    if not 0 <= options["dropout"] < 1:
        raise ModelError(f"model.dropout={options['dropout']} must lie in [0, 1)")
    return NETWORKS[name](vocab, **options)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"gpt": _gpt, "roberta": _roberta}
