"""A Block Transformer (arXiv 2406.02657) in plain torch: all that an exported folder needs besides its weights.

    model = BlockTransformer.from_pretrained("FOLDER")
    logits = model(token_ids)                            # [B, N - 1, L, V]: blocks 1 .. N - 1, the first is given
    tokens = model.generate(token_ids, max_new_tokens=32)

B sequences, S tokens, L block length, N = S / L blocks, D width, V vocabulary. Needs torch and safetensors only.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

BEGIN_ID = 0
CLS_ID = 0
ENCODER_PADDING_ID = 1
ENCODER_BACKBONE = {
    "norm": "layer_norm",
    "norm_epsilon": 1e-5,
    "residual": "parallel",
    "feed_forward": "gelu",
    "bias": "all",
    "query_key_norm": False,
    "rotary_fraction": 0.0,
    "rotary_base": 10000.0,
}


def build_norm(width: int, backbone: dict[str, Any]) -> nn.Module:
    """LayerNorm or RMSNorm."""
    kind = nn.LayerNorm if backbone["norm"] == "layer_norm" else nn.RMSNorm
    return kind(width, eps=backbone["norm_epsilon"])


def rotate(states: Tensor, size: int, base: float) -> Tensor:
    """Rotates the first `size` values of each head of [..., length, head size] by position."""
    frequencies = base ** -(torch.arange(0, size, 2, dtype=torch.float32, device=states.device) / size)
    angles = torch.arange(states.shape[-2], dtype=torch.float32, device=states.device)[:, None] * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second, rest = states.split([size // 2, size // 2, states.shape[-1] - size], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Attention(nn.Module):
    """Self-attention; the rows of the fused matrix lie [group][queries | key | value][head size]."""

    def __init__(self, stack: dict[str, Any], backbone: dict[str, Any]) -> None:
        super().__init__()
        width, heads = stack["hidden_size"], stack["num_attention_heads"]
        self.groups = stack.get("num_key_value_heads") or heads
        self.head_size = stack.get("attention_head_size") or width // heads
        self.queries = heads // self.groups
        self.rotary_size = int(self.head_size * backbone["rotary_fraction"])
        self.rotary_base = backbone["rotary_base"]
        rows = (heads + 2 * self.groups) * self.head_size
        self.query_key_value = nn.Linear(width, rows, bias=backbone["bias"] != "none")
        self.dense = nn.Linear(heads * self.head_size, width, bias=backbone["bias"] == "all")
        if backbone["query_key_norm"]:
            self.query_norm = nn.RMSNorm(self.head_size, eps=backbone["norm_epsilon"])
            self.key_norm = nn.RMSNorm(self.head_size, eps=backbone["norm_epsilon"])

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[rows, length, D] -> the same; mask bool, True = may attend, or added to the scores."""
        fused = self.query_key_value(hidden).unflatten(-1, (self.groups, self.queries + 2, self.head_size))
        fused = fused.permute(0, 2, 3, 1, 4)
        query, key, value = fused[:, :, : self.queries].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        if hasattr(self, "query_norm"):
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary_size:
            query = rotate(query, self.rotary_size, self.rotary_base)
            key = rotate(key, self.rotary_size, self.rotary_base)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=self.queries > 1)
        return self.dense(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a block's tokens to its context vectors; rows of the key/value matrix lie [head][key | value]."""

    def __init__(self, stack: dict[str, Any], backbone: dict[str, Any]) -> None:
        super().__init__()
        width, heads = stack["hidden_size"], stack["num_attention_heads"]
        self.groups = stack.get("num_key_value_heads") or heads
        self.head_size = stack.get("attention_head_size") or width // heads
        bias = backbone["bias"]
        self.query = nn.Linear(width, heads * self.head_size, bias=bias != "none")
        self.key_value = nn.Linear(width, 2 * self.groups * self.head_size, bias=bias != "none")
        self.dense = nn.Linear(heads * self.head_size, width, bias=bias == "all")

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Tokens [rows, length, D] and context vectors [rows, K, D] -> [rows, length, D]."""
        query = self.query(hidden).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(-1, (self.groups, -1)).transpose(1, 2).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] > self.groups)
        return self.dense(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between, or three with a SiLU gate."""

    def __init__(self, stack: dict[str, Any], backbone: dict[str, Any]) -> None:
        super().__init__()
        width, bias = stack["hidden_size"], backbone["bias"] == "all"
        inner = stack.get("ffn_hidden_size") or 4 * width
        if backbone["feed_forward"] == "swiglu":
            self.gate = nn.Linear(width, inner, bias)
        self.expand = nn.Linear(width, inner, bias)
        self.contract = nn.Linear(inner, width, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> the same."""
        inner = self.expand(hidden)
        return self.contract(F.silu(self.gate(hidden)) * inner if hasattr(self, "gate") else F.gelu(inner))


class DecoderLayer(nn.Module):
    """Attention, optionally cross-attention, and feed-forward, each behind its norm."""

    def __init__(self, stack: dict[str, Any], backbone: dict[str, Any], crosses: bool = False) -> None:
        super().__init__()
        width = stack["hidden_size"]
        self.parallel = backbone["residual"] == "parallel"
        self.attention_norm, self.attention = build_norm(width, backbone), Attention(stack, backbone)
        self.feed_forward_norm, self.feed_forward = build_norm(width, backbone), FeedForward(stack, backbone)
        if crosses:
            self.cross_attention_norm = build_norm(width, backbone)
            self.cross_attention = CrossAttention(stack, backbone)

    def forward(self, hidden: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        """[rows, length, D] -> the same."""
        sum_ = hidden + self.attention(self.attention_norm(hidden), mask)
        if context is not None:
            normed = self.cross_attention_norm(hidden if self.parallel else sum_)
            sum_ = sum_ + self.cross_attention(normed, context)
        return sum_ + self.feed_forward(self.feed_forward_norm(hidden if self.parallel else sum_))


class EncoderLayer(nn.Module):
    """A RoBERTa layer: attention and feed-forward, each followed by its norm."""

    def __init__(self, stack: dict[str, Any]) -> None:
        super().__init__()
        width = stack["hidden_size"]
        self.attention, self.attention_norm = Attention(stack, ENCODER_BACKBONE), build_norm(width, ENCODER_BACKBONE)
        self.feed_forward = FeedForward(stack, ENCODER_BACKBONE)
        self.feed_forward_norm = build_norm(width, ENCODER_BACKBONE)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[rows, length, W] -> the same."""
        hidden = self.attention_norm(hidden + self.attention(hidden, mask))
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))


