"""Settings of the model's components: decoder stacks, their layers, and the embedder."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DecoderConfig(BaseModel):
    """One stack of transformer layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: int = Field(ge=1, description="Number of transformer layers.")
    hidden_size: int = Field(ge=1, description="Width D of the residual stream.")
    num_attention_heads: int = Field(ge=1, description="Number of query heads; divides hidden_size.")
    num_key_value_heads: int | None = Field(
        default=None,
        ge=1,
        description="Key and value heads, each shared by a group of query heads: fewer is grouped-query, 1 is "
        "multi-query attention; default num_attention_heads.",
    )
    attention_head_size: int | None = Field(
        default=None, ge=1, description="Width of one head; default hidden_size / num_attention_heads."
    )
    ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="Inner width of the feed-forward layer; default 4 x hidden_size."
    )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    @property
    def attention_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads with the default filled in."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.key_value_heads

    @property
    def query_key_value_size(self) -> int:
        """Rows of the fused query, key and value matrix."""
        return (self.num_attention_heads + 2 * self.key_value_heads) * self.head_size

    @property
    def feed_forward_size(self) -> int:
        """Inner width of the feed-forward layer with the default filled in."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.attention_head_size is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; change one of them or give attention_head_size"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}; change one of them"
            )
        return self


class BackboneConfig(BaseModel):
    """What every transformer layer of the block, token and vanilla decoders is made of; the default is GPT-NeoX."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    norm: Literal["layer_norm", "rms_norm"] = Field(default="layer_norm", description="Normalization.")
    norm_epsilon: float = Field(default=1e-5, gt=0.0, description="Added to the variance in each norm.")
    residual: Literal["parallel", "sequential"] = Field(
        default="parallel",
        description="`parallel`: attention and feed-forward both read the layer's input (GPT-NeoX); `sequential`: the "
        "feed-forward reads what attention has added to (Llama).",
    )
    feed_forward: Literal["gelu", "swiglu"] = Field(
        default="gelu", description="`gelu`: two matrices, exact GELU; `swiglu`: three, SiLU gate."
    )
    bias: Literal["all", "query_key_value", "none"] = Field(
        default="all", description="Which linear layers have biases; `query_key_value` is Qwen2's choice."
    )
    query_key_norm: bool = Field(
        default=False, description="RMSNorm of each query and key head before the rotary embedding (Qwen3)."
    )
    rotary_fraction: float = Field(default=0.25, ge=0.0, le=1.0, description="Part of each head that is rotated.")
    rotary_base: float = Field(default=10000.0, gt=1.0, description="Base of the rotary frequencies.")


class EncoderConfig(BaseModel):
    """A RoBERTa encoder over the tokens of one block (paper appendix F.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_layers: int = Field(default=3, ge=1, description="Number of encoder layers.")
    hidden_size: int = Field(default=256, ge=1, description="Width of the encoder.")
    num_attention_heads: int = Field(default=8, ge=1, description="Number of heads; divides hidden_size.")
    ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="Inner width of the feed-forward layer; default 4 x hidden_size."
    )
    max_positions: int = Field(
        default=514, ge=3, description="Rows of the position table; the first token of a block reads row 2."
    )
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout of embeddings and layer outputs in training; drawn from the micro-batch's own tokens, so "
        "that a resumed run repeats it.",
    )

    @property
    def stack(self) -> DecoderConfig:
        """The encoder's layers as a stack of the common layer's parts."""
        return DecoderConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            ffn_hidden_size=self.ffn_hidden_size,
        )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; change one of them"
            )
        return self


class EmbedderConfig(BaseModel):
    """How the tokens of a block become one vector (paper section 2.2)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lookup", "lookup_projection", "roberta", "roberta_cls"] = Field(
        default="lookup",
        description="`lookup`: table of width D / L_B, concatenated; `lookup_projection`: table of any width, "
        "concatenated and projected; `roberta`: encoder outputs of all tokens, concatenated and projected; "
        "`roberta_cls`: encoder outputs of CLS tokens in front of the block, likewise.",
    )
    table_width: int | None = Field(
        default=None,
        ge=1,
        description="Width of the table; only for `lookup_projection`, default the block decoder's hidden_size.",
    )
    num_cls_tokens: int = Field(default=3, ge=1, description="CLS tokens in front of each block; `roberta_cls` only.")
    encoder: EncoderConfig | None = Field(
        default=None, description="The encoder; only for `roberta` and `roberta_cls`, default the paper's."
    )

    @property
    def has_encoder(self) -> bool:
        """Whether tokens pass a RoBERTa encoder."""
        return self.kind in ("roberta", "roberta_cls")

    @property
    def roberta(self) -> EncoderConfig:
        """The encoder's settings with the default filled in."""
        return self.encoder or EncoderConfig()

    @property
    def has_projection(self) -> bool:
        """Whether a linear layer maps the concatenated vectors to the block embedding."""
        return self.kind != "lookup"

    def vector_width(self, hidden_size: int, block_length: int) -> int:
        """Width of the vectors that are concatenated, for a block decoder of width hidden_size."""
        if self.has_encoder:
            return self.roberta.hidden_size
        return hidden_size // block_length if self.kind == "lookup" else self.table_width or hidden_size

    def num_vectors(self, block_length: int) -> int:
        """How many vectors are concatenated into one block embedding."""
        return self.num_cls_tokens if self.kind == "roberta_cls" else block_length

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.table_width is not None and self.kind != "lookup_projection":
            raise ValueError(
                f"kind={self.kind} does not take table_width={self.table_width}; remove it, or use "
                "kind=lookup_projection"
            )
        if self.encoder is not None and not self.has_encoder:
            raise ValueError(f"kind={self.kind} does not take the section encoder; remove it, or use kind=roberta")
        return self
