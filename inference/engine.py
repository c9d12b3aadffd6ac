"""The model during generation: prompts in, then one token per sequence at a time, from cached keys and values.

An engine holds the state of one batch; B sequences, N blocks, L block length, P prefix length, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from inference.cached_layer import CachedStack
from inference.dense import NormedLinear
from inference.kv_cache import KeyValueCache
from parallel.config import ModelConfig
from parallel.decoder_layer import DecoderLayer
from parallel.embedders import LookupEmbedder
from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs
from parallel.linear import TokenEmbedding
from parallel.output_head import OutputHead
from parallel.pieces import BlockOutput, VanillaInput
from parallel.stage import Stage
from parallel.structure import piece_names
from parallel.token_inputs import BEGIN_ID, TokenInput

Choice = Callable[[Tensor, int], Tensor]
Wrapper = Callable[[str, Callable[..., Any]], Callable[..., Any]]


class Engine(ABC):
    """What the generation loop asks of a model."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.config: ModelConfig = stage.model_config
        self.names = piece_names(self.config)
        self._output = Head(cast(OutputHead, stage.piece(self.names[-1])))
        self._head: Callable[[Tensor], Tensor] = self._output

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

    @abstractmethod
    def decode_unit(self, tokens: Tensor, choose: Choice) -> None:
        """Makes a unit of tokens from the unit before, with no decision that depends on where in the text that is.

        This is what CUDA graphs record; `growing_cache` must be fixed.

        Args:
            tokens: [B, unit_tokens], the newest tokens; overwritten by those that follow.
            choose: the choice among logits [B, V] for a place in the unit.
        """

    @property
    @abstractmethod
    def unit_tokens(self) -> int:
        """Tokens of a unit."""

    @property
    @abstractmethod
    def growing_cache(self) -> KeyValueCache:
        """The cache that grows with the text."""

    def instrument(self, wrap: Wrapper) -> None:
        """Puts a wrapper around each component that is called during generation."""
        self._head = wrap("head", self._head)

    @property
    @abstractmethod
    def caches(self) -> tuple[KeyValueCache, ...]:
        """Keys and values of the batch, on this rank."""

    def release(self) -> None:
        """Gives the memory of the batch back."""
        self._output.release()
        for cache in self.caches:
            cache.release()

    def _stack(self, prefix: str) -> CachedStack:
        layers = [self.stage.piece(name) for name in self.names if name.startswith(f"{prefix}.layers.")]
        return CachedStack(cast(list[DecoderLayer], layers))


