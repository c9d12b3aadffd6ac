"""Settings of the model and of the parallel layout."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from parallel.component_config import BackboneConfig, DecoderConfig, EmbedderConfig


class ModelConfig(BaseModel):
    """A Block Transformer (paper section 2) or a vanilla transformer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    architecture: Literal["block", "vanilla"] = Field(
        default="block", description="`block`: embedder, block decoder, token decoder. `vanilla`: the baseline."
    )
    vocab_size: int = Field(ge=2, description="Rows of the embedding tables and of the head (V).")
    sequence_length: int = Field(default=2048, ge=2, description="Tokens per training sequence, padding included.")
    block_length: int = Field(default=4, ge=1, description="Tokens per block (L_B); `block` only.")
    embedder: EmbedderConfig = Field(default=EmbedderConfig(), description="Tokens to block embeddings; `block` only.")
    token_decoder_input: Literal["prefix", "summation", "cross_attention"] = Field(
        default="prefix",
        description="How the token decoder reads a context embedding (paper section 2.4): as `prefix` vectors before "
        "the tokens, by `summation` with the token embeddings, or by `cross_attention` in each layer; `block` only.",
    )
    prefix_length: int = Field(
        default=2,
        ge=1,
        description="Vectors that one context embedding becomes in front of the tokens (P); `prefix` only: the other "
        "methods make block_length of them.",
    )
    block_decoder: DecoderConfig | None = Field(default=None, description="Global decoder over blocks; `block` only.")
    token_decoder: DecoderConfig | None = Field(default=None, description="Local decoder in a block; `block` only.")
    decoder: DecoderConfig | None = Field(default=None, description="The one stack of layers; `vanilla` only.")
    backbone: BackboneConfig = Field(default=BackboneConfig(), description="What the decoder layers are made of.")
    tie_word_embeddings: bool = Field(
        default=False,
        description="The head shares the token embedding table (of the token decoder in a `block` model).",
    )
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
    def has_cross_attention(self) -> bool:
        """Whether token-decoder layers attend to the context embedding by cross-attention."""
        return self.is_block and self.token_decoder_input == "cross_attention"

    @property
    def num_context_vectors(self) -> int:
        """Vectors that one context embedding is expanded to: P, or L_B for summation and cross-attention."""
        return self.prefix_length if self.token_decoder_input == "prefix" else self.block_length

    @property
    def leading_positions(self) -> int:
        """Positions of a block in the token decoder before its first token: the prefix, or one begin position."""
        return self.prefix_length if self.token_decoder_input == "prefix" else 1

    @property
    def local_length(self) -> int:
        """Positions of one block in the token decoder: the leading ones and all tokens but the last."""
        return self.leading_positions + self.block_length - 1

    @property
    def carried_length(self) -> int:
        """Vectors of one block between token-decoder layers: its positions, and what cross-attention reads."""
        return self.local_length + (self.block_length if self.has_cross_attention else 0)

    @property
    def embeds_local_tokens(self) -> bool:
        """Whether the token decoder has an embedding table; a prefix before blocks of one token needs none."""
        return self.token_decoder_input != "prefix" or self.block_length > 1

    @property
    def tied_pieces(self) -> tuple[str, str] | None:
        """First and last piece that share a table, if any."""
        if not self.tie_word_embeddings:
            return None
        owner = "token_decoder" if self.is_block else "vanilla"
        return f"{owner}.input", f"{owner}.output"

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
            rotary_size = int(stack.head_size * self.backbone.rotary_fraction)
            if rotary_size % 2:
                raise ValueError(
                    f"backbone.rotary_fraction={self.backbone.rotary_fraction} rotates {rotary_size} of "
                    f"{stack.head_size} values of a head, which is odd; choose a fraction that gives an even number"
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
        if self.embedder.kind == "lookup" and self.blocks.hidden_size % self.block_length:
            raise ValueError(
                f"block_decoder.hidden_size={self.blocks.hidden_size} is not a multiple of block_length="
                f"{self.block_length}; the embedder concatenates block_length vectors into one (or use "
                "embedder.kind=lookup_projection)"
            )
        if self.tie_word_embeddings and not self.embeds_local_tokens:
            raise ValueError(
                "tie_word_embeddings=true has nothing to tie: with block_length=1 the token decoder has no embedding "
                "table; set tie_word_embeddings=false"
            )
        self._check_encoder()

    def _check_encoder(self) -> None:
        if not self.embedder.has_encoder:
            return
        encoder = self.embedder.roberta
        length = self.block_length + (self.embedder.num_cls_tokens if self.embedder.kind == "roberta_cls" else 0)
        if length + 2 > encoder.max_positions:
            raise ValueError(
                f"embedder.encoder.max_positions={encoder.max_positions} is too small for {length} tokens of a block; "
                f"use at least {length + 2}"
            )


class ParallelConfig(BaseModel):
    """How the model is spread over processes: tensor x pipeline x data."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tensor: int = Field(default=1, ge=1, description="Processes that share each layer's matrices (TP).")
    pipeline: int = Field(default=1, ge=1, description="Pipeline stages (PP).")
    data: int = Field(default=1, ge=1, description="Replicas that each see their own micro-batches (DP).")
    sequence_parallel: bool = Field(
        default=False, description="Shard norms and residuals over the tensor-parallel group along blocks or positions."
    )
    block_parallel: bool = Field(
        default=False,
        description="Spread the token decoder's blocks, not its matrices, over the tensor-parallel group: nothing is "
        "sent in its forward pass, but every process holds it whole.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO: 0 replicates; 1 shards the optimizer; 2 also gradients; 3 also parameters. "
        "In fp32 with `data: 1` there is nothing for 1 and 2 to shard, and they train as 0 does.",
    )
    overlap_gradient_reduction: bool = Field(
        default=False,
        description="Sum gradients over replicas while the backward pass still runs, bucket by bucket, on GPU in a "
        "stream of their own; ZeRO 3 gathers parameters ahead as well. Without a pipeline; in bf16 for ZeRO 2 and 3. "
        "Nothing is summed with `data: 1`.",
    )
    activation_checkpointing: Literal["none", "selective", "layer", "budget"] = Field(
        default="none",
        description="What the backward pass recomputes: `none`: nothing; `selective`: all of a layer but the products "
        "of its wide matrices and attention; `layer`: each layer from its input; `budget`: of these, in each layer the "
        "cheapest, so that a process's activations fit into `activation_memory_gib`.",
    )
    activation_memory_gib: float | None = Field(
        default=None,
        gt=0.0,
        description="GiB for the activations of a process, of all its micro-batches in flight; for "
        "`activation_checkpointing: budget` only.",
    )

    @property
    def world_size(self) -> int:
        """Number of processes the layout needs."""
        return self.tensor * self.pipeline * self.data

    @property
    def splits_rows(self) -> bool:
        """Whether tensor-parallel ranks have some blocks (positions) each in some of the pieces."""
        return self.sequence_parallel or self.block_parallel

    def without_idle_sharding(self, precision: str) -> "ParallelConfig":
        """With ZeRO 0 instead of 1 and 2 where one replica has nothing to share: they would copy gradients and weights.

        In bf16 they stay: without them DeepSpeed cannot accumulate gradients in fp32.
        """
        if self.data > 1 or precision != "fp32" or self.zero_stage not in (1, 2):
            return self
        return self.model_copy(update={"zero_stage": 0, "overlap_gradient_reduction": False})

    def data_rank(self, rank: int) -> int:
        """The data-parallel rank of a process: ranks count tensor-parallel ranks first, then data-parallel ones."""
        return rank // self.tensor % self.data

    def __str__(self) -> str:
        sequence = " + sequence parallel" if self.sequence_parallel else ""
        sequence += " + block parallel" if self.block_parallel else ""
        return f"tensor {self.tensor}{sequence} x pipeline {self.pipeline} x data {self.data}, ZeRO {self.zero_stage}"

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        """Configurations and checkpoints of earlier versions say true or false."""
        return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _budget_is_for_its_policy(self) -> Self:
        if (self.activation_checkpointing == "budget") == (self.activation_memory_gib is not None):
            return self
        if self.activation_memory_gib is None:
            raise ValueError(
                "activation_checkpointing=budget needs activation_memory_gib; set it to the GiB that a process has "
                "for activations"
            )
        raise ValueError(
            f"activation_memory_gib={self.activation_memory_gib} is only for activation_checkpointing=budget, and that "
            f"is {self.activation_checkpointing}; remove it, or use activation_checkpointing=budget"
        )

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel=true needs tensor > 1; set sequence_parallel=false")
        if self.block_parallel and self.tensor == 1:
            raise ValueError("block_parallel=true needs tensor > 1; set block_parallel=false")
        if self.overlap_gradient_reduction:
            self._check_overlap()
        if self.zero_stage == 3 and self.pipeline > 1:
            raise ValueError(
                f"zero_stage=3 cannot be combined with pipeline={self.pipeline}; "
                "use zero_stage 0, 1 or 2, or pipeline=1"
            )
        return self

    def _check_overlap(self) -> None:
        if self.zero_stage == 0:
            raise ValueError(
                "overlap_gradient_reduction=true does nothing with zero_stage=0; use zero_stage 1, 2 or 3, or set it "
                "to false"
            )
        if self.pipeline > 1:
            raise ValueError(
                f"overlap_gradient_reduction=true does nothing with pipeline={self.pipeline}, which reduces them at "
                "the end; use pipeline=1, or set it to false"
            )


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
    if parallel.block_parallel:
        _check_block_parallel(model)
    for stack in model.stacks[:-1] if parallel.block_parallel else model.stacks:
        _check_split("num_attention_heads", stack.num_attention_heads, tensor)
        if tensor % stack.key_value_heads:  # fewer heads than ranks: ranks share one
            _check_split("num_key_value_heads", stack.key_value_heads, tensor)
        _check_split("ffn_hidden_size", stack.feed_forward_size, tensor)
    if model.is_block and model.embedder.has_encoder:
        _check_split("embedder.encoder.num_attention_heads", model.embedder.roberta.num_attention_heads, tensor)
        _check_split("embedder.encoder.ffn_hidden_size", model.embedder.roberta.stack.feed_forward_size, tensor)
    units = model.sequence_length // model.unit_length
    if parallel.splits_rows and units % tensor:
        field = "sequence_parallel" if parallel.sequence_parallel else "block_parallel"
        raise ValueError(
            f"parallel.{field}=true splits {units} {'blocks' if model.is_block else 'positions'} "
            f"over parallel.tensor={tensor}, which does not divide; change model.sequence_length"
        )
    _check_pipeline(model, parallel)


def check_precision(parallel: ParallelConfig, precision: str) -> None:
    """Checks what DeepSpeed can do in a precision.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    if precision != "bf16":
        return
    if parallel.zero_stage == 0:
        raise ValueError(
            "parallel.zero_stage=0 cannot accumulate bf16 gradients in fp32 (DeepSpeed refuses); "
            "use parallel.zero_stage=1 or train.precision=fp32"
        )
    if parallel.zero_stage == 1 and parallel.overlap_gradient_reduction:
        raise ValueError(
            "parallel.overlap_gradient_reduction=true does nothing with parallel.zero_stage=1 in bf16, where DeepSpeed "
            "sums the fp32 gradients at the end; use parallel.zero_stage=2 or 3, or set it to false"
        )
    if parallel.zero_stage == 2 and parallel.pipeline > 1:
        raise ValueError(
            "parallel.zero_stage=2 under a pipeline would accumulate bf16 gradients in bf16; "
            "use parallel.zero_stage=1 or train.precision=fp32"
        )


def _check_block_parallel(model: ModelConfig) -> None:
    if not model.is_block:
        raise ValueError(
            "parallel.block_parallel=true spreads the blocks of a token decoder, and model.architecture=vanilla has "
            "none; set it to false"
        )
    if model.tie_word_embeddings:
        raise ValueError(
            "parallel.block_parallel=true needs the token decoder's whole table on every process, but "
            "model.tie_word_embeddings=true makes it the head's, which is split; set one of them to false"
        )


def _check_split(name: str, value: int, tensor: int) -> None:
    if value % tensor:
        raise ValueError(
            f"{name}={value} is not a multiple of parallel.tensor={tensor}; "
            "change the model or the tensor-parallel size"
        )


def _check_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    layers = sum(stack.num_layers for stack in model.stacks)
    if model.tie_word_embeddings:
        # Both ends of the shared table and all between stay on one stage.
        stages = 1 + model.blocks.num_layers if model.is_block else 1
        if parallel.pipeline > stages:
            raise ValueError(
                f"parallel.pipeline={parallel.pipeline} would part the two ends of model.tie_word_embeddings=true; "
                f"use at most {stages}, or untie the head"
            )
    if parallel.pipeline > layers:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} is more than the model's {layers} layers; use at most {layers}"
        )
