"""What a micro-batch of token ids becomes before the first layer: targets and attention masks.

Notation: B sequences, S tokens per sequence, L block length, N = S / L blocks, T positions of a block in the token
decoder (ModelConfig.local_length).
The token decoder keeps N rows per sequence (row i decodes block i + 1; the last row has no target), so that rows divide
evenly under sequence parallelism.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.config import ModelConfig


@dataclass(frozen=True)
class MicroBatch:
    """Token ids and which of them are real.

    Attributes:
        token_ids: int64 [B, S]; padded slots hold the end-of-text id: the embedder sees them in partly padded blocks.
        mask: bool [B, S]; False marks padding.
        documents: int64 [B, S], equal for slots of one document, padding included: documents are kept apart; a block
            belongs to one document. None: a sequence is one text.
        scores_greedy: the last piece also says whether each target is the most likely token.
    """

    token_ids: Tensor
    mask: Tensor
    documents: Tensor | None = None
    scores_greedy: bool = False


@dataclass(frozen=True)
class ModelInputs:
    """Everything the pieces of the model read besides hidden states.

    Attributes:
        token_ids: int64; [B, N, L] for block models, [B, S] for vanilla.
        global_mask: bool [B, 1, N, N] or [B, 1, S, S], True = may attend; None = plain causal attention.
        local_mask: bool [N * B, 1, T, T] for the token decoder; None = plain causal attention.
        targets: int64 [N * B, L] or [S, B]: the token each output position predicts.
        target_mask: bool, as targets: False where there is nothing to predict.
        token_mask: bool, as token_ids: False marks padding.
        scores_greedy: see MicroBatch.
    """

    token_ids: Tensor
    global_mask: Tensor | None
    local_mask: Tensor | None
    targets: Tensor
    target_mask: Tensor
    token_mask: Tensor
    scores_greedy: bool = False


def count_targets(config: ModelConfig, batch: MicroBatch) -> Tensor:
    """Number of valid targets."""
    return target_mask(config, batch).sum()


def prepare_inputs(config: ModelConfig, batch: MicroBatch) -> ModelInputs:
    """Builds the model's inputs from one micro-batch; every pipeline stage and tensor-parallel rank does so alike."""
    return _block_inputs(config, batch) if config.is_block else _vanilla_inputs(config, batch)


def target_mask(config: ModelConfig, batch: MicroBatch) -> Tensor:
    """Which targets are valid, laid out like ModelInputs.targets.

    These are real tokens outside the first block (vanilla: but the first token). Of documents that are kept apart, the
    first block (token) is left out too: what stands before it is of another document.
    """
    if batch.documents is None:
        return as_targets(config, batch.mask)
    documents = _unit_documents(config, batch.documents)
    continues = torch.zeros_like(documents, dtype=torch.bool)
    continues[:, 1:] = documents[:, 1:] == documents[:, :-1]
    return as_targets(config, batch.mask & continues.repeat_interleave(config.unit_length, dim=1))


def _unit_documents(config: ModelConfig, documents: Tensor) -> Tensor:
    """Documents [B, S] of the positions of the global decoder: [B, N] for block models, [B, S] for vanilla."""
    return documents[:, :: config.unit_length]


def as_targets(config: ModelConfig, values: Tensor) -> Tensor:
    """Lays [B, S] out as targets: [N * B, L] for block models, [S, B] for vanilla; the last step is 0 (False)."""
    if not config.is_block:
        return _next(values).transpose(0, 1).contiguous()
    blocks = values.view(len(values), -1, config.block_length)
    return _next(blocks).transpose(0, 1).reshape(-1, config.block_length)


def _block_inputs(config: ModelConfig, batch: MicroBatch) -> ModelInputs:
    blocks = batch.token_ids.view(len(batch.token_ids), -1, config.block_length)
    mask = batch.mask.view_as(blocks)
    return ModelInputs(
        token_ids=blocks,
        global_mask=_causal_mask(config, mask.any(dim=2), batch.documents),
        local_mask=_local_mask(config, as_targets(config, batch.mask), num_sequences=len(blocks)),
        targets=as_targets(config, batch.token_ids),
        target_mask=target_mask(config, batch),
        token_mask=mask,
        scores_greedy=batch.scores_greedy,
    )


def _vanilla_inputs(config: ModelConfig, batch: MicroBatch) -> ModelInputs:
    return ModelInputs(
        token_ids=batch.token_ids,
        global_mask=_causal_mask(config, batch.mask, batch.documents),
        local_mask=None,
        targets=as_targets(config, batch.token_ids),
        target_mask=target_mask(config, batch),
        token_mask=batch.mask,
        scores_greedy=batch.scores_greedy,
    )


def _next(values: Tensor) -> Tensor:
    """Shifts [B, N, ...] one step to the left along N; the last step becomes 0 (False)."""
    shifted = torch.zeros_like(values)
    shifted[:, :-1] = values[:, 1:]
    return shifted


def _causal_mask(config: ModelConfig, valid: Tensor, documents: Tensor | None) -> Tensor | None:
    """Causal attention over [B, N] that skips padded keys and other documents; None when it is plainly causal.

    A query with no real key before it (leading padding) attends to itself, so that no future leaks in. Rotary positions
    are relative, so inside a document they are as if it stood alone.
    """
    units = None if documents is None else _unit_documents(config, documents)
    if bool(valid.all()) and (units is None or bool((units == units[:, :1]).all())):
        return None
    size = valid.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=valid.device).tril()
    allowed = causal & valid[:, None, :]
    if units is not None:
        allowed &= units[:, :, None] == units[:, None, :]
    empty = ~allowed.any(dim=2, keepdim=True)
    itself = torch.eye(size, dtype=torch.bool, device=valid.device)
    return (allowed | (empty & itself))[:, None]


def _local_mask(config: ModelConfig, real: Tensor, num_sequences: int) -> Tensor | None:
    """Causal attention inside each block [rows, L]: context and real earlier tokens; None when all tokens are real.

    The last row of each sequence has no target, so it does not matter what it attends to.
    """
    tokens = real[:, :-1]
    if bool(tokens[:-num_sequences].all()):
        return None
    leading = tokens.new_ones(tokens.shape[0], config.leading_positions)
    keys = torch.cat((leading, tokens), dim=1)
    size = keys.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=keys.device).tril()
    return (causal & keys[:, None, :])[:, None]
