"""How the token decoder reads context embeddings (paper section 2.4): [N, B, D] -> [N * B, T, D of the token decoder].

Row n * B + b decodes block n + 1 of sequence b. L block length, P prefix length.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.config import ModelConfig
from parallel.inputs import ModelInputs
from parallel.linear import TokenEmbedding, replicated

BEGIN_ID = 0  # the end-of-text id of the GPT-NeoX tokenizer


class TokenInput(nn.Module):
    """Expands each context embedding to several vectors and embeds the known tokens of its block."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width = config.tokens.hidden_size
        self.num_vectors = config.num_context_vectors
        self.expansion = replicated(config.blocks.hidden_size, self.num_vectors * width, megatron)
        self.embedding = TokenEmbedding(config.vocab_size, width, megatron) if config.embeds_local_tokens else None

    def expand(self, context: Tensor) -> Tensor:
        """Context embeddings [N, B, D] -> [N * B, vectors, width]."""
        expanded = self.expansion(context)
        return expanded.view(expanded.shape[0] * expanded.shape[1], self.num_vectors, -1)

    def _embed_shifted(self, targets: Tensor) -> Tensor:
        """Embeddings [N * B, L, width] of a begin position and of all targets but the last."""
        assert self.embedding is not None
        embedded: Tensor = self.embedding(F.pad(targets[:, :-1], (1, 0), value=BEGIN_ID))
        return embedded


class PrefixInput(TokenInput):
    """The context embedding as P prefix vectors, then the block's tokens: T = P + L - 1."""

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Context embeddings [N, B, D] and targets [N * B, L] -> [N * B, P + L - 1, width]."""
        prefix = self.expand(hidden)
        if self.embedding is None:  # one token per block, and a block's last token is never an input
            return prefix
        return torch.cat((prefix, self.embedding(inputs.targets[:, :-1])), dim=1)


class SummationInput(TokenInput):
    """The context embedding as L vectors, added to the embeddings of a begin position and the block's tokens: T = L."""

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Context embeddings [N, B, D] and targets [N * B, L] -> [N * B, L, width]."""
        tokens = self._embed_shifted(inputs.targets)
        return tokens + self.expand(hidden)[:, : tokens.shape[1]]


class CrossAttentionInput(TokenInput):
    """A begin position and the block's tokens, and behind them the L vectors that cross-attention reads."""

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Context embeddings [N, B, D] and targets [N * B, L] -> [N * B, L + L, width]."""
        return torch.cat((self._embed_shifted(inputs.targets), self.expand(hidden)), dim=1)


def build_token_input(config: ModelConfig, megatron: TransformerConfig) -> TokenInput:
    """The token decoder's input of a model's configuration."""
    kinds = {"prefix": PrefixInput, "summation": SummationInput, "cross_attention": CrossAttentionInput}
    return kinds[config.token_decoder_input](config, megatron)
