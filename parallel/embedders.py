"""Embedders (paper section 2.2): the tokens of a block become one vector, [B, N, L] -> [N, B, D]."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.config import ModelConfig
from parallel.encoder import RobertaEncoder
from parallel.inputs import ModelInputs
from parallel.linear import TokenEmbedding, replicated

CLS_ID = 0


def _rows_by_block(values: Tensor) -> Tensor:
    """[B, N, L] -> [N, B * L]: blocks first, so that sequence parallelism can split them."""
    return values.permute(1, 0, 2).reshape(values.shape[1], -1)


class LookupEmbedder(nn.Module):
    """The embeddings of a block's tokens, concatenated and, if the table is wider than D / L, projected."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width = config.blocks.hidden_size
        vector = config.embedder.vector_width(width, config.block_length)
        self.embedding = TokenEmbedding(config.vocab_size, vector, megatron)
        self.projection: nn.Module | None = None
        if config.embedder.has_projection:
            self.projection = replicated(vector * config.block_length, width, megatron)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Ids [B, N, L] -> block embeddings [N, B, D]."""
        embedded = self.embedding(_rows_by_block(inputs.token_ids))
        concatenated = embedded.reshape(embedded.shape[0], len(inputs.token_ids), -1)
        return concatenated if self.projection is None else self.projection(concatenated)


class RobertaEmbedder(nn.Module):
    """A RoBERTa encoder over each block; its outputs, of all tokens or of CLS tokens, concatenated and projected."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        embedder, width = config.embedder, config.blocks.hidden_size
        self.num_cls_tokens = embedder.num_cls_tokens if embedder.kind == "roberta_cls" else 0
        self.encoder = RobertaEncoder(embedder.roberta, config.vocab_size, megatron)
        vectors = embedder.num_vectors(config.block_length)
        self.projection = replicated(vectors * embedder.roberta.hidden_size, width, megatron)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Ids [B, N, L] -> block embeddings [N, B, D]."""
        num_sequences, _, length = inputs.token_ids.shape
        ids = _rows_by_block(inputs.token_ids).view(-1, length)
        valid = _rows_by_block(inputs.token_mask).view(-1, length)
        if self.num_cls_tokens:
            front = (len(ids), self.num_cls_tokens)
            ids = torch.cat((ids.new_full(front, CLS_ID), ids), dim=1)
            valid = torch.cat((valid.new_ones(front), valid), dim=1)
        encoded = self.encoder(ids, valid)
        if self.num_cls_tokens:
            encoded = encoded[:, : self.num_cls_tokens]
        projected: Tensor = self.projection(encoded.flatten(1))
        return projected.view(-1, num_sequences, projected.shape[-1])


def build_embedder(config: ModelConfig, megatron: TransformerConfig) -> nn.Module:
    """The embedder of a model's configuration."""
    return (RobertaEmbedder if config.embedder.has_encoder else LookupEmbedder)(config, megatron)