class Encoder(nn.Module):
    """RoBERTa over the tokens of one block."""

    def __init__(self, config: dict[str, Any], vocab_size: int) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(config["max_positions"], width)
        self.token_type_embedding = nn.Embedding(1, width)
        self.norm = build_norm(width, ENCODER_BACKBONE)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config["num_layers"]))

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Ids and which are real [rows, T] -> [rows, T, W]."""
        counted = (ids != ENCODER_PADDING_ID).long()
        positions = counted.cumsum(dim=1) * counted + ENCODER_PADDING_ID
        places = self.position_embedding(positions) + self.token_type_embedding.weight[0]
        hidden = self.norm(self.word_embedding(ids) + places)
        # So low that scores vanish in rounding: a row of nothing but padding attends evenly to all of itself.
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros_like(valid, dtype=hidden.dtype).masked_fill(~valid, lowest)[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class Embedder(nn.Module):
    """The tokens of a block as one vector."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section, width, length = config["embedder"], config["block_decoder"]["hidden_size"], config["block_length"]
        kind = section["kind"]
        self.num_cls = section["num_cls_tokens"] if kind == "roberta_cls" else 0
        if kind.startswith("roberta"):
            self.encoder = Encoder(section["encoder"], config["vocab_size"])
            vector = section["encoder"]["hidden_size"]
        else:
            vector = width // length if kind == "lookup" else section.get("table_width") or width
            self.embedding = nn.Embedding(config["vocab_size"], vector)
        if kind != "lookup":
            self.projection = nn.Linear((self.num_cls or length) * vector, width)

    def forward(self, blocks: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [B, N, L] -> [B, N, D]."""
        if hasattr(self, "encoder"):
            ids = F.pad(blocks.flatten(0, 1), (self.num_cls, 0), value=CLS_ID)
            encoded = self.encoder(ids, F.pad(mask.flatten(0, 1), (self.num_cls, 0), value=True))
            vectors = encoded[:, : self.num_cls or None].reshape(*blocks.shape[:2], -1)
        else:
            vectors = self.embedding(blocks).flatten(2)
        return self.projection(vectors) if hasattr(self, "projection") else vectors


class Output(nn.Module):
    """Final norm and, for logits, the head; a tied head is the embedding table instead."""

    def __init__(self, width: int, backbone: dict[str, Any], vocab_size: int | None = None) -> None:
        super().__init__()
        self.norm = build_norm(width, backbone)
        if vocab_size is not None:
            self.head = nn.Linear(width, vocab_size, bias=False)


class BlockDecoder(nn.Module):
    """Layers over block embeddings, causal over blocks."""

    def __init__(self, stack: dict[str, Any], backbone: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(stack, backbone) for _ in range(stack["num_layers"]))
        self.output = Output(stack["hidden_size"], backbone)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """Block embeddings [B, N, D], and which blocks are not all padding [B, N] -> context embeddings [B, N, D]."""
        size = real.shape[1]
        allowed = torch.ones(size, size, dtype=torch.bool, device=real.device).tril() & real[:, None, :]
        # A query without a real block before it attends to itself.
        itself = torch.eye(size, dtype=torch.bool, device=real.device)
        mask = (allowed | (~allowed.any(dim=2, keepdim=True) & itself))[:, None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.output.norm(hidden)


class TokenInput(nn.Module):
    """Expands context embeddings and embeds the tokens of their blocks."""

    def __init__(self, config: dict[str, Any], vectors: int, width: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.expansion = nn.Linear(config["block_decoder"]["hidden_size"], vectors * width)
        if config["token_decoder_input"] != "prefix" or config["block_length"] > 1:
            self.embedding = nn.Embedding(config["vocab_size"], width)

    def expand(self, context: Tensor) -> Tensor:
        """[rows, D] -> [rows, vectors, width]."""
        return self.expansion(context).unflatten(-1, (self.vectors, -1))


class TokenDecoder(nn.Module):
    """Layers over the tokens of one block, which read its context embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        stack, backbone, self.reads = config["token_decoder"], config["backbone"], config["token_decoder_input"]
        length, width = config["block_length"], stack["hidden_size"]
        vectors = config["prefix_length"] if self.reads == "prefix" else length
        self.leading = vectors if self.reads == "prefix" else 1
        self.tied = config["tie_word_embeddings"]
        self.input = TokenInput(config, vectors, width)
        crosses = self.reads == "cross_attention"
        self.layers = nn.ModuleList(DecoderLayer(stack, backbone, crosses) for _ in range(stack["num_layers"]))
        self.output = Output(width, backbone, None if self.tied else config["vocab_size"])

    def forward(self, context: Tensor, targets: Tensor, real: Tensor) -> Tensor:
        """Context embeddings [rows, D], ids and mask of their blocks [rows, L] -> logits [rows, L, V]."""
        expanded = self.input.expand(context)
        hidden = self._read_prefix(expanded, targets) if self.reads == "prefix" else self._begin(targets)
        if self.reads == "summation":
            hidden = hidden + expanded
        keys = F.pad(real[:, :-1], (self.leading, 0), value=True)
        causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).tril()
        mask = keys[:, None, None] & causal
        for layer in self.layers:
            hidden = layer(hidden, mask, expanded if self.reads == "cross_attention" else None)
        hidden = self.output.norm(hidden[:, self.leading - 1 :])
        return F.linear(hidden, (self.input.embedding if self.tied else self.output.head).weight)

    def _read_prefix(self, prefix: Tensor, targets: Tensor) -> Tensor:
        if targets.shape[1] == 1:
            return prefix
        return torch.cat((prefix, self.input.embedding(targets[:, :-1])), dim=1)

    def _begin(self, targets: Tensor) -> Tensor:
        return self.input.embedding(F.pad(targets[:, :-1], (1, 0), value=BEGIN_ID))


