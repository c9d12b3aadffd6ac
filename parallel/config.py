"""Settings of the model and of the parallel layout."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DecoderConfig(BaseModel):
    """One stack of transformer layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: int = Field(ge=1, description="Number of transformer layers.")
    hidden_size: int = Field(ge=1, description="Width D of the residual stream.")
    num_attention_heads: int = Field(ge=1, description="Number of attention heads; divides hidden_size.")
    ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="Inner width of the feed-forward layer; default 4 x hidden_size."
    )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """Inner width of the feed-forward layer with the default filled in."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; change one of them"
            )
        return self


class ModelConfig(BaseModel):
    """A Block Transformer (paper section 2) or the vanilla GPT-NeoX baseline."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    architecture: Literal["block", "vanilla"] = Field(
        default="block", description="`block`: embedder, block decoder, token decoder. `vanilla`: GPT-NeoX baseline."
    )
    vocab_size: int = Field(ge=2, description="Rows of the embedding tables and of the head (V).")
    sequence_length: int = Field(default=2048, ge=2, description="Tokens per training sequence, padding included.")
    block_length: int = Field(default=4, ge=1, description="Tokens per block (L_B); `block` only.")
    prefix_length: int = Field(
        default=2,
        ge=1,
        description="Vectors that one context embedding becomes in the token decoder (P); `block` only.",
    )
    block_decoder: DecoderConfig | None = Field(default=None, description="Global decoder over blocks; `block` only.")
    token_decoder: DecoderConfig | None = Field(default=None, description="Local decoder in a block; `block` only.")
    decoder: DecoderConfig | None = Field(default=None, description="The one stack of layers; `vanilla` only.")
    rotary_fraction: float = Field(default=0.25, ge=0.0, le=1.0, description="Part of each head that is rotated.")
    rotary_base: float = Field(default=10000.0, gt=1.0, description="Base of the rotary frequencies.")
    layer_norm_epsilon: float = Field(default=1e-5, gt=0.0, description="Added to the variance in LayerNorm.")
    initializer_std: float = Field(
        default=0.02, gt=0.0, description="Standard deviation of initial matrices and tables (biases start at 0)."
    )

    @property
    def is_block(self) -> bool:
        """Whether this is a Block Transformer."""
        return self.architecture == "block"

    @property
    def blocks(self) -> DecoderConfig:
        """The block decoder's settings; only for `block`."""
        assert self.block_decoder is not None
        return self.block_decoder

    @property
    def tokens(self) -> DecoderConfig:
        """The token decoder's settings; only for `block`."""
        assert self.token_decoder is not None
        return self.token_decoder

    @property
    def vanilla(self) -> DecoderConfig:
        """The vanilla decoder's settings; only for `vanilla`."""
        assert self.decoder is not None
        return self.decoder

    @property
    def num_blocks(self) -> int:
        """Blocks per training sequence (N)."""
        return self.sequence_length // self.block_length

    @property
    def local_length(self) -> int:
        """Positions of one block in the token decoder: prefix and all tokens but the last (P + L_B - 1)."""
        return self.prefix_length + self.block_length - 1

    @property
    def unit_length(self) -> int:
        """Granularity of packing: L_B for `block`, 1 for `vanilla`."""
        return self.block_length if self.is_block else 1

    @property
    def stacks(self) -> tuple[DecoderConfig, ...]:
        """Every decoder stack of the model, in order."""
        return (self.blocks, self.tokens) if self.is_block else (self.vanilla,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        expected = ("block_decoder", "token_decoder") if self.is_block else ("decoder",)
        for name in ("block_decoder", "token_decoder", "decoder"):
            present = getattr(self, name) is not None
            if present != (name in expected):
                verb = "needs" if name in expected else "does not take"
                raise ValueError(
                    f"architecture={self.architecture} {verb} the section {name}; it takes {' and '.join(expected)}"
                )
        if self.is_block:
            self._check_blocks()
        for stack in self.stacks:
            rotary_size = int(stack.head_size * self.rotary_fraction)
            if rotary_size % 2:
                raise ValueError(
                    f"rotary_fraction={self.rotary_fraction} rotates {rotary_size} of {stack.head_size} "
                    "values of a head, which is odd; choose a fraction that gives an even number"
                )
        return self

    def _check_blocks(self) -> None:
        if self.sequence_length % self.block_length:
            raise ValueError(
                f"sequence_length={self.sequence_length} is not a multiple of block_length="
                f"{self.block_length}; use {self.num_blocks * self.block_length}"
            )
        if self.num_blocks < 2:
            raise ValueError(
                f"sequence_length={self.sequence_length} holds fewer than two blocks of block_length="
                f"{self.block_length}; the first block is never predicted, so use at least "
                f"{2 * self.block_length}"
            )
        if self.blocks.hidden_size % self.block_length:
            raise ValueError(
                f"block_decoder.hidden_size={self.blocks.hidden_size} is not a multiple of block_length="
                f"{self.block_length}; the embedder concatenates block_length vectors into one"
            )


class ParallelConfig(BaseModel):
    """How the model is spread over processes: tensor x pipeline x data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(default=1, ge=1, description="Processes that share each layer's matrices (TP).")
    pipeline: int = Field(default=1, ge=1, description="Pipeline stages (PP).")
    data: int = Field(default=1, ge=1, description="Replicas that each see their own micro-batches (DP).")
    sequence_parallel: bool = Field(
        default=False, description="Shard norms and residuals over the tensor-parallel group along blocks or positions."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO: 0 replicates; 1 shards the optimizer; 2 also gradients; 3 also parameters.",
    )
    activation_checkpointing: bool = Field(
        default=False, description="Keep only each layer's input and recompute the layer in the backward pass."
    )

    @property
    def world_size(self) -> int:
        """Number of processes the layout needs."""
        return self.tensor * self.pipeline * self.data

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel=true needs tensor > 1; set sequence_parallel=false")
        if self.zero_stage == 3 and self.pipeline > 1:
            raise ValueError(
                f"zero_stage=3 cannot be combined with pipeline={self.pipeline}; "
                "use zero_stage 0, 1 or 2, or pipeline=1"
            )
        return self


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check a model against a parallel layout.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    tensor = parallel.tensor
    if model.vocab_size % tensor:
        padded = -(-model.vocab_size // tensor) * tensor
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is not a multiple of parallel.tensor={tensor}; pad it to {padded}"
        )
    for stack in model.stacks:
        for name, value in (
            ("num_attention_heads", stack.num_attention_heads),
            ("ffn_hidden_size", stack.feed_forward_size),
        ):
            if value % tensor:
                raise ValueError(
                    f"{name}={value} is not a multiple of parallel.tensor={tensor}; "
                    "change the width or the tensor-parallel size"
                )
    units = model.sequence_length // model.unit_length
    if parallel.sequence_parallel and units % tensor:
        raise ValueError(
            f"parallel.sequence_parallel=true splits {units} {'blocks' if model.is_block else 'positions'} "
            f"over parallel.tensor={tensor}, which does not divide; change model.sequence_length"
        )
    layers = sum(stack.num_layers for stack in model.stacks)
    if parallel.pipeline > layers:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} is more than the model's {layers} layers; use at most {layers}"
        )
