"""The model during generation: prompts in, then one token per sequence at a time, from cached keys and values.

An engine holds the state of one batch; B sequences, N blocks, L block length, P prefix length, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from inference.cached_layer import CachedStack
from inference.dense import Dense
from parallel.config import ModelConfig
from parallel.decoder_layer import DecoderLayer
from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs
from parallel.pieces import BlockOutput, OutputHead, VanillaInput
from parallel.stage import Stage
from parallel.structure import piece_names
from parallel.token_inputs import BEGIN_ID, TokenInput


class Engine(ABC):
    """What the generation loop asks of a model."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.config: ModelConfig = stage.model_config
        self.names = piece_names(self.config)
        self._head = Head(cast(OutputHead, stage.piece(self.names[-1])))

    @abstractmethod
    def process_prompts(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        """Starts a batch.

        Args:
            batch: prompts, padded on the left to whole blocks.
            max_new_tokens: tokens that will be appended at most.

        Returns:
            Logits [B, V] of the first new token.
        """

    @abstractmethod
    def append(self, tokens: Tensor) -> Tensor:
        """Appends a token [B] to each sequence; returns logits [B, V] of the token after it."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Memory of keys and values of this rank."""

    def _stack(self, prefix: str) -> CachedStack:
        layers = [self.stage.piece(name) for name in self.names if name.startswith(f"{prefix}.layers.")]
        return CachedStack(cast(list[DecoderLayer], layers))


class Head:
    """Final norm and head over the whole vocabulary, of one position of each sequence."""

    def __init__(self, output: OutputHead) -> None:
        self._norm = output.norm
        self._matrix = Dense(output.head.weight)
        self._is_split = parallel_state.get_tensor_model_parallel_world_size() > 1

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, D] -> logits [B, V]."""
        logits = self._matrix(self._norm(hidden))
        if not self._is_split:
            return logits
        gathered: Tensor = gather_from_tensor_model_parallel_region(
            logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
        )
        return gathered


class _KeyMask:
    """Which positions of the global decoder are real; None as long as all are."""

    def __init__(self, real: Tensor, capacity: int) -> None:
        self._real: Tensor | None = None
        if not bool(real.all()):
            self._real = torch.ones(len(real), capacity, dtype=torch.bool, device=real.device)
            self._real[:, : real.shape[1]] = real

    def of(self, length: int) -> Tensor | None:
        """Mask [B, 1, 1, length] of one query behind so many keys."""
        return None if self._real is None else self._real[:, None, None, :length]


class BlockEngine(Engine):
    """Block Transformer: a block step for each block, and inside it a token step for each token."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._embedder = stage.piece("embedder")
        self._blocks = self._stack("block_decoder")
        self._block_output = cast(BlockOutput, stage.piece("block_decoder.output"))
        self._input = cast(TokenInput, stage.piece("token_decoder.input"))
        self._tokens = self._stack("token_decoder")
        self._mask: _KeyMask
        self._vectors: Tensor
        self._block: list[Tensor] = []

    @property
    def cache_bytes(self) -> int:
        """See Engine."""
        return self._blocks.cache.bytes + self._tokens.cache.bytes

    def process_prompts(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        """Runs the block decoder over the prompts; the token decoder has no part in that. See Engine."""
        inputs = prepare_inputs(self.config, batch)
        embedded = self._embedder(None, inputs).transpose(0, 1)
        new_blocks = -(-max_new_tokens // self.config.block_length)
        capacity = embedded.shape[1] + new_blocks
        self._blocks.start(len(embedded), capacity)
        self._tokens.start(len(embedded), self.config.local_length)
        self._mask = _KeyMask(inputs.token_mask.any(dim=2), capacity)
        hidden = self._blocks(embedded.contiguous(), inputs.global_mask)
        return self._start_block(hidden[:, -1])

    def append(self, tokens: Tensor) -> Tensor:
        """Adds to the current block, and starts the next one when it is full; see Engine."""
        self._block.append(tokens)
        if len(self._block) < self.config.block_length:
            return self._token_step(tokens, len(self._block))
        ids = torch.stack(self._block, dim=1)[:, None]
        embedded = self._embedder(None, _real_inputs(ids)).transpose(0, 1)
        hidden = self._blocks(embedded, self._mask.of(self._blocks.cache.length + 1))
        return self._start_block(hidden[:, -1])

    def _start_block(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of a block's first token, from the block decoder's last hidden states [B, D]."""
        self._block = []
        self._tokens.cache.reset()
        context = self._block_output.norm(hidden)
        self._vectors = self._input.expansion(context).view(len(hidden), self._input.num_vectors, -1)
        if self.config.token_decoder_input == "prefix":
            return self._head(self._tokens(self._vectors)[:, -1])
        if self.config.has_cross_attention:
            self._tokens.start_block(self._vectors)
        begin = torch.full((len(hidden),), BEGIN_ID, dtype=torch.int64, device=hidden.device)
        return self._token_step(begin, 0)

    def _token_step(self, tokens: Tensor, place: int) -> Tensor:
        """Logits [B, V] of the token behind these [B]; `place` is that token's place in its block."""
        assert self._input.embedding is not None
        embedded: Tensor = self._input.embedding(tokens[:, None])
        if self.config.token_decoder_input == "summation":
            embedded = embedded + self._vectors[:, place : place + 1]
        return self._head(self._tokens(embedded)[:, -1])


class VanillaEngine(Engine):
    """The vanilla baseline: a token step for each token."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._input = cast(VanillaInput, stage.piece("vanilla.input"))
        self._layers = self._stack("vanilla")
        self._mask: _KeyMask

    @property
    def cache_bytes(self) -> int:
        """See Engine."""
        return self._layers.cache.bytes

    def process_prompts(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        """Runs the decoder over the prompts, and the head over their last positions; see Engine."""
        inputs = prepare_inputs(self.config, batch)
        capacity = batch.token_ids.shape[1] + max_new_tokens
        self._layers.start(len(batch.token_ids), capacity)
        self._mask = _KeyMask(batch.mask, capacity)
        return self._head(self._layers(self._input.embedding(batch.token_ids), inputs.global_mask)[:, -1])

    def append(self, tokens: Tensor) -> Tensor:
        """Adds a token; see Engine."""
        embedded: Tensor = self._input.embedding(tokens[:, None])
        return self._head(self._layers(embedded, self._mask.of(self._layers.cache.length + 1))[:, -1])


def _real_inputs(ids: Tensor) -> ModelInputs:
    """What an embedder reads of whole blocks [B, N, L] of real tokens."""
    real = torch.ones_like(ids, dtype=torch.bool)
    return ModelInputs(token_ids=ids, global_mask=None, local_mask=None, targets=ids, target_mask=real, token_mask=real)