class Head:
    """Final norm and head over the whole vocabulary, of one position of each sequence."""

    def __init__(self, output: OutputHead) -> None:
        self._linear = NormedLinear(output.norm, output.head)
        self._is_split = parallel_state.get_tensor_model_parallel_world_size() > 1

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, D] -> logits [B, V], which may be overwritten by the next call."""
        logits = self._linear(hidden)
        if not self._is_split:
            return logits
        gathered: Tensor = gather_from_tensor_model_parallel_region(
            logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
        )
        return gathered

    def release(self) -> None:
        """Gives the memory of the logits back."""
        self._linear.release()


class _KeyMask:
    """Which positions of the global decoder may be attended to; None as long as all may."""

    def __init__(self, real: Tensor, cache: KeyValueCache) -> None:
        self._cache = cache
        self._real: Tensor | None = None
        self._places = torch.arange(cache.capacity, device=real.device)
        if not bool(real.all()):
            self._real = torch.ones(len(real), cache.capacity, dtype=torch.bool, device=real.device)
            self._real[:, : real.shape[1]] = real

    def of_next(self) -> Tensor | None:
        """Mask [B or 1, 1, 1, keys] of the position that comes next, itself included."""
        cache = self._cache
        if cache.position is None:
            return None if self._real is None else self._real[:, None, None, : cache.length + 1]
        present = (self._places[: cache.span] <= cache.position)[None, None, None]
        return present if self._real is None else present & self._real[:, None, None, : cache.span]


class BlockEngine(Engine):
    """Block Transformer: a block step for each block, and inside it a token step for each token."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._embedder: Callable[..., Tensor] = stage.piece("embedder")
        self._embed_block = _block_embedder(stage.piece("embedder"))
        self._blocks = self._stack("block_decoder")
        self._input = cast(TokenInput, stage.piece("token_decoder.input"))
        table = self._input.embedding
        self._embedding: Callable[[Tensor], Tensor] | None = None if table is None else _lookup(table)
        block_output = cast(BlockOutput, stage.piece("block_decoder.output"))
        self._expansion: Callable[[Tensor], Tensor] = NormedLinear(block_output.norm, self._input.expansion)
        self._tokens = self._stack("token_decoder")
        self._mask: _KeyMask
        self._vectors: Tensor
        self._block: list[Tensor] = []

    def instrument(self, wrap: Wrapper) -> None:
        """See Engine."""
        super().instrument(wrap)
        self._embedder = wrap("embedder", self._embedder)
        self._embed_block = wrap("embedder", self._embed_block)
        self._blocks.instrument("block decoder", wrap)
        self._tokens.instrument("token decoder", wrap)

    @property
    def unit_tokens(self) -> int:
        """A block."""
        return self.config.block_length

    @property
    def growing_cache(self) -> KeyValueCache:
        """The block decoder's."""
        return self._blocks.cache

    @property
    def caches(self) -> tuple[KeyValueCache, ...]:
        """See Engine."""
        return self._blocks.cache, self._tokens.cache

    def process_prompts(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        """Runs the block decoder over the prompts; the token decoder has no part in that. See Engine."""
        inputs = prepare_inputs(self.config, batch)
        embedded = self._embedder(None, inputs).transpose(0, 1)
        new_blocks = -(-max_new_tokens // self.config.block_length)
        capacity = embedded.shape[1] + new_blocks
        self._blocks.start(len(embedded), capacity)
        self._tokens.start(len(embedded), self.config.local_length)
        self._mask = _KeyMask(inputs.token_mask.any(dim=2), self._blocks.cache)
        hidden = self._blocks(embedded.contiguous(), inputs.global_mask)
        return self._start_block(hidden)

    def append(self, tokens: Tensor) -> Tensor:
        """Adds to the current block, and starts the next one when it is full; see Engine."""
        self._block.append(tokens)
        if len(self._block) < self.config.block_length:
            return self._token_step(tokens, len(self._block))
        return self._block_step(torch.stack(self._block, dim=1))

    def decode_unit(self, tokens: Tensor, choose: Choice) -> None:
        """A block step and a token step for each token of the block; see Engine."""
        logits = self._block_step(tokens)
        for place in range(self.config.block_length):
            tokens[:, place] = choose(logits, place)
            if place + 1 < self.config.block_length:
                logits = self._token_step(tokens[:, place], place + 1)

    def _block_step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of the first token behind a block of tokens [B, L]."""
        return self._start_block(self._blocks(self._embed_block(tokens)[:, None], self._mask.of_next()))

    def _start_block(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of a block's first token, from the block decoder's last hidden states [B, D]."""
        self._block = []
        self._tokens.cache.reset()
        self._vectors = self._expansion(hidden).view(len(hidden), self._input.num_vectors, -1)
        if self.config.token_decoder_input == "prefix":
            return self._head(self._tokens(self._vectors))
        if self.config.has_cross_attention:
            self._tokens.start_block(self._vectors)
        begin = torch.full((len(hidden),), BEGIN_ID, dtype=torch.int64, device=hidden.device)
        return self._token_step(begin, 0)

    def _token_step(self, tokens: Tensor, place: int) -> Tensor:
        """Logits [B, V] of the token behind these [B]; `place` is that token's place in its block."""
        assert self._embedding is not None
        embedded = self._embedding(tokens[:, None])
        if self.config.token_decoder_input == "summation":
            embedded = embedded + self._vectors[:, place : place + 1]
        return self._head(self._tokens(embedded))


class VanillaEngine(Engine):
    """The vanilla baseline: a token step for each token."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._embedding = _lookup(cast(VanillaInput, stage.piece("vanilla.input")).embedding)
        self._layers = self._stack("vanilla")
        self._mask: _KeyMask

    def instrument(self, wrap: Wrapper) -> None:
        """See Engine."""
        super().instrument(wrap)
        self._layers.instrument("layers", wrap)

    @property
    def unit_tokens(self) -> int:
        """As many as usual in a block, so that a graph is worth its launch."""
        return 4

    @property
    def growing_cache(self) -> KeyValueCache:
        """The only one."""
        return self._layers.cache

    @property
    def caches(self) -> tuple[KeyValueCache, ...]:
        """See Engine."""
        return (self._layers.cache,)

    def process_prompts(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        """Runs the decoder over the prompts, and the head over their last positions; see Engine."""
        inputs = prepare_inputs(self.config, batch)
        capacity = batch.token_ids.shape[1] + max_new_tokens
        self._layers.start(len(batch.token_ids), capacity)
        self._mask = _KeyMask(batch.mask, self._layers.cache)
        return self._head(self._layers(self._embedding(batch.token_ids), inputs.global_mask))

    def append(self, tokens: Tensor) -> Tensor:
        """Adds a token; see Engine."""
        return self._head(self._layers(self._embedding(tokens[:, None]), self._mask.of_next()))

    def decode_unit(self, tokens: Tensor, choose: Choice) -> None:
        """A token step for each token; see Engine."""
        newest = tokens[:, -1]
        for place in range(self.unit_tokens):
            tokens[:, place] = choose(self.append(newest), place)
            newest = tokens[:, place]


def _lookup(table: TokenEmbedding) -> Callable[[Tensor], Tensor]:
    """Looks ids up; without tensor parallelism by torch's one operator."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return table
    weight = table.weight.detach()
    return lambda ids: F.embedding(ids, weight)


def _block_embedder(embedder: nn.Module) -> Callable[[Tensor], Tensor]:
    """Embeds a block of real tokens [B, L] as [B, D]."""
    if isinstance(embedder, LookupEmbedder):
        lookup, projection = _lookup(embedder.embedding), embedder.projection
        if projection is None:
            return lambda tokens: lookup(tokens).flatten(1)
        return lambda tokens: projection(lookup(tokens).flatten(1))
    return lambda tokens: embedder(None, _real_inputs(tokens[:, None]))[0]


def _real_inputs(ids: Tensor) -> ModelInputs:
    """What an embedder reads of whole blocks [B, N, L] of real tokens."""
    real = torch.ones_like(ids, dtype=torch.bool)
    return ModelInputs(token_ids=ids, global_mask=None, local_mask=None, targets=ids, target_mask=real, token_mask=real)
