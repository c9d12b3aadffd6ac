"""The model as a flat list of pieces; a pipeline stage is a contiguous slice of it.

Each piece maps hidden states to hidden states (the first reads token ids, the last returns the loss per token).
Shapes, B sequences, N blocks, T positions and vectors of a block (ModelConfig.carried_length), D the stack's width:
    after the embedder and in the block decoder   [N, B, D]
    in the token decoder                          [N * B, T, D]
    in the vanilla decoder                        [S, B, D]
With sequence parallelism, the first dimension is divided by the tensor-parallel size.
"""

from collections.abc import Callable

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.checkpointing import Policy
from parallel.config import ModelConfig
from parallel.decoder_layer import CrossAttentionLayer, DecoderLayer
from parallel.embedders import build_embedder
from parallel.inputs import ModelInputs
from parallel.linear import TokenEmbedding
from parallel.norms import build_norm
from parallel.output_head import OutputHead
from parallel.token_inputs import build_token_input


class VanillaInput(nn.Module):
    """Token embeddings of the vanilla baseline."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config.vocab_size, config.vanilla.hidden_size, megatron)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Ids [B, S] -> [S, B, D]."""
        embedded: Tensor = self.embedding(inputs.token_ids.t())
        return embedded


class BlockOutput(nn.Module):
    """Final norm of the block decoder; what it returns are the context embeddings."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.norm = build_norm(config.blocks.hidden_size, config.backbone, megatron)

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """[N, B, D] -> context embeddings [N, B, D]."""
        context: Tensor = self.norm(hidden)
        return context


def build_piece(name: str, config: ModelConfig, megatron: TransformerConfig, policy: Policy = "none") -> nn.Module:
    """Builds one piece by name; weights are left uninitialized.

    Args:
        name: one of piece_names(config).
        config: the model.
        megatron: Megatron-core's settings of the parallel layers.
        policy: activation checkpointing, if it is a decoder layer.
    """
    if ".layers." in name:
        is_local = name.startswith("token_decoder")
        if is_local and config.has_cross_attention:
            return CrossAttentionLayer(config, megatron, policy)
        return DecoderLayer(config, megatron, is_local, policy)
    pieces: dict[str, Callable[[ModelConfig, TransformerConfig], nn.Module]] = {
        "embedder": build_embedder,
        "vanilla.input": VanillaInput,
        "block_decoder.output": BlockOutput,
        "token_decoder.input": build_token_input,
        "token_decoder.output": OutputHead,
        "vanilla.output": OutputHead,
    }
    return pieces[name](config, megatron)
