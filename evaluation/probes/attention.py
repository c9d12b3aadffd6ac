"""Attention maps of the block decoder and the token decoder (paper section 4, appendix R)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.documents import DocumentChunks
from evaluation.probes.attention_result import AttentionResult, GlobalAttention, LocalAttention
from parallel.attention import CrossAttention, SelfAttention
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.stage import Stage

# The corner of the maps of the block decoder that is kept.
CORNER = 32
# Arguments of an attention layer: hidden states, and a mask or context vectors.
Arguments = tuple[Tensor, Any]
Observer = Callable[[Any, Arguments], None]


class _Mean:
    """Mean of tensors that come as sums over some items."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._count = 0

    def add(self, total: Tensor, count: int) -> None:
        self._total = self._total + total.double().cpu()
        self._count += count

    def result(self) -> list[Any]:
        assert isinstance(self._total, Tensor)
        values: list[Any] = (self._total / self._count).tolist()
        return values


class _GlobalLayer:
    """What the positions of one layer of the block decoder, or of a vanilla model, attend to."""

    def __init__(self) -> None:
        self._first, self._corner, self._by_distance = _Mean(), _Mean(), _Mean()

    def observe(self, attention: SelfAttention, arguments: Arguments) -> None:
        """Hook before attention over hidden states [N, B, D]."""
        hidden, mask = arguments
        for index in range(hidden.shape[1]):  # one sequence at a time: its map is large enough
            weights = attention.weights(hidden[:, index : index + 1], mask)[0]
            mean = weights.mean(dim=0)
            self._first.add(weights[:, 1:, 0].mean(dim=1), 1)
            self._corner.add(mean[:CORNER, :CORNER], 1)
            self._by_distance.add(_diagonal_means(mean[1:, 1:]), 1)

    def result(self) -> GlobalAttention:
        return GlobalAttention(self._first.result(), self._by_distance.result(), self._corner.result())


class _LocalLayer:
    """What the positions of a block attend to in one layer of the token decoder."""

    def __init__(self) -> None:
        self._self, self._cross = _Mean(), _Mean()
        self._has_cross = False

    def observe(self, num_sequences: int, attention: SelfAttention, arguments: Arguments) -> None:
        """Hook before self-attention over hidden states [N * B, T, D]; a sequence's last block predicts nothing."""
        hidden, mask = arguments
        weights = attention.weights(hidden[:-num_sequences], mask)
        self._self.add(weights.mean(dim=1).sum(dim=0), len(weights))

    def observe_cross(self, num_sequences: int, attention: CrossAttention, arguments: Arguments) -> None:
        """The same before cross-attention."""
        hidden, context = arguments
        weights = attention.weights(hidden[:-num_sequences], context[:-num_sequences])
        self._cross.add(weights.mean(dim=1).sum(dim=0), len(weights))
        self._has_cross = True

    def result(self) -> LocalAttention:
        return LocalAttention(self._self.result(), self._cross.result() if self._has_cross else None)


@torch.no_grad()
def probe_attention(stage: Stage, chunks: DocumentChunks, batch_tokens: int) -> AttentionResult:
    """Averages attention weights over text.

    Args:
        stage: the whole model.
        chunks: text; whole blocks of the model.
        batch_tokens: tokens of a forward pass.
    """
    config = stage.model_config
    names = [name for name in stage.names if ".layers." in name]
    local = {name: _LocalLayer() for name in names if name.startswith("token_decoder.")}
    everywhere = {name: _GlobalLayer() for name in names if name not in local}
    for batch in chunks.batches(batch_tokens, next(stage.parameters()).device):
        observers: dict[str, Observer] = {f"{name}.attention": one.observe for name, one in everywhere.items()}
        for name, layer in local.items():
            observers[f"{name}.attention"] = partial(layer.observe, len(batch))
            if config.has_cross_attention:
                observers[f"{name}.cross_attention"] = partial(layer.observe_cross, len(batch))
        inputs = prepare_inputs(config, MicroBatch(batch, torch.ones_like(batch, dtype=torch.bool)))
        with _observed(stage, observers):
            stage.run(None, inputs, stage.names[:-1])
    return AttentionResult(
        chunks=len(chunks),
        chunk_length=chunks.length,
        leading_names=_leading_names(stage),
        everywhere=tuple(layer.result() for layer in everywhere.values()),
        local=tuple(layer.result() for layer in local.values()),
    )


def _diagonal_means(weights: Tensor) -> Tensor:
    """Means of the diagonals of a causal map [N, N], from the main one downwards: fp64 [N]."""
    size = len(weights)
    places = torch.arange(size, device=weights.device)
    distances = (places[:, None] - places).clamp(min=0)  # above the main diagonal all weights are 0
    sums = weights.new_zeros(size, dtype=torch.float64)
    sums.index_add_(0, distances.flatten(), weights.double().flatten())
    return sums / (size - places)


def _leading_names(stage: Stage) -> tuple[str, ...]:
    """Names of the positions of a block before its first token."""
    config = stage.model_config
    if not config.is_block:
        return ()
    if config.token_decoder_input != "prefix":
        return ("begin",)
    return tuple(f"prefix {index + 1}" for index in range(config.prefix_length))


@contextmanager
def _observed(stage: nn.Module, observers: dict[str, Observer]) -> Iterator[None]:
    """Calls observers before the named modules."""
    handles = [stage.get_submodule(name).register_forward_pre_hook(observer) for name, observer in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