class BlockTransformer(nn.Module):
    """Embedder, block decoder and token decoder; see the module.

    Args:
        config: the entry `model` of the folder's config.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.block_length = config["block_length"]
        self.embedder = Embedder(config)
        self.block_decoder = BlockDecoder(config["block_decoder"], config["backbone"])
        self.token_decoder = TokenDecoder(config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype = torch.float32) -> "BlockTransformer":
        """Loads an exported folder.

        Args:
            directory: holds config.json and model.safetensors, or its shards.
            dtype: type of the weights in memory.
        """
        directory = Path(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = cls(config["model"])
        missing = set(model.state_dict())
        for file in sorted(directory.glob("model*.safetensors")):
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
            unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
            if unknown:
                raise ValueError(f"{file} holds {unknown[0]}, which the model does not have")
            missing -= tensors.keys()
        if missing:
            raise ValueError(f"{directory} holds no weights for {min(missing)}")
        return model.eval()

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the tokens of blocks 1 .. N - 1, each computed from the tokens before it.

        Args:
            token_ids: int64 [B, S]; S is a multiple of L.
            mask: bool [B, S]; False marks padding. Default: none is.

        Returns:
            [B, N - 1, L, V].
        """
        blocks = token_ids.view(len(token_ids), -1, self.block_length)
        real = torch.ones_like(blocks, dtype=torch.bool) if mask is None else mask.view_as(blocks)
        context = self.encode_blocks(blocks, real)[:, :-1]
        logits = self.token_decoder(context.flatten(0, 1), blocks[:, 1:].flatten(0, 1), real[:, 1:].flatten(0, 1))
        return logits.unflatten(0, (len(blocks), -1))

    def encode_blocks(self, blocks: Tensor, real: Tensor) -> Tensor:
        """Ids and mask [B, N, L] -> context embeddings [B, N, D]; number n is for block n + 1."""
        return self.block_decoder(self.embedder(blocks, real), real.any(dim=2))

    @torch.no_grad()
    def generate(self, token_ids: Tensor, max_new_tokens: int, pad_id: int = 0) -> Tensor:
        """Continues sequences with the most likely tokens; nothing is cached.

        Args:
            token_ids: int64 [B, S], S at least 1; padded on the left to whole blocks inside.
            max_new_tokens: tokens to add.
            pad_id: id that padded places hold.

        Returns:
            [B, S + max_new_tokens].
        """
        front = -token_ids.shape[1] % self.block_length
        sequence = F.pad(token_ids, (front, 0), value=pad_id)
        real = F.pad(torch.ones_like(token_ids, dtype=torch.bool), (front, 0), value=False)
        length, goal = self.block_length, sequence.shape[1] + max_new_tokens
        while sequence.shape[1] < goal:
            blocks = sequence.view(len(sequence), -1, length)
            context = self.encode_blocks(blocks, real.view_as(blocks))[:, -1]
            block = torch.zeros_like(blocks[:, 0])
            for position in range(length):
                logits = self.token_decoder(context, block, torch.ones_like(block, dtype=torch.bool))
                block[:, position] = logits[:, position].argmax(dim=-1)
            sequence = torch.cat((sequence, block), dim=1)
            real = F.pad(real, (0, length), value=True)
        return sequence[:, front:goal]
