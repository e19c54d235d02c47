"""Language models: transformers' own from a config, tokens (B, T) -> logits (B, T, vocabulary).

Attention goes through torch's scaled_dot_product_attention; the output layer shares the embedding's weights, as in
the published models. The vocabulary has one id more than the tokenizer where tokens are hidden: that of the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scaling_exps.config import GPT, Roberta


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


def network(model: GPT | Roberta, vocab: int, context: int) -> nn.Module:
    """A language model of `vocab` token ids (the mask's included) for sequences of up to `context` tokens."""
    positions, width, dropout = model.context or context, model.width, model.dropout
    if isinstance(model, GPT):
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt = GPT2Config(
            vocab_size=vocab, n_positions=positions, n_layer=model.layers, n_embd=width, n_head=model.heads,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return _Logits(GPT2LMHeadModel(gpt), positions, use_cache=False)
    from transformers import RobertaConfig, RobertaForMaskedLM

    roberta = RobertaConfig(
        vocab_size=vocab, max_position_embeddings=positions, num_hidden_layers=model.layers, hidden_size=width,
        num_attention_heads=model.heads, intermediate_size=4 * width, type_vocab_size=1,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _Logits(RobertaForMaskedLM(roberta), positions)
